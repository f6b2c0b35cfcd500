"""How answers of VQA and TextVQA are written alike before they are compared.

After the answer processor of EvalAI, whose servers score both (the rules of visualqa.org/evaluation.html in code), and
after VLMEvalKit's variant of it.
"""

import re

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS: dict[str, str] = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # the published table has "I'm" and its like in capitals, which no text in lower case meets
# The published code has the flag re.UNICODE, 32, in the place of the count of replacements.
MOST_FULL_STOPS = int(re.UNICODE)
NOT_BEFORE_A_DIGIT = re.compile(r"\.(?!\d)")
NOT_BESIDE_A_DIGIT = re.compile(r"(?<!\d)\.(?!\d)")


def _without_one(word):
    """The spellings of a word that leave out one of its apostrophes."""
    return (word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'")


CONTRACTIONS = {spelling: word for word in CONTRACTED for spelling in _without_one(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the published table


def normalised(text: str) -> str:
    """An answer as EvalAI, lmms-eval and InternVL compare it: 'The Coca-Cola.' -> 'coca cola', 'two' -> '2'."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"[\n\t]", " ", text.strip()).strip()
    return _in_common_words(_without_punctuation(text, NOT_BEFORE_A_DIGIT))


def normalised_vlmevalkit(text: str) -> str:
    """An answer as VLMEvalKit compares it: a full stop after a digit stays ('No. 5.' -> 'no 5.'), "'s" is no word."""
    return _in_common_words(without_punctuation(re.sub(r"[\n\t]", " ", text).strip()))


def without_punctuation(text: str) -> str:
    """The text without punctuation, as VLMEvalKit removes it: 'Yes, it is.' -> 'Yes it is', 'yes-no' -> 'yes no'."""
    return _without_punctuation(text, NOT_BESIDE_A_DIGIT)


def _without_punctuation(text: str, full_stops: re.Pattern[str]) -> str:
    """A mark beside a blank goes, one between letters becomes a blank; beside a number like 1,000 all marks go."""
    grouped = re.search(r"\d,\d", text)
    found = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_blank or grouped else " ")
    return full_stops.sub("", found, count=MOST_FULL_STOPS)


def _in_common_words(text: str) -> str:
    """Lower case, without articles, numbers up to ten in digits, contractions with their apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

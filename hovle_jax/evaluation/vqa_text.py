"""How answers of VQA and TextVQA are written alike before they are compared.

After the answer processor of EvalAI, whose servers score both (the rules of visualqa.org/evaluation.html in code).
"""

import re

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = dict(none="0") | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _without_one(word):
    """The spellings of a word that leave out all of its apostrophes, or one of two."""
    places = [i for i, letter in enumerate(word) if letter == "'"]
    yield word.replace("'", "")
    if len(places) > 1:
        yield from (word[:i] + word[i + 1 :] for i in places)


CONTRACTIONS = {spelling: word for word in CONTRACTED for spelling in _without_one(word)}


def normalised(text: str) -> str:
    """An answer in the form in which it is compared: 'The Coca-Cola.' -> 'coca cola', 'two' -> '2'."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"[\n\t]", " ", text.strip()).strip()
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text):
    """A mark beside a blank goes, one between letters becomes a blank; a full stop stays before a digit alone."""
    found = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_blank else " ")
    return re.sub(r"\.(?!\d)", "", found)

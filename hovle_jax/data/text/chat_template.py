"""Chat templates of public checkpoints: Jinja, rendered in a sandbox in a process of its own (`rendering`)."""

import re
from collections.abc import Sequence

from hovle_jax.data.text import rendering
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError

Turns = Sequence[tuple[str, str | None]]  # ((question, answer), ...); None = to be generated
Span = tuple[str | None, str | None, bool]  # (text or None, special token or None, whether it is of an answer)

IMAGE_MARK = "<image>"  # marks an image's place in the text of a conversation
PRIVATE = range(0xE000, 0xF900)  # Unicode's private use area


def render(
    template: str, messages: list[dict[str, str]], bos: str = "", eos: str = "", add_generation_prompt: bool = True
) -> str:
    """A conversation as one string; with `add_generation_prompt` it ends where the assistant's answer begins.

    Args:
      template: Jinja source, as in `tokenizer_config.json`.
      messages: [{"role", "content"}].
    Raises:
      UserError: the template is broken, refuses the messages, or takes more than `rendering` allows.
    """
    settings = dict(add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos, tools=None)
    return rendering.render(template, {"messages": messages, **settings})


def check(template: str) -> None:
    """Raises UserError where a template is no Jinja."""
    rendering.render(template, None)


def spans(tokenizer: Tokenizer, turns: Turns, system: str = "") -> list[Span]:
    """A conversation in the tokenizer's own template, split at special tokens, images and answers.

    A rendered template is one string. In it, its special tokens look like those that a user wrote, and answers are not
    marked. So private characters are put into the messages before they are rendered: one breaks up every special token
    that is written there, one stands for an image, and two enclose each answer.

    Args:
      turns: ((question, answer), ...); the last answer may be None, to be generated.
      system: the system message; empty = the template's own.
    Returns:
      [(text or None, special token or None, is_answer)]; an image is the token `IMAGE_MARK`. An answer includes its end
      token.
    Raises:
      UserError: see `render`; or the template changes an answer, or puts no stop token after one.
    """
    template, specials = tokenizer.chat_template or "", tokenizer.specials
    texts = [template, system, *(text for turn in turns for text in turn if text)]
    used = set().union(*texts)
    free = [chr(c) for c in PRIVATE if chr(c) not in used][:4]
    if len(free) < 4:
        raise UserError(
            "the conversation uses nearly all private characters of Unicode, and its template needs four unused ones"
        )
    shield, image, begin, end = free
    longest_first = sorted(specials, key=len, reverse=True)

    def message(role, text):
        text = text.replace(IMAGE_MARK, image) if role == "user" else text
        for token in longest_first:
            text = text.replace(token, token[0] + shield + token[1:])
        if role == "assistant":  # the marks go inside the surrounding blanks, which a template may strip
            inner = text.strip()
            start = text.index(inner)
            text = text[:start] + begin + inner + end + text[start + len(inner) :]
        return {"role": role, "content": text}

    messages = [message("system", system)] if system else []
    for question, answer in turns:
        messages.append(message("user", question))
        if answer is not None:
            messages.append(message("assistant", answer))
    by_id: dict[int | None, str] = {i: token for token, i in specials.items()}
    bos, eos = (by_id.get(i, "") for i in (tokenizer.bos, tokenizer.eos))
    text = render(template, messages, bos, eos, add_generation_prompt=turns[-1][1] is None)

    marks = [char for char in text if char in (begin, end)]
    if marks != [begin, end] * sum(answer is not None for _, answer in turns):
        raise UserError(
            "the chat template takes answers apart (as some do with <think>); leave <think> blocks out of the answers"
        )
    stops = {by_id[i] for i in tokenizer.stop_ids}
    split, is_answer, is_over = [], False, False
    for piece in re.split("(" + "|".join(map(re.escape, [*longest_first, image, begin, end])) + ")", text):
        if piece in (begin, end):
            is_answer, is_over = True, piece == end
        elif piece == image:
            split.append((None, IMAGE_MARK, False))
        elif piece in specials:
            split.append((None, piece, is_answer))
            is_answer = is_answer and not (is_over and piece in stops)
        elif piece:
            split.append((piece.replace(shield, ""), None, is_answer))
    if is_answer:
        raise UserError(f"the chat template ends an answer with none of the stop tokens {', '.join(sorted(stops))}")
    return split

"""Chat templates as public checkpoints bring them: Jinja, rendered in a sandbox."""

import re

from hovle_jax.errors import UserError

IMAGE_MARK = "<image>"  # in a conversation's text, where an image stands
PRIVATE = range(0xE000, 0xF900)  # Unicode's private use area


def render(template, messages, bos="", eos="", add_generation_prompt=True):
    """A conversation as one string; with `add_generation_prompt` it ends where the assistant is to speak.

    Args:
      template: Jinja source, as in `tokenizer_config.json`.
      messages: [{"role", "content"}].
    Raises:
      UserError: the template is broken or refuses the messages.
    """
    try:
        import jinja2
        import jinja2.sandbox
    except ModuleNotFoundError:
        raise UserError('chat templates need the package jinja2; run: pip install "hovle_jax[convert]"') from None

    def refuse(message):
        raise UserError(f"the checkpoint's chat template refuses these messages: {message}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos, tools=None
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the checkpoint's chat template cannot be rendered ({error})") from None


def parts(tokenizer, turns, system=""):
    """A conversation by the tokenizer's own template, cut where special tokens, images and answers begin.

    A rendered template is one string, in which its special tokens and those that a message contains look alike, and in
    which answers are not marked. So private characters go into the messages before: one breaks every special token
    that is written there, others stand for images and around answers.

    Args:
      turns: ((question, answer), ...); the last answer may be None, to be generated.
      system: the system message; empty = the template's own.
    Returns:
      [(text or None, special token or None, is_answer)]; an image is the token `IMAGE_MARK`. An answer's end token is
      a part of it.
    Raises:
      UserError: see `render`; also a template that puts no stop token behind an answer.
    """
    template, specials = tokenizer.chat_template, tokenizer.specials
    texts = [template, system, *(text for turn in turns for text in turn if text)]
    free = (chr(c) for c in PRIVATE if not any(chr(c) in text for text in texts))
    shield, image, begin, end = (next(free) for _ in range(4))
    longest_first = sorted(specials, key=len, reverse=True)

    def message(role, text, before="", behind=""):
        text = text.replace(IMAGE_MARK, image) if role == "user" else text
        for token in longest_first:
            text = text.replace(token, token[0] + shield + token[1:])
        return {"role": role, "content": before + text + behind}

    messages = [message("system", system)] if system else []
    for question, answer in turns:
        messages.append(message("user", question))
        if answer is not None:
            messages.append(message("assistant", answer, begin, end))
    by_id = {i: token for token, i in specials.items()}
    bos, eos = (by_id.get(i, "") for i in (tokenizer.bos, tokenizer.eos))
    text = render(template, messages, bos, eos, add_generation_prompt=turns[-1][1] is None)

    stops = {by_id[i] for i in tokenizer.stop_ids}
    found, is_answer, is_over = [], False, False
    for piece in re.split("(" + "|".join(map(re.escape, [*longest_first, image, begin, end])) + ")", text):
        if piece in (begin, end):
            is_answer, is_over = True, piece == end
        elif piece == image:
            found.append((None, IMAGE_MARK, False))
        elif piece in specials:
            found.append((None, piece, is_answer))
            is_answer = is_answer and not (is_over and piece in stops)
        elif piece:
            found.append((piece.replace(shield, ""), None, is_answer))
    if is_answer:
        raise UserError(f"the chat template ends an answer with none of the stop tokens {', '.join(sorted(stops))}")
    return found

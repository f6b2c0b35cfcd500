"""Chat templates as public checkpoints bring them: Jinja, rendered in a sandbox."""

import datetime
import json
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
        return compiled(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos, tools=None
        )
    except UserError:
        raise
    except Exception as error:  # what a template does can fail in any way
        raise UserError(f"the checkpoint's chat template cannot be rendered ({error})") from None


def compiled(template):
    """A Jinja template in a sandbox, with what public templates use beside Jinja's own. Raises UserError."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ModuleNotFoundError:
        raise UserError('chat templates need the package jinja2; run: pip install "hovle_jax[convert]"') from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks answers; what is in it is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise UserError(f"the checkpoint's chat template refuses these messages: {message}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, TypeError) as error:
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
      UserError: see `render`; also a template that changes answers, or puts no stop token after one.
    """
    template, specials = tokenizer.chat_template, tokenizer.specials
    texts = [template, system, *(text for turn in turns for text in turn if text)]
    used = set().union(*texts)
    free = [chr(c) for c in PRIVATE if chr(c) not in used][:4]
    if len(free) < 4:
        raise UserError("the conversation has every private character of Unicode, of which its template needs four")
    shield, image, begin, end = free
    longest_first = sorted(specials, key=len, reverse=True)

    def message(role, text):
        text = text.replace(IMAGE_MARK, image) if role == "user" else text
        for token in longest_first:
            text = text.replace(token, token[0] + shield + token[1:])
        if role == "assistant":  # within the blanks around it, which a template may strip
            inner = text.strip()
            start = text.index(inner)
            text = text[:start] + begin + inner + end + text[start + len(inner) :]
        return {"role": role, "content": text}

    messages = [message("system", system)] if system else []
    for question, answer in turns:
        messages.append(message("user", question))
        if answer is not None:
            messages.append(message("assistant", answer))
    by_id = {i: token for token, i in specials.items()}
    bos, eos = (by_id.get(i, "") for i in (tokenizer.bos, tokenizer.eos))
    text = render(template, messages, bos, eos, add_generation_prompt=turns[-1][1] is None)

    marks = [char for char in text if char in (begin, end)]
    if marks != [begin, end] * sum(answer is not None for _, answer in turns):
        raise UserError("the chat template takes answers apart (as some do with <think>); leave that part of them out")
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

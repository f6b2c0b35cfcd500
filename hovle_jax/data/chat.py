"""Chat templates as public checkpoints bring them: Jinja, rendered in a sandbox."""

from hovle_jax.errors import UserError

FIRST_PRIVATE = 0xE000  # Unicode's private use area, to U+F8FF


def render(template, messages, bos="", eos=""):
    """A prompt that ends where the assistant is to speak.

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
            messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos, tools=None
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the checkpoint's chat template cannot be rendered ({error})") from None


def encode(tokenizer, template, messages):
    """Ids of a conversation. The template's special tokens become ids; those in the messages stay ordinary text.

    A template gives one string, in which the two look alike. So a private character is put into every special token
    that a message contains before it is rendered, and taken out of the text that is left between special tokens.
    """
    names = tokenizer.specials
    by_id = {i: token for token, i in names.items()}
    texts = [message["content"] for message in messages]
    shield = next(chr(c) for c in range(FIRST_PRIVATE, 0xF900) if not any(chr(c) in t for t in [template, *texts]))

    def shielded(text):
        for token in sorted(names, key=len, reverse=True):
            text = text.replace(token, token[0] + shield + token[1:])
        return text

    text = render(
        template,
        [message | {"content": shielded(message["content"])} for message in messages],
        bos=by_id.get(tokenizer.bos, ""),
        eos=by_id.get(tokenizer.eos, ""),
    )
    return tokenizer.encode_special(text, without=shield)

"""A request's JSON: its numbers, and its messages as a prompt."""

from collections.abc import Callable
from typing import Any

from hovle_jax.data.text.conversation import IMAGE_MARK
from hovle_jax.inference.generate import Prompt
from hovle_jax.serving.limits import Limits, Refused

OF_AN_IMAGE = ("url", "detail", "max_dynamic_patch")  # the last is not OpenAI's


def number(body: dict, name: str, kind: type, least: float | None = None, most: float | None = None) -> Any:
    """A field as a number of a kind, or None without it. Raises Refused: no number, or beyond its bounds."""
    value = body.get(name)
    if value is None:
        return None
    try:
        number = kind(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except (OverflowError, ValueError):  # no end, or no number
        number = None
    if number is None or number != value:
        raise Refused(400, f"{name}={value!r}: a number is needed", name)
    if (least is not None and number < least) or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise Refused(400, f"{name}={number}: {allowed}", name)
    return number


def prompt_of(body: dict, limits: Limits, image_of: Callable[[str], Any]) -> Prompt:
    """The `messages` of a request. Raises Refused: a role out of place, a part that cannot be read, too much of it."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages: a list of at least one message is needed")
    default = _tiles({"max_dynamic_patch": body.get("max_dynamic_patch")})
    system, turns, images = [], [], []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role == "user":
            text, more = _content(content, default)
            images += more
            if turns and turns[-1][1] is None:  # two in a row are one
                text = f"{turns.pop()[0]}\n{text}"
            turns.append((text, None))
        elif role == "assistant" and message.get("tool_calls"):
            raise Refused(400, "tool_calls are not supported", "messages")
        elif role == "assistant" and turns and turns[-1][1] is None:
            turns[-1] = (turns[-1][0], _text_of(content))
        elif role in ("system", "developer"):
            system.append(_text_of(content))
        else:
            raise Refused(400, f"a message of the role {role!r} is out of place here")
    if not turns or turns[-1][1] is not None:
        raise Refused(400, "messages: the last one must be the user's")
    if len(images) > limits.images:
        raise Refused(413, f"{len(images)} images; at most {limits.images} are read")
    if sum(len(text) + len(answer or "") for text, answer in turns) + sum(map(len, system)) > limits.characters:
        raise Refused(413, f"the messages have more than {limits.characters:,} characters", "messages")
    shown = tuple(image_of(url) for url, _ in images)
    return Prompt(tuple(turns), shown, "\n".join(system), tuple(tiles for _, tiles in images))


def _text_of(content):
    text, images = _content(content, None)
    if images:
        raise Refused(400, "images belong into the user's messages")
    return text


def _content(content, default):
    """A message's content -> (text with a mark for each image, [(url, max tiles or None)])."""
    if content is None or isinstance(content, str):
        return _characters(content or ""), []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Refused(400, "content: a text or a list of parts")
    parts, images = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append(_characters(part["text"]))
        elif part.get("type") == "image_url":
            images.append(_image(part.get("image_url"), default))
            parts.append(None)
        else:
            raise Refused(400, f"a part of the type {part.get('type')!r} cannot be read")
    return _marked(parts), images


def _characters(text):
    """JSON can write halves of characters, which are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, "content: half of a surrogate pair is no character", "messages") from None
    return text


def _marked(parts):
    """Texts and images (None) as one text. Marks that the texts have already are the images' places; images after all
    texts go in front, as the model has seen them in training."""
    texts = [part for part in parts if part is not None]
    count = len(parts) - len(texts)
    if not count or sum(text.count(IMAGE_MARK) for text in texts) == count:
        return "\n".join(texts)
    if parts[: len(texts)] == texts:
        parts = parts[len(texts) :] + texts
    return "\n".join(IMAGE_MARK if part is None else part for part in parts)


def _image(image, default):
    image = {"url": image} if isinstance(image, str) else image
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise Refused(400, "image_url: a url is needed")
    for name in [name for name in image if name not in OF_AN_IMAGE]:
        known = ", ".join(OF_AN_IMAGE)
        raise Refused(400, f"image_url.{name} is not supported: known are {known}", "messages", "unknown_parameter")
    return image["url"], _tiles(image) or default


def _tiles(image):
    """The most tiles of an image: `max_dynamic_patch`, or 1 for `detail: low`; None = the model's own."""
    tiles = number(image, "max_dynamic_patch", int, least=1)
    if image.get("detail") not in (None, "auto", "low", "high"):
        raise Refused(400, f"detail={image['detail']!r}: auto, low or high")
    return 1 if tiles is None and image.get("detail") == "low" else tiles

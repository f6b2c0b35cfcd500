"""What a server accepts, and how it says no."""

import dataclasses

KINDS = {401: "authentication_error", 429: "rate_limit_error"}  # OpenAI's types of errors, by status
RETRY_SECONDS = 1  # after which a client may try again that was refused because there was too much to do


class Refused(Exception):
    """A request that is not served.

    Attributes:
      status: of HTTP.
      param: the field that is to blame.
      code: OpenAI's name of the mistake, where it has one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def json(self) -> dict:
        """OpenAI's form."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request, and of all.

    Attributes:
      head_seconds: in which its head must have come.
      body_bytes: of the request's JSON, images included.
      body_seconds: in which it must have come.
      pixels: of one image.
      request_pixels: of all images of a request.
      images: of a request.
      characters: of its messages.
      new_tokens: of an answer; a request that asks for more gets so many.
      queue: answers that are made or wait for a slot.
      seconds: from a request's arrival to its last token.
      hosts: names from which images are fetched by http(s); none = only data URLs.
      held_bytes: of all bodies that are being received or whose images are being decoded.
      threads: that decode images.
      preparing: requests that are in these threads or wait for one.
    """

    head_seconds: float = 30.0
    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    pixels: int = 50_000_000
    request_pixels: int = 100_000_000
    images: int = 32
    characters: int = 1_000_000
    new_tokens: int = 2048
    queue: int = 256
    seconds: float = 600.0
    hosts: tuple[str, ...] = ()
    held_bytes: int = 2**28
    threads: int = 4
    preparing: int = 64

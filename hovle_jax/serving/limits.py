"""What a server accepts, and how it says no."""

import dataclasses


class Refused(Exception):
    """A request that is not served.

    Attributes:
      status: of HTTP.
      kind: OpenAI's type of error.
    """

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request, and of all.

    Attributes:
      body_bytes: of the request's JSON, images included.
      pixels: of one image.
      images: of a request.
      new_tokens: of an answer; a request that asks for more gets so many.
      queue: requests that wait for a slot.
      seconds: from a request's arrival to its last token.
      hosts: names from which images are fetched by http(s); none = only data URLs.
    """

    body_bytes: int = 32 * 2**20
    pixels: int = 50_000_000
    images: int = 32
    new_tokens: int = 2048
    queue: int = 256
    seconds: float = 600.0
    hosts: tuple[str, ...] = ()

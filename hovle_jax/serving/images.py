"""Images of a request: data URLs, and URLs of hosts that the server's owner named."""

import base64
import binascii
from typing import TYPE_CHECKING

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.images import decode_image, image_size
from hovle_jax.serving.limits import Limits, Refused
from hovle_jax.system import fetching

if TYPE_CHECKING:
    from PIL import Image


class Images:
    """The images of one request, whose pixels are counted together."""

    def __init__(self, limits: Limits):
        self._limits, self._pixels = limits, 0

    def fetched(self, url: str) -> "Image.Image":
        """The image of an `image_url`.

        Raises:
          Refused: no such scheme, a host that is not allowed, no image, too large, or too much with those before it.
        """
        scheme = url[:8].split(":", 1)[0].lower()
        if scheme == "data":
            data = _inline(url)
        elif scheme in ("http", "https"):
            data = _download(url, self._limits)
        else:
            raise Refused(400, "image_url: a data URL is needed (data:image/png;base64,...) or an allowed http(s) URL")
        return self._opened(data)

    def _opened(self, data):
        """Its size is known before it is decoded, so that a small file cannot fill the memory."""
        try:
            width, height = image_size(data)
            if width * height > self._limits.pixels:
                raise Refused(413, f"an image has {width} x {height} pixels; at most {self._limits.pixels:,} are read")
            self._pixels += width * height
            if self._pixels > self._limits.request_pixels:
                raise Refused(413, f"the images have more than {self._limits.request_pixels:,} pixels together")
            return decode_image(data)
        except BadSample as error:
            status = 413 if error.reason == "decompression_bomb" else 400
            raise Refused(status, f"an image cannot be read ({error.reason}: {error.detail})") from None


def _inline(url):
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused(400, "image_url: a data URL must be base64, as data:image/png;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, "image_url: the data URL's base64 is broken") from None


def _download(url, limits):
    try:
        host = fetching.host_of(url)
        if host not in limits.hosts:
            allowed = ", ".join(limits.hosts) or "no host is; send a data URL"
            raise Refused(403, f"image_url: images of {host or 'no host'} are not allowed ({allowed})")
        return fetching.fetch(url, limits.body_bytes)
    except fetching.CannotFetch as error:
        status = 403 if error.private else 413 if error.too_large else 400
        raise Refused(status, f"image_url: {error}") from None

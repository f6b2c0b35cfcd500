"""Images of a request: data URLs, and URLs of hosts that the server's owner named."""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from typing import TYPE_CHECKING

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.images import decode_image, image_size
from hovle_jax.serving.limits import Limits, Refused

if TYPE_CHECKING:
    from PIL import Image

SECONDS = 10.0  # to fetch an image


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
    """One GET without redirects, to an address that was checked and is the one connected to."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise Refused(400, f"image_url: no URL ({error})") from None
    host = (parts.hostname or "").lower()
    if host not in limits.hosts:
        allowed = ", ".join(limits.hosts) or "no host is; send a data URL"
        raise Refused(403, f"image_url: images of {host or 'no host'} are not allowed ({allowed})")
    try:
        with contextlib.closing(_connection(parts.scheme, host, port)) as connection:
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("GET", path, headers={"Host": host, "User-Agent": "hovle_jax"})
            response = connection.getresponse()
            if response.status != 200:
                raise Refused(400, f"image_url: {host} answered {response.status}; redirects are not followed")
            data = _read(response, limits.body_bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        raise Refused(400, f"image_url: {host} could not be read ({error})") from None
    if len(data) > limits.body_bytes:
        raise Refused(413, f"image_url: more than {limits.body_bytes:,} bytes")
    return data


def _read(response, most):
    """In parts, as a host that sends one byte after another never waits long enough for the socket's own limit."""
    data, deadline = bytearray(), time.monotonic() + SECONDS
    while len(data) < most and (part := response.read1(2**16)):
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {SECONDS:g} seconds")
    return bytes(data)


def _connection(scheme, host, port):
    address = public_address(host, port)
    raw = socket.create_connection((address, port), timeout=SECONDS)
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    if scheme == "https":
        raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
    connection.sock = raw
    return connection


def public_address(host: str, port: int) -> str:
    """An address of a host. Raises Refused where one of its addresses is private: the name may lead inside."""
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    private = [address for address in found if not ipaddress.ip_address(address).is_global]
    if private:
        raise Refused(403, f"image_url: {host} is a private address")
    return sorted(found)[0]

"""Files of the web that strangers name: one GET, without redirects, never of an address inside, bounded in all ways."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse

SECONDS = 10.0  # to fetch a file, and to wait for each of its parts
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # its last 32 bits are an address of version 4


class CannotFetch(Exception):
    """Why a URL was not fetched.

    Attributes:
      private: the host has an address that is not of the public Internet.
      too_large: it has more bytes than may be read.
    """

    def __init__(self, message: str, private: bool = False, too_large: bool = False):
        super().__init__(message)
        self.private, self.too_large = private, too_large


def host_of(url: str) -> str:
    """The host of an http(s) URL, in lower case; empty where it names none. Raises CannotFetch for what is no URL."""
    return (_parts(url).hostname or "").lower()


def _parts(url):
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises
    except ValueError as error:
        raise CannotFetch(f"no URL ({error})") from None
    return parts


def fetch(url: str, most_bytes: int, seconds: float = SECONDS) -> bytes:
    """The bytes of an http(s) URL. The address that is checked is the one connected to, whatever the name says next.

    Raises:
      CannotFetch: no such URL, a private address, any answer but 200, too many bytes, or not within so many seconds.
    """
    parts, host = _parts(url), host_of(url)
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise CannotFetch("no URL of http or https with a host")
    port = parts.port or (443 if parts.scheme.lower() == "https" else 80)
    deadline = time.monotonic() + seconds
    try:
        with (
            contextlib.closing(_connection(parts.scheme.lower(), host, port, seconds)) as connection,
            _ended_after(connection.sock, seconds),
        ):
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request(
                "GET", path, headers={"Host": parts.netloc.rpartition("@")[2], "User-Agent": "hovle_jax"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise CannotFetch(f"{host} answered {response.status}; redirects are not followed")
            data = _read(response, most_bytes + 1, deadline, seconds)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: control characters in the path
        raise CannotFetch(f"{host} could not be read ({error})") from None
    if len(data) > most_bytes:
        raise CannotFetch(f"more than {most_bytes:,} bytes", too_large=True)
    return data


@contextlib.contextmanager
def _ended_after(raw, seconds):
    """Ends a connection after so many seconds: a host that sends byte after byte never meets the socket's own limit."""

    def end():
        with contextlib.suppress(OSError):
            raw.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(response, most, deadline, seconds):
    data = bytearray()
    while len(data) < most and (part := response.read1(2**16)):
        data += part
        if time.monotonic() > deadline:
            break
    if time.monotonic() > deadline:  # also where the connection was ended, which reads like the end of the file
        raise TimeoutError(f"not within {seconds:g} seconds")
    return bytes(data)


def _connection(scheme, host, port, seconds):
    raw = socket.create_connection((public_address(host, port), port), timeout=seconds)
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    if scheme == "https":
        raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
    connection.sock = raw
    return connection


def public_address(host: str, port: int) -> str:
    """An address of a host. Raises CannotFetch where one of its addresses is private: the name may lead inside."""
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not all(map(is_public, found)):
        raise CannotFetch(f"{host} is a private address", private=True)
    return sorted(found)[0]


def is_public(address: str) -> bool:
    """Whether an IP address is of the public Internet; of one that wraps another, whether both are."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if inner is None and isinstance(found, ipaddress.IPv6Address) and found in NAT64:
        inner = ipaddress.ip_address(int(found) & 0xFFFFFFFF)
    public = found.is_global and not found.is_multicast
    return public and (inner is None or is_public(str(inner)))

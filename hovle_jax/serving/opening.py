"""What a server needs before it loads a model: the key that opens it, and the socket that it listens on."""

import os
import pathlib
import socket

from hovle_jax.errors import UserError
from hovle_jax.system import command_line

VARIABLE = "HOVLE_API_KEY"


def key_of(given: str, file: str) -> str:
    """The key that clients must send, or ''.

    Args:
      given: on the command line, which other users of the machine can read.
      file: the path of a file that holds it; without either it is that of the environment.
    Raises:
      UserError: both are given, or the file cannot be read or is empty.
    """
    if given and file:
        raise UserError("--api_key and --api_key_file are both given: leave out the first")
    if given:
        command_line.warn(f"--api_key is seen by all users of this machine; use --api_key_file or {VARIABLE}")
    if not file:
        return given or os.environ.get(VARIABLE, "")
    try:
        key = pathlib.Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file={file} cannot be read ({error})") from None
    if not key:
        raise UserError(f"--api_key_file={file} is empty: write the key into it")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 = a free one. Raises UserError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}, port {port} ({error}): give another --port or --host") from None

"""Bytes of rows as text and JSON."""

import json
from typing import Any

from hovle_jax.data.bad_samples import BadSample

BYTE_ORDER_MARK = "\ufeff".encode()  # some editors put it at the beginning of a file
LARGEST_ROW = 2**25  # bytes of a row's JSON, whose objects in memory may take twenty times as many


def decode_text(raw: bytes) -> str:
    """The text, without a mark of the byte order. Raises BadSample."""
    try:
        return raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", error) from None


def decode_json(raw: bytes) -> Any:
    """The value. Raises BadSample for what is no JSON, or too deep."""
    try:
        return json.loads(decode_text(raw))
    except ValueError as error:  # also a number with too many digits
        raise BadSample("broken_json", error) from None
    except RecursionError:
        raise BadSample("broken_json", "nested too deeply") from None

"""Mutations of valid files: of their bytes, of the numbers in them, and of the values of their JSON.

A file set is {name: bytes}. All that is random comes from one random.Random, so an input can be made again.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Sequence

Files = dict[str, bytes]
FIXED = "fixed"  # the name of a file that is left as it is
EXTREMES = (0, 1, -1, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, -(2**63), 2**63)
WORDS = (b"\0" * 8, b"\xff" * 8, b"\x1b[2J", b"../", b"/", b"\\", b"{", b"[" * 300, b"nan", b"1e999", b"\xef\xbb\xbf")
VALUES = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**40, 2**64, -(2**63), 10**30,
    "", "x", "\ud800", "\0", "../x", "\x1b[2J", "a" * 5000, [], {}, [[]], [None], [{}], {"": None}, [0] * 300,
)  # fmt: skip
DEEP = 3000  # arrays in arrays


def mutated(files: Files, seeds: Sequence[Files], rng: random.Random) -> Files:
    """A file set with one to four mutations."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        name = rng.choice(sorted(files.keys() - {FIXED}))
        content = files[name]
        kinds = [_bytes, _bytes, *(kind for test, kind in STRUCTURED if test(name, content))]
        others = [seed[name] for seed in seeds if name in seed]
        try:
            files[name] = rng.choice(kinds)(content, others, rng)
        except Exception:  # an earlier mutation has left no structure; zipfile alone raises errors of seven kinds
            files[name] = _bytes(content, others, rng)
    return files


def _bytes(content, others, rng):
    return rng.choice(OF_BYTES)(bytearray(content), others, rng)


def _span(content, rng):
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + int(2 ** rng.uniform(0, 10)))


def _flip(content, _, rng):
    for _ in range(rng.choice((1, 1, 2, 8))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _set(content, _, rng):
    if content:
        content[rng.randrange(len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(content)


def _number(content, _, rng):
    """An extreme integer, at any place or at a multiple of 4."""
    size = rng.choice((1, 2, 4, 8))
    value = (rng.choice(EXTREMES) + rng.choice((-1, 0, 0, 1))) % 256**size
    at = rng.randrange(len(content) + 1) // (step := rng.choice((1, 4))) * step
    content[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
    return bytes(content)


def _digits(content, _, rng):
    """An extreme integer for one that is written in digits."""
    places = [i for i, byte in enumerate(content[:4096]) if 48 <= byte <= 57]
    if not places:
        return _set(content, _, rng)
    start = rng.choice(places)
    end = start + 1
    while end < len(content) and 48 <= content[end] <= 57:
        end += 1
    content[start:end] = str(rng.choice(EXTREMES)).encode()
    return bytes(content)


def _cut(content, _, rng):
    return bytes(content[: rng.randrange(len(content) + 1)])


def _delete(content, _, rng):
    start, end = _span(content, rng)
    del content[start:end]
    return bytes(content)


def _repeat(content, _, rng):
    start, end = _span(content, rng)
    return bytes(content[:end] + content[start:end] * rng.choice((1, 2, 30)) + content[end:])


def _splice(content, others, rng):
    other = rng.choice(others) if others else content
    start, end = _span(other, rng)
    at = rng.randrange(len(content) + 1)
    return bytes(content[:at]) + bytes(other[start:end]) + bytes(content[at + rng.choice((0, end - start)) :])


def _word(content, _, rng):
    at = rng.randrange(len(content) + 1)
    return bytes(content[:at] + rng.choice(WORDS) + content[at:])


OF_BYTES = (_flip, _flip, _set, _number, _number, _digits, _cut, _delete, _repeat, _splice, _word)


# ---------------------------------------------------------------------------------------------------------------------
# Inside the structure of a file, so that the mutation gets past its first check.


def mutated_value(value: object, rng: random.Random) -> object:
    """A JSON value of which one part is replaced, removed, renamed or copied."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.6:
            return value | {key: mutated_value(value[key], rng)}
        if kind < 0.75:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.9:
            return value | {rng.choice(sorted(value)): value[key]}
        return value | {rng.choice(("", "\ud800", "x" * 2000, "__class__", key + "\0")): value[key]}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.7:
            return [*value[:at], mutated_value(value[at], rng), *value[at + 1 :]]
        return [*value[:at], *value[at : at + 1] * rng.choice((0, 2, 50)), *value[at + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.5:
        return rng.choice((value + 1, -value, value * 1000, str(value), rng.choice(EXTREMES)))
    return rng.choice(VALUES)


def _json(content, _, rng):
    text = json.dumps(mutated_value(json.loads(content), rng))
    if rng.random() < 0.02:
        text = text.replace("null", "[" * DEEP + "]" * DEEP, 1)
    return text.encode()


def _json_lines(content, _, rng):
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    if _is_json("", lines[at]):
        lines[at] = _json(lines[at], _, rng)
    return b"\n".join(lines)


def _safetensors(content, _, rng):
    length = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + length], _, rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _tar(content, others, rng):
    """Of a member's header, with the right checksum."""
    blocks = [i for i in range(0, len(content) - 511, 512) if content[i + 257 : i + 262] == b"ustar"]
    at = rng.choice(blocks)
    header = bytearray(_bytes(content[at : at + 512], others, rng)[:512].ljust(512, b"\0"))
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return content[:at] + bytes(header) + content[at + 512 :]


def _zip(content, _, rng):
    """Of a member's content, with the right checksum."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", rng.choice((0, 8))) as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            member = old.read(name)
            new.writestr(name, _bytes(member, [member], rng) if name == chosen else member)
    return out.getvalue()


def _is_json(_, content):
    try:
        return isinstance(json.loads(content), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_safetensors(name, content):
    length = int.from_bytes(content[:8], "little")
    return name.endswith(".safetensors") and length < 2**20 and _is_json(name, content[8 : 8 + length])


STRUCTURED: Sequence[tuple[Callable[[str, bytes], bool], Callable]] = (
    (lambda name, content: name.endswith((".json", "line")) and _is_json(name, content), _json),
    (lambda name, _: name.endswith(".jsonl"), _json_lines),
    (_is_safetensors, _safetensors),
    (lambda name, content: name.endswith(".tar") and content[257:262] == b"ustar", _tar),
    (lambda name, content: name.endswith(".npz") and zipfile.is_zipfile(io.BytesIO(content)), _zip),
)

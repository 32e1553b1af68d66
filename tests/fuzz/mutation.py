"""Changes of files: of any bytes, and of JSON, msgpack, pickles, archives and compressed data as such.

A mutator takes a file and a random generator, and returns another file.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

Mutator = Callable[[bytes, random.Random], bytes]

INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64 - 1,
    2**64,
    10**30,
)
TEXTS = (
    "",
    "x",
    "/",
    "..",
    "../x",
    "/etc/passwd",
    ".",
    "a/b",
    "\0",
    "a\0b",
    "\ud800",
    "é",
    "a" * 300,
    "F32",
    "<f4",
    "|O",
    "bfloat16",
    "0",
    "-1",
    "gs://x",
    "{}",
)
DEEP = 100_000
"""Brackets inside one another: far beyond Python's limit of recursion."""


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, remove, repeat or insert some bytes, or cut the file short."""
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    length = min(rng.choice((1, 1, 2, 4, 8, 16, 64, 1024)), max(1, len(out)))
    match rng.randrange(8):
        case 0 if at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        case 1:
            out[at : at + length] = rng.randbytes(length)
        case 2:
            del out[at : at + length]
        case 3:
            out[at:at] = out[at : at + length]
        case 4:
            out[at:at] = rng.randbytes(length)
        case 5:
            del out[at:]
        case 6:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTEGERS) % 256**width
            out[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        case _:
            other = rng.randrange(len(out) + 1)
            out[at : at + length] = out[other : other + length]
    return bytes(out)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Change one member of a JSON value, or nest it deeper than parsers go."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, rng)
    text = json.dumps(change_value(value, rng))
    if rng.random() < 0.03:
        number = rng.choice(
            ("9" * 5000, "1e999", "NaN", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP)
        )
        place = rng.choice([i for i, c in enumerate(text) if c in ":,["] or [0])
        text = text[: place + 1] + number + ("," if text[place] != ":" else "") + text[place + 1 :]
    return text.encode("utf-8", "surrogatepass")


def change_value(tree: Any, rng: random.Random) -> Any:
    """Return a copy of nested dicts and lists of which one value is replaced, removed, repeated or moved."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return _value(rng)
    parent, key = rng.choice(places)
    match rng.randrange(6):
        case 0 | 1:
            parent[key] = _value(rng)
        case 2:
            parent[key] = _near(parent[key], rng)
        case 3:
            del parent[key]
        case 4:
            other, place = rng.choice(places)
            parent[key] = copy.deepcopy(other[place])
        case _ if isinstance(parent, dict):
            parent[rng.choice(TEXTS) if rng.random() < 0.5 else f"{key}x"] = parent.pop(key)
        case _:
            parent.insert(key, copy.deepcopy(parent[key]))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def _value(rng: random.Random) -> Any:
    kinds = (
        None,
        True,
        False,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        [],
        {},
        [[]],
        [0],
        {"a": {}},
        [-1, -1],
    )
    return rng.choice(rng.choice((INTEGERS, TEXTS, kinds)))


def _near(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value * 2**32, float(value), str(value), [value])
        )
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("", *TEXTS)) + value[at + rng.randrange(3) :]
    return [value] if rng.random() < 0.5 else {"x": value}


def change_msgpack(data: bytes, rng: random.Random) -> bytes:
    """Change one member of a msgpack tree, or the inside of one of its arrays."""
    try:
        tree = msgpack.unpackb(data, raw=False, strict_map_key=False)
        places = [place for place in _places(tree) if isinstance(place[0][place[1]], msgpack.ExtType)]
        if places and rng.random() < 0.4:
            parent, key = rng.choice(places)
            kind, inner = parent[key]
            inner = change_msgpack(inner, rng) if rng.random() < 0.6 else change_bytes(inner, rng)
            parent[key] = msgpack.ExtType(rng.choice((kind, kind, kind, rng.randrange(128))), inner)
        else:
            tree = change_value(tree, rng)
        if rng.random() < 0.02:
            return b"\x91" * DEEP + msgpack.packb(tree)
        return msgpack.packb(tree)
    except Exception:  # what is no tree any more is changed as bytes
        return change_bytes(data, rng)


EVIL = (
    b"ctests.fuzz.canary\nsing\n(tR",
    b"cos\nsystem\n(S'true'\ntR",
    b"cbuiltins\neval\n(S'1'\ntR",
    b"\x8c\x11tests.fuzz.canary\x8c\x04sing\x93)R",
    b"(itests.fuzz.canary\nsing\n",
    b"ccollections\nOrderedDict\n(tR",
    b"ctorch\nFloatStorage\n(K\x04tR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(tR",
    b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x04tQ",
    b"}b",
    b"Nb",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"B\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"\x94",
    b"0",
    b"2",
    b"(",
    b"t",
    b"]",
    b"}",
    b"s",
    b"u",
    b"K\xff",
    b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
    b"I99999999999999999999\n",
    b".",
    b"\x86",
    b"\x87",
    b"\x85",
    b"N",
    b"h\x00",
    b"\x82\x01",
    b"Pspam\n",
    b"\x81",
    b"\x92",
    b"a",
    b"e",
    b"(" * 2000,
    b"]" + b"\x94h\x00a" * 3,
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"F1e999\n",
    b"\x8f(\x90",
    b"\x97",
    b"\x98",
)
"""Instructions: some look up what executes, some ask for memory that is not there, some fit nowhere."""


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    """Remove, repeat, exchange or insert instructions of a pickle, among them `EVIL` ones."""
    ops = _instructions(data)
    if not ops or rng.random() < 0.15:
        return change_bytes(data, rng)
    at = rng.randrange(len(ops))
    match rng.randrange(6):
        case 0:
            del ops[at]
        case 1:
            ops.insert(at, rng.choice(ops))
        case 2:
            other = rng.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        case 3:
            ops[at] = rng.choice(EVIL)
        case 4:
            ops.insert(at, pickle.dumps(rng.choice((*INTEGERS, *TEXTS[:10], None, 0.5, (), [], {})), 2)[2:-1])
        case _:
            ops.insert(at, rng.choice(EVIL))
    return b"".join(ops)


def _instructions(data: bytes) -> list[bytes]:
    try:
        starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    except Exception:  # a pickle that is damaged already
        return []
    return [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]


def change_archive(data: bytes, rng: random.Random) -> bytes:
    """Change a member of a zip archive (its pickle mostly), its name or compression, or the bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # an archive that is damaged already
        return change_bytes(data, rng)
    if not members or rng.random() < 0.2:
        return change_bytes(data, rng)
    kind = rng.random()
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith(".pkl")]
    at = rng.choice(pickles) if pickles and kind < 0.7 else rng.randrange(len(members))
    name, content = members[at]
    if name.endswith(".pkl") and kind < 0.7:
        members[at] = name, change_pickle(content, rng)
    elif kind < 0.85:
        members[at] = name, change_bytes(content, rng)
    elif kind < 0.9:
        members[at] = name + rng.choice(("x", "/", "/../x", ".pkl")), content
    elif kind < 0.95:
        del members[at]
    else:
        members.insert(at, members[at])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members:
            method = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file as JSON; its length is told rightly, or rarely not."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) or rng.random() < 0.15:
        return change_bytes(data, rng)
    header = change_json(data[8 : 8 + length], rng)
    stated = len(header) if rng.random() < 0.95 else rng.choice(INTEGERS) % 2**64
    return struct.pack("<Q", stated) + header + data[8 + length :]


def change_gzip(data: bytes, rng: random.Random) -> bytes:
    """Change what is compressed, and compress it again; or the compressed bytes."""
    try:
        content = gzip.decompress(data)
    except Exception:  # compressed data that is damaged already
        return change_bytes(data, rng)
    if rng.random() < 0.5:
        return change_bytes(data, rng)
    content = content[:1000] * rng.choice((100, 10_000)) if rng.random() < 0.1 else change_bytes(content, rng)
    return gzip.compress(content, 1, mtime=0)

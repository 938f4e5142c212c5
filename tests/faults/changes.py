"""Random changes of files that are text: of bytes, and of values of JSON."""

from __future__ import annotations

import random
from typing import Any


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits, bytes and lengths."""
    at = rng.randrange(len(content))
    data = bytearray(content)
    kind = rng.randrange(7)
    if kind <= 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at] = rng.randrange(256)
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + rng.randint(1, 9)]
    elif kind == 5:
        data[at:at] = rng.choice([b"\0", b"0", b"[", b'"', b"\xff\xfe", data[at : at + 40]])
    else:
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    return bytes(data)


def change_json(value: Any, rng: random.Random) -> Any:
    """A value of another type or size, somewhere in it, or a key that is missing, new or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {(k + "x" if k == key else k): v for k, v in value.items()}
        if kind == 2:
            return {**value, "new": value[key]}
        return {**value, key: change_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(value[at], rng), *value[at + rng.randint(1, 2) :]]
    deep: Any = []
    for _ in range(50):
        deep = [deep]
    others = [
        None,
        True,
        0,
        1,
        -1,
        2**40,
        10**30,
        -0.5,
        1e308,
        float("nan"),
        "",
        "2",
        "é",
        [],
        {},
        [[1]],
        deep,
    ]
    return rng.choice(others)

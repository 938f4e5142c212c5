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


_TEXTS = (
    "",
    "inputs",
    "targets",
    "int32",
    "float64",
    "object",
    "V9",
    "/etc/passwd",
    "../x.h5",
    ":a",
    "0" * 32,
)


def change_like(value: Any, rng: random.Random) -> Any:
    """Another value of the same type somewhere in it."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return {**value, key: change_like(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:at], *value[at : at + 1] * rng.choice((0, 2)), *value[at + 1 :]]
        return [*value[:at], change_like(value[at], rng), *value[at + 1 :]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((-1, 0, 1, value + 1, 2 * value, 2**40, 2**63 - 1))
    if value is None:
        return rng.choice(
            (0, 1, 2.5, [1], [0, 5], "0" * 32, {"length": 3, "truncate": False, "marks": False})
        )
    return rng.choice(_TEXTS)

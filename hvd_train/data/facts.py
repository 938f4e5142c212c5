"""The facts of a shard as text, and the digests that tell whether anything in them has changed."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from hvd_train.data.format import Facts


def digest(data: bytes) -> str:
    """xxh3_128 of `data`, 32 hex digits. It detects damage, not deliberate changes."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of(array: npt.NDArray[Any]) -> str:
    """`digest` of the values, little-endian."""
    return digest(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())


def encode(facts: Facts) -> bytes:
    """One line of JSON; the same bytes for the same facts."""
    return msgspec.json.encode(facts, order="deterministic")


def decode(text: bytes, written_digest: bytes) -> Facts:
    """The inverse of `encode`. Raises ValueError if `text` is not what `written_digest` was taken of."""
    if digest(text).encode() != written_digest:
        raise ValueError("the metadata in the file is not what was written")
    try:
        facts = msgspec.json.decode(text, type=Facts)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the metadata in the file: {error}") from None
    if facts.checksum_rows < 1:
        raise ValueError(f"checksums of blocks of {facts.checksum_rows} rows")
    return facts

"""JSON objects that carry a checksum of themselves, so that a changed value is found. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

CHECKSUM = "checksum"


def seal(values: Mapping[str, Any]) -> str:
    """The text of a JSON object with `values` and their checksum, XXH3 of their canonical form."""
    return json.dumps({**values, CHECKSUM: _checksum(values)}, indent=2) + "\n"


def unseal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a parsed object without their checksum. Raises `ValueError` if it is not theirs."""
    plain = {key: value for key, value in values.items() if key != CHECKSUM}
    if values.get(CHECKSUM) != _checksum(plain):
        raise ValueError(f"its checksum is {values.get(CHECKSUM)!r}; its values have {_checksum(plain)!r}")
    return plain


def parse(content: bytes) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for anything else."""
    try:
        values = json.loads(content)  # it decodes UTF-8, and raises ValueError for what is not
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError(f"{type(values).__name__}, expected an object")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())

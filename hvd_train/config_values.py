"""Limits on values that hold for every configuration key and every option. Imports neither torch nor MPI."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hvd_train.errors import ConfigError

LARGEST_INTEGER = 2**63 - 1
"""The largest integer of TOML, torch and NumPy."""

LARGEST_FLOAT = 3.4028234663852886e38
"""Of float32, the type of the parameters."""

LONGEST_NAME = 255
"""Bytes of one name in a path, on nearly every file system of Linux."""


def require(ok: bool, key: str, seen: object, expected: str) -> None:
    """Raises `ConfigError` with these words unless `ok`."""
    if not ok:
        raise ConfigError(f"{key} = {shown(seen)}: expected {expected}.")


def require_usable(section: Any, prefix: str = "") -> None:
    """Raises `ConfigError`, with the key, for a field of a dataclass with a value that no key accepts: a
    number that is not finite or too large for its type, text that is not UTF-8, a name that is too long.

    Args:
        prefix: what precedes the name of a field, such as `stop.`; `--` for options.
    """
    for field in dataclasses.fields(section):
        for value in _leaves(getattr(section, field.name)):
            unusable = _unusable(value)
            name = field.name.replace("_", "-") if prefix == "--" else field.name
            require(not unusable, f"{prefix}{name}", value, unusable)


def shown(value: object) -> str:
    """A value in a message: its repr, shortened to a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _unusable(value: object) -> str:
    """What was expected instead; empty for a value that can be used."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        return f"a number of at most {LARGEST_FLOAT:.3g}, as float32 holds it"
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"an integer of at most {LARGEST_INTEGER:,}"
    return _unusable_text(value) if isinstance(value, str) else ""


def _unusable_text(text: str) -> str:
    if "\0" in text:
        return "text without a NUL character"
    try:
        longest = max(len(name.encode()) for name in text.split("/"))
    except UnicodeEncodeError:
        return "text in UTF-8, which the run's config.toml is written in. Rename the file, or link to it"
    return f"names of at most {LONGEST_NAME} bytes between the slashes" if longest > LONGEST_NAME else ""

"""How far something is that takes long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """So much of it is done, in rows, bytes or files."""

    doing: str
    """Such as `read`, for messages."""
    done: int
    of: int
    unit: Literal["rows", "bytes", "files"] = "rows"


Progress = Callable[[Step], None]


def unseen(step: Step) -> None:
    """Where no progress is shown."""

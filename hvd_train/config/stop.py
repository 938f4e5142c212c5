"""When a run ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from hvd_train.config_values import require, require_usable


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When the run ends. The first rule that holds ends it; all rules can be combined."""

    patience: Annotated[int, arg(aliases=["--patience"])] = 5
    """Stop after this many evaluations without an improvement; 0: never."""

    min_delta: float = 0.0
    """Smallest decrease of the error that counts as an improvement."""

    target_error: Annotated[float | None, arg(aliases=["--target-error"])] = None
    """Stop when the error is at or below this value."""

    max_epochs: Annotated[int | None, arg(aliases=["--max-epochs"])] = None
    """Stop after this many passes over all shards."""

    max_rounds: Annotated[int | None, arg(aliases=["--max-rounds"])] = None
    """Stop after this many rounds, including those before a resume."""

    max_seconds: Annotated[float | None, arg(aliases=["--max-seconds"])] = None
    """Stop after this many seconds of training, counted from this start."""

    divergence: float | None = None
    """Stop as diverged when the error exceeds the best one by this factor. A run in which no rank is finite
    always stops."""

    def __post_init__(self) -> None:
        require_usable(self, "stop.")
        require(self.patience >= 0, "stop.patience", self.patience, "0 or more evaluations")
        require(self.min_delta >= 0, "stop.min_delta", self.min_delta, "0 or a positive error")
        for name in ("max_epochs", "max_rounds", "max_seconds"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, f"stop.{name}", limit, "a positive limit")
        require(
            self.divergence is None or self.divergence > 1, "stop.divergence", self.divergence, "more than 1"
        )
        rules = (self.patience or None, self.target_error, self.max_epochs, self.max_rounds, self.max_seconds)
        require(any(r is not None for r in rules), "stop.patience", 0, "at least one stop rule to be on")

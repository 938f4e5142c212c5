"""How far a run has come; the same on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hvd_train.config import EvaluateConfig
from hvd_train.stateful import State


@dataclass(kw_only=True)
class Progress:
    """Counts rounds and samples over all starts of a run. Stateful."""

    rounds: int = 0
    """Rounds done."""

    samples: int = 0
    """Samples that all ranks have used together."""

    looked_at_round: int = 0
    """Round of the last evaluation."""

    looked_at_epoch: int = 0
    """Full epochs at the last evaluation."""

    def look_is_due(self, config: EvaluateConfig, epochs: int) -> bool:
        """Whether enough rounds or epochs have passed since the last evaluation."""
        by_rounds = 0 < config.every_rounds <= self.rounds - self.looked_at_round
        by_epochs = 0 < config.every_epochs <= epochs - self.looked_at_epoch
        return by_rounds or by_epochs

    def looked(self, epochs: int) -> None:
        """Notes an evaluation now."""
        self.looked_at_round, self.looked_at_epoch = self.rounds, epochs

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        """Takes them back."""
        self.__dict__.update(state)

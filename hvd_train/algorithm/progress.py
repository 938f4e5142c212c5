"""How many rounds and samples a run has done; the same on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from hvd_train.config import EvaluateConfig
from hvd_train.io.stateful import Count, State, checked


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state as a checkpoint holds it."""

    rounds: Count
    samples: Count
    looked_at_epoch: Count


@dataclass(kw_only=True)
class Progress:
    """Counts rounds and samples over all starts of a run. Stateful."""

    rounds: int = 0
    """Rounds done."""

    samples: int = 0
    """Samples that all ranks have used together."""

    looked_at_epoch: int = 0
    """Full epochs at the last evaluation."""

    def evaluation_is_due(self, config: EvaluateConfig, epochs: int) -> bool:
        """Whether to evaluate after this round: after every `every_rounds` rounds from the start of the run,
        and in the round that completes another `every_epochs` epochs."""
        by_rounds = config.every_rounds > 0 and self.rounds % config.every_rounds == 0
        every = config.every_epochs
        return by_rounds or (every > 0 and epochs // every > self.looked_at_epoch // every)

    def evaluated(self, epochs: int) -> None:
        """Notes an evaluation now."""
        self.looked_at_epoch = epochs

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        """Restores them."""
        saved = checked(state, _Saved)
        self.rounds, self.samples = saved.rounds, saved.samples
        self.looked_at_epoch = saved.looked_at_epoch

"""How many local steps each round has; every rank gives the same answer."""

from __future__ import annotations

from typing import Any, final

import msgspec

from hvd_train.io.stateful import State, checked


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a period that does not change."""


@final
class FixedPeriod:
    """The same k in every round. A resumed run takes the k of its configuration, not that of its past."""

    def __init__(self, k: int) -> None:
        self._k = k

    def next(self) -> int:
        """k, at least 1, of the round that starts now."""
        return self._k

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the period is a value of the configuration."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Raises `RunDirectoryError` for a state of another kind of period."""
        checked(state, _Nothing)

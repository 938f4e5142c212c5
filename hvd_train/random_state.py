"""torch's random generator of this rank, which dropout and the user's task draw from."""

from __future__ import annotations

from typing import Any

import torch

from hvd_train.stateful import State


def seed_rank(seed: int, rank: int) -> None:
    """Gives each rank numbers of its own, so that dropout differs between ranks."""
    torch.manual_seed((seed * 1_000_003 + rank + 1) % 2**64)


class RandomState:
    """The generator's state. Stateful; a rank that the checkpoint does not know is seeded anew.

    Args:
        rank, size: of this rank and world; a state is taken back only by the same ones.
        seed: of the run.
    """

    def __init__(self, seed: int, rank: int, size: int) -> None:
        self._seed = seed
        self._place = [rank, size]

    def state_dict(self) -> dict[str, Any]:
        """The state, uint8, and whose it is."""
        return {"torch": torch.get_rng_state(), "place": self._place}

    def load_state_dict(self, state: State) -> None:
        """Goes on from there."""
        if state["place"] == self._place:
            torch.set_rng_state(state["torch"])
        else:
            seed_rank(self._seed + 1, self._place[0])

"""torch's random generator of this rank, which dropout and the user's task draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from hvd_train.errors import RunDirectoryError
from hvd_train.io.stateful import Count, State, checked


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state as a checkpoint holds it."""

    torch: Tensor
    place: tuple[Count, Count]


def seed_rank(seed: int, rank: int) -> None:
    """Seeds each rank differently, so that dropout differs between ranks."""
    torch.manual_seed((seed * 1_000_003 + rank + 1) % 2**64)


@contextmanager
def generators_as_they_are() -> Iterator[None]:
    """Restores the state of torch's, numpy's and Python's global generators after the body."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class RandomState:
    """The generator's state. Stateful; a rank that the checkpoint does not know is seeded anew.

    Args:
        rank, size: of this rank and world; a state is restored only on the same ones.
        seed: of the run.
    """

    def __init__(self, seed: int, rank: int, size: int) -> None:
        self._seed = seed
        self._place = [rank, size]

    def state_dict(self) -> dict[str, Any]:
        """The state, uint8, and the rank and size that it belongs to."""
        return {"torch": torch.get_rng_state(), "place": self._place}

    def load_state_dict(self, state: State) -> None:
        """Restores the state, or seeds anew."""
        saved = checked(state, _Saved)
        if list(saved.place) == self._place:
            try:
                torch.set_rng_state(saved.torch)
            except (RuntimeError, TypeError) as error:
                raise RunDirectoryError(f"`torch` is not a state of torch's generator: {error}") from None
        else:
            seed_rank(self._seed + 1, self._place[0])

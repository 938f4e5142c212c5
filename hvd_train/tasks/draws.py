"""Random numbers for the augmentation of a batch: a stream for each row and epoch, whoever reads the row."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_train.run.random_state import generators_as_they_are

_Words = npt.NDArray[np.uint64]

_GOLDEN, _FIRST, _SECOND = (
    np.uint64(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""The constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose mixing function this is."""

_BLOCK = 1 << 14
"""Numbers that are made at once: they and what they are made from stay in the cache."""


@final
class Draws:
    """Random numbers for the rows of one batch: what a transform gets as `training`.

    Each row has a stream of its own, which depends on the seed of the run, the epoch and the row only. What
    is drawn for a row is therefore the same whichever rank reads it, in whichever batch, and in which process
    the batch is transformed. Every method draws for all rows of the batch, and every call draws other
    numbers; the n-th number of a row depends on how many were drawn for it before. All results are on the
    CPU. `uniform`, `integers`, `chance` and `seed` give the same bits on every machine.

    Args:
        seed: of the run.
        epoch: counted from 0.
        rows: the number of each row of the batch in the whole data set, [B], not below 0.
    """

    def __init__(self, seed: int, epoch: int, rows: Sequence[int] | npt.NDArray[np.int64]) -> None:
        numbers = np.asarray(rows, np.int64).astype(np.uint64)
        digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=32).digest()
        keys = np.frombuffer(digest, "<u8").astype(np.uint64)
        # Two keys a row: that two rows meet in the first is possible, but then they differ in the second.
        self._first = _mixed(numbers * _GOLDEN + keys[0], keys[1])
        self._second = _mixed(numbers * _GOLDEN + keys[2], keys[3])
        self._drawn = 0

    def __len__(self) -> int:
        """Rows of the batch, B."""
        return len(self._first)

    def uniform(self, shape: Sequence[int] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers from `low` up to `high`, float32 [B, *shape]: multiples of 2^-24 of the range."""
        words = self._words(shape)
        words >>= np.uint32(8)
        return torch.from_numpy(words.astype(np.float32)).mul_(2**-24 * (high - low)).add_(low)

    def normal(self, shape: Sequence[int] = (), mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Normally distributed numbers, float32 [B, *shape]."""
        size = math.prod(shape)
        pairs = -(-size // 2)
        # Box and Muller: two uniform numbers give two normal ones. 1 - u is never 0.
        u = self.uniform((2, pairs))
        radius, angle = u[:, 0].neg().log1p_().mul_(-2).sqrt_(), u[:, 1] * (2 * math.pi)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, :size].reshape(len(self), *shape).mul_(std).add_(mean)

    def integers(self, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Whole numbers from `low` up to, not including, `high`, int64 [B, *shape].

        Each is equally likely, to (high - low) / 2^32. Raises `ValueError` for an empty range, and for one of
        more than 2^32 numbers.
        """
        if not 0 < high - low <= 1 << 32:
            raise ValueError(f"integers from {low} up to {high}: expected 1 to 2**32 of them")
        words = self._words(shape).astype(np.uint64)
        words *= np.uint64(high - low)
        words >>= np.uint64(32)
        return torch.from_numpy(words.view(np.int64)).add_(low)

    def chance(self, probability: float, shape: Sequence[int] = ()) -> Tensor:
        """Whether something of this probability happens, bool [B, *shape]."""
        return self.uniform(shape) < probability

    def seed(self, i: int) -> int:
        """A seed of row `i` of the batch, for a generator of your own: below 2^63, and always the same one in
        an epoch. `torch.Generator().manual_seed(seed)`, `numpy.random.default_rng(seed)`."""
        return int(self._first[i] ^ self._second[i]) >> 1

    def seeded(self) -> Iterator[int]:
        """The rows of the batch, 0 to B - 1, in a loop in which the global generators of torch, numpy and
        Python are those of the row: for transforms of one sample that draw from them, as torchvision's do.
        After the loop they are as before it.

            for i in training.seeded():
                images[i] = augment(images[i])
        """
        with generators_as_they_are():
            for i in range(len(self)):
                seed = self.seed(i)
                torch.default_generator.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                yield i

    def _words(self, shape: Sequence[int]) -> npt.NDArray[np.uint32]:
        """32 random bits each, [B, *shape]."""
        size = math.prod(shape)
        each = -(-size // 2)
        counters = np.arange(self._drawn, self._drawn + each, dtype=np.uint64) * _GOLDEN
        self._drawn += each
        words = np.empty((len(self), each), np.uint64)
        rows = max(1, _BLOCK // max(1, each))
        for row in range(0, len(self), rows):
            part = slice(row, row + rows)
            np.add(self._first[part, None], counters, out=words[part])
            _mix(words[part], self._second[part, None])
        return np.ascontiguousarray(words.view("<u4")[:, :size]).reshape(len(self), *shape)


def _mixed(words: _Words, key: Any) -> _Words:
    _mix(words, key)
    return words


def _mix(words: _Words, key: Any) -> None:
    """SplitMix64's function in place, with a key in the middle."""
    words ^= words >> np.uint64(30)
    words *= _FIRST
    words ^= key
    words ^= words >> np.uint64(27)
    words *= _SECOND
    words ^= words >> np.uint64(31)

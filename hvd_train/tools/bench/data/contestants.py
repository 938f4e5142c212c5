"""What is measured: ways to draw batches of the same samples in random order, from the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from hvd_train.config import DataConfig
from hvd_train.data.catalog import find_shards, whole
from hvd_train.data.readers.base import Mode
from hvd_train.data.readers.make import make_reader
from hvd_train.data.sources.base import INPUTS, TARGETS
from hvd_train.tools.bench.data.samples import Samples

Pair = tuple[Any, Any]
"""Inputs [batch, ...] and targets [batch, ...] in the types in which they are stored: arrays or tensors."""

Batches = Generator[Pair, None, None]

SEED = 1
"""Of every order."""

PLENTY = 1 << 60
"""Bytes: no limit on what `memory` may hold."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to read."""

    name: str

    setting: str

    files: Sequence[Path] = field(default=())
    """What it reads; empty if its samples are in memory before the clock starts."""

    batches: Callable[[int], Batches]
    """Opens it: batches of at most so many samples, epoch after epoch without an end; each sample comes once
    in an epoch. Closed with the iterator."""


def in_memory(samples: Samples) -> Contestant:
    """numpy's gather from arrays in memory."""
    return Contestant(name="numpy", setting="in memory", batches=_gathered(samples.inputs, samples.targets))


def mapped(folder: Path) -> Contestant:
    """numpy's gather from files of numpy, mapped into memory."""
    files = [folder / "inputs.npy", folder / "targets.npy"]

    def batches(size: int) -> Batches:
        inputs, targets = (np.load(path, mmap_mode="r") for path in files)
        yield from _gathered(inputs, targets)(size)

    return Contestant(name="numpy", setting="memmap of .npy", files=files, batches=batches)


def own(folder: Path, mode: Mode, setting: str) -> Contestant:
    """A reader of this package on the shards of `folder`."""

    def batches(size: int) -> Batches:
        shards = find_shards(DataConfig(path=str(folder), reading=mode))
        data = DataConfig(path=str(folder), reading=mode)
        reader = make_reader(whole(shards.train), data, SEED, shards.sample.fields, PLENTY)
        try:
            epoch = 0
            while True:
                reader.start_epoch(epoch)
                while (batch := reader.next_batch(size)) is not None:
                    yield batch[INPUTS], batch[TARGETS]
                epoch += 1
        finally:
            reader.close()

    return Contestant(
        name="hvd_train", setting=f"{mode}, {setting}", files=sorted(folder.glob("*.h5")), batches=batches
    )


def modes() -> tuple[Mode, ...]:
    """Of readers of this package."""
    return get_args(Mode)


def _gathered(inputs: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Callable[[int], Batches]:
    def batches(size: int) -> Batches:
        rng = np.random.default_rng(SEED)
        while True:
            order = rng.permutation(len(inputs))
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                yield inputs.take(rows, axis=0), targets.take(rows, axis=0)

    return batches

"""The samples that all contestants read, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_train.config import DataConfig
from hvd_train.data.catalog import find_shards, whole
from hvd_train.data.deal import rows_of
from hvd_train.data.python.registry import made_of
from hvd_train.data.rows import Rows
from hvd_train.environment import machine
from hvd_train.errors import ConfigError
from hvd_train.tools.bench.data.options import Options

_MOST_SHARE = 8
"""Of the free memory, the part that the samples may take: several contestants hold them too."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples in memory."""

    source: str
    """Where they come from, in words."""

    inputs: npt.NDArray[Any]
    """[samples, ...]"""

    targets: npt.NDArray[Any]
    """[samples, ...]"""

    scale: float
    """Factor that brings the inputs to about 1, once they are float32."""

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def row_bytes(self) -> int:
        """Of one sample, as it is stored."""
        return (self.inputs.nbytes + self.targets.nbytes) // len(self)


def load_samples(options: Options) -> Samples:
    """The samples that `options` name. Raises `DataError` where they cannot be read, and `ConfigError` for
    more than memory allows."""
    if options.data:
        return _of_shards(options)
    rng = np.random.default_rng(0)
    _require_memory(options.rows, 785)
    shape = (options.rows, 28, 28)
    return Samples(
        source="noise in the shape of MNIST, a fifth of it not 0",
        inputs=rng.integers(1, 256, shape, np.uint8) * (rng.random(shape, np.float32) < 0.2),
        targets=rng.integers(0, 10, options.rows, np.uint8),
        scale=1 / 255,
    )


def _of_shards(options: Options) -> Samples:
    shards = find_shards(DataConfig(path=options.data, inputs=options.inputs, targets=options.targets))
    if any(made_of(info.path) for info in shards.train):
        raise ConfigError(
            f"--data {options.data}: a Python dataset. Expected shards, which all readers can read."
        )
    sample, spans = shards.sample, whole(shards.train)
    rows = Rows(rows_of(spans, 0, options.rows), sample.fields)
    if len(rows) < 2:
        raise ConfigError(f"--data {options.data}: {len(rows)} sample. Expected at least 2.")
    _require_memory(len(rows), rows.row_bytes)
    read = rows.read(0, len(rows))
    rows.close()
    return Samples(
        source=f"the first {len(rows):,} samples of {options.data}",
        inputs=read[sample.inputs],
        targets=read[sample.targets],
        scale=sample.scale,
    )


def _require_memory(rows: int, row_bytes: int) -> None:
    needed, free = rows * row_bytes, machine.available_memory() // _MOST_SHARE
    if needed > free:
        raise ConfigError(
            f"--rows {rows}: {needed >> 20:,} MiB, and {free >> 20:,} MiB may be taken, an eighth of the "
            f"free memory. Give at most --rows {max(2, free // max(1, row_bytes))}."
        )

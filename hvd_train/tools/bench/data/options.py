"""The options of `hvd_train bench data`. Imports neither torch nor MPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from hvd_train.config_values import require, require_usable


@dataclass(frozen=True, kw_only=True)
class Options:
    """Samples/s of every way to read shards, and of other libraries on the same samples: batches in random
    order, as float32.

    One process, started without a launcher. benchmarks/README.md explains the columns."""

    data: Annotated[str, arg(metavar="PATH")] = ""
    """Samples to read, as `--data` of a training. Default: noise in the shape of MNIST, a fifth
    of it not 0."""

    inputs: str = "inputs"
    """The dataset of inputs, or its place in the files."""

    targets: str = "targets"
    """The dataset of targets, or its place in the files."""

    rows: Annotated[int, arg(metavar="N")] = 60_000
    """Samples, at most: the first ones of the data. They are held in memory."""

    folder: Annotated[str, arg(metavar="PATH")] = ""
    """An existing folder on the file system to measure. The files are written in it, and deleted at the end.
    Default: the folder of temporary files."""

    batch_size: Annotated[int, arg(metavar="N")] = 64
    """Samples of a batch."""

    repeat: Annotated[int, arg(metavar="N")] = 5
    """Timings of each, which alternate between all of them."""

    seconds: float = 0.5
    """Seconds of one timing, at least, and then to the end of an epoch; after four times as many it ends in
    the middle of one."""

    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        require(self.rows >= 2, "--rows", self.rows, "at least 2 samples")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1 sample")
        require(self.repeat >= 1, "--repeat", self.repeat, "at least 1 timing")
        require(self.seconds > 0, "--seconds", self.seconds, "more than 0 seconds")

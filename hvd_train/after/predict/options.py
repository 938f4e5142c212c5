"""The options of `hvd_train predict`. Imports neither torch nor MPI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from hvd_train.config_values import require, require_usable

SUFFIXES = (".h5", ".hdf5", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the predictions of a trained model for every row of some shards into one file, in row order.

    Without a launcher it is one process. Under mpirun, horovodrun or srun every rank predicts a part of the
    rows. Finished parts are in the folder FILE.parts until FILE is complete: the same command, started again
    after a kill, goes on with them, with any number of ranks. A FILE that exists is never overwritten."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The folder of a run, or of one of its checkpoints."""

    data: Annotated[str, arg(metavar="PATH")]
    """What to predict on: a folder with a manifest.json (its validation part; if it has none, its training
    part), a folder of HDF5 files, one file, a glob pattern, or `digits`. Targets are not read."""

    out: Annotated[str, arg(metavar="FILE")]
    """The file to write: .h5, .hdf5, .csv or .parquet. All ranks must have access to its folder."""

    checkpoint: Annotated[str, arg(metavar="best|latest|round-N")] = "best"
    """The checkpoint of the run; `ema-best` and so on: its moving average (`sync.ema`)."""

    id: Annotated[str, arg(metavar="NAME")] = ""
    """A dataset of the shards that is copied row by row: numbers, or strings of a fixed length. Default:
    none."""

    batch_size: Annotated[int | None, arg(metavar="N")] = None
    """Samples of one forward pass. Default: evaluate.batch_size of the run."""

    part_rows: Annotated[int | None, arg(metavar="N")] = None
    """Rows of one part. Default: so many that a part is 1 to 8 MiB."""

    threads: Annotated[int, arg(metavar="N")] = 0
    """Number of torch threads on each rank; 0: the rank's share of the cores that it may use. With a fixed
    number the predictions are the same to the bit for every number of ranks."""

    backend: Literal["auto", "solo", "mpi", "horovod", "ring"] = "auto"
    """Communication backend, as for a training."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        known = re.fullmatch(r"(ema-)?(best|latest|round-\d+)", self.checkpoint) is not None
        require(known, "--checkpoint", self.checkpoint, "best, latest or round-N, or ema- before it")
        for name, value in (("RUN", self.run), ("--data", self.data)):
            require(value != "", name, value, "a path. Is a variable of the shell not set?")
        path = Path(self.out)
        suffixes = " or ".join((", ".join(SUFFIXES[:-1]), SUFFIXES[-1]))
        require(path.suffix in SUFFIXES, "--out", self.out, f"a file name that ends in {suffixes}")
        for name, number in (("--batch-size", self.batch_size), ("--part-rows", self.part_rows)):
            require(number is None or number >= 1, name, number, "at least 1 row")
        require(self.threads >= 0, "--threads", self.threads, "0 or more")


def parse(args: Sequence[str], quiet: bool = False) -> Options:
    """The options of `predict` with the arguments after that word.

    Raises `ConfigError` for a value that makes no sense; exits with code 2 for an option that does not exist
    or is missing, with 0 for --help; `quiet` prints neither.
    """
    return tyro.cli(
        Options,
        prog="python -m hvd_train predict",
        args=list(args),
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=not quiet,
    )

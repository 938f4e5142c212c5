"""The options of `hvd_train evaluate`. Imports neither torch nor MPI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from hvd_train.config_values import require, require_usable
from hvd_train.errors import ConfigError
from hvd_train.run.layout import saved_config


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate the model of a run: every metric of its task, on data of your choice.

    Runs on one process, or under mpirun, horovodrun, srun or `hvd_train launch` on many, each with its part
    of the rows. The figures do not depend on the number of ranks."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's folder, or one checkpoint's."""

    data: Annotated[str, arg(metavar="PATH")] = ""
    """What to evaluate on, as data.path: of a folder with a manifest the validation part, if it has one.
    Default: the run's own validation data."""

    checkpoint: Annotated[str, arg(metavar="best|latest|round-N")] = "best"
    """Which model of the run; `ema-best` and so on: its moving average (`sync.ema`)."""

    batch_size: int = 0
    """Samples of one forward pass; 0: evaluate.batch_size of the run."""

    worst: Annotated[int, arg(metavar="N")] = 10
    """List the N samples with the largest loss; 0: none, which saves a second forward pass."""

    threads: int = 0
    """Number of torch threads on each rank; 0: the rank's share of the cores that it may use."""

    backend: Literal["auto", "solo", "mpi", "horovod", "ring"] = "auto"
    """Communication backend; as that of a training."""

    json: bool = False
    """Print one JSON object."""

    page: Annotated[str, arg(metavar="FILE.html")] = ""
    """Also write a page: confusion matrix, ROC curves, calibration, worst samples. Needs
    `hvd_train[monitor]`."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        require(self.batch_size >= 0, "--batch-size", self.batch_size, "0 or more samples")
        require(0 <= self.worst <= 10_000, "--worst", self.worst, "0 to 10,000 samples")
        require(0 <= self.threads <= 4096, "--threads", self.threads, "0 to 4,096 threads")
        parent = Path(self.page).absolute().parent
        if self.page and not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise ConfigError(f"--page {self.page}: {parent} is not a folder that can be written to.")


def parse(args: Sequence[str], quiet: bool = False) -> Options:
    """The options of `evaluate` with the arguments after that word.

    Raises `UserError` for a value that makes no sense or a path that is no run; exits with code 2 for an
    option that does not exist, with 0 for --help; `quiet` prints neither.
    """
    options = tyro.cli(
        Options,
        prog="hvd_train evaluate",
        args=list(args),
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=not quiet,
    )
    saved_config(Path(options.run))
    return options

"""The options of `hvd_train export`. Imports neither torch nor MPI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from hvd_train.config_values import require, require_usable
from hvd_train.environment.launcher import detect
from hvd_train.errors import EnvironmentMismatch

Format = Literal["safetensors", "torch-export", "onnx"]

SUFFIXES: dict[Format, str] = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the model of a run as a file for other programs, with a model card (FILE.toml) beside it.

    The file is loaded again and compared with the model on real samples before it gets its name. Exit code 1
    if it differs: nothing is written then. One process, without a launcher."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's folder, or one of its checkpoints."""

    format: Format = "safetensors"
    """`safetensors`: the parameters and buffers by name. `torch-export`: a graph for torch.export.load.
    `onnx`: a graph for ONNX Runtime and others; needs the extra `export`."""

    out: Annotated[str, arg(metavar="FILE")] = ""
    """The file to write; an existing one is never replaced. Default: RUN-round-N with the format's suffix, in
    the working directory: the run's folder may belong to another user, and the run may go on."""

    checkpoint: Annotated[str, arg(metavar="best|latest|round-N")] = "best"
    """Which checkpoint of the run; `ema-best` and so on: its moving average (`sync.ema`)."""

    data: Annotated[str, arg(metavar="PATH")] = ""
    """Shards with the samples for the comparison. Default: the run's validation rows, or its training rows if
    it has none."""

    samples: Annotated[int, arg(metavar="N")] = 1000
    """Number of samples to compare, if there are as many."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        require(self.run != "", "RUN", self.run, "a run's folder")
        require(not self.out or Path(self.out).name != "", "--out", self.out, "the name of a file")
        require(self.samples >= 1, "--samples", self.samples, "at least 1")
        named = re.fullmatch(r"(ema-)?(best|latest|round-\d+)", self.checkpoint)
        require(
            named is not None, "--checkpoint", self.checkpoint, "best, latest or round-N, or ema- before it"
        )


def parse(args: Sequence[str]) -> Options:
    """The options of `export` with the arguments after that word.

    Raises `ConfigError` for a value that makes no sense, and `EnvironmentMismatch` in a job of several ranks;
    exits with code 2 for an option that does not exist, with 0 for --help.
    """
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, prog="hvd_train export", args=list(args), config=config)
    launcher = detect()
    if launcher.size is not None and launcher.size > 1:
        raise EnvironmentMismatch(
            f"export was started as rank {launcher.rank} of {launcher.size}; expected one process. Start it "
            "without a launcher."
        )
    return options

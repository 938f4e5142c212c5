"""The options of `hvd_train doctor`. Imports neither torch nor MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import arg

from hvd_train.config import Config
from hvd_train.config_file import embedded_config, load_config
from hvd_train.config_values import require, require_usable
from hvd_train.errors import ConfigError

_LONGEST_S = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check what a training needs: each item is ok, a warning or an error, with a remedy.

    Without a launcher it checks this host. Under mpirun, horovodrun or srun it runs on every rank, and
    differences between ranks are shown with their numbers. Exit code 1 if there is an error."""

    parameters: Annotated[int | None, arg(metavar="N")] = None
    """Number of parameters (float32) for which memory is estimated. Default: those of the model of --config,
    else of the embedded default."""

    config: Annotated[str, arg(metavar="FILE.toml")] = ""
    """The configuration that would run: its model, optimizer, data and folder of runs. Default: the embedded
    one."""

    timeout: Annotated[float, arg(metavar="SECONDS")] = 60.0
    """Time limit for loading the libraries and connecting the ranks."""

    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.parameters is not None and self.parameters < 1:
            raise ConfigError(f"--parameters {self.parameters}: expected at least 1.")
        require_usable(self, "--")
        require(
            0 < self.timeout <= _LONGEST_S,
            "--timeout",
            self.timeout,
            f"more than 0 and at most {_LONGEST_S:,} s",
        )

    def load(self) -> Config:
        """The configuration. Raises `ConfigError`."""
        return load_config(self.config) if self.config else embedded_config()


def parse(args: Sequence[str], quiet: bool = False) -> Options:
    """The options of `doctor` with the arguments after that word.

    Raises `ConfigError` for a value that makes no sense or a configuration that cannot be read; exits with
    code 2 for an option that does not exist, with 0 for --help; `quiet` prints neither.
    """
    options = tyro.cli(
        Options,
        prog="python -m hvd_train doctor",
        args=list(args),
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=not quiet,
    )
    options.load()
    return options

"""`hvd_train init`: writes the files of a new project. Imports neither torch nor MPI."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from hvd_train.config_values import require
from hvd_train.errors import ConfigError, UserError
from hvd_train.io.output import warn

_PROJECT = Path(__file__).resolve().parents[1] / "project"

FILES = (
    # name, in words
    ("README.md", "the commands"),
    ("task.py", "the model, its loss and its metrics"),
    ("run.toml", "the configuration"),
    ("hosts", "hosts for mpirun"),
    ("slurm/train.sh", "the batch job"),
    ("slurm/interactive.sh", "the same in an allocation of salloc"),
    ("slurm/site.sh", "what differs from site to site: account, partition, modules, Python"),
    ("slurm/site-nopmix.sh", "the same where srun has no PMIx"),
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write the files of a new project into a folder: a task, a configuration, a file of hosts and a batch
    job. Each works as it is, and its comments say what to change."""

    folder: Annotated[Positional[str], arg(metavar="DIR")]
    """Folder of the project; created if missing. An existing file is never replaced."""

    def __post_init__(self) -> None:
        require(self.folder != "", "DIR", self.folder, "a folder; `.` is this one")


def main(argv: Sequence[str]) -> int:
    """Runs `init` with the arguments after that word; returns the exit code, 2 with a message on stderr for
    a request that cannot be carried out."""
    try:
        args = tyro.cli(Args, prog="hvd_train init", args=list(argv))
        write(Path(args.folder))
    except UserError as error:
        warn(str(error))
        return 2
    width = max(len(name) for name, _ in FILES)
    for name, words in FILES:
        print(f"{name.ljust(width)}  {words}")
    print(f"Train: cd {shlex.quote(args.folder)} && python -m hvd_train --config run.toml")
    return 0


def write(folder: Path) -> None:
    """Raises `ConfigError` for a folder that has one of the files already, in which case nothing is written,
    or that cannot be written."""
    names = [name for name, _ in FILES]
    there = [name for name in names if os.path.lexists(folder / name)]
    if there:
        raise ConfigError(
            f"{folder} has {', '.join(there)} already; expected a folder without them. Nothing was "
            "written: name another folder, or move these files."
        )
    try:
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(_PROJECT / name, target)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: {error.strerror}. Name a folder that can be written."
        ) from None


def _copy(source: Path, target: Path) -> None:
    """A new file; scripts may be executed."""
    mode = 0o777 if os.access(source, os.X_OK) else 0o666
    # Fails if the file exists by now.
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(source.read_bytes())

"""The options of `hvd_train launch`. Imports neither torch nor MPI."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from hvd_train.config_values import require_usable
from hvd_train.errors import ConfigError
from hvd_train.launching.hosts import MOST_SLOTS, Host, parse_hosts, read_hostfile

_DESCRIPTION = """Start a training on many ranks with a suitable launcher, and report how it ended.

  python -m hvd_train launch -np 2 -- --config run.toml
  python -m hvd_train launch --hosts node1:2,node2:2 -- --config run.toml
  python -m hvd_train launch --hostfile hosts -- bench allreduce

The options after -- are those of hvd_train. Exit code: 0 finished; 75 interrupted with a checkpoint, so run
it again with --resume; 1 failed; 2 what you gave cannot be run. It is decided by the run's own record, not by
the launcher's status. SIGINT, SIGTERM or SIGUSR1 ends the run after its round, with a checkpoint; a second
SIGINT (Ctrl-C) ends it at once."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options before `--`."""

    ranks: Annotated[int | None, arg(name="np", aliases=["-np", "-n"], metavar="N")] = None
    """Number of ranks. Default: the tasks of the Slurm allocation, else the slots of all hosts."""

    hosts: Annotated[str, arg(aliases=["--host", "-H"], metavar="H1:2,H2:2")] = ""
    """Hosts with their number of ranks. Default: the Slurm allocation, else this host."""

    hostfile: Annotated[str, arg(metavar="FILE")] = ""
    """File of hosts, in the syntax of any launcher."""

    launcher: Literal["auto", "mpirun", "horovodrun", "srun"] = "auto"
    """`auto`: srun in a Slurm allocation if it can start ranks of this MPI, else the mpirun of the MPI that
    hvd_train was built for."""

    mpi_args: Annotated[str, arg(metavar='"OPTION ..."')] = ""
    """Further options for the launcher, quoted as for a shell. They take precedence."""

    interface: Annotated[str, arg(metavar="NAME")] = ""
    """Network interface between hosts. Default: the one that leads to the first other host."""

    fault_tolerance: bool = False
    """Let the other ranks go on if a rank is killed. Needs mpirun of Open MPI 5; the ranks then communicate
    over TCP and shared memory only."""

    gloo: bool = False
    """Let horovodrun start the ranks itself, without MPI."""

    start_timeout: Annotated[float, arg(metavar="SECONDS")] = 1800.0
    """End the job if its ranks have not connected and opened the data after this time: an ssh or an MPI that
    hangs does not end by itself. 0: no limit."""

    dry_run: bool = False
    """Print the command that would be run, and exit."""

    check_hosts: bool = False
    """Check every host, print a table, and exit."""

    def __post_init__(self) -> None:
        if self.ranks is not None and not 1 <= self.ranks <= MOST_SLOTS:
            raise ConfigError(f"-np {self.ranks}: expected at least 1 rank, and {MOST_SLOTS:,} at most.")
        require_usable(self, "--")
        if self.start_timeout < 0:
            raise ConfigError(f"--start-timeout {self.start_timeout:g}: expected 0 or a number of seconds.")
        if self.hosts and self.hostfile:
            raise ConfigError("--hosts and --hostfile are both given: expected one of them.")
        if self.gloo and self.launcher != "horovodrun":
            raise ConfigError(
                f"--gloo with --launcher {self.launcher}: only horovodrun starts ranks over Gloo. Add "
                "--launcher horovodrun, or leave out --gloo."
            )

    @property
    def named_hosts(self) -> tuple[Host, ...]:
        """Those of --hosts or --hostfile. Raises `ConfigError` for what names none."""
        if self.hostfile:
            return tuple(read_hostfile(self.hostfile))
        return tuple(parse_hosts(self.hosts)) if self.hosts else ()

    @property
    def more(self) -> tuple[str, ...]:
        """The words of --mpi-args. Raises `ConfigError` for an open quotation."""
        try:
            return tuple(shlex.split(self.mpi_args))
        except ValueError as error:
            raise ConfigError(f"--mpi-args {self.mpi_args!r}: {error}. Quote it as for a shell.") from None


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options before the first `--`, and those after it."""
    args = list(args)
    end = args.index("--") if "--" in args else len(args)
    return args[:end], args[end + 1 :]


def parse(args: Sequence[str]) -> Options:
    """The options before `--`.

    Raises `ConfigError` for a value that makes no sense; exits with code 2 for an option that does not exist,
    with 0 for --help.
    """
    rest = list(args)
    if "--mpi-args" in rest[:-1]:
        # As one word: the parser would take a value that begins with a dash for the next option.
        at = rest.index("--mpi-args")
        rest[at : at + 2] = [f"--mpi-args={rest[at + 1]}"]
    return tyro.cli(
        Options,
        prog="python -m hvd_train launch",
        description=_DESCRIPTION,
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
    )

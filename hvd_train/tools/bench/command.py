"""`hvd_train bench`: which benchmark, and its options. Imports neither torch nor MPI."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from hvd_train.errors import ConfigError
from hvd_train.tools.bench.allreduce.options import Options as AllreduceOptions
from hvd_train.tools.bench.data.options import Options as DataOptions

Options = AllreduceOptions | DataOptions

_KINDS: dict[str, type[Options]] = {"allreduce": AllreduceOptions, "data": DataOptions}


def parse(args: Sequence[str], quiet: bool = False) -> Options:
    """The options of `bench` with the arguments after that word.

    Raises `ConfigError` for a value that makes no sense; exits with code 2 for an option that does not
    exist, with 0 for --help; `quiet` prints neither.
    """
    name, rest = (args[0], list(args[1:])) if args else ("", [])
    if {"-h", "--help"} & {name}:
        name, rest = "allreduce", ["--help"]
    if name not in _KINDS:
        seen = f"`bench {name}`" if name else "`bench` alone"
        raise ConfigError(f"{seen}: expected `bench allreduce` or `bench data`, and options after it.")
    return tyro.cli(
        _KINDS[name],
        prog=f"python -m hvd_train bench {name}",
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=not quiet,
    )


def run(options: Options, version: str) -> None:
    """The benchmark that `options` are of. See `run` of each.

    Args:
        version: of hvd_train.
    """
    if isinstance(options, AllreduceOptions):
        from hvd_train.tools.bench.allreduce.run import run as run_allreduce

        run_allreduce(options, version)
    else:
        from hvd_train.tools.bench.data.run import run as run_data

        run_data(options, version)

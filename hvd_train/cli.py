"""The command line: which command, its configuration, and exit codes.

Exit codes: 0 finished, or interrupted with a checkpoint; 1 failed, or the best model or that of the end could
not be written; 2 what the user gave cannot be run; 3 the training diverged. `launch` has 75 besides, for a
run that was interrupted.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import tyro

import hvd_train.environment.machine  # reads the affinity mask, before anything imports torch
from hvd_train.config import Config
from hvd_train.config_file import embedded_config, load_config
from hvd_train.environment.launcher import Launcher, detect
from hvd_train.errors import ConfigError, HvdTrainError, LauncherMismatch, UserError
from hvd_train.io.output import ends_on_interrupt, print_anything, reader_may_leave

_DESCRIPTION = """Train a PyTorch model on HDF5 shards, on many ranks, without a master process.

Without options it trains on the embedded default, the handwritten digits. Under horovodrun, mpirun or srun
every rank reads its own shards, and the ranks average their parameters every --period local steps.

  --config FILE.toml   reads a configuration; options take precedence over the file.
  --resume RUN         continues a run, with its configuration.

Other commands, each with its own --help: `hvd_train launch` starts the ranks, `hvd_train status` shows what
runs are doing, `hvd_train dashboard` the same as live pages, `hvd_train report` writes a page as a file,
`hvd_train evaluate` computes every metric of a finished run's model,
`hvd_train predict RUN` writes the predictions of a trained model, `hvd_train export RUN` the model itself,
`hvd_train doctor` checks what would run here, `hvd_train init DIR` writes the files of a new project,
`hvd_train shard write | info | check | index`, `hvd_train bench allreduce | data`, and
`hvd_train restarts` for job scripts."""

DIVERGED = 3

_PATIENCE_S = 3.0
"""Seconds that another rank waits before it reports an error that rank 0 may report as well."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    print_anything()
    args = list(sys.argv[1:] if argv is None else argv)
    command = _COMMANDS.get(args[0]) if args else None
    return command(args[1:]) if command else _train(args)


def _train(args: list[str]) -> int:
    def work(config: Config) -> int:
        from hvd_train.app import train

        # What was imported stays: to go through it in every collection would take a tenth of the start.
        gc.freeze()
        if train(config).reason != "diverged":
            return 0
        _let_others_end(detect())
        return DIVERGED

    return _in_job(args, parse, work)


def _bench(args: list[str]) -> int:
    from hvd_train.tools.bench.command import Options, parse, run

    def work(options: Options) -> None:
        run(options, hvd_train.__version__)

    return _in_job(args, parse, work)


def _doctor(args: list[str]) -> int:
    from hvd_train.tools.doctor.options import Options, parse

    def work(options: Options) -> int:
        from hvd_train.tools.doctor.run import run

        with ends_on_interrupt(), reader_may_leave():
            return run(options, hvd_train.__version__)

    return _in_job(args, parse, work)


def _evaluate(args: list[str]) -> int:
    from hvd_train.after.evaluate.options import Options, parse

    def work(options: Options) -> int:
        from hvd_train.after.evaluate.run import run

        with ends_on_interrupt(), reader_may_leave():
            return run(options)

    return _in_job(args, parse, work)


def _predict(args: list[str]) -> int:
    from hvd_train.after.predict.options import Options, parse

    def work(options: Options) -> None:
        from hvd_train.after.predict.run import run

        run(options)

    return _in_job(args, parse, work)


def _launch(args: list[str]) -> int:
    from hvd_train.launching.launch import main

    with ends_on_interrupt(), reader_may_leave():
        return main(args, _check)


def _check(args: list[str]) -> Config | None:
    """For `launch`: refuses what no rank could run. The configuration of a training; None for a command that
    keeps no record."""
    from hvd_train.after.evaluate.options import parse as parse_evaluate
    from hvd_train.after.predict.options import parse as parse_predict
    from hvd_train.tools.bench.command import parse as parse_bench
    from hvd_train.tools.doctor.options import parse as parse_doctor

    without_record: dict[str, _Parse[object]] = {
        "bench": parse_bench,
        "doctor": parse_doctor,
        "evaluate": parse_evaluate,
        "predict": parse_predict,
    }
    if args and args[0] in without_record:
        without_record[args[0]](args[1:])
        return None
    return parse(args[1:] if args[:1] == ["train"] else args)


def _export(args: list[str]) -> int:
    from hvd_train.after.export.options import parse

    def work() -> int:
        options = parse(args)
        from hvd_train.after.export.run import export

        export(options)
        return 0

    return _shown(work)


def _restarts(args: list[str]) -> int:
    from hvd_train.launching import restarts
    from hvd_train.launching.options import split

    own, training = split(args)
    try:
        with reader_may_leave():
            return restarts.main(restarts.parse(own), parse(training))
    except UserError as error:
        _say(error)
        return 2


def _shard(args: list[str]) -> int:
    from hvd_train.tools.shard import main

    with ends_on_interrupt(), reader_may_leave():
        return main(args)


def _status(args: list[str]) -> int:
    from hvd_train.monitor import status

    return _shown(lambda: status.main(status.parse(args)))


def _dashboard(args: list[str]) -> int:
    from hvd_train.monitor import dashboard

    return _shown(lambda: dashboard.main(dashboard.parse(args)))


def _report_of(args: list[str]) -> int:
    from hvd_train.monitor import report

    return _shown(lambda: report.main(report.parse(args)))


def _shown(show: Callable[[], int]) -> int:
    """For commands of one process on runs."""
    try:
        with ends_on_interrupt(), reader_may_leave():
            return show()
    except HvdTrainError as error:
        _say(error)
        return 2 if isinstance(error, UserError) else 1


def _init(args: list[str]) -> int:
    from hvd_train.tools.init import main

    with ends_on_interrupt(), reader_may_leave():
        return main(args)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "launch": _launch,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "init": _init,
    "shard": _shard,
    "bench": _bench,
    "export": _export,
    "restarts": _restarts,
    "status": _status,
    "dashboard": _dashboard,
    "report": _report_of,
    "predict": _predict,
}


class _Parse(Protocol[T_co]):
    """`parse`, or that of another command."""

    def __call__(self, args: Sequence[str], quiet: bool = False) -> T_co: ...


def _in_job(args: list[str], parse: _Parse[T], work: Callable[[T], int | None]) -> int:
    """Parses the options and works, on this rank of a job; returns the exit code, 0 if `work` names none."""
    launcher = detect()
    try:
        with reader_may_leave():
            given = _parse_after_rank_0(args, parse) if launcher.rank else parse(args)
    except UserError as error:
        _say(error)
        return 2
    try:
        code = work(given)
    except HvdTrainError as error:
        from hvd_train.comm import _mpi, ending

        code = 2 if isinstance(error, UserError) else 1
        if error.agreed:
            _mpi.finish()
            _report(error, launcher)
        else:  # the others may wait for this rank, or one of them may have stopped
            _report(error, launcher)
            ending.announce(ending.Failing(code, f"rank {launcher.rank} of {launcher.size}"))
            _mpi.finish()
        return code
    return code or 0


def _parse_after_rank_0(args: list[str], parse: _Parse[T]) -> T:
    """`parse` on another rank. Before there is a communicator no rank knows of the others. Wrong
    options are mostly wrong on every rank: rank 0 reports them at once and its launcher ends the job; a rank
    that still runs after some seconds has an error of its own, and reports it."""
    try:
        return parse(args, quiet=True)
    except (UserError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        time.sleep(_PATIENCE_S)
    return parse(args)


def _report(error: HvdTrainError, launcher: Launcher) -> None:
    """Reports what ended the work, once per job, and gives the reporting rank the time to do so: most
    launchers end all ranks as soon as one has ended with a nonzero code."""
    speaks = launcher.rank == 0
    if isinstance(error, LauncherMismatch):
        # These processes cannot know whether and when rank 0 gets here.
        speaks = launcher.speaks
        if launcher.rank:
            time.sleep(_PATIENCE_S if speaks else 2 * _PATIENCE_S)  # srun kills after 10 s
    elif not speaks and not error.agreed:
        if isinstance(error, UserError):
            time.sleep(_PATIENCE_S)  # as with wrong options: there was no communicator yet
        speaks = True
    elif not speaks:  # on a busy machine rank 0 may get here later
        time.sleep(_PATIENCE_S)
    if speaks:
        _say(error)
    _let_others_end(launcher)


def _let_others_end(launcher: Launcher) -> None:
    """Most launchers end all ranks as soon as one has ended with a code: before that, a moment for ranks that
    still remove what their MPI put into shared memory."""
    if launcher.size != 1:
        time.sleep(1)


def _say(error: HvdTrainError) -> None:
    print(f"hvd_train: {error}", file=sys.stderr, flush=True)


def parse(args: Sequence[str], quiet: bool = False) -> Config:
    """The configuration of a training: the file of --config or of the run to resume, the embedded default
    if neither names what to train, and the options, which take precedence.

    Raises `UserError`; exits with code 2 for an option that does not exist, with 0 for --help; `quiet`
    prints neither.
    """
    rest, path = _take(list(args), "--config")
    if path == "":
        raise ConfigError("--config '': expected a file. Is a variable of the shell not set?")
    base = load_config(path) if path is not None else _base(rest)
    return tyro.cli(
        Config, prog="hvd_train", description=_DESCRIPTION, args=rest, default=base, console_outputs=not quiet
    )


def _base(args: list[str]) -> Config:
    _, resume = _take(args, "--resume")
    if resume and resume != "auto":
        from hvd_train.run.layout import saved_config

        return saved_config(Path(resume))
    says_what = any(a.split("=")[0] in ("--data", "--data.path", "--task") for a in args)
    return Config() if says_what else embedded_config()


def _take(args: list[str], flag: str) -> tuple[list[str], str | None]:
    """The arguments without `flag` and its value, and the value; None where it is not given."""
    for i, argument in enumerate(args):
        if argument == flag:
            if i + 1 == len(args):
                raise ConfigError(f"{flag} is the last argument: expected a value after it.")
            return args[:i] + args[i + 2 :], args[i + 1]
        if argument.startswith(f"{flag}="):
            return args[:i] + args[i + 1 :], argument.partition("=")[2]
    return args, None

"""`hvd_train launch`: starts a training with a suitable launcher, and reports how it ended.

Imports neither torch nor MPI.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hvd_train.config import Config
from hvd_train.environment.launcher import detect
from hvd_train.errors import ConfigError, EnvironmentMismatch, UserError
from hvd_train.io.output import warn
from hvd_train.launching import plan, programs, supervise
from hvd_train.launching.check_hosts import run as check_hosts
from hvd_train.launching.options import Options, parse, split
from hvd_train.launching.outcome import Outcome
from hvd_train.launching.supervise import Ended
from hvd_train.run.layout import EVENTS_FILE, checkpoint_of, exists_already, folder_of

FINISHED, FAILED, USER_ERROR, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 75

Check = Callable[[list[str]], Config | None]
"""Takes the options of hvd_train; gives the configuration of a training, None for a command that keeps no
record. Raises `UserError`, or `SystemExit` as a parser of options does."""


def main(argv: Sequence[str], check: Check) -> int:
    """Runs `launch` with the arguments after that word; returns the exit code."""
    before, training = split(argv)
    try:
        return _launch(parse(before), before, training, check)
    except UserError as error:
        warn(str(error))
        return USER_ERROR


def _launch(options: Options, before: list[str], training: list[str], check: Check) -> int:
    started_by = detect()
    if started_by.size != 1:
        raise EnvironmentMismatch(
            f"this `hvd_train launch` is one of {started_by.size or 'several'} under {started_by.name}: "
            "expected a single one, which starts the ranks itself. Start it without that launcher."
        )
    config = check(training)
    if options.check_hosts:
        return _check_hosts(options, config)
    outcome = None
    if config is not None:
        folder, is_new = folder_of(config)
        if is_new and os.path.exists(folder):
            raise exists_already(folder)
        if not config.name and config.resume in ("", "auto"):
            training = [*training, "--name", folder.name]
        outcome = Outcome(folder)
    launcher = plan.choose(options)
    line = plan.line(options, launcher, [sys.executable, "-m", "hvd_train", *training])
    if options.dry_run:
        print(line)
        return FINISHED
    if options.fault_tolerance:
        warn(plan.FAULT_TOLERANCE_COSTS)
    ended = supervise.run(
        supervise.Job(
            line=line,
            by_horovodrun=launcher == "horovodrun",
            can_stop=outcome.has_begun if outcome is not None else None,
            start_timeout_s=options.start_timeout,
            have_met=outcome.ranks_have_met if outcome is not None else None,
        )
    )
    if config is None or outcome is None:
        return 128 + ended.signal if ended.signal else ended.status
    return exit_status(ended, outcome, launcher, before, resumable=config.sync.mode != "none")


def _check_hosts(options: Options, config: Config | None) -> int:
    if not options.named_hosts:
        raise ConfigError(
            "--check-hosts logs in to hosts, and none is named: expected --hosts or --hostfile. Name them."
        )
    runs = Path(Config().runs) if config is None else folder_of(config)[0].parent
    mpirun = None if options.gloo else programs.mpirun()[0]
    return check_hosts.run(options.named_hosts, runs, mpirun)


def exit_status(
    ended: Ended, outcome: Outcome, launcher: str, before: list[str], resumable: bool = True
) -> int:
    """The exit code, by the run's own record. Prints how the run ended, and how to continue."""
    line = shlex.join(["python", "-m", "hvd_train", "launch", *before, "--", "--resume", str(outcome.folder)])
    go_on = f"Go on: {line}" if resumable else "With sync.mode = 'none' it cannot go on."
    stop = outcome.stop()
    reason = stop.get("reason")
    checkpoint = checkpoint_of(outcome.folder, "latest")
    if checkpoint is not None:
        there = f"Its newest checkpoint is {checkpoint.name}. {go_on}"
    elif outcome.has_begun():
        there = "There is no checkpoint: start it anew, under another name."
    else:
        there = "There is no checkpoint, and no training began."
    if stop.get("missing"):
        warn(f"the run ended ({reason}), but {stop['missing']} {there}")
        return FAILED
    if reason == "interrupted":
        warn(f"interrupted, with a checkpoint. {go_on}")
        return INTERRUPTED if resumable else FAILED
    if reason == "diverged":
        warn(f"the training diverged, see {outcome.folder / EVENTS_FILE}. Try a smaller --lr.")
        return DIVERGED
    if reason:
        if ended.status:
            warn(f"{launcher} ended with {ended.status}, but the run had finished ({reason}).")
        return FINISHED
    if ended.status == USER_ERROR and not ended.signal:
        return USER_ERROR
    warn(
        f"the run did not finish: {launcher} ended with {ended.status}, and "
        f"{outcome.folder / EVENTS_FILE} has no `stop`. {there}"
    )
    return 128 + ended.signal if ended.signal else FAILED

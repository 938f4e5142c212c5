"""Whether the notice that a batch system gives before a job's end is long enough for a round."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import final

from hvd_train.io.output import warn
from hvd_train.record.reports import Recorder, Report, RoundReport, RunStart

LEAD_VARIABLE = "HVD_TRAIN_SIGNAL_LEAD_S"
"""Set by the job script: seconds from the signal to the end."""


def make_notice(environ: Mapping[str, str] = os.environ) -> tuple[Recorder, ...]:
    """A `Notice` if the environment gives the lead time of the signal; else none."""
    try:
        lead_s = float(environ.get(LEAD_VARIABLE, ""))
    except ValueError:
        return ()
    return (Notice(lead_s),)


@final
class Notice(Recorder):
    """Warns once of a round longer than half of `lead_s` seconds: a signal takes effect after the
    current round, and the checkpoint must be written in the time that is left."""

    def __init__(self, lead_s: float) -> None:
        self._lead_s = lead_s
        self._warned = False

    def header(self, header: RunStart) -> None: ...

    def report(self, report: Report) -> None:
        if not isinstance(report, RoundReport) or self._warned:
            return
        # Every rank's phases add up to the same round.
        seconds = sum(spread.median for spread in report.seconds.values())
        if seconds > self._lead_s / 2:
            self._warned = True
            key = "period" if report.steps is None else "seconds"
            warn(
                f"round {report.round} took {seconds:.3g} s, but the job is notified {self._lead_s:g} s "
                "before its end; expected rounds of at most half of that, or there is no time for a "
                f"checkpoint. Lower sync.{key}, or raise the seconds of sbatch's --signal and "
                f"{LEAD_VARIABLE}."
            )

    def close(self) -> None: ...

"""The report that a run writes at its end (`record.report`). For rank 0; never ends a run."""

from __future__ import annotations

from pathlib import Path

from hvd_train.config import RecordConfig
from hvd_train.io.output import warn
from hvd_train.run.layout import REPORT_FILE


def check(config: RecordConfig) -> None:
    """Raises `EnvironmentMismatch` where a report is asked for and could not be drawn."""
    if config.report:
        from hvd_train.monitor.web import pages

        pages.require()


def write_report(folder: Path) -> None:
    """Writes the report of the run in `folder`; a failure is a warning."""
    from hvd_train.monitor.report import write

    try:
        write([folder], folder / REPORT_FILE)
    except Exception as error:  # whatever it is, the run has ended well
        warn(f"the report could not be written: {error}")

"""Rules for the whole suite."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deadlines import Deadline, calibration

TEST_LIMIT_S = 1200
"""Of one test on an idle machine: beyond all deadlines of its jobs."""

NOT_OURS = ("sem.", "mpich_shm_")
"""How files begin that others leave: the C library its semaphores, MPICH its own memory when a rank of any
program is killed."""


def files_in_shared_memory() -> set[str]:
    """Those in /dev/shm, without those of others."""
    return {str(p) for p in Path("/dev/shm").iterdir() if not p.name.startswith(NOT_OURS)}


def abandoned(files: set[str]) -> set[str]:
    """Those of the files and folders that no living process has mapped or open."""
    for process in Path("/proc").glob("[0-9]*") if files else ():
        used = []
        with contextlib.suppress(OSError):
            used.append((process / "maps").read_text())
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.append(os.readlink(descriptor))
        files = {file for file in files if not any(file in text for text in used)}
    return files


@pytest.fixture(autouse=True)
def _nothing_stays_in_shared_memory() -> Iterator[None]:
    before = files_in_shared_memory()
    yield
    # An MPI that is just ending has no more use for its files a moment before it removes them. It may be that
    # of a test which runs beside this one.
    deadline = Deadline(30)
    while (left := abandoned(files_in_shared_memory() - before)) and not deadline.passed():
        time.sleep(0.1)
    assert not left, "the test left files in /dev/shm"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("timeout") is None:
        config.option.timeout = TEST_LIMIT_S * calibration()


def pytest_report_header() -> str:
    return f"deadlines: {calibration():.1f} times those of an idle machine, or longer while it gets slower"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("HVD_TRAIN_NO_SKIPS") == "1":
        terminalreporter.section("skipped, which is not allowed here", red=True)
        for report in skipped:
            terminalreporter.write_line(f"{report.nodeid}: {report.longrepr}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where everything is installed a skipped test is a failure: nobody would notice it otherwise."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and exitstatus == 0 and os.environ.get("HVD_TRAIN_NO_SKIPS") == "1":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

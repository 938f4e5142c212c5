"""Rules for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def shared_memory_files() -> set[str]:
    """What lies in /dev/shm, but for what the C library keeps there."""
    return {p.name for p in Path("/dev/shm").iterdir() if not p.name.startswith("sem.")}


@pytest.fixture(autouse=True)
def _nothing_stays_in_shared_memory() -> Iterator[None]:
    before = shared_memory_files()
    yield
    assert shared_memory_files() <= before, "the test left files in /dev/shm"


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

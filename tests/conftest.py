"""Rules for the whole suite."""

from __future__ import annotations

import os

import pytest


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

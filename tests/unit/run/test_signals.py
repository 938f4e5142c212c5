"""Signals in a real process: they only ask, but for a second Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hvd_train.run.signals import SIGNALS, StopRequest
from tests.deadlines import seconds
from tests.launching import ROOT, environment

PROGRAM = """
import signal, sys
from hvd_train.run.signals import StopRequest
def asked():  # on entry to a function Python runs the handlers of signals that have arrived
    return request.asked
with StopRequest() as request:
    print(asked(), flush=True)
    for line in sys.stdin:   # one word for each line that it is given
        print(asked(), flush=True)
print("left", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
"""


@contextmanager
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"PYTHONPATH": str(ROOT)}),
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "False\n"
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline()


@pytest.mark.parametrize("first", SIGNALS)
def test_every_signal_is_a_request(first: signal.Signals) -> None:
    """Slurm and launchers send them several times, each by its own way."""
    with child() as process:
        assert ask(process) == "False\n"
        for number in (first, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
            assert ask(process) == "True\n", "the process lives and knows"


def test_a_second_ctrl_c_ends_at_once() -> None:
    with child() as process:
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            assert ask(process) == "True\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=seconds(30)) == -signal.SIGINT
        assert process.stderr is not None
        assert process.stderr.read() == "", "no traceback"


def test_afterwards_signals_mean_what_they_meant_before() -> None:
    with child() as process:
        process.send_signal(signal.SIGUSR1)
        assert ask(process) == "True\n"
        stdout, _ = process.communicate(timeout=seconds(30))
        assert stdout == "left True\n"
        assert process.returncode == 0


def test_handlers_are_restored_after_an_exception() -> None:
    before = {s: signal.getsignal(s) for s in SIGNALS}
    request = StopRequest()

    def failing() -> None:
        with request:
            assert all(signal.getsignal(s) != before[s] for s in SIGNALS)
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        failing()
    assert {s: signal.getsignal(s) for s in SIGNALS} == before
    assert not request.asked

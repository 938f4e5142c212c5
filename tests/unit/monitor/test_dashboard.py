"""The command that serves the pages: its port, its address, its end, and what it refuses."""

from __future__ import annotations

import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvd_train.errors import ConfigError, EnvironmentMismatch
from hvd_train.monitor import dashboard as module
from tests.dashboards import DASHBOARD, dashboard
from tests.deadlines import seconds
from tests.launching import run
from tests.unit.monitor.logs import whole


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=seconds(30)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """What is started gets SIGINT, also where this process ignores it, as a job in the background does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_two_at_once_each_with_a_port_and_a_token(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    with dashboard(tmp_path) as (first, one), dashboard(tmp_path) as (second, other):
        for base in (one, other):
            status, text = get(f"{base}data/runs")
            assert (status, ">a</a>" in text) == (200, True)
        (port, token), (port_of_other, token_of_other) = (
            re.fullmatch(r"http://127\.0\.0\.1:(\d+)/(.+)/", base).groups()  # type: ignore[union-attr]
            for base in (one, other)
        )
        assert port != port_of_other
        assert token != token_of_other
        assert len(token) >= 22, "128 bits"
        assert get(f"http://127.0.0.1:{port}/{token_of_other}/")[0] == 403
        assert first.stdout is not None
        assert first.stdout.readline().startswith(f"elsewhere  ssh -L {port}:127.0.0.1:{port} ")
        second.send_signal(signal.SIGINT)
        _, said = second.communicate(timeout=seconds(30))
        assert second.returncode == -signal.SIGINT
        # Another dashboard of this machine may have had the port of the first, and given it free.
        moved = f"hvd_train: port 8765 is in use; the dashboard is at {port_of_other}.\n"
        assert said == ("" if port_of_other == "8765" else moved)


def test_of_one_run_its_page_comes_first(tmp_path: Path) -> None:
    whole(tmp_path / "a run")
    with dashboard(tmp_path / "a run") as (_, base):
        assert base.endswith("/run/a%20run/curves")
        assert "<h1>a run</h1>" in get(base)[1]


def test_a_port_in_use_is_said_with_the_next_free_one(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listening = module._listen(port)
        with listening:
            assert listening.getsockname()[0] == "127.0.0.1"
            assert listening.getsockname()[1] > port


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRIED", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"--port \d+: it and the 0 ports after it are in use"):
            module._listen(taken.getsockname()[1])


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    job = run([*DASHBOARD, str(tmp_path / "none")], deadline_s=30)
    assert job.returncode == 2
    assert job.stderr == (
        f"hvd_train: {tmp_path}/none is not a folder. Expected the folder that holds the runs (--runs).\n"
    )


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(ConfigError, match=f"--port {port}: expected 1 to 65535"):
        module.parse(["--port", port])


def test_without_what_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(EnvironmentMismatch, match=r"starlette is not installed.*hvd_train\[monitor\]"):
        module.main(module.parse([str(tmp_path)]))

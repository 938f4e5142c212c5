"""`hvd_train launch --check-hosts`: what would go wrong on which host, before a training starts."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import cast

from hvd_train.errors import RunDirectoryError
from hvd_train.io.text import counted
from hvd_train.launching.check_hosts import probe
from hvd_train.launching.check_hosts.finding import CheckFailed, Finding, explanations, listed, table
from hvd_train.launching.check_hosts.judge import Standard, judge, judge_own
from hvd_train.launching.check_hosts.probe import Facts, ProbeRequest
from hvd_train.launching.check_hosts.remote import ProbeResult, probe_host
from hvd_train.launching.hosts import Host

LIMIT_S = 7.0
"""For all checks of up to 32 hosts; each further one adds 50 ms, as an ssh is started for each."""

_TOKEN_S = 5.0


def run(hosts: Sequence[Host], runs: Path, mpirun: str | None, python: str = sys.executable) -> int:
    """Checks all hosts at once and prints a table, with a line for each failure under it. Returns the exit
    status: 1 if a host failed, else 0; warnings do not change it. It takes 10 s at most.

    Args:
        runs: the folder of the runs, which is made for this time if there is none.
        mpirun: the launcher's absolute path, the same on every host; None: without one.
        python: the interpreter's path, the same on every host.

    Raises `RunDirectoryError` if nothing can be written into the folder of the runs.
    """
    deadline = time.monotonic() + LIMIT_S + 0.05 * max(0, len(hosts) - 32)
    with _marked(runs) as mark, _listening() as listener:
        request = ProbeRequest(
            cwd=os.getcwd(),
            path=[folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder],
            mpirun=mpirun or "",
            runs=os.path.abspath(runs),
            mark=mark,
            home="",
            port=listener.server_address[1],
            token=listener.token,
        )
        with ThreadPoolExecutor(len(hosts) + 1) as pool:
            here = pool.submit(lambda: cast("Facts", dict(probe.find(request))))
            results = {host: pool.submit(probe_host, host.name, python, request, deadline) for host in hosts}
    standard = Standard(facts=here.result(), python=python, request=request)
    rows = {host.name: _row(host, asked, standard) for host, asked in results.items()}
    print("\n".join([*table(rows), "", *_ways_home(results), *explanations(rows), _summary(rows)]))
    return int(any(finding.failed for row in rows.values() for finding in row.values()))


def _row(host: Host, asked: Future[ProbeResult | None], standard: Standard) -> dict[str, Finding]:
    try:
        found = asked.result()
    except CheckFailed as failed:
        return failed.row()
    return judge_own(host, standard) if found is None else judge(host, found, standard)


def _ways_home(results: Mapping[Host, Future[ProbeResult | None]]) -> list[str]:
    """The interfaces over which the hosts reached this one, which a launcher may need as an option."""
    ways: dict[tuple[str, str], list[str]] = {}
    for host, asked in results.items():
        found = None if asked.exception() else asked.result()
        if found is not None and "home" in found.facts and not found.facts["home"]["wrong"]:
            interface = found.facts["home"]["found"].partition(" ")[2]
            ways.setdefault((found.home, interface), []).append(host.name)
    return [
        f"{listed(names)} connected from {theirs or 'an unknown interface'} there "
        f"to {home} ({probe.interface_of(home) or 'an unknown interface'}) here."
        for (home, theirs), names in ways.items()
    ]


def _summary(rows: Mapping[str, Mapping[str, Finding]]) -> str:
    failed = [host for host, row in rows.items() if any(finding.failed for finding in row.values())]
    checked = f"{counted(len(rows), 'host')} checked"
    return f"{checked}, {len(failed)} failed: {listed(failed)}." if failed else f"{checked}, none failed."


@contextmanager
def _marked(runs: Path) -> Iterator[str]:
    """The name of a file that was just made in the folder of the runs."""
    file = runs / f".check-hosts-{secrets.token_hex(8)}"
    made = not runs.exists()
    try:
        runs.mkdir(parents=True, exist_ok=True)
        file.touch(exist_ok=False)
    except OSError as error:
        raise RunDirectoryError(
            f"{runs}: cannot be written here: {error.strerror}. Choose another --runs."
        ) from None
    try:
        yield file.name
    finally:
        with suppress(OSError):
            file.unlink()
            if made:
                runs.rmdir()


class _Listener(ThreadingTCPServer):
    """Listens on a free port, and answers clients that know the token."""

    daemon_threads = True
    request_queue_size = 1024  # all hosts call at once
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        super().__init__(("", 0), _Caller)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """The client has gone, or sent nothing in time. If it was a probe, it reports that itself."""


class _Caller(StreamRequestHandler):
    timeout = _TOKEN_S

    def handle(self) -> None:
        assert isinstance(self.server, _Listener)
        if self.rfile.readline(64).decode(errors="replace").strip() == self.server.token:
            self.wfile.write(probe.REPLY)


@contextmanager
def _listening() -> Iterator[_Listener]:
    with _Listener() as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield listener
        finally:
            listener.shutdown()
            thread.join()

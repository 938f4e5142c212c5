"""`hvd_train dashboard`: serves the pages of a folder of runs on this host's loopback."""

from __future__ import annotations

import errno
import getpass
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import tyro
from tyro.conf import Positional, arg

from hvd_train.config_values import require_usable
from hvd_train.errors import ConfigError, RunDirectoryError
from hvd_train.io.output import warn
from hvd_train.monitor.overview import is_run

_PORT = 8765
_TRIED = 50
"""Ports that are tried where the first is in use."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show the runs in a folder as live pages. The address that is printed has a token: whoever has it can
    read the runs' logs and configurations, and nothing else."""

    runs: Annotated[Positional[str], arg(metavar="RUNS|RUN")] = "runs"
    """The folder that holds the runs, or one of them: then its page comes first."""

    port: int = _PORT
    """Port on 127.0.0.1. If it is in use the next free one is taken."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: expected 1 to 65535.")


def parse(args: Sequence[str]) -> Options:
    """Raises `ConfigError`; exits with code 2 for an option that does not exist."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(Options, prog="hvd_train dashboard", args=list(args), config=config)


def main(options: Options) -> int:
    """Serves until it is interrupted; returns the exit code. Raises `RunDirectoryError` without the folder,
    and `EnvironmentMismatch` without what serves and draws."""
    folder = Path(options.runs)
    if not folder.is_dir():
        raise RunDirectoryError(
            f"{folder} is not a folder. Expected the folder that holds the runs (--runs)."
        )
    from hvd_train.monitor.web import pages

    pages.require()
    import uvicorn

    from hvd_train.monitor.web.server import application
    from hvd_train.monitor.web.site import Site

    first = ""
    if is_run(folder):
        folder = folder.resolve()
        folder, first = folder.parent, f"run/{quote(os.fsencode(folder.name), safe='')}/curves"
    listening = _listen(options.port)
    port = listening.getsockname()[1]
    if port != options.port:
        warn(f"port {options.port} is in use; the dashboard is at {port}.")
    token = secrets.token_urlsafe(16)
    print(f"dashboard  http://127.0.0.1:{port}/{token}/{first}")
    there = f"{_user()}@{socket.gethostname()}"
    print(f"elsewhere  ssh -L {port}:127.0.0.1:{port} {there}, then the same address", flush=True)
    config = uvicorn.Config(application(Site(folder), token), log_level="warning", access_log=False)
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "USER"


def _listen(port: int) -> socket.socket:
    """A listening socket at this port, or at the next one that is free. Raises `ConfigError`."""
    for candidate in range(port, min(port + _TRIED, 65536)):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", candidate))
            listening.listen(128)
        except OSError as error:
            listening.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
        else:
            return listening
    raise ConfigError(
        f"--port {port}: it and the {_TRIED - 1} ports after it are in use. Choose another --port."
    )

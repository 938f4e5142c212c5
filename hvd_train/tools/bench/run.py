"""The whole of `hvd_train bench allreduce`."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hvd_train.comm.agree import require_equal, together
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.environment import machine
from hvd_train.environment.launcher import detect
from hvd_train.errors import ConfigError
from hvd_train.tools.bench.options import Options, size_name
from hvd_train.tools.bench.rows import Row, add_ratios, best_of_each
from hvd_train.tools.bench.session import Session
from hvd_train.tools.bench.text import in_words

_COPIES = 12
"""Of a buffer, for each rank, that all backends together may hold at once."""


def run(options: Options, version: str) -> None:
    """Measures, and prints the report on rank 0. Collective.

    Args:
        version: of hvd_train.

    Raises `UserError`, on every rank, where there is nothing to measure or a backend that was named cannot be
    used; `CommunicationError` for a result that is wrong.
    """
    launcher = detect()
    if launcher.size == 1:
        raise ConfigError(
            "bench allreduce was started as one process. Expected at least 2 ranks: "
            "`mpirun -np 2 python -m hvd_train bench allreduce`.",
            agreed=True,
        )
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with _stdout_for_the_report(), connect("mpi" if launcher.provides == "mpi" else "horovod") as comm:
        require_equal(comm, "options", vars(options), "Give every rank the same options.")
        together(comm, lambda: _require_memory(options, comm))
        report = _measure(comm, options) | _circumstances(version, load)
    if launcher.rank == 0:
        print(json.dumps(report, indent=2) if options.json else in_words(report), flush=True)


def _measure(comm: Communicator, options: Options) -> dict[str, Any]:
    session = Session(comm, options)
    measured: list[Row] = [row for num_bytes in options.num_bytes for row in session.size(num_bytes)]
    limits = [session.with_wire(row) for row in measured if row["backend"] == "limit"]
    best, others = best_of_each(row for row in measured if row["backend"] != "limit")
    for rows in (best, others):
        add_ratios(rows, best, limits)
    report = {
        "rows": best,
        "variants": others,
        "limit": limits,
        "control": session.control(),
        "libraries": session.libraries,
        "left_out": session.left_out,
        "options": vars(options),
        "world": session.world(),
    }
    session.close()
    return report


def _circumstances(version: str, load: float) -> dict[str, Any]:
    """The conditions of the measurement."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "hvd_train": version,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "machine": {
            "host": platform.node(),
            "cores": os.cpu_count(),
            "cpu": _processor(),
            "system": platform.platform(),
            "load_before": load,
        },
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def _require_memory(options: Options, comm: Communicator) -> None:
    largest = max(options.num_bytes)
    needed, free = _COPIES * largest * comm.local_size, machine.available_memory()
    if needed > free:
        raise ConfigError(
            f"--sizes {size_name(largest)}: {comm.local_size} ranks of host {comm.host} may need "
            f"{needed >> 20:,} MiB for all backends, and {free >> 20:,} MiB are free. Give smaller sizes, or "
            "start fewer ranks."
        )


@contextlib.contextmanager
def _stdout_for_the_report() -> Iterator[None]:
    """Sends to standard error what libraries print to standard output, Python's own and others."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)

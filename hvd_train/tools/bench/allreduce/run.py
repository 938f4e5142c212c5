"""The whole of `hvd_train bench allreduce`."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from hvd_train.comm.agree import require_equal, together
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.environment import machine
from hvd_train.environment.launcher import detect
from hvd_train.errors import ConfigError
from hvd_train.tools.bench.allreduce.options import Options, size_name
from hvd_train.tools.bench.allreduce.rows import Row, add_ratios, best_of_each
from hvd_train.tools.bench.allreduce.session import Session
from hvd_train.tools.bench.allreduce.text import in_words
from hvd_train.tools.bench.conditions import conditions, stdout_for_the_report

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
    with stdout_for_the_report(), connect("mpi" if launcher.provides == "mpi" else "horovod") as comm:
        require_equal(comm, "options", vars(options), "Give every rank the same options.")
        together(comm, lambda: _require_memory(options, comm))
        report = _measure(comm, options) | conditions(version, load)
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


def _require_memory(options: Options, comm: Communicator) -> None:
    largest = max(options.num_bytes)
    needed, free = _COPIES * largest * comm.local_size, machine.available_memory()
    if needed > free:
        raise ConfigError(
            f"--sizes {size_name(largest)}: {comm.local_size} ranks of host {comm.host} may need "
            f"{needed >> 20:,} MiB for all backends, and {free >> 20:,} MiB are free. Give smaller sizes, or "
            "start fewer ranks."
        )

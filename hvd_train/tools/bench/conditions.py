"""What the figures of a benchmark depend on, and a standard output for its report alone."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def conditions(version: str, load: float) -> dict[str, Any]:
    """Date, versions and machine.

    Args:
        version: of hvd_train.
        load: of the machine before the measurement.
    """
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


def in_lines(report: dict[str, Any]) -> list[str]:
    """Machine and versions of a report, one line each."""
    machine = report["machine"]
    return [
        f"{machine['host']}: {machine['cores']} cores, {machine['cpu']}, {machine['system']}, "
        f"load {machine['load_before']:.1f} before",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]


@contextlib.contextmanager
def stdout_for_the_report() -> Iterator[None]:
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


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")

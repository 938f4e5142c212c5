"""What was measured as rows: medians with their spread, bus bandwidth, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from hvd_train.tools.bench.allreduce.peers import OWN

Row = dict[str, Any]


def spread_of(seconds: Sequence[float]) -> Row:
    """Median, smallest and largest of the slowest rank's times."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "repetitions": len(seconds),
    }


def bus_bytes_per_s(num_bytes: int, num_ranks: int, seconds: float) -> float:
    """2 (p-1)/p of the buffer over the time: what each link of a ring of p ranks would carry, whatever really
    moves the bytes, so that figures of different numbers of ranks can be compared."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds


def place(row: Row) -> tuple[int, bool]:
    """What can be compared: the same size and temperature."""
    return row["num_bytes"], row["cold"]


def best_of_each(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """For each backend, size and temperature the setting with the smallest median, and all the others. What
    hvd_train makes of a backend does not count as its best."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*place(row), row["backend"]), []).append(row)
    best, others = [], []
    for group in groups.values():
        first, *rest = sorted(group, key=lambda row: (row["setting"] == OWN, row["median_s"]))
        best.append(first)
        others += rest
    return best, others


def add_ratios(rows: Sequence[Row], best: Sequence[Row], limits: Sequence[Row]) -> None:
    """To each row its median over that of the ring, and over the limit, in the same place; None where there
    is none."""
    ring = {place(row): row["median_s"] for row in best if row["backend"] == "ring"}
    limit = {place(row): row["limit_s"] for row in limits}
    for row in rows:
        for name, base in (("times_ring", ring), ("times_limit", limit)):
            row[name] = row["median_s"] / base[place(row)] if place(row) in base else None

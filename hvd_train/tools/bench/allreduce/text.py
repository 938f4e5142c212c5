"""The report as text: tables, and the ratios in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvd_train.tools.bench.allreduce.options import size_name
from hvd_train.tools.bench.allreduce.rows import Row, place
from hvd_train.tools.bench.conditions import in_lines
from hvd_train.tools.bench.table import align

_HEAD = ["size", "backend", "setting", "caches", "median", "min", "max", "bus GB/s", "/ ring", "/ limit"]


def in_words(report: dict[str, Any]) -> str:
    """The whole report, as text."""
    parts = ["\n".join(_circumstances(report)), align(_rows(report))]
    if report["control"]:
        parts.append(align(_control_rows(report["control"])))
    parts.append("\n".join(_summary(report)))
    return "\n\n".join(part for part in parts if part)


def _circumstances(report: dict[str, Any]) -> list[str]:
    world, cores = report["world"], report["world"]["cores_of_rank"]
    return [
        f"{report['date']}: {world['ranks']} ranks on {world['hosts']} host{'s' * (world['hosts'] > 1)}, "
        f"{min(cores)} to {max(cores)} cores for a rank, 1 thread of torch each",
        *in_lines(report),
        *(f"{name}: {library}" for name, library in report["libraries"].items()),
        *(f"{name}: left out: {why}" for name, why in report["left_out"].items()),
    ]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    """By size and temperature, fastest first, the limit last."""
    measured = [*report["rows"], *report["variants"]]
    limits = {place(row): row for row in report["limit"]}
    cells = [_HEAD]
    for where in dict.fromkeys(map(place, measured)):
        group = [row for row in measured if place(row) == where]
        cells += [_cells(row) for row in sorted(group, key=lambda row: float(row["median_s"]))]
        if where in limits:
            cells += _limit_cells(limits[where])
    return cells


def _cells(row: Row) -> list[str]:
    ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("times_ring", "times_limit")]
    return [*_begin(row, row["backend"], row["setting"]), f"{row['bus_bytes_per_s'] / 1e9:.2f}", *ratios]


def _limit_cells(row: Row) -> list[list[str]]:
    cells = [[*_begin(row, "limit", "memory"), "", "", ""]]
    if row["wire_s"] is not None:
        cells.append(
            [size_name(row["num_bytes"]), "limit", "wire", "", duration(row["wire_s"]), "", "", "", "", ""]
        )
    return cells


def _begin(row: Row, backend: str, setting: str) -> list[str]:
    times = [duration(row[name]) for name in ("median_s", "min_s", "max_s")]
    return [size_name(row["num_bytes"]), backend, setting, _caches(row), *times]


def _caches(row: Row) -> str:
    return "cold" if row["cold"] else "warm"


def duration(seconds: float) -> str:
    """In milliseconds, or in microseconds below one."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def _control_rows(rows: Sequence[Row]) -> list[list[str]]:
    head = ["control", "backend", "setting", "calls", "median", "min", "max"]
    return [
        head,
        *(
            [
                f"{row['num_bytes'] // 8} doubles",
                row["backend"],
                row["setting"],
                str(row["calls"]),
                *(duration(row[name]) for name in ("median_s", "min_s", "max_s")),
            ]
            for row in rows
        ),
    ]


def _summary(report: dict[str, Any]) -> list[str]:
    """One line for each place where the ring was measured."""
    lines = []
    for ring in (row for row in report["rows"] if row["backend"] == "ring"):
        others = [row for row in report["rows"] if place(row) == place(ring) and row is not ring]
        times = [f"{row['backend']} ({row['setting']}) {row['times_ring']:.2f}" for row in others]
        if ring["times_limit"] is not None:
            times.append(f"the limit {1 / ring['times_limit']:.2f}")
        where = f"{size_name(ring['num_bytes'])}, {_caches(ring)}"
        lines.append(f"{where}, as multiples of the ring's time: {', '.join(times)}")
    return lines

"""The report of `bench data` as text."""

from __future__ import annotations

from typing import Any

from hvd_train.tools.bench.conditions import in_lines
from hvd_train.tools.bench.table import align

_HEAD = ["reader", "setting", "samples/s", "min", "max", "MB/s", "/ numpy", "/ DataLoader", "cold", "MB/s"]


def in_words(report: dict[str, Any]) -> str:
    """The whole report, as text."""
    options, row_bytes = report["options"], report["row_bytes"]
    head = [
        f"{report['date']}: {report['samples']:,} samples of {row_bytes:,} bytes, {report['source']}; "
        f"batches of {options['batch_size']} in random order, as float32; 1 thread of torch",
        *in_lines(report),
        *(f"{name}: left out: {why}" for name, why in report["left_out"].items()),
    ]
    if report["not_cold"]:
        head.append(f"cold: left out: {report['not_cold']}")
    rows = sorted(report["rows"], key=lambda row: -float(row["warm"]["median"]))
    return "\n".join(head) + "\n\n" + align([_HEAD, *(_cells(row, row_bytes) for row in rows)])


def _cells(row: dict[str, Any], row_bytes: int) -> list[str]:
    warm, cold = row["warm"], row["cold"]
    return [
        row["name"],
        row["setting"],
        *(f"{warm[name]:,.0f}" for name in ("median", "min", "max")),
        f"{warm['median'] * row_bytes / 1e6:,.1f}",
        f"{row['times_numpy']:.2f}",
        f"{row['times_loader']:.1f}",
        *((f"{cold['median']:,.0f}", f"{cold['median'] * row_bytes / 1e6:,.1f}") if cold else ("-", "-")),
    ]

"""The whole of `hvd_train bench data`."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hvd_train.environment.launcher import detect
from hvd_train.errors import ConfigError, EnvironmentMismatch
from hvd_train.tools.bench.conditions import conditions, stdout_for_the_report
from hvd_train.tools.bench.data.clock import timed, timed_cold
from hvd_train.tools.bench.data.contestants import Contestant
from hvd_train.tools.bench.data.entries import enter
from hvd_train.tools.bench.data.options import Options
from hvd_train.tools.bench.data.right import Right
from hvd_train.tools.bench.data.samples import Samples, load_samples
from hvd_train.tools.bench.data.text import in_words

Row = dict[str, Any]


def run(options: Options, version: str) -> None:
    """Measures, and prints the report.

    Args:
        version: of hvd_train.

    Raises `UserError` where there is nothing to measure, `DataError` for a result that is wrong. Not
    collective: one process, without a launcher.
    """
    if detect().size not in (None, 1):
        raise ConfigError(
            "bench data was started on several ranks. Expected one process: "
            "`python -m hvd_train bench data`.",
            agreed=True,
        )
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with stdout_for_the_report():
        report = _measure(options) | conditions(version, load)
    print(json.dumps(report, indent=2) if options.json else in_words(report), flush=True)


def _measure(options: Options) -> Row:
    samples = load_samples(options)
    if options.folder and not Path(options.folder).is_dir():
        raise ConfigError(f"--folder {options.folder}: expected an existing folder.")
    try:
        with tempfile.TemporaryDirectory(prefix="hvd_train-bench-", dir=options.folder or None) as name:
            entries, left_out = enter(samples, Path(name))
            right = Right(samples)
            for entry in entries:
                right.check(entry, options.batch_size)
            rates = _interleaved(timed, entries, samples, options)
            rows = [_row(entry, values) for entry, values in zip(entries, rates, strict=True)]
            why = _add_cold(rows, entries, samples, options)
    except OSError as error:
        raise ConfigError(f"--folder {options.folder or tempfile.gettempdir()}: {error}.") from None
    _add_ratios(rows, rates)
    return {
        "rows": rows,
        "left_out": left_out,
        "not_cold": why,
        "options": vars(options),
        "source": samples.source,
        "row_bytes": samples.row_bytes,
        "samples": len(samples),
    }


_Timing = Callable[[Contestant, Samples, int, float], float]


def _interleaved(
    timing: _Timing, entries: Sequence[Contestant], samples: Samples, options: Options
) -> list[list[float]]:
    """Samples/s of each, [entries, repeat]; what disturbs one timing disturbs its neighbours."""
    rates: list[list[float]] = [[] for _ in entries]
    for _ in range(options.repeat):
        for mine, entry in zip(rates, entries, strict=True):
            mine.append(timing(entry, samples, options.batch_size, options.seconds))
    return rates


def _row(entry: Contestant, rates: Sequence[float]) -> Row:
    return {"name": entry.name, "setting": entry.setting, "warm": _spread(rates), "cold": None}


def _add_cold(rows: Sequence[Row], entries: Sequence[Contestant], samples: Samples, options: Options) -> str:
    """Adds what is read from the disk; returns why that cannot be measured, if so."""
    on_disk = [entry for entry in entries if entry.files]
    try:
        rates = _interleaved(timed_cold, on_disk, samples, options)
    except EnvironmentMismatch as error:
        return str(error)
    of_disk = [row for row, entry in zip(rows, entries, strict=True) if entry.files]
    for row, values in zip(of_disk, rates, strict=True):
        row["cold"] = _spread(values)
    return ""


def _spread(rates: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def _add_ratios(rows: Sequence[Row], rates: Sequence[Sequence[float]]) -> None:
    """To each row the median over the repetitions of its rate over that of the loader of torch without
    workers, and over that of numpy in memory."""
    names = [(row["name"], row["setting"]) for row in rows]
    for key, base in (
        ("times_numpy", ("numpy", "in memory")),
        ("times_loader", ("DataLoader", "0 workers, contiguous")),
    ):
        of_base = rates[names.index(base)]
        for row, mine in zip(rows, rates, strict=True):
            row[key] = statistics.median(a / b for a, b in zip(mine, of_base, strict=True))

"""events.jsonl: what happened in a run, one JSON object a line, append-only.

The schema is events.schema.json beside this file. Later versions only add fields, so a reader ignores
what it does not know.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import msgspec

from hvd_train.io.output import warn
from hvd_train.record.reports import (
    PHASES,
    CheckpointReport,
    EvaluationReport,
    FaultReport,
    LayerReport,
    MachineReport,
    PeriodReport,
    Recorder,
    Report,
    RoundReport,
    RunStart,
    Spread,
    StopReport,
)
from hvd_train.record.thinning import Budget

SCHEMA = 2
SCHEMA_FILE = Path(__file__).with_name("events.schema.json")
ROUND_LINES_PER_S = 10

_BUDGETS = {  # bytes a second in the long run, bytes at once
    "round": (350, 300_000),
    "ranks": (500, 100_000),
    "machine": (80, 50_000),
    "layers": (200, 50_000),
}
"""What the lines of a kind may take: 4.1 MB an hour together, and 0.5 MB once. Lines of other kinds are rare,
and all are written. The local steps of each rank (schedule `time`) are not counted: those of every round are
needed for a replay."""

_DIGITS = 4
"""Significant digits of figures of which there is one for each rank or layer, and of seconds."""

_NAMES: dict[type[Report], str] = {
    MachineReport: "machine",
    LayerReport: "layers",
    EvaluationReport: "evaluation",
    CheckpointReport: "checkpoint",
    FaultReport: "fault",
    PeriodReport: "period",
    StopReport: "stop",
}


@final
class EventLog(Recorder):
    """Appends the reports of a run to `path`.

    Every line is one write to the operating system, so a killed process tears at most the last line. What is
    torn is cut off when the log is opened again. A line that cannot be written is left out whole; the first
    one causes a warning on standard error.

    Rounds that end within a tenth of a second become one line, and more of them once the log has grown fast
    for some minutes, so that an hour takes below 5 MB. The seconds of each rank are added up until their
    budget allows a line; observations that exceed theirs are left out. Every other event is written at once,
    after the rounds before it.

    Args:
        path: created if it does not exist; its folder must.
        clock: gives Unix seconds.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._path = path
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115, closed by close()
        _cut_torn_line(self._file.fileno())
        self._budgets = {event: Budget(*sizes) for event, sizes in _BUDGETS.items()}
        self._rounds: dict[str, Any] | None = None
        self._rounds_time = 0.0
        self._ranks: dict[str, Any] | None = None
        self._written_time = 0.0
        self._warned = False

    def header(self, header: RunStart) -> None:
        self._write("header", self._clock(), vars(header))

    def report(self, report: Report) -> None:
        now = self._clock()
        if isinstance(report, RoundReport):
            self._add_round(report, now)
            return
        event = _NAMES[type(report)]
        if event in self._budgets:
            if self._budgets[event].allows(now):
                self._write(event, now, _short(vars(report)))
            return
        self._flush_rounds()
        if isinstance(report, StopReport):
            self._flush_ranks()
        self._write(event, now, vars(report))

    def close(self) -> None:
        if not self._file.closed:
            self._flush_rounds()
            self._flush_ranks()
            with self._missing_lines_are_no_error():  # some file systems report a full disk here
                self._file.close()

    def _add_round(self, report: RoundReport, now: float) -> None:
        fields = {
            **vars(report),
            "rounds": (report.round, report.round),
            "periods": [(report.period, 1)],
            "steps": [] if report.steps is None else [report.steps],
        }
        self._rounds = fields if self._rounds is None else _merge(self._rounds, fields)
        self._rounds_time = now
        # A clock that was set back must not hold rounds back until it has caught up.
        if not 0 <= now - self._written_time < 1 / ROUND_LINES_PER_S and self._budgets["round"].allows(now):
            self._flush_rounds()
            if self._budgets["ranks"].allows(now):
                self._flush_ranks()

    def _flush_rounds(self) -> None:
        if self._rounds is None:
            return
        by_rank = self._rounds.pop("by_rank")
        steps = self._rounds["steps"]
        if steps or len(self._rounds["periods"]) == 1:  # then `period` is that of all
            del self._rounds["periods"]
        if not steps:
            del self._rounds["steps"]
        self._rounds["slowest"] = _slowest(by_rank)
        if by_rank is not None:
            self._add_ranks(by_rank)
        self._rounds["seconds"] = _short(self._rounds["seconds"])
        free_bytes = len(msgspec.json.encode(steps))
        self._write("round", self._rounds_time, self._rounds, free_bytes)
        self._written_time = self._rounds_time
        self._rounds = None

    def _add_ranks(self, by_rank: Any) -> None:
        assert self._rounds is not None
        first, last = self._rounds["rounds"]
        if self._ranks is not None:
            first, by_rank = self._ranks["rounds"][0], self._ranks["seconds"] + by_rank
        self._ranks = {"round": last, "rounds": (first, last), "seconds": by_rank}

    def _flush_ranks(self) -> None:
        if self._ranks is not None:
            by_rank = zip(PHASES, self._ranks["seconds"].tolist(), strict=True)
            self._write("ranks", self._rounds_time, {**self._ranks, "seconds": _short(dict(by_rank))})
            self._ranks = None

    def _write(self, event: str, time_s: float, fields: dict[str, Any], free_bytes: int = 0) -> None:
        """`free_bytes`: of the line, which the budget does not count."""
        # msgspec writes a float that is not finite as null; JSON cannot represent it.
        values = {"event": event, "schema": SCHEMA, "time_s": time_s, **fields}
        try:
            line = msgspec.json.encode(values, enc_hook=_python_number) + b"\n"
        except UnicodeEncodeError:  # the name of a file or host that is not UTF-8
            line = msgspec.json.encode(_in_utf8(values), enc_hook=_python_number) + b"\n"
        with self._missing_lines_are_no_error():
            _append(self._file.fileno(), line)
        if event in self._budgets:
            self._budgets[event].spend(len(line) - free_bytes)

    @contextmanager
    def _missing_lines_are_no_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn(
                    f"{self._path}: cannot be written: {error.strerror}. Training goes on; what happens "
                    "until it can be written is missing there. Make room."
                )


def _python_number(value: Any) -> Any:
    """A scalar of numpy or torch, which a user's task may give, as Python's own."""
    return value.item()


def _short(value: Any) -> Any:
    """A value with floats of a few digits, wherever they are in it."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Spread):
        return {name: _short(figure) for name, figure in vars(value).items()}
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value


def _in_utf8(value: Any) -> Any:
    """A value with escapes for what UTF-8 cannot encode, in texts wherever they are in it."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_in_utf8(key): _in_utf8(item) for key, item in value.items()}
    return [_in_utf8(item) for item in value] if isinstance(value, (list, tuple)) else value


def _merge(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One line for the rounds of both: sums, means over the samples, and the newest of the rest."""
    phases = dict.fromkeys([*before["seconds"], *new["seconds"]])
    none = Spread(0.0, 0.0, 0.0)
    return {
        **new,
        "rounds": (before["rounds"][0], new["rounds"][1]),
        "samples": before["samples"] + new["samples"],
        "loss": _mean_loss(before, new),
        "seconds": {p: before["seconds"].get(p, none) + new["seconds"].get(p, none) for p in phases},
        "by_rank": _sum(before["by_rank"], new["by_rank"]),
        "periods": _periods(before["periods"], new["periods"]),
        "steps": [*before["steps"], *new["steps"]],
        "drift": before["drift"] if new["drift"] is None else new["drift"],
        "zero_weight": sorted({*before["zero_weight"], *new["zero_weight"]}),
    }


def _slowest(by_rank: Any) -> int | None:
    """The rank that was busy longest; None if there is no other."""
    if by_rank is None or by_rank.shape[1] == 1:
        return None
    return int((by_rank[PHASES.index("data")] + by_rank[PHASES.index("compute")]).argmax())


def _periods(before: list[tuple[int, int]], new: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of rounds with one period, as (period, rounds)."""
    (period, rounds), (following, more) = before[-1], new[0]
    if period != following:
        return [*before, *new]
    return [*before[:-1], (period, rounds + more), *new[1:]]


def _sum(a: Any, b: Any) -> Any:
    return a if b is None else b if a is None else a + b


def _mean_loss(a: dict[str, Any], b: dict[str, Any]) -> float:
    counted = [(r["loss"], r["samples"]) for r in (a, b) if r["samples"]]
    total = sum(n for _, n in counted)
    return sum(loss * n for loss, n in counted) / total if total else float("nan")


def _append(descriptor: int, line: bytes) -> None:
    """Writes the whole line or, where that fails, nothing: the next one must not follow a part of it."""
    size = os.fstat(descriptor).st_size
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _cut_torn_line(descriptor: int) -> None:
    """Cuts off what follows the last line end."""
    size = end = os.fstat(descriptor).st_size
    block = 1 << 16
    while end > 0:
        begin = max(0, end - block)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        end = begin + newline + 1 if newline >= 0 else begin
        if newline >= 0:
            break
    if end < size:
        os.ftruncate(descriptor, end)


def read_events(path: str | Path, *, skip_damaged: bool = False) -> Iterator[dict[str, Any]]:
    """The events in `path`, oldest first, also while the log is being written.

    A last line that is torn, or not yet complete, is left out. Any other line that is not JSON is left out
    with `skip_damaged`, else it raises `ValueError`.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError as error:
                if not skip_damaged:
                    raise ValueError(f"{path}, line {number}: not an event: {error}.") from error

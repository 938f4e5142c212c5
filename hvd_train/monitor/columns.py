"""The lines of rounds of a run as arrays, of which an update converts the new lines only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from hvd_train.monitor.events import Round, Start
from hvd_train.record.reports import PHASES

_FIGURES = ("round", "time_s", "samples", "loss", "lr", "drift", "period")


@final
class Columns:
    """The lines of rounds, one column each: float64 [lines]; not a number for what is not known."""

    def __init__(self) -> None:
        self._last: Round | None = None
        self._table = np.empty((len(_FIGURES) + len(PHASES), 0))

    def update(self, rounds: Sequence[Round]) -> None:
        """Takes the lines as they are now: the same as before with others behind them, or quite others."""
        count = self._table.shape[1]
        if count > len(rounds) or (count and rounds[count - 1] is not self._last):
            count = 0
        if count == len(rounds) and count:
            return
        rows = [
            [*(getattr(line, name) for name in _FIGURES), *(_median(line, phase) for phase in PHASES)]
            for line in rounds[count:]
        ]
        new = np.array(rows, float).reshape(len(rows), len(self._table)).T
        self._table = np.concatenate([self._table[:, :count], new], axis=1)
        self._last = rounds[-1] if rounds else None

    def __getitem__(self, name: str) -> np.ndarray:
        """A figure of `Round` by its name."""
        column: np.ndarray = self._table[_FIGURES.index(name)]
        return column

    def medians(self, phase: str) -> np.ndarray:
        """The seconds of a phase, of the median rank; 0 where it was not measured."""
        column: np.ndarray = self._table[len(_FIGURES) + PHASES.index(phase)]
        return column

    def seconds(self, starts: Sequence[Start]) -> np.ndarray:
        """Seconds of training at each line. The time between two starts does not count, and a clock that was
        set back adds nothing."""
        times, rounds = self["time_s"], self["round"]
        if not starts or not len(times):
            return times * 0.0
        before = np.concatenate([[starts[0].time_s], times[:-1]])
        for start in starts[1:]:
            first = int(np.searchsorted(rounds, start.round, side="right"))
            if first < len(before):
                before[first] = max(before[first], start.time_s)
        gone: np.ndarray = np.cumsum(np.maximum(times - before, 0.0))
        return gone


def _median(line: Round, phase: str) -> float:
    return line.seconds[phase].median if phase in line.seconds else 0.0

"""One timed call, cold or warm; many of them, interleaved, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hvd_train.comm.base import Communicator, Op
from hvd_train.tools.bench.allreduce.peers import Contestant, Control, meet
from hvd_train.tools.bench.allreduce.values import Expected, Values

_LEAST_FLUSH = 64 << 20
"""Bytes to write where the system does not say how large its caches are."""

_CONTROL_S, _CONTROL_CALLS = 0.02, 1000
"""At most so long, and so many calls, for one timing of control values."""


def largest_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache of this host's cores; 0 where the system does not say.

    Args:
        root: the folder that holds /sys.
    """
    sizes = root.glob("sys/devices/system/cpu/cpu*/cache/index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=0)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without Python's collector of cycles."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Clock:
    """Times calls on this rank. Every method is collective.

    Args:
        comm: starts the ranks together. Nothing else may be using what it sends by.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._values = Values(comm.rank)
        # Twice the largest cache, as it is unknown which lines are evicted first.
        self._block = np.zeros(max(2 * largest_cache(), _LEAST_FLUSH) // 8)

    def _flush(self) -> None:
        # Read and written, as what is only written may go around the cache.
        np.add(self._block, 1.0, out=self._block)

    def interleaved(self, contestants: Sequence[Contestant], repeat: int, *, cold: bool) -> np.ndarray:
        """Seconds and bytes sent to other hosts of `repeat` calls of each, on this rank: float64
        [len(contestants), repeat, 2]. One call more comes first, does not count and is checked in full.

        Before each call every rank writes its values. Cold: then it flushes its caches. Warm: then there is a
        call that is not timed. Raises `CommunicationError` for a wrong result.
        """
        figures = np.zeros((len(contestants), repeat, 2))
        expected = [
            Expected(c.ranks, mean=c.mean, calls=1 if cold else 2, slack=c.slack) for c in contestants
        ]
        order = list(range(len(contestants)))
        with undisturbed():
            for repetition in range(-1, repeat):
                for i in order:
                    figure = self._once(contestants[i], cold)
                    self._check(contestants[i], expected[i], thorough=repetition < 0)
                    if repetition >= 0:
                        figures[i, repetition] = figure
                # Another one is first each time: the first call may run under other conditions.
                order = order[1:] + order[:1]
        return figures

    def _once(self, contestant: Contestant, cold: bool) -> tuple[float, int]:
        self._values.write(contestant.live)
        if cold:
            self._flush()
        else:
            meet(self._comm)
            contestant.call()
        sent = contestant.sent()
        meet(self._comm)
        start = time.perf_counter()
        contestant.call()
        seconds = time.perf_counter() - start
        meet(self._comm)
        return seconds, contestant.sent() - sent

    def _check(self, contestant: Contestant, expected: Expected, *, thorough: bool) -> None:
        what = f"{contestant.backend} ({contestant.setting})"
        for output in contestant.outputs:
            expected.check(output(), what, len(contestant.ranks), thorough=thorough)

    def control(self, controls: Sequence[Control], repeat: int) -> tuple[int, np.ndarray]:
        """How many calls were timed together, and the seconds of one on this rank: float64
        [len(controls), repeat]. Raises `CommunicationError` for a wrong sum."""
        pilot = max(self._series(control, 10) for control in controls)
        calls = int(min(max(_CONTROL_S / pilot, 10), _CONTROL_CALLS))
        calls = int(self._comm.allreduce(np.array([calls]), Op.MIN)[0])
        seconds = np.zeros((len(controls), repeat))
        with undisturbed():
            for repetition in range(repeat):
                for i, control in enumerate(controls):
                    seconds[i, repetition] = self._series(control, calls)
        return calls, seconds

    def _series(self, control: Control, calls: int) -> float:
        control.call()
        meet(self._comm)
        start = time.perf_counter()
        for _ in range(calls):
            result = control.call()
        seconds = (time.perf_counter() - start) / calls
        control.check(result)
        return seconds

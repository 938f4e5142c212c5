"""Whether the ranks that others wait for still work: how long a rank waits in a collective call.

A rank reports what it does by `phase` and `mark`. Where it stays in one place for long, a thread without
Python writes what it sees of the rank, its marks and the CPU time of its training thread, into a file that
the other ranks read while they wait (csrc/liveness/signs.hpp, docs/adr/0020). Where not all ranks see such
files, a rank waits for a time that grows with the longest round so far.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from hvd_train.errors import BarrierTimeout

try:
    from hvd_train.liveness import _signs
except ImportError:  # not compiled
    _signs = None  # type: ignore[assignment]

STALL_TIMEOUT_S = 300.0
"""Default of how long a rank may show no progress while others wait for it."""

_SLOWEST_BYTES_PER_S = 1 << 20
"""A call that moves many bytes, and cannot report how many it has moved, may take this much longer."""

_PREFIX = ".hvd_train-signs-"

_REMOVAL_S = 1.0
"""How long the end of a job waits for the removal of its signs: the file system may not answer."""

_OLD_S = 86_400.0
"""Age from which signs are those of a job that was killed: a job that uses them renews them."""

_BUSY_FACTOR, _WAIT_FACTOR = 3.0, 2.0
"""Without signs: how many times the longest work of this rank, and its longest wait, it waits for others."""

_trail: dict[str, None] = {"start-up": None}
"""The phases of this process since its last collective call, in order. A rank that does not arrive is in one
of them: all ranks run the same program."""


def phase(name: str) -> None:
    """Reports what this rank does from now on, in a few words; names are few and fixed."""
    _trail[name] = None
    if _signs is not None:
        _signs.enter_phase(name)


def mark() -> None:
    """Reports that this rank got something done: a batch, a block of rows, a piece of a file."""
    if _signs is not None:
        _signs.mark()


class Liveness:
    """How long this rank waits for the others of one job. Every collective call is made in `with liveness:`;
    calls within calls do not count. Not collective, but for `share`, which all ranks call alike.

    Args:
        stall_timeout_s: seconds without progress after which a rank that others wait for is given up.
        step_timeout_s: seconds without a mark after which even a busy rank is given up; 0: never.
    """

    def __init__(self, stall_timeout_s: float = STALL_TIMEOUT_S, step_timeout_s: float = 0.0) -> None:
        self.stall_timeout_s = stall_timeout_s
        self.step_timeout_s = step_timeout_s
        self.allowed_s = stall_timeout_s
        """Seconds that the current call may take where no signs are seen."""
        self.hooks = 0
        """What the extensions ask while they wait: the address of Hooks; 0: they wait for `allowed_s`."""
        self._signs: _signs.Signs | None = None
        self._folder: Path | None = None
        self._hosts: Sequence[str] = ()
        self._depth = 0
        self._extra_s = 0.0
        self._left = self._entered = time.monotonic()
        self._grown_s = stall_timeout_s

    def share(self, rank: int, hosts: Sequence[str], folder: Path | None, token: str) -> None:
        """From now on this rank leaves signs in `folder` and reads those of the others there.

        Args:
            hosts: of all ranks, by rank.
            folder: one that all ranks see, absolute; None: there is none.
            token: the same on every rank, and no other job's.
        """
        self._hosts = hosts
        if folder is None or _signs is None or len(hosts) == 1:
            return
        if rank == 0:
            _remove_old(folder)
        self._folder = folder / f"{_PREFIX}{token}"
        self._signs = _signs.Signs(
            str(self._folder), rank, len(hosts), self.stall_timeout_s, self.step_timeout_s
        )
        self.hooks = self._signs.hooks

    def sees_all(self) -> bool:
        """Whether the signs of all ranks are there, once all have called `share`."""
        return self._signs is not None and self._signs.sees_all()

    def of_survivors(self) -> Liveness:
        """For a new communicator of the surviving ranks, which see no signs yet."""
        return Liveness(self.stall_timeout_s, self.step_timeout_s)

    def stop_sharing(self) -> None:
        """The ranks no longer see signs of each other. All ranks must call it in the same place."""
        self._signs, self.hooks = None, 0

    def discard(self) -> None:
        """Removes the signs of all ranks: the job ends, and they would stay."""
        self.stop_sharing()
        if self._folder is not None:
            removal = threading.Thread(target=shutil.rmtree, args=(self._folder, True), daemon=True)
            removal.start()
            removal.join(_REMOVAL_S)

    @property
    def sees_signs(self) -> bool:
        """Whether this rank sees the signs of the others; else the time that it waits grows."""
        return self._signs is not None

    def call(self, num_bytes: int = 0) -> Liveness:
        """For a call that moves `num_bytes` between hosts: `with liveness.call(n):`."""
        if self._depth == 0:
            self._extra_s = num_bytes / _SLOWEST_BYTES_PER_S
        return self

    def __enter__(self) -> Liveness:
        self._depth += 1
        if self._depth == 1:
            self._entered = time.monotonic()
            grown_s = _BUSY_FACTOR * (self._entered - self._left)
            if grown_s > self._grown_s:
                self._grown_s = grown_s
            self.allowed_s = self._grown_s + self._extra_s
            if self._signs is not None:
                self._signs.enter(self._extra_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        if self._signs is not None:
            self._signs.leave()
        self._extra_s = 0.0
        if error is None:
            self._left = time.monotonic()
            grown_s = _WAIT_FACTOR * (self._left - self._entered)
            if grown_s > self._grown_s:
                self._grown_s = grown_s
            if len(_trail) > 1:
                last = next(reversed(_trail))
                _trail.clear()
                _trail[last] = None

    def give_up(self, idle_s: float) -> bool:
        """Whether to wait no longer in the current call, after `idle_s` seconds in which nothing moved in it.
        Ask often."""
        if self._signs is not None:
            return not self._signs.keep_waiting(idle_s)
        return idle_s > self.allowed_s

    def error(self, where: str, seen: Mapping[int, str] | None = None) -> BarrierTimeout:
        """What to raise after giving up.

        Args:
            where: this rank, in words.
            seen: ranks that are known to be late, and what they are doing; empty where that is not known.
        """
        late = dict(self._signs.missing()) if self._signs is not None else {}
        late = {rank: (seen or {}).get(rank) or doing for rank, doing in (late or seen or {}).items()}
        limit_s = self.stall_timeout_s if self._signs is not None else self.allowed_s
        found = " ".join(self._name(rank, late[rank]) for rank in sorted(late)) or "No rank"
        if not late and self._signs is None:
            found = "It is not known which rank"
        return BarrierTimeout(
            f"{where} waits in: {next(reversed(_trail))}. {found} made no progress for {limit_s:g} s. "
            "Find out what stopped it; if a healthy rank may be silent for longer, raise "
            "sync.stall_timeout_s.",
            sorted(late),
        )

    def _name(self, rank: int, doing: str) -> str:
        host = f" ({self._hosts[rank]})" if rank < len(self._hosts) else ""
        return f"Rank {rank}{host}, in: {doing or _between()},"


def _remove_old(folder: Path) -> None:
    for signs in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (signs, *signs.iterdir())) > _OLD_S:
                shutil.rmtree(signs, ignore_errors=True)


def _between() -> str:
    """Where a rank may be that took part in the last call and is not in this one."""
    *before, last = _trail
    return f"{', '.join(before)} or {last}" if before else last

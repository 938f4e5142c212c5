"""One rank of a trial: averages until a rank is killed, and goes on with those that live. See trials.py.

Arguments: the phase to die in, the victim, how to average (one of `MODES`), a seed, and a folder that all
ranks see: each survivor writes its report to RANK.json, the victim when and where it died to victim.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from hvd_train.comm.base import Communicator
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.errors import RankLost

BEFORE_MAPPING = "start-up before mapping"
AFTER_MAPPING = "start-up after mapping"
AGREEMENT = "agreement"
REDUCE = "reduce"
REDUCE_SCATTER = "reduce-scatter"
SLICE_STEP = "slice step"
ALL_GATHER = "all-gather"
CLOSING = "closing barrier"

MODES = ("fused", "background", "sliced")
"""In one pass, in one pass by a thread while live stays, or with a slice step."""

NUMEL = 4_000_003
"""Elements of float32: each phase that moves them takes some milliseconds."""

MAX_ROUNDS = 100
"""Of which the victim survives only those in which its phase passed unseen."""

STACKS_AFTER_S = 50.0
"""When a rank that still runs tells where: before its job is ended."""

_PATTERN = torch.arange(NUMEL, dtype=torch.float64) % 769 / 769


class Victim:
    """Kills this process; `None` in its place is a rank that lives."""

    def __init__(self, folder: Path) -> None:
        self._report = os.open(folder / "victim.json", os.O_CREAT | os.O_WRONLY)

    def die(self, **where: Any) -> None:
        """SIGKILL, which ends the process wherever its other threads are."""
        text = json.dumps({**where, "at": time.monotonic()})
        os.pwrite(self._report, text.ljust(200).encode(), 0)
        os.kill(os.getpid(), signal.SIGKILL)


class Starter(MPICommunicator):
    """Brings the ring up, which the victim does not see the end of: it dies as it enters or leaves one of the
    collective calls by which that is done."""

    victim: Victim | None = None
    fatal = 0
    """The number of the call: odd ones are the entries, even ones the exits."""
    _passed = 0

    def _step(self) -> None:
        self._passed += self.victim is not None
        if self.victim is not None and self._passed == self.fatal:
            self.victim.die(mapped=has_mapped())

    def allgather(self, value: Any) -> list[Any]:
        self._step()
        values = super().allgather(value)
        self._step()
        return values

    def barrier(self, timeout_s: float | None = None) -> None:
        self._step()
        super().barrier(timeout_s)
        self._step()


STEPS = {BEFORE_MAPPING: range(1, 5), AFTER_MAPPING: range(7, 22)}
"""The steps of `Starter` to die in: in the calls before the first that tells where shared memory is, and in
those after it until the first buffer is there."""


def has_mapped() -> bool:
    """Whether this process has mapped memory that others use; one page or two are a probe."""
    regions = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:hvd_train" in line]
    bounds = [line.split()[0].split("-") for line in regions]
    return any(int(end, 16) - int(begin, 16) > 8192 for begin, end in bounds)


class Watcher(threading.Thread):
    """Looks at what this rank is doing, from beside, and kills it when that is its phase: after a random part
    of the time that the phase took before; in `reduce` between hosts at once, before any message comes."""

    def __init__(self, comm: RingCommunicator, phase: str, victim: Victim) -> None:
        super().__init__(daemon=True)
        self._comm, self._victim = comm, victim
        between_hosts = phase == REDUCE and comm.num_hosts > 1
        self._phase = REDUCE_SCATTER if between_hosts else phase
        self._latest = 0.0 if between_hosts else 0.8
        self.round = 0
        """The average in which to die; 0 for none yet."""

    def run(self) -> None:
        with suppress(PermissionError):  # or the phase is often over before this thread has its turn
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -15)
        seen, since, length, delay = "", 0.0, 0.0, 0.0
        while True:
            now, phase = time.monotonic(), self._comm.phase(self._comm.rank)
            if phase != seen:
                length = now - since if seen == self._phase else length
                seen, since, delay = phase, now, length * random.uniform(0, self._latest)
            if self.round and phase == self._phase and now - since >= delay:
                self._victim.die(round=self.round)
            time.sleep(0)  # the other thread needs Python's lock


def start() -> Tensor:
    """x_0, the same on every rank."""
    return torch.arange(NUMEL) % 1013 / 1013


def change(factor: float, round: int) -> Tensor:
    """What the local steps of a round do on rank `factor` - 1; linear in the factor."""
    return torch.add(_PATTERN, round).mul_(factor)


def mean_change(size: int, round: int) -> Tensor:
    """The mean of all ranks' changes, each with the weight `weight`."""
    weights = [weight(rank) for rank in range(size)]
    return change(sum(w * (rank + 1) for rank, w in enumerate(weights)) / sum(weights), round)


def weight(rank: int) -> float:
    return 1.0 + 3 * rank


def slice_step(buffer: Buffer, owned: Tensor) -> None:
    torch.add(buffer.state, 1, out=buffer.next_state)
    for _ in range(20):  # long enough to be hit
        owned.mul_(2).mul_(0.5)
    owned.mul_(0.5)


def has_kept(buffer: Buffer) -> bool:
    """Whether this rank has, of the elements that it owns, what their slice steps have kept."""
    assert buffer.kept is not None
    expected = torch.arange(buffer.start, buffer.stop) % 1013 + buffer.version
    return buffer.kept.lost == 0 and torch.equal(buffer.state[0], expected.float())


def average(comm: Communicator, buffer: Buffer, mode: str) -> None:
    on_slice = (lambda owned, start: slice_step(buffer, owned)) if mode == "sliced" else None
    if mode == "background":
        comm.start_average(buffer, weight(comm.rank)).wait()
        buffer.live.copy_(buffer.anchor)
    else:
        comm.average(buffer, weight(comm.rank), on_slice)


def one_round(comm: Communicator, buffer: Buffer, mode: str, round: int) -> float:
    """Local steps and an average; returns the largest error of an element, beside the result's own size."""
    expected = buffer.anchor.double() + mean_change(comm.size, round)
    if mode == "sliced":
        expected *= 0.5
    buffer.live.add_(change(comm.rank + 1.0, round).float())
    average(comm, buffer, mode)
    assert torch.equal(buffer.live, buffer.anchor)
    return float(((buffer.live.double() - expected) / expected.abs().clamp(min=1)).abs().max())


def first_buffer(comm: Communicator, mode: str) -> Buffer:
    """A buffer with x_0 as its first average, taken from rank 0."""
    buffer = comm.buffer(NUMEL, torch.float32)
    if comm.rank == 0:
        buffer.live.copy_(start())
    comm.average(buffer, float(comm.rank == 0))
    if mode == "sliced":
        comm.keep_state(buffer, 1)
        buffer.state.copy_(torch.arange(buffer.start, buffer.stop) % 1013 + 1)
    return buffer


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.numpy())


class Job:
    """What this rank does until a rank dies, and from then on."""

    def __init__(self, phase: str, victim: int, mode: str, seed: int, folder: Path) -> None:
        random.seed(seed)
        self.phase, self.mode = phase, mode
        self.starter = Starter()
        self.comm: Communicator = self.starter
        self.buffer: Buffer | None = None
        self.victim = Victim(folder) if self.starter.rank == victim else None
        self.report: dict[str, Any] = {"rank": self.starter.rank, "errors": []}
        self.averages = {1: digest(start())}
        """By number: what a buffer that nobody dies in holds."""

    def bring_up(self) -> None:
        """Makes `comm` the ring, with a first buffer."""
        if self.phase in STEPS:
            self.starter.fatal, self.starter.victim = random.choice(STEPS[self.phase]), self.victim
        comm = RingCommunicator(self.starter)
        self.twin = first_buffer(comm, self.mode)
        if self.phase in STEPS:
            comm.barrier(30)
            raise AssertionError("the victim lives")
        self.comm, self.buffer = comm, first_buffer(comm, self.mode)

    def train(self) -> None:
        watcher = Watcher(self.comm, self.phase, self.victim) if self.victim else None
        if watcher:
            watcher.start()
        for number in range(2, MAX_ROUNDS):
            self.report["errors"].append(one_round(self.comm, self.twin, self.mode, number))
            self.averages[number] = digest(self.twin.anchor)
            if watcher:
                watcher.round = number if number > 3 else 0
            one_round(self.comm, self.buffer, self.mode, number)
            if watcher:
                watcher.round = 0
        raise AssertionError("the victim lives")

    def go_on(self) -> None:
        """Three rounds with those that are left."""
        survivors = self.comm.survivors()
        comm = survivors if isinstance(survivors, RingCommunicator) else RingCommunicator(survivors)
        buffer = comm.recover([self.buffer])[0] if self.buffer else first_buffer(comm, self.mode)
        number = buffer.version
        self.report |= {"number": number, "anchor": digest(buffer.anchor), "live": digest(buffer.live)}
        self.report |= {"reference": self.averages.get(number), "size": comm.size, "rounds": []}
        self.report["kept"] = self.mode != "sliced" or has_kept(buffer)
        for round in range(number + 1, number + 4):
            error = one_round(comm, buffer, self.mode, round)
            self.report["rounds"].append((error, digest(buffer.anchor)))
        self.report["kept"] &= self.mode != "sliced" or has_kept(buffer)
        comm.close()


def main() -> None:
    faulthandler.dump_traceback_later(STACKS_AFTER_S)
    phase, victim, mode, seed, folder = sys.argv[1:]
    job = Job(phase, int(victim), mode, int(seed), Path(folder))
    try:
        job.bring_up()
        job.train()
    except RankLost as error:
        job.report |= {"lost_at": time.monotonic(), "why": str(error)}
    comm = job.comm
    if isinstance(comm, RingCommunicator) and comm.rank // comm.local_size == int(victim) // comm.local_size:
        job.report["phase"] = comm.phase(int(victim))
    job.go_on()
    Path(folder, f"{job.report['rank']}.json").write_text(json.dumps(job.report))


if __name__ == "__main__":
    main()

"""The peers of one job, open; and their measurements, size by size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hvd_train.comm.agree import attempt
from hvd_train.comm.base import Communicator, Op
from hvd_train.environment import machine
from hvd_train.errors import EnvironmentMismatch
from hvd_train.tools.bench.allreduce.clock import Clock
from hvd_train.tools.bench.allreduce.gloo import GlooPeer
from hvd_train.tools.bench.allreduce.limit import MemoryLimit, wire_seconds
from hvd_train.tools.bench.allreduce.options import BACKENDS, ITEM_BYTES, Options, size_name
from hvd_train.tools.bench.allreduce.peers import CONTROL_VALUES, HorovodPeer, MPIPeer, Peer, RingPeer
from hvd_train.tools.bench.allreduce.rows import Row, bus_bytes_per_s, spread_of

Figures = dict[tuple[str, str, bool], list[np.ndarray]]
"""By backend, setting and temperature what `Clock.interleaved` gives for one contestant."""


class Session:
    """Opens what can be used. Every method, and making one, is collective.

    Args:
        inner: the communicator of the job's launcher, without the ring.

    Raises `EnvironmentMismatch`, on every rank, where a backend that was named cannot be used.
    """

    def __init__(self, inner: Communicator, options: Options) -> None:
        self._options = options
        self.comm = inner
        """Connects the ranks: the ring if there is one, as its sums are the fastest."""
        self.left_out: dict[str, str] = {}
        self._peers: list[Peer] = []
        ring = self._open("ring", lambda: RingPeer(inner, options.wire))
        if isinstance(ring, RingPeer):
            self.comm = ring.comm
        self._open("mpi", lambda: MPIPeer(inner))
        self._open("gloo", lambda: GlooPeer(self.comm))
        self._open("horovod", lambda: HorovodPeer(inner))
        self._open("limit", lambda: MemoryLimit(self.comm))

    def _open(self, name: str, make: Callable[[], Peer]) -> Peer | None:
        """The peer, if every rank can use it. The ring is opened even where it is not to be measured."""
        named = self._options.named_backends
        wanted = not named or name in named or name not in BACKENDS
        if not wanted and name != "ring":
            return None
        peer, reason = self._attempt(make)
        if peer is None and name in named:
            raise EnvironmentMismatch(
                f"--backends names {name}, which cannot be used: {reason}.", agreed=True
            )
        if peer is None:
            self.left_out[name] = reason
        elif wanted:
            self._peers.append(peer)
        return peer

    def _attempt(self, make: Callable[[], Peer]) -> tuple[Peer | None, str]:
        tried = attempt(self.comm, make)
        if reason := tried.why(EnvironmentMismatch):
            return None, reason.rstrip(".")
        peer = tried.value
        assert peer is not None  # no rank gave a reason
        if not peer.blocks:
            try:
                peer.open()
            except EnvironmentMismatch as error:
                return None, str(error).rstrip(".")
        return peer, ""

    @property
    def libraries(self) -> dict[str, str]:
        """What each backend that was measured is, and how it was set."""
        return {peer.name: peer.library for peer in self._peers}

    def size(self, num_bytes: int) -> list[Row]:
        """Measures buffers of so many bytes on each rank: a row for each backend, setting and temperature.
        The limit of the memory counts as a backend here."""
        private = torch.zeros(num_bytes // ITEM_BYTES)
        figures: Figures = {}
        # What runs in a block of its own is measured before and after the rest: a machine that becomes slower
        # or faster does so for both.
        first = self._options.repeat // 2
        self._say(f"{size_name(num_bytes)}")
        self._blocks(private, first, figures)
        steady = [peer for peer in self._peers if not peer.blocks]
        self._take(Clock(self.comm), steady, private, self._options.repeat, figures)
        self._blocks(private, self._options.repeat - first, figures)
        return [self._row(num_bytes, key, figures[key]) for key in figures]

    def _blocks(self, private: Tensor, repeat: int, figures: Figures) -> None:
        for peer in (
            peer for peer in self._peers if isinstance(peer, HorovodPeer) and peer.blocks and repeat
        ):
            peer.open()
            # While it is open its thread calls MPI, and no other may.
            alone = self.comm.name == "ring" and self.comm.num_hosts == 1
            self._take(Clock(self.comm if alone else peer.comm), [peer], private, repeat, figures)
            peer.close()

    def _take(
        self, clock: Clock, peers: Sequence[Peer], private: Tensor, repeat: int, figures: Figures
    ) -> None:
        contestants = [contestant for peer in peers for contestant in peer.contestants(private)]
        for cold in (True, False):
            measured = clock.interleaved(contestants, repeat, cold=cold)
            for contestant, figure in zip(contestants, measured, strict=True):
                figures.setdefault((contestant.backend, contestant.setting, cold), []).append(figure)

    def _row(self, num_bytes: int, key: tuple[str, str, bool], figures: Sequence[np.ndarray]) -> Row:
        backend, setting, cold = key
        mine = np.concatenate(figures)
        seconds = self.comm.allreduce(mine[:, 0], Op.MAX).tolist()
        sent = float(self.comm.allreduce(mine[:, 1], Op.SUM).max()) / self.comm.num_hosts
        row: Row = {"backend": backend, "setting": setting, "num_bytes": num_bytes, "cold": cold} | spread_of(
            seconds
        )
        return row | {
            "bus_bytes_per_s": bus_bytes_per_s(num_bytes, self.comm.size, row["median_s"]),
            "sent_bytes_per_host": sent or None,
            "verified": True,
        }

    def with_wire(self, row: Row) -> Row:
        """The limit's row with what the wire needs, if its rate is given: the longer of the two counts."""
        options, hosts = self._options, self.comm.num_hosts
        wire_s = None
        if options.wire_rate is not None and hosts > 1:
            wire_s = wire_seconds(row["num_bytes"], hosts, options.wire, options.wire_rate)
        kept = ("num_bytes", "cold", "median_s", "min_s", "max_s", "repetitions", "verified")
        return {name: row[name] for name in kept} | {
            "wire_s": wire_s,
            "limit_s": max(row["median_s"], wire_s or 0.0),
        }

    def control(self) -> list[Row]:
        """Measures sums of a few doubles."""
        controls = [control for peer in self._peers for control in peer.controls()]
        if not controls:
            return []
        self._say(f"{CONTROL_VALUES} doubles")
        calls, mine = Clock(self.comm).control(controls, self._options.repeat)
        rows = []
        for control, figure in zip(controls, mine, strict=True):
            spread = spread_of(self.comm.allreduce(figure, Op.MAX).tolist())
            head = {"backend": control.backend, "setting": control.setting, "num_bytes": 8 * CONTROL_VALUES}
            rows.append(head | {"calls": calls} | spread | {"verified": True})
        return rows

    def world(self) -> Row:
        """The ranks, and the cores that each may run on."""
        cores = self.comm.allgather(len(machine.AFFINITY))
        return {"ranks": self.comm.size, "hosts": self.comm.num_hosts, "cores_of_rank": cores}

    def _say(self, what: str) -> None:
        if self.comm.rank == 0:
            print(f"hvd_train: measuring {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the use of the peers, not of the communicator."""
        for peer in self._peers:
            if not peer.blocks:
                peer.close()

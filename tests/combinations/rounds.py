"""Rounds of a rule without data or files, for what communicators can do and a run does not use yet: averages
in the background, and going on without a rank that is lost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from hvd_train.algorithm.header import Work
from hvd_train.algorithm.period.base import Done
from hvd_train.algorithm.period.chosen import make_period
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.base import Communicator
from hvd_train.config import SyncConfig

BATCH = 6


class Model(nn.Module):
    """With batch norm, and with parameters of one type or of two."""

    def __init__(self, *, two_types: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh())
        self.head = nn.Linear(7, 3, dtype=torch.float64 if two_types else torch.float32)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).to(self.head.weight.dtype))


class Rounds:
    """A training of one rule on this rank. Making one is collective."""

    def __init__(self, comm: Communicator, sync: SyncConfig, *, two_types: bool = False) -> None:
        self.comm = comm
        self.sync = sync
        self.model = Model(two_types=two_types)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.parts = SyncParts(self.model, self.optimizer, comm, sync)
        self.synchronizer = self.parts.synchronizer()
        self.period = make_period(sync, ())
        self.synchronizer.start()
        self.done = 0

    def local_steps(self, k: int) -> Work:
        loss_sum = 0.0
        for step in range(k):
            generator = torch.Generator().manual_seed(1000 * self.done + 10 * step + self.comm.rank)
            inputs = torch.randn(BATCH, 4, generator=generator)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs), inputs[:, :3].argmax(1))
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item() * BATCH
        return Work(samples=k * BATCH, loss_sum=loss_sum, compute_s=0.01)

    def round(self) -> None:
        """One round, after which all ranks that average have the same parameters. Collective."""
        k = self.comm.broadcast(self.period.next(self.done, 0.1))
        header = self.synchronizer.synchronize(self.done, self.local_steps(k))
        self.done += 1
        self.period.after_round(Done(rounds=self.done, k=k, header=header, drift=self.synchronizer.drift))
        others = set(self.comm.allgather(self.bits()))
        assert len(others) == (1 if self.sync.mode == "average" else self.comm.size)

    def average(self, background: bool) -> None:
        """`sync.period` local steps and an average, at once or in the background, while the parameters may
        change. Collective."""
        self.local_steps(self.sync.period)
        outer = self.parts.outer
        for part, buffer in self.parts.flat.buffers.items():
            step = outer.on_slice(part, measure=False)
            if background:
                pending = self.comm.start_average(buffer, BATCH, step)
                buffer.live.fill_(torch.nan)
                assert pending.wait()
                buffer.live.copy_(buffer.anchor)
            else:
                assert self.comm.average(buffer, BATCH, step)
        outer.after_average(True)
        self.done += 1

    def rebind(self, comm: Communicator) -> str:
        self.comm = comm
        return self.synchronizer.rebind(comm)

    def bits(self) -> str:
        digest = xxhash.xxh3_64()
        for p in self.model.parameters():
            digest.update(p.detach().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

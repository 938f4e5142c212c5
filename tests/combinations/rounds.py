"""Rounds of a rule without data or files, for what communicators can do and a run does not use yet: averages
in the background, and going on without a rank that is lost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import Work
from hvd_train.algorithm.period.base import Done, Seconds, own_limit
from hvd_train.algorithm.period.chosen import make_period
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.base import Communicator
from hvd_train.config import Config
from hvd_train.data.format import SampleSpec
from hvd_train.tasks.base import Batch, Task

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


class Largest(Task):
    """Which of the first three inputs is the largest."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        return Model(two_types=False)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["inputs"]), batch["inputs"][:, :3].argmax(1)), BATCH


class Rounds:
    """A training on this rank. Making one is collective."""

    def __init__(self, comm: Communicator, config: Config, *, two_types: bool = False) -> None:
        self.comm = comm
        self.sync = config.sync
        self.model = Model(two_types=two_types)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.parts = SyncParts(self.model, optimizer, comm, config)
        self.step = self.parts.step(Gradients(self.model, Largest(), config.optim))
        self.synchronizer = self.parts.synchronizer()
        self.period = make_period(self.sync, ())
        self.synchronizer.start()
        self.done = 0

    def local_steps(self, k: int) -> Work:
        loss_sum, samples = 0.0, 0
        for number in range(k):
            generator = torch.Generator().manual_seed(1000 * self.done + 10 * number + self.comm.rank)
            done = self.step([{"inputs": torch.randn(BATCH, 4, generator=generator)}])
            loss_sum, samples = loss_sum + done.loss_sum, samples + done.samples
        return Work(samples=samples, loss_sum=loss_sum, compute_s=0.01, steps=k)

    def round(self) -> None:
        """One round, after which all ranks that average have the same parameters. Collective."""
        limit = own_limit(self.comm.broadcast(self.period.next(self.done, 0.1)), self.comm.rank)
        # A clock is not needed for ranks to take different numbers of steps.
        work = self.local_steps(1 + self.comm.rank if isinstance(limit, Seconds) else limit)
        header = self.synchronizer.synchronize(self.done, work)
        self.done += 1
        self.period.after_round(
            Done(rounds=self.done, k=header.period, header=header, drift=self.synchronizer.drift)
        )
        every = set(self.comm.allgather(self.bits()))
        assert len(every) == (self.comm.size if self.sync.mode == "none" else 1)

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

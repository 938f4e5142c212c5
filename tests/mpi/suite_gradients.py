"""Gradients averaged in every local step, on every rank of a real job, against one process with the joint
batch: see test_gradients.py, and tests/cluster/test_gradients_between_hosts.py, where averages begin within
the backward pass."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import Header, Work
from hvd_train.algorithm.local_step import make_optimizer
from hvd_train.algorithm.sliced_optimizer import SlicedOptimizer
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.base import Communicator
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.config import Config, OptimConfig, SyncConfig
from hvd_train.config.optim import GroupConfig
from hvd_train.data.format import SampleSpec
from hvd_train.tasks.base import Batch, Task
from tests.mpi.infinite import Infinite
from tests.mpi.suite_averaging import assert_same_bits, samples

ROUNDS, HALF, STEPS = 30, 15, 2
COUNTS = (16, 16, 12, 8)
OUT_OF_ROWS = {3: 7, 2: 11}
"""Ranks that have no batch in every so many steps."""
NOT_FINITE = {(5, 1), (33, 0), (33, 3)}
"""(step, rank) in which a rank has a value that is not finite; in step 40 every rank has."""
SPOILED = {(13, 2), (47, 1)}
"""The same where the loss is finite, and all gradients are but that of the first layer's weight."""
BACKENDS = os.environ.get("GRADIENTS_BACKENDS", "mpi ring").split()

GROUPS = (GroupConfig(pattern="*bias", lr_factor=2.0, weight_decay=0.0),)


@dataclass(frozen=True)
class Case:
    optim: dict[str, Any]
    batches: int = 1
    """Of a step; each is smaller than the one before it."""
    sync: dict[str, Any] = field(default_factory=dict)
    extras_first: bool = False
    """Whether the parameters that some ranks have no gradient of come before the others."""


# A small epsilon would amplify the rounding of gradients that are nearly 0.
CASES = {
    "momentum": Case(
        {"name": "SGD", "lr": 0.05, "args": {"momentum": 0.9, "weight_decay": 0.01}}, extras_first=True
    ),
    "adamw": Case({"name": "AdamW", "lr": 0.01, "args": {"eps": 1e-3, "weight_decay": 0.1}}),
    "clip": Case({"name": "SGD", "lr": 0.1, "clip_norm": 0.3, "args": {"momentum": 0.9, "nesterov": True}}),
    "accumulate": Case({"name": "AdamW", "lr": 0.01, "clip_norm": 0.5, "args": {"eps": 1e-3}}, batches=3),
    "accumulate without clipping": Case(
        {"name": "AdamW", "lr": 0.01, "args": {"eps": 1e-3}}, batches=3, extras_first=True
    ),
    "rmsprop": Case(
        {"name": "RMSprop", "lr": 0.01, "args": {"eps": 1e-3, "momentum": 0.5, "centered": True}}
    ),
}


class Own(Task):
    """Gives rows whose mask is set a further parameter, which the other ranks then have no gradient of."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        outputs = model.layers(batch["inputs"])
        if batch["mask"].any():
            outputs = outputs + batch["mask"][:, None] * model.extras.seldom
        loss = F.cross_entropy(outputs, batch["targets"])
        if batch["spoiled"].any():
            loss = loss + Infinite.apply(model.layers[0].weight)
        return loss, len(batch["targets"])


class Extras(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seldom = nn.Parameter(torch.ones(6))
        self.never = nn.Parameter(torch.ones(5))


class Model(nn.Module):
    """A third of its parameters are in the last layer, and not in the extras."""

    def __init__(self, extras_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        if extras_first:
            self.extras = Extras()
        self.layers = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))
        if not extras_first:
            self.extras = Extras()


def model(case: Case) -> Model:
    return Model(case.extras_first)


@pytest.fixture(scope="module")
def world() -> Iterator[MPICommunicator]:
    with MPICommunicator() as comm:
        assert comm.size == len(COUNTS)
        yield comm


@pytest.fixture(scope="module", params=BACKENDS)
def comm(request: pytest.FixtureRequest, world: MPICommunicator) -> Communicator:
    return world if request.param == "mpi" else RingCommunicator(world)


@pytest.fixture(scope="module")
def pair(world: MPICommunicator) -> Communicator | None:
    """The first two ranks, as a world of their own; None on the others."""
    part = world._comm.Split(int(world.rank >= 2), world.rank)
    return RingCommunicator(MPICommunicator(comm=part)) if world.rank < 2 else None


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches_of(case: Case, step: int, rank: int) -> list[Batch]:
    """What a rank draws in a step."""
    if rank in OUT_OF_ROWS and step % OUT_OF_ROWS[rank] == 0:
        return []
    found = []
    for i in range(case.batches):
        inputs, targets = samples(100 * step + i, rank, COUNTS[rank] - 3 * i)
        mask = torch.full((len(targets),), float(rank == 1 and step % 3 == 0))
        spoiled = torch.full_like(mask, (step, rank) in SPOILED and i == case.batches - 1)
        found.append({"inputs": inputs, "targets": targets, "mask": mask, "spoiled": spoiled})
    if (step, rank) in NOT_FINITE or step == 40:
        found[-1]["inputs"][0, 0] = float("inf")
    return found


def lr_factor(round_: int) -> float:
    return (1 + math.cos(round_ / 9)) / 2


def set_rate(optimizer: torch.optim.Optimizer, rates: list[float], round_: int) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * lr_factor(round_)


def joint(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class Reference:
    """One process that trains on the batches of all ranks at once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = OptimConfig(**case.optim, groups=GROUPS)
        self.model = model(case)
        self.optimizer = make_optimizer(self.model, self.config)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def run(self, rounds: range, ranks: int) -> None:
        for round_ in rounds:
            set_rate(self.optimizer, self.rates, round_)
            for step in range(STEPS * round_, STEPS * (round_ + 1)):
                drawn = [batches_of(self.case, step, rank) for rank in range(ranks)]
                used = [
                    batch
                    for rank, of in enumerate(drawn)
                    if (step, rank) not in NOT_FINITE | SPOILED and step != 40
                    for batch in of
                ]
                if used:
                    self.step(joint(used))

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        Own().loss(self.model, batch)[0].backward()
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()


class Ours:
    """The same on the ranks of a communicator."""

    def __init__(self, comm: Communicator, case: Case, start: list[Any] | None = None) -> None:
        self.comm, self.case = comm, case
        self.model = model(case)
        optim = OptimConfig(**case.optim, groups=GROUPS)
        self.optimizer = make_optimizer(self.model, optim)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        config = Config(optim=optim, sync=SyncConfig(mode="gradients", check_every=1, **case.sync))
        self.parts = SyncParts(self.model, self.optimizer, comm, config)
        sliced = self.parts.stateful()["sliced"]
        assert isinstance(sliced, SlicedOptimizer)
        self.sliced = sliced
        if start is not None:
            self.model.load_state_dict(start[0]["model"])
            sliced.take(of["sliced"] for of in start)
        self.step = self.parts.step(Gradients(self.model, Own(), optim))
        self.synchronizer = self.parts.synchronizer()
        self.synchronizer.start()
        self.headers: list[Header] = []

    def run(self, rounds: range) -> dict[str, Any]:
        for round_ in rounds:
            set_rate(self.optimizer, self.rates, round_)
            loss_sum, used = 0.0, 0
            for step in range(STEPS * round_, STEPS * (round_ + 1)):
                done = self.step(batches_of(self.case, step, self.comm.rank))
                loss_sum, used = loss_sum + done.loss_sum, used + done.samples
            work = Work(samples=used, loss_sum=loss_sum)
            self.headers.append(self.synchronizer.synchronize(round_, work))
            assert self.synchronizer.drift is None
        assert_same_bits(self.comm, self.model)
        assert not self.optimizer.state, "the optimizer of the whole model keeps nothing"
        return copy.deepcopy({"model": self.model.state_dict(), "sliced": self.sliced.state_dict()})


def assert_close(found: dict[str, Any], reference: Reference) -> None:
    for name, value in reference.model.state_dict().items():
        assert (found["model"][name] - value).abs().max() < 1e-10, name
    moved = {name for name, p in reference.model.named_parameters() if not torch.all(p == 1)}
    assert moved == {*(f"layers.{i}.{of}" for i in (0, 2) for of in ("weight", "bias")), "extras.seldom"}


def assert_same_moments(states: list[dict[str, Any]], reference: Reference) -> None:
    """Every moment, put together from the pieces of all ranks."""
    for name, p in reference.model.named_parameters():
        for key, value in reference.optimizer.state.get(p, {}).items():
            pieces = sorted(
                (of["sliced"]["offsets"][name], of["sliced"][f"{key}/{name}"])
                for of in states
                if name in of["sliced"]["offsets"]
            )
            whole = torch.cat([x for _, x in pieces]) if value.dim() else pieces[0][1]
            assert (whole - value.flatten() if value.dim() else whole - value).abs().max() < 1e-10, (
                key,
                name,
            )


@pytest.mark.parametrize("name", CASES)
def test_thirty_rounds_are_those_of_one_process_also_resumed(
    comm: Communicator, pair: Communicator | None, name: str
) -> None:
    """At once; interrupted after half of them; and gone on with by two of the four ranks."""
    case = CASES[name]
    reference = Reference(case)
    reference.run(range(HALF), comm.size)
    half = comm.allgather(Ours(comm, case).run(range(HALF)))
    assert_close(half[comm.rank], reference)
    fewer = copy.deepcopy(reference)
    reference.run(range(HALF, ROUNDS), comm.size)
    ours = Ours(comm, case)
    whole = ours.run(range(ROUNDS))
    assert_close(whole, reference)
    assert_same_moments(comm.allgather(whole), reference)
    unhealthy = {round_: header.unhealthy for round_, header in enumerate(ours.headers) if header.unhealthy}
    assert unhealthy == {2: [1], 6: [2], 16: [0, 3], 20: [0, 1, 2, 3], 23: [1]}
    resumed = Ours(comm, case, half).run(range(HALF, ROUNDS))
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    for key, value in whole["sliced"].items():
        other = resumed["sliced"][key]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, key
    if pair is not None:
        fewer.run(range(HALF, ROUNDS), 2)
        assert_close(Ours(pair, case, half).run(range(HALF, ROUNDS)), fewer)
    comm.barrier()


def test_buffers_are_averaged_at_the_end_of_a_round(comm: Communicator) -> None:
    """Batch norm's statistics are each rank's own in the steps, and the weighted mean after them."""

    class Normed(Own):
        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    replicas = [copy.deepcopy(module) for _ in COUNTS]
    optim = OptimConfig(lr=0.1, args={"momentum": 0.9})
    optimizer = make_optimizer(module, optim)
    parts = SyncParts(
        module, optimizer, comm, Config(optim=optim, sync=SyncConfig(mode="gradients", ema=0.5))
    )
    step, synchronizer = parts.step(Gradients(module, Normed(), optim)), parts.synchronizer()
    synchronizer.start()
    optimizers = [make_optimizer(replica, optim) for replica in replicas]
    shares = [n / sum(COUNTS) for n in COUNTS]
    averages = []
    for round_ in range(4):
        for at in range(3 * round_, 3 * round_ + 3):
            every = [
                dict(zip(("inputs", "targets"), samples(at, r, n), strict=True)) for r, n in enumerate(COUNTS)
            ]
            step([every[comm.rank]])
            losses = [Normed().loss(m, b)[0] for m, b in zip(replicas, every, strict=True)]
            found = [torch.autograd.grad(x, m.parameters()) for x, m in zip(losses, replicas, strict=True)]
            means = [
                sum(s * g for s, g in zip(shares, same, strict=True)) for same in zip(*found, strict=True)
            ]
            for replica, of in zip(replicas, optimizers, strict=True):
                for p, mean in zip(replica.parameters(), means, strict=True):
                    p.grad = mean.clone()
                of.step()
        synchronizer.synchronize(round_, Work(samples=3 * COUNTS[comm.rank]))
        for same in zip(*([b for b in r.buffers() if b.is_floating_point()] for r in replicas), strict=True):
            mean = sum(s * b for s, b in zip(shares, same, strict=True))
            for buffer in same:
                buffer.copy_(mean)
        for name, value in replicas[0].state_dict().items():
            assert (module.state_dict()[name] - value).abs().max() < 1e-10, name
        averages.append(copy.deepcopy(replicas[0].state_dict()))
    with parts.ema.shown():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                weights = [0.5**n for n in range(3, -1, -1)]
                mean = sum(w * a[name] for w, a in zip(weights, averages, strict=True)) / sum(weights)
                assert (value - mean).abs().max() < 1e-10, name


def test_the_last_layers_are_averaged_within_the_backward_pass_between_hosts(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first one after it. Within a host all are averaged after it."""
    ours = Ours(comm, CASES["momentum"])
    calls: list[str] = []
    for name in ("start_average", "average"):
        call = getattr(comm, name)
        monkeypatch.setattr(
            comm, name, lambda *args, n=name, c=call, **kw: (calls.append(n), c(*args, **kw))[1]
        )
    ours.model.layers[0].weight.register_hook(lambda gradient: calls.append("gradient"))
    ours.step(batches_of(ours.case, 1, comm.rank))
    early = ["start_average"] if comm.num_hosts > 1 else []
    assert calls == [*early, "gradient", "average"]

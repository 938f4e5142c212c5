"""Post-local SGD on every rank of a real job, against one process: data-parallel training on the joint batch,
and then as many replicas as there are ranks, whose moments begin as those of the warm-up: see
test_gradients.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import Work
from hvd_train.algorithm.local_step import make_optimizer
from hvd_train.algorithm.optimizer_state import OptimizerState
from hvd_train.algorithm.sliced_optimizer import SlicedOptimizer
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.base import Communicator
from hvd_train.config import Config, OptimConfig, SyncConfig
from hvd_train.tasks.base import Batch
from tests.mpi.suite_averaging import assert_same_bits
from tests.mpi.suite_gradients import (
    COUNTS,
    GROUPS,
    ROUNDS,
    Case,
    Own,
    _double_precision,  # noqa: F401 (a fixture)
    batches_of,
    comm,  # noqa: F401
    joint,
    model,
    pair,  # noqa: F401
    set_rate,
    world,  # noqa: F401
)

WARM, K = 12, 3
STOPS = (5, WARM, 20)
"""Rounds after which a run is interrupted: in the warm-up, at its end, and after it."""

ADAMW = {"name": "AdamW", "lr": 0.01, "args": {"eps": 1e-3, "weight_decay": 0.1}}
CASES = {
    "momentum": Case({"name": "SGD", "lr": 0.05, "args": {"momentum": 0.9, "weight_decay": 0.01}}),
    "adamw": Case({**ADAMW, "clip_norm": 0.5}, batches=2),
    "keep": Case(ADAMW, sync={"optimizer_state": "keep"}),
    "reset": Case(ADAMW, sync={"optimizer_state": "reset"}),
    "mixed": Case(ADAMW, sync={"moments": {"exp_avg": "keep"}, "every_rounds": {"exp_avg_sq": 4}}),
}


def steps_of(round_: int) -> range:
    """The numbers of the local steps of a round. In those of the warm-up some ranks are not finite."""
    return range(round_, round_ + 1) if round_ < WARM else range(100 + K * round_, 100 + K * (round_ + 1))


def policy(case: Case, key: str) -> str:
    return str(case.sync.get("moments", {}).get(key, case.sync.get("optimizer_state", "average")))


class Replica:
    """A model with its optimizer, in one process."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = OptimConfig(**case.optim, groups=GROUPS)
        self.model = model(case)
        self.optimizer = make_optimizer(self.model, self.config)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if case.sync.get("optimizer_state") not in ("keep", "reset"):
            for p in self.model.parameters():  # ours lays the moments out before the first step
                p.grad = torch.zeros_like(p)
            values = copy.deepcopy(self.model.state_dict())
            self.optimizer.step()
            self.model.load_state_dict(values)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        Own().loss(self.model, batch)[0].backward()
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """By key and parameter."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                if key != "step":
                    found.setdefault(key, {})[name] = value
        return found


class Reference:
    """All ranks in one process."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.replicas = [Replica(case)]

    def run(self, rounds: range, ranks: int) -> None:
        for round_ in rounds:
            if round_ == WARM:
                self.replicas = [copy.deepcopy(self.replicas[0]) for _ in range(ranks)]
                self._after_average(round_ - 1, first=True)
            self.replicas = self.replicas[:ranks]  # a resumed run may have fewer
            for replica in self.replicas:
                set_rate(replica.optimizer, replica.rates, round_)
            if round_ < WARM:
                self._together(round_, ranks)
            else:
                self._alone(round_)

    def _together(self, step: int, ranks: int) -> None:
        drawn = [batches_of(self.case, step, rank) for rank in range(ranks)]
        used = [b for of in drawn if all(b["inputs"].isfinite().all() for b in of) for b in of]
        if used:
            self.replicas[0].step(joint(used))

    @torch.no_grad()
    def _alone(self, round_: int) -> None:
        used = [0] * len(self.replicas)
        for rank, replica in enumerate(self.replicas):
            for step in steps_of(round_):
                drawn = batches_of(self.case, step, rank)
                if drawn:
                    with torch.enable_grad():
                        replica.step(joint(drawn))
                used[rank] += sum(len(b["targets"]) for b in drawn)
        shares = [n / sum(used) for n in used]
        for same in zip(*(r.model.parameters() for r in self.replicas), strict=True):
            _mean(shares, same)
        self._after_average(round_, shares=shares)

    @torch.no_grad()
    def _after_average(self, round_: int, *, first: bool = False, shares: list[float] | None = None) -> None:
        """What becomes of the moments."""
        if self.case.sync.get("optimizer_state") == "reset":
            for replica in self.replicas:
                replica.optimizer.state.clear()
            return
        if first or shares is None:
            return
        every = [replica.moments() for replica in self.replicas]
        for key in every[0]:
            due = (round_ + 1) % self.case.sync.get("every_rounds", {}).get(key, 1) == 0
            if policy(self.case, key) == "average" and due:
                for name in every[0][key]:
                    _mean(shares, [of[key][name] for of in every])


def _mean(shares: list[float], same: Any) -> None:
    mean = sum(s * x for s, x in zip(shares, same, strict=True))
    for x in same:
        x.copy_(mean)


class Ours:
    """The same on the ranks of a communicator, from the beginning or from where others have ended."""

    def __init__(
        self,
        comm: Communicator,  # noqa: F811
        case: Case,
        start: list[Any] | None = None,
        rounds: int = 0,
    ) -> None:
        self.comm, self.case = comm, case
        self.model = model(case)
        optim = OptimConfig(**case.optim, groups=GROUPS)
        self.optimizer = make_optimizer(self.model, optim)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        sync = SyncConfig(schedule="warmup", warmup_rounds=WARM, period=K, check_every=1, **case.sync)
        self.parts = SyncParts(self.model, self.optimizer, comm, Config(optim=optim, sync=sync))
        sliced = self.parts.stateful()["sliced"]
        assert isinstance(sliced, SlicedOptimizer)
        self.sliced = sliced
        self.whole = OptimizerState(self.model, self.optimizer, lambda *_: self.parts.optimizer_steps_alone)
        if start is not None:
            self.parts.goes_on(rounds)
            self.parts._resumed = True
            self.model.load_state_dict(start[0]["model"])
            sliced.take(of["sliced"] for of in start)
            self.whole.load_state_dict(copy.deepcopy(start[comm.rank]["whole"]))  # it is used again
        self.step = self.parts.step(Gradients(self.model, Own(), optim))
        self.synchronizer = self.parts.synchronizer()
        self.synchronizer.start()

    def run(self, rounds: range) -> dict[str, Any]:
        for round_ in rounds:
            set_rate(self.optimizer, self.rates, round_)
            done = [self.step(batches_of(self.case, step, self.comm.rank)) for step in steps_of(round_)]
            work = Work(samples=sum(d.samples for d in done), loss_sum=sum(d.loss_sum for d in done))
            self.synchronizer.synchronize(round_, work)
            assert self.synchronizer.drift is None or round_ > WARM
        assert_same_bits(self.comm, self.model)
        state = {"model": self.model.state_dict(), "sliced": self.sliced.state_dict()}
        assert bool(state["sliced"]["offsets"]) is (rounds.stop < WARM)
        return copy.deepcopy({**state, "whole": self.whole.state_dict()})


def assert_close(found: dict[str, Any], replica: Replica) -> None:
    """Parameters, moments and counters of one rank."""
    for name, value in replica.model.state_dict().items():
        assert (found["model"][name] - value).abs().max() < 1e-10, name
    if not found["whole"]:
        return
    for name, p in replica.model.named_parameters():
        for key, value in replica.optimizer.state.get(p, {}).items():
            assert (found["whole"][f"{name}/{key}"] - value).abs().max() < 1e-10, (name, key)


def assert_equal(found: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("model", "whole"):
        assert found[part].keys() == other[part].keys()
        for key, value in found[part].items():
            assert torch.equal(value, other[part][key]), key


@pytest.mark.parametrize("name", CASES)
def test_data_parallel_rounds_and_then_local_sgd_also_resumed(
    comm: Communicator,  # noqa: F811
    pair: Communicator | None,  # noqa: F811
    name: str,
) -> None:
    """At once; interrupted within, at the end of and after the warm-up; and gone on with by two ranks."""
    case = CASES[name]
    assert comm.size == len(COUNTS)
    reference, fewer = Reference(case), {}
    halves = {}
    parts, done = Ours(comm, case), 0
    for stop in STOPS:
        halves[stop] = comm.allgather(parts.run(range(done, stop)))
        reference.run(range(done, stop), comm.size)
        fewer[stop] = copy.deepcopy(reference)
        replica = reference.replicas[comm.rank if stop > WARM else 0]
        if stop != WARM:
            assert_close(halves[stop][comm.rank], replica)
        parts, done = Ours(comm, case, halves[stop], stop), stop
    resumed = parts.run(range(done, ROUNDS))
    reference.run(range(done, ROUNDS), comm.size)
    assert_close(resumed, reference.replicas[comm.rank])
    whole = Ours(comm, case).run(range(ROUNDS))
    assert_close(whole, reference.replicas[comm.rank])
    assert_equal(whole, resumed)
    if pair is not None:
        for stop, of in fewer.items():
            of.run(range(stop, ROUNDS), 2)
            ours = Ours(pair, case, halves[stop], stop).run(range(stop, ROUNDS))
            assert_close(ours, of.replicas[pair.rank])
    comm.barrier()

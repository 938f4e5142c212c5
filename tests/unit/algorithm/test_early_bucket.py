"""Averages of gradients that begin within the backward pass, on ranks that are threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_train.algorithm.early_bucket import early_parameters
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import Work
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import OptimConfig
from hvd_train.errors import RankLost, TaskError
from hvd_train.tasks.base import Batch
from tests.mpi.infinite import Infinite
from tests.threads import ThreadCommunicator, on_ranks
from tests.unit.algorithm.test_gradient_average import (
    Fit,
    Odd,
    Trained,
    _double_precision,  # noqa: F401 (a fixture)
    optim,
    rows,
)

SGD = OptimConfig(lr=0.05, args={"momentum": 0.9, "weight_decay": 0.01})


class Deep(nn.Module):
    """The last layer and the bias of the one before it, which is used twice, have a third of the bytes."""

    def __init__(self, parts: bool = False) -> None:
        super().__init__()
        self.seldom = nn.Parameter(torch.ones(6))
        self.first = nn.Linear(3, 6)
        self.again = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)
        self._parts = parts
        for i, p in enumerate(self.parameters()):  # ranks are threads, which share torch's generator
            p.data = torch.sin(torch.arange(float(p.numel())) + i).view_as(p) / 2

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        for _ in range(2):
            # Each checkpoint of this kind has a backward pass of its own, and adds to the gradient.
            hidden = checkpoint(self.again, hidden, use_reentrant=True) if self._parts else self.again(hidden)
        return self.last(hidden.tanh())


class Faulty(Fit):
    """Gradients of some parameters that are not finite, or that are there on some ranks only."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        loss, samples = super().loss(model, batch)
        for name in batch.keys() & {"first.weight", "last.weight"}:
            loss = loss + Infinite.apply(model.get_parameter(name))
        if "seldom" in batch:
            loss = loss + model.seldom.square().mean()
        return loss, samples


def batches_of(step: int, rank: int, several: bool = False) -> list[Batch]:
    """Steps that differ in what goes wrong, and on which rank."""
    if (step, rank) == (2, 0):
        return []
    found = [rows(step, rank), rows(step + 50, rank + 3)][: 1 + several]
    if (step, rank) == (3, 1):
        found[-1]["x"][0, 0] = math.inf
    if (step, rank) == (7, 2) and several:
        found[-1]["x"] = found[-1]["x"][:0]  # no backward pass for it
    spoiled = {(4, 2): "first.weight", (5, 0): "last.weight", (8, 1): "first.weight", (8, 0): "last.weight"}
    if (step, rank) in spoiled:
        found[-1][spoiled[step, rank]] = torch.ones(())
    if step == 9:
        found[-1]["first.weight"] = torch.ones(())
    if (step + rank) % 4 == 0:
        found[-1]["seldom"] = torch.ones(())
    return found


class Empty(Faulty):
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if not len(batch["x"]):
            return model.first.weight.sum(), 0
        return super().loss(model, batch)


class Run(Trained):
    """Its communicator may average in the background; `calls` has what was called of it in a step."""

    def __init__(
        self, comm: ThreadCommunicator, background: bool, model: nn.Module, config: OptimConfig, *start: Any
    ) -> None:
        comm.averages_in_background = background
        super().__init__(comm, config, model, *start)
        self.step = self.parts.step(Gradients(model, Empty(), config))
        self.calls: list[str] = []
        for name in ("start_average", "average", "allreduce"):
            self.listen(name, getattr(comm, name))

    def listen(self, name: str, call: Callable[..., Any]) -> None:
        def called(*args: Any, **given: Any) -> Any:
            self.calls.append(name)
            return call(*args, **given)

        setattr(self.comm, name, called)

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def twelve_steps(comm: ThreadCommunicator, background: bool, several: bool) -> tuple[Any, ...]:
    run = Run(comm, background, Deep(), optim("AdamW") if several else SGD)
    unhealthy, used = [], []
    for at in range(12):
        done = run.step(batches_of(at, comm.rank, several))
        unhealthy.append(run.synchronizer.synchronize(at, Work(samples=done.samples)).unhealthy)
        used.append(done.samples)
    return run.values(), unhealthy, used


@pytest.mark.parametrize("several", [False, True])
def test_the_result_is_that_of_averages_after_the_backward_pass(several: bool) -> None:
    """Ranks out of rows, not finite in one bucket or in both, all of them not finite, and without some
    gradients."""
    plain, early = (
        on_ranks(3, lambda comm, b=background: twelve_steps(comm, b, several)) for background in (False, True)
    )
    for (expected, *theirs), (found, *ours) in zip(plain, early, strict=True):
        assert ours == theirs
        for name, value in expected.items():
            assert (found[name] - value).abs().max() < 1e-13, name
            assert torch.equal(found[name], early[0][0][name]), "all ranks hold the same bits"
    unhealthy = plain[0][1]
    assert unhealthy == [[], [], [], [1], [2], [0], [], [], [0, 1], [0, 1, 2], [], []]


def test_the_last_layers_are_averaged_before_the_first_has_its_gradient() -> None:
    """Of several batches within the backward pass of the last one."""

    def rank(comm: ThreadCommunicator) -> list[list[str]]:
        run = Run(comm, True, Deep(), SGD)
        run.model.first.weight.register_hook(lambda gradient: run.calls.append("first"))
        seen = []
        for batches in ([rows(0, 0)], [rows(1, 0), rows(2, 0)], []):
            run.calls.clear()
            run.step(batches)
            # An average begins with the agreement on the weights.
            seen.append([call for call in run.calls if call != "allreduce"])
        return seen

    for seen in on_ranks(2, rank):
        assert seen == [
            ["start_average", "first", "average"],
            ["first", "start_average", "first", "average"],
            ["start_average"],
        ]


def test_gradients_that_arrive_in_parts_are_averaged_whole() -> None:
    """Two backward passes give one layer its gradient: the average that began after the first of them is
    made anew."""

    def rank(comm: ThreadCommunicator, background: bool, parts: bool) -> tuple[dict[str, Tensor], list[str]]:
        run = Run(comm, background, Deep(parts), SGD)
        for at in range(3):
            run.calls.clear()
            batch = {"x": rows(at, comm.rank)["x"].requires_grad_()}
            run.step([batch])
        return run.values(), [call for call in run.calls if call != "allreduce"]

    (expected, _), *_ = on_ranks(2, lambda comm: rank(comm, False, False))
    for found, calls in on_ranks(2, lambda comm: rank(comm, True, True)):
        assert calls == ["start_average", "average", "average"]
        for name, value in expected.items():
            assert (found[name] - value).abs().max() < 1e-13, name


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_checkpoint_passes_from_two_buckets_to_one_and_back(name: str, first: bool) -> None:
    config = optim(name)
    whole = on_ranks(3, lambda comm: Trained(comm, config, Odd()).run(range(8)))
    half = on_ranks(3, lambda comm: Run(comm, first, Odd(), config).run(range(4)))

    def second(comm: ThreadCommunicator) -> dict[str, Tensor]:
        run = Run(comm, not first, Odd(), config, half)
        for at in range(4, 8):
            run.step([rows(at, r) for r in range(3) if r % comm.size == comm.rank])
        return run.values()

    for ranks in (2, 3):
        for found in on_ranks(ranks, second):
            for key, value in found.items():
                assert (found[key] - whole[0][0][key]).abs().amax() < 1e-12 if value.numel() else True, key


def test_an_error_within_the_backward_pass_leaves_nothing_pending() -> None:
    """It comes out as it is, nothing has moved, and the next steps are those of a run without it."""

    def rank(comm: ThreadCommunicator, fails: bool) -> dict[str, Tensor]:
        run = Run(comm, True, Deep(), SGD)
        run.step([rows(0, comm.rank)])
        if fails:
            before, error = run.values(), ValueError("backward")

            def fail(gradient: Tensor) -> None:
                assert comm.pending is not None
                raise error

            hook = run.model.first.weight.register_hook(fail)
            with pytest.raises(ValueError, match="backward") as caught:
                run.step([rows(9, comm.rank)])
            assert caught.value is error
            assert comm.pending is None
            hook.remove()
            assert all(torch.equal(value, before[name]) for name, value in run.values().items())
        run.step([rows(1, comm.rank)])
        return run.values()

    for found, expected in zip(*(on_ranks(2, lambda c, f=f: rank(c, f)) for f in (True, False)), strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_without_a_lost_rank_all_is_averaged_at_once_where_that_is_so() -> None:
    """The loss is found when the average begins; the error is not changed by the backward pass."""

    def rank(comm: ThreadCommunicator) -> None:
        run = Run(comm, True, Deep(), SGD)
        run.step([rows(0, 0)])
        before = run.values()
        error = RankLost("rank 1 died")

        def lost(*_: Any, **__: Any) -> None:
            raise error

        comm.start_average = lost  # type: ignore[method-assign, assignment]
        with pytest.raises(RankLost) as caught:
            run.step([rows(1, 0)])
        assert caught.value is error
        left = SoloCommunicator()
        assert run.synchronizer.rebind(left) == (
            "the state of SGD begins anew: that of the lost ranks was on them alone."
        )
        assert all(torch.equal(value, before[name]) for name, value in run.values().items())
        assert not any(p._post_accumulate_grad_hooks for p in run.model.parameters())
        run.step([rows(1, 0)])
        assert not torch.equal(run.model.last.weight, before["last.weight"])

    on_ranks(1, rank)


def test_seconds_within_the_backward_pass_are_those_of_communication() -> None:
    def rank(comm: ThreadCommunicator) -> None:
        run = Run(comm, True, Deep(), SGD)
        start = comm.start_average

        def slow(*args: Any, **given: Any) -> Any:
            time.sleep(0.1)
            return start(*args, **given)

        comm.start_average = slow  # type: ignore[method-assign]
        for batches in ([rows(0, 0)], []):
            began = time.perf_counter()
            done = run.step(batches)
            assert 0.1 <= done.communication_s <= time.perf_counter() - began

    on_ranks(1, rank)


def test_which_parameters_come_first() -> None:
    layers = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9))
    last = {"2.weight", "2.bias"}
    assert early_parameters(layers, OptimConfig()) == last
    assert early_parameters(Deep(), OptimConfig()) == {"last.weight", "last.bias", "again.bias"}
    layers[2].bias.requires_grad_(False)
    assert early_parameters(layers, OptimConfig()) == {"2.weight", "1.bias"}
    assert early_parameters(nn.Linear(20, 2), OptimConfig()) == {"bias"}, "at most all but the first"


def test_where_all_gradients_are_averaged_together() -> None:
    assert not early_parameters(nn.Linear(3, 3, bias=False), OptimConfig())
    assert not early_parameters(nn.Linear(3, 3), OptimConfig(clip_norm=1.0))
    mixed = nn.Linear(3, 3)
    mixed.bias = nn.Parameter(torch.zeros(3, dtype=torch.float32))
    assert not early_parameters(mixed, OptimConfig())
    mixed.bias = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    assert early_parameters(mixed, OptimConfig()) == {"bias"}
    empty = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in (3, 0)])
    assert not early_parameters(empty, OptimConfig()), "nothing to send"
    with pytest.raises(TaskError, match="`weight` has no shape yet"):
        early_parameters(nn.LazyLinear(3), OptimConfig())


def test_hooks_are_there_only_between_hosts() -> None:
    def hooks(comm: ThreadCommunicator, background: bool) -> int:
        run = Run(comm, background, Deep(), SGD)
        parts = [part.early for part in run.parts.flat.buffers]
        assert parts == ([True, False] if background else [False])
        return sum(bool(p._post_accumulate_grad_hooks) for p in run.model.parameters())

    assert on_ranks(2, lambda comm: hooks(comm, False)) == [0, 0]
    assert on_ranks(2, lambda comm: hooks(comm, True)) == [3, 3]

"""The slice step on ranks that are threads: what it moves, what each rank holds, how that is dealt anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.averaging import StateAverage
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.header import Work
from hvd_train.algorithm.outer import Nesterov, OuterRule, SlowMo
from hvd_train.algorithm.outer_step import OuterStep
from hvd_train.algorithm.synchronizer import Synchronizer
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import ConfigError, RunDirectoryError
from tests.threads import ThreadCommunicator, on_ranks


@dataclass(frozen=True, kw_only=True)
class OuterAdam(OuterRule):
    """A third rule: Adam (D. P. Kingma and J. Ba, ICLR 2015) on the outer gradient."""

    name: ClassVar[str] = "adam"
    keeps: ClassVar[tuple[str, ...]] = ("first", "second", "count")
    lr: float = 0.05
    momentum: float = 0.9

    def step(self, x: Tensor, mean: Tensor, kept: Mapping[str, Tensor], lr: float, local_lr: float) -> None:
        """See `OuterRule`."""
        gradient = x - mean
        count = kept["count"].add_(1)
        kept["first"].lerp_(gradient, 1 - self.momentum)
        kept["second"].lerp_(gradient.square(), 1 - 0.999)
        first = kept["first"] / (1 - self.momentum**count)
        second = kept["second"] / (1 - 0.999**count)
        mean.copy_(x - lr * first / (second.sqrt() + 1e-8))


class Odd(nn.Module):
    """Parameters of two types, one of them in columns, one twice; batch norm; a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.head = nn.Linear(5, 7)
        self.head.weight = nn.Parameter(torch.zeros(5, 7).t())
        self.twin = nn.Linear(5, 7, bias=False)
        self.twin.weight = self.head.weight
        generator = torch.Generator().manual_seed(5)
        for p in self.parameters():
            if p.requires_grad:
                p.detach().normal_(0.5, 0.5, generator=generator)


def disturb(module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, round_: int) -> None:
    """What local steps do: each rank, round and tensor is moved otherwise; the optimizer's state too."""
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    tensors = [p.data for p in module.parameters() if p.requires_grad]
    tensors += [b for b in module.buffers() if b.is_floating_point()]
    tensors += [s["momentum_buffer"] for s in optimizer.state.values()]
    for tensor in tensors:
        tensor.add_(torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, 0.1, generator=generator))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def run(
    comm: ThreadCommunicator | SoloCommunicator, rounds: range, start: Any = None, **options: Any
) -> dict[str, Any]:
    """Some rounds of a run, of its own or going on; what is there at the end."""
    module = Odd()
    optimizer = sgd(module)
    if start is not None:
        module.load_state_dict(start[0]["model"])
        optimizer.load_state_dict(copy.deepcopy(start[0]["optimizer"]))  # its tensors are not copied
        options["resume"] = [of["averager"] for of in start]
    averager = Averager(module, optimizer, comm, period=1, **options)
    for round_ in rounds:
        disturb(module, optimizer, comm.rank, round_)
        averager.step(comm.rank + 1)
    held = {
        "model": {n: t.clone() for n, t in module.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "averager": averager.state_dict(),
    }
    # Copies: the live ones are views, which the next run of this test would not see.
    held["averager"]["outer"] = {
        k: v.clone() if torch.is_tensor(v) else v for k, v in held["averager"]["outer"].items()
    }
    return held


def plain(ranks: int, rounds: int) -> dict[str, Tensor]:
    return on_ranks(ranks, lambda comm: run(comm, range(rounds)))[0]["model"]


RULES: list[Callable[[], OuterRule]] = [SlowMo, Nesterov, OuterAdam]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_parameters_alone_move_by_the_rule(ranks: int, rule: Callable[[], OuterRule]) -> None:
    """Against the rule on whole tensors, of the means that a plain average gives in the first round."""
    found = on_ranks(ranks, lambda comm: run(comm, range(1), outer=rule()))
    means, before = plain(ranks, 1), Odd().state_dict()
    trained = {n for n, p in Odd().named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, mean in means.items():
        expected = mean
        if name in trained:
            kept = {k: torch.zeros_like(mean) for k in rule().keeps}
            expected = mean.clone()
            rule().step(before[name], expected, kept, rule().lr_at(0), 0.1)
        for rank in found:
            torch.testing.assert_close(rank["model"][name], expected, rtol=1e-6, atol=1e-7)
    moments = [of["optimizer"]["state"][0]["momentum_buffer"] for of in found]
    assert all(torch.equal(moments[0], m) for m in moments)


def test_a_third_rule_is_thirty_lines() -> None:
    """And agrees with torch's Adam."""
    x = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    oracle, rule = torch.optim.Adam([x], lr=0.05, eps=1e-8), OuterAdam()
    here, kept = x.detach().clone(), {k: torch.zeros(9, dtype=torch.float64) for k in rule.keeps}
    for step in range(10):
        x.grad = torch.sin(torch.arange(9, dtype=torch.float64) + step)
        mean = here - x.grad
        rule.step(here, mean, kept, rule.lr_at(step), 0.1)
        here = mean
        oracle.step()
        torch.testing.assert_close(here, x.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"outer": SlowMo()}, {"outer": Nesterov(), "clip": 0.0}, {"outer": OuterAdam()}]
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_resumed_run_goes_on_to_the_bit(ranks: int, options: dict[str, Any]) -> None:
    whole = on_ranks(ranks, lambda comm: run(comm, range(8), **options))
    half = on_ranks(ranks, lambda comm: run(comm, range(4), **options))
    resumed = on_ranks(ranks, lambda comm: run(comm, range(4, 8), half, **options))
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a["model"][n], b["model"][n]) for n in a["model"])
        assert a["averager"].keys() == b["averager"].keys()
        assert a["averager"]["rounds"] == b["averager"]["rounds"] == 8
        for name, value in a["averager"]["outer"].items():
            other = b["averager"]["outer"][name]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


def whole_of(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What all ranks keep together, by name: their pieces, in the order of their offsets."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for state in (s["averager"]["outer"] for s in states):
        for key, value in state.items():
            if torch.is_tensor(value):
                pieces.setdefault(key, []).append((state["offsets"][key.partition("/")[2]], value))
    found = {}
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        assert [p[0] for p in parts] == [sum(len(v) for _, v in parts[:i]) for i in range(len(parts))], key
        found[key] = torch.cat([value for _, value in parts])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_what_is_kept_is_dealt_anew_to_any_number_of_ranks(ranks: int) -> None:
    before = on_ranks(3, lambda comm: run(comm, range(4), outer=OuterAdam()))
    after = on_ranks(ranks, lambda comm: run(comm, range(0), before, outer=OuterAdam()))
    expected, found = whole_of(before), whole_of(after)
    assert expected.keys() == found.keys() >= {"first/head.weight", "second/shift", "count/body.1.bias"}
    assert not {name for name in found if "still" in name or "running" in name or "twin" in name}
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {len(value) for name, value in found.items() if name.endswith("head.weight")} == {35}
    assert {of["averager"]["outer"]["steps"] for of in after} == {4}


def test_another_rule_and_another_parameter_begin_anew() -> None:
    before = on_ranks(2, lambda comm: run(comm, range(3), outer=SlowMo()))
    other = on_ranks(2, lambda comm: run(comm, range(0), before, outer=Nesterov()))
    assert {of["averager"]["outer"]["steps"] for of in other} == {0}
    assert all((value == 0).all() for value in whole_of(other).values())
    for of in before:
        del of["averager"]["outer"]["offsets"]["shift"]
    lacking = whole_of(on_ranks(2, lambda comm: run(comm, range(0), before, outer=SlowMo())))
    assert (lacking["slow_momentum/shift"] == 0).all()
    assert (lacking["slow_momentum/head.bias"] != 0).all()


@pytest.mark.parametrize("damage", [torch.zeros(2, 2), torch.zeros(3, dtype=torch.float16), "text"])
def test_a_state_of_another_form_is_refused(damage: object) -> None:
    before = on_ranks(1, lambda comm: run(comm, range(1), outer=Nesterov()))
    before[0]["averager"]["outer"]["momentum/head.bias"] = damage
    expected = r"`momentum/head\.bias` is not what .* has kept: expected a flat tensor of torch\.float32"
    if damage == "text":
        expected = r"unknown field `momentum/head\.bias`"
    with pytest.raises(RunDirectoryError, match=expected):
        run(SoloCommunicator(), range(1), before, outer=Nesterov())


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_rank_holds_one_part_of_the_momentum(ranks: int) -> None:
    """Of the parameters alone, evenly, though the optimizer's state is in the flat state as well."""

    def held(comm: ThreadCommunicator) -> tuple[int, int]:
        model = nn.Linear(2, 1, bias=False)
        model.weight = nn.Parameter(torch.zeros(59))
        flat = FlatState(model, torch.optim.Adam(model.parameters()), comm, parameters_apart=True)
        StateAverage(flat, comm, OuterStep(flat, comm, Nesterov())).start()
        assert flat.numel(Part(torch.float32)) >= 2 * 59
        buffer = flat.buffers[Part(torch.float32, parameters=True)]
        return buffer.kept.num_bytes, buffer.state.numel()  # type: ignore[union-attr]

    sizes = on_ranks(ranks, held)
    assert sum(numel for _, numel in sizes) == 59
    assert max(numel for _, numel in sizes) == -(-59 // ranks)
    assert all(num_bytes == 2 * 4 * numel for num_bytes, numel in sizes), "two slots of float32"


def test_an_average_that_fails_takes_nothing() -> None:
    """After the slice step, say: the run then gives the same bits as one in which nothing failed."""

    def trained(comm: ThreadCommunicator, fails: bool) -> dict[str, Tensor]:
        module = Odd()
        optimizer = sgd(module)
        flat = FlatState(module, optimizer, comm, parameters_apart=True)
        step = OuterStep(flat, comm, Nesterov())
        average = StateAverage(flat, comm, step)
        average.start()
        gather = comm.all_gather

        def broken(owned: Tensor, staged: Tensor) -> None:
            raise RuntimeError("all-gather")

        for round_ in range(4):
            disturb(module, optimizer, comm.rank, round_)
            if fails and round_ == 2:
                comm.all_gather = broken  # type: ignore[method-assign]
                with pytest.raises(RuntimeError, match="all-gather"):
                    average.average(1.0, healthy=True)
                comm.all_gather = gather  # type: ignore[method-assign]
                assert step.steps == 2
            average.average(1.0, healthy=True)
        state = {k: v.clone() for k, v in step.state_dict().items() if torch.is_tensor(v)}
        return {**{n: t.clone() for n, t in module.state_dict().items()}, **state}

    for a, b in zip(
        on_ranks(2, lambda c: trained(c, True)), on_ranks(2, lambda c: trained(c, False)), strict=True
    ):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_round_without_weight_is_no_step() -> None:
    module, comm = nn.Linear(2, 1), SoloCommunicator()
    flat = FlatState(module, sgd(module), comm, parameters_apart=True)
    step = OuterStep(flat, comm, Nesterov())
    average = StateAverage(flat, comm, step)
    average.start()
    for weight in (1.0, 0.0, 1.0):
        with torch.no_grad():
            module.weight.add_(1)
        average.average(weight, healthy=True)
    assert step.steps == 2


def test_clip_shortens_the_change_of_all_parameters_together() -> None:
    """To its 2-norm over all slices; the optimizer's state is not clipped, and a short change is exact."""

    def trained(comm: ThreadCommunicator, clip: float, size: float) -> tuple[Tensor, Tensor]:
        module = nn.Linear(6, 5, bias=False).double()
        nn.init.ones_(module.weight)
        optimizer = sgd(module)
        averager = Averager(module, optimizer, comm, period=1, clip=clip)
        with torch.no_grad():
            module.weight.add_(size * torch.arange(1, 31).view(5, 6) * (comm.rank + 1) / 2)
        moment = optimizer.state[module.weight]["momentum_buffer"].fill_(100.0)
        averager.step(1)
        return module.weight.detach().clone(), moment.clone()

    change = torch.arange(1, 31, dtype=torch.float64).view(5, 6)
    for weight, moment in on_ranks(3, lambda comm: trained(comm, 0.5, 1.0)):
        torch.testing.assert_close(weight, 1 + change * 0.5 / change.norm(), rtol=0, atol=1e-14)
        torch.testing.assert_close(moment, torch.full_like(moment, 100.0))
    long, short = on_ranks(3, lambda c: trained(c, 1e9, 1.0)), on_ranks(3, lambda c: trained(c, 0.0, 1.0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(long, short, strict=True))


def test_clip_needs_parameters_of_one_type() -> None:
    expected = (
        r"sync\.clip = 1\.0: the model has parameters of torch\.float64 and torch\.float32, which are "
        r"averaged one type after the other; expected parameters of one type.*Set sync\.clip = 0\."
    )
    with pytest.raises(ConfigError, match=expected):
        run(SoloCommunicator(), range(1), clip=1.0)
    with pytest.raises(ConfigError, match=r"clip = -1\.0: expected 0 or a positive norm"):
        run(SoloCommunicator(), range(1), clip=-1.0)
    run(SoloCommunicator(), range(1), clip=0.0)


def test_drift_is_that_of_the_ranks_whatever_the_rule_does() -> None:
    """It is measured from the mean, not from where the rule moves."""

    def drifts(comm: ThreadCommunicator, rule: OuterRule | None) -> list[float | None]:
        module = nn.Linear(3, 3).double()
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        optimizer = sgd(module)
        flat = FlatState(module, optimizer, comm, parameters_apart=rule is not None)
        average = StateAverage(flat, comm, OuterStep(flat, comm, rule))
        synchronizer = Synchronizer(average, comm, check_every=1)
        synchronizer.start()
        found = []
        for round_ in range(4):
            disturb(module, optimizer, comm.rank, round_)
            synchronizer.synchronize(round_, Work(samples=comm.rank + 1))
            found.append(synchronizer.drift)
        return found

    with_rule = on_ranks(3, lambda comm: drifts(comm, SlowMo()))[0]
    without = on_ranks(3, lambda comm: drifts(comm, None))[0]
    assert with_rule[0] is None
    assert with_rule[1:] == pytest.approx(without[1:], rel=1e-9)


def test_the_names_are_public() -> None:
    assert (hvd_train.SlowMo, hvd_train.Nesterov, hvd_train.OuterRule) == (SlowMo, Nesterov, OuterRule)

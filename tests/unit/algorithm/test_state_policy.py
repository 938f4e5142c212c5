"""Which state is averaged, and when: what is laid out, what is refused, what becomes of the rest. One rank;
several are in tests/mpi/suite_states.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.averaging import StateAverage
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.state_policy import StatePolicy
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import SyncConfig
from hvd_train.errors import ConfigError
from tests.threads import ThreadCommunicator, on_ranks

F32 = torch.float32


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def adam(model: nn.Module, **args: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **args)


def flat(model: nn.Module, optimizer: torch.optim.Optimizer, **policy: Any) -> FlatState:
    state = FlatState(model, optimizer, SoloCommunicator(), **policy)
    state.place()
    return state


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()


def test_every_period_has_a_buffer_of_its_own() -> None:
    model = network()
    every = {"exp_avg": 3, "exp_avg_sq": 6, "buffers": 3}
    state = flat(model, adam(model), every_rounds=every, parameters_apart=True)
    assert state.parts == [Part(F32, True), Part(F32, every=3), Part(F32, every=6)]
    names = {part: [e.name for e in state.entries if e.part == part] for part in state.parts}
    assert names[state.parts[0]] == [name for name, _ in model.named_parameters()]
    assert names[state.parts[1]][:2] == ["1.running_mean", "1.running_var"]
    assert {name.rpartition("/")[2] for name in names[state.parts[1]][2:]} == {"exp_avg"}
    assert {name.rpartition("/")[2] for name in names[state.parts[2]]} == {"exp_avg_sq"}
    assert state.moments() == {}
    assert state.own_buffers().keys() == {"1.running_mean", "1.running_var"}
    assert "0.weight/exp_avg torch.float32 (4, 3) (3, 1) at 32, every 3 rounds" in state.layout()


def test_a_period_of_one_is_the_default() -> None:
    a, b = network(), network()
    plain = flat(a, adam(a))
    same = flat(b, adam(b), every_rounds={"exp_avg": 1, "buffers": 1}, moments={"exp_avg_sq": "average"})
    assert plain.layout() == same.layout()
    assert plain.parts == same.parts == [Part(F32)]


@pytest.mark.parametrize(
    ("policy", "own"),
    [
        ({"batch_norm": "keep"}, ["1.running_mean", "1.running_var"]),
        ({"every_rounds": {"buffers": 2}}, ["1.running_mean", "1.running_var"]),
        ({}, []),
    ],
)
def test_own_buffers_are_those_that_not_every_round_averages(policy: Any, own: list[str]) -> None:
    model = network()
    model.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
    assert list(flat(model, adam(model), **policy).own_buffers()) == own


def test_a_part_is_due_in_every_nth_round() -> None:
    due = [rounds + 1 for rounds in range(12) if Part(F32, every=3).is_due(rounds)]
    assert due == [3, 6, 9, 12]


def test_only_what_is_due_is_averaged_and_hashed() -> None:
    model = network()
    optimizer = adam(model)
    state = FlatState(model, optimizer, SoloCommunicator(), every_rounds={"exp_avg": 2, "buffers": 3})
    average = StateAverage(state, SoloCommunicator())
    average.start()
    versions = []
    for rounds in range(6):
        average.average(1.0, healthy=True, rounds=rounds)
        versions.append([buffer.version for buffer in state.buffers.values()])
    assert versions == [[2, 1, 1], [3, 2, 1], [4, 2, 2], [5, 3, 2], [6, 3, 2], [7, 4, 3]]
    average.average(1.0, healthy=True)
    assert [buffer.version for buffer in state.buffers.values()] == [8, 5, 4]
    average.average(1.0, healthy=True, rounds=6)
    first = average.inspect(distance=False, verify=True).hash
    optimizer.state[model[0].weight]["exp_avg"].fill_(9.0)
    average.average(1.0, healthy=True, rounds=6)
    assert average.inspect(distance=False, verify=True).hash == first


@pytest.mark.parametrize("distance", [False, True])
@pytest.mark.parametrize("state", ["exp_avg", "buffer"])
def test_state_that_is_not_due_is_inspected_all_the_same(distance: bool, state: str) -> None:
    """A distance counts what is averaged in every round, but all of it must be finite."""
    model = network()
    optimizer = adam(model)
    every = {"exp_avg": 4, "buffers": 3}
    average = StateAverage(
        FlatState(model, optimizer, SoloCommunicator(), every_rounds=every), SoloCommunicator()
    )
    average.start()
    values = optimizer.state[model[2].bias]["exp_avg"] if state == "exp_avg" else model[1].running_var
    values.fill_(2.0)
    found = average.inspect(distance=distance, verify=False)
    assert (found.finite, found.distance) == (True, 0.0 if distance else -1.0)
    values[1] = float("nan")
    assert not average.inspect(distance=distance, verify=False).finite


def test_a_resumed_start_keeps_what_is_each_ranks_own() -> None:
    """Here the only rank: what counts is that live differs from the anchor only there."""
    model = network()
    optimizer = adam(model)
    step(model, optimizer)
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    state = FlatState(model, optimizer, SoloCommunicator(), every_rounds={"exp_avg": 2})
    StateAverage(state, SoloCommunicator(), resumed=True).start()
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], before)
    assert state.buffers[Part(F32, every=2)].version == 1


def test_single_moments_are_reset_and_kept() -> None:
    """Those that are averaged stay, and so do the counters. On a rank that was not finite all begin anew."""
    model = network()
    optimizer = adam(model, amsgrad=True)
    moments = {"exp_avg": "reset", "exp_avg_sq": "keep"}
    state = flat(model, optimizer, moments=moments)
    assert {e.name.rpartition("/")[2] for e in state.entries if e.kind == "moment"} == {"max_exp_avg_sq"}
    for healthy in (True, False):
        step(model, optimizer)
        kept = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
        state.after_average(healthy)
        now = optimizer.state[model[0].weight]
        assert not now["exp_avg"].any()
        for key in ("exp_avg_sq", "max_exp_avg_sq", "step"):
            assert torch.equal(now[key], kept[key] if healthy else torch.zeros_like(kept[key]))
    state.check_views()


def test_a_reset_moment_begins_as_the_optimizer_has_it() -> None:
    """Rprop's step sizes begin with the learning rate, also where the optimizer's state was loaded."""
    model = network()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.25)
    for _ in range(3):
        step(model, optimizer)
    state = flat(model, optimizer, moments={"step_size": "reset"})
    assert optimizer.state[model[0].weight]["step_size"].unique().numel() > 1
    state.after_average(healthy=True)
    assert torch.equal(optimizer.state[model[0].weight]["step_size"], torch.full((4, 3), 0.25))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"moments": {"exp_average": "keep"}},
            "sync.moments.exp_average = 'keep': expected the name of a moment: AdamW keeps exp_avg, "
            "exp_avg_sq.",
        ),
        (
            {"every_rounds": {"momentum_buffer": 3}},
            "sync.every_rounds.momentum_buffer = 3: expected 'buffers', or the name of a moment: AdamW keeps "
            "exp_avg, exp_avg_sq.",
        ),
        (
            {"every_rounds": {"exp_avg": 3}, "optimizer_state": "keep"},
            "sync.every_rounds.exp_avg = 3: exp_avg is not averaged, its policy is 'keep'; expected a moment "
            "with the policy 'average'. Leave it out, or set sync.moments.exp_avg = 'average'.",
        ),
        (
            {"moments": {"exp_avg": "mean"}},
            "sync.moments.exp_avg = 'mean': expected one of 'average', 'keep', 'reset'.",
        ),
        ({"every_rounds": {"exp_avg": 0}}, "sync.every_rounds.exp_avg = 0: expected at least 1 round."),
    ],
)
def test_what_cannot_be_is_refused(policy: Any, message: str) -> None:
    model = network()
    with pytest.raises(ConfigError) as caught:
        Averager(model, adam(model), SoloCommunicator(), **policy)
    assert str(caught.value) == message


def test_an_optimizer_without_moments_says_so() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"SGD keeps no moments with these arguments\.$"):
        FlatState(model, sgd, SoloCommunicator(), moments={"momentum_buffer": "keep"})


def test_the_remedies_work() -> None:
    model = network()
    policy: Any = {
        "optimizer_state": "keep",
        "every_rounds": {"exp_avg": 3},
        "moments": {"exp_avg": "average"},
    }
    assert flat(model, adam(model), **policy).parts == [Part(F32), Part(F32, every=3)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mode": "none", "moments": {"exp_avg": "keep"}},
            "sync.moments = {'exp_avg': 'keep'}: expected it not to be given with sync.mode = 'none', which "
            "has no averages.",
        ),
        (
            {"mode": "none", "every_rounds": {"buffers": 2}},
            "sync.every_rounds = {'buffers': 2}: expected it not to be given with sync.mode = 'none', which "
            "has no averages.",
        ),
        (
            {"batch_norm": "keep", "every_rounds": {"buffers": 2}},
            "sync.batch_norm = 'keep': expected 'average' with a period of buffers in sync.every_rounds.",
        ),
        (
            {"moments": {"exp_avg": "mean"}},
            "sync.moments.exp_avg = 'mean': expected one of 'average', 'keep', 'reset'.",
        ),
        ({"every_rounds": {"buffers": 0}}, "sync.every_rounds.buffers = 0: expected at least 1 round."),
    ],
)
def test_a_configuration_is_checked(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SyncConfig(**values)
    assert str(caught.value) == message


def test_without_moments_of_its_own_the_state_is_left_to_the_first_step() -> None:
    """So that optimizers that cannot step on a copy can be used with `keep`."""
    assert StatePolicy(optimizer_state="keep", every_rounds={"buffers": 2}).tells_moments_apart is False
    assert StatePolicy(optimizer_state="reset", moments={"exp_avg": "average"}).tells_moments_apart is True


@pytest.mark.parametrize(
    ("policy", "is_said"),
    [
        ({}, False),
        ({"optimizer_state": "keep"}, False),
        ({"moments": {"exp_avg": "keep"}}, False),
        ({"every_rounds": {"exp_avg": 6, "exp_avg_sq": 6}}, False),
        ({"every_rounds": {"exp_avg": 6, "exp_avg_sq": 3}}, False),
        ({"every_rounds": {"exp_avg": 3, "exp_avg_sq": 6}}, True),
        ({"every_rounds": {"exp_avg": 3, "exp_avg_sq": 2}}, True),
        ({"every_rounds": {"exp_avg_sq": 2}}, True),
        ({"moments": {"exp_avg_sq": "keep"}}, True),
        ({"moments": {"exp_avg_sq": "reset"}}, True),
    ],
)
def test_second_moments_that_are_not_averaged_with_the_first_are_named(policy: Any, is_said: bool) -> None:
    model = network()
    said = FlatState(model, adam(model), SoloCommunicator(), **policy).remark()
    assert said.startswith("exp_avg is averaged in rounds in which exp_avg_sq is not. ") is is_said
    assert bool(said) is is_said
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert FlatState(model, sgd, SoloCommunicator(), every_rounds={"momentum_buffer": 3}).remark() == ""


def _longest_step(comm: ThreadCommunicator, every_rounds: dict[str, int]) -> float:
    """Of 12 rounds of one step, in learning rates; rank 0 has no gradient of the second weight."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = adam(model, lr=1e-6)
    state = FlatState(model, optimizer, comm, every_rounds=every_rounds)
    average = StateAverage(state, comm)
    average.start()
    longest = 0.0
    for rounds in range(12):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.tensor([[1.0, float(comm.rank)]])).sum().backward()
        optimizer.step()
        longest = max(longest, float((model.weight - before).detach().abs().max()) / 1e-6)
        average.average(1.0, healthy=True, rounds=rounds)
    return longest


@pytest.mark.parametrize(("first", "second"), [(6, 6), (6, 3), (1, 1)])
def test_second_moments_averaged_with_the_first_keep_steps_short(first: int, second: int) -> None:
    """What the remark says of other periods, and what it recommends."""
    steps = on_ranks(2, lambda comm: _longest_step(comm, {"exp_avg": first, "exp_avg_sq": second}))
    assert max(steps) < 10


def test_second_moments_that_are_0_beside_averaged_first_ones_make_long_steps() -> None:
    zero, other = on_ranks(2, lambda comm: _longest_step(comm, {"exp_avg": 3, "exp_avg_sq": 6}))
    assert zero > 1e5
    assert other < 10


def test_rebind_goes_back_to_the_last_average_of_each_period() -> None:
    model = network()
    optimizer = adam(model)
    state = FlatState(model, optimizer, SoloCommunicator(), every_rounds={"exp_avg": 3})
    average = StateAverage(state, SoloCommunicator())
    average.start()
    for rounds in range(4):
        step(model, optimizer)
        average.average(1.0, healthy=True, rounds=rounds)
        if rounds == 2:
            moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    weight = model[0].weight.detach().clone()
    step(model, optimizer)
    state.rebind(SoloCommunicator())
    assert [b.version for b in state.buffers.values()] == [5, 2]
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moment)
    state.check_views()

"""The flat state: what lies where, what is refused, what is noticed. One rank; several are in tests/mpi."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm.flat_state import ALIGNMENT, FlatState, Part
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import CommunicationError, TaskError, ViewReplaced


def sgd(model: nn.Module, **args: Any) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, **args)


def flat(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **policy: Any) -> FlatState:
    state = FlatState(model, optimizer or sgd(model), SoloCommunicator(), **policy)
    state.place()
    return state


class Mixed(nn.Module):
    """Two types, tied weights, batch norm, frozen parameters, an integer buffer, a scalar, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(5)
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.scalar = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.empty = nn.Parameter(torch.zeros(0, 3))


def test_values_and_identity_of_the_parameters_stay() -> None:
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    identities = [id(p) for p in model.parameters()]
    flat(model)
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.second.weight is model.first.weight
    assert model.convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_every_tensor_is_a_view_on_a_boundary_and_none_overlap() -> None:
    model = Mixed()
    state = flat(model)
    taken: dict[torch.dtype, list[tuple[int, int]]] = {}
    for entry in state.entries:
        assert entry.start * entry.dtype.itemsize % ALIGNMENT == 0
        live = state.buffers[entry.part].live
        if entry.holder.numel():
            assert entry.holder.data_ptr() == live.data_ptr() + entry.start * entry.dtype.itemsize
        taken.setdefault(entry.dtype, []).append((entry.start, entry.start + entry.holder.numel()))
    for dtype, places in taken.items():
        different = sorted(set(places))
        assert all(a[1] <= b[0] for a, b in pairwise(different))
        assert different[-1][1] == state.buffers[Part(dtype)].numel
    assert [b.dtype for b in list(state.buffers.values())] == [torch.float64, torch.float32]
    assert state.num_bytes == sum(b.live.nbytes for b in list(state.buffers.values()))


def test_what_is_averaged_and_what_is_taken_from_rank_0() -> None:
    state = flat(Mixed())
    names = {(e.name, e.kind) for e in state.entries}
    assert ("norm.running_mean", "buffer") in names
    assert ("first.weight/momentum_buffer", "moment") in names
    assert not any(name.startswith("frozen") for name, _ in names)
    assert {name for name, _ in state.frozen()} == {
        "frozen.weight",
        "frozen.bias",
        "norm.num_batches_tracked",
    }
    assert len({e.start for e in state.entries if e.name in ("first.weight", "second.weight")}) == 1
    moments = [e.name for e in state.entries if e.kind == "moment"]
    assert len(moments) == len(set(moments)) == len(list(Mixed().parameters())) - 2
    assert state.moments().keys() == set(moments)


def test_policies_leave_out_their_kind_of_state() -> None:
    kept = flat(Mixed(), optimizer_state="keep", batch_norm="keep")
    assert {e.kind for e in kept.entries} == {"parameter"}
    assert kept.moments() == {}
    assert not kept.optimizer.state, "nothing is created that is not laid out"


def test_writing_to_the_buffer_writes_to_the_model() -> None:
    model = nn.Linear(3, 2)
    state = flat(model)
    state.buffers[Part(torch.float32)].live.fill_(7)
    assert torch.equal(model.weight.detach(), torch.full((2, 3), 7.0))
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 2), 28.0))


def test_training_on_the_views_is_training() -> None:
    """A model that was laid out takes the same steps as one that was not."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in (ours, theirs)]
    flat(ours, optimizers[0])
    inputs = torch.randn(16, 4)
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_parameter_that_is_not_dense_is_laid_out_contiguously() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).t()[::2])
    values = model.weight.detach().clone()
    state = flat(model)
    assert torch.equal(model.weight.detach(), values)
    assert model.weight.is_contiguous()
    state.check_views()


def test_tensors_that_overlap_in_part_are_refused() -> None:
    model = nn.Module()
    base = torch.zeros(10)
    model.a, model.b = nn.Parameter(base[:6]), nn.Parameter(base[4:])
    with pytest.raises(TaskError, match="`b` and `a` overlap in memory"):
        flat(model)


def test_one_memory_under_two_parameter_objects_stays_one() -> None:
    model = nn.Module()
    base = torch.arange(6.0)
    model.a, model.b = nn.Parameter(base), nn.Parameter(base)
    flat(model, optimizer_state="keep")
    with torch.no_grad():
        model.a[0] = 9
    assert model.b[0] == 9


def test_what_cannot_be_averaged_is_refused_with_its_name() -> None:
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(3).to(torch.float8_e5m2))
    with pytest.raises(TaskError, match=r"parameter `phase` is of dtype torch\.float8_e5m2; expected"):
        flat(model)
    model.phase = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TaskError, match=r"parameter `phase` is of layout torch\.sparse_coo"):
        flat(model)
    with pytest.raises(TaskError, match="parameter `weight` has no shape yet: its module is lazy"):
        flat(nn.LazyLinear(3))
    elsewhere = nn.Linear(2, 2, device="meta")
    with pytest.raises(TaskError, match="parameter `weight` is on meta; expected cpu"):
        flat(elsewhere)


def assign(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replace_parameter(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.first.bias = nn.Parameter(model.first.bias.detach())  # the same memory, but nobody trains it


def widen_buffer(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.norm.running_mean = torch.zeros(5, dtype=torch.float64)


def enlarge_buffer(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.norm.running_mean = torch.zeros(6)


def remove_buffer(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.norm.running_mean = None


def add_parameter(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.late = nn.Parameter(torch.zeros(2))


def replace_data(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.first.bias.data = model.first.bias.data.clone()


def change_type(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.norm.to(torch.float64)


def change_format(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.convolution.to(memory_format=torch.contiguous_format)


def unfreeze(model: Mixed, _: torch.optim.Optimizer) -> None:
    model.frozen.bias.requires_grad_(True)


def load_optimizer(_: Mixed, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (assign, r"parameter `scalar` is no longer in the flat state: .*assign=True"),
        (replace_parameter, r"parameter `first\.bias` is no longer in the flat state"),
        (widen_buffer, r"buffer `norm\.running_mean` is no longer in the flat state"),
        (enlarge_buffer, r"buffer `norm\.running_mean` is no longer in the flat state"),
        (remove_buffer, r"buffer `norm\.running_mean` is no longer in the flat state"),
        (replace_data, r"parameter `first\.bias` is no longer in the flat state"),
        (change_type, r"`norm\.weight` is no longer in"),
        (change_format, r"`convolution\.weight` is no longer in"),
        (unfreeze, r"parameter `frozen\.bias` was unfrozen after"),
        (add_parameter, r"parameter `late` appeared after"),
        (load_optimizer, r"optimizer state `.*/momentum_buffer` was replaced"),
    ],
)
def test_a_moved_tensor_is_named(change: Any, message: str) -> None:
    model = Mixed()
    optimizer = sgd(model)
    state = flat(model, optimizer)
    state.check_views()
    change(model, optimizer)
    with pytest.raises(ViewReplaced, match=message):
        state.check_views()


def test_changes_in_place_are_not_replacements() -> None:
    model = Mixed()
    state = flat(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        model.first.weight.mul_(2)
    state.check_views()


def test_a_buffer_that_the_model_assigns_anew_is_averaged() -> None:
    model = Mixed()
    state = flat(model)
    held = model.norm.running_mean
    for step in range(2):
        model.norm.running_mean = 0.5 * model.norm.running_mean + step + 1
        state.check_views()
        assert model.norm.running_mean is held
        (entry,) = (e for e in state.entries if e.name == "norm.running_mean")
        live = state.buffers[Part(torch.float32)].live[entry.start : entry.start + 5]
        assert torch.equal(live, torch.full((5,), (1.0, 2.5)[step]))


def test_a_parameter_may_be_frozen_and_thawed() -> None:
    model = Mixed()
    state = flat(model)
    for flag in (False, True):
        model.first.bias.requires_grad_(flag)
        state.check_views()


def test_complex_numbers_lie_in_the_buffer_of_their_real_type() -> None:
    model = nn.Module()
    model.phase = nn.Parameter(torch.tensor([[1 + 2j, 3 + 4j]], dtype=torch.complex64).t())
    model.real = nn.Parameter(torch.ones(3))
    model.register_buffer("mean", torch.tensor([5 + 6j], dtype=torch.complex128))
    identity = model.phase
    state = flat(model)
    assert {d.dtype: b.numel for d, b in state.buffers.items()} == {
        torch.float64: 2,
        torch.float32: 3 * 16 + 3,
    }
    state.buffers[Part(torch.float32)].live[:4] *= 10
    assert model.phase is identity
    assert model.phase.flatten().tolist() == [10 + 20j, 30 + 40j]
    assert model.mean.tolist() == [5 + 6j]
    assert state.moments()["phase/momentum_buffer"].dtype is torch.complex64
    state.check_views()
    model.phase.data = model.phase.data.clone()
    with pytest.raises(ViewReplaced, match="parameter `phase` is no longer in"):
        state.check_views()


def test_buffers_that_cannot_be_averaged_are_taken_from_rank_0() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    model.register_buffer("small", torch.ones(3).to(torch.float8_e5m2))
    state = flat(model)
    assert [name for name, _ in state.frozen()] == ["graph", "small"]
    assert state.layout()[-1] == "small torch.float8_e5m2 (3,) of rank 0"


@pytest.mark.parametrize(
    ("policy", "healthy", "forgets"),
    [
        ("reset", True, True),
        ("reset", False, True),
        ("keep", True, False),
        ("keep", False, True),
        ("average", False, False),
    ],
)
def test_cases_in_which_optimizer_state_is_cleared(policy: Any, healthy: bool, forgets: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    state = flat(model, optimizer, optimizer_state=policy)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state.after_average(healthy)
    assert (not optimizer.state) is forgets
    optimizer.step()  # an optimizer goes on without its state


def test_the_layout_is_a_function_of_the_model_alone() -> None:
    assert flat(Mixed()).layout() == flat(Mixed()).layout()
    assert flat(nn.Linear(3, 2)).layout() != flat(nn.Linear(2, 3)).layout()
    assert flat(nn.Linear(3, 2)).layout()[0] == "weight torch.float32 (2, 3) (3, 1) at 0"
    assert flat(nn.Linear(3, 2)).layout()[1] == "bias torch.float32 (2,) (1,) at 16"


def test_a_loaded_optimizer_keeps_its_moments() -> None:
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before: Tensor = optimizer.state[model.weight]["momentum_buffer"].clone()
    state = flat(model, optimizer)
    assert torch.equal(state.moments()["weight/momentum_buffer"], before)
    assert before.abs().sum() > 0


def test_rebind_goes_back_to_the_newest_average_that_all_buffers_have() -> None:
    model = Mixed()
    state = flat(model)
    comm = SoloCommunicator()
    for buffer in state.buffers.values():
        comm.average(buffer, 1.0)
    averaged = {name: p.clone() for name, p in model.named_parameters()}
    identities = [id(p) for p in model.parameters()]
    # A rank is lost between the averages of the two types: one of them is a round ahead.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    comm.average(state.buffers[Part(torch.float32)], 1.0)
    assert [b.version for b in state.buffers.values()] == [1, 2]
    state.rebind(SoloCommunicator())
    assert [b.version for b in state.buffers.values()] == [1, 1]
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(p, averaged[name]) for name, p in model.named_parameters() if p.requires_grad)
    state.check_views()


def test_rebind_where_parameters_are_averaged_in_every_step() -> None:
    """They are many averages ahead of the buffers, which have a number of their own."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = flat(model, parameters_apart=True)
    comm = SoloCommunicator()
    for buffer in state.buffers.values():
        comm.average(buffer, 1.0)
    parameters = Part(torch.float32, parameters=True)
    for _ in range(4):
        with torch.no_grad():
            model[0].weight.add_(1)
        comm.average(state.buffers[parameters], 1.0)
    averaged = model[0].weight.clone()
    with pytest.raises(CommunicationError, match=r"newest of each buffer are \[5, 1\]"):
        state.rebind(comm)
    state.rebind(comm, in_every_step=True)
    assert [b.version for b in state.buffers.values()] == [5, 1]
    assert torch.equal(model[0].weight, averaged)


def test_rebind_without_a_complete_average_is_an_error() -> None:
    state = flat(nn.Linear(2, 2))
    with pytest.raises(CommunicationError, match=r"newest of each buffer are \[0\]"):
        state.rebind(SoloCommunicator())

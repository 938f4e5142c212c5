"""What a file holds of a model: the names that the task gave, and values that come back as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_train.errors import TaskError
from hvd_train.run.model_state import load_state, saved_state, unwrapped


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def partly(module: nn.Module) -> nn.Module:
    assert isinstance(module, nn.Sequential)
    module[2] = compiled(module[2])
    return module


def twice(module: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(partly(module)))


WRAPPERS = [compiled, partly, nn.DataParallel, twice]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_leave_no_name_in_the_file(wrap: Any) -> None:
    plain, wrapped = mlp(), wrap(mlp())
    assert saved_state(wrapped)[0].keys() == plain.state_dict().keys()
    load_state(plain, saved_state(wrapped)[0])
    for key, value in saved_state(wrapped)[0].items():
        assert torch.equal(plain.state_dict()[key], value)
    other = wrap(mlp())
    load_state(other, saved_state(plain)[0])
    assert all(map(torch.equal, saved_state(other)[0].values(), plain.state_dict().values()))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_file_with_the_names_of_wrappers_is_read(wrap: Any) -> None:
    """Earlier versions wrote them."""
    wrapped, other = wrap(mlp()), wrap(mlp())
    old = wrapped.state_dict()
    load_state(other, old)
    assert all(map(torch.equal, other.state_dict().values(), old.values()))
    if wrap in (compiled, partly):
        plain = mlp()
        load_state(plain, old)
        assert all(map(torch.equal, plain.state_dict().values(), old.values()))


def test_a_module_beside_its_compiled_form_keeps_its_name() -> None:
    model = nn.Module()
    model.net = nn.Linear(2, 2)
    model.fast = compiled(model.net)
    assert list(saved_state(model)[0]) == ["net.weight", "net.bias", "fast.weight", "fast.bias"]


class Keeper(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"a": [1, 2.5, None, True, "x"], "b": {}}, "text", None, 7])
def test_plain_extra_state_is_saved(extra: Any) -> None:
    tensors, plain = saved_state(nn.Sequential(Keeper(extra)))
    assert plain == {"0._extra_state": extra}
    other = nn.Sequential(Keeper("other"))
    load_state(other, {**tensors, **plain})
    assert other[0].extra == extra


def test_extra_state_may_be_a_tensor() -> None:
    tensors, plain = saved_state(Keeper(torch.arange(3)))
    assert plain == {}
    assert torch.equal(tensors["_extra_state"], torch.arange(3))


@pytest.mark.parametrize("extra", [{1: 2}, (1, 2), {"a": {1}}, b"x", {"t": torch.ones(2)}, [object()]])
def test_other_extra_state_is_refused_with_its_name(extra: Any) -> None:
    with pytest.raises(TaskError, match=r"the model's state `0\._extra_state` is .* cannot be saved"):
        saved_state(nn.Sequential(Keeper(extra)))


def buffered(value: Tensor, **how: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("w", value, **how)
    return model


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors_come_back(dtype: torch.dtype) -> None:
    value = torch.complex(torch.arange(6.0), -torch.arange(6.0)).to(dtype).reshape(2, 3)
    tensors, _ = saved_state(buffered(value))
    other = buffered(torch.zeros_like(value))
    load_state(other, tensors)
    assert other.w.dtype is dtype
    assert torch.equal(other.w, value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.eye(2).to_sparse(), r"of layout torch\.sparse_coo"),
        (torch.eye(2).to_sparse_csr(), r"of layout torch\.sparse_csr"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r"quantized \(torch\.qint8\)"),
        (torch.empty(2, device="meta"), "on meta"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_name(value: Tensor, words: str) -> None:
    with pytest.raises(TaskError, match=f"the model's state `w` is {words}"):
        saved_state(buffered(value))
    assert "w" not in saved_state(buffered(value, persistent=False))[0]


def test_an_expanded_buffer_is_loaded() -> None:
    tensors, _ = saved_state(buffered(torch.arange(3).expand(2, 3)))
    other = buffered(torch.zeros(3, dtype=torch.long).expand(2, 3))
    load_state(other, tensors)
    assert other.w.tolist() == [[0, 1, 2]] * 2


def test_a_lazy_model_takes_its_shapes_from_the_file() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    whole = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_state(lazy, saved_state(whole)[0])
    inputs = torch.rand(5, 3)
    assert torch.equal(lazy.eval()(inputs), whole.eval()(inputs))


def test_another_model_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        load_state(nn.Linear(2, 3), saved_state(nn.Linear(2, 2))[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        load_state(mlp(), saved_state(nn.Linear(2, 2))[0])


def test_wrappers_come_off_a_model_and_off_modules_in_it() -> None:
    inner, in_place = nn.Linear(3, 3), nn.Linear(3, 3)
    in_place.compile(backend="eager")
    compiled = torch.compile(inner, backend="eager")
    model = nn.Sequential(nn.DataParallel(nn.Sequential(compiled)), in_place)
    plain = unwrapped(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert plain is model
    assert [type(module) for module in plain.modules()] == [
        nn.Sequential,
        nn.Sequential,
        nn.Linear,
        nn.Linear,
    ]
    assert plain[0][0] is inner  # type: ignore[index]
    assert in_place._compiled_call_impl is None

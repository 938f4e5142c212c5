"""Creates an optimizer's state before its first step, so that it can be laid out, averaged and loaded.

torch's optimizers create their state inside the first step. A rank that is out of data would then have
none, and ranks could not agree on a layout. So one step is run on a scratch copy of the parameters, all
zeros with gradients of zero, and the state that appears is used: moments of zeros are their initial values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvd_train.errors import RunDirectoryError, TaskError
from hvd_train.run.model_state import finder, plain_names

_INITIAL_COUNTERS = {"step": 0.0, "mu_product": 1.0, "mu": 1.0}
"""Counters before the first step. One more, ASGD's `eta`, begins as the learning rate."""
COUNTERS = frozenset((*_INITIAL_COUNTERS, "eta"))
"""What is one number for a parameter, and never averaged."""


def as_real(tensor: Tensor) -> Tensor:
    """The values of a tensor, detached; those of a complex one as pairs in a last dimension."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def sparse_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that are known to get sparse gradients: those of embeddings with `sparse=True` that no
    other module shares."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(p, []).append(module)
    return {
        p
        for p, of in owners.items()
        if len(of) == 1 and isinstance(of[0], (nn.Embedding, nn.EmbeddingBag)) and of[0].sparse
    }


def densifies(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether sparse gradients of a parameter group are made dense: SGD's momentum, which is in the flat
    state, is dense, and torch cannot add a dense tensor to a sparse one."""
    return isinstance(optimizer, torch.optim.SGD) and group["momentum"] != 0


def materialise(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    sparse: Collection[nn.Parameter] = (),
) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """(parameter, key, tensor) of every moment, that is every floating-point state tensor that is no counter,
    in the order of the parameter groups; state that is missing is created first. Counters stay each rank's
    own. The parameters of `sparse` will get sparse gradients.

    Raises `TaskError` for an optimizer that cannot step without a closure or with such gradients, or that
    keeps counters whose initial values are not known.
    """
    missing = [
        p
        for g in optimizer.param_groups
        for p in g["params"]
        if p.requires_grad and not optimizer.state.get(p)
    ]
    if missing:
        _create(optimizer, missing, sparse)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in names and p.requires_grad:
                raise TaskError(
                    "the optimizer holds a parameter that the model does not have; expected the model's own."
                )
            for key, value in sorted(optimizer.state.get(p, {}).items()):
                if _is_moment(p, key, value):
                    yield p, key, value


def _is_moment(p: nn.Parameter, key: str, value: Any) -> bool:
    """Whether a state value is one number for each element (or row) of the parameter, not a counter."""
    if not (torch.is_tensor(value) and (value.is_floating_point() or value.is_complex())):
        return False
    return value.dim() > 0 or (p.dim() == 0 and key not in COUNTERS)


def _create(
    optimizer: torch.optim.Optimizer, missing: list[nn.Parameter], sparse: Collection[nn.Parameter]
) -> None:
    for p, state in _first_state(optimizer, missing, sparse).items():
        optimizer.state[p] = state


def initial_state(
    optimizer: torch.optim.Optimizer, sparse: Collection[nn.Parameter] = ()
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of every trained parameter before its first step, whatever the optimizer holds now. Raises
    as `materialise`."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return _first_state(optimizer, trained, sparse)


def _first_state(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], sparse: Collection[nn.Parameter]
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of some parameters before their first step; that of the optimizer stays as it is."""
    scratch = {p: nn.Parameter(torch.zeros_like(p)) for p in params}
    for group in optimizer.param_groups:
        for p in scratch.keys() & group["params"]:
            zeros = torch.zeros_like(scratch[p])
            scratch[p].grad = zeros.to_sparse(1) if p in sparse and not densifies(optimizer, group) else zeros
    groups = [group["params"] for group in optimizer.param_groups]
    try:
        for group, params in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [scratch[p] for p in params if p in scratch]
        optimizer.step()
    except Exception as error:
        raise TaskError(
            f"the state of {type(optimizer).__name__} cannot be created before its first step: {error}. "
            "Choose an optimizer that steps without a closure and takes the gradients of this model (some "
            "sparse: SGD, Adagrad; all sparse: SparseAdam), or `optimizer_state = 'keep'`."
        ) from error
    finally:
        for group, params in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = params
    found: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        counters = {**_INITIAL_COUNTERS, "eta": float(group["lr"])}
        for p in group["params"]:
            if p in scratch:
                state = optimizer.state.pop(scratch[p], {})
                found[p] = {
                    k: v if v is None or _is_moment(p, k, v) else _beginning(optimizer, counters, k, v)
                    for k, v in state.items()
                }
    return found


def _beginning(optimizer: torch.optim.Optimizer, counters: Mapping[str, float], key: str, value: Any) -> Any:
    """What a counter was before the step on the scratch copy."""
    if key not in counters:
        raise TaskError(
            f"{type(optimizer).__name__} keeps the counter `{key}`, whose first value is not known here. Use "
            "`optimizer_state = 'keep'` (or 'reset') with it."
        )
    return value.fill_(counters[key]) if torch.is_tensor(value) else type(value)(counters[key])


class OptimizerState:
    """An optimizer's state as a checkpoint saves it, by `parameter/key`, with the names of the model without
    its wrappers. Stateful.

    Loading copies into tensors that exist, so that those laid out in a flat state stay there.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, only: Callable[[str, Any], bool]
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self._plain = plain_names(model, self._parameters)
        self._find = finder(model, self._parameters)
        self._optimizer = optimizer
        self._only = only
        """Whether a value, by its name, belongs to this part of the state."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counters; what is None, as SGD's momentum may be, is left out."""
        state: dict[str, Any] = {}
        for name, p in self._parameters.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                if value is not None and self._only(f"{name}/{key}", value):
                    state[f"{self._plain[name]}/{key}"] = as_real(value) if torch.is_tensor(value) else value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the values. Raises `TaskError` for a parameter that the model does not have, and
        `RunDirectoryError` for a value that this optimizer does not keep, or keeps in another shape."""
        values: list[tuple[nn.Parameter, str, Any]] = []
        known = set()
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            found = self._find(name)
            if found is None:
                raise TaskError(
                    f"the saved optimizer state is of parameter `{name}`, which the model does not have."
                )
            p = self._parameters[found]
            _require_like(full, self._optimizer.state.get(p, {}), key, value)
            values.append((p, key, value))
            known.add(f"{self._plain[found]}/{key}")
        lacking = sorted(self.state_dict().keys() - known)
        if state and lacking:  # all are there, or none: a rank that never had a batch may have none
            raise RunDirectoryError(f"it lacks `{lacking[0]}`, which this optimizer keeps")
        for p, key, value in values:
            held = self._optimizer.state[p]
            if torch.is_tensor(held.get(key)):
                as_real(held[key]).copy_(value)
            elif torch.is_tensor(value) and p.is_complex() and value.shape == (*p.shape, 2):
                held[key] = torch.view_as_complex(value.contiguous())  # it was saved as pairs
            else:
                held[key] = value


def _require_like(full: str, held: Mapping[str, Any], key: str, value: Any) -> None:
    """Raises `RunDirectoryError` if a saved value does not fit what the optimizer holds of the parameter, if
    it holds anything yet."""
    if held and key not in held:
        raise RunDirectoryError(
            f"`{full}` is not in the state of this optimizer, which keeps "
            f"{', '.join(sorted(held))}; expected the optimizer that the run began with"
        )
    like = held.get(key)
    if torch.is_tensor(like):
        like = as_real(like)  # as it is saved
    if like is not None and _kind(like) != _kind(value):
        raise RunDirectoryError(f"`{full}` is {_kind(value)}; expected {_kind(like)}")


def _kind(value: Any) -> str:
    """Type and shape, in words."""
    if torch.is_tensor(value):
        return f"{value.dtype} {list(value.shape)}"
    return "a number" if type(value) in (int, float) else type(value).__name__

"""What the state of a training takes in memory. Loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config
from hvd_train.data.catalog import open_catalog
from hvd_train.optim import make_optimizer
from hvd_train.state import FlatState
from hvd_train.task import make_task, takes_tokens

_SIDE = 64
"""Of the square matrix that stands for the parameters of a model which is not there."""


@dataclass(frozen=True)
class Need:
    """Bytes that each rank's training needs."""

    words: str
    """Of which model."""

    state_bytes: int
    """S: what is averaged. Several copies of it are kept."""

    private_bytes: int
    """Gradients, and optimizer state that is not averaged."""


def of(config: Config, parameters: int | None) -> Need:
    """Of a model of so many float32 parameters under the optimizer of `config`, or of its own model.

    Raises `UserError` if that cannot be built.
    """
    if parameters is None:
        task = make_task(config)
        model = task.build_model(open_catalog(config.data, tokens=takes_tokens(task)).sample)
        found = _measure(model, config)
        return replace(found, words=f"{sum(p.numel() for p in model.parameters()):,} parameters")
    one = _measure(nn.Linear(_SIDE, _SIDE, bias=False), config)
    times = parameters / _SIDE**2
    state, private = math.ceil(one.state_bytes * times), math.ceil(one.private_bytes * times)
    return Need(f"{parameters:,} parameters", state, private)


def _measure(model: nn.Module, config: Config) -> Need:
    optimizer, comm, sync = make_optimizer(model, config.optim), SoloCommunicator(), config.sync
    whole = FlatState(model, optimizer, comm, batch_norm=sync.batch_norm).num_bytes
    averaged = FlatState(
        model, optimizer, comm, optimizer_state=sync.optimizer_state, batch_norm=sync.batch_norm
    ).num_bytes
    gradients = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    return Need("", averaged, gradients + whole - averaged)

"""How the transform of a task is called, which may have two forms."""

from __future__ import annotations

import inspect
from typing import Protocol

from hvd_train.errors import TaskError
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.draws import Draws


class Transform(Protocol):
    """`Task.transform` with both arguments, whatever the task defines."""

    def __call__(self, batch: Batch, training: Draws | None = None) -> Batch: ...


def transform_of(task: Task) -> Transform:
    """The transform of `task`. One without an argument `training` does the same in training and elsewhere.

    Raises `TaskError` for one that cannot be called so.
    """
    parameters = list(inspect.signature(task.transform).parameters.values())
    needed = [
        p.name
        for p in parameters[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "training"
    ]
    if needed or not parameters:
        found = ", ".join(["self", *(p.name for p in parameters)])
        raise TaskError(
            f"{type(task).__name__} defines transform({found}); expected transform(self, batch) or "
            "transform(self, batch, training). Give it these arguments, with these names."
        )
    if takes_training(task):
        return lambda batch, training=None: task.transform(batch, training=training)
    return lambda batch, training=None: task.transform(batch)


def takes_training(task: Task) -> bool:
    """Whether its transform has an argument `training`, and may use it."""
    if type(task).transform is Task.transform:
        return False
    parameters = inspect.signature(task.transform).parameters.values()
    return any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters)

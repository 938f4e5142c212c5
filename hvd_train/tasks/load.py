"""Loads the task that the configuration names: built in, or a class in the user's file or module."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from types import ModuleType

from hvd_train.config import Config
from hvd_train.errors import TaskError
from hvd_train.io.user_module import load_module, needed_arguments
from hvd_train.tasks.base import Task
from hvd_train.tasks.built_in import Classification, NextToken, Regression
from hvd_train.tasks.metric_names import groups_for

_BUILT_IN: dict[str, Callable[[Config], Task]] = {
    "classification": lambda config: Classification(config.model, config.class_weights, _groups(config)),
    "regression": lambda config: Regression(config.model, _groups(config)),
    "next-token": lambda config: NextToken(config.model, _groups(config)),
}


def make_task(config: Config) -> Task:
    """The task that `config.task` names. Not collective: every rank makes its own.

    Raises `TaskError` for a name, a file, a module or a class that cannot be used.
    """
    name = config.task
    if name in _BUILT_IN:
        return _BUILT_IN[name](config)
    if config.evaluate.metrics:
        raise TaskError(
            f"evaluate.metrics = {list(config.evaluate.metrics)}: expected none with a task of your own. "
            "Give its metrics in `metrics` or `build_metrics`."
        )
    source, colon, class_name = name.rpartition(":")
    if not colon:
        raise TaskError(_unknown(name))
    return _construct(load_module(source, "task", TaskError, kind="Class"), source, class_name)


def _groups(config: Config) -> tuple[str, ...]:
    return groups_for(config.task, config.evaluate.metrics, config.evaluate.metric)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _BUILT_IN, n=1)
    if name.endswith(".py"):
        remedy = f"Name the class as well: `{name}:MyTask`."
    else:
        remedy = f"Did you mean `{near[0]}`?" if near else "Name a task of your own with its class."
    known = ", ".join(_BUILT_IN)
    return f"task = {name!r}: expected {known}, file.py:Class or package.module:Class. {remedy}"


def _construct(module: ModuleType, source: str, class_name: str) -> Task:
    cls = getattr(module, class_name, None)
    if cls is None:
        tasks = [name for name, value in vars(module).items() if _is_task(value) and value is not Task]
        near = difflib.get_close_matches(class_name, tasks, n=1) or tasks
        remedy = f"Did you mean `{source}:{near[0]}`?" if near else "It has none; derive one from Task."
        raise TaskError(
            f"task: {source} has no class {class_name!r}; expected one derived from hvd_train.Task. {remedy}"
        )
    if not _is_task(cls):
        raise TaskError(
            f"task: {source}:{class_name} is {cls!r}; expected a class derived from hvd_train.Task. "
            f"Write `class {class_name}(hvd_train.Task)`."
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TaskError(
            f"task: {source}:{class_name} does not define {' and '.join(missing)}; expected build_model and "
            "loss. Define what is missing."
        )
    if needed := needed_arguments(cls):
        raise TaskError(
            f"task: {source}:{class_name} needs the arguments {', '.join(needed)}; expected a class that is "
            "constructed without arguments. Give them default values."
        )
    task: Task = cls()
    return task


def _is_task(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Task)

"""Loads the task that the configuration names: built in, or a class in the user's file or module."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from hvd_train.config import Config
from hvd_train.errors import TaskError
from hvd_train.io.text import refuse_utf16
from hvd_train.tasks.base import Task
from hvd_train.tasks.built_in import Classification, NextToken, Regression

_BUILT_IN: dict[str, Callable[[Config], Task]] = {
    "classification": lambda config: Classification(config.model, config.class_weights),
    "regression": lambda config: Regression(config.model),
    "next-token": lambda config: NextToken(config.model),
}


def make_task(config: Config) -> Task:
    """The task that `config.task` names. Not collective: every rank makes its own.

    Raises `TaskError` for a name, a file, a module or a class that cannot be used.
    """
    name = config.task
    if name in _BUILT_IN:
        return _BUILT_IN[name](config)
    source, colon, class_name = name.rpartition(":")
    if not colon:
        raise TaskError(_unknown(name))
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    return _construct(module, source, class_name)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _BUILT_IN, n=1)
    if name.endswith(".py"):
        remedy = f"Name the class as well: `{name}:MyTask`."
    else:
        remedy = f"Did you mean `{near[0]}`?" if near else "Name a task of your own with its class."
    known = ", ".join(_BUILT_IN)
    return f"task = {name!r}: expected {known}, file.py:Class or package.module:Class. {remedy}"


def _load_file(path: Path) -> ModuleType:
    """The module in `path`, always from its source: n ranks that write bytecode next to it, or find bytecode
    of an edit made in the same second, would not agree on what they run."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*.py")), n=1)
        start = f"Relative paths start at {Path.cwd()}."
        remedy = f"Did you mean `{path.with_name(near[0])}`?" if near else start
        raise TaskError(f"task: there is no file {path}; expected the Python file of the task. {remedy}")
    name = f"hvd_train_task_{path.stem}"
    loader = SourceFileLoader(name, str(path))
    spec = spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # a loader was given
    module = module_from_spec(spec)
    _make_importable(path.parent)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    try:
        source = path.read_bytes()
        refuse_utf16(source)
        exec(loader.source_to_code(source, str(path)), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(_cannot_load(str(path), error)) from error
    return module


def _load_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise TaskError(
                f"task: there is no module {error.name}; expected an installed package, or one in "
                f"{Path.cwd()}. Install it, or name a file: `file.py:Class`."
            ) from None
        raise TaskError(_cannot_load(name, error)) from error
    except (Exception, SystemExit) as error:
        raise TaskError(_cannot_load(name, error)) from error


def _make_importable(directory: Path) -> None:
    """Lets a task import what is next to it; last on the path, so that it hides no installed package."""
    place = str(directory.resolve())
    if place not in sys.path:
        sys.path.append(place)


def _cannot_load(source: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = [frame for frame in frames if frame.filename == source] or frames
    line = "" if isinstance(error, SyntaxError) else f" ({where[-1].filename}, line {where[-1].lineno})"
    return (
        f"task: {source} cannot be loaded: {type(error).__name__}: {error}{line}; expected a module that "
        "can be imported. Correct it, or install what it needs."
    )


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
    needed = [
        p.name
        for p in inspect.signature(cls).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise TaskError(
            f"task: {source}:{class_name} needs the arguments {', '.join(needed)}; expected a class that is "
            "constructed without arguments. Give them default values."
        )
    task: Task = cls()
    return task


def _is_task(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Task)

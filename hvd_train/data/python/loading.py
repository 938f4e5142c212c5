"""Loads the dataset that the user names: an object, or what a function or class makes without arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hvd_train.data.python.base import MadeSamples
from hvd_train.data.python.indexed import Indexed
from hvd_train.data.python.iterated import Iterated
from hvd_train.data.python.memory import Limit
from hvd_train.errors import DataError, UserError
from hvd_train.io.user_module import load_module, needed_arguments, place_of, split_name

_EXPECTED = (
    "expected a dataset with `__getitem__` and `__len__`, an iterable, or a function or class without "
    "arguments that makes one"
)


_NO_SAMPLES = (Mapping, str, bytes)
"""What has `__getitem__` and `__len__`, but not for numbers, or not of samples."""


def load(name: str, key: str, limit: Limit) -> MadeSamples:
    """The samples of `file.py:make_dataset` or `package.module:make_dataset`.

    Args:
        key: of the configuration that names it.
        limit: of the memory for samples that have no index.

    Raises `DataError`.
    """
    parts = split_name(name)
    assert parts is not None  # the caller has looked
    source, attribute = parts
    module = load_module(source, key, DataError, noun="dataset", kind="make_dataset")
    if not hasattr(module, attribute):
        raise DataError(f"{key}: {source} has no {attribute!r}; {_EXPECTED}. Name one that it has.")
    value, file = getattr(module, attribute), getattr(module, "__file__", None) or source
    make = _maker(name, key, value, file)
    made = make()
    if _has_index(made):
        return Indexed(name, made, file)
    if isinstance(made, _NO_SAMPLES):
        raise DataError(f"{key}: {name} is a {type(made).__name__}; {_EXPECTED}.")
    if not isinstance(made, Iterable):
        lacks = "__len__" if hasattr(made, "__getitem__") else "__getitem__"
        raise DataError(f"{key}: {name} is a {type(made).__name__} without `{lacks}`; {_EXPECTED}.")
    if made is value and isinstance(made, Iterator):
        raise DataError(
            f"{key}: {name} is a {type(made).__name__}, which can be read once; expected the function that "
            "makes it. Name that."
        )
    return Iterated(name, _each_pass(made, make), limit, file)


def _maker(name: str, key: str, value: Any, file: str) -> Callable[[], Any]:
    """What gives the dataset: `value` itself, or what it makes when it is called."""
    is_dataset = not inspect.isclass(value) and (_has_index(value) or hasattr(value, "__iter__"))
    if is_dataset or not callable(value):
        return lambda: value
    if needed := _needed(value):
        raise DataError(
            f"{key}: {name} needs the arguments {', '.join(needed)}; {_EXPECTED}. Give them default values."
        )

    def make() -> Any:
        try:
            return value()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{key}: {name} failed: {type(error).__name__}: {error}{place_of(error, file)}. Expected it "
                "to make a dataset: correct it."
            ) from error

    return make


def _each_pass(first: Any, make: Callable[[], Any]) -> Callable[[], Iterable[Any]]:
    """An iterator ends for good, and is made anew for every pass but the first."""
    if not isinstance(first, Iterator):
        return lambda: first
    waiting = [first]
    return lambda: waiting.pop() if waiting else make()


def _needed(function: Callable[..., Any]) -> list[str]:
    try:
        return needed_arguments(function)
    except (TypeError, ValueError):  # of C code without a signature
        return []


def _has_index(value: Any) -> bool:
    """Whether samples can be read by their numbers. Torch's iterable datasets inherit a `__getitem__` that
    raises."""
    if isinstance(value, _NO_SAMPLES) or any(
        base.__name__ == "IterableDataset" for base in type(value).__mro__
    ):
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")

"""Loads a module that the user names: a file, or a package that can be imported."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from hvd_train.errors import UserError
from hvd_train.io.text import refuse_utf16


def load_module(source: str, key: str, refusal: Callable[[str], UserError]) -> ModuleType:
    """The module in a file, if `source` ends with `.py`, or of this name.

    Args:
        key: of the configuration that names it; a message begins with it.
        refusal: makes the error from its message.

    Raises what `refusal` makes for a file or module that is not there or cannot be loaded.
    """
    try:
        return _from_file(Path(source), key) if source.endswith(".py") else _by_name(source, key)
    except _Refused as error:
        raise refusal(f"{key}: {error}") from error.__cause__


class _Refused(Exception):
    """Why a module is not loaded."""


def _from_file(path: Path, key: str) -> ModuleType:
    """Always from its source: n ranks that write bytecode next to it, or find bytecode of an edit made in the
    same second, would not agree on what they run."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*.py")), n=1)
        start = f"Relative paths start at {Path.cwd()}."
        remedy = f"Did you mean `{path.with_name(near[0])}`?" if near else start
        raise _Refused(f"there is no file {path}; expected the Python file of the {_noun(key)}. {remedy}")
    name = f"hvd_train_{_noun(key)}_{path.stem}"
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
        raise _Refused(_cannot_load(str(path), error)) from error
    return module


def _by_name(name: str, key: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        kind = "Class" if key == "task" else "factory"
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise _Refused(
                f"there is no module {error.name}; expected an installed package, or one in {Path.cwd()}. "
                f"Install it, or name a file: `file.py:{kind}`."
            ) from None
        raise _Refused(_cannot_load(name, error)) from error
    except (Exception, SystemExit) as error:
        raise _Refused(_cannot_load(name, error)) from error


def _noun(key: str) -> str:
    """`task` or `sink`."""
    return key.rpartition(".")[2].rstrip("s")


def _make_importable(directory: Path) -> None:
    """Lets a module import what is next to it; last on the path, so that it hides no installed package."""
    place = str(directory.resolve())
    if place not in sys.path:
        sys.path.append(place)


def _cannot_load(source: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = [frame for frame in frames if frame.filename == source] or frames
    line = "" if isinstance(error, SyntaxError) else f" ({where[-1].filename}, line {where[-1].lineno})"
    return (
        f"{source} cannot be loaded: {type(error).__name__}: {error}{line}; expected a module that "
        "can be imported. Correct it, or install what it needs."
    )

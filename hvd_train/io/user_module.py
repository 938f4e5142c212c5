"""What the user names in Python code of their own: `file.py:Name` or `package.module:Name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from hvd_train.errors import UserError
from hvd_train.io.text import refuse_utf16


def split_name(text: str) -> tuple[str, str] | None:
    """The file or module, and the name in it, of `file.py:Name` or `package.module:Name`; None for any other
    text. Nothing is loaded."""
    source, colon, name = text.rpartition(":")
    known = source.endswith(".py") or all(map(str.isidentifier, source.split(".")))
    return (source, name) if colon and known and name.isidentifier() else None


def absolute(name: str) -> str:
    """`file.py:Name` with an absolute path; any other text stays."""
    source, colon, inner = name.rpartition(":")
    return f"{os.path.abspath(source)}:{inner}" if colon and source.endswith(".py") else name


def needed_arguments(function: Callable[..., object]) -> list[str]:
    """The arguments of a function or class without which it cannot be called."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def load_module(
    source: str, key: str, refusal: Callable[[str], UserError], noun: str = "", kind: str = "factory"
) -> ModuleType:
    """The module in a file, if `source` ends with `.py`, or of this name.

    Args:
        key: of the configuration that names it; a message begins with it.
        refusal: makes the error from its message.
        noun: what the user defines there. Default: the end of `key`, in singular.
        kind: what of it is named after the colon, for a message.

    Raises what `refusal` makes for a file or module that is not there or cannot be loaded.
    """
    noun = noun or key.rpartition(".")[2].rstrip("s")
    try:
        return _from_file(Path(source), noun) if source.endswith(".py") else _by_name(source, kind)
    except _Refused as error:
        raise refusal(f"{key}: {error}") from error.__cause__


class _Refused(Exception):
    """Why a module is not loaded."""


def _from_file(path: Path, noun: str) -> ModuleType:
    """Always from its source: n ranks that write bytecode next to it, or find bytecode of an edit made in the
    same second, would not agree on what they run."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*.py")), n=1)
        start = f"Relative paths start at {Path.cwd()}."
        remedy = f"Did you mean `{path.with_name(near[0])}`?" if near else start
        raise _Refused(f"there is no file {path}; expected the Python file of the {noun}. {remedy}")
    name = f"hvd_train_{noun}_{path.stem}"
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


def _by_name(name: str, kind: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise _Refused(
                f"there is no module {error.name}; expected an installed package, or one in {Path.cwd()}. "
                f"Install it, or name a file: `file.py:{kind}`."
            ) from None
        raise _Refused(_cannot_load(name, error)) from error
    except (Exception, SystemExit) as error:
        raise _Refused(_cannot_load(name, error)) from error


def _make_importable(directory: Path) -> None:
    """Lets a module import what is next to it; last on the path, so that it hides no installed package."""
    place = str(directory.resolve())
    if place not in sys.path:
        sys.path.append(place)


def place_of(error: BaseException, source: str) -> str:
    """Where an exception was raised, in brackets: the last line in the file `source`, else the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [frame for frame in frames if frame.filename == source] or frames
    return f" ({where[-1].filename}, line {where[-1].lineno})" if where else ""


def _cannot_load(source: str, error: BaseException) -> str:
    line = "" if isinstance(error, SyntaxError) else place_of(error, source)
    return (
        f"{source} cannot be loaded: {type(error).__name__}: {error}{line}; expected a module that "
        "can be imported. Correct it, or install what it needs."
    )

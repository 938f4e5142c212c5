"""The public names: there, documented, readable by type checkers, and free of torch until they are used."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

import hvd_train
from tests.launching import run

SOURCE = Path(hvd_train.__file__).read_text(encoding="utf-8")


def python(program: str) -> str:
    result = run([sys.executable, "-c", program], deadline_s=60)
    assert result.returncode == 0, result.output
    return result.stdout.strip()


@pytest.mark.parametrize("name", sorted(set(hvd_train.__all__) - {"__version__"}))
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(hvd_train, name)
    assert value.__name__ == name
    assert value.__module__.startswith("hvd_train.")
    assert len(inspect.getdoc(value) or "") > 30
    members = inspect.getmembers(value) if inspect.isclass(value) else []
    for member, function in members:
        if not member.startswith("_") and inspect.isfunction(function):
            assert inspect.getdoc(function), f"{name}.{member}"


def test_the_list_is_literal_and_is_what_is_re_exported() -> None:
    """A type checker reads the source: neither a computed list nor a lazy name tells it anything."""
    tree = ast.parse(SOURCE)
    (names,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]  # type: ignore[attr-defined]
    assert sorted(ast.literal_eval(names)) == sorted(hvd_train.__all__)
    (guarded,) = [n for n in tree.body if isinstance(n, ast.If)]
    imported = {a.name for node in guarded.body for a in node.names}  # type: ignore[attr-defined]
    assert imported | {"__version__"} == set(hvd_train.__all__)
    assert dir(hvd_train) == sorted(hvd_train.__all__)


def test_importing_the_package_loads_neither_torch_nor_mpi() -> None:
    heavy = "{'torch', 'mpi4py', 'h5py', 'numpy', 'horovod', 'tyro', 'rich'}"
    assert python(f"import sys, hvd_train; print(sorted({heavy} & sys.modules.keys()))") == "[]"
    assert (
        python("import sys; from hvd_train import Config; print('torch' in sys.modules, Config().seed)")
        == "False 0"
    )


@pytest.mark.parametrize("package", ["record", "launching", "monitor", "run.layout", "environment", "io"])
def test_reading_and_starting_runs_loads_neither_torch_nor_mpi(package: str) -> None:
    """All its modules are imported, by a fresh process."""
    program = f"""
import pkgutil, sys
from importlib import import_module
package = import_module("hvd_train.{package}")
for module in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
    import_module(module.name)
print(sorted({{"torch", "mpi4py", "horovod"}} & sys.modules.keys()))
"""
    assert python(program) == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hvd_train' has no attribute 'Avarager'"):
        _ = hvd_train.Avarager
    with pytest.raises(ImportError, match="Avarager"):
        from hvd_train import Avarager  # noqa: F401

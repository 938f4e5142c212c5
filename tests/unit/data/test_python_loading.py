"""What the user names as a dataset, and what is made of it; each text that refuses something else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvd_train.cli import main
from hvd_train.config import Config, DataConfig
from hvd_train.data.catalog import find_shards
from hvd_train.data.locate import locate
from hvd_train.data.python.iterated import Iterated
from hvd_train.data.python.registry import made_of
from hvd_train.errors import DataError
from hvd_train.io.user_module import absolute, split_name
from hvd_train.run.layout import anchored
from tests.unit.data.python_datasets import write_module
from tests.unit.data.shards import write_foreign

EXPECTED = (
    "expected a dataset with `__getitem__` and `__len__`, an iterable, or a function or class without "
    "arguments that makes one"
)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """The working directory, which modules are imported from."""
    before, path = Path.cwd(), list(sys.path)
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
    sys.path[:] = path


def test_names_are_told_from_paths() -> None:
    assert split_name("a/b c.py:make") == ("a/b c.py", "make")
    assert split_name("package.module:Class") == ("package.module", "Class")
    for text in ("digits", "a/b.h5", "a/b:c", "*.h5", "C:\\x.h5", "a:", ":b", "a.py", "a.py:b-c", "a..b:c"):
        assert split_name(text) is None, text
    assert absolute("a.py:b") == f"{os.getcwd()}/a.py:b"
    assert absolute("a.b:c") == "a.b:c"


def test_a_file_of_such_a_name_is_that_file(elsewhere: Path) -> None:
    write_foreign(elsewhere / "a:b", 10)
    assert find_shards(DataConfig(path="a:b")).train[0].num_samples == 10


def test_a_configuration_can_be_used_from_any_folder(elsewhere: Path) -> None:
    write_module(elsewhere)
    config = anchored(Config(data=DataConfig(path="mine.py:Plain", validation="package.mine:Plain")))
    assert config.data.path == f"{elsewhere}/mine.py:Plain"
    assert config.data.validation == "package.mine:Plain"


def test_a_module_is_found_in_the_working_directory(elsewhere: Path) -> None:
    (elsewhere / "my_own_data").mkdir()
    write_module(elsewhere / "my_own_data")
    assert find_shards(DataConfig(path="my_own_data.mine:Plain")).train[0].num_samples == 60


def test_it_is_made_once_for_a_run(tmp_path: Path) -> None:
    text = "MADE = []\ndef make():\n    MADE.append(1)\n    return Plain()"
    name = f"{write_module(tmp_path, text)}:make"
    find_shards(DataConfig(path=name))
    first = made_of(name)
    assert first is not None
    assert sys.modules["hvd_train_dataset_mine"].MADE == [1]
    find_shards(DataConfig(path=name))
    assert made_of(name) is not first


ITERATED = {
    "an iterable dataset of torch": "Streamed",
    "its object": "Object",
    "a generator": "generated",
    "a set": "S",
}


@pytest.mark.parametrize("kind", ITERATED)
def test_iterables(kind: str, tmp_path: Path) -> None:
    text = "Object = Streamed()\ndef S():\n    return {i / 2 for i in range(60)}"
    name = f"{write_module(tmp_path, text)}:{ITERATED[kind]}"
    targets = "inputs" if kind == "a set" else "targets"
    assert find_shards(DataConfig(path=name, targets=targets)).train[0].num_samples == 60
    assert isinstance(made_of(name), Iterated)


REFUSED = {
    "no such name": ("", "make", "{path} has no 'make'; " + EXPECTED + ". Name one that it has."),
    "a number": ("make = 3", "make", "{name} is a int without `__getitem__`; " + EXPECTED + "."),
    "nothing": ("def make(): pass", "make", "{name} is a NoneType without `__getitem__`; " + EXPECTED + "."),
    "without a length": (
        "class make:\n    def __getitem__(self, i): return i",
        "make",
        "{name} is a make without `__len__`; " + EXPECTED + ".",
    ),
    "a dict": ("make = {'a': 1}", "make", "{name} is a dict; " + EXPECTED + "."),
    "text": ("make = 'a.h5'", "make", "{name} is a str; " + EXPECTED + "."),
    "arguments": (
        "def make(root, *, split, seed=0): pass",
        "make",
        "{name} needs the arguments root, split; " + EXPECTED + ". Give them default values.",
    ),
    "an iterator": (
        "make = generated()",
        "make",
        "{name} is a generator, which can be read once; expected the function that makes it. Name that.",
    ),
    "an error": (
        "def make():\n    raise ValueError('no folder')",
        "make",
        "{name} failed: ValueError: no folder ({path}, line {line}). Expected it to make a dataset: correct "
        "it.",
    ),
    "an exit": (
        "def make():\n    raise SystemExit(3)",
        "make",
        "{name} failed: SystemExit: 3 ({path}, line {line}). Expected it to make a dataset: correct it.",
    ),
    "an error of the module": (
        "raise OSError('x')",
        "make",
        "{path} cannot be loaded: OSError: x ({path}, line {line}); expected a module that can be imported. "
        "Correct it, or install what it needs.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_dataset(kind: str, tmp_path: Path) -> None:
    text, attribute, expected = REFUSED[kind]
    path = write_module(tmp_path, text)
    name, line = f"{path}:{attribute}", len(Path(path).read_text().splitlines())
    with pytest.raises(DataError) as error:
        locate(name, "data.path")
    assert str(error.value) == "data.path: " + expected.format(name=name, path=path, line=line)


LENGTHS = {
    "0": "0 samples. Expected at least 1.",
    "-1": "its length is not known: ValueError: __len__() should return >= 0. Expected `__len__` beside "
    "`__getitem__`: define it.",
    "1 / 0": "its length is not known: ZeroDivisionError: division by zero. Expected `__len__` beside "
    "`__getitem__`: define it.",
}


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_that_cannot_be_used(length: str, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, f'Plain.__len__ = lambda self: {length}')}:Plain"
    with pytest.raises(DataError) as error:
        locate(name, "--data")
    assert str(error.value) == f"{name}: {LENGTHS[length]}"


def test_a_module_or_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        locate("nowhere.at_all:make", "data.path")
    assert str(error.value) == (
        f"data.path: there is no module nowhere; expected an installed package, or one in {Path.cwd()}. "
        "Install it, or name a file: `file.py:make_dataset`."
    )
    write_module(tmp_path)
    with pytest.raises(DataError) as error:
        locate(f"{tmp_path}/mime.py:make", "data.path")
    assert str(error.value) == (
        f"data.path: there is no file {tmp_path}/mime.py; expected the Python file of the dataset. Did you "
        f"mean `{tmp_path}/mine.py`?"
    )


@pytest.mark.parametrize("command", ["info", "check", "index"])
def test_commands_for_shards_name_what_writes_them(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    name = f"{write_module(tmp_path)}:Plain"
    assert main(["shard", command, name]) == 2
    remedy = f"shard write --from {name} --out FOLDER"
    assert capsys.readouterr().err == (
        f"hvd_train: PATH = {name!r} names a Python dataset; expected files. Write shards of it: `hvd_train "
        f"{remedy}`.\n"
    )
    folder = str(tmp_path / "shards")
    assert main(remedy.replace("FOLDER", folder).split()) == 0
    assert main(["shard", command, folder]) == 0

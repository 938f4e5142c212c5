"""Values that are of no use whatever they mean: each is refused by one line that names its key."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_train.cli import main
from hvd_train.config import Config, flatten
from hvd_train.config_file import from_mapping, load_config
from hvd_train.config_values import LARGEST_INTEGER, shown
from hvd_train.errors import ConfigError
from hvd_train.launching.hosts import read_hostfile
from hvd_train.launching.options import Options as LaunchOptions
from hvd_train.launching.restarts import Options as RestartsOptions
from hvd_train.run.random_state import seed_rank
from hvd_train.tools.bench.allreduce.options import Options as BenchOptions
from hvd_train.tools.doctor.options import Options as DoctorOptions
from hvd_train.tools.shard import WriteArgs
from tests.deadlines import seconds
from tests.launching import ROOT, environment
from tests.unit.data.shards import write_foreign

NAN, INF, HUGE = float("nan"), float("inf"), 10**30

NEGATIVE_IS_FINE = {"data.ignore_index", "data.samples_axis", "data.scale", "stop.target_error"}
HUGE_IS_REFUSED_AS_FLOAT = 1e39
"""More than float32 holds."""


def numbers(cls: type, prefix: str = "") -> dict[str, type]:
    """The keys of a dataclass that hold numbers, or several, and of which type: int or float."""
    found: dict[str, type] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= numbers(typing.cast("type", hint), f"{prefix}{field.name}.")
            continue
        parts = {hint}
        while any(typing.get_origin(part) for part in parts):
            parts = {a for part in parts for a in (typing.get_args(part) or (part,))}
        for kind in (float, int):
            if kind in parts:
                found[f"{prefix}{field.name}"] = kind
                break
    return found


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)


def unusable(key: str, kind: type) -> list[Any]:
    values: list[Any] = [NAN, INF, -INF, HUGE if kind is int else HUGE_IS_REFUSED_AS_FLOAT]
    return values if key in NEGATIVE_IS_FINE else [*values, -1]


CONFIG = numbers(Config)


def test_the_keys_are_those_of_the_configuration() -> None:
    flat = flatten(Config())
    assert CONFIG.keys() <= flat.keys()
    plain = {key for key, value in flat.items() if type(value) in (int, float)}
    assert plain <= CONFIG.keys()
    assert {"class_weights", "model.hidden", "stop.target_error", "data.validation"} <= CONFIG.keys()


@pytest.mark.parametrize("key", CONFIG)
def test_a_key_refuses_numbers_that_it_cannot_hold(key: str) -> None:
    several = isinstance(flatten(Config())[key], tuple)
    for value in unusable(key, CONFIG[key]):
        if key == "optim.args":
            value = {"momentum": value} if value != -1 else {"momentum": NAN}
        with pytest.raises(ConfigError) as refused:
            from_mapping(nested(key, [value] if several else value), "run.toml")
        said = str(refused.value)
        assert key in said
        assert "\n" not in said


@pytest.mark.parametrize("key", ["data.path", "runs", "resume", "task", "optim.name", "evaluate.metric"])
def test_text_that_no_file_can_hold_is_refused(key: str) -> None:
    for text, expected in (
        ("a\0b", "without a NUL"),
        ("b\udcff.h5", "UTF-8"),
        (f"folder/{'x' * 300}", "at most 255 bytes"),
        (f"folder/{'ü' * 128}", "at most 255 bytes"),
    ):
        with pytest.raises(ConfigError, match=expected) as refused:
            from_mapping(nested(key, text), "run.toml")
        assert key in str(refused.value)
        assert len(str(refused.value)) < 250


def test_weights_of_classes_are_weights() -> None:
    for weights in ([1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ConfigError, match=r"class_weights = .* at least 0, not all of them 0"):
            from_mapping({"class_weights": weights}, "run.toml")
    assert from_mapping({"class_weights": [0.0, 1.0]}, "run.toml").class_weights == (0.0, 1.0)


def test_every_seed_that_is_taken_seeds_every_rank() -> None:
    states = set()
    for seed in (0, 10**15, LARGEST_INTEGER):
        assert Config(seed=seed).seed == seed
        torch.manual_seed(seed)
        for rank in (0, 1, 4095):
            seed_rank(seed, rank)
            states.add(torch.rand(4).numpy().tobytes())
    assert len(states) == 9
    seed_rank(7, 2)  # as ever
    assert torch.initial_seed() == 7 * 1_000_003 + 3


def test_a_long_value_is_shown_short() -> None:
    assert shown("abc") == "'abc'"
    assert len(shown("x" * 5000)) < 100
    assert "5,002 characters" in shown("x" * 5000)


WRITE = ["shard", "write", "digits", "--out", "OUT"]
COMMANDS: dict[type, list[str]] = {
    LaunchOptions: ["launch", "--dry-run", "-np", "2"],
    DoctorOptions: ["doctor"],
    BenchOptions: ["bench", "allreduce"],
    RestartsOptions: ["restarts"],
    WriteArgs: WRITE,
}
OPTIONS = [(cls, name) for cls in COMMANDS for name in numbers(cls)]


@pytest.mark.parametrize(("cls", "name"), OPTIONS, ids=lambda value: getattr(value, "__module__", value))
def test_an_option_refuses_numbers_that_it_cannot_hold(
    cls: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = numbers(cls)[name]
    option = "-np" if name == "ranks" else f"--{name.replace('_', '-')}"
    texts = ["nan", "inf", "²", "1e39" if kind is float else str(HUGE)]
    texts += [] if name == "scale" else ["-1"]
    for text in texts:
        assert refused([*COMMANDS[cls], f"{option}={text}"]), f"{option} {text}"
        said = capsys.readouterr().err
        assert option.strip("-") in said
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def refused(argv: list[str]) -> bool:
    try:
        return main(argv) == 2
    except SystemExit as end:  # the parser's own way
        return end.code == 2


def test_a_name_that_is_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable of the shell that is not set: the embedded default would be trained instead."""
    monkeypatch.chdir(tmp_path)
    for argv in (["--config", ""], ["--config="], ["init", ""], ["shard", "write", "digits", "--out", ""]):
        assert main(argv) == 2
        assert "expected a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_is_skipped_and_utf_16_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 7\r\n", encoding="utf-8-sig")
    assert load_config(file).seed == 7
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=2\n", encoding="utf-8-sig")
    assert [str(host) for host in read_hostfile(hosts)] == ["node1:2"]
    for path, read in ((file, load_config), (hosts, read_hostfile)):
        path.write_text("node1", encoding="utf-16")
        with pytest.raises(ConfigError, match="byte order mark of UTF-16; expected UTF-8") as refused:
            read(path)
        assert str(path) in str(refused.value)
        path.write_bytes("größe".encode("latin-1"))
        with pytest.raises(ConfigError, match="utf-8"):
            read(path)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"gr\xc3\xb6\xc3\x9fe"),
        ({"PYTHONIOENCODING": "ascii"}, b"gr\xc3\xb6\xc3\x9fe"),
        ({"PYTHONIOENCODING": "latin-1"}, "größe-字".encode()),
        ({"LC_ALL": "C.UTF-8"}, b"gr\xf6\xdfe"),
    ],
    ids=["C", "ascii", "latin-1", "not UTF-8"],
)
def test_any_name_is_printed_under_any_encoding(
    variables: dict[str, str], name: bytes, tmp_path: Path
) -> None:
    """Names that are read from a folder or given; those that are not UTF-8 are printed with escapes."""
    write_foreign(tmp_path / "a.h5", 50)
    folder = bytes(tmp_path) + b"/" + name
    Path(folder.decode(errors="surrogateescape")).mkdir()
    (tmp_path / "a.h5").rename((folder + b"/a.h5").decode(errors="surrogateescape"))
    for argv in (["shard", "info", name], ["shard", "check", name], ["shard", "info", name + b"/none"]):
        line = [sys.executable, "-m", "hvd_train", *argv]
        env = environment({"PYTHONPATH": str(ROOT), **variables})
        done = subprocess.run(
            line, cwd=tmp_path, env=env, capture_output=True, timeout=seconds(60), check=False
        )
        assert done.returncode == (2 if argv[-1] != name else 0), done.stderr
        assert b"Traceback" not in done.stderr

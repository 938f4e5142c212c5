"""The configuration: defaults, reading and writing TOML, and what is said of a wrong key or value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from hvd_train import config as config_module
from hvd_train.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    GroupConfig,
    LearningRateConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
    SyncConfig,
    flatten,
)
from hvd_train.config_file import embedded_config, from_mapping, load_config, to_mapping, to_toml
from hvd_train.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    flat = flatten(Config())
    expected = {
        "sync.period": 10,
        "sync.optimizer_state": "average",
        "sync.batch_norm": "average",
        "backend": "auto",
        "data.batch_size": 64,
        "optim.name": "SGD",
        "optim.lr": 0.05,
        "learning_rate.schedule": "constant",
        "seed": 0,
        "evaluate.every_epochs": 1,
        "evaluate.every_rounds": 500,
        "stop.patience": 5,
        "checkpoint.keep": 2,
        "resume": "",
    }
    assert {key: flat[key] for key in expected} == expected
    limits = ("target_error", "max_epochs", "max_rounds", "max_seconds", "divergence")
    assert [flat[f"stop.{name}"] for name in limits] == [None] * 5


def test_every_field_is_documented() -> None:
    """The docstring under a field is its help on the command line."""
    files = Path(inspect.getfile(config_module)).parent.glob("*.py")
    classes = [c for f in files for c in ast.parse(f.read_text()).body if isinstance(c, ast.ClassDef)]
    assert len(classes) == 11
    for cls in classes:
        body = cls.body
        fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
        own = [i for i in fields if "Config" not in ast.unparse(body[i].annotation)]  # type: ignore[attr-defined]
        assert own, cls.name
        for i in own:
            following = body[i + 1]
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert documented, f"{cls.name}.{ast.unparse(body[i])}"


def test_the_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sync.period = 1  # type: ignore[misc]


UNUSUAL = Config(
    name="a-b_c.1+2",
    task="tasks/mine.py:Mine",
    class_weights=(1.0, 0.5),
    threads=3,
    data=DataConfig(path="shards/*.h5", validation=0.25, reading="stream", scale=1 / 255),
    model=ModelConfig(
        name="cnn",
        hidden=(),
        channels=(4, 8),
        init="runs/a",
        init_strict=False,
        init_map={"": "body.", "encoder.": ""},
        freeze=("body.*",),
    ),
    optim=OptimConfig(
        name="AdamW",
        lr=1e-3,
        args={"betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
        groups=(
            GroupConfig(pattern="head.*", lr_factor=10.0),
            GroupConfig(pattern="*.bias", weight_decay=0.0),
        ),
        decay="matrices",
    ),
    learning_rate=LearningRateConfig(schedule="cosine", total=100, warmup=5, unit="samples"),
    sync=SyncConfig(mode="none", period=3, check_every=0),
    stop=StopConfig(patience=0, target_error=0.0, max_seconds=1.5, divergence=3.0),
)


@pytest.mark.parametrize(
    "config", [Config(), embedded_config(), UNUSUAL], ids=["default", "embedded", "unusual"]
)
def test_written_values_are_read_back(config: Config, tmp_path: Path) -> None:
    path = write(tmp_path, to_toml(config))
    again = load_config(path)
    assert again == config
    assert to_toml(again) == path.read_text(encoding="utf-8")
    assert again.model.hidden == config.model.hidden
    assert isinstance(again.model.hidden, tuple)


def test_all_defaults_are_written_but_what_is_none() -> None:
    table = to_mapping(Config())
    written = {
        f"{k}.{n}" if isinstance(v, dict) else k
        for k, v in table.items()
        for n in (v if isinstance(v, dict) else [0])
    }
    missing = {key for key, value in flatten(Config()).items() if value is None}
    assert set(flatten(Config())) - missing - {"optim.args"} == written - {"optim.args"}
    assert missing == {
        "data.ignore_index",
        "data.max_length",
        "data.scale",
        "data.standardize",
        "sync.max_period",
        "sync.outer_lr",
        "sync.outer_momentum",
        "stop.target_error",
        "stop.max_epochs",
        "stop.max_rounds",
        "stop.max_seconds",
        "stop.divergence",
    }


def test_a_partial_file_leaves_the_rest_at_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "seed = 7\n[stop]\nmax_epochs = 3\n[optim.args]\nmomentum = 0.5\n"))
    changed = {k: v for k, v in flatten(config).items() if v != flatten(Config())[k]}
    assert changed == {"seed": 7, "stop.max_epochs": 3, "optim.args": {"momentum": 0.5}}


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("[sync]\nperod = 3", "sync.perod", "`sync.period`"),
        ("period = 3", "period", "`sync.period`"),
        ("[data]\nbatchsize = 3", "data.batchsize", "`data.batch_size`"),
        ("[stop]\npatiance = 3", "stop.patiance", "`stop.patience`"),
        ("[optim]\nlearning_rate = 3", "optim.learning_rate", "`learning_rate"),
        ("tsak = 'x'", "tsak", "`task`"),
        ("[evaluation]\nmetric = 'x'", "evaluation", "`evaluate"),
        ("xyzzy = 1", "xyzzy", "`python -m hvd_train --help`"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, key: str, nearest: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: unknown key `{key}`. ")
    assert nearest in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sync = 3", ("`sync` = 3", "table [sync]")),
        ("[data]\nbatch_size = 'many'", ("int", "str", "data.batch_size")),
        ("[sync]\nmode = 'sometimes'", ("sometimes", "sync.mode")),
        ("[sync]\nperiod = 0", ("sync.period = 0", "at least 1 local step")),
        ("[model]\nhidden = [3, 'x']", ("model.hidden[1]",)),
        ("seed = -1", ("seed = -1", "at least 0")),
    ],
)
def test_a_wrong_value_is_named_with_file_and_key(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "a/b"}, r"name = 'a/b': expected letters"),
        ({"name": ".."}, r"name = '\.\.'"),
        ({"name": "a."}, r"no dot at either end"),
        ({"threads": -1}, r"threads = -1"),
        ({"data": {"path": ""}}, r"data\.path = ''"),
        ({"data": {"batch_size": 0}}, r"data\.batch_size = 0: expected at least 1 sample"),
        ({"data": {"validation": 1.0}}, r"data\.validation = 1\.0: expected a fraction"),
        ({"data": {"validation": 0.0}}, r"data\.validation = 0\.0"),
        ({"model": {"hidden": [0]}}, r"every width to be at least 1"),
        ({"model": {"dropout": 1.0}}, r"model\.dropout = 1\.0"),
        ({"optim": {"lr": 0.0}}, r"optim\.lr = 0\.0: expected a positive number"),
        ({"optim": {"lr": float("inf")}}, r"optim\.lr = inf"),
        ({"optim": {"groups": [{"pattern": ""}]}}, r"optim\.groups\.pattern = ''"),
        ({"optim": {"groups": [{"pattern": "*", "lr_factor": 0.0}]}}, r"lr_factor = 0\.0: .* model\.freeze"),
        ({"optim": {"groups": [{"pattern": "*", "weight_decay": -1.0}]}}, r"weight_decay = -1\.0"),
        ({"optim": {"groups": [{"lr_factor": 1.0}]}}, r"here: .*pattern.*optim\.groups\[0\]"),
        ({"optim": {"groups": [{"pattern": "*", "lr": 1.0}]}}, r"`lr` in \[\[optim\.groups\]\]; .*lr_factor"),
        ({"optim": {"groups": "head.*"}}, r"here: .*optim\.groups"),
        ({"optim": {"groups": ["head.*"]}}, r"here: .*optim\.groups\[0\]"),
        ({"optim": {"clip_norm": -1.0}}, r"optim\.clip_norm = -1\.0"),
        ({"optim": {"accumulate": 0}}, r"optim\.accumulate = 0: expected at least 1 batch"),
        ({"learning_rate": {"schedule": "step"}}, r"learning_rate\.every = 0"),
        ({"learning_rate": {"schedule": "step", "every": 1, "factor": 1.5}}, r"learning_rate\.factor = 1\.5"),
        ({"learning_rate": {"schedule": "cosine", "total": 5, "warmup": 5}}, r"learning_rate\.total = 5"),
        ({"learning_rate": {"warmup": -1}}, r"learning_rate\.warmup = -1"),
        ({"sync": {"check_every": -1}}, r"sync\.check_every = -1"),
        ({"stop": {"patience": -1}}, r"stop\.patience = -1"),
        ({"stop": {"min_delta": -0.1}}, r"stop\.min_delta = -0\.1"),
        ({"stop": {"max_rounds": 0}}, r"stop\.max_rounds = 0: expected a positive limit"),
        ({"stop": {"max_seconds": -1.0}}, r"stop\.max_seconds = -1\.0"),
        ({"stop": {"divergence": 1.0}}, r"stop\.divergence = 1\.0: expected more than 1"),
        ({"stop": {"patience": 0}}, r"at least one stop rule"),
        ({"evaluate": {"every_epochs": 0, "every_rounds": 0}}, r"every_epochs or every_rounds to be on"),
        ({"evaluate": {"batch_size": 0}}, r"evaluate\.batch_size = 0"),
        ({"checkpoint": {"keep": 0}}, r"checkpoint\.keep = 0"),
        (
            {"stop": {"divergence": 2.0}, "evaluate": {"mode": "max"}},
            r"stop\.divergence = 2\.0.*mode = 'max'",
        ),
    ],
)
def test_every_range_is_checked(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(table, "here")


def test_values_at_the_end_of_their_range_are_taken() -> None:
    StopConfig(patience=0, target_error=0.0)  # an error of 0 is an aim, not "off"
    StopConfig(patience=0, max_seconds=0.001)
    EvaluateConfig(every_epochs=0, every_rounds=1)
    ModelConfig(hidden=())
    Config(stop=StopConfig(divergence=1.5))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot read the configuration.*No such file"):
        load_config(tmp_path / "gone.toml")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'task = "\xe4"')
    with pytest.raises(ConfigError, match=r"latin\.toml: cannot read the configuration"):
        load_config(latin)
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML: .*line 2"):
        load_config(write(tmp_path, "seed = 1\nperiod =\n"))


def test_flatten_has_one_entry_a_field_and_tells_two_configurations_apart() -> None:
    a, b = flatten(Config()), flatten(Config(sync=SyncConfig(period=11), seed=1))
    assert a.keys() == b.keys()
    assert {k for k in a if a[k] != b[k]} == {"sync.period", "seed"}


def test_the_embedded_default_is_the_digits() -> None:
    config = embedded_config()
    assert (config.data.path, config.data.batch_size, config.model.hidden) == ("digits", 32, (128, 64))
    assert (config.stop.patience, config.evaluate.every_rounds * config.sync.period) == (15, 40)

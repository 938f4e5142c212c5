"""A run that starts from weights: what is taken, what is left as it is built, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hvd_train.config import Config, ModelConfig, SyncConfig
from hvd_train.data.format import SampleSpec
from hvd_train.errors import ConfigError, HvdTrainError, RunDirectoryError, UserError
from hvd_train.record.wording import header_lines
from hvd_train.run.initial import start_from
from hvd_train.run.layout import anchored
from hvd_train.run.model_state import saved_state
from hvd_train.tasks.built_in import Classification
from tests.unit.run_reports import HEADER
from tests.unit.trainings import Remembered, resumed, small, train

SIZES = (3, 4, 7)


class Net(nn.Module):
    """Two layers, a batch norm with its statistics, and a matrix that is there under two names."""

    def __init__(self, sizes: tuple[int, int, int] = SIZES) -> None:
        super().__init__()
        first, hidden, last = sizes
        self.body = nn.Sequential(nn.Linear(first, hidden), nn.BatchNorm1d(hidden))
        self.head = nn.Linear(hidden, last)
        self.again = self.head.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.relu(self.body(inputs / 240)))
        return outputs


class Tied(Classification):
    """Trains a `Net`, each time from other values."""

    def __init__(self, sizes: tuple[int, int, int] = SIZES) -> None:
        super().__init__(ModelConfig())
        self.sizes = sizes

    def build_model(self, spec: SampleSpec) -> nn.Module:
        super().build_model(spec)
        return Net(self.sizes)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in saved_state(model)[0].items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor], names: set[str] | None = None) -> bool:
    return all(torch.equal(a[name], b[name]) for name in names or a.keys() | b.keys())


def file_of(model: nn.Module, path: Path, rename: dict[str, str] | None = None) -> Path:
    """The state of a model as other programs write it: without the second name of a shared tensor."""
    state = {n: t.clone() for n, t in values(model).items() if n != "again"}
    for before, after in (rename or {}).items():
        state = {after + n[len(before) :] if n.startswith(before) else n: t for n, t in state.items()}
    save_file(state, path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small(tmp_path)


def test_a_file_gives_parameters_and_statistics(tmp_path: Path) -> None:
    source, model = Net(), Net()
    source.body[1].running_mean.add_(torch.arange(4.0))  # type: ignore[operator, union-attr]
    file = file_of(source, tmp_path / "w.safetensors")
    assert start_from(model, ModelConfig(init=str(file))) == f"{file}: 10 of 10 tensors"
    assert equal(values(model), values(source))
    assert model.again is model.head.weight


def test_values_are_converted_to_the_width_of_the_model(tmp_path: Path) -> None:
    source, model = Net().half(), Net()
    start_from(model, ModelConfig(init=str(file_of(source, tmp_path / "w.safetensors"))))
    assert model.head.weight.dtype is torch.float32
    assert torch.equal(model.head.weight, source.head.weight.float())


def test_prefixes_are_renamed_the_longest_first(tmp_path: Path) -> None:
    source, model = Net(), Net()
    file = file_of(source, tmp_path / "w.safetensors", {"body.": "module.encoder.", "head.": "module.out."})
    renamed = {"module.encoder.": "body.", "module.": "", "module.out.": "head."}
    with pytest.raises(ConfigError, match=r"init_map: 'module\.' renames no tensor of the file"):
        start_from(model, ModelConfig(init=str(file), init_map=renamed))
    del renamed["module."]
    start_from(model, ModelConfig(init=str(file), init_map=renamed))
    assert equal(values(model), values(source))
    flat = file_of(source.body[0], tmp_path / "layer.safetensors")
    loose = ModelConfig(init=str(flat), init_map={"": "body.0."}, init_strict=False)
    assert "2 of 10 tensors; not in the file, as built: again, body.1.weight, body.1.bias" in start_from(
        model, loose
    )
    clash = file_of(
        source, tmp_path / "c.safetensors", {"head.bias": "other.bias", "body.0.bias": "more.bias"}
    )
    with pytest.raises(
        ConfigError, match=r"`more\.bias` and `other\.bias` of the file both become `head\.bias`"
    ):
        start_from(model, ModelConfig(init=str(clash), init_map={"other.": "head.", "more.": "head."}))


def test_other_names_are_refused_or_listed(tmp_path: Path) -> None:
    source, model = Net(), Net()
    before = values(model)
    file = file_of(source, tmp_path / "w.safetensors", {"head.": "classifier."})
    with pytest.raises(ConfigError) as caught:
        start_from(model, ModelConfig(init=str(file)))
    apart = (
        "; not in the file, as built: again, head.weight, head.bias; in the file, not used: classifier.bias, "
        "classifier.weight"
    )
    assert f"7 of 10 tensors of the model are in {file}{apart}. Expected" in str(caught.value)
    assert "set model.init_strict = false" in str(caught.value)
    assert equal(values(model), before), "what is refused changes nothing"
    said = start_from(model, ModelConfig(init=str(file), init_strict=False))
    assert said == f"{file}: 7 of 10 tensors{apart}"
    assert equal(values(model), before, {"head.weight", "head.bias"})
    assert equal(values(model), values(source), {"body.0.weight", "body.1.running_mean"})
    with pytest.raises(
        ConfigError, match=r"0 of 2 tensors of the model are in .*Rename by model\.init_map\.$"
    ):
        start_from(nn.Linear(2, 2), ModelConfig(init=str(file), init_strict=False))


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_until_the_tensor_is_left_out(strict: bool, tmp_path: Path) -> None:
    model = Net()
    file = file_of(Net((3, 4, 10)), tmp_path / "w.safetensors")
    message = r"`head\.bias` is floating-point \[10\] in .*, but floating-point \[7\] in the model"
    with pytest.raises(ConfigError, match=message):
        start_from(model, ModelConfig(init=str(file), init_strict=strict))
    left_out = ModelConfig(init=str(file), init_strict=False, init_map={"head.": "other."})
    assert "7 of 10 tensors" in start_from(model, left_out)


def test_another_kind_of_number_is_refused(tmp_path: Path) -> None:
    state = {n: t for n, t in values(Net()).items() if n != "again"}
    state["body.1.num_batches_tracked"] = torch.tensor(2.0)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"is floating-point \[\] in .*, but torch.int64 \[\] in the model"):
        start_from(Net(), ModelConfig(init=str(tmp_path / "w.safetensors")))


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    file = file_of(Net(), tmp_path / "w.safetensors")
    whole = file.read_bytes()
    pickled = tmp_path / "w.pt"
    torch.save(Net().state_dict(), pickled)
    os.mkfifo(tmp_path / "fifo")
    for name, content, message in (
        ("gone.safetensors", None, "there is no such file; expected a safetensors file"),
        ("fifo", None, "there is no such file"),
        ("x" * 255, None, "there is no such file"),
        ("w.pt", pickled.read_bytes(), "pickles of torch.save are not loaded"),
        ("torn", whole[:-5], "cannot be read"),
        ("empty", b"", "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            start_from(Net(), ModelConfig(init=str(tmp_path / name)))
        assert str(caught.value).startswith("model.init = ")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunDirectoryError, match=r"^model\.init: .*neither a run's folder nor a checkpoint"):
        start_from(Net(), ModelConfig(init=str(tmp_path / "folder")))


def test_options_without_their_file_are_refused() -> None:
    for given in ({"init_strict": False}, {"init_map": {"a": "b"}}):
        with pytest.raises(ConfigError, match=r"model\.init_\w+ = .*: expected model\.init to be set"):
            ModelConfig(**given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.freeze"):
        ModelConfig(freeze=("",))


def first(recorder: Remembered) -> dict[str, Tensor]:
    """The model at the end."""
    return values(recorder.training.checkpoints.model)  # type: ignore[union-attr]


@pytest.mark.parametrize("keep", ["average", "keep"])
def test_every_rank_starts_from_the_best_checkpoint_of_a_run(
    keep: str, config: Config, tmp_path: Path
) -> None:
    """Also the statistics of a batch norm that stay each rank's own."""
    train(config, 2, Tied())
    run = tmp_path / "runs" / "r"
    best = run / "checkpoints" / (run / "checkpoints" / "best").read_text().strip()
    source = load_file(best / "model.safetensors")
    still = replace(
        config,
        name="tuned",
        sync=SyncConfig(period=1, batch_norm=keep),  # type: ignore[arg-type]
        stop=replace(config.stop, max_rounds=1),
        optim=replace(config.optim, lr=1e-30),
        model=replace(config.model, init=str(run)),
    )
    for recorder in train(still, 3, Tied()):
        assert recorder.start.init == f"{best}: 10 of 10 tensors"
        for name in ("head.weight", "head.bias", "body.0.weight"):
            assert torch.allclose(first(recorder)[name], source[name]), "but for the rounding of an average"
        moved = (first(recorder)["body.1.running_mean"] - source["body.1.running_mean"]).abs()
        assert float(moved.max()) < 0.11 * float(source["body.1.running_mean"].abs().max() + 1), "one batch"
    file = replace(still, name="file", model=replace(config.model, init=str(best / "model.safetensors")))
    assert train(file, 1, Tied())[0].start.init == f"{best}/model.safetensors: 10 of 10 tensors"
    at_round = replace(still, name="third", model=replace(config.model, init=str(best)))
    assert train(at_round, 1, Tied())[0].start.init == f"{best}: 10 of 10 tensors"


def test_a_damaged_checkpoint_is_not_started_from(config: Config, tmp_path: Path) -> None:
    train(config, 1, Tied())
    file = tmp_path / "runs" / "r" / "checkpoints" / "round-3" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    tuned = replace(config, name="tuned", model=replace(config.model, init=str(tmp_path / "runs" / "r")))
    with pytest.raises(HvdTrainError, match=r"^model\.init: .*model\.safetensors: damaged"):
        train(tuned, 2, Tied())


def test_a_resumed_run_goes_on_from_its_own_checkpoint(config: Config, tmp_path: Path) -> None:
    file = file_of(Net(), tmp_path / "w.safetensors")
    tuned = replace(config, model=ModelConfig(init=str(file), freeze=("body.0.*",)))
    (recorder,) = train(tuned, 1, Tied())
    assert recorder.start.init == f"{file}: 10 of 10 tensors"
    assert recorder.start.num_frozen == 16
    frozen = {"body.0.weight", "body.0.bias"}
    assert equal(first(recorder), load_file(file), frozen)
    file.unlink()
    (again,) = train(resumed(tuned, max_rounds=5), 1, Tied())
    assert (again.start.init, again.start.num_frozen) == ("", 16)
    assert equal(first(again), first(recorder), frozen), "they stay frozen"
    assert not equal(first(again), first(recorder), {"head.bias"})


def test_what_is_frozen_may_change_in_a_resumed_run(config: Config) -> None:
    (recorder,) = train(config, 1, Tied())
    frozen = replace(config.model, freeze=("body.*",))
    (other,) = train(replace(resumed(config, max_rounds=5), model=frozen), 1, Tied())
    assert equal(first(other), first(recorder), {"body.0.weight", "body.1.weight"})
    moments = other.training.checkpoints.parts["moments"]  # type: ignore[union-attr]
    assert set(moments.state_dict()) == {"again/momentum_buffer", "head.bias/momentum_buffer"}
    (third,) = train(resumed(config, max_rounds=7), 1, Tied())
    assert not equal(first(third), first(other), {"body.0.weight"})


def test_a_path_is_kept_as_an_absolute_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    kept = anchored(Config(model=ModelConfig(init="runs/a")))
    assert kept.model.init == str(tmp_path / "runs" / "a")
    assert anchored(Config()).model.init == ""


def test_the_console_says_what_was_loaded_and_what_is_frozen() -> None:
    lines = header_lines(replace(HEADER, init="runs/a/checkpoints/round-2: 6 of 6 tensors", num_frozen=8320))
    assert "init      runs/a/checkpoints/round-2: 6 of 6 tensors" in lines
    assert "frozen    8,320 of 17,226 parameters" in lines
    assert not [line for line in header_lines(HEADER) if line.startswith(("init", "frozen"))]

"""Inputs that built-in models standardize: what they know of them, in training and afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.config import Config, DataConfig, ModelConfig, SyncConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.format import SampleSpec
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import ConfigError, TaskError, UserError
from hvd_train.preparation import prepare
from hvd_train.record.reports import RoundReport
from hvd_train.tasks.inputs import Inputs, constant_buffers
from hvd_train.tasks.load import make_task
from hvd_train.tasks.standardizing import standardize
from tests.threads import on_ranks
from tests.unit.after.predictions import options as prediction
from tests.unit.after.predictions import solo
from tests.unit.trainings import Remembered, Same, resumed, small, train

RNG = np.random.default_rng(0)
FAR = 1e9 + RNG.normal([0, 5, -300], [1, 1e-3, 70], (240, 3))
"""Inputs float64 of the two files of `config`: in float32 they would have no digits left."""


def write(folder: Path, inputs: npt.NDArray[Any]) -> None:
    """In place of those of `small`: 40 rows and 200."""
    for name, rows in (("a.h5", slice(0, 40)), ("b.h5", slice(40, 240))):
        with h5py.File(folder / name, "r+") as file:
            del file["inputs"]
            file["inputs"] = inputs[rows]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = small(tmp_path)
    write(tmp_path, FAR)
    return replace(made, data=replace(made.data, standardize="component"))


def model_of(recorder: Remembered) -> dict[str, Tensor]:
    assert recorder.training is not None
    return dict(recorder.training.checkpoints.model.state_dict())


def figures(state: dict[str, Tensor]) -> tuple[bytes, bytes]:
    return state["inputs.mean"].numpy().tobytes(), state["inputs.deviation"].numpy().tobytes()


@pytest.mark.parametrize("batch_norm", ["average", "keep"])
def test_training_leaves_the_figures_as_they_are_on_any_number_of_ranks(
    batch_norm: Any, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """With three ranks the samples, and with them the weights, are unequal in the last round."""
    found = set()
    for ranks in (1, 2, 3, 5):
        one = replace(config, name=f"r{ranks}", sync=SyncConfig(period=7, batch_norm=batch_norm))
        recorders = train(one, ranks)
        assert recorders[0].start.num_parameters == (3 + 1) * 4 + (4 + 1) * 7
        assert recorders[0].of(RoundReport)[-1].loss < 3, "inputs near 1 can be learned from"
        found |= {figures(model_of(recorder)) for recorder in recorders}
        with h5py.File(Path(one.runs).parent / "a.h5") as file:
            raw = torch.from_numpy(file["inputs"][:])
        model = hvd_train.load_model(Path(one.runs) / one.name, "latest")
        assert figures(model.state_dict()) in found
        assert model(raw).std() > 0.01
    assert len(found) == 1
    ((mean, deviation),) = found
    np.testing.assert_allclose(np.frombuffer(mean), FAR.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(np.frombuffer(deviation), (FAR - 1e9).std(axis=0), rtol=1e-12)
    assert capsys.readouterr().err == ""


def test_a_moving_average_has_the_same_figures(config: Config, tmp_path: Path) -> None:
    moving = replace(config, sync=SyncConfig(period=5, ema=0.5))
    expected = figures(model_of(train(moving, 3)[0]))
    for checkpoint in ("latest", "ema-latest"):
        model = hvd_train.load_model(tmp_path / "runs" / "r", checkpoint)
        assert figures(model.state_dict()) == expected


def test_validation_rows_do_not_count(config: Config) -> None:
    held_out = replace(config, data=replace(config.data, validation=0.25))
    spans = open_catalog(held_out.data).train
    rows = np.concatenate(
        [np.arange(s.start, s.stop) + (0 if s.shard.endswith("a.h5") else 40) for s in spans]
    )
    assert len(rows) == 180
    mean, _ = figures(model_of(train(held_out, 2)[0]))
    np.testing.assert_allclose(np.frombuffer(mean), FAR[rows].mean(axis=0), rtol=1e-15)


def test_a_resumed_run_keeps_its_figures_with_other_data_and_reads_nothing_for_them(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = figures(model_of(train(config, 2)[0]))
    write(tmp_path, FAR * 2)
    monkeypatch.setattr("hvd_train.wiring.standardize", None)
    after = train(resumed(config, max_rounds=5), 3)
    assert {figures(model_of(recorder)) for recorder in after} == {before}
    other = replace(config, data=replace(config.data, standardize="all"))
    with pytest.raises(
        UserError,
        match=r"data\.standardize = 'all': the run was trained with 'component', and its checkpoint fits "
        r"nothing else\. Give that value, or begin a new run\.",
    ):
        train(resumed(other, max_rounds=7), 1)


def test_a_run_without_figures_resumes_as_before_and_does_not_get_them(config: Config) -> None:
    plain = replace(config, data=replace(config.data, standardize=None))
    assert not [name for name in model_of(train(plain, 1)[0]) if name.startswith("inputs")]
    train(resumed(plain, max_rounds=4), 1)
    with pytest.raises(UserError, match=r"data\.standardize = 'component': the run was trained with None"):
        train(resumed(config, max_rounds=6), 1)


def test_a_run_from_weights_keeps_the_figures_that_they_were_trained_with(
    config: Config, tmp_path: Path
) -> None:
    before = figures(model_of(train(config, 2)[0]))
    write(tmp_path, FAR * 2)
    base = str(tmp_path / "runs" / "r")
    tuned = replace(config, name="tuned", model=replace(config.model, init=base))
    recorders = train(tuned, 2)
    assert {figures(model_of(recorder)) for recorder in recorders} == {before}
    assert recorders[0].start.init.endswith(": 6 of 6 tensors")
    with pytest.raises(UserError, match=r"in the file, not used: inputs\.deviation, inputs\.mean"):
        train(replace(tuned, name="plain", data=replace(config.data, standardize=None)), 1)


def test_weights_without_figures_are_refused_unless_the_rest_is_to_be_as_built(
    config: Config, tmp_path: Path
) -> None:
    plain = replace(config, data=replace(config.data, standardize=None))
    train(plain, 1)
    model = replace(config.model, init=str(tmp_path / "runs" / "r"))
    tuned = replace(config, name="tuned", model=model)
    with pytest.raises(UserError, match=r"not in the file, as built: inputs\.mean, inputs\.deviation"):
        train(tuned, 1)
    loose = replace(tuned, name="loose", model=replace(model, init_strict=False))
    mean, _ = figures(model_of(train(loose, 1)[0]))
    np.testing.assert_allclose(np.frombuffer(mean), FAR.mean(axis=0), rtol=1e-15)


def test_predictions_on_raw_samples(config: Config, tmp_path: Path) -> None:
    train(config, 2)
    run = tmp_path / "runs" / "r"
    found = solo(prediction(run, tmp_path, data=str(tmp_path / "*.h5")))
    model = hvd_train.load_model(run)
    mean, deviation = FAR.mean(axis=0), FAR.std(axis=0)
    near = torch.from_numpy(((FAR - mean) / deviation).astype("f4"))
    with torch.no_grad():
        right = model.layers(near).softmax(dim=1)  # type: ignore[operator]
    np.testing.assert_allclose(found["probability"], right.numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "how", "model", "dtype"),
    [
        (RNG.integers(0, 256, (50, 3, 9, 8), dtype="u1"), "channel", "cnn", torch.float32),
        (RNG.integers(0, 256, (50, 9, 8), dtype="u1"), "all", "cnn", torch.float32),
        (RNG.integers(0, 256, (50, 9, 8), dtype="u1"), "component", "mlp", torch.float32),
        (RNG.normal(5, 1, (50, 2, 30)).astype("f4"), "channel", "mlp", torch.float32),
        (RNG.normal(5, 1, 50).astype("f2"), "component", "mlp", torch.float32),
        (2**40 + RNG.integers(0, 9, (50, 4)), "component", "mlp", torch.float64),
        (2**31 - RNG.integers(1, 9, (50, 4)).astype("u4"), "all", "mlp", torch.float64),
    ],
)
def test_what_the_layers_get(
    values: npt.NDArray[Any], how: Any, model: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_part(tmp_path / "d", Arrays(values, np.arange(50) % 2, 1 / 255 if values.dtype == "u1" else None))
    config = Config(
        threads=torch.get_num_threads(),
        data=DataConfig(path=str(tmp_path / "d"), standardize=how),
        model=ModelConfig(name=model, hidden=(4,), channels=(2,)),
    )

    def inputs_of(comm: Any) -> Inputs:
        prepared = prepare(config, None, comm)
        standardize(prepared.model, prepared.catalog, comm)
        assert constant_buffers(prepared.model) == {"inputs.mean", "inputs.deviation"}
        (inputs,) = (m for m in prepared.model.modules() if isinstance(m, Inputs))
        prepared.model(torch.from_numpy(values))
        return inputs

    inputs, other = on_ranks(2, inputs_of)
    assert figures({"inputs.mean": inputs.mean, "inputs.deviation": inputs.deviation}) == figures(
        {"inputs.mean": other.mean, "inputs.deviation": other.deviation}
    )
    assert inputs.mean.dtype is dtype
    got = inputs(torch.from_numpy(values), torch.float32)
    assert (got.dtype, got.shape) == (torch.float32, values.shape)
    axes = {"component": 0, "all": None, "channel": (0, *range(2, values.ndim))}[how]
    np.testing.assert_allclose(got.double().mean(dim=axes), 0, atol=1e-4)
    np.testing.assert_allclose(got.double().std(dim=axes, correction=0), 1, rtol=1e-5)


def test_a_constant_component_becomes_0(config: Config, tmp_path: Path) -> None:
    values = FAR.copy()
    values[:, 1] = 1e9 + 0.1
    write(tmp_path, values)
    recorder = train(config, 2)[0]
    assert recorder.training is not None
    got = recorder.training.checkpoints.model.inputs(torch.from_numpy(values), torch.float32)  # type: ignore[operator]
    assert not got[:, 1].any()
    assert got.isfinite().all()


def test_a_deviation_below_the_range_of_float32_is_1() -> None:
    spec = open_catalog(DataConfig(standardize="all")).sample
    inputs = Inputs(spec)
    inputs.take(np.array([3.0]), np.array([1e-60]))
    assert (inputs.mean.item(), inputs.deviation.item()) == (3, 1)


def test_a_recorded_scale_is_not_applied(tmp_path: Path) -> None:
    assert open_catalog(DataConfig()).sample.scale == 1 / 16
    assert open_catalog(DataConfig(standardize="all")).sample.scale == 1


class Own(Same):
    """Has a model of its own."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        super().build_model(spec)
        return nn.Linear(3, 7, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "task", "message"),
    [
        (
            {},
            Own(),
            "data.standardize = 'component': expected none with a model of your own: only those of the "
            "tasks classification and regression do it. Subtract the mean and divide by the deviation in the "
            "`transform` of your task.",
        ),
        (
            {"standardize": "channel"},
            None,
            "a.h5: data.standardize = 'channel': `inputs` has the shape [3] a sample; expected [channels, "
            "...], of two axes or more. Take 'component'.",
        ),
    ],
)
def test_refusals(change: dict[str, Any], task: Any, message: str, config: Config) -> None:
    chosen = replace(config, data=replace(config.data, **change))
    with pytest.raises(UserError) as refused:
        train(chosen, 2, task)
    assert str(refused.value).endswith(message)


@pytest.mark.parametrize(
    ("shape", "model", "message"),
    [
        (
            (28, 28),
            "cnn",
            r"`inputs` has the shape \[28, 28\] a sample, which the model cnn takes as \[height, width\]; "
            r"expected \[channels, height, width\]\. Take 'all'\.",
        ),
        ((28, 28, 3), "mlp", r"\[28, 28, 3\] a sample, which looks like channels last; .* Take 'all'\."),
    ],
)
def test_channels_that_samples_do_not_have(
    shape: tuple[int, ...], model: Any, message: str, tmp_path: Path
) -> None:
    write_part(tmp_path / "d", Arrays(np.zeros((9, *shape), "f4"), np.arange(9) % 2))
    data = DataConfig(path=str(tmp_path / "d"), standardize="channel")
    task = make_task(Config(model=ModelConfig(name=model)))
    with pytest.raises(TaskError, match=rf"data\.standardize = 'channel': .*{message}"):
        task.build_model(open_catalog(data).sample)


def test_tokens_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path / "d", Arrays(RNG.integers(0, 9, (40, 7)), np.zeros(40, np.int64)))
    data = DataConfig(path=str(tmp_path / "d"), targets="inputs", standardize="component")
    config = Config(task="next-token", threads=torch.get_num_threads(), data=data)
    with pytest.raises(UserError, match=r"expected none with the task next-token, whose inputs are tokens"):
        on_ranks(1, lambda comm: prepare(config, None, comm).config)


@pytest.mark.parametrize("scale", ["auto", 0.5])
def test_a_scale_beside_it_is_refused(scale: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.scale = .*: expected none with data\.standardize, which brings inputs of any scale to "
        "mean 0 and deviation 1",
    ):
        DataConfig(scale=scale, standardize="all")


def test_the_remark_on_inputs_far_from_1_gives_a_key_that_silences_it(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = replace(config, data=replace(config.data, standardize=None))
    (line,) = on_ranks(2, lambda comm: prepare(plain, None, comm).remarks)[0]
    assert "With a built-in model give --data.standardize component; else subtract the mean" in line
    capsys.readouterr()
    assert on_ranks(2, lambda comm: prepare(config, None, comm).remarks) == [[], []]
    assert capsys.readouterr().err == ""

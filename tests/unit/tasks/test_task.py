"""The built-in tasks' figures against hand computations, and what loading your own task says."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_train.config import Config, ModelConfig
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import TaskError
from hvd_train.tasks.base import Task
from hvd_train.tasks.built_in import Classification, NextToken, Regression
from hvd_train.tasks.load import make_task

MLP = ModelConfig(hidden=(6,))


def sample(
    inputs: FieldSpec, targets: FieldSpec, classes: int | None = None, scale: float = 1.0
) -> SampleSpec:
    fields = {"inputs": inputs, "targets": targets}
    return SampleSpec(inputs="inputs", targets="targets", fields=fields, num_classes=classes, scale=scale)


VECTOR = FieldSpec(shape=(5,), dtype="float32")
LABEL = FieldSpec(shape=(), dtype="int64")


class Fixed(nn.Module):
    """Ignores its inputs and returns what it was given; counts its calls."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.outputs[: len(inputs)]


def cross_entropies(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    log_sums = np.log(np.exp(logits).sum(axis=-1))
    return log_sums - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def test_class_weights_divide_by_the_number_of_samples_so_that_parts_add_up() -> None:
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(7, 3)), np.array([0, 2, 1, 1, 2, 0, 2])
    weights = np.array([0.5, 2.0, 1.25])
    by_hand = (weights[targets] * cross_entropies(logits, targets)).sum() / 7

    task = Classification(MLP, tuple(weights))
    task.build_model(sample(VECTOR, LABEL, 3))

    def loss(part: slice) -> tuple[Tensor, int]:
        batch = {"inputs": torch.zeros(7, 5)[part], "targets": torch.tensor(targets[part])}
        return task.loss(Fixed(torch.tensor(logits[part])), batch)

    whole, n = loss(slice(None))
    assert (n, whole.item()) == (7, pytest.approx(by_hand, rel=1e-13))
    parts = [loss(part) for part in (slice(0, 2), slice(2, 7))]
    assert sum(mean.item() * m for mean, m in parts) / 7 == pytest.approx(by_hand, rel=1e-13)


def test_classification_evaluates_loss_and_error_in_one_forward_pass() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.5, 0.0, 0.25], [0.0, 0.0, 1.0]])
    batch = {"inputs": torch.zeros(4, 5), "targets": torch.tensor([0, 2, 1, 2], dtype=torch.uint8)}
    task = Classification(MLP)
    task.build_model(sample(VECTOR, LABEL, 3))
    model = Fixed(logits)
    with torch.inference_mode():
        sums = task.evaluate(model, batch)
    assert model.calls == 1
    assert sums["error"] == (2.0, 4.0)
    expected = cross_entropies(logits.numpy(), batch["targets"].numpy().astype(int)).sum()
    assert sums["loss"] == (pytest.approx(expected, rel=1e-6), 4.0)
    assert task.metrics(model, batch) == {"error": (2.0, 4.0)}


def test_classification_refuses_targets_that_are_not_classes() -> None:
    with pytest.raises(
        TaskError, match="task classification: `targets` is of type float32; expected integers"
    ):
        Classification(MLP).build_model(sample(VECTOR, FieldSpec(shape=(), dtype="float32")))
    with pytest.raises(TaskError, match=r"`targets` has the shape \[4\] a sample; expected one integer"):
        Classification(MLP).build_model(sample(VECTOR, FieldSpec(shape=(4,), dtype="int64"), 3))
    with pytest.raises(TaskError, match="class_weights has 2 values; expected 3, one for each class"):
        Classification(MLP, (1.0, 2.0)).build_model(sample(VECTOR, LABEL, 3))


def test_classes_in_a_column_are_classes() -> None:
    task = Classification(MLP)
    model = task.build_model(sample(VECTOR, FieldSpec(shape=(1,), dtype="int16"), 3))
    batch = {"inputs": torch.ones(4, 5), "targets": torch.tensor([[0], [1], [2], [1]], dtype=torch.int16)}
    loss, n = task.loss(model, batch)
    flat = {**batch, "targets": batch["targets"][:, 0]}
    assert n == 4
    assert loss.item() == task.loss(model, flat)[0].item()


def test_regression_figures_of_a_target_with_components() -> None:
    outputs = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 3.0]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 2.0], [2.0, -1.0], [3.0, 0.0]], dtype=torch.float32)
    task = Regression(MLP)
    task.build_model(sample(VECTOR, FieldSpec(shape=(2,), dtype="float32")))
    model, batch = Fixed(outputs), {"inputs": torch.zeros(3, 5), "targets": targets}
    sums = task.evaluate(model, batch)
    assert model.calls == 1
    assert sums == {"loss": (7.0, 3.0), "error": (7.0, 3.0), "mae": (3.0, 3.0)}
    loss, n = task.loss(model, batch)
    assert (loss.item(), n) == (pytest.approx(14 / 6), 3)
    assert task.metrics(model, batch) == {"error": (7.0, 3.0), "mae": (3.0, 3.0)}


def test_regression_on_one_number_does_not_broadcast_it_against_the_batch() -> None:
    task = Regression(MLP)
    model = task.build_model(sample(VECTOR, FieldSpec(shape=(), dtype="float64")))
    batch = {"inputs": torch.ones(4, 5), "targets": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)}
    prediction = model(batch["inputs"])[:, 0].double()
    by_hand = ((prediction - batch["targets"]) ** 2).mean().item()
    assert task.loss(model, batch)[0].item() == pytest.approx(by_hand, rel=1e-5)


def test_regression_refuses_empty_targets() -> None:
    with pytest.raises(
        TaskError, match=r"`targets` has the shape \[0\] a sample; expected one number or more"
    ):
        Regression(MLP).build_model(sample(VECTOR, FieldSpec(shape=(0,), dtype="float32")))


def tokens(
    length: int, *, separate: bool = False, classes: int | None = 5, dtype: str = "uint8"
) -> SampleSpec:
    field = FieldSpec(shape=(length,), dtype=dtype)
    names = ("inputs", "targets") if separate else ("tokens", "tokens")
    return SampleSpec(
        inputs=names[0], targets=names[1], fields=dict.fromkeys(names, field), num_classes=classes
    )


def test_next_token_predicts_what_follows_in_the_same_dataset() -> None:
    rng = np.random.default_rng(2)
    sequence = np.array([[0, 1, 2, 3], [4, 3, 2, 1], [1, 1, 0, 4]])
    logits = rng.normal(size=(3, 3, 5))
    by_hand = cross_entropies(logits, sequence[:, 1:])
    task = NextToken(MLP)
    task.build_model(tokens(4))
    model = Fixed(torch.tensor(logits))
    batch = task.transform({"tokens": torch.tensor(sequence, dtype=torch.uint8)})
    loss, n = task.loss(model, batch)
    assert (loss.item(), n) == (pytest.approx(by_hand.mean(), rel=1e-12), 3)
    sums = task.evaluate(model, batch)
    wrong = (logits.argmax(axis=-1) != sequence[:, 1:]).sum()
    assert sums["error"] == (wrong, 9.0)
    assert sums["loss"] == (pytest.approx(by_hand.mean() * 3, rel=1e-12), 3.0)
    assert task.metrics(model, batch)["error"] == (wrong, 9.0)


def test_next_token_takes_following_tokens_from_a_dataset_of_their_own() -> None:
    text = torch.randint(5, (6, 9), generator=torch.Generator().manual_seed(3))
    together, apart = NextToken(MLP), NextToken(MLP)
    model = together.build_model(tokens(9))
    apart.build_model(tokens(8, separate=True))
    batch = apart.transform(
        {"inputs": text[:, :-1].to(torch.uint16), "targets": text[:, 1:].to(torch.uint16)}
    )
    expected = together.evaluate(model, {"tokens": text})
    assert apart.evaluate(model, batch) == expected


def test_samples_without_a_class_count_neither_in_the_loss_nor_as_samples() -> None:
    rng = np.random.default_rng(4)
    logits, targets = rng.normal(size=(5, 3)), np.array([0, -100, 2, -100, 1])
    kept = targets != -100
    weights = (0.5, 2.0, 1.25)
    for task, w in ((Classification(MLP), np.ones(3)), (Classification(MLP, weights), np.array(weights))):
        task.build_model(sample(VECTOR, LABEL, 3))
        model = Fixed(torch.tensor(logits))
        batch = {"inputs": torch.zeros(5, 5), "targets": torch.tensor(targets)}
        by_hand = (w[targets[kept]] * cross_entropies(logits[kept], targets[kept])).sum()
        loss, n = task.loss(model, batch)
        assert (n, loss.item()) == (3, pytest.approx(by_hand / 3, rel=1e-12))
        sums = task.evaluate(model, batch)
        wrong = (logits[kept].argmax(axis=1) != targets[kept]).sum()
        assert sums == {"loss": (pytest.approx(by_hand), 3.0), "error": (wrong, 3.0)}
        nothing = {**batch, "targets": torch.full((5,), -100)}
        loss, n = task.loss(model, nothing)
        assert (n, loss.item(), loss.requires_grad) == (0, 0.0, True)
        assert task.evaluate(model, nothing) == {"loss": (0.0, 0.0), "error": (0.0, 0.0)}


def test_positions_that_are_ignored_do_not_count_in_their_sample() -> None:
    """The mean is over samples, each the mean of its own positions: parts of a batch add up to the whole."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(4, 3, 5))
    targets = np.array([[0, -100, 2], [-100, -100, -100], [4, 1, 3], [-100, 2, -100]])
    losses = cross_entropies(logits, np.maximum(targets, 0))
    by_hand = [losses[0, [0, 2]].mean(), losses[2].mean(), losses[3, 1]]
    task = NextToken(MLP)
    task.build_model(tokens(3, separate=True))

    def batch(rows: slice) -> dict[str, Tensor]:
        return {"inputs": torch.zeros(4, 3)[rows], "targets": torch.tensor(targets[rows])}

    def loss(rows: slice) -> tuple[float, int]:
        mean, n = task.loss(Fixed(torch.tensor(logits[rows])), batch(rows))
        return mean.item() * n, n

    assert loss(slice(None)) == (pytest.approx(sum(by_hand), rel=1e-12), 3)
    assert loss(slice(0, 1)) == (pytest.approx(by_hand[0], rel=1e-12), 1)
    assert loss(slice(1, 2)) == (0.0, 0)
    assert loss(slice(1, 4)) == (pytest.approx(by_hand[1] + by_hand[2], rel=1e-12), 2)
    kept = targets != -100
    wrong = (logits.argmax(axis=-1)[kept] != targets[kept]).sum()
    sums = task.evaluate(Fixed(torch.tensor(logits)), batch(slice(None)))
    assert sums == {"loss": (pytest.approx(sum(by_hand)), 3.0), "error": (wrong, 6.0)}


def test_truth_values_are_the_classes_0_and_1() -> None:
    task = Classification(MLP)
    model = task.build_model(sample(VECTOR, FieldSpec(shape=(), dtype="bool"), 2))
    batch = {"inputs": torch.ones(3, 5), "targets": torch.tensor([True, False, True])}
    as_numbers = {**batch, "targets": torch.tensor([1, 0, 1])}
    assert task.evaluate(model, batch) == task.evaluate(model, as_numbers)


def test_one_hot_rows_are_refused_with_a_remedy() -> None:
    for dtype in ("float32", "uint8", "bool"):
        spec = sample(VECTOR, FieldSpec(shape=(4,), dtype=dtype), None if dtype == "float32" else 2)
        with pytest.raises(TaskError, match=r"shape \[4\] a sample; .*Set data\.one_hot = true if"):
            Classification(MLP).build_model(spec)


def test_so_many_classes_that_their_layer_does_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_train.environment.machine.available_memory", lambda: 4 * 6 * 3)
    assert Classification(MLP).build_model(sample(VECTOR, LABEL, 3)) is not None
    with pytest.raises(TaskError, match="`targets` has 4 classes, and the last layer for them takes"):
        Classification(MLP).build_model(sample(VECTOR, LABEL, 4))
    with pytest.raises(TaskError, match=r"task next-token: .*number the classes without gaps"):
        NextToken(MLP).build_model(tokens(4))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (tokens(1), r"shape \[1\] .*; expected sequences \[T\] of one length T >= 2"),
        (tokens(4, classes=None, dtype="float32"), "`tokens` is of type float32; expected integers"),
        (
            sample(FieldSpec(shape=(4,), dtype="float32"), FieldSpec(shape=(4,), dtype="int8"), 3),
            "integer tokens",
        ),
        (sample(FieldSpec(shape=(4,), dtype="int8"), LABEL, 3), r"`targets` of shape \[\]"),
    ],
)
def test_next_token_refuses_inputs_that_are_not_sequences(spec: SampleSpec, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        NextToken(MLP).build_model(spec)


def test_your_own_task_is_evaluated_by_its_loss_and_metrics() -> None:
    class Own(Task):
        def build_model(self, spec: SampleSpec) -> nn.Module:
            return nn.Linear(5, 1)

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            return model(batch["inputs"]).square().mean(), len(batch["inputs"])

        def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
            return {"error": (torch.tensor(3.0), len(batch["inputs"]))}  # type: ignore[dict-item]

    task, batch = Own(), {"inputs": torch.ones(4, 5)}
    model = task.build_model(sample(VECTOR, LABEL))
    loss, _ = task.loss(model, batch)
    assert task.transform(batch) is batch
    assert task.evaluate(model, batch) == {"loss": (loss.item() * 4, 4.0), "error": (3.0, 4.0)}


def test_loss_under_bf16_autocast_is_summed_in_float32() -> None:
    task = Classification(MLP)
    model = task.build_model(sample(VECTOR, LABEL, 3))
    batch = {"inputs": torch.ones(4, 5), "targets": torch.tensor([0, 1, 2, 0])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(batch["inputs"]).dtype == torch.bfloat16
        loss, _ = task.loss(model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(3), abs=0.5)


OWN = """
from __future__ import annotations
import dataclasses
import hvd_train
from torch import nn
from beside import WIDTH

@dataclasses.dataclass
class Settings:
    width: int = WIDTH

class Own(hvd_train.Task):
    settings = Settings()
    def build_model(self, spec):
        return nn.Linear(5, self.settings.width)
    def loss(self, model, batch):
        return model(batch["inputs"]).mean(), len(batch["inputs"])

class Needy(Own):
    def __init__(self, width, *, depth):
        pass

class Half(hvd_train.Task):
    def loss(self, model, batch):
        return None, 0

def function():
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.delitem(sys.modules, "hvd_train_task_own", raising=False)
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "beside.py").write_text("WIDTH = 3\n", encoding="utf-8")
    return tmp_path / "own.py"


def test_a_task_from_a_file_is_read_anew_and_leaves_no_bytecode(own: Path) -> None:
    task = make_task(Config(task="own.py:Own"))
    assert task.build_model(sample(VECTOR, LABEL))(torch.ones(2, 5)).shape == (2, 3)
    assert type(task).__module__ == "hvd_train_task_own"
    assert type(pickle.loads(pickle.dumps(task))) is type(task)
    own.write_text(OWN.replace("self.settings.width", f"{'9':<19}"), encoding="utf-8")
    edited = make_task(Config(task=f"{own}:Own"))
    assert edited.build_model(sample(VECTOR, LABEL))(torch.ones(2, 5)).shape == (2, 9)
    assert [p.name for p in own.parent.rglob("*.pyc") if p.name.startswith("own.")] == []


def test_a_task_from_a_module_in_the_directory_of_the_start(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = own.parent / "team"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    own.rename(package / "tasks.py")
    monkeypatch.delitem(sys.modules, "team", raising=False)
    monkeypatch.delitem(sys.modules, "team.tasks", raising=False)
    assert type(make_task(Config(task="team.tasks:Own"))).__name__ == "Own"


def refusal(task: str) -> str:
    with pytest.raises(TaskError) as caught:
        make_task(Config(task=task))
    return str(caught.value)


def test_names_without_a_task(own: Path) -> None:
    assert refusal("clasification") == (
        "task = 'clasification': expected classification, regression, next-token, file.py:Class or "
        "package.module:Class. Did you mean `classification`?"
    )
    assert refusal("own.py").endswith("Name the class as well: `own.py:MyTask`.")
    assert refusal("0wn.py:Own") == (
        "task: there is no file 0wn.py; expected the Python file of the task. Did you mean `own.py`?"
    )
    assert refusal("sub/x.py:Own") == (
        "task: there is no file sub/x.py; expected the Python file of the task. "
        f"Relative paths start at {own.parent}."
    )
    assert refusal("no_such_package.tasks:Own") == (
        "task: there is no module no_such_package; expected an installed package, or one in "
        f"{own.parent}. Install it, or name a file: `file.py:Class`."
    )


def test_classes_that_are_not_tasks(own: Path) -> None:
    assert refusal("own.py:Own1") == (
        "task: own.py has no class 'Own1'; expected one derived from hvd_train.Task. "
        "Did you mean `own.py:Own`?"
    )
    assert refusal("own.py:Settings").startswith(
        "task: own.py:Settings is <class 'hvd_train_task_own.Settings'>;"
    )
    assert "Write `class function(hvd_train.Task)`." in refusal("own.py:function")
    assert refusal("own.py:Half") == (
        "task: own.py:Half does not define build_model; expected build_model and loss. "
        "Define what is missing."
    )
    assert refusal("own.py:Needy") == (
        "task: own.py:Needy needs the arguments width, depth; expected a class that is constructed without "
        "arguments. Give them default values."
    )
    own.write_text("import hvd_train\n", encoding="utf-8")
    assert refusal("own.py:Own").endswith("It has none; derive one from Task.")


def test_files_that_cannot_be_loaded(own: Path) -> None:
    own.write_text("x = 1\nimport no_such_thing\n", encoding="utf-8")
    assert refusal("own.py:Own") == (
        "task: own.py cannot be loaded: ModuleNotFoundError: No module named 'no_such_thing' (own.py, "
        "line 2); expected a module that can be imported. Correct it, or install what it needs."
    )
    assert "hvd_train_task_own" not in sys.modules
    own.write_text("def f(:\n", encoding="utf-8")
    assert refusal("own.py:Own").startswith("task: own.py cannot be loaded: SyntaxError: ")
    assert "(own.py, line 1)" in refusal("own.py:Own")
    own.write_text("import json\njson.loads('{')\n", encoding="utf-8")
    assert "(own.py, line 2)" in refusal("own.py:Own")
    own.write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    for task in ("own.py:Own", "own:Own"):
        assert "cannot be loaded: SystemExit: 0 (" in refusal(task)
    own.write_text("x = 1\n", encoding="utf-16")
    assert "own.py cannot be loaded: UnicodeError: it begins with the byte order mark of UTF-16" in refusal(
        "own.py:Own"
    )
    own.write_text("1 / 0\n", encoding="utf-8")
    assert "ZeroDivisionError: division by zero (" in refusal("own:Own")

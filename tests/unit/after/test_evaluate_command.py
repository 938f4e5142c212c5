"""`hvd_train evaluate` in one process: its table, JSON and page, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import hvd_train
from hvd_train.cli import main
from hvd_train.config import Config, DataConfig, EvaluateConfig, ModelConfig, StopConfig
from hvd_train.errors import UserError

CLASSES = 4


def write(path: Path, rows: int, classes: int = CLASSES, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, rows)
    targets[0] = classes - 1
    inputs = rng.normal(size=(rows, 5)).astype(np.float32)
    inputs[:, 0] += targets
    with h5py.File(path, "w") as file:
        file["inputs"], file["targets"] = inputs, targets
    return path


def config(folder: Path, **changes: Any) -> Config:
    return replace(
        Config(
            name="run",
            runs=str(folder / "runs"),
            threads=1,
            data=DataConfig(path=str(folder / "train.h5"), validation=str(folder / "validation.h5")),
            model=ModelConfig(hidden=(8,)),
            stop=StopConfig(max_rounds=6),
            evaluate=EvaluateConfig(every_rounds=2, batch_size=32),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write(folder / "train.h5", 200)
    write(folder / "validation.h5", 90, seed=1)
    return hvd_train.train(config(folder)).run


def evaluated(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, args), "--json", "--threads", "1"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_the_figures_are_those_of_the_best_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (best,) = {e["best"] for e in events if e["event"] == "stop"}
    assert found["metrics"]["error"] == best == 1 - found["metrics"]["accuracy"]
    assert (found["schema"], found["num_samples"], found["undefined"]) == (1, 90, [])
    assert np.sum(found["values"]["confusion"]) == 90
    latest = evaluated(capsys, run, "--checkpoint", "latest")
    assert (latest["checkpoint"], latest["round"]) == ("round-6", 6)
    assert evaluated(capsys, run / "checkpoints" / "round-6") == latest
    assert evaluated(capsys, run, "--checkpoint", "round-6", "--batch-size", "7")["metrics"] == pytest.approx(
        latest["metrics"], rel=1e-6
    )


def test_the_worst_samples_are_named_by_shard_and_row(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, run, "--worst", "7")["worst"]
    path = run.parent.parent / "validation.h5"
    with h5py.File(path) as file:
        inputs, targets = torch.from_numpy(file["inputs"][()]), torch.from_numpy(file["targets"][()])
    losses = torch.nn.functional.cross_entropy(hvd_train.load_model(run)(inputs), targets, reduction="none")
    order = losses.argsort(descending=True)[:7]
    assert [(sample["shard"], sample["row"]) for sample in found] == [(str(path), int(i)) for i in order]
    assert [sample["loss"] for sample in found] == pytest.approx(losses[order].tolist(), rel=1e-5)
    assert [sample["target"] for sample in found] == targets[order].tolist()
    predicted = hvd_train.load_model(run)(inputs[order]).argmax(1)
    assert [sample["predicted"] for sample in found] == [{"class": int(c)} for c in predicted]
    assert evaluated(capsys, run, "--worst", "0")["worst"] == []


def test_rows_that_are_left_out_change_no_other_sample(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = write(tmp_path / "spoilt.h5", 90, seed=1)
    with h5py.File(spoilt, "r+") as file:
        file["inputs"][[3, 40], 1] = np.nan
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace('not_finite = "keep"', 'not_finite = "skip"'))
    whole = evaluated(capsys, run, "--worst", "90")
    found = evaluated(capsys, tmp_path / "run", "--worst", "90", "--data", spoilt)
    losses = {sample["row"]: sample["loss"] for sample in whole["worst"] if sample["row"] not in (3, 40)}
    assert {sample["row"]: sample["loss"] for sample in found["worst"]} == pytest.approx(losses, rel=1e-5)
    assert found["metrics"]["loss"] == pytest.approx(sum(losses.values()) / 88, rel=1e-5)
    assert found["remarks"] == [
        "2 rows of 90 left out, by data.not_finite = 'skip': the first is "
        f"{spoilt}: `inputs` holds nan in row 3"
    ]
    path.write_text(path.read_text().replace('not_finite = "skip"', 'not_finite = "error"'))
    assert f"{spoilt}: `inputs` holds nan in row 3; expected finite numbers" in refusal(
        capsys, tmp_path / "run", "--data", spoilt
    )


def test_the_table_and_the_page_show_the_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a launcher's terminal may have it
    assert main(["evaluate", str(run), "--page", str(tmp_path / "e.html"), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    for words in ("90 samples", "roc_auc", "class  precision  recall", "rows are classes", "worst samples"):
        assert words in shown
    assert "\x1b" not in shown
    page = (tmp_path / "e.html").read_text()
    assert page.count("</html>") == 1
    for words in ("Evaluation of run", "Confusion matrix", "ROC curves", "Calibration", "validation.h5"):
        assert words in page


def test_a_class_that_does_not_occur_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write(tmp_path / "few.h5", 30, classes=3)
    found = evaluated(capsys, run, "--data", few)
    assert {"recall_by_class[3]", "roc_auc_by_class[3]", "roc_auc"} <= set(found["undefined"])
    assert found["metrics"]["roc_auc"] is None
    assert found["metrics"]["accuracy"] == 1 - found["metrics"]["error"]
    assert main(["evaluate", str(run), "--data", str(few), "--page", str(tmp_path / "few.html")]) == 0
    shown = capsys.readouterr().out
    assert "not defined: " in shown
    assert "roc_auc_by_class[3]" in shown


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["evaluate", *map(str, args)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_evaluated_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write(tmp_path / "more.h5", 30, classes=9)
    message = refusal(capsys, run, "--data", more)
    assert f"{more}: `targets` holds 8 in row 0; the model has the classes 0 to 3" in message
    wide = tmp_path / "wide.h5"
    with h5py.File(wide, "w") as file:
        file["inputs"], file["targets"] = np.zeros((3, 6), np.float32), np.zeros(3, np.int64)
    message = refusal(capsys, run, "--data", wide)
    assert "a sample of `inputs` is float32 [6]; the model was trained on float32 [5]" in message
    assert "no such file or folder" in refusal(capsys, run, "--data", tmp_path / "none.h5")
    assert "is not a run" in refusal(capsys, tmp_path)
    assert "no checkpoint `round-5`; it has round-" in refusal(capsys, run, "--checkpoint", "round-5")
    assert "expected best, latest or round-N" in refusal(capsys, run, "--checkpoint", "newest")
    assert "is not a folder that can be written to" in refusal(
        capsys, run, "--page", tmp_path / "a" / "b.html"
    )


def test_a_run_without_validation_data_needs_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.h5", 50)
    run = hvd_train.train(config(tmp_path, data=DataConfig(path=str(train)))).run
    assert "has no validation data. Name the data" in refusal(capsys, run)
    assert evaluated(capsys, run, "--data", train)["num_samples"] == 50


def test_the_watch_follows_an_entry_of_a_metric(run: Path, tmp_path: Path) -> None:
    watched = EvaluateConfig(metric="recall_by_class[3]", mode="max", metrics=("roc_auc",), every_rounds=2)
    folder = run.parent.parent
    result = hvd_train.train(config(folder, name="watched", runs=str(tmp_path), evaluate=watched))
    lines = (result.run / "events.jsonl").read_text().splitlines()
    evaluations = [e for e in map(json.loads, lines) if e["event"] == "evaluation"]
    assert [e["error"] for e in evaluations] == [e["metrics"]["recall_by_class[3]"] for e in evaluations]
    assert {"roc_auc", "accuracy"} <= evaluations[0]["metrics"].keys()
    assert result.best == max(e["error"] for e in evaluations)


def test_a_watched_metric_that_is_not_defined_ends_the_run(run: Path, tmp_path: Path) -> None:
    """By its name, not as a training that diverged."""
    few = write(tmp_path / "few.h5", 40, classes=3)
    data = DataConfig(path=str(run.parent.parent / "train.h5"), validation=str(few))
    watched = EvaluateConfig(metric="roc_auc", mode="max")
    with pytest.raises(UserError, match=r"evaluate.metric = 'roc_auc': not defined .*roc_auc_by_class\[3\]"):
        hvd_train.train(config(tmp_path, data=data, evaluate=watched))
    result = hvd_train.train(
        config(tmp_path, name="other", data=data, evaluate=EvaluateConfig(metrics=("roc_auc",)))
    )
    faults = map(json.loads, (result.run / "events.jsonl").read_text().splitlines())
    (fault,) = [e for e in faults if e["event"] == "fault"]
    assert "not defined on the validation data: roc_auc, roc_auc_by_class[3]" in fault["message"]


TASK = """
import torch, hvd_train
from torch import nn
from torchmetrics.classification import MulticlassAUROC

class Own(hvd_train.Task):
    def build_model(self, spec):
        return nn.Linear(5, 4)

    def build_metrics(self, num_samples):
        self.area = MulticlassAUROC(4, thresholds=None if num_samples < 1000 else 200)
        return {"area": self.area}

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def metrics(self, model, batch):
        logits = model(batch["inputs"])
        self.area.update(logits, batch["targets"])
        return {"error": (float((logits.argmax(1) != batch["targets"]).sum()), len(logits))}
"""


def test_a_task_of_ones_own_brings_its_metrics(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "area.py").write_text(TASK)
    watched = EvaluateConfig(metric="area", mode="max", every_rounds=2)
    own = config(run.parent.parent, runs=str(tmp_path), task=f"{tmp_path}/area.py:Own", evaluate=watched)
    result = hvd_train.train(own)
    found = evaluated(capsys, result.run)
    assert found["metrics"]["area"] == pytest.approx(result.best, rel=1e-6)
    assert found["metrics"].keys() == {"loss", "error", "area"}
    assert found["worst"] == [], "it has no losses of samples"


def test_names_of_metrics_are_checked(run: Path, tmp_path: Path) -> None:
    folder = run.parent.parent
    with pytest.raises(UserError, match="task classification has no `f2`; expected all, or some of accuracy"):
        hvd_train.train(config(folder, name="a", evaluate=EvaluateConfig(metrics=("f2",))))
    (tmp_path / "area.py").write_text(TASK)
    own = config(
        folder, name="b", task=f"{tmp_path}/area.py:Own", evaluate=EvaluateConfig(metrics=("roc_auc",))
    )
    with pytest.raises(UserError, match="expected none with a task of your own"):
        hvd_train.train(own)

"""`hvd_train evaluate` on several ranks: the figures of one process, and those of scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

import hvd_train
from hvd_train.config import Config, DataConfig, EvaluateConfig, ModelConfig, StopConfig
from tests.launching import command, run

pytestmark = pytest.mark.mpi

CLASSES = 5
ROWS = (3, 130, 2)
"""Of the validation shards: two batches of 64 and one of 7 rows."""


def write(path: Path, targets: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(len(targets), 6)).astype(np.float32)
    inputs[np.arange(len(targets)), targets] += 1
    with h5py.File(path, "w") as file:
        file["inputs"], file["targets"] = inputs, targets


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write(folder / "train.h5", np.arange(300) % CLASSES, 0)
    # The last class is in the first batch only: of four ranks, three never see it.
    for i, rows in enumerate(ROWS):
        targets = np.arange(rows) % (CLASSES - 1)
        targets[:3] = CLASSES - 1 if i == 0 else 0
        write(folder / f"validation-{i}.h5", targets, i + 1)
    config = Config(
        name="run",
        runs=str(folder),
        threads=1,
        data=DataConfig(path=str(folder / "train.h5"), validation=str(folder / "validation-*.h5")),
        model=ModelConfig(hidden=(16,)),
        stop=StopConfig(max_rounds=4),
        evaluate=EvaluateConfig(batch_size=64),
    )
    return hvd_train.train(config).run


def evaluated(folder: Path, ranks: int) -> dict[str, Any]:
    program = ["-m", "hvd_train", "evaluate", str(folder), "--json", "--threads", "1"]
    job = run(command("mpirun", ranks, program), deadline_s=60)
    assert job.returncode == 0, job.output
    found: dict[str, Any] = json.loads(next(line for line in job.output.splitlines() if line[:1] == "{"))
    return found


def test_ranks_without_a_batch_and_without_a_class_change_nothing(trained: Path) -> None:
    """Three batches: of five ranks two have none."""
    found, alone = evaluated(trained, 5), evaluated(trained, 1)
    assert found.keys() == alone.keys()
    assert found["worst"] == alone["worst"]
    assert len(found["worst"]) == 10
    for name, value in alone["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-12), name
    for name in ("confusion", "support_by_class", "precision_by_class", "roc_auc_by_class", "roc_curves"):
        assert found["values"][name] == alone["values"][name], "from counts"
    parts = [h5py.File(trained.parent / f"validation-{i}.h5") for i in range(len(ROWS))]
    truth = np.concatenate([part["targets"][()] for part in parts])
    inputs = torch.from_numpy(np.concatenate([part["inputs"][()] for part in parts]))
    with torch.no_grad():
        logits = hvd_train.load_model(trained)(inputs)
    predicted, probabilities = logits.argmax(1).numpy(), logits.softmax(1).numpy()
    assert found["num_samples"] == len(truth) == sum(ROWS)
    assert found["values"]["confusion"] == sk.confusion_matrix(truth, predicted).tolist()
    assert found["metrics"]["roc_auc"] == pytest.approx(
        sk.roc_auc_score(truth, probabilities, multi_class="ovr"), abs=1e-6
    )
    assert found["metrics"]["f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"), abs=1e-6)

"""Runs whose models are exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hvd_train
from hvd_train.after.export.options import Format
from hvd_train.config import Config, DataConfig, EvaluateConfig, ModelConfig, StopConfig
from hvd_train.data.grouping import Grouping
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from tests.unit.data.shards import write_foreign

FORMATS: tuple[Format, ...] = ("safetensors", "torch-export", "onnx")


def trained(
    folder: Path,
    task: str,
    arrays: Arrays | None = None,
    model: ModelConfig | None = None,
    standardize: Grouping | None = None,
) -> Path:
    """The folder of a run of two rounds."""
    if arrays is None:
        (folder / "data").mkdir()
        write_foreign(folder / "data" / "a.h5", 150)
    else:
        write_part(folder / "data", arrays)
    same = arrays is not None and task == "next-token"
    data = DataConfig(path=str(folder / "data"), batch_size=16, validation=0.4, standardize=standardize)
    config = Config(
        name="r",
        runs=str(folder / "runs"),
        task=task,
        backend="solo",
        threads=1,
        data=replace(data, targets="inputs") if same else data,
        model=model or ModelConfig(hidden=(8,), channels=(4,), embedding=4, context=3, dropout=0.1),
        stop=StopConfig(patience=0, max_rounds=2),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=1),
    )
    return hvd_train.train(config).run


def of(name: str) -> str:
    return f"tests.unit.after.export_tasks:{name}"

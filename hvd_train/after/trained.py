"""A finished run, opened to be used: its configuration, task and model. Not collective; needs no MPI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hvd_train.config import Config
from hvd_train.errors import RunDirectoryError, UserError
from hvd_train.run.layout import CHECKPOINTS, MANIFEST_FILE, run_of, saved_config
from hvd_train.run.restore import restore_model
from hvd_train.run.saved_checkpoint import EMA_FILE, MODEL_FILE, SavedCheckpoint, find_checkpoint
from hvd_train.tasks.base import Task
from hvd_train.tasks.load import make_task

_EMA = "ema-"
"""What precedes the name of a checkpoint where its moving average is meant."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's model, with what it was trained as."""

    folder: Path
    """Of the run; of the checkpoint, where that is outside a run."""

    config: Config

    task: Task

    saved: SavedCheckpoint
    """The checkpoint that the model is from."""

    file: str
    """Its file that the model is from: `model.safetensors`, or that of the moving average."""

    model: nn.Module
    """In evaluation mode."""

    @property
    def checkpoint(self) -> str:
        """The checkpoint's name, with `ema-` before it where the model is the moving average."""
        return f"{_EMA if self.file == EMA_FILE else ''}{self.saved.folder.name}"


def open_trained(path: str | Path, checkpoint: str = "best", task: Task | None = None) -> Trained:
    """The model of a run, with its configuration and task.

    Args:
        path: a run's folder, or one checkpoint's.
        checkpoint: `best`, `latest` or `round-N`, where `path` is a run; `ema-best` and so on for the moving
            average that it holds (`sync.ema`), also where `path` is a checkpoint.
        task: the task that was trained, where it was not named by the configuration.

    Raises `RunDirectoryError` for a path without this checkpoint, for a damaged one, and for that of another
    model.
    """
    pointer = checkpoint.removeprefix(_EMA)
    file = MODEL_FILE if pointer == checkpoint else EMA_FILE
    saved = _find(Path(path), pointer)
    if file not in saved.manifest.files:
        raise RunDirectoryError(
            f"{saved.folder} has no moving average, as sync.ema was off. Take checkpoint = {pointer!r}."
        )
    config = saved_config(saved.folder)
    chosen = task or make_task(config)
    try:
        model = chosen.build_model(saved.sample)
    except UserError:
        raise
    except Exception as error:  # of the user's task, or of torch for shapes that make no sense
        raise saved.refusal(
            f"{MANIFEST_FILE}: the model cannot be built for the samples {saved.sample.to_json()}: "
            f"{type(error).__name__}: {error}"
        ) from error
    restore_model(saved, model, file)
    return Trained(
        folder=run_of(saved.folder),
        config=config,
        task=chosen,
        saved=saved,
        file=file,
        model=model.eval(),
    )


def load_model(path: str | Path, checkpoint: str = "best", task: Task | None = None) -> nn.Module:
    """The trained model of a run, in evaluation mode. One process, no MPI. Arguments and errors are those of
    `open_trained`:

    Args:
        path: a run's folder, or one checkpoint's.
        checkpoint: `best`, `latest` or `round-N`, where `path` is a run; `ema-best` and so on for the moving
            average that it holds (`sync.ema`), also where `path` is a checkpoint.
        task: the task that was trained, where it was not named by the configuration.

    Raises `RunDirectoryError` for a path without this checkpoint, for a damaged one, and for that of another
    model.
    """
    return open_trained(path, checkpoint, task).model


def _find(path: Path, checkpoint: str) -> SavedCheckpoint:
    if re.fullmatch(r"round-\d+", checkpoint):
        folder = path / CHECKPOINTS / checkpoint
        if not folder.is_dir() and path.name != checkpoint:
            there = ", ".join(sorted(f.name for f in folder.parent.glob("round-*"))) or "none"
            raise RunDirectoryError(f"{path} has no checkpoint `{checkpoint}`; it has {there}.")
        return SavedCheckpoint.open(folder if folder.is_dir() else path)
    if checkpoint not in ("best", "latest"):
        raise RunDirectoryError(
            f"checkpoint = {checkpoint!r}: expected best, latest or round-N, or ema- before it."
        )
    saved = find_checkpoint(path, checkpoint)
    if saved is None:
        other = find_checkpoint(path, "latest")
        raise RunDirectoryError(
            f"{path} has no checkpoint `{checkpoint}`"
            + (
                f": the run evaluated no model. Its newest is of round {other.round}: take `latest`."
                if other is not None
                else f"; expected one in {path}/checkpoints. Resume the run."
            )
        )
    return saved

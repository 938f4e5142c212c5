"""The folder of a run: its name, its making, and what a resume goes on from."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hvd_train.atomic import replacing
from hvd_train.checkpoint import find_checkpoint
from hvd_train.config import Config, is_safe, load_config, to_toml
from hvd_train.errors import ConfigError, RunDirectoryError

CONFIG_FILE = "config.toml"
EVENTS_FILE = "events.jsonl"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Where a run lies, and the checkpoint that it goes on from, if any."""

    folder: Path
    checkpoint: Path | None


def run_name(config: Config, environ: Mapping[str, str] = os.environ) -> str:
    """`config.name`, else the Slurm job's id (ARRAYJOB_TASK for arrays), else task, date and four hex
    digits."""
    if config.name:
        return config.name
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    if "SLURM_JOB_ID" in environ:
        return environ["SLURM_JOB_ID"]
    task = Path(config.task.replace(":", "-")).name.replace(".py", "")
    task = "".join(c if is_safe(c) else "-" for c in task).strip(".")  # a file may be named as it likes
    return f"{task}-{time.strftime('%Y%m%d')}-{secrets.token_hex(2)}"


def open_run(config: Config) -> RunDirectory:
    """Makes the folder of a new run, or finds that of one to resume; writes the configuration into it.

    Not collective: for rank 0. Raises `RunDirectoryError`, or `ConfigError` for a resume without a name.
    """
    if config.resume not in ("", "auto"):
        run = _resume_from(Path(config.resume), config)
    elif config.resume == "auto" and (Path(config.runs) / _name_to_resume(config)).is_dir():
        folder = Path(config.runs) / _name_to_resume(config)
        # A run that was killed early may have no checkpoint yet, nor the folder for them.
        found = find_checkpoint(folder, "latest") if (folder / CHECKPOINTS).is_dir() else None
        run = RunDirectory(folder=folder, checkpoint=None if found is None else found.folder)
    else:
        run = RunDirectory(folder=_make(Path(config.runs) / run_name(config)), checkpoint=None)
    saved = replace(config, name=run.folder.name, resume="")
    try:
        with replacing(run.folder / CONFIG_FILE) as path:
            path.write_text(to_toml(saved))
    except OSError as error:
        raise RunDirectoryError(
            f"{run.folder}: cannot be written: {error.strerror}. Choose another --runs."
        ) from None
    return run


def _name_to_resume(config: Config) -> str:
    if not config.name and "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("resume = 'auto' needs to know which run: expected --name NAME, or a Slurm job.")
    return run_name(config)


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise RunDirectoryError(
            f"{folder} exists already; expected a new name. Go on with it by `--resume auto`, or choose "
            "another --name."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"{folder}: cannot be made: {error.strerror}. Choose another --runs."
        ) from None
    return folder


def _resume_from(path: Path, config: Config) -> RunDirectory:
    found = find_checkpoint(path, "latest")
    if found is None:
        raise RunDirectoryError(
            f"{path} has no checkpoint to go on from; start the run anew under another name."
        )
    if config.name and config.name != run_of(path).name:
        return RunDirectory(folder=_make(Path(config.runs) / config.name), checkpoint=found.folder)
    return RunDirectory(folder=run_of(path), checkpoint=found.folder)


def run_of(path: Path) -> Path:
    """The run's folder that `path`, a run or a checkpoint in it, belongs to."""
    path = path.resolve()  # `.` has no name
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def saved_config(path: Path) -> Config:
    """The configuration of the run that `path`, a run or a checkpoint in it, belongs to; its name is that of
    the folder, which may have been moved."""
    folder = run_of(path)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise RunDirectoryError(f"{path} is no run: there is no {file}. Give --resume the folder of a run.")
    return replace(load_config(file), name=folder.name)

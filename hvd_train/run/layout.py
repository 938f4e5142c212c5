"""The layout of a run's folder, and how the folder is named. Imports no torch: runs are inspected on login
nodes, too."""

from __future__ import annotations

import glob
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hvd_train.config import Config, is_safe
from hvd_train.config_file import load_config
from hvd_train.errors import ConfigError, RunDirectoryError
from hvd_train.io.sealed import parse, unseal
from hvd_train.io.user_module import absolute, split_name

CONFIG_FILE = "config.toml"
EVENTS_FILE = "events.jsonl"
REPORT_FILE = "report.html"
CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"
"""What `best` and `latest` name, with a checksum."""


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


def folder_of(config: Config) -> tuple[Path, bool]:
    """The folder of a run with this configuration, and whether it is made anew, so that it must not exist.

    Raises `ConfigError` for `resume = "auto"` where nothing names the run.
    """
    if config.resume == "auto":
        if not config.name and "SLURM_JOB_ID" not in os.environ:
            raise ConfigError(
                "resume = 'auto' needs to know which run: expected --name NAME, or a Slurm job."
            )
        folder = Path(config.runs) / run_name(config)
        return folder, not folder.is_dir()
    if config.resume:
        folder = run_of(Path(config.resume))
        return (
            (folder, False) if config.name in ("", folder.name) else (Path(config.runs) / config.name, True)
        )
    return Path(config.runs) / run_name(config), True


def exists_already(folder: Path) -> RunDirectoryError:
    """The error for a new run whose folder is there."""
    return RunDirectoryError(
        f"{folder} exists already; expected a new name. Go on with it by `--resume auto`, or choose another "
        "--name."
    )


def run_of(path: Path) -> Path:
    """The run's folder that `path`, a run or a checkpoint in it, belongs to."""
    path = path.resolve()  # `.` has no name
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def saved_config(path: Path) -> Config:
    """The configuration of the run that `path`, a run or a checkpoint in it, belongs to; see `named`."""
    folder = run_of(path)
    file = folder / CONFIG_FILE
    if not os.path.isfile(file):  # Path.is_file() fails for a name that is too long
        raise RunDirectoryError(f"{path} is not a run: there is no {file}. Give --resume a run's folder.")
    return named(load_config(file), folder)


def named(config: Config, folder: Path) -> Config:
    """With the name of the run's folder, which may have been moved; without a name where the folder was given
    one that a run's may not be."""
    try:
        return replace(config, name=folder.name)
    except ConfigError:
        return replace(config, name="")


def anchored(config: Config) -> Config:
    """The same with absolute paths: of the runs, the data, the initial weights, the run whose periods are
    replayed, and the files of task and sinks. So a run's own configuration can be used from any folder."""
    data, init, replayed = config.data, config.model.init, config.sync.replay_periods
    return replace(
        config,
        runs=os.path.abspath(config.runs),
        task=absolute(config.task),
        model=replace(config.model, init=os.path.abspath(init) if init else ""),
        sync=replace(config.sync, replay_periods=os.path.abspath(replayed) if replayed else ""),
        record=replace(config.record, sinks=tuple(map(absolute, config.record.sinks))),
        data=replace(
            data,
            path=absolute_data(data.path),
            validation=absolute_data(data.validation)
            if isinstance(data.validation, str) and data.validation
            else data.validation,
        ),
    )


def absolute_data(path: str) -> str:
    """What `data.path` names, with an absolute path; the name of a module stays. Where it is a pattern the
    folder that it starts from must not become a part of it."""
    if path == "digits" or (split_name(path) and not os.path.exists(path)):
        return absolute(path)
    if os.path.isabs(path) or os.path.exists(path):
        return os.path.abspath(path)
    return os.path.join(glob.escape(os.getcwd()), path)


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint: `round-120`."""
    return re.fullmatch(r"round-(0|[1-9][0-9]{0,18})", name) is not None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, complete or not, in no order."""
    return [f for f in folder.glob("round-*") if is_checkpoint_name(f.name)]


def round_of(checkpoint: Path) -> int:
    """The rounds after which it was written."""
    return int(checkpoint.name.removeprefix("round-"))


def follow(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `best` or `latest` in a checkpoints folder names, whether it is there or not; None
    if nothing is named.

    index.json has precedence: it has a checksum, and is written first. Runs of earlier versions have none.
    """
    try:
        name = unseal(parse(_text(folder / INDEX_FILE).encode()))[pointer]
    except (ValueError, KeyError):
        name = line_of(folder, pointer)
    return folder / name if isinstance(name, str) and is_checkpoint_name(name) else None


def line_of(folder: Path, pointer: str) -> str:
    """The line in the file `best` or `latest`; empty if it cannot be read."""
    return _text(folder / pointer).strip()


def _text(file: Path) -> str:
    """The text of a small file; empty if it cannot be read, or is not a regular file."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""


def checkpoint_of(run: Path, pointer: str) -> Path | None:
    """The checkpoint that `best` or `latest` names in a run's folder; for `latest`, where what it names is
    not there, the newest complete one; None if there is none yet."""
    folder = run / CHECKPOINTS
    found = follow(folder, pointer)
    if found is not None and (pointer == "best" or found.is_dir()):
        return found
    if pointer == "best":
        return None
    complete = [f for f in checkpoints_in(folder) if (f / MANIFEST_FILE).is_file()]
    return max(complete, key=round_of, default=None)

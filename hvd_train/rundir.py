"""The folder of a run: its making, and what a resume goes on from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hvd_train.atomic import replacing
from hvd_train.checkpoint import find_checkpoint
from hvd_train.config import Config, to_toml
from hvd_train.errors import RunDirectoryError
from hvd_train.run_files import CHECKPOINTS, CONFIG_FILE, exists_already, folder_of


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Where a run lies, and the checkpoint that it goes on from, if any."""

    folder: Path
    checkpoint: Path | None


def open_run(config: Config) -> RunDirectory:
    """Makes the folder of a new run, or finds that of one to resume; writes the configuration into it.

    Not collective: for rank 0. Raises `RunDirectoryError`, or `ConfigError` for a resume without a name.
    """
    folder, is_new = folder_of(config)
    found = None
    if config.resume not in ("", "auto"):
        found = find_checkpoint(Path(config.resume), "latest")
        if found is None:
            raise RunDirectoryError(
                f"{config.resume} has no checkpoint to go on from; start the run anew under another name."
            )
    elif (folder / CHECKPOINTS).is_dir() and not is_new:
        # A run that was killed early may have no checkpoint yet, nor the folder for them.
        found = find_checkpoint(folder, "latest")
    if is_new:
        _make(folder)
    run = RunDirectory(folder=folder, checkpoint=None if found is None else found.folder)
    saved = replace(config, name=run.folder.name, resume="")
    try:
        with replacing(run.folder / CONFIG_FILE) as path:
            path.write_text(to_toml(saved))
    except OSError as error:
        raise RunDirectoryError(
            f"{run.folder}: cannot be written: {error.strerror}. Choose another --runs."
        ) from None
    return run


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise exists_already(folder) from None
    except OSError as error:
        raise RunDirectoryError(
            f"{folder}: cannot be made: {error.strerror}. Choose another --runs."
        ) from None

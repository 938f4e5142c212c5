"""The folder of a run: its creation, its claim, and the checkpoint that a resume continues from."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hvd_train.config import Config
from hvd_train.config_file import to_toml
from hvd_train.errors import RunDirectoryError, RunTakenOver, UserError
from hvd_train.io.atomic import replacing
from hvd_train.run.claim import Claim, Ownership, forget, take
from hvd_train.run.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    EVENTS_FILE,
    anchored,
    exists_already,
    folder_of,
    named,
    saved_config,
)
from hvd_train.run.saved_checkpoint import find_checkpoint, newest_whole


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Where a run is, and the checkpoint that it continues from, if any. Both paths are absolute: a task may
    change the working directory."""

    folder: Path
    is_new: bool
    """Whether this start has made the folder."""
    checkpoint: Path | None
    before: Config | None = None
    """The configuration that the run of `checkpoint` had so far, where it can be read."""
    left_out: tuple[str, ...] = ()
    """A line for each newer checkpoint that is not whole, where `resume = "auto"` went on from another."""


def open_run(config: Config) -> tuple[RunDirectory, Claim]:
    """Makes the folder of a new run, or finds that of one to resume; claims it for this job.

    Not collective: for rank 0, which releases the claim when the training has ended. A new run gets its
    configuration at once; one that goes on by `write_config`, when it is known to fit. Raises
    `RunDirectoryError`, or `ConfigError` for a resume without a name.
    """
    folder, is_new = folder_of(config)
    folder = folder.absolute()
    if config.resume not in ("", "auto"):
        _to_go_on_from(config.resume)  # nothing is written where there is no run, and no name is taken
    if is_new and not _make(folder):
        if config.resume != "auto":
            raise exists_already(folder)
        is_new = False  # another job has made it since
    with _writing_to(folder):
        claim = take(folder)
    try:
        if claim.took_over:
            with _writing_to(folder):
                _shut_out(folder)
        return _find(config, folder, is_new, claim), claim
    except BaseException:
        claim.release()
        raise


def _find(config: Config, folder: Path, is_new: bool, claim: Claim) -> RunDirectory:
    found: Path | None = None
    left_out: tuple[str, ...] = ()
    if config.resume not in ("", "auto"):
        found = _to_go_on_from(config.resume)
    elif (folder / CHECKPOINTS).is_dir() and not is_new:
        # A run that was killed early may have no checkpoint yet, nor the folder for them.
        found, left_out = newest_whole(folder)
    if is_new or found is None:
        write_config(config, folder, claim)
    if found is None:
        return RunDirectory(folder=folder, is_new=is_new, checkpoint=None, left_out=left_out)
    before = None
    with contextlib.suppress(UserError):
        before = saved_config(found)
    return RunDirectory(
        folder=folder, is_new=is_new, checkpoint=found.absolute(), before=before, left_out=left_out
    )


def _to_go_on_from(path: str) -> Path:
    """The checkpoint that `--resume` names. Raises `RunDirectoryError` for none, or one that is damaged."""
    saved = find_checkpoint(Path(path), "latest")
    if saved is None:
        raise RunDirectoryError(
            f"{path} has no checkpoint to go on from; start the run anew under another name."
        )
    saved.require_whole()
    return saved.folder


def write_config(config: Config, folder: Path, claim: Ownership) -> None:
    """Writes the configuration into the run's folder. Not collective: for rank 0."""
    saved = replace(named(anchored(config), folder), resume="")
    with _writing_to(folder), replacing(folder / CONFIG_FILE) as path:
        path.write_text(to_toml(saved), encoding="utf-8")
        claim.check()


def discard(folder: Path, claim: Ownership) -> None:
    """Removes the folder of a new run that was refused before its first step, so that its name is free; not
    if there is more in it than that. Not collective: for rank 0, which holds the claim."""
    with contextlib.suppress(OSError, RunTakenOver):
        if (folder / EVENTS_FILE).stat().st_size == 0:
            claim.check()
            if (folder / CHECKPOINTS).is_dir():
                (folder / CHECKPOINTS).rmdir()  # not where it holds any: all of the folder stays then
            (folder / EVENTS_FILE).unlink()
            (folder / CONFIG_FILE).unlink()
            forget(folder)
            folder.rmdir()


def _make(folder: Path) -> bool:
    """Creates the folder; False if it exists."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunDirectoryError(
            f"{folder}: cannot be created: {error.strerror}. Choose another --runs."
        ) from None
    return True


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{folder}: cannot be written: {error.strerror}. Choose another --runs."
        ) from None


def _shut_out(folder: Path) -> None:
    """Keeps the holder of the claim before from changing the run, should it continue between its last check
    of the claim and what it was about to do. What it has prepared is removed before it can rename it, and
    what it appends to the log goes to an unlinked file."""
    for prepared in (*folder.glob(".*.tmp"), *(folder / CHECKPOINTS).glob(".*.tmp")):
        # Renamed first: a folder that is removed file by file could be published half empty meanwhile.
        rubbish = prepared.with_name(f".{secrets.token_hex(4)}.rubbish")
        with contextlib.suppress(FileNotFoundError):
            os.rename(prepared, rubbish)
            shutil.rmtree(rubbish) if rubbish.is_dir() else rubbish.unlink()
    log = folder / EVENTS_FILE
    if log.exists():
        with replacing(log) as copy:
            shutil.copyfile(log, copy)

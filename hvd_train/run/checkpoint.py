"""Checkpoints: what a run needs to go on, in tensors and JSON, complete or not there at all.

    checkpoints/round-120/model.safetensors            parameters and buffers of the model
                          ema.safetensors              the same with their moving average, where there is one
                          rank-00000.safetensors ...   the state of each rank; rank 0's also holds what is
                                                       the same on all
                          manifest.json                sizes and checksums, its own included; written last
    checkpoints/best, latest                           one line each: the folder's name
                index.json                             the same two names, with a checksum

All ranks write at the same time into a folder with a temporary name, which rank 0 renames when every
file is on disk. `saved_checkpoint` reads them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import xxhash
from torch import nn

from hvd_train.comm.agree import attempt, together
from hvd_train.comm.base import Communicator
from hvd_train.config import CheckpointConfig
from hvd_train.data.format import SampleSpec
from hvd_train.errors import HvdTrainError, RunDirectoryError, RunTakenOver
from hvd_train.io import atomic
from hvd_train.io.atomic import replacing, sync
from hvd_train.io.sealed import seal
from hvd_train.io.stateful import Stateful
from hvd_train.liveness import phase
from hvd_train.record.reports import CheckpointReport, FaultReport, Recorder
from hvd_train.run.claim import NoClaim, Ownership
from hvd_train.run.layout import INDEX_FILE, MANIFEST_FILE, checkpoints_in, follow, round_of
from hvd_train.run.model_state import saved_state
from hvd_train.run.packing import pack, require_savable, split
from hvd_train.run.saved_checkpoint import EMA_FILE, MODEL_FILE, SCHEMA, rank_file

T = TypeVar("T")


class SecondModel(Protocol):
    """Other values of the model, which are saved as well."""

    averages: int
    """0: there are none. The same on every rank."""

    def shown(self) -> AbstractContextManager[None]:
        """The model has them inside. Collective."""


class NoSecondModel:
    """There are none."""

    averages = 0

    def shown(self) -> AbstractContextManager[None]:
        """Changes nothing."""
        return contextlib.nullcontext()


class _NotSaved(HvdTrainError):
    """A part of a save failed on a rank; the message names it, and every rank raises it."""

    agreed = True


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """The state of this rank after some rounds, as the bytes of its files by name."""

    rounds: int
    files: Mapping[str, bytes]


@dataclass(kw_only=True)
class Checkpoints:
    """Writes the checkpoints of a run; keeps the newest few and the best.

    `parts` are what survives a restart, by name, each with the state of this rank; those named in
    `shared` are the same on every rank and written by rank 0 alone.
    """

    folder: Path
    """`checkpoints` in the run's folder."""
    comm: Communicator
    config: CheckpointConfig
    model: nn.Module
    parts: Mapping[str, Stateful]
    shared: frozenset[str]
    sample: SampleSpec
    """What the model was built for."""
    recorder: Recorder
    ema: SecondModel = field(default_factory=NoSecondModel)
    """The moving average of the model."""
    claim: Ownership = field(default_factory=NoClaim)
    """Of this job to the run's folder; rank 0 checks it before it changes anything there."""
    failure: str = field(default="", init=False)
    """Why the last attempt to save failed; empty if it did not."""
    _best: _Packed | None = field(default=None, init=False)
    """The best model so far, if it could not be written: kept until there is room for it."""
    _written: int = field(default=0, init=False)
    """Rounds of the newest checkpoint that this process wrote."""

    def prepare(self) -> None:
        """Finds what would keep a checkpoint from being written. Collective, before the first step.

        Raises `TaskError` for state that cannot be saved, `RunDirectoryError` for a folder that a rank cannot
        write; on every rank.
        """
        phase("set-up")
        together(self.comm, self._require_savable)
        probe = self.folder / ".probe.tmp"
        try:
            self.together(lambda: self._begin(probe) if self.comm.rank == 0 else None)
            self.together(lambda: _write(probe / rank_file(self.comm.rank), b"a checkpoint"))
        finally:
            if self.comm.rank == 0:
                shutil.rmtree(probe, ignore_errors=True)

    def _require_savable(self) -> None:
        tensors, plain = saved_state(self.model)
        require_savable({**tensors, **plain}, "the model")
        for name, part in self.parts.items():
            require_savable(part.state_dict(), name)

    def together(self, action: Callable[[], T]) -> T:
        """Writes into the folder before the first step, on every rank. Raises `RunDirectoryError` on all of
        them where one cannot. Collective."""

        def write() -> T:
            try:
                return action()
            except OSError as error:
                raise RunDirectoryError(
                    f"{self.folder}: a checkpoint cannot be written there: {error}. Make room, or choose "
                    "another --runs, which every rank can write."
                ) from None

        return together(self.comm, write)

    def after_round(self, rounds: int, stop_reason: str, improved: bool, evaluated: bool = False) -> None:
        """Saves at the end, at the best error so far, and every so many rounds. Collective.

        A checkpoint that cannot be written is reported and training goes on. The best one is then kept in
        memory, and written after a later evaluation or checkpoint, as soon as there is room.
        """
        every = self.config.every_rounds
        if improved:
            self._best = None  # there is a better one now
        if stop_reason:
            reason = "interrupted" if stop_reason == "interrupted" else "end"
        elif improved:
            reason = "best"
        else:
            reason = "every" if every and rounds % every == 0 else ""
        if reason:
            self.save(rounds, reason, improved)
        if self._best is not None and self._best.rounds != rounds and (reason or evaluated):
            self._write_best()

    def save(self, rounds: int, reason: str, best: bool) -> None:
        """Writes the state after `rounds` rounds. Collective.

        Raises `RunTakenOver`, on every rank, if another job has taken the run over.
        """
        phase("checkpoint")
        packed = None
        try:
            packed = self._everywhere(lambda: self._pack(rounds))
            if self.ema.averages:
                packed = self._with_ema(packed)
            self._save(packed, reason, best, latest=True)
            self.failure = ""
            return
        except _NotSaved as error:
            self.failure = str(error)
        if best:
            self._best = packed
        kept = " The best model is kept in memory until then." if best and packed is not None else ""
        message = (
            f"the checkpoint was not saved: {self.failure}. The last good one stays; make room for the "
            f"next.{kept}"
        )
        self.recorder.report(
            FaultReport(round=rounds, kind="checkpoint_not_saved", ranks=(), message=message)
        )

    def _write_best(self) -> None:
        """Tries again to write the best model so far. It is the latest, too, if none was written since."""
        best = self._best
        assert best is not None
        with contextlib.suppress(_NotSaved):
            self._save(best, "best", best=True, latest=best.rounds > self._written)
            self._best = None

    def _save(self, packed: _Packed, reason: str, best: bool, latest: bool) -> None:
        """Writes a packed state. Collective. Raises `_NotSaved`, on every rank, and leaves nothing then."""
        began = time.perf_counter()
        name = f"round-{packed.rounds}"
        temporary = self.folder / f".{name}.tmp"
        names = {"latest"} if latest else set()
        names |= {"best"} if best else set()
        try:
            self._everywhere(lambda: self._begin(temporary) if self.comm.rank == 0 else None)
            self._everywhere(lambda: _write_files(temporary, packed.files))
            mine = {n: _entry(content) for n, content in packed.files.items()}
            files = {n: entry for theirs in self.comm.allgather(mine) for n, entry in theirs.items()}
            self._everywhere(
                lambda: self._publish(temporary, packed.rounds, files, names) if self.comm.rank == 0 else None
            )
        except _NotSaved:
            with contextlib.suppress(_NotSaved):
                self._everywhere(lambda: self._remove(temporary) if self.comm.rank == 0 else None)
            raise
        if latest:
            self._written = packed.rounds
        self.recorder.report(
            CheckpointReport(
                round=packed.rounds,
                path=str(self.folder / name),
                reason=reason,
                num_bytes=sum(entry["num_bytes"] for entry in files.values()),
                seconds=time.perf_counter() - began,
            )
        )

    def _everywhere(self, action: Callable[[], T]) -> T:
        """Runs a part of a save on every rank; returns this rank's result. Raises `_NotSaved`, on every rank,
        where it failed on any. Collective."""

        def part() -> T:
            try:
                return action()
            except RunTakenOver:
                raise
            except (OSError, MemoryError, RuntimeError, HvdTrainError) as error:
                where = f"rank {self.comm.rank} ({self.comm.host})"
                raise _NotSaved(f"{where}: {error or 'no memory'}") from error

        tried = attempt(self.comm, part)
        failures = [failure for failure in tried.failures if failure is not None]
        for failure in failures:
            if failure.kind is RunTakenOver:
                raise RunTakenOver(failure.text) from tried.cause
        if tried.why(_NotSaved):
            raise _NotSaved(failures[0].text) from tried.cause
        return cast("T", tried.value)

    def _remove(self, temporary: Path) -> None:
        self.claim.check()  # another job's has the same name
        shutil.rmtree(temporary, ignore_errors=True)

    def _begin(self, temporary: Path) -> None:
        self.claim.check()
        for torn in self.folder.glob(".round-*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _pack(self, rounds: int) -> _Packed:
        tensors: dict[str, Any] = {}
        plain: dict[str, dict[str, Any]] = {}
        for name, part in self.parts.items():
            if name in self.shared and self.comm.rank != 0:
                continue
            state = part.state_dict()
            require_savable(state, name)
            own, plain[name] = split(state)
            tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
        files = {rank_file(self.comm.rank): pack(tensors, plain)}
        if self.comm.rank == 0:
            files[MODEL_FILE] = pack(*saved_state(self.model))
        return _Packed(rounds=rounds, files=files)

    def _with_ema(self, packed: _Packed) -> _Packed:
        """With the file of the moving average too. Collective."""
        with self.ema.shown():
            more = self._everywhere(
                lambda: {EMA_FILE: pack(*saved_state(self.model))} if self.comm.rank == 0 else {}
            )
        return replace(packed, files={**packed.files, **more})

    def _publish(self, temporary: Path, rounds: int, files: Mapping[str, Any], names: set[str]) -> None:
        manifest = {
            "schema": SCHEMA,
            "round": rounds,
            "world_size": self.comm.size,
            "sample": self.sample.to_json(),
            "files": dict(sorted(files.items())),
        }
        _write(temporary / MANIFEST_FILE, seal(manifest).encode())
        # A job that takes over removes what the one before has prepared: after this check that is published
        # before its removal, or not at all.
        self.claim.check()
        put(temporary, self.folder / f"round-{rounds}")
        self.name(rounds, names)
        self._prune()

    def name(self, rounds: int | None, names: set[str]) -> None:
        """Lets `best` or `latest`, or both, name the checkpoint of these rounds; None: no checkpoint. Not
        collective. Raises OSError."""
        index = {p: f.name if (f := follow(self.folder, p)) else None for p in ("best", "latest")}
        index |= dict.fromkeys(names, None if rounds is None else f"round-{rounds}")
        self.claim.check()
        _write(self.folder / INDEX_FILE, seal(index).encode())
        for pointer in sorted(names):
            if rounds is None:
                (self.folder / pointer).unlink(missing_ok=True)
            else:
                _write(self.folder / pointer, f"round-{rounds}\n".encode())

    def _prune(self) -> None:
        """Removes all but the last few and those that are named. Those of later rounds than `latest` were
        undone by a resume from before them."""
        named = self.kept()
        found = sorted(checkpoints_in(self.folder), key=round_of)
        newest = Path(named.get("latest", ""))
        if newest not in found:  # it was removed by hand
            return
        end = found.index(newest) + 1
        for folder in (*found[: max(0, end - self.config.keep)], *found[end:]):
            if str(folder) not in named.values():
                shutil.rmtree(folder, ignore_errors=True)

    def kept(self) -> dict[str, str]:
        """The folders that `best` and `latest` name, where they exist. Not collective."""
        found = {pointer: follow(self.folder, pointer) for pointer in ("best", "latest")}
        return {p: str(f) for p, f in found.items() if f is not None and (f / MANIFEST_FILE).is_file()}

    def missing(self, rounds: int, stop_reason: str, best_round: int | None) -> str:
        """What a run that ends after `rounds` rounds should have left on disk and has not; empty if all is
        there. Collective.

        Args:
            best_round: of the best model; None if nothing was evaluated. After an interruption it may be
                missing: the run goes on.
        """
        # Rank 0's view of the folder counts: on a network file system other ranks may see an older state.
        mine = self._missing(rounds, stop_reason, best_round) if self.comm.rank == 0 else ""
        return self.comm.broadcast(mine)

    def _missing(self, rounds: int, stop_reason: str, best_round: int | None) -> str:
        there = {pointer: round_of(Path(folder)) for pointer, folder in self.kept().items()}
        lost = []
        if there.get("latest") != rounds:
            lost.append(f"the model of the end (round {rounds})")
        if best_round not in (None, there.get("best")) and stop_reason != "interrupted":
            lost.append(f"the best model (round {best_round})")
        if not lost:
            return ""
        on_disk = ", ".join(f"{p} is of round {r}" for p, r in sorted(there.items())) or "no checkpoint"
        reason = f": {self.failure}" if self.failure else ""
        return f"{' and '.join(lost)} could not be saved{reason}. On disk: {on_disk}."


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        atomic.write(temporary, content)


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        _write(folder / name, content)


def _entry(content: bytes) -> dict[str, Any]:
    return {"num_bytes": len(content), "xxh3_64": xxhash.xxh3_64_hexdigest(content)}


def put(temporary: Path, final: Path) -> None:
    """Renames a complete folder to its final name. One that has that name, from rounds that are repeated,
    stays until then. Raises OSError."""
    old = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(temporary, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)

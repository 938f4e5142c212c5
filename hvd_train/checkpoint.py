"""Checkpoints: what a run needs to go on, in tensors and JSON, complete or not there at all.

    checkpoints/round-120/model.safetensors            parameters and buffers of the model
                          rank-00000.safetensors ...   the state of each rank; rank 0's also holds what is
                                                       the same on all
                          manifest.json                sizes and checksums; written last
    checkpoints/best, latest                           one line each: the folder's name

All ranks write at the same time into a folder with a temporary name, which rank 0 renames when every
file is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from hvd_train.atomic import replacing, sync
from hvd_train.claim import NoClaim, Ownership
from hvd_train.comm.base import Communicator
from hvd_train.config import CheckpointConfig
from hvd_train.errors import RunDirectoryError, RunTakenOver
from hvd_train.liveness import phase
from hvd_train.model_state import saved_state
from hvd_train.record.reports import CheckpointReport, FaultReport, Recorder
from hvd_train.run_files import CHECKPOINTS, MANIFEST_FILE, checkpoint_of, checkpoints_in, follow, round_of
from hvd_train.stateful import Stateful

SCHEMA = 1
MODEL_FILE = "model.safetensors"


def rank_file(rank: int) -> str:
    """The name of the file with the state of a rank."""
    return f"rank-{rank:05d}.safetensors"


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
    sample: Mapping[str, Any]
    """The sample specification as JSON: what the model was built for."""
    recorder: Recorder
    claim: Ownership = field(default_factory=NoClaim)
    """Of this job to the run's folder; rank 0 looks at it before anything there changes."""
    failure: str = field(default="", init=False)
    """Why the last attempt to save failed; empty if it did not."""

    def after_round(self, rounds: int, stop_reason: str, improved: bool) -> None:
        """Saves at the end, at the best error so far, and every so many rounds. Collective.

        A checkpoint that cannot be written is reported and training goes on; raises `RunDirectoryError`, on
        every rank, if the run ends and none could be written.
        """
        every = self.config.every_rounds
        if stop_reason:
            self.save(rounds, "interrupted" if stop_reason == "interrupted" else "end", improved)
        elif improved:
            self.save(rounds, "best", best=True)
        elif every and rounds % every == 0:
            self.save(rounds, "every", best=False)
        # Rank 0's look at the folder counts: on a network file system the others may see an older one.
        if stop_reason and self.failure and not self.comm.broadcast(self.kept()):
            error = RunDirectoryError(f"no checkpoint could be saved: {self.failure}")
            error.agreed = True
            raise error

    def save(self, rounds: int, reason: str, best: bool) -> None:
        """Writes the state after `rounds` rounds. Collective.

        Raises `RunTakenOver`, on every rank, if another job has taken the run over.
        """
        began = time.perf_counter()
        phase("checkpoint")
        name = f"round-{rounds}"
        temporary = self.folder / f".{name}.tmp"
        self._everywhere(lambda: self._begin(temporary) if self.comm.rank == 0 else None)
        written = self._everywhere(lambda: self._write_files(temporary)) if not self.failure else []
        if not self.failure:
            files = {name: entry for entries in written for name, entry in entries.items()}
            self._everywhere(
                lambda: self._publish(temporary, name, files, best) if self.comm.rank == 0 else None
            )
        if self.failure:
            self._report_failure(rounds, temporary)
            return
        num_bytes = sum(entry["num_bytes"] for entry in files.values())
        seconds = time.perf_counter() - began
        self.recorder.report(
            CheckpointReport(
                round=rounds,
                path=str(self.folder / name),
                reason=reason,
                num_bytes=num_bytes,
                seconds=seconds,
            )
        )

    def _everywhere(self, action: Any) -> list[Any]:
        """Runs a part of a save on each rank and gathers what they return. Where it failed on any, every
        rank has the reason in `failure`."""
        try:
            mine: tuple[Any, str] = (action(), "")
        except OSError as error:
            mine = (None, f"rank {self.comm.rank} ({self.comm.host}): {error}")
        except RunTakenOver as error:
            mine = (error, "")
        results = self.comm.allgather(mine)
        for value, _ in results:
            if isinstance(value, RunTakenOver):
                raise value
        self.failure = next((failure for _, failure in results if failure), "")
        return [value for value, _ in results]

    def _begin(self, temporary: Path) -> None:
        self.claim.check()
        for torn in self.folder.glob(".round-*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _write_files(self, temporary: Path) -> dict[str, dict[str, Any]]:
        files = {rank_file(self.comm.rank): self._pack_parts()}
        if self.comm.rank == 0:
            tensors, plain = saved_state(self.model)
            metadata = {"state": json.dumps(plain)} if plain else None
            files[MODEL_FILE] = save(_detached(tensors), metadata=metadata)
        for name, content in files.items():
            with replacing(temporary / name) as path:
                path.write_bytes(content)
        return {
            name: {"num_bytes": len(c), "xxh3_64": xxhash.xxh3_64_hexdigest(c)} for name, c in files.items()
        }

    def _pack_parts(self) -> bytes:
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        for part, stateful in self.parts.items():
            if part in self.shared and self.comm.rank != 0:
                continue
            plain[part] = {}
            for key, value in stateful.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[f"{part}/{key}"] = value
                else:
                    plain[part][key] = value
        return save(_detached(tensors), metadata={"state": json.dumps(plain)})

    def _publish(self, temporary: Path, name: str, files: Mapping[str, Any], best: bool) -> None:
        manifest = {
            "schema": SCHEMA,
            "round": int(name.removeprefix("round-")),
            "world_size": self.comm.size,
            "sample": self.sample,
            "files": dict(sorted(files.items())),
        }
        with replacing(temporary / MANIFEST_FILE) as path:
            path.write_text(json.dumps(manifest, indent=2) + "\n")
        final = self.folder / name
        # What a job that was taken over has prepared is removed by the next one, after this look: it can be
        # published before, or not at all.
        self.claim.check()
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(self.folder)
        for pointer in ("latest", "best") if best else ("latest",):
            with replacing(self.folder / pointer) as path:
                path.write_text(name + "\n")
                self.claim.check()
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        """Removes all but the last few and those that are named. Those of later rounds than `newest` were
        undone by a resume from before them."""
        named = set(self.kept().values())
        found = sorted(checkpoints_in(self.folder), key=round_of)
        end = found.index(newest) + 1
        for folder in (*found[: max(0, end - self.config.keep)], *found[end:]):
            if str(folder) not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def kept(self) -> dict[str, str]:
        """The folders that `best` and `latest` name, where they exist. Not collective."""
        found = {pointer: follow(self.folder, pointer) for pointer in ("best", "latest")}
        return {pointer: str(folder) for pointer, folder in found.items() if folder is not None}

    def _report_failure(self, rounds: int, temporary: Path) -> None:
        failure = self.failure
        self._everywhere(lambda: self._remove(temporary) if self.comm.rank == 0 else None)
        self.failure = failure
        message = f"the checkpoint was not saved: {failure}. The last good one stays; make room for the next."
        self.recorder.report(
            FaultReport(round=rounds, kind="checkpoint_not_saved", ranks=(), message=message)
        )

    def _remove(self, temporary: Path) -> None:
        self.claim.check()  # another job's has the same name
        shutil.rmtree(temporary, ignore_errors=True)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as the format demands: the live ones lie in one flat buffer."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint on disk, its manifest read. Not collective."""

    folder: Path
    round: int
    world_size: int
    sample: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> SavedCheckpoint:
        """Raises `RunDirectoryError` if it is not a checkpoint, or not one of this program's version."""
        path = folder / MANIFEST_FILE
        try:
            manifest = json.loads(path.read_text())
            version = manifest.get("schema")
        except (OSError, ValueError, AttributeError) as error:
            raise RunDirectoryError(
                f"{path}: cannot be read: {error}. Expected a checkpoint's folder, such as "
                "RUN/checkpoints/round-120."
            ) from None
        if version != SCHEMA:
            raise RunDirectoryError(
                f"{path}: schema {version!r}; this program reads {SCHEMA}. Use the version that wrote it."
            )
        try:
            return cls(folder=folder, **{f.name: manifest[f.name] for f in fields(cls) if f.name != "folder"})
        except KeyError as error:
            raise RunDirectoryError(f"{path}: damaged: {error} is missing. Go on from another one.") from None

    def model(self) -> dict[str, Any]:
        """The model's state by name: tensors, and the plain values of `get_extra_state`."""
        tensors, plain = self._read(MODEL_FILE)
        return {**tensors, **plain}

    def parts(self, rank: int) -> dict[str, dict[str, Any]]:
        """The state of every part for a rank: what is shared from rank 0's file, the rest from the rank's
        own; where there were fewer ranks, from that of rank modulo their number."""
        parts = _unpack(*self._read(rank_file(0)))
        own = rank % self.world_size
        return parts if own == 0 else {**parts, **_unpack(*self._read(rank_file(own)))}

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.folder / name
        expected = self.files.get(name, {})
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunDirectoryError(
                f"{path}: cannot be read: {error}. Go on from another checkpoint."
            ) from None
        if xxhash.xxh3_64_hexdigest(content) != expected.get("xxh3_64"):
            raise RunDirectoryError(
                f"{path}: damaged: {len(content)} bytes whose checksum differs from the manifest's "
                f"({expected.get('num_bytes')} bytes). Go on from another checkpoint."
            )
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return load(content), json.loads(header.get("__metadata__", {}).get("state", "{}"))
        except (SafetensorError, ValueError) as error:
            raise RunDirectoryError(f"{path}: not in the safetensors format: {error}.") from None


def _unpack(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    parts = {part: dict(values) for part, values in plain.items()}
    for name, tensor in tensors.items():
        part, _, key = name.partition("/")
        parts[part][key] = tensor
    return parts


def find_checkpoint(path: Path, pointer: str) -> SavedCheckpoint | None:
    """The checkpoint at `path`: its own folder, or the one that `pointer` names in a run's folder.

    None if a run's folder has none yet. Raises `RunDirectoryError` if it is neither.
    """
    if (path / MANIFEST_FILE).is_file():
        return SavedCheckpoint.open(path)
    if not (path / CHECKPOINTS).is_dir():
        raise RunDirectoryError(
            f"{path}: neither a run's folder nor a checkpoint; expected RUN or RUN/checkpoints/round-N."
        )
    found = checkpoint_of(path, pointer)
    return None if found is None else SavedCheckpoint.open(found)

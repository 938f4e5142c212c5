"""Reading checkpoints: which there are, which are whole, and what they hold. Not collective.

Any damage is a `RunDirectoryError`, which names another checkpoint of the run that is whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from torch import Tensor

from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import RunDirectoryError
from hvd_train.io.output import warn
from hvd_train.io.sealed import parse, unseal
from hvd_train.io.stateful import Count
from hvd_train.run.layout import (
    CHECKPOINTS,
    INDEX_FILE,
    MANIFEST_FILE,
    checkpoint_of,
    checkpoints_in,
    follow,
    is_checkpoint_name,
    line_of,
    round_of,
)
from hvd_train.run.packing import unpack

SCHEMA = 2
"""1 had no checksum of the manifest itself, and is read as well."""
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
"""The model with its moving average in place of the parameters; there where `sync.ema` is on."""

_OTHER = "Expected a checkpoint's folder, such as RUN/checkpoints/round-120."


def rank_file(rank: int) -> str:
    """The name of the file with the state of a rank."""
    return f"rank-{rank:05d}.safetensors"


class File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One file of a checkpoint, as its manifest lists it."""

    num_bytes: Count
    xxh3_64: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """manifest.json of a checkpoint."""

    schema: int = SCHEMA
    round: Count
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    sample: SampleSpec
    files: dict[str, File]


class _Damaged(Exception):
    """What is wrong with a checkpoint, without the advice that the user gets with it."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint on disk, its manifest read."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> SavedCheckpoint:
        """Raises `RunDirectoryError` if it is not a checkpoint, or not one that this version reads."""
        try:
            return cls(folder=folder, manifest=_read_manifest(folder))
        except _Damaged as error:
            raise _refusal(folder, error) from None

    @property
    def round(self) -> int:
        """Rounds done when it was written."""
        return self.manifest.round

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return self.manifest.world_size

    @property
    def sample(self) -> SampleSpec:
        """What the model was built for."""
        return self.manifest.sample

    def require_whole(self) -> None:
        """Reads every file and compares it with its checksum. Raises `RunDirectoryError`."""
        for name in self.manifest.files:
            self._read(name)

    @property
    def has_ema(self) -> bool:
        """Whether it holds a moving average of the model."""
        return EMA_FILE in self.manifest.files

    def model(self, name: str = MODEL_FILE) -> dict[str, Any]:
        """The model's state by name: tensors, and what else its `state_dict` gave. `name`: of the file."""
        tensors, extra = self._read(name)
        if not isinstance(extra, dict) or extra.keys() & tensors.keys():
            raise self.refusal(f"{name}: the state that is not tensors is {extra!r}")
        return {**tensors, **extra}

    def parts(self, rank: int) -> dict[str, dict[str, Any]]:
        """The state of every part for a rank: what is shared from rank 0's file, the rest from the rank's
        own; where there were fewer ranks, from that of rank modulo their number."""
        parts = self._parts(rank_file(0))
        own = rank % self.world_size
        return parts if own == 0 else {**parts, **self._parts(rank_file(own))}

    def part(self, rank: int, name: str) -> dict[str, Any]:
        """The state of one part of a rank that wrote it."""
        parts = self._parts(rank_file(rank))
        if name not in parts:
            raise self.refusal(f"{rank_file(rank)}: there is no state of {name}")
        return parts[name]

    def _parts(self, name: str) -> dict[str, dict[str, Any]]:
        tensors, plain = self._read(name)
        try:
            parts = msgspec.convert(plain, dict[str, dict[str, Any]])
        except msgspec.ValidationError as error:
            raise self.refusal(f"{name}: {error}") from None
        for path, tensor in tensors.items():
            part, _, key = path.partition("/")
            if key in parts.setdefault(part, {}):
                raise self.refusal(f"{name}: `{path}` is there twice")
            parts[part][key] = tensor
        return parts

    def file(self, name: str) -> Path:
        """The path of one of its files, which has its checksum. Raises `RunDirectoryError`."""
        try:
            self._checked(name)
        except _Damaged as error:
            raise _refusal(self.folder, error) from None
        return self.folder / name

    def _checked(self, name: str) -> bytes:
        content = _content(self.folder / name)
        file = self.manifest.files[name]
        if len(content) != file.num_bytes or xxhash.xxh3_64_hexdigest(content) != file.xxh3_64:
            raise _Damaged(
                f"{name}: damaged: {len(content)} bytes whose checksum differs from the manifest's "
                f"({file.num_bytes} bytes)."
            )
        return content

    def _read(self, name: str) -> tuple[dict[str, Tensor], Any]:
        try:
            content = self._checked(name)
            try:
                return unpack(content)
            except ValueError as error:
                raise _Damaged(f"{name}: {error}.") from None
        except _Damaged as error:
            raise _refusal(self.folder, error) from None

    def refusal(self, reason: str) -> RunDirectoryError:
        """The error of a state that cannot be used though its files have the right checksums."""
        return RunDirectoryError(
            f"{self.folder}/{reason}. The file is as it was written: use the version of hvd_train, the model "
            "and the configuration that wrote it."
        )


def _read_manifest(folder: Path) -> Manifest:
    content = _content(folder / MANIFEST_FILE)
    try:
        values = parse(content)
    except ValueError as error:
        raise _Damaged(f"{MANIFEST_FILE}: cannot be read: {error}. {_OTHER}") from None
    schema = values.get("schema")
    if schema not in (1, SCHEMA):
        raise _Damaged(
            f"{MANIFEST_FILE}: schema {schema!r}; this program reads 1 to {SCHEMA}. Use the version that "
            "wrote it."
        )
    try:
        manifest = msgspec.convert(unseal(values) if schema == SCHEMA else values, Manifest)
        _require_sense(folder, values, manifest)
    except (msgspec.ValidationError, ValueError) as error:
        raise _Damaged(f"{MANIFEST_FILE}: damaged: {str(error).replace('`$.', '`')}.") from None
    return manifest


def _require_sense(folder: Path, values: Mapping[str, Any], manifest: Manifest) -> None:
    """Raises `ValueError` where values of the right types do not go together."""
    for spec, given in (
        (SampleSpec, values["sample"]),
        *((FieldSpec, field) for field in values["sample"]["fields"].values()),
    ):
        unknown = given.keys() - {f.name for f in dataclasses.fields(spec)}
        if unknown:
            raise ValueError(f"the sample has {', '.join(sorted(unknown))}, which this program does not know")
    sample = manifest.sample
    if not {sample.inputs, sample.targets} <= sample.fields.keys():
        raise ValueError(f"the sample has {sample.inputs} and {sample.targets}, but no such fields")
    for field in sample.fields.values():
        if any(n < 0 for n in field.shape):
            raise ValueError(f"the sample has the shape {list(field.shape)}")
        try:
            np.dtype(field.dtype)
        except TypeError as error:
            raise ValueError(f"the sample: {error}") from None
    ranks = range(min(manifest.world_size, len(manifest.files)))
    if manifest.files.keys() - {EMA_FILE} != {MODEL_FILE, *map(rank_file, ranks)}:
        raise ValueError(
            f"it lists the files {', '.join(sorted(manifest.files))}; expected {MODEL_FILE} and one for each "
            f"of {manifest.world_size} ranks"
        )
    if is_checkpoint_name(folder.name) and round_of(folder) != manifest.round:
        raise ValueError(f"it is of round {manifest.round}, in a folder named {folder.name}")


def _content(path: Path) -> bytes:
    """The bytes of a file. Anything but a regular file, which might block, is not opened."""
    try:
        if path.exists() and not path.is_file():
            raise _Damaged(f"{path.name}: cannot be read: not a file. {_OTHER}")
        return path.read_bytes()
    except OSError as error:
        raise _Damaged(f"{path.name}: cannot be read: {error}. {_OTHER}") from None


def _refusal(folder: Path, error: _Damaged) -> RunDirectoryError:
    text = f"{folder}/{error}"
    if folder.parent.name != CHECKPOINTS:
        return RunDirectoryError(f"{text} Go on from another checkpoint.")
    whole = [f for f in _nearest_first(folder) if what_is_wrong(f) == ""]
    advice = f"Go on from {whole[0]}, which is whole." if whole else "No other checkpoint there is whole."
    return RunDirectoryError(f"{text} {advice}")


def _nearest_first(folder: Path) -> list[Path]:
    """The other checkpoints of a run, in the order in which it should continue from them: of earlier rounds
    first, as later ones were undone by a resume."""
    others = [f for f in checkpoints_in(folder.parent) if f != folder]
    if not is_checkpoint_name(folder.name):
        return sorted(others, key=round_of, reverse=True)
    here = round_of(folder)
    return sorted(others, key=lambda f: (round_of(f) > here, abs(round_of(f) - here)))


def what_is_wrong(folder: Path) -> str:
    """Why a checkpoint is not whole; empty if it is: its manifest makes sense, its files have their
    checksums."""
    try:
        manifest = _read_manifest(folder)
        for name, file in manifest.files.items():
            content = _content(folder / name)
            if len(content) != file.num_bytes or xxhash.xxh3_64_hexdigest(content) != file.xxh3_64:
                raise _Damaged(f"{name}: damaged: its checksum differs from the manifest's.")
    except _Damaged as error:
        return str(error)
    return ""


def find_checkpoint(path: Path, pointer: str) -> SavedCheckpoint | None:
    """The checkpoint at `path`: its own folder, or the one that `pointer` names in a run's folder.

    None if a run's folder has none yet. Raises `RunDirectoryError` if it is neither, or damaged.
    """
    try:
        return _find(path, pointer)
    except (OSError, ValueError) as error:  # a name too long, a folder that is closed to this user
        raise RunDirectoryError(f"{path}: cannot be read: {error}. Give the path of a run.") from None


def _find(path: Path, pointer: str) -> SavedCheckpoint | None:
    if (path / MANIFEST_FILE).exists():
        return SavedCheckpoint.open(path)
    if (path / CHECKPOINTS).is_dir():
        _warn_of_a_line_that_does_not_count(path / CHECKPOINTS, pointer)
        found = checkpoint_of(path, pointer)
        return None if found is None else SavedCheckpoint.open(found)
    if path.parent.name == CHECKPOINTS and is_checkpoint_name(path.name) and path.is_dir():
        return SavedCheckpoint.open(path)  # which says what it lacks
    raise RunDirectoryError(
        f"{path}: neither a run's folder nor a checkpoint; expected RUN or RUN/checkpoints/round-N."
    )


def _warn_of_a_line_that_does_not_count(folder: Path, pointer: str) -> None:
    named, line = follow(folder, pointer), line_of(folder, pointer)
    if named is not None and line and line != named.name:
        warn(
            f"{folder / pointer} names {line!r}, but {INDEX_FILE} next to it {named.name}, which is used. "
            "For another checkpoint give the path of its folder."
        )


def newest_whole(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The checkpoint from which a run's folder goes on, and a line for each newer one that is not whole.

    None if there is no checkpoint. Raises `RunDirectoryError` if there are some and none is whole.
    """
    folder = run / CHECKPOINTS
    _warn_of_a_line_that_does_not_count(folder, "latest")
    first = follow(folder, "latest")
    newest = checkpoint_of(run, "latest")
    if newest is None:
        return None, ()
    left = [] if first in (None, newest) else [f"{first}: does not exist."]
    for candidate in (newest, *_nearest_first(newest)):
        wrong = what_is_wrong(candidate)
        if not wrong:
            said = tuple(f"{line} The run goes on from {candidate.name}, which is whole." for line in left)
            return candidate, said
        left.append(f"{candidate}/{wrong}")
    raise RunDirectoryError(
        f"no checkpoint in {folder} is whole: {' '.join(left)} Start the run anew under another name."
    )

"""Reading and writing manifest.json, and comparing shards with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from hvd_train.data.facts import digest
from hvd_train.data.files import require_regular
from hvd_train.data.format import MANIFEST_NAME, READABLE_SCHEMAS, Manifest, ShardEntry, ShardInfo
from hvd_train.errors import DataError
from hvd_train.io.atomic import replacing
from hvd_train.io.text import shown

_REWRITE = (
    "Remove it and write the shards anew with `hvd_train shard write`, or name the shards by a glob pattern."
)
_MOST_BYTES = 1 << 30
"""Of a manifest; a million shards take a third of it."""
_MOST_NAME = 4096
"""Characters; Linux takes no longer path."""
_READABLE = " or ".join(map(str, READABLE_SCHEMAS))


def load_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none.

    Raises `DataError` for one that cannot be read, is of a later schema, is not what was written, or names
    files outside the folder: of the folder as it is named, and the one to which the manifest is linked.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        require_regular(path, "the list of shards that `hvd_train shard write` writes")
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes, expected at most {_MOST_BYTES:,}. {_REWRITE}"
            )
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the permissions.") from None
    values = _parse(path, text)
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a manifest: {error}. {_REWRITE}") from None
    _require_inside(path, (entry.file for entry in (*manifest.train, *manifest.validation)))
    if manifest.digest != (None if manifest.schema == 1 else _digest(values)):
        raise DataError(f"{path}: not what was written: it was damaged or changed. {_REWRITE}")
    return manifest


def _require_inside(path: Path, names: Iterable[str]) -> None:
    """Raises `DataError` for a name that leads out of the folder of the manifest at `path`."""
    folders = {os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))}
    inside = tuple(os.path.join(folder, "") for folder in folders)
    folder, linked = str(path.parent), {"": False}

    def is_linked(name: str) -> bool:
        """Whether a folder in the manifest's folder is behind a link."""
        if name not in linked:
            linked[name] = os.path.islink(f"{folder}/{name}") or is_linked(name.rpartition("/")[0])
        return linked[name]

    for name in names:
        parts = name.split("/")
        if not set(parts) - {"", "."} or len(name) > _MOST_NAME or "\0" in name:
            raise DataError(f"{path}: file `{shown(name)}` cannot be the name of a file. {_REWRITE}")
        if name.startswith("/") or ".." in parts:
            raise DataError(f"{path}: file `{shown(name)}` is outside the manifest's folder. {_REWRITE}")
        if not os.path.islink(f"{folder}/{name}") and not is_linked(name.rpartition("/")[0]):
            continue
        target = os.path.realpath(path.parent / name)
        if not target.startswith(inside):
            raise DataError(
                f"{path}: file `{shown(name)}` is a link to {shown(target)}, outside the manifest's folder. "
                "Copy the file to its place, or name the shards by a glob pattern, which takes links."
            )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    # The version is read before the rest, whose meaning depends on it.
    try:
        values = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}. {_REWRITE}") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema not in READABLE_SCHEMAS:
        raise DataError(
            f"{path}: schema {schema!r}: this program reads schema {_READABLE}. "
            "Use the version of hvd_train that wrote it, or write the shards anew."
        )
    return dict(values)


def _digest(values: Mapping[str, Any]) -> str:
    # Of all keys, also of those that a later version may have added.
    rest = {key: value for key, value in values.items() if key != "digest"}
    return digest(msgspec.json.encode(rest, order="deterministic"))


def save_manifest(folder: str | Path, manifest: Manifest, scratch: Path | None = None) -> Manifest:
    """Writes `manifest` into an existing folder, atomically; returns it as it was written, with its digest.
    The temporary file is in `scratch` if it is given. Raises OSError."""
    fields = {name: field.to_json() for name, field in manifest.sample.fields.items()}
    values = asdict(manifest)
    values["sample"]["fields"] = fields
    del values["sample"]["names"]  # they are in `class_names`
    if not manifest.class_names:
        del values["class_names"]
    values["digest"] = _digest(values)
    with replacing(Path(folder) / MANIFEST_NAME, within=scratch) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n")
    return replace(manifest, digest=values["digest"])


def differences(info: ShardInfo, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    """One message for each thing in which a shard is not what its manifest says."""
    beside = os.path.join(os.path.dirname(info.path), MANIFEST_NAME)
    remedy = "Copy both again, or write the shards again."
    sample = manifest.sample
    if info.num_samples != entry.num_samples:
        yield f"{info.path}: {info.num_samples} samples, but {entry.num_samples} in {beside}. {remedy}"
    names = list(info.fields)
    # Of a field that is read as class numbers by a list of values, it has the values themselves.
    coded = {name for name, field in info.fields.items() if field.coding is not None}
    listed = entry.class_counts if names[-1] == sample.targets and names[-1] not in coded else None
    if listed is not None and info.class_counts != listed:
        yield f"{info.path}: class counts {info.class_counts}, but {listed} in {beside}. {remedy}"
    for name, field in info.fields.items():
        written = sample.fields.get(name)
        if written is not None and written != field and name not in coded:
            yield f"{info.path}: `{name}` is {field}, but {written} in {beside}. {remedy}"
    scale = 1.0 if info.scale is None else info.scale
    if names[0] == sample.inputs and scale != sample.scale:
        yield f"{info.path}: scale {scale}, but {sample.scale} in {beside}. {remedy}"
    if info.facts_digest != entry.facts_digest:
        yield f"{info.path}: not the shard that {beside} lists: their digests differ. {remedy}"

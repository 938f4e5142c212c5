"""Reading and writing manifest.json."""

from __future__ import annotations

from pathlib import Path, PurePath

import msgspec

from hvd_train.atomic import replacing
from hvd_train.data.format import MANIFEST_NAME, SCHEMA_VERSION, Manifest
from hvd_train.errors import DataError

_REWRITE = "Write it anew with `hvd_train shard write`, or remove it to read the HDF5 files as they are."


def load_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none.

    Raises `DataError` for one that cannot be read, is of a later schema, or names files outside the folder.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the permissions.") from None
    _check_schema(path, text)
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a manifest: {error}. {_REWRITE}") from None
    for entry in (*manifest.train, *manifest.validation):
        name = PurePath(entry.file)
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{path}: file {entry.file!r} lies outside the manifest's folder. {_REWRITE}")
    return manifest


def _check_schema(path: Path, text: bytes) -> None:
    # The version is read before the rest, whose meaning depends on it.
    try:
        values = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON: {error}. {_REWRITE}") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema {schema!r}: this program reads schema {SCHEMA_VERSION}. "
            "Use the version of hvd_train that wrote it, or write the shards anew."
        )


def save_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes `manifest` into an existing folder, atomically. Raises OSError."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    with replacing(Path(folder) / MANIFEST_NAME) as temporary:
        temporary.write_bytes(text + b"\n")

"""Finished parts of the predictions, each a file beside the one that they become.

    FILE.parts/part-000012.3f0c...      512 bytes of JSON with a checksum, then the rows of each dataset
               whole.3f0c...            FILE, complete, while the parts are removed
               .claim-1.json            the job that is at work

A name ends in a digest of all that the predictions depend on, so that parts of others are never taken.
Nothing here is collective.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import numpy as np
import xxhash

from hvd_train.data.blocks import row_bytes
from hvd_train.data.format import Array, FieldSpec
from hvd_train.errors import OutputError
from hvd_train.io.atomic import replacing, sync
from hvd_train.io.sealed import parse, seal, unseal
from hvd_train.run import claim

SCHEMA = 1

_HEADER_BYTES = 512
_LEAST_BYTES, _MOST_BYTES = 1 << 20, 8 << 20
_MANY = 64
_NAME = re.compile(r"part-(\d{6,})\.([0-9a-f]{32})")


class _Header(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    schema: int = SCHEMA
    digest: str
    part: int
    values: str
    """xxh3_64 of the rows of all datasets."""
    nan_rows: int
    first_nan: int


class _Unusable(Exception):
    """Why a part cannot be used."""


@dataclass(frozen=True, kw_only=True)
class PartRows:
    """What is in one part."""

    arrays: Mapping[str, Array]

    nan_rows: int
    """Rows with a prediction that is not a number."""

    first_nan: int
    """The number of the first of them, among all rows; -1 if there is none."""


@final
@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one file: part i has the rows from i `rows` on, whatever the number of ranks."""

    out: Path
    """The file that they become."""

    digest: str
    """Of all that the predictions depend on."""

    fields: Mapping[str, FieldSpec]
    """The datasets of a row, in order."""

    num_rows: int
    """Of all parts."""

    rows: int
    """Of one part; the last may have fewer."""

    @property
    def folder(self) -> Path:
        """Where they are."""
        return _folder(self.out)

    @property
    def count(self) -> int:
        """How many parts all rows are."""
        return -(-self.num_rows // self.rows)

    def bounds(self, part: int) -> tuple[int, int]:
        """The first row of a part, and the one after its last."""
        return part * self.rows, min((part + 1) * self.rows, self.num_rows)

    def begin(self) -> claim.Claim:
        """Claims the folder of the parts, which it makes if it is not there, for this job.

        Raises `OutputError` for a file that exists and a folder that cannot be written, and
        `RunDirectoryError` if a running job holds it.
        """
        require_new(self.out)
        try:
            self.folder.mkdir(exist_ok=True)
            held = claim.take(self.folder)
        except OSError as error:
            raise OutputError(
                f"{self.folder}: {error.strerror}. Expected a folder that can be written, for the parts of "
                f"{self.out.name}: make room, or name another file in --out."
            ) from None
        try:
            require_new(self.out)  # another job may have finished it meanwhile
        except OutputError:
            self.remove(held)
            raise
        self._unlink((".part-", ".whole."))  # of a job that was killed
        return held

    def require_seen(self) -> None:
        """Raises `OutputError` on a rank that does not see the folder."""
        if not self.folder.is_dir():
            raise OutputError(
                f"{self.folder.absolute()} is not there, but rank 0 made it. Expected a folder that every "
                "rank sees: name a file in such a folder in --out."
            )

    def there(self) -> list[int]:
        """The numbers of the parts in the folder, of these predictions alone, damaged or not."""
        return sorted(number for number, digest in self._names() if digest == self.digest)

    def num_foreign(self) -> int:
        """How many parts in the folder are of other predictions."""
        return sum(digest != self.digest for _, digest in self._names())

    def _names(self) -> list[tuple[int, str]]:
        found = (_NAME.fullmatch(name) for name in os.listdir(self.folder))
        return [(int(match[1]), match[2]) for match in found if match]

    def is_whole(self, part: int) -> bool:
        """Whether a part is there with the values that were written."""
        try:
            self._read(part)
        except _Unusable:
            return False
        return True

    def write(self, part: int, rows: PartRows) -> None:
        """Writes a part; it has its name when it is whole. If the host goes down it may be lost, which its
        checksum tells. Raises `OutputError`."""
        raw = [_raw(array) for array in rows.arrays.values()]
        header = _Header(
            digest=self.digest,
            part=part,
            values=_checksum(raw),
            nan_rows=rows.nan_rows,
            first_nan=rows.first_nan,
        )
        try:
            with (
                replacing(self._path(part), durable=False) as temporary,
                open(temporary, "xb", buffering=0) as file,
            ):
                text = seal(msgspec.structs.asdict(header)).encode().ljust(_HEADER_BYTES)
                for content in (memoryview(text), *raw):
                    while content:
                        content = content[file.write(content) :]
        except OSError as error:
            raise OutputError(
                f"{self._path(part)}: {error.strerror}. Expected to write the part there: make room, and "
                "start the same command again, which goes on with the parts that are whole."
            ) from None

    def read(self, part: int) -> PartRows:
        """A part. Raises `OutputError` if it is not there, or is not what was written."""
        try:
            return self._read(part)
        except _Unusable as error:
            raise OutputError(
                f"{self._path(part)}: {error}. Start the same command again: it makes this part anew."
            ) from None

    def _read(self, part: int) -> PartRows:
        start, stop = self.bounds(part)
        try:
            with open(self._path(part), "rb", buffering=0) as file:
                header = msgspec.convert(unseal(parse(file.read(_HEADER_BYTES))), _Header)
                arrays = {name: _empty(field, stop - start) for name, field in self.fields.items()}
                raw = [_raw(array) for array in arrays.values()]
                if os.fstat(file.fileno()).st_size != _HEADER_BYTES + sum(map(len, raw)):
                    raise _Unusable("it is incomplete")
                for content in raw:
                    while content:  # a file that became shorter since has another checksum
                        content = content[file.readinto(content) or len(content) :]
        except (OSError, ValueError, msgspec.ValidationError) as error:
            raise _Unusable(str(error)) from None
        if (header.schema, header.digest, header.part) != (SCHEMA, self.digest, part):
            raise _Unusable("it is of other predictions")
        if header.values != _checksum(raw):
            raise _Unusable("its checksum is not that of its values")
        native = {name: a.astype(a.dtype.newbyteorder("="), copy=False) for name, a in arrays.items()}
        return PartRows(arrays=native, nan_rows=header.nan_rows, first_nan=header.first_nan)

    @property
    def whole(self) -> Path:
        """The name of the file when it is complete, until it has its own."""
        return self.folder / f"whole.{self.digest}"

    def publish(self, held: claim.Claim) -> None:
        """Removes all parts and then gives the complete file its name: after it there is nothing left to do
        for a job that is started again. Raises OSError, `OutputError` for a file that exists,
        `RunTakenOver`."""
        held.check()
        self._unlink(("part-",))
        require_new(self.out)
        os.replace(self.whole, self.out)
        sync(self.out.parent)
        self.remove(held)

    def remove(self, held: claim.Claim) -> None:
        """Removes what is left, the claim, and the folder if nothing else is in it."""
        with contextlib.suppress(OSError):
            self._unlink((".part-", "part-", ".whole.", "whole."))
            held.release()
            claim.forget(self.folder)
            self.folder.rmdir()

    def _unlink(self, beginnings: tuple[str, ...]) -> None:
        for name in os.listdir(self.folder):
            if name.startswith(beginnings):
                (self.folder / name).unlink(missing_ok=True)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.{self.digest}"


def require_new(out: Path) -> None:
    """Raises `OutputError` for a file that exists, or whose folder does not."""
    if os.path.lexists(out):
        left = f" {_folder(out)} is not needed any more." if _folder(out).exists() else ""
        raise OutputError(
            f"{out} exists already; expected a new file, as none is overwritten. Name another one in --out, "
            f"or move this one away.{left}"
        )
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.absolute().parent}; expected one. Make it.")


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def rows_of_part(fields: Mapping[str, FieldSpec], num_rows: int, batch_size: int) -> int:
    """The default of rows in a part: about a 64th of all, but at least 1 and at most 8 MiB; whole batches
    where a part has several."""
    size = max(1, sum(row_bytes(field) for field in fields.values()))
    rows = min(max(num_rows // _MANY, _LEAST_BYTES // size), _MOST_BYTES // size)
    return max(1, rows // batch_size * batch_size if rows > batch_size else rows)


def _empty(field: FieldSpec, rows: int) -> Array:
    return np.empty((rows, *field.shape), np.dtype(field.dtype).newbyteorder("<"))


def _raw(array: Array) -> memoryview:
    """The bytes of an array, little-endian."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return memoryview(little.reshape(-1).view(np.uint8).data) if little.size else memoryview(b"")


def _checksum(raw: Sequence[memoryview]) -> str:
    hashed = xxhash.xxh3_64()
    for content in raw:
        hashed.update(content)
    return hashed.hexdigest()

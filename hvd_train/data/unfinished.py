"""What is known of shards that are being written, so that a second call goes on where the first was ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import msgspec

from hvd_train.data.format import ShardEntry
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.locate import UNFINISHED_SUFFIX
from hvd_train.data.places import plain
from hvd_train.errors import DataError
from hvd_train.io.atomic import replacing


class _Record(msgspec.Struct, kw_only=True):
    request: str
    shards: dict[str, ShardEntry]
    fields: list[str]
    """The datasets in them."""
    num_classes: int = 0
    others: list[str] = []
    """Files of earlier requests, which were not finished either."""


@final
class Unfinished:
    """The complete shards of one part, in a file beside them that is removed at the end.

    Args:
        names: of the shards.
        fields: the datasets in them.
        request: a digest of what was asked for and of the files that are read: others begin anew.
        scratch: for temporary files; None for one that only reads.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        request: str,
        names: Sequence[str],
        fields: Sequence[str],
        scratch: Path | None = None,
    ) -> None:
        self._folder = folder
        self._path = folder / f".{part}{UNFINISHED_SUFFIX}"
        self._names = names
        self._scratch = scratch
        self._record = _Record(request=request, shards={}, fields=list(fields))
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Record)
        except (OSError, msgspec.MsgspecError):
            found = None
        self.goes_on = found is not None and found.request == request
        """Whether the same was asked for before, and was not finished."""
        self.was_begun = found is not None
        """Whether that, or something else."""
        if found is not None and self.goes_on:
            self._record = found
        elif found is not None:
            self._record.others = [*found.others, *found.shards]

    @property
    def others(self) -> list[str]:
        """Files that earlier requests have written, and that no manifest lists because of those."""
        return list(dict.fromkeys(self._record.others))

    @property
    def num_classes(self) -> int:
        """Of the complete shards; 0 if there are none."""
        return self._record.num_classes

    def complete(self) -> list[ShardEntry]:
        """The first shards, as long as each is the file that was written."""
        entries = []
        for name in self._names:
            entry = self._record.shards.get(name)
            if entry is None or not self._is_there(entry):
                break
            entries.append(entry)
        return entries

    def begin(self) -> None:
        """Records what is asked for, unless the same was before. Raises OSError."""
        if not self.goes_on:
            self.end()
            if self._record.others:
                self._save()

    def remove(self) -> None:
        """Removes the shards that were recorded, if the same was asked for before. Raises OSError."""
        if self.goes_on:
            for entry in self._record.shards.values():
                if self._is_there(entry):
                    (self._folder / entry.file).unlink()
            self.end()

    def add(self, entries: Sequence[ShardEntry], num_classes: int | None) -> None:
        """Records shards that are complete. Raises OSError."""
        self._record.shards.update({entry.file: entry for entry in entries})
        self._record.num_classes = max(self._record.num_classes, num_classes or 0)
        self._save()

    def end(self) -> None:
        """Forgets all, after the manifest lists the shards."""
        self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        with replacing(self._path, durable=False, within=self._scratch) as temporary:
            temporary.write_bytes(msgspec.json.encode(self._record))

    def _is_there(self, entry: ShardEntry) -> bool:
        try:
            info = read_info(self._folder / entry.file, plain(self._record.fields))
        except DataError:
            return False
        return info.facts_digest == entry.facts_digest

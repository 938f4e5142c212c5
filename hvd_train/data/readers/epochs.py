"""A reader that reads, in every epoch, what its rank reads in that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, ShardInfo
from hvd_train.data.numbering import Origins
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import ArrayBatch, Reader
from hvd_train.data.readers.cursor import saved_epoch
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen


class Make(Protocol):
    """Makes the reader of some rows."""

    def __call__(self, rows: AnyRows, *, repeats: bool) -> Reader:
        """`repeats`: whether more than one epoch reads them."""
        ...


_LEFT = -1
"""In place of the number of a part: what is left of an interrupted epoch."""


@final
class EpochReader(Reader):
    """Reads this rank's part of the rows in every epoch, but in the one that was interrupted: what is left.

    One reader at a time holds rows in memory.

    Args:
        make: makes the readers that read.
        parts: of all rows, by rank.
        rank: this one.
        screen: marks the rows that are left out; None: no marks.
        known: headers of shards that were read before.
        rotates: in epoch e rank r reads part (r + e) mod p.
    """

    def __init__(
        self,
        make: Make,
        parts: Sequence[tuple[Span, ...]],
        fields: Mapping[str, FieldSpec],
        rank: int,
        screen: Screen | None = None,
        known: Sequence[ShardInfo] = (),
        *,
        rotates: bool = False,
    ) -> None:
        self._make = make
        self._parts = parts
        self._fields = fields
        self._rank = rank
        self._screen = screen
        self._known = known
        self._rotates = rotates and len(parts) > 1
        self._left: tuple[int, AnyRows] | None = None
        self._used: dict[int, Reader] = {}
        self._now = rank
        self._reader = self._made(rank)

    @property
    def left(self) -> int:
        return self._reader.left

    def open(self) -> None:
        self._reader.open()

    def take_up(self, epoch: int, rows: AnyRows) -> None:
        """Goes to the start of `rows`, which are what this rank reads in `epoch`."""
        self._left = (epoch, rows)
        self._change(_LEFT)
        self._reader.start_epoch(epoch)

    def drop(self) -> None:
        """Forgets what `take_up` gave: the next `start_epoch` goes to this rank's part again."""
        self._left = None

    def start_epoch(self, epoch: int) -> None:
        self._enter(epoch)
        self._reader.start_epoch(epoch)

    def next_batch(self, size: int) -> ArrayBatch | None:
        return self._reader.next_batch(size)

    def origins(self, start: int, stop: int) -> Origins:
        return self._reader.origins(start, stop)

    def state_dict(self) -> dict[str, Any]:
        return self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._enter(saved_epoch(state))
        self._reader.load_state_dict(state)
        self.restarted = self._reader.restarted

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        epochs = range(state["epoch"], self._reader.state_dict()["epoch"] + 1)
        parts = dict.fromkeys(map(self._part, epochs))
        for index, part in enumerate(parts):
            reader = self._used[part]  # those of epochs that are over are closed, and read from new files
            found = reader.not_finite_since(state if index == 0 else {**reader.state_dict(), "position": 0})
            if found:
                return found
        return ""

    def close(self) -> None:
        self._reader.close()

    def _part(self, epoch: int) -> int:
        if self._left is not None and self._left[0] == epoch:
            return _LEFT
        return (self._rank + epoch) % len(self._parts) if self._rotates else self._rank

    def _enter(self, epoch: int) -> None:
        part = self._part(epoch)
        if part != self._now:
            self._change(part)

    def _change(self, part: int) -> None:
        self._reader.close()
        self._now, self._reader = part, self._made(part)

    def _made(self, part: int) -> Reader:
        if part == _LEFT and self._left:
            rows: AnyRows = self._left[1]
        else:
            rows = Rows(self._parts[part], self._fields, screen=self._screen, known=self._known)
        made = self._make(rows, repeats=part != _LEFT and not self._rotates)
        self._used[part] = made
        self.mode, self.why = made.mode, made.why
        self.num_samples, self.restarted = made.num_samples, False
        return made

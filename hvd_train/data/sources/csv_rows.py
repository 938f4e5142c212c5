"""Pieces of a CSV file that are whole rows, for rows that are longer than what is usually read at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, final

from hvd_train.errors import DataError

MOST_ROW_BYTES = 256 << 20
_READ_BYTES = 4 << 20
_QUOTE = b'"'


def whole_rows(file: BinaryIO, delimiter: bytes, path: str) -> Iterator[memoryview]:
    """The first row of a file, and then as many at a time as are complete after each read. Lines may end
    within quotation marks, which are doubled in a text.

    Memory: that of the longest row, and of what is read at once. Raises `DataError` for a row of more than
    `MOST_ROW_BYTES`.
    """
    buffer, ends, is_first = bytearray(), _RowEnds(delimiter), True
    while content := file.read(_READ_BYTES):
        buffer += content
        del content
        while end := ends.after(buffer, only_first=is_first):
            piece, buffer, ends = memoryview(buffer)[:end], buffer[end:], _RowEnds(delimiter)
            yield piece
            is_first = False
            del piece  # it may be large
        if len(buffer) > MOST_ROW_BYTES:
            raise DataError(
                f"{path}: a line is longer than {MOST_ROW_BYTES >> 20} MiB, or a quotation mark is missing. "
                "Expected shorter lines."
            )
    if buffer:
        yield memoryview(buffer)


@final
@dataclass
class _RowEnds:
    """Finds where rows end in a buffer that begins with a row and grows."""

    delimiter: bytes
    _at: int = 0
    """Up to here it was looked through."""
    _end: int = 0
    """Of the last row that is complete."""
    _is_quoted: bool = False

    def after(self, buffer: bytearray, *, only_first: bool) -> int:
        """The end of the last complete row, or of the first one; 0 if none is complete."""
        while self._at < len(buffer) and not (only_first and self._end):
            if self._is_quoted:
                if not self._skip_quoted(buffer):
                    break
                continue
            quote = buffer.find(_QUOTE, self._at)
            stop = len(buffer) if quote < 0 else quote
            line = buffer.find(b"\n", self._at, stop) if only_first else buffer.rfind(b"\n", self._at, stop)
            self._end = max(self._end, line + 1)
            # Elsewhere in a text it is a character like others.
            before = bytes(buffer[max(0, stop - 1) : stop])
            self._is_quoted = quote >= 0 and before in (b"", b"\n", b"\r", self.delimiter)
            self._at = stop + (quote >= 0)
        return self._end

    def _skip_quoted(self, buffer: bytearray) -> bool:
        """Goes on behind the quotation mark that ends a text; False if it is not there yet."""
        mark = buffer.find(_QUOTE, self._at)
        while mark >= 0 and mark + 1 < len(buffer) and buffer[mark + 1] == _QUOTE[0]:
            mark = buffer.find(_QUOTE, mark + 2)
        if mark < 0 or mark + 1 == len(buffer):  # the next one may double it
            self._at = len(buffer) if mark < 0 else mark
            return False
        self._at, self._is_quoted = mark + 1, False
        return True

"""Text: of files that a person wrote, and names and numbers in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a file that a person wrote: UTF-8, with or without a byte order mark.

    Raises `OSError`, and `UnicodeError` that says what the file holds instead.
    """
    content = Path(path).read_bytes()
    refuse_utf16(content)
    return content.decode("utf-8-sig")


def refuse_utf16(content: bytes) -> None:
    """Raises `UnicodeError` for the content of a file that begins with the byte order mark of UTF-16, as some
    editors write it."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnicodeError("it begins with the byte order mark of UTF-16; expected UTF-8: save it as UTF-8")


def shown(name: str, most: int = 100) -> str:
    """A name out of a file, for a message: what is not printable is escaped, and a long one is cut."""
    more = f"... ({len(name):,} characters)" if len(name) > most else ""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:most]) + more


def counted(number: int, noun: str) -> str:
    """`1 host`, `2,000 hosts`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def spread(values: Sequence[int]) -> str:
    """The least and the largest of some numbers: `10-21`, or one number if they are alike."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in words: the first ones, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

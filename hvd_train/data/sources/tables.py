"""What CSV and Parquet files have in common; pyarrow reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hvd_train.data.format import FieldSpec
from hvd_train.data.sources.base import Source, name_of
from hvd_train.errors import DataError
from hvd_train.io.text import listed, shown


def load_pyarrow(kind: str) -> Any:
    """The package. Raises `DataError` where it is missing, for files of this kind."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{kind} files are read by pyarrow, which is not installed. Install it: "
            "`pip install 'hvd_train[parquet]'`."
        ) from None
    return pyarrow


class Tables(Source):
    """Rows of files with the same columns, one after the other."""

    def __init__(self, paths: Sequence[str], classes: tuple[str, ...]) -> None:
        self._paths = list(paths)
        self._classes = classes

    _fields: dict[str, FieldSpec]
    _rows: dict[str, int]
    """Of each file."""

    @property
    def name(self) -> str:
        return name_of(self._paths)

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return self._fields

    @property
    def num_rows(self) -> int:
        return sum(self._rows.values())

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._classes

    @property
    def files(self) -> Collection[str]:
        return self._paths

    def _require_alike(self, path: str, fields: Mapping[str, FieldSpec]) -> None:
        for name, field in fields.items():
            if field != self._fields[name]:
                raise DataError(
                    f"{path}: a row of `{name}` is {field}, but {self._fields[name]} in {self._paths[0]}. "
                    "Expected the same in every file: leave one of the two out."
                )


def missing_column(path: str, name: str, there: Sequence[str]) -> str:
    """The message for a file without a column that the first one has."""
    seen = listed([f"`{shown(column)}`" for column in there])
    return (
        f"{path}: no column `{shown(name)}`; the file has {seen}. Expected the same columns in every file: "
        "name others, or leave the file out."
    )


class LineTooLong(Exception):
    """A line does not fit into what is read at once."""


def _lacks_compression(text: str) -> bool:
    """Whether pyarrow's message says that it cannot unpack a compression, which is no damage."""
    return ("compression" in text and "not supported" in text) or "Support for codec" in text


@contextmanager
def explained(path: str, kind: str) -> Iterator[None]:
    """Raises `DataError` and `LineTooLong` for what pyarrow raises about the file."""
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected a {kind} file.") from None
    except (OSError, pyarrow.ArrowException) as error:
        if "straddl" in str(error):
            raise LineTooLong from None
        text = " ".join(str(error).split()).rstrip(".")
        remedy = f"Expected a complete {kind} file: correct it, or copy it again."
        if "UTF8" in text:
            remedy = "Expected text in UTF-8: convert it."
        elif _lacks_compression(text):
            remedy = (
                "The file need not be damaged: write it again without that, such as by compression='zstd'."
            )
        raise DataError(f"{path}: {text}. {remedy}") from None

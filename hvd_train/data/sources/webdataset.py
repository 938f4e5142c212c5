"""WebDataset files: tar files whose members of one name are a sample, `0001.png` and `0001.cls`."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import final

import numpy as np

from hvd_train.data.files import require_regular
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.sources.base import (
    GROUP,
    INPUTS,
    TARGETS,
    Block,
    Source,
    group_numbers,
    name_of,
    rows_of_block,
)
from hvd_train.data.sources.pillow import IMAGE_SUFFIXES, ImageReader
from hvd_train.errors import DataError
from hvd_train.io.text import listed, shown

_MOST_BYTES = 128 << 20
_READ_BYTES = 1 << 20

Sample = dict[str, io.BytesIO]
"""The members of a sample by their endings."""


@final
class WebDataset(Source):
    """The samples of tar files, plain or .gz, one file after the other. Members are images, arrays (`.npy`),
    or text with one number or class.

    Args:
        names: the ending of the members of each field. Where the inputs are not named they are the first
            image or array of a sample; the targets are `cls`.
        group: the ending of the members that say to which group a sample belongs; empty for none.
        classes: texts that are classes.
        resize: height and width of images.

    Raises `DataError`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        names: Mapping[str, str],
        group: str = "",
        classes: tuple[str, ...] = (),
        resize: tuple[int, int] | None = None,
    ) -> None:
        self._paths = list(paths)
        self._classes = classes
        self._resize = resize
        self._images: ImageReader | None = None
        self._read_bytes = 0
        where, first = next(self._samples(), ("", {}))
        if not first:
            raise DataError(f"{self.name}: no samples. Expected members such as `0001.png` and `0001.cls`.")
        self._endings = {**names, **({GROUP: group} if group else {})}
        if names[TARGETS] == TARGETS and TARGETS not in first:
            self._endings[TARGETS] = "cls"
        if names[INPUTS] == INPUTS and INPUTS not in first:
            found = (ending for ending in first if f".{ending}" in (*IMAGE_SUFFIXES, ".npy"))
            self._endings[INPUTS] = next(found, INPUTS)
        arrays = {name: self._decoded(where, name, first) for name in self._endings if name != GROUP}
        self._fields = {
            name: FieldSpec(shape=array.shape, dtype=array.dtype.newbyteorder("=").name)
            for name, array in arrays.items()
        }
        self._is_image = f".{self._endings[INPUTS]}" in IMAGE_SUFFIXES

    @property
    def name(self) -> str:
        return name_of(self._paths)

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return self._fields

    @property
    def num_rows(self) -> None:
        return None

    @property
    def scale(self) -> float | None:
        return 1 / 255 if self._is_image else None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._classes

    @property
    def files(self) -> Collection[str]:
        return self._paths

    @property
    def position(self) -> tuple[int, int]:
        return self._read_bytes, sum(map(os.path.getsize, self._paths))

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        wanted = [name for name in self._endings if not names or name in names]
        rows: list[dict[str, Array]] = []
        for where, sample in self._samples():
            if start > 0:
                start -= 1
            else:
                rows.append({name: self._like_first(where, name, sample) for name in wanted})
            del sample  # a large one need not be there while the next is read
            if len(rows) == rows_of_block(self._fields):
                yield _block(rows)
                rows = []
        if rows:
            yield _block(rows)

    def _samples(self) -> Iterator[tuple[str, Sample]]:
        """What each sample is called in messages, and its members."""
        before = 0
        for path in self._paths:
            with _explained(path):
                require_regular(path, "a WebDataset file")
                key, sample = "", Sample()
                with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as file:
                    for member in file:
                        self._read_bytes = before + raw.tell()
                        file.members.clear()  # type: ignore[attr-defined] # it would keep the names of all
                        if not member.isfile():
                            continue
                        if member.size > _MOST_BYTES:
                            raise DataError(
                                f"{path}: {shown(member.name)} has {member.size:,} bytes. Expected "
                                f"{_MOST_BYTES >> 20} MiB at most: cut it."
                            )
                        folder, _, name = member.name.rpartition("/")
                        stem, _, ending = name.partition(".")
                        if key and f"{folder}/{stem}" != key:
                            whole, sample = sample, {}
                            yield f"{path}: {shown(key.lstrip('/'))}", whole
                            del whole
                        key = f"{folder}/{stem}"
                        sample[ending.lower()] = _content(file, member)
                if sample:
                    yield f"{path}: {shown(key.lstrip('/'))}", sample
            before += os.path.getsize(path)

    def _like_first(self, where: str, name: str, sample: Sample) -> Array:
        array = self._decoded(where, name, sample)
        field = self._fields.get(name)
        if field is not None and (array.shape, array.dtype.newbyteorder("=").name) != (
            field.shape,
            field.dtype,
        ):
            raise DataError(
                f"{where}.{self._endings[name]} is {array.dtype} {list(array.shape)}, but {field} in the "
                "first "
                "sample. Expected the same in every sample: pad, cut or convert it."
            )
        return array

    def _decoded(self, where: str, name: str, sample: Sample) -> Array:
        ending = self._endings[name]
        if ending not in sample:
            option = {INPUTS: "--inputs", TARGETS: "--targets", GROUP: "--group"}.get(name, "--fields")
            raise DataError(
                f"{where}: no member `.{ending}`, but {listed([f'`.{shown(other)}`' for other in sample])}. "
                f"Expected one in every sample: name another ending with {option}, or leave out such samples."
            )
        content, place = sample[ending], f"{where}.{ending}"
        content.seek(0)
        if f".{ending}" in IMAGE_SUFFIXES:
            self._images = self._images or ImageReader(self._resize)
            is_shared = list(self._endings.values()).count(ending) > 1
            return self._images.read(place, io.BytesIO(content.getvalue()) if is_shared else content)
        if PurePosixPath(f"x.{ending}").suffix == ".npy":
            return _array(place, content)
        text = content.getvalue().decode(errors="backslashreplace").strip()
        if name == GROUP:
            return np.asarray(group_numbers(np.array([text]), place)[0])
        return self._number(place, text, name)

    def _number(self, place: str, text: str, name: str) -> Array:
        if name == TARGETS and self._classes:
            if text in self._classes:
                return np.array(self._classes.index(text))
            known = listed([f"`{one}`" for one in self._classes])
            raise DataError(
                f"{place} holds `{shown(text)}`. Expected one of --classes: {known}. Add it there."
            )
        for kind in (int, float):
            try:
                return np.array(kind(text))
            except ValueError:
                continue
        raise DataError(
            f"{place} holds `{shown(text)}`. Expected a number. If these are classes, name the ending in "
            "--targets and list its texts in --classes; else name another ending."
        )


def _block(rows: list[dict[str, Array]]) -> dict[str, Array]:
    """Some rows in arrays; a single one, which may be large, is not copied."""
    if len(rows) == 1:
        return {name: array[np.newaxis] for name, array in rows[0].items()}
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _content(file: tarfile.TarFile, member: tarfile.TarInfo) -> io.BytesIO:
    """A member's bytes. Read in pieces: all at once would be in memory three times."""
    content = io.BytesIO(bytes(member.size))
    source = file.extractfile(member)
    while source and (piece := source.read(_READ_BYTES)):
        content.write(piece)
    if content.tell() < member.size:
        raise EOFError(f"{shown(member.name)} ends early")
    return content


def _array(place: str, content: io.BytesIO) -> Array:
    try:
        array = np.load(content, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{place}: {error}. Expected a .npy file with plain numbers: write it again."
        ) from None
    if array.dtype.kind not in "biuf":
        raise DataError(f"{place} is {array.dtype}. Expected numbers: write it again.")
    return np.asarray(array)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected a WebDataset file (.tar).") from None
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}. Expected a complete tar file: copy it again.") from None

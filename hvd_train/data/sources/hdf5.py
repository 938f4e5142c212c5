"""HDF5 files of any layout, read as a training reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

from hvd_train.data.class_names import listed_names
from hvd_train.data.format import FieldSpec, Padding, ShardInfo
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.layout import require_few_decodings
from hvd_train.data.locate import Found, in_groups, locate
from hvd_train.data.places import Places, parse_place
from hvd_train.data.progress import Progress, Step, unseen
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
from hvd_train.errors import DataError


@final
class Hdf5Source(Source):
    """The samples of HDF5 files, one file after the other.

    Args:
        paths: files, folders or glob patterns; of a folder with a manifest, its train part.
        names: the place of each field.
        group: the place of what says to which group a row belongs; empty for none.
        progress: of the headers that are read.

    Raises `DataError`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        names: Mapping[str, str],
        group: str = "",
        progress: Progress = unseen,
    ) -> None:
        options = {INPUTS: "--inputs", TARGETS: "--targets"}
        places = {name: parse_place(text, options.get(name, "--fields")) for name, text in names.items()}
        if group:
            places[GROUP] = parse_place(group, "--group")
        # Of rows of any length, which are then refused by what they are.
        padding = Padding(length=1, truncate=True)
        places = {name: replace(place, padding=padding) for name, place in places.items()}
        self._places = Places(places, INPUTS, TARGETS)
        found: list[Found] = [
            shard for path in paths for shard in locate(path, "SOURCE", files_only=True).train
        ]
        self._class_names = listed_names(found, names[TARGETS])
        shards = [shard.path for shard in in_groups(found, self._places)]
        infos = []
        for shard in shards:
            infos.append((shard, read_info(shard, self._places, texts=bool(group))))
            progress(Step("opened", len(infos), len(shards), "files"))
        self._infos = [(shard, info) for shard, info in infos if info.num_samples]
        for shard, info in self._infos:
            _refuse_rows_of_any_length(info)
            require_few_decodings(shard, info.layouts)
        if not self._infos:
            raise DataError(f"{' '.join(paths)}: no samples. Expected at least 1.")
        self._name = name_of(paths)
        self._first = self._infos[0][1]
        for shard, info in self._infos:
            self._require_alike(shard, info)

    @property
    def name(self) -> str:
        return self._name

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        specs = {name: field for name, field in self._first.fields.items() if name != GROUP}
        return {name: FieldSpec(shape=field.shape, dtype=field.dtype) for name, field in specs.items()}

    @property
    def num_rows(self) -> int:
        return sum(info.num_samples for _, info in self._infos)

    @property
    def scale(self) -> float | None:
        return self._first.scale

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @property
    def files(self) -> Collection[str]:
        return {self._places.file_of(shard)[0] for shard, _ in self._infos}

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        for shard, info in self._infos:
            if start >= info.num_samples:
                start -= info.num_samples
                continue
            with ShardFile(shard, self._places, texts=GROUP in self._places.places) as file:
                rows = rows_of_block(self.fields)
                for first in range(start, info.num_samples, rows):
                    stop = min(first + rows, info.num_samples)
                    wanted = [name for name in info.fields if not names or name in names]
                    block = {name: file.read(name, first, stop) for name in wanted}
                    if GROUP in block:
                        block[GROUP] = group_numbers(block[GROUP], f"{shard}: --group")
                    yield block
            start = 0

    def _require_alike(self, shard: str, info: ShardInfo) -> None:
        for name, field in info.fields.items():
            first = self._first.fields[name]
            if (field.shape, field.dtype) != (first.shape, first.dtype) and name != GROUP:
                raise DataError(
                    f"{shard}: a sample of `{name}` is {field}, but {first} in {self._infos[0][0]}. Expected "
                    "the same in every file: leave one of the two out."
                )
        if info.scale != self._first.scale:
            raise DataError(
                f"{shard}: scale {info.scale}, but {self._first.scale} in {self._infos[0][0]}. Expected the "
                "same in every file: leave one of the two out."
            )


def _refuse_rows_of_any_length(info: ShardInfo) -> None:
    for name, field in info.fields.items():
        if field.padding:
            raise DataError(
                f"{info.path}: `{field.place or name}` has rows of any length. Expected rows of one length: "
                "train on the file as it is, with data.max_length, or write the rows padded."
            )

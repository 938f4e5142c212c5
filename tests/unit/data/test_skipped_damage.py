"""Rows that cannot be read and are left out: which ones, and what is reported of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data import shard_file
from hvd_train.data.catalog import open_catalog
from hvd_train.data.damage import Damage, read_undamaged
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.moments import moments_of
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.make import make_reader
from hvd_train.data.screen import Screen, damage_screen, training_screen, usable
from hvd_train.data.sources import Arrays
from hvd_train.data.survey import survey
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError, UnsupportedShard

ROWS, WIDTH = 40, 3


def values(rows: int = ROWS) -> np.ndarray:
    return np.arange(rows * WIDTH, dtype="f4").reshape(rows, WIDTH)


def spoil_rows(path: Path, name: str, *rows: int) -> None:
    """One bit of each of these rows of a contiguous dataset."""
    with h5py.File(path, locking=False) as file:
        dataset = file[name]
        first, size = dataset.id.get_offset(), dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    raw = bytearray(path.read_bytes())
    for row in rows:
        raw[first + row * size] ^= 0x40
    path.write_bytes(raw)


def spoil_chunks(path: Path, name: str, *rows: int) -> None:
    """The compressed chunks that begin with these rows: they cannot be decoded."""
    with h5py.File(path, locking=False) as file:
        dataset = file[name].id
        places = [dataset.get_chunk_info_by_coord((row, 0)[: dataset.rank]) for row in rows]
    raw = bytearray(path.read_bytes())
    for place in places:
        raw[place.byte_offset : place.byte_offset + 8] = b"\xff" * 8
    path.write_bytes(raw)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shard with checksums of blocks of 4 rows."""
    monkeypatch.setattr(shard_file, "CHECKSUM_BYTES", 4 * (WIDTH * 4 + 8))
    write_part(tmp_path / "d", Arrays(values(), np.arange(ROWS)))
    return tmp_path / "d" / "train-00000-of-00001.h5"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A file with compressed chunks of 5 rows of inputs, and of 8 targets."""
    path = tmp_path / "f" / "foreign.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", data=values(), chunks=(5, WIDTH), compression="gzip")
        file.create_dataset("targets", data=np.arange(ROWS), chunks=(8,), compression="gzip")
    return path


@pytest.fixture(params=["memory", "stream"])
def reading(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(path: Path, reading: str, on_damage: str = "skip") -> tuple[Reader, Screen | None]:
    data = DataConfig(path=str(path), reading=reading, on_damage=on_damage)  # type: ignore[arg-type]
    catalog = open_catalog(data)
    screen = training_screen(data, catalog.sample)
    return make_reader(catalog.train, data, 0, catalog.sample.fields, 1 << 30, screen), screen


def used(reader: Reader, epochs: int = 1) -> list[int]:
    """The rows of the last of some epochs, whose inputs must be those that were written."""
    rows: list[int] = []
    for epoch in range(epochs):
        reader.start_epoch(epoch)
        rows = []
        left_out = 0
        while (batch := reader.next_batch(8)) is not None:
            batch, _, counts = usable(batch)
            np.testing.assert_array_equal(batch["inputs"], values()[batch["targets"]])
            rows += batch["targets"].tolist()
            left_out += counts.get("damaged", 0)
        assert len(rows) + left_out == ROWS
    reader.close()
    return sorted(rows)


def without(*ranges: tuple[int, int]) -> list[int]:
    return [row for row in range(ROWS) if not any(a <= row < b for a, b in ranges)]


def test_blocks_that_fail_their_checksum(written: Path, reading: str) -> None:
    spoil_rows(written, "inputs", 13, 37)
    spoil_rows(written, "targets", 18)
    reader, screen = opened(written.parent, reading)
    assert used(reader, epochs=2) == without((12, 20), (36, 40))
    assert screen is not None
    (damage,) = screen.unreported_damage(new_files=True)
    assert damage.ranges == ((12, 20), (36, 40))
    assert str(damage) == (
        f"{written}: dataset `inputs`, rows 12 to 15: not what was written. The file is damaged: copy or "
        "write it again. Left out of training: rows 12 to 19, 36 to 39."
    )
    assert screen.unreported_damage(new_files=False) == []
    with pytest.raises(DataError, match="rows 12 to 15: not what was written"):
        used(opened(written.parent, reading, "error")[0])


def test_chunks_that_cannot_be_decoded(foreign: Path, reading: str) -> None:
    spoil_chunks(foreign, "inputs", 10, 35)
    reader, screen = opened(foreign, reading)
    assert used(reader) == without((10, 15), (35, 40))
    assert screen is not None
    (damage,) = screen.unreported_damage(new_files=False)
    assert damage.ranges == ((10, 15), (35, 40))
    assert damage.reason.startswith(f"{foreign}: dataset `inputs`, rows 10 to 14: ")
    with pytest.raises(DataError, match=r"foreign\.h5: dataset `inputs`"):
        used(opened(foreign, reading, "error")[0])


def test_labels_scales_surveys_and_moments_go_without_such_rows(foreign: Path) -> None:
    spoil_chunks(foreign, "targets", 32)
    spoil_chunks(foreign, "inputs", 0)
    data = DataConfig(path=str(foreign), on_damage="skip")
    catalog = open_catalog(data)
    assert catalog.sample.num_classes == 32
    assert catalog.labels.count == 32
    screen = damage_screen(data, catalog.sample)
    found = survey(catalog.train, catalog.sample.fields, screen=screen)
    assert (found["inputs"].values.rows, found["inputs"].num_rows) == (35, 40)
    assert not found["inputs"].complete
    moments = moments_of(catalog.train, "inputs", catalog.sample.fields["inputs"], "all", screen=screen)
    assert (moments.counts.tolist(), moments.lowest.tolist()) == ([105.0], [15.0])
    for action in (
        lambda: open_catalog(DataConfig(path=str(foreign))),
        lambda: survey(catalog.train, catalog.sample.fields),
        lambda: moments_of(catalog.train, "inputs", catalog.sample.fields["inputs"], "all"),
    ):
        with pytest.raises(DataError, match=r"foreign\.h5: dataset `"):
            action()


def test_values_of_a_damaged_block_do_not_enter_a_mean(written: Path) -> None:
    spoil_rows(written, "inputs", 0, 1)  # of the exponent
    data = DataConfig(path=str(written.parent), on_damage="skip")
    catalog = open_catalog(data)
    moments = moments_of(
        catalog.train,
        "inputs",
        catalog.sample.fields["inputs"],
        "all",
        screen=damage_screen(data, catalog.sample),
    )
    assert (moments.counts.tolist(), moments.lowest.tolist()) == ([108.0], [12.0])


def test_a_read_that_fails_once_is_repeated_from_a_file_opened_anew(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, screen = opened(foreign, "stream")
    read, failing = ShardFile.read_into, [True]

    def once(shard: ShardFile, name: str, ranges: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        if name == "inputs" and failing:
            failing.pop()
            shard.close()  # as good as a stale handle: nothing more can be read by it
            raise DataError(f"{foreign}: stale file handle")
        read(shard, name, ranges, out)

    monkeypatch.setattr(ShardFile, "read_into", once)
    assert used(reader) == list(range(ROWS))
    assert not failing
    assert screen is not None
    assert screen.unreported_damage(new_files=False) == []


@pytest.mark.parametrize("change", ["vanishes", "is replaced"])
def test_a_file_that_cannot_be_opened_again_is_an_error(foreign: Path, change: str) -> None:
    spoil_chunks(foreign, "inputs", 10)
    reader, _ = opened(foreign, "stream")
    if change == "vanishes":
        foreign.unlink()
    else:
        foreign.unlink()
        with h5py.File(foreign, "w") as file:
            file["inputs"], file["targets"] = values(20), np.arange(20)
    with pytest.raises(DataError, match="no such file" if change == "vanishes" else "was replaced after"):
        used(reader)


def test_a_damaged_header_is_an_error(written: Path) -> None:
    with h5py.File(written, "r+") as file:
        del file["_hvd_train/checksums/inputs"]
    with pytest.raises(DataError, match=r"train-00000-of-00001\.h5"):
        opened(written.parent, "memory")


@pytest.mark.parametrize("unit", [1, 4, 7, 100])
@pytest.mark.parametrize("bad", [(), (0,), (3, 50), (49, 50, 51), tuple(range(3, 97))])
def test_only_the_units_of_bad_rows_are_left_out(unit: int, bad: tuple[int, ...]) -> None:
    source = np.arange(1, 101)

    def read(rows: tuple[int, int], out: np.ndarray) -> None:
        out[:] = 7
        if any(rows[0] <= row < rows[1] for row in bad):
            raise DataError("bad")
        out[:] = source[slice(*rows)]

    for start, stop in ((0, 100), (3, 97), (49, 50), (2, 9)):
        out = np.zeros(stop - start, int)
        found = [rows for rows, _ in read_undamaged(read, (start, stop), out, unit)]
        units = {row // unit for row in bad if start <= row < stop}
        wrong = [row for row in range(start, stop) if row // unit in units]
        assert [row for a, b in found for row in range(a, b)] == wrong
        assert out.tolist() == [0 if row in wrong else row + 1 for row in range(start, stop)]


def test_a_filter_that_is_not_installed_is_no_damage() -> None:
    def read(rows: tuple[int, int], out: np.ndarray) -> None:
        raise UnsupportedShard("no such filter")

    with pytest.raises(UnsupportedShard):
        list(read_undamaged(read, (0, 8), np.zeros(8), 1))


def test_ranges_are_joined_and_the_first_ones_listed() -> None:
    damage = Damage(path="a.h5", ranges=(), reason="a.h5: bad.").joined([(8, 12), (0, 4)]).joined([(4, 5)])
    assert damage.ranges == ((0, 5), (8, 12))
    many = damage.joined([(20 * i, 20 * i + 1) for i in range(1, 20)])
    assert str(many) == (
        "a.h5: bad. Left out of training: rows 0 to 4, 8 to 11, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200 "
        "and 9 more."
    )

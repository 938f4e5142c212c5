"""Rows of any length in one dataset of values, with their bounds in another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.check import check_shard
from hvd_train.data.hdf5 import packed as packed_rows
from hvd_train.data.locate import Found
from hvd_train.data.places import Bounds, Place, parse_place, plain
from hvd_train.data.readers.make import make_reader
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError, UnsupportedShard
from tests.unit.data.ragged import PACKED, catalog_of, padded, read, rows_of_lengths, write_packed

LENGTHS = [3, 0, 8, 1, 5, 0, 2, 7, 8, 4, 0]
ROWS = rows_of_lengths(LENGTHS)
PLACES = (PACKED, "packed(values, starts=starts)", "packed(values, lengths=lengths)")


def write(path: Path, rows: Any = ROWS, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        write_packed(file, rows, **options)
        file["targets"] = np.arange(len(rows)) % 2
    return path


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("packed(values, offsets)", Place("values", bounds=Bounds("offsets"))),
        ("packed(a/values,b/indptr)", Place("a/values", bounds=Bounds("b/indptr"))),
        ("packed(t[x,y], lengths=n)", Place("t", columns=("x", "y"), bounds=Bounds("n", "lengths"))),
        ("packed(v[1:3], starts = s)", Place("v", cut=(slice(1, 3),), bounds=Bounds("s", "starts"))),
        ("packed(*/values, */offsets)", Place("*/values", bounds=Bounds("*/offsets"))),
    ],
)
def test_places_as_text(text: str, place: Place) -> None:
    assert parse_place(text, "data.inputs") == place
    assert parse_place(str(place), "data.inputs") == place


@pytest.mark.parametrize(
    "text",
    [
        "packed(values)",
        "packed(values, )",
        "packed(, offsets)",
        "packed(values, offsets",
        "packed(values, offsets)[0:3]",
        "packed(values, ends=offsets)",
        "packed(values[, offsets)",
        "packed(packed(a, b), c)",
        "packed(values, */offsets)",
    ],
)
def test_a_text_that_is_no_place(text: str) -> None:
    with pytest.raises(
        DataError, match=r"data\.inputs = '.*': expected a dataset .*`packed\(values, offsets\)`"
    ):
        parse_place(text, "data.inputs")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{}, {"chunks": (3,), "compression": "gzip"}], ids=["contiguous", "gzip"])
def test_rows_and_their_mask(
    tmp_path: Path, place: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "_STEP", 4)
    monkeypatch.setattr(packed_rows, "_READ_ROWS", 8)
    path = write(tmp_path / "a.h5", **options)
    values, marks = padded(ROWS, 8)
    catalog = catalog_of(path, fields={"inputs": place})
    assert list(catalog.sample.fields) == ["inputs", "inputs_mask", "targets"]
    assert str(catalog.sample.fields["inputs"]) == "int32 [8], padded"
    for start in range(len(ROWS)):
        for stop in range(start + 1, len(ROWS) + 1):
            batch = read(catalog, start, stop)
            np.testing.assert_array_equal(batch["inputs"], values[start:stop])
            np.testing.assert_array_equal(batch["inputs_mask"], marks[start:stop])
    assert check_shard(Found(str(path)), plain((place, "targets"), 8)).problems == ()
    cut = read(catalog_of(path, fields={"inputs": place}, max_length=4, truncate=True))
    for name, expected in zip(("inputs", "inputs_mask"), padded(ROWS, 4), strict=True):
        np.testing.assert_array_equal(cut[name], expected)


def test_values_of_several_numbers(tmp_path: Path) -> None:
    """A table of hits, a row for each, and images of three colours along a line."""
    rng = np.random.default_rng(0)
    lengths = [2, 0, 3]
    hits = np.zeros(5, [("x", ">f4"), ("y", "f4"), ("id", "S2")])
    hits["x"], hits["y"] = rng.normal(size=(2, 5))
    colours = rng.normal(size=(5, 3, 2)).astype("f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["hits"], file["colours"], file["n"] = hits, colours, np.array(lengths, "u1")
        file["targets"] = np.arange(3) % 2
    fields = {
        "inputs": "packed(hits[x,y], lengths=n)",
        "colours": "packed(colours[1:,0], lengths=n)",
    }
    batch = read(catalog_of(tmp_path / "a.h5", fields=fields, max_length=4))
    pairs = np.split(np.stack([hits["x"], hits["y"]], axis=1), [2, 2])
    np.testing.assert_array_equal(batch["inputs"], padded(pairs, 4)[0])
    np.testing.assert_array_equal(batch["colours"], padded(np.split(colours[:, 1:, 0], [2, 2]), 4)[0])
    np.testing.assert_array_equal(batch["colours_mask"], batch["inputs_mask"])


def test_in_groups(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for group in ("g0", "g1"):
            write_packed(file, ROWS, f"{group}/")
            file[f"{group}/targets"] = np.arange(len(ROWS)) % 2
    fields = {"inputs": "packed(*/values, */offsets)", "targets": "*/targets"}
    batch = read(catalog_of(tmp_path / "a.h5", fields=fields))
    np.testing.assert_array_equal(batch["inputs"], np.concatenate([padded(ROWS, 8)[0]] * 2))


def test_without_a_length_the_refusal_names_one_that_works(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with pytest.raises(UnsupportedShard) as refused:
        open_catalog(DataConfig(path=str(path), inputs=PACKED))
    assert str(refused.value) == (
        f"{path}: dataset `values`, by the offsets in `offsets`, holds rows of variable length (int32), the "
        "longest of 8 values in row 2. Expected a length to which they are padded with zeros: set "
        "data.max_length = 8 or more (for `shard info` and `shard check`, --max-length 8)."
    )
    read(catalog_of(path, inputs=PACKED, max_length=8))


def test_longer_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with pytest.raises(
        DataError, match=r"`values`, by the offsets in `offsets`, has 8 values in row 2; expected"
    ):
        catalog_of(path, inputs=PACKED, max_length=7)


@pytest.mark.parametrize(
    ("place", "bounds", "message"),
    [
        (
            PACKED,
            [0, 3, 2, 9],
            r"`offsets` holds 3 in row 1 and then 2; expected numbers that grow, as offsets",
        ),
        (PACKED, [1, 3, 4, 9], r"`offsets` holds 1 in row 0; expected 0 there"),
        (PACKED, [0, 3, 99, 9], r"`offsets` holds 99 in row 2; expected 0 to 9, the number of values"),
        (PACKED, [0, -3, 4, 9], r"`offsets` holds -3 in row 1; expected 0 to 9"),
        (
            PACKED,
            [0, 3, 4, 8],
            r"`offsets` holds 8 at its end; expected 9, the.*name it as `starts=offsets`\. Cor",
        ),
        ("packed(values, starts=offsets)", [0, 5, 4], r"`offsets` holds 5 in row 1 and then 4; expected"),
        ("packed(values, starts=offsets)", [2, 5, 9], r"`offsets` holds 2 in row 0; expected 0 there"),
        ("packed(values, lengths=offsets)", [1, -1, 9], r"`offsets` holds -1 in row 1; expected 0 to 9"),
        (
            "packed(values, lengths=offsets)",
            [1, 1, 8],
            r"`offsets` holds numbers that add up to 10; expected 9",
        ),
        ("packed(values, lengths=offsets)", [1, 1, 2**62], r"`offsets` holds 4611686018427387904 in row 2"),
    ],
)
def test_bounds_that_cannot_be(tmp_path: Path, place: str, bounds: Sequence[int], message: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["values"], file["offsets"], file["targets"] = np.arange(9), bounds, np.arange(3) % 2
    for length in (9, None):
        with pytest.raises(DataError, match=rf"a\.h5: dataset {message}"):
            catalog_of(tmp_path / "a.h5", inputs=place, max_length=length)


def test_starts_that_were_named_as_offsets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", ROWS[:-1])
    message = (
        r"`inputs` has 9 rows, `targets` has 10 rows\. .* name it as `packed\(values, starts=starts\)`\.$"
    )
    with pytest.raises(DataError, match=message):
        catalog_of(path, fields={"inputs": "packed(values, starts)"})
    batch = read(catalog_of(path, fields={"inputs": "packed(values, starts=starts)"}))
    np.testing.assert_array_equal(batch["inputs"], padded(ROWS[:-1], 8)[0])


@pytest.mark.parametrize(
    ("bounds", "seen"),
    [
        (np.zeros(3), r"float64 \[3\]"),
        (np.zeros((3, 2), int), r"int64 \[3, 2\]"),
        (np.zeros(0, int), r"int64 \[0\]"),
    ],
)
def test_bounds_that_are_no_integers(tmp_path: Path, bounds: Any, seen: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["values"], file["offsets"], file["targets"] = np.arange(9), bounds, np.arange(2)
    message = (
        rf"dataset `offsets` is {seen}; expected integers \[rows \+ 1\], the offsets of rows in `values`"
    )
    with pytest.raises(UnsupportedShard, match=message):
        catalog_of(tmp_path / "a.h5", inputs=PACKED)


def test_packed_and_missing_values_are_unpacked(tmp_path: Path) -> None:
    """By the attributes of CF."""
    path = write(tmp_path / "a.nc", [row.astype("i2") for row in ROWS])
    with h5py.File(path, "a") as file:
        file["values"].attrs.update(scale_factor=np.float32(0.5), _FillValue=np.int16(ROWS[0][1]))
    batch = read(catalog_of(path, fields={"inputs": PACKED}))
    expected, _ = padded([np.where(row == ROWS[0][1], np.nan, row * np.float32(0.5)) for row in ROWS], 8)
    np.testing.assert_array_equal(batch["inputs"], expected)


def test_class_numbers(tmp_path: Path) -> None:
    labels = [np.array([5, 9]), np.array([9]), np.array([], int), np.array([5, 5, 9])]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"] = np.zeros((4, 8))
        write_packed(file, labels)
    catalog = catalog_of(tmp_path / "a.h5", fields={"targets": PACKED}, classes=("9", "5"))
    assert catalog.sample.num_classes == 2
    assert catalog.labels.count == 6
    assert read(catalog)["targets"][:, :3].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 0]]
    with pytest.raises(DataError, match="`values` holds 9 in row 1; expected one of"):
        catalog_of(tmp_path / "a.h5", fields={"targets": PACKED}, classes=("5", "7"))


def test_beside_datasets_with_checksums(tmp_path: Path) -> None:
    """Datasets that were added to a shard are read as they are, and the others are compared."""
    write_part(tmp_path, Arrays(np.zeros((11, 2)), np.arange(11) % 2), chunk_rows=4)
    path = tmp_path / "train-00000-of-00001.h5"
    with h5py.File(path, "a") as file:
        write_packed(file, ROWS)
    batch = read(catalog_of(path, fields={"tokens": PACKED}))
    np.testing.assert_array_equal(batch["tokens"], padded(ROWS, 8)[0])
    assert check_shard(Found(str(path)), plain((PACKED, "targets"), 8)).problems == ()
    with h5py.File(path, "a") as file:
        file["inputs"][5, 0] += 1
    with pytest.raises(DataError, match="rows 4 to 7: not what was written"):
        read(catalog_of(path, fields={"tokens": PACKED}))


def test_checksums_of_the_values_alone(tmp_path: Path) -> None:
    """Inputs that `shard write` wrote as rows are the values of fewer rows: not compared, and read."""
    write_part(tmp_path, Arrays(np.arange(11.0), np.arange(11) % 2), chunk_rows=4)
    path = tmp_path / "train-00000-of-00001.h5"
    with h5py.File(path, "a") as file:
        file["n"], file["kind"] = [5, 0, 6], np.arange(3) % 2
    fields = {"inputs": "packed(inputs, lengths=n)", "targets": "kind"}
    batch = read(catalog_of(path, fields=fields))
    np.testing.assert_array_equal(batch["inputs"], padded(np.split(np.arange(11.0), [5, 5]), 8)[0])


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_an_epoch(tmp_path: Path, reading: Any) -> None:
    path = write(tmp_path / "a.h5", rows_of_lengths([1, 2, 3, 4, 5] * 40))
    data = DataConfig(path=str(path), fields={"inputs": PACKED}, max_length=8, reading=reading)
    catalog = open_catalog(data)
    reader = make_reader(catalog.train, data, 0, catalog.sample.fields, 1 << 30)
    batches = []
    while (batch := reader.next_batch(32)) is not None:
        batches.append(batch)
    reader.close()
    assert reader.mode == reading
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    values, marks = padded(rows_of_lengths([1, 2, 3, 4, 5] * 40), 8)
    assert sorted(found["inputs"].tolist()) == sorted(values.tolist())
    np.testing.assert_array_equal(found["inputs"] > 0, found["inputs_mask"])
    assert found["inputs_mask"].sum() == marks.sum()

"""From a path to spans and a sample: manifests, foreign files, validation parts, and disagreeing shards."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import (
    Catalog,
    find_shards,
    make_catalog,
    open_catalog,
    summarize_inputs,
    summarize_labels,
)
from hvd_train.data.deal import Span, deal
from hvd_train.data.format import FieldSpec
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.manifest import load_manifest, save_manifest
from hvd_train.data.rows import Rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.unit.data.shards import inputs_of, row_numbers, write_foreign


def open_at(path: Path | str, **options: object) -> Catalog:
    return open_catalog(DataConfig(path=str(path), **options))  # type: ignore[arg-type]


def write_own(folder: Path, rows: int = 40, **options: object) -> None:
    write_part(folder, Arrays(inputs_of(0, rows), np.arange(rows) % 5, 0.25), **options)  # type: ignore[arg-type]


def test_a_folder_with_a_manifest(tmp_path: Path) -> None:
    write_own(tmp_path, 40, shards=3)
    write_own(tmp_path, 7, part="validation")
    write_foreign(tmp_path / "other.h5", 5)
    catalog = open_at(tmp_path)
    assert [(Path(s.shard).name, s.num_rows) for s in catalog.train] == [
        ("train-00000-of-00003.h5", 13),
        ("train-00001-of-00003.h5", 13),
        ("train-00002-of-00003.h5", 14),
    ]
    assert [span.num_rows for span in catalog.validation] == [7]
    assert (catalog.sample.num_classes, catalog.sample.scale) == (5, 0.25)
    assert catalog.sample.fields == {
        "inputs": FieldSpec(shape=(3,), dtype="float32"),
        "targets": FieldSpec(shape=(), dtype="int64"),
    }
    assert [Path(info.path).name for info in catalog.shards][-1] == "validation-00000-of-00001.h5"


def test_foreign_files_by_folder_file_and_pattern(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write_foreign(tmp_path / f"part{i}.{'hdf5' if i == 1 else 'h5'}", 10 + i, first=100 * i)
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / ".part9.h5").write_text("a copy under way")
    for path, sizes in (
        (tmp_path, [10, 11, 12]),
        (tmp_path / "part2.h5", [12]),
        (tmp_path / "part*.h5", [10, 12]),
    ):
        catalog = open_at(path)
        assert [span.num_rows for span in catalog.train] == sizes
        assert catalog.validation == ()
        assert (catalog.sample.num_classes, catalog.sample.scale) == (7, 1.0)
    assert open_at(tmp_path / "**" / "*.hdf5").train[0].num_rows == 11


def test_scale_of_the_configuration_wins(tmp_path: Path) -> None:
    write_own(tmp_path)
    assert open_at(tmp_path, scale=0.5).sample.scale == 0.5


def test_classes_are_scanned_where_nothing_records_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_train.data.catalog._SCAN_BYTES", 64)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["inputs"] = np.zeros((50, 2), "f4")
        file["targets"] = np.array([*range(48), 300, -100], "i2")
        file["real"] = np.zeros(50)
        file["sequence"] = np.arange(100, dtype="u2").reshape(50, 2)
    assert open_at(path).sample.num_classes == 301
    assert open_at(path, targets="sequence").sample.num_classes == 100
    assert open_at(path, targets="real").sample.num_classes is None


def foreign(path: Path, targets: object, inputs: object = None) -> Path:
    targets = np.asarray(targets)
    with h5py.File(path, "w") as file:
        file["inputs"] = np.zeros((len(targets), 2), "f4") if inputs is None else np.asarray(inputs)
        file["targets"] = targets
    return path


def test_targets_that_are_not_classes_affect_only_a_task_that_needs_classes(tmp_path: Path) -> None:
    foreign(tmp_path / "a.h5", [0, 1, 2])
    foreign(tmp_path / "b.h5", [0, 1, -1, 2])
    sample = open_at(tmp_path).sample
    assert sample.fields["targets"].dtype == "int64"
    with pytest.raises(DataError, match=r"b\.h5: `targets` holds -1 in row 2; expected class numbers"):
        _ = sample.num_classes
    assert sample.to_json()["num_classes"] == 3


def test_a_part_without_any_class_is_named(tmp_path: Path) -> None:
    """Nothing of it would count: an evaluation would have no figures."""
    foreign(tmp_path / "train.h5", [0, 1, -100])
    foreign(tmp_path / "val.hdf5", [-100, -100])
    assert open_at(tmp_path / "train.h5").sample.num_classes == 2
    sample = open_at(tmp_path / "train.h5", validation=str(tmp_path / "val.hdf5")).sample
    with pytest.raises(DataError, match=r"val\.hdf5: every value of `targets` is -100, which marks targets"):
        _ = sample.num_classes


def test_values_missing_from_recorded_counts_are_checked(tmp_path: Path) -> None:
    write_part(tmp_path / "minus", Arrays(inputs_of(0, 6), np.array([0, 1, -1, 1, 0, 1])))
    write_part(tmp_path / "ignored", Arrays(inputs_of(0, 6), np.array([0, 1, -100, 1, 0, 1])))
    assert open_at(tmp_path / "ignored").sample.num_classes == 2
    with pytest.raises(DataError, match=r"`targets` holds -1 in row 2"):
        _ = open_at(tmp_path / "minus").sample.num_classes


def test_the_ranks_share_the_reading_of_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they read every row that has no recorded class once, and find what one process finds."""
    foreign(tmp_path / "a.h5", np.arange(100) % 9)
    foreign(tmp_path / "b.h5", np.arange(41) % 12)
    write_part(tmp_path / "own", Arrays(inputs_of(0, 30, 2), np.arange(30) % 20))
    read: list[tuple[str, int]] = []
    whole = ShardFile.read_into

    def spy(shard: ShardFile, name: str, ranges: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        read.extend((Path(shard.info.path).name, row) for rows in ranges for row in range(*rows))
        whole(shard, name, ranges, out)

    monkeypatch.setattr(ShardFile, "read_into", spy)
    data = DataConfig(path=str(tmp_path / "**" / "*.h5"))
    shards = find_shards(data)
    for world_size in (1, 2, 5, 200):
        read.clear()
        found = [summarize_labels(shards, rank, world_size) for rank in range(world_size)]
        assert sorted(read) == [("a.h5", row) for row in range(100)] + [("b.h5", row) for row in range(41)]
        assert make_catalog(shards, data, found).sample.num_classes == 20
        assert sum(train.count + validation.count for train, validation in found) == 171


def test_tokens_of_the_inputs_are_part_of_the_vocabulary(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.h5", [[1, 2], [3, -100]], inputs=[[9, 1], [2, 3]])
    data = DataConfig(path=str(path))
    assert open_catalog(data).sample.num_classes == 4
    assert open_catalog(data, tokens=True).sample.num_classes == 10
    foreign(path, [[1, 2], [3, 4]], inputs=[[9, 1], [2, -100]])
    with pytest.raises(DataError, match=r"a\.h5: `inputs` holds -100 in row 1; expected tokens"):
        _ = open_catalog(data, tokens=True).sample.num_classes
    assert open_catalog(data).sample.num_classes == 5
    both = DataConfig(path=str(path), targets="inputs")
    with pytest.raises(DataError, match=r"a\.h5: `inputs` holds -100 in row 1"):
        _ = open_catalog(both, tokens=True).sample.num_classes


def test_classes_cover_the_validation_part(tmp_path: Path) -> None:
    write_own(tmp_path / "own", shards=2, by_class=True)
    assert open_at(tmp_path / "own").sample.num_classes == 5
    train, validation = write_foreign(tmp_path / "t.h5", 3), write_foreign(tmp_path / "v.h5", 6)
    assert open_at(train, validation=str(validation)).sample.num_classes == 6


def test_recorded_classes_are_those_of_the_dataset_they_were_counted_in(tmp_path: Path) -> None:
    arrays = Arrays(np.arange(12).reshape(6, 2), np.arange(6))
    write_part(tmp_path, arrays)
    assert open_at(tmp_path).sample.num_classes == 6
    assert open_at(tmp_path, inputs="targets", targets="inputs").sample.num_classes == 12


def test_one_dataset_may_be_both(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.h5", 9)
    catalog = open_at(tmp_path, inputs="targets")
    assert list(catalog.sample.fields) == ["targets"]


def test_a_validation_fraction_is_the_same_for_every_world_size(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.h5", 100)
    write_foreign(tmp_path / "b.h5", 57, first=100)
    catalog = open_at(tmp_path, validation=0.2)
    validation = set(row_numbers(Rows(catalog.validation, catalog.sample.fields).read(0, 31)))
    assert len(validation) == 31
    for world_size in (1, 2, 3, 5):
        trained: list[int] = []
        for part in deal(catalog.train, world_size):
            rows = Rows(part, catalog.sample.fields)
            trained += row_numbers(rows.read(0, len(rows)))
            rows.close()
        assert sorted(trained) == sorted(set(range(157)) - validation)


def test_a_fraction_takes_the_place_of_the_manifests_validation_part(tmp_path: Path) -> None:
    write_own(tmp_path, 40)
    write_own(tmp_path, 7, part="validation")
    catalog = open_at(tmp_path, validation=0.1)
    assert sum(span.num_rows for span in catalog.validation) == 4
    assert {Path(span.shard).name for span in catalog.validation} == {"train-00000-of-00001.h5"}


def test_a_validation_file_in_the_same_folder_is_not_trained_on(tmp_path: Path) -> None:
    for name, rows in (("a.h5", 5), ("b.h5", 6), ("val.h5", 3)):
        write_foreign(tmp_path / name, rows)
    catalog = open_at(tmp_path, validation=str(tmp_path / "val.h5"))
    assert [span.num_rows for span in catalog.train] == [5, 6]
    assert catalog.validation == (Span(str(tmp_path / "val.h5"), 0, 3),)
    with pytest.raises(DataError, match=r"leaves 0 shards .*to train on and has 1 itself"):
        open_at(tmp_path / "val.h5", validation=str(tmp_path / "val.h5"))


def test_the_same_file_under_two_names_is_refused(tmp_path: Path) -> None:
    first = write_foreign(tmp_path / "a.h5", 5)
    second = tmp_path / "b.h5"
    for link in (second.symlink_to, second.hardlink_to):
        link(first)
        with pytest.raises(
            DataError, match=r"b\.h5: the same file as .*a\.h5, under another name\. .*counts twice"
        ):
            open_at(tmp_path)
        with pytest.raises(DataError, match=r"b\.h5: the same file as .*a\.h5"):
            open_at(tmp_path, validation=0.2)
        second.unlink()


def test_a_folder_under_two_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v3").mkdir()
    write_foreign(tmp_path / "v3" / "a.h5", 5)
    (tmp_path / "current").symlink_to("v3", target_is_directory=True)
    assert len(open_at(tmp_path / "current").train) == 1
    with pytest.raises(DataError, match=r"v3/a\.h5: the same file as .*current/a\.h5"):
        open_at(tmp_path / "*" / "*.h5")


def test_a_pattern_that_fits_a_file_in_several_ways_takes_it_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_foreign(tmp_path / "sub" / "a.h5", 5)
    assert [span.num_rows for span in open_at(tmp_path / "**" / "**" / "*.h5").train] == [5]


def test_a_file_of_both_parts_under_two_names_is_refused(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
    write_foreign(tmp_path / "train" / "a.h5", 5)
    part = write_foreign(tmp_path / "train" / "b.h5", 6, first=5)
    (tmp_path / "val" / "x.h5").hardlink_to(part)
    with pytest.raises(DataError, match=r"val/x\.h5: the same file as .*b\.h5.*trained on and evaluated on"):
        open_at(tmp_path / "train", validation=str(tmp_path / "val"))
    (tmp_path / "val" / "x.h5").unlink()
    (tmp_path / "val" / "x.h5").symlink_to(part)
    catalog = open_at(tmp_path / "train", validation=str(tmp_path / "val"))
    assert [span.num_rows for span in catalog.train] == [5], "the file itself is held out, by whatever path"


def test_the_same_rows_in_two_files_are_known_by_their_checksums(tmp_path: Path) -> None:
    write_own(tmp_path / "a", 40)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match=r"b/train.*: the same rows as in .*a/train.*, by their checksums"):
        open_at(tmp_path / "*" / "*.h5")
    with pytest.raises(DataError, match=r"b/train.*: the same rows as in .*both trained on and evaluated on"):
        open_at(tmp_path / "a", validation=str(tmp_path / "b"))
    write_own(tmp_path / "a", 40, part="validation")
    with pytest.raises(DataError, match=r"validation-0.*: the same rows as in .*train-0"):
        open_at(tmp_path / "a")


def test_equal_rows_that_were_written_as_one_part_are_trained_on(tmp_path: Path) -> None:
    write_part(tmp_path / "zeros", Arrays(np.zeros((40, 3), "f4"), np.zeros(40, np.int64)), shards=4)
    assert [span.num_rows for span in open_at(tmp_path / "zeros").train] == [10] * 4


def test_a_manifest_that_names_a_file_twice_is_refused(tmp_path: Path) -> None:
    write_own(tmp_path, 40, shards=2)
    manifest = load_manifest(tmp_path)
    assert manifest is not None
    save_manifest(tmp_path, replace(manifest, train=(*manifest.train, manifest.train[0])))
    with pytest.raises(DataError, match=r"train-00000-of-00002\.h5: named twice\. Expected every row once"):
        open_at(tmp_path)
    save_manifest(tmp_path, replace(manifest, validation=manifest.train[:1]))
    with pytest.raises(
        DataError, match=r"train-00000-of-00002\.h5: named twice\. .*leave it out of one part"
    ):
        open_at(tmp_path)


def test_validation_of_another_manifest(tmp_path: Path) -> None:
    write_own(tmp_path / "a", 40)
    write_own(tmp_path / "b", 9)
    assert sum(s.num_rows for s in open_at(tmp_path / "a", validation=str(tmp_path / "b")).validation) == 9
    write_own(tmp_path / "b", 4, part="validation")
    assert sum(s.num_rows for s in open_at(tmp_path / "a", validation=str(tmp_path / "b")).validation) == 4
    (tmp_path / "b" / "train-00000-of-00001.h5").unlink()


def test_a_shard_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.h5", 5)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["inputs"] = inputs_of(0, 5, width=4)
        file["targets"] = np.arange(5)
    with pytest.raises(
        DataError,
        match=r"b\.h5: a sample of `inputs` is float32 \[4\], but float32 \[3\] in .*a\.h5\. Expected",
    ):
        open_at(tmp_path)


def test_shards_of_different_scales_are_refused_unless_one_is_given(tmp_path: Path) -> None:
    arrays = Arrays(inputs_of(0, 4), np.arange(4), 0.5)
    write_part(tmp_path / "a", arrays)
    write_part(tmp_path / "b", Arrays(arrays.inputs + 1, arrays.targets, 0.25))
    pattern = tmp_path / "*" / "*.h5"
    with pytest.raises(DataError, match=r"b/train.*scale 0\.25, but 0\.5 in .*set data\.scale"):
        open_at(pattern)
    assert open_at(pattern, scale=2.0).sample.scale == 2.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", r"data\.path = '.*nothing': no such file or folder, and no file fits"),
        ("*.h5", r"data\.path = '.*\*\.h5': no such file or folder"),
        ("empty", r"the folder holds neither manifest\.json nor files ending in \.h5, \.hdf5, .*\.nc4"),
    ],
)
def test_a_path_with_no_shards(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_at(tmp_path / path)
    write_foreign(tmp_path / "a.hdf5", 4)
    with pytest.raises(DataError, match=message.replace("data\\.path", "data\\.validation")):
        open_at(tmp_path / "a.hdf5", validation=str(tmp_path / path))


def test_a_manifest_that_lists_no_training_part(tmp_path: Path) -> None:
    write_own(tmp_path, 7, part="validation")
    with pytest.raises(
        DataError, match=r"manifest\.json: lists no train shards\. Add them with .*--part train"
    ):
        open_at(tmp_path)


def test_a_shard_that_differs_from_its_manifest(tmp_path: Path) -> None:
    write_own(tmp_path / "a", 40)
    write_own(tmp_path / "b", 41)
    shard = "train-00000-of-00001.h5"
    (tmp_path / "a" / shard).write_bytes((tmp_path / "b" / shard).read_bytes())
    with pytest.raises(DataError, match=r"41 samples, but 40 in .*manifest\.json"):
        open_at(tmp_path / "a")
    (tmp_path / "a" / shard).unlink()
    with pytest.raises(DataError, match=r"train-00000-of-00001\.h5: no such file"):
        open_at(tmp_path / "a")


def test_a_missing_dataset_names_those_that_are_there(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.h5", 4)
    with pytest.raises(
        DataError, match=r"no dataset `images`; the file has `inputs` \[4, 3\] float32, `targets`"
    ):
        open_at(tmp_path, inputs="images")


def test_shards_without_samples_are_skipped_with_one_warning(tmp_path: Path) -> None:
    for i, rows in enumerate((20, 0, 30, 0)):
        write_foreign(tmp_path / f"s{i}.h5", rows)
    catalog = open_at(tmp_path)
    assert [span.num_rows for span in catalog.train] == [20, 30]
    assert [shard.num_samples for shard in catalog.shards] == [20, 30]
    (warning,) = catalog.warnings
    assert re.fullmatch(r".*s1\.h5, .*s3\.h5: no samples: skipped \(2 of 4 shards\)\.", warning)
    assert open_at(tmp_path, validation=0.2).train
    for part in ({"path": str(tmp_path / "s1.h5")}, {"validation": str(tmp_path / "s[13].h5")}):
        with pytest.raises(
            DataError, match=r"s1\.h5.*: no samples\. Expected at least 1 in one of the shards"
        ):
            open_catalog(DataConfig(**{"path": str(tmp_path / "s[02].h5"), **part}))


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize(
    ("largest", "dtype", "by"),
    [
        (255, "u1", 255),
        (130, "u1", 255),
        (16, "u1", 16),
        (-2000, "i2", 2000),
        (60000, "u2", 65535),
        (1, "u1", 1),
    ],
)
def test_a_scale_of_the_largest_value(ranks: int, largest: int, dtype: str, by: int, tmp_path: Path) -> None:
    """The same with any number of ranks, wherever the largest value is."""
    for i in range(3):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            inputs = np.zeros((7, 4), dtype)
            inputs[6, 3] = largest if i == 1 else np.sign(largest)
            file["inputs"], file["targets"] = inputs, np.arange(7) % 2
    data = DataConfig(path=str(tmp_path), scale="auto")
    shards = find_shards(data)
    labels = [summarize_labels(shards, rank, ranks) for rank in range(ranks)]
    values = [summarize_inputs(shards, data, rank, ranks) for rank in range(ranks)]
    catalog = make_catalog(shards, data, labels, values)
    assert catalog.sample.scale == 1 / by
    assert open_catalog(data).sample == catalog.sample
    line = f"data.scale = 'auto': `inputs` is multiplied by {1 / by:.6g} (1/{by})."
    assert catalog.warnings == ((line,) if by > 1 else ())


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_scale_of_the_rows_for_training_alone(ranks: int, tmp_path: Path) -> None:
    """Those of 0.5 for validation are the last of each stretch of rows: with one row each, every other."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"] = np.tile(np.array([[20], [200]], "u1"), (20, 3))
        file["targets"] = np.arange(40) % 2
    data = DataConfig(path=str(tmp_path), scale="auto", validation=0.5)
    shards = find_shards(data)
    values = [summarize_inputs(shards, data, rank, ranks) for rank in range(ranks)]
    catalog = make_catalog(shards, data, [summarize_labels(shards)], values)
    assert catalog.sample.scale == 1 / 20
    with h5py.File(tmp_path / "a.h5") as file:
        used = {int(file["inputs"][row, 0]) for span in catalog.train for row in range(span.start, span.stop)}
    assert used == {20}


def test_a_scale_that_is_recorded_or_of_no_integers(tmp_path: Path) -> None:
    write_part(tmp_path / "own", Arrays(np.full((9, 2), 200, "u1"), np.arange(9) % 3, 0.5))
    with h5py.File(tmp_path / "floats.h5", "w") as file:
        file["inputs"], file["targets"] = np.full((9, 2), 200.0), np.arange(9) % 3
    for path, scale in (("own", 0.5), ("floats.h5", 1)):
        catalog = open_catalog(DataConfig(path=str(tmp_path / path), scale="auto"))
        assert (catalog.sample.scale, catalog.warnings) == (scale, ())

"""Files that a shard must not be: each is refused with what was seen, what was expected and what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.hdf5 import chunks
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.places import plain
from hvd_train.errors import DataError
from tests.deadlines import seconds
from tests.unit.data.shards import write_foreign

NAMES = ("inputs", "targets")


def add_targets(file: h5py.File, rows: int = 4) -> None:
    file["targets"] = np.arange(rows)


def external_link(file: h5py.File) -> None:
    file["inputs"] = h5py.ExternalLink("/somewhere/else.h5", "/inputs")
    add_targets(file)


def external_link_behind_a_soft_one(file: h5py.File) -> None:
    file["elsewhere"] = h5py.ExternalLink("/somewhere/else.h5", "/")
    file["inputs"] = h5py.SoftLink("/elsewhere/inputs")
    add_targets(file)


def virtual_dataset(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(4, 3), dtype="f4")
    layout[:] = h5py.VirtualSource("other.h5", "inputs", shape=(4, 3))
    file.create_virtual_dataset("inputs", layout)
    add_targets(file)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("inputs", (4, 3), "f4", external=[("raw.bin", 0, 48)])
    add_targets(file)


def other_names(file: h5py.File) -> None:
    file["x"] = np.zeros((4, 3), "f4")
    file["labels/y"] = np.arange(4)


def a_group(file: h5py.File) -> None:
    file.create_group("inputs")
    add_targets(file)


def dangling_link(file: h5py.File) -> None:
    file["inputs"] = h5py.SoftLink("/nowhere")
    add_targets(file)


def cycle_of_links(file: h5py.File) -> None:
    file["inputs"] = h5py.SoftLink("/again")
    file["again"] = h5py.SoftLink("/inputs")
    add_targets(file)


def lengths_differ(file: h5py.File) -> None:
    file["inputs"] = np.zeros((5, 3), "f4")
    add_targets(file)


def one_value(file: h5py.File) -> None:
    file["inputs"] = 3.0
    add_targets(file)


def rows_without_end(file: h5py.File) -> None:
    file.create_dataset("inputs", (10**13, 3), "f4", chunks=(10, 3))
    file.create_dataset("targets", (10**13,), "i8", chunks=(10,))


def strings(file: h5py.File) -> None:
    file["inputs"] = ["a", "b", "c", "d"]
    add_targets(file)


def later_schema(file: h5py.File) -> None:
    file["inputs"] = np.zeros((4, 3), "f4")
    add_targets(file)
    file.attrs["hvd_train_schema"] = 99


def wrong_count(file: h5py.File) -> None:
    file["inputs"] = np.zeros((4, 3), "f4")
    add_targets(file)
    file.attrs["hvd_train_schema"] = 1
    file.attrs["hvd_train_num_samples"] = 7


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            external_link,
            r"`inputs` is an external link to /somewhere/else\.h5:/inputs\. Expected .*name the other file",
        ),
        (external_link_behind_a_soft_one, r"`inputs` is an external link to /somewhere/else\.h5"),
        (virtual_dataset, r"`inputs` is virtual: its values are in other\.h5\. Expected"),
        (external_storage, r"`inputs` has external storage: its values are in raw\.bin\. Expected"),
        (
            other_names,
            r"no dataset `inputs`; the file has `x` \[4, 3\] float32, `labels/y` \[4\] int64\. "
            r"Set data\.inputs and data\.targets",
        ),
        (a_group, r"no dataset `inputs`, but a group; the file has `targets`"),
        (dangling_link, r"`inputs` leads by a soft link to `/nowhere`, which is not in the file"),
        (cycle_of_links, r"`inputs` leads through more than 16 soft links, as a cycle of soft links does"),
        (lengths_differ, r"`inputs` has 5 rows, `targets` has 4 rows\. Expected one row per sample"),
        (one_value, r"`inputs` is a single value\. Expected samples along its first axis"),
        (
            rows_without_end,
            r"`inputs` is float32 \[10000000000000, 3\] in a file of \d+ bytes\. .*never written",
        ),
        (strings, r"`inputs` holds strings\. Expected integers"),
        (later_schema, r"shard schema 99: this program reads schema 1 or 2\. "),
        (wrong_count, r"4 rows, but the file records 7 samples"),
    ],
)
def test_refused(tmp_path: Path, build: Callable[[h5py.File], None], message: str) -> None:
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        build(file)
    with pytest.raises(DataError, match=rf"bad\.h5: .*{message}"):
        read_info(path, plain(NAMES))


def test_an_external_link_is_not_followed_even_where_its_file_exists(tmp_path: Path) -> None:
    other = write_foreign(tmp_path / "other.h5", 4)
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["inputs"] = h5py.ExternalLink(str(other), "/inputs")
        file["targets"] = np.arange(4)
    with pytest.raises(DataError, match="external link"):
        read_info(tmp_path / "bad.h5", plain(NAMES))


@pytest.mark.parametrize("kept", [0, 7, 100, 600, 2000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_foreign(tmp_path / "short.h5", 500)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"short\.h5: .*Expected a complete HDF5 file"):
        read_info(path, plain(NAMES))


def test_a_file_that_is_not_hdf5_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "data.csv"
    text.write_text("1,2,3\n" * 1000)
    with pytest.raises(DataError, match=r"data\.csv: .*signature not found.*Expected a complete HDF5 file"):
        read_info(text, plain(NAMES))
    with pytest.raises(DataError, match=r"none\.h5: no such file"):
        read_info(tmp_path / "none.h5", plain(NAMES))
    with pytest.raises(DataError, match=r"is a folder"):
        read_info(tmp_path, plain(NAMES))


def test_damage_anywhere_in_the_file_never_raises_anything_else(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 40, chunks=(10, 3))
    good = path.read_bytes()
    refused = 0
    for position in range(0, len(good), 29):
        damaged = bytearray(good)
        damaged[position : position + 8] = b"\xa5" * 8
        path.write_bytes(damaged)
        try:
            with ShardFile(path, plain(NAMES)) as shard:
                for name in NAMES:
                    if shard.info.fields[name].shape in ((), (3,)) and shard.info.num_samples == 40:
                        shard.read(name, 0, 40)
        except DataError as error:
            refused += "a.h5" in str(error)
    assert refused > 5, "the superblock alone is more than that"


def test_links_and_groups_within_the_file_are_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/images"] = np.arange(12, dtype="u1").reshape(4, 3)
        file["train/current"] = h5py.SoftLink("images")
        file["y"] = h5py.SoftLink("/labels")
        file["labels"] = np.array([0, 1, 0, 1], bool)
    with ShardFile(tmp_path / "a.h5", plain(("train/current", "y"))) as shard:
        assert shard.info.num_samples == 4
        np.testing.assert_array_equal(shard.read("train/current", 1, 3), [[3, 4, 5], [6, 7, 8]])
        np.testing.assert_array_equal(shard.read("y", 0, 4), [False, True, False, True])


def test_the_header_says_how_datasets_lie(tmp_path: Path) -> None:
    flat = read_info(write_foreign(tmp_path / "plain.h5", 20), plain(NAMES))
    assert (flat.contiguous, flat.chunk_rows, flat.compressed) == (True, None, False)
    packed = read_info(
        write_foreign(tmp_path / "packed.h5", 20, chunks=(5, 3), compression="gzip"), plain(NAMES)
    )
    assert (packed.contiguous, packed.chunk_rows, packed.compressed) == (False, 5, True)
    assert (flat.scale, flat.class_counts, flat.checksum_rows) == (None, None, None)


def test_two_names_may_be_one_dataset(tmp_path: Path) -> None:
    info = read_info(write_foreign(tmp_path / "a.h5", 5), plain(("targets",)))
    assert list(info.fields) == ["targets"]


def test_a_file_that_another_process_has_locked_can_be_read(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 5)
    holding = (
        f"import h5py; f = h5py.File({str(path)!r}, 'r+', locking=True); print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert read_info(path, plain(NAMES)).num_samples == 5
        holder.communicate(b"\n", timeout=seconds(60))


def test_a_file_that_the_same_process_has_open_can_be_read(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 5)
    with h5py.File(path):
        assert read_info(path, plain(NAMES)).num_samples == 5


@pytest.mark.parametrize("layout", [{}, {"chunks": (10, 3)}, {"chunks": (40, 3), "compression": "gzip"}])
def test_rows_are_read_in_pieces_that_end_where_chunks_end(
    layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece is progress of the rank; a chunk in two pieces would be decompressed twice."""
    path = write_foreign(tmp_path / "a.h5", 40, **layout)
    with ShardFile(path, plain(NAMES)) as file:
        whole = file.read("inputs", 0, 40)
        monkeypatch.setattr(chunks, "_PIECE_BYTES", 12 * whole[0].nbytes)
        marks: list[int] = []
        monkeypatch.setattr(chunks, "mark", lambda: marks.append(1))
        for start, stop in ((0, 40), (7, 33), (39, 40)):
            marks.clear()
            assert (file.read("inputs", start, stop) == whole[start:stop]).all()
            step = {(): 12, (10, 3): 10, (40, 3): 40}[layout.get("chunks", ())]
            assert len(marks) == (stop - 1) // step - start // step + 1

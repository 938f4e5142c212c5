"""Datasets that are elsewhere, that are not there, or that have no rows: what is said, and that it helps."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.places import plain
from hvd_train.tools.shard import main
from tests.unit.data.recipes import hdf5_tool, refusal, written_again
from tests.unit.data.shards import inputs_of, write_foreign

NAMES = ("inputs", "targets")
SET_NAMES = "Set data.inputs and data.targets to the names of the datasets of inputs and targets."


def rows_of(path: Path, name: str = "inputs") -> np.ndarray:
    with ShardFile(path, plain((name, "targets"))) as file:
        return file.read(name, 0, file.info.num_samples)


def external_link(folder: Path) -> None:
    write_foreign(folder / "other.h5", 8)
    with h5py.File(folder / "a.h5", "w") as file:
        file["inputs"] = h5py.ExternalLink("other.h5", "/inputs")
        file["targets"] = np.arange(8)


def virtual(folder: Path) -> None:
    layout = h5py.VirtualLayout((8, 3), "f4")
    for part in range(2):
        write_foreign(folder / f"part{part}.h5", 4, first=4 * part)
        layout[4 * part : 4 * part + 4] = h5py.VirtualSource(f"part{part}.h5", "inputs", (4, 3))
    with h5py.File(folder / "a.h5", "w", libver=("earliest", "v110")) as file:
        file.create_virtual_dataset("inputs", layout)
        file["targets"] = np.arange(8)


def virtual_within(folder: Path) -> None:
    with h5py.File(folder / "a.h5", "w", libver=("earliest", "v110")) as file:
        file["rows"] = inputs_of(0, 8)
        layout = h5py.VirtualLayout((8, 3), "f4")
        layout[...] = h5py.VirtualSource(".", "rows", (8, 3))
        file.create_virtual_dataset("inputs", layout)
        file["targets"] = np.arange(8)


def external_storage(folder: Path) -> None:
    with h5py.File(folder / "a.h5", "w") as file:
        parts = [(str(folder / f"{part}.bin"), 0, 24) for part in range(4)]
        file.create_dataset("inputs", (8, 3), "f4", external=parts)[...] = inputs_of(0, 8)
        file["targets"] = np.arange(8)


HERE = (
    "Expected them in the dataset: set data.follow_links = true (of `shard`: --follow-links), or, with all "
    "of that in place, write it again, by `h5repack -l CONTI OLD.h5 NEW.h5` or with h5py"
)


@pytest.mark.parametrize(
    ("build", "seen"),
    [
        (
            external_link,
            "`inputs` is an external link to other.h5:/inputs. Expected the dataset in this file: set "
            "data.follow_links = true (of `shard`: --follow-links), name the other file as the shard, or "
            "copy the dataset, with h5py",
        ),
        (
            virtual,
            f"dataset `inputs` is virtual: its values are in part0.h5, part1.h5. {HERE}",
        ),
        (
            virtual_within,
            f"dataset `inputs` is virtual: its values are in other datasets of this file. {HERE}",
        ),
        (
            external_storage,
            "dataset `inputs` has external storage: its values are in FOLDER/0.bin, FOLDER/1.bin, "
            f"FOLDER/2.bin and 1 more. {HERE}",
        ),
    ],
)
def test_values_that_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[Path], None], seen: str
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path)
    path = tmp_path / "a.h5"
    message = refusal(path)
    assert message.replace(str(tmp_path), "FOLDER").startswith(f"FOLDER/a.h5: {seen}, from an open file")
    np.testing.assert_array_equal(rows_of(written_again(path, message, "targets")), inputs_of(0, 8))
    assert "set data.follow_links = true (of `shard`: --follow-links)" in message
    with ShardFile(path, plain(NAMES, follow_links=True)) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 8), inputs_of(0, 8))
    assert main(["check", "--follow-links", str(path)]) == 0
    if "h5repack" in message:
        subprocess.run([hdf5_tool("h5repack"), "-l", "CONTI", path, tmp_path / "packed.h5"], check=True)
        np.testing.assert_array_equal(rows_of(tmp_path / "packed.h5"), inputs_of(0, 8))


def test_the_other_file_of_an_external_link_as_the_shard(tmp_path: Path) -> None:
    external_link(tmp_path)
    np.testing.assert_array_equal(rows_of(tmp_path / "other.h5"), inputs_of(0, 8))


def written(path: Path, build: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "w") as file:
        build(file)
        file["rows"] = inputs_of(0, 8)
        file["targets"] = np.arange(8)
    return path


def cycle(file: h5py.File) -> None:
    file["inputs"] = h5py.SoftLink("/b")
    file["b"] = h5py.SoftLink("inputs")


def cycle_that_grows(file: h5py.File) -> None:
    file["inputs"] = h5py.SoftLink("inputs/x/x/x/x")


def chain(file: h5py.File) -> None:
    for number in range(1, 17):
        file[f"s{number}"] = h5py.SoftLink(f"s{number + 1}")
    file["s17"] = h5py.SoftLink("rows")
    file["inputs"] = h5py.SoftLink("s1")


def dangling(file: h5py.File) -> None:
    file["inputs"] = h5py.SoftLink("b")
    file["b"] = h5py.SoftLink("old/rows")


def below_a_dataset(file: h5py.File) -> None:
    file["inputs"] = h5py.SoftLink("rows/x")


def group(file: h5py.File) -> None:
    file.create_group("inputs")


def named_type(file: h5py.File) -> None:
    file["inputs"] = np.dtype("f4")


def scalar(file: h5py.File) -> None:
    file["inputs"] = 3.0


def null(file: h5py.File) -> None:
    file["inputs"] = h5py.Empty("f4")


CYCLE = "`inputs` leads through more than 16 soft links, as a cycle of soft links does; the file has HERE"


@pytest.mark.parametrize(
    ("build", "seen"),
    [
        (cycle, CYCLE),
        (cycle_that_grows, CYCLE),
        (chain, CYCLE),
        (
            dangling,
            "`inputs` leads by a soft link to `old/rows`, which is not in the file; the file has HERE",
        ),
        (
            below_a_dataset,
            "`inputs` leads by a soft link to `rows/x`, which is not in the file; the file has HERE",
        ),
        (group, "no dataset `inputs`, but a group; the file has HERE"),
        (named_type, "no dataset `inputs`, but a named type; the file has HERE"),
        (
            scalar,
            "dataset `inputs` is a single value. Expected samples along its first axis; the file has "
            "`inputs` [] float64, HERE",
        ),
        (
            null,
            "dataset `inputs` is without values (a null dataspace). Expected samples along its first axis; "
            "the file has `inputs` [] float32, HERE",
        ),
    ],
)
def test_names_that_lead_to_no_rows(tmp_path: Path, build: Callable[[h5py.File], None], seen: str) -> None:
    """The remedy is to name one of the datasets that the message lists."""
    path = written(tmp_path / "a.h5", build)
    here = "`rows` [8, 3] float32, `targets` [8] int64"
    assert refusal(path) == f"{path}: {seen.replace('HERE', here)}. {SET_NAMES}"
    np.testing.assert_array_equal(rows_of(path, "rows"), inputs_of(0, 8))


def test_soft_links_as_many_as_hdf5_itself_follows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", chain)
    np.testing.assert_array_equal(rows_of(path, "s2"), inputs_of(0, 8))


def test_a_dataset_that_was_written_and_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a shard of hvd_train that is damage; a name that was never written is not."""
    assert main(["write", "digits", "--out", str(tmp_path)]) == 0
    path = tmp_path / "train-00000-of-00001.h5"
    assert main(["check", str(path), "--inputs", "images"]) == 1
    assert f"{path}: not supported\n" in capsys.readouterr().out
    with h5py.File(path, "r+") as file:
        del file["inputs"]
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr() == (
        f"{path}: damaged\n",
        f"{path}: no dataset `inputs`, which hvd_train wrote; the file has `targets` [1797] int64. The file "
        "is damaged: copy or write it again.\n",
    )


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(file: h5py.File) -> None:
        h5py.h5g.create(file.id, b"\xff")
        dataset = h5py.h5s.create_simple((8,))
        h5py.h5d.create(file.id, b"\xff/\x80\n", h5py.h5t.IEEE_F32LE, dataset)

    path = written(tmp_path / "a.h5", build)
    renaming = "file.id.links.move(b'\\xff/\\x80\\n', file.id, b'NAME')"
    listed = (
        "the file has `rows` [8, 3] float32, `targets` [8] int64, `\\xff/\\x80\\n` [8] float32 (not UTF-8: "
        f"rename it by `{renaming}`)"
    )
    for name in ("inputs", "\udcff/\udc80"):
        message = refusal(path, (name, "targets"))
        assert message == f"{path}: no dataset `{name}`; {listed}. {SET_NAMES}"
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().out == f"{path}: not supported\n"
    with h5py.File(path, "r+") as file:
        exec(renaming.replace("NAME", "inputs"), {"file": file})
    assert not rows_of(path).any()


def test_a_file_of_a_hundred_thousand_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        space, kind = h5py.h5s.create_simple((3,)), h5py.h5t.IEEE_F32LE
        for number in range(100_000):
            h5py.h5d.create(file.id, b"%d" % number, kind, space)
    message = refusal(path)
    assert message.endswith(f" [3] float32 and 1,988 more, among its first 2,000 objects. {SET_NAMES}")
    assert message.count("float32") == 12


def test_groups_that_are_ten_thousand_deep(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(3)
        node = file.id
        for _ in range(10_000):
            node = h5py.h5g.create(node, b"g")
        h5py.h5d.create(node, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((3,)))
    message = refusal(path)
    assert message == (
        f"{path}: no dataset `inputs`; the file has `x` [3] int64, among its first 2,000 objects. {SET_NAMES}"
    )
    deep = "/".join(["g"] * 10_000 + ["x"])
    assert read_info(path, plain((deep,))).num_samples == 3


def test_a_file_without_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["a/b/root"] = file["/"]  # a cycle of hard links
    assert refusal(path) == f"{path}: no dataset `inputs`; the file has no datasets. {SET_NAMES}"


def test_names_of_a_megabyte_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["x" * 1_000_000] = np.zeros((3, 2))
        file["soft"] = h5py.SoftLink("s" * 60_000)
        file["external"] = h5py.ExternalLink("e" * 30_000, "/" + "p" * 30_000)
    cut = f"`{'x' * 100}... (1,000,000 characters)` [3, 2] float64"
    assert refusal(path) == (
        f"{path}: no dataset `inputs`; the file has `external` (an external link), {cut}. {SET_NAMES}"
    )
    assert refusal(path, ("soft",)).startswith(
        f"{path}: `soft` leads by a soft link to `{'s' * 100}... (60,000 characters)`, which is not"
    )
    assert len(refusal(path, ("external",))) < 1000
    assert read_info(path, plain(("x" * 1_000_000,))).num_samples == 3

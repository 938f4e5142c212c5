"""`data.follow_links`: shards whose datasets are in other files of the folder."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import find_shards, open_catalog
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.places import plain
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.tools.shard import main
from tests.unit.data.shards import inputs_of, row_numbers, write_foreign

NAMES = ("inputs", "targets")
FOLLOWED = plain(NAMES, follow_links=True)


def rows_of(path: Path) -> dict[str, np.ndarray]:
    with ShardFile(path, FOLLOWED) as file:
        return {name: file.read(name, 0, file.info.num_samples) for name in NAMES}


def refusal(path: Path, error: type[DataError] = DataError) -> str:
    with pytest.raises(error) as refused:
        read_info(path, FOLLOWED)
    return str(refused.value)


def master(folder: Path, target: str, name: str = "master.h5", where: str = "/") -> Path:
    """A file whose datasets are external links to those of `target`."""
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / name, "w") as file:
        for dataset in NAMES:
            file[dataset] = h5py.ExternalLink(target, where + dataset)
    return folder / name


def test_external_links_are_followed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through soft links, other files and folders; names are relative to the file that has the link."""
    (tmp_path / "raw").mkdir()
    write_foreign(tmp_path / "raw" / "data.h5", 20)
    with h5py.File(tmp_path / "raw" / "middle.h5", "w") as file:
        file["entry"] = h5py.ExternalLink("data.h5", "/")
        file["old/inputs"], file["old/targets"] = (h5py.SoftLink(f"/entry/{name}") for name in NAMES)
    path = master(tmp_path, "raw/middle.h5", where="/old/")
    assert row_numbers(rows_of(path)) == list(range(20))
    info = read_info(path, FOLLOWED)
    assert not info.contiguous, "of one file"
    absolute = master(tmp_path, str(tmp_path / "raw" / "data.h5"), "absolute.h5")
    assert row_numbers(rows_of(absolute)) == list(range(20))
    monkeypatch.chdir(tmp_path)
    assert row_numbers(rows_of(Path("master.h5"))) == list(range(20))


def test_each_link_of_a_group_as_a_shard(tmp_path: Path) -> None:
    """As detectors write them: `entry/data/data_000001`, ..., each in a file of its own."""
    with h5py.File(tmp_path / "master.h5", "w") as file:
        for number in range(1, 4):
            write_foreign(tmp_path / f"data_{number}.h5", 10, first=10 * number)
            for name in NAMES:
                file[f"entry/{name}/data_{number:06}"] = h5py.ExternalLink(f"data_{number}.h5", name)
    fields = {name: f"entry/{name}/*" for name in NAMES}
    data = DataConfig(path=str(tmp_path / "master.h5"), fields=fields, follow_links=True)
    catalog = open_catalog(data)
    assert len(catalog.shards) == 3
    rows = Rows(catalog.train, catalog.sample.fields)
    assert row_numbers(rows.read(0, 30)) == list(range(10, 40))
    rows.close()


@pytest.mark.parametrize(
    ("target", "real"),
    [("../out.h5", "out.h5"), ("ABSOLUTE", "out.h5"), ("link.h5", "out.h5"), ("sub/out.h5", "out.h5")],
)
def test_a_file_outside_of_the_folder_is_not_opened(tmp_path: Path, target: str, real: str) -> None:
    out = write_foreign(tmp_path / "out.h5", 5)
    folder = tmp_path / "shards"
    path = master(folder, str(out) if target == "ABSOLUTE" else target)
    (folder / "link.h5").symlink_to(out)
    (folder / "sub").symlink_to(tmp_path)
    given = str(out) if target == "ABSOLUTE" else target
    assert refusal(path, UnsupportedShard) == (
        f"{path}: `inputs` leads to {given}, which is {tmp_path / real}, outside of the folder of the shard, "
        f"{folder}. Expected a file in that folder or below it: move the file there, and write the link "
        "again, with its new name relative to the file that has the link."
    )
    (folder / "link.h5").unlink()
    out.rename(folder / "here.h5")
    assert row_numbers(rows_of(master(folder, "here.h5"))) == list(range(5))


def test_a_folder_that_is_a_symbolic_link_is_a_root(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_foreign(tmp_path / "real" / "data.h5", 5)
    master(tmp_path / "real", "data.h5")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert row_numbers(rows_of(tmp_path / "link" / "master.h5")) == list(range(5))


def test_links_in_a_cycle(tmp_path: Path) -> None:
    for here, there in (("a.h5", "b.h5"), ("b.h5", "a.h5")):
        master(tmp_path, there, here)
    message = refusal(tmp_path / "a.h5", UnsupportedShard)
    assert message.startswith(
        f"{tmp_path / 'a.h5'}: `inputs` leads through more than 16 links, as a cycle of links does; the file "
        "has"
    )


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    path = master(tmp_path, "data.h5")
    data = tmp_path / "data.h5"
    assert refusal(path) == (
        f"{path}: `inputs` leads to data.h5, but there is no file {data}. Expected every file that a shard "
        "leads to: put it there, or write the shard without it."
    )
    os.mkfifo(data)
    assert refusal(path) == f"{data}: is a named pipe (FIFO). Expected an HDF5 file: name a regular file."
    data.unlink()
    data.write_bytes(b"text" * 1000)
    assert refusal(path).startswith(f"{data}: ")
    write_foreign(data, 100, chunks=(10, 3), compression="gzip")
    content = bytearray(data.read_bytes())
    with h5py.File(data) as file:
        chunk = file["inputs"].id.get_chunk_info(4)
    content[chunk.byte_offset + 5 : chunk.byte_offset + chunk.size] = bytes(chunk.size - 5)
    data.write_bytes(content)
    with ShardFile(path, FOLLOWED) as file, pytest.raises(DataError) as refused:
        file.read("inputs", 0, 100)
    assert str(refused.value).startswith(f"{data}: dataset `inputs`, rows 0 to 99: ")


def test_a_link_to_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    write_foreign(tmp_path / "data.h5", 5)
    path = master(tmp_path, "data.h5", where="/old/")
    assert refusal(path) == (
        f"{path}: `inputs` leads by links to {tmp_path / 'data.h5'}:/old/inputs, which is not in that file; "
        "the file has `inputs` [5, 3] float32, `targets` [5] int64. Correct the link, or put the dataset "
        "there."
    )


def test_values_in_raw_files(tmp_path: Path) -> None:
    """Their names are relative to the file, whatever the working directory."""
    (tmp_path / "raw.bin").write_bytes(bytes(8) + inputs_of(0, 8).tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("inputs", (8, 3), "f4", external=[("raw.bin", 8, h5py.h5f.UNLIMITED)])
        file["targets"] = np.arange(8) % 7
    assert row_numbers(rows_of(tmp_path / "a.h5")) == list(range(8))
    os.truncate(tmp_path / "raw.bin", 100)
    assert refusal(tmp_path / "a.h5") == (
        f"{tmp_path / 'raw.bin'}: 100 bytes, but dataset `inputs` of {tmp_path / 'a.h5'} has 96 from byte 8 "
        "on in it. The file is incomplete: copy it again."
    )
    (tmp_path / "raw.bin").unlink()
    assert "but there is no file" in refusal(tmp_path / "a.h5")


def shard_of_links(folder: Path, name: str, source: str, first: int, last: int) -> None:
    """A shard that has rows of the file `source`, by virtual datasets."""
    with h5py.File(folder / source) as file:
        shapes = {dataset: (file[dataset].shape, file[dataset].dtype) for dataset in NAMES}
    with h5py.File(folder / name, "w", libver="latest") as file:
        for dataset, (shape, dtype) in shapes.items():
            layout = h5py.VirtualLayout((last - first, *shape[1:]), dtype)
            layout[...] = h5py.VirtualSource(source, dataset, shape)[first:last]
            file.create_virtual_dataset(dataset, layout)


def test_rows_that_two_shards_lead_to(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_foreign(tmp_path / "raw" / "data.h5", 30)
    shard_of_links(tmp_path, "a.h5", "raw/data.h5", 0, 20)
    shard_of_links(tmp_path, "b.h5", "raw/data.h5", 20, 30)
    data = DataConfig(path=str(tmp_path), follow_links=True)
    assert [info.num_samples for info in find_shards(data).train] == [20, 10]
    shard_of_links(tmp_path, "b.h5", "raw/data.h5", 19, 30)
    seen = (
        f"{tmp_path / 'b.h5'}: its inputs and those of {tmp_path / 'a.h5'} are the same rows of "
        f"{tmp_path / 'raw/data.h5'}: dataset `inputs`. Expected "
    )
    with pytest.raises(DataError) as refused:
        find_shards(data)
    assert str(refused.value) == f"{seen}every row once, or it counts twice: leave one of them out."
    (tmp_path / "b.h5").rename(tmp_path / "raw" / "b.h5")
    master(tmp_path, "raw/data.h5", "b.h5")
    with pytest.raises(DataError) as refused:
        find_shards(
            DataConfig(path=str(tmp_path / "a.h5"), validation=str(tmp_path / "b.h5"), follow_links=True)
        )
    assert str(refused.value) == (
        f"{seen}no row to be both trained on and evaluated on: leave it out of one part."
    )


def test_a_folder_with_the_master_and_its_files(tmp_path: Path) -> None:
    """Both end in .h5: the rows would count twice."""
    write_foreign(tmp_path / "data.h5", 5)
    master(tmp_path, "data.h5")
    with pytest.raises(
        DataError, match=r"master\.h5: its inputs and those of .*data\.h5 are the same rows of"
    ):
        find_shards(DataConfig(path=str(tmp_path), follow_links=True))
    assert len(find_shards(DataConfig(path=str(tmp_path / "master.h5"), follow_links=True)).train) == 1


def test_the_commands_of_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "data.h5", 50)
    path = str(master(tmp_path, "data.h5"))
    assert main(["check", path]) == 1
    assert "--follow-links" in capsys.readouterr().err
    assert main(["check", "--follow-links", path]) == 0
    assert main(["info", "--follow-links", path]) == 0
    assert "float32 [3]" in capsys.readouterr().out
    assert main(["info", path]) == 2


def test_a_model_knows_that_links_were_followed(tmp_path: Path) -> None:
    """So that other files of this kind are read with it; it does not make other samples."""
    write_foreign(tmp_path / "data.h5", 50)
    shards = find_shards(DataConfig(path=str(master(tmp_path, "data.h5")), follow_links=True))
    plain_shards = find_shards(DataConfig(path=str(tmp_path / "data.h5")))
    assert type(shards.sample).from_json(shards.sample.to_json()).fields["inputs"].follow_links
    assert shards.sample == plain_shards.sample
    assert shards.sample.contents() == plain_shards.sample.contents()

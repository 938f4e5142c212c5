"""What writers of shards leave when they are killed, and what the next one makes of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import hvd_train
from hvd_train.config import DataConfig
from hvd_train.data import scratch
from hvd_train.data.catalog import open_catalog
from hvd_train.errors import DataError
from hvd_train.io.held_folder import HeldFolder
from hvd_train.tools.shard import main
from tests.deadlines import seconds
from tests.launching import ROOT

ROWS = 1003

KILLED = """
import os, signal, sys
from importlib import import_module

module, _, name = sys.argv[1].rpartition(":")
owner = import_module(module)
for part in name.split(".")[:-1]:
    owner = getattr(owner, part)
name, calls = name.split(".")[-1], []
before = getattr(owner, name)

def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **kwargs)

setattr(owner, name, killed)
"""

COMMAND = (
    KILLED
    + """
from hvd_train.tools.shard import main
main(["write", *sys.argv[3:]])
"""
)

PROGRAM = (
    KILLED
    + """
import numpy as np, hvd_train
from hvd_train.data import shard_writer
shard_writer._PENDING_BYTES = 1000
with hvd_train.ShardWriter(sys.argv[3], rows_per_shard=30, force=len(sys.argv) > 4) as writer:
    for i in range(100):
        writer.append({"inputs": np.full(4, i, "f4"), "targets": i % 3})
"""
)


def killed(program: str, phase: str, call: int, *args: str) -> None:
    """Runs a program that is killed by the call number `call` of `phase`, a function."""
    command = [sys.executable, "-c", program, phase, str(call), *args]
    done = subprocess.run(command, timeout=seconds(60), check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("source")
    np.save(folder / "x.npy", np.repeat(np.arange(ROWS, dtype="f4")[:, None], 4, axis=1))
    np.save(folder / "y.npy", np.arange(ROWS) % 7)
    return [str(folder / "x.npy"), str(folder / "y.npy")]


SPLIT = ["--split", "validation=0.2,test=0.1"]


@pytest.mark.parametrize(
    ("phase", "call", "options", "left"),
    [
        ("hvd_train.data.survey_source:_count", 1, [*SPLIT, "--stratify"], set()),
        ("hvd_train.data.spool:Spool.flush", 1, ["--shuffle"], set()),
        ("hvd_train.data.spool:Spool.sorted_blocks", 1, ["--shuffle"], set()),
        ("hvd_train.data.shard_file:ShardBuilder.append", 1, [], set()),
        ("hvd_train.data.hdf5.write:ShardStream.finish", 4, [], {0, 1, 2}),
        ("hvd_train.data.part_writer:complete", 3, [], {0, 1}),
        ("hvd_train.data.part_writer:save_manifest", 1, [], {0, 1, 2, 3, 4}),
        ("hvd_train.data.part_writer:save_manifest", 2, SPLIT, {0, 1, 2, 3, 4}),
        ("hvd_train.data.part_writer:PartWriter.end", 2, SPLIT, {0, 1, 2, 3, 4}),
    ],
)
def test_a_command_goes_on_where_it_was_killed(
    tmp_path: Path, source: list[str], phase: str, call: int, options: list[str], left: set[int]
) -> None:
    args = [*source, "--shards", "5", *options, "--out"]
    killed(COMMAND, phase, call, *args, str(tmp_path / "killed"))
    there = {path.name for path in (tmp_path / "killed").iterdir()}
    assert len([name for name in there if name.startswith(".writing-")]) == 1
    shards = {name for name in there if name.startswith("train-")}
    assert shards == {f"train-{i:05d}-of-00005.h5" for i in left}
    if left and not (tmp_path / "killed" / "manifest.json").exists():
        with pytest.raises(DataError, match="`hvd_train shard write` was ended before all shards"):
            open_catalog(DataConfig(path=str(tmp_path / "killed"), validation=0.1))
    assert main(["write", *args, str(tmp_path / "killed")]) == 0
    assert main(["write", *args, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*"))


def test_another_command_removes_what_a_killed_one_left(tmp_path: Path, source: list[str]) -> None:
    """Its temporary files at once, its complete shards where they are to be replaced."""
    out = ["--out", str(tmp_path / "d")]
    killed(COMMAND, "hvd_train.data.hdf5.write:ShardStream.finish", "4", *source, "--shards", "5", *out)
    (left,) = (tmp_path / "d").glob(".writing-*")
    assert main(["write", *source, *out, "--part", "validation"]) == 0
    assert not left.exists()
    assert main(["write", *source, *out, "--shards", "2"]) == 2
    assert len(list((tmp_path / "d").glob("train-*-of-00005.h5"))) == 3
    assert main(["write", *source, *out, "--shards", "2", "--force"]) == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "manifest.json",
        "train-00000-of-00002.h5",
        "train-00001-of-00002.h5",
        "validation-00000-of-00001.h5",
    ]


@pytest.mark.parametrize(
    ("phase", "call"),
    [
        ("hvd_train.data.spool:Spool.flush", 2),
        ("hvd_train.data.hdf5.write:ShardStream.finish", 2),
        ("hvd_train.data.shard_writer:complete", 3),
        ("hvd_train.data.part_writer:save_manifest", 1),
    ],
)
def test_a_program_begins_anew_where_it_was_killed(tmp_path: Path, phase: str, call: int) -> None:
    out = tmp_path / "d"
    killed(PROGRAM, phase, call, str(out))
    assert len(list(out.glob(".writing-*"))) == 1
    assert not (out / "manifest.json").exists()
    if "complete" in phase or "manifest" in phase:
        assert len(list(out.glob("train-*.h5"))) == (2 if "complete" in phase else 4)
        with pytest.raises(DataError, match="was ended before all shards"):
            open_catalog(DataConfig(path=str(out)))
    with hvd_train.ShardWriter(out) as writer:
        assert [path.name for path in out.iterdir()] == [writer._scratch.path.name]
        writer.append({"inputs": np.zeros(4), "targets": 0})
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train-00000-of-00001.h5"]


def test_what_was_to_be_replaced_stays_until_a_killed_program_replaced_it(tmp_path: Path) -> None:
    out = tmp_path / "d"
    with hvd_train.ShardWriter(out, shards=4) as writer:
        for i in range(8):
            writer.append({"inputs": np.full(4, i, "f4"), "targets": 0})
    killed(PROGRAM, "hvd_train.data.shard_writer:complete", 1, str(out), "force")
    before = contents(out)
    assert main(["check", str(out)]) == 0
    with pytest.raises(DataError, match=r"train-00000-of-00004\.h5: exists\. Give force=True"):
        hvd_train.ShardWriter(out)
    assert {name: before[name] for name in contents(out)} == contents(out)
    assert len(contents(out)) == 5


def test_a_living_writer_keeps_its_files(
    tmp_path: Path, source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d"
    one, other = hvd_train.ShardWriter(out), hvd_train.ShardWriter(out)
    one.append({"inputs": np.zeros(4, "f4"), "targets": 0})
    other.append({"inputs": np.zeros(4, "f4"), "targets": 1})
    assert main(["write", *source, "--out", str(out)]) == 2
    pattern = (
        r"hvd_train: (.*): another program is writing the train part, on (.*)\. Wait until it has ended, or "
    )
    refusal = re.fullmatch(pattern + r"give another folder\.\n", capsys.readouterr().err)
    assert refusal is not None
    assert Path(refusal[1]) in (one._scratch.path, other._scratch.path)
    assert refusal[2] == scratch._HOST
    assert main(["write", *source, "--out", str(out), "--part", "validation"]) == 0
    one.close()
    with pytest.raises(DataError, match=r"train-00000-of-00001\.h5: exists\. Give force=True"):
        other.close()
    catalog = open_catalog(DataConfig(path=str(out)))
    assert [span.num_rows for span in (*catalog.train, *catalog.validation)] == [1, ROWS]
    assert catalog.labels.num_classes == 1
    assert not list(out.glob(".*"))


def test_the_command_is_refused_while_it_runs(tmp_path: Path, source: list[str]) -> None:
    writing = HeldFolder.make(tmp_path / "d", f".writing-{scratch._HOST},train+test,alone,")
    for part, code in (("train", 2), ("validation", 0)):
        assert main(["write", *source, "--out", str(tmp_path / "d"), "--part", part]) == code
    with pytest.raises(DataError, match="another program is writing the train part"):
        hvd_train.ShardWriter(tmp_path / "d")
    writing.close()
    assert main(["write", *source, "--out", str(tmp_path / "d")]) == 0


def test_files_of_another_host_stay(
    tmp_path: Path, source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its locks may not be seen here."""
    other = tmp_path / "d" / ".writing-elsewhere,train,alone,abc"
    other.mkdir(parents=True)
    (other / "owners").write_bytes(b"")
    os.utime(other, times=(0, 0))
    assert main(["write", *source, "--out", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().err == (
        f"hvd_train: {other}: temporary files of a program on elsewhere. Delete them if it is not running "
        "any more.\n"
    )
    assert other.is_dir()


def test_a_file_system_without_locks(
    tmp_path: Path, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(scratch.fcntl, "flock", fails)
    assert main(["write", *source, "--out", str(tmp_path / "d")]) == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "manifest.json",
        "train-00000-of-00001.h5",
    ]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with hvd_train.ShardWriter(tmp_path / "d") as writer:
            writer.append({"inputs": np.zeros(4), "targets": 0})
            assert writer._spool is not None
            writer._spool.flush()
            assert len(list(writer._scratch.path.iterdir())) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not (tmp_path / "d").exists()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["inputs"], file["targets"] = np.zeros((4, 2)), np.arange(4)
    assert main(["write", str(tmp_path / "x.h5"), "--out", str(tmp_path / "d"), "--shards", "9"]) == 2
    assert not (tmp_path / "d").exists()

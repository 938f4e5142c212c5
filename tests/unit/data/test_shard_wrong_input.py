"""`shard write` of sources that cannot be read and to folders that cannot be written: one error, and nothing
is left."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from hvd_train.tools.shard import main
from tests.deadlines import seconds
from tests.launching import ROOT


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is said of a request that cannot be carried out; it leaves nothing."""
    capsys.readouterr()
    assert main(["write", *args, "--out", "d"]) == 2
    assert not Path("d").exists()
    return capsys.readouterr().err.removeprefix("hvd_train: ").rstrip("\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tables_with_other_columns(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.csv").write_text("x,y,targets\n1,2,0\n")
    Path("b.csv").write_text("x,targets\n1,0\n")
    for name, columns in (("a", ["x", "y", "targets"]), ("b", ["x", "targets"])):
        table = pyarrow.table({column: [1, 0] for column in columns})
        parquet.write_table(table, f"{name}.parquet")
    for kind in ("csv", "parquet"):
        assert refused(capsys, f"a.{kind}", f"b.{kind}") == (
            f"b.{kind}: no column `y`; the file has `x`, `targets`. Expected the same columns in every file: "
            "name others, or leave the file out."
        )


def test_text_that_is_not_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.csv").write_bytes("x,targets\n1,caf\xe9\n2,b\n".encode("latin-1"))
    assert refused(capsys, "a.csv", "--inputs", "x", "--classes", "b") == (
        "a.csv: In CSV column #1: Row #2: CSV conversion error to string: invalid UTF8 data. Expected text "
        "in UTF-8: convert it."
    )
    Path("a.txt").write_bytes("caf\xe9\n".encode("latin-1") * 9)
    Path("t.py").write_text("def encode(line):\n    return list(line.encode())\n")
    assert refused(capsys, "a.txt", "--tokenizer", "t.py:encode", "--length", "4") == (
        "a.txt: line 1: invalid continuation byte. Expected text in UTF-8: convert it."
    )


def test_files_that_are_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open("whole.tar", "w") as file:
        content = io.BytesIO()
        np.save(content, np.zeros(400))
        for i in range(4):
            for name, member in ((f"{i}.cls", b"1"), (f"{i}.npy", content.getvalue())):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                file.addfile(info, io.BytesIO(member))
    whole = Path("whole.tar").read_bytes()
    for size in (12_000, 10_000, 1600):
        Path("a.tar").write_bytes(whole[:size])
        said = refused(capsys, "a.tar")
        assert said.startswith("a.tar: ")
        assert said.endswith(". Expected a complete tar file: copy it again.")
    np.save("x.npy", np.zeros((9, 4)))
    Path("y.npy").write_bytes(Path("x.npy").read_bytes()[:200])
    assert "Expected a complete .npy file" in refused(capsys, "x.npy", "y.npy")


def test_images_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p/a").mkdir(parents=True)
    assert "p: no images in its folders. Expected files ending in" in refused(capsys, "p")
    Image.fromarray(np.arange(64, dtype="u1").reshape(8, 8)).save("p/a/0.png")
    whole = Path("p/a/0.png").read_bytes()
    Path("p/a/1.png").write_bytes(whole[: len(whole) // 2])
    said = refused(capsys, "p")
    assert said.startswith("p/a/1.png: ")
    assert said.endswith(", or leave it out.")
    Path("p/a/1.png").unlink()
    assert refused(capsys, "p", "--classes", "b", "c") == (
        "p/a: has images, but is not one of --classes: `b`, `c`. Add it there, or move the folder elsewhere."
    )
    assert main(["write", "p", "--classes", "b", "a", "c", "--out", "e"]) == 0
    assert "classes: 0 b, 1 a, 2 c" in capsys.readouterr().out


def test_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "nothing").startswith(
        "nothing: no such file or folder; expected `digits`, one .npz"
    )
    assert refused(capsys, "nothing.csv") == "nothing.csv: no such file. Expected a CSV file."
    Path("a.csv").write_text("")
    assert "a.csv: Empty CSV file. Expected a complete CSV file" in refused(capsys, "a.csv")


def test_an_existing_part_is_refused_before_the_source_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("a.npz", inputs=np.zeros((9, 4)), targets=np.arange(9))
    assert main(["write", "a.npz", "--out", "e"]) == 0
    capsys.readouterr()
    assert main(["write", "nothing.csv", "--out", "e"]) == 2
    assert capsys.readouterr().err == (
        "hvd_train: e/train-00000-of-00001.h5: exists. Give --force to replace the train part, or another "
        "--out.\n"
    )


LIMITED = (
    "import resource, signal, sys; from hvd_train.tools.shard import main\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    "sys.exit(main(['write', *sys.argv[1:]]))\n"
)


@pytest.mark.parametrize("options", [[], ["--shuffle"], ["--chunk-rows", "7"]])
def test_a_disk_that_takes_no_more(options: list[str]) -> None:
    """HDF5 fails again whenever the file is touched that it could not write, and crashed."""
    np.savez("a.npz", inputs=np.zeros((2000, 100)), targets=np.arange(2000) % 3)
    command = [sys.executable, "-c", LIMITED, "a.npz", "--out", "d", *options]
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, timeout=seconds(60), check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr == (
        "hvd_train: d: cannot be written: File too large. Give --out a folder that can be, or make room "
        "there: the same command goes on with the shards that are complete.\n"
    )
    assert not Path("d").exists()


ENDLESS = (
    "import time\n\n\ndef encode(line):\n"
    "    print(line.strip(), flush=True)\n    time.sleep(0.01)\n    return list(line.encode())\n"
)


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_leaves_nothing(presses: int) -> None:
    Path("t.py").write_text(ENDLESS)
    Path("a.txt").write_text("words\n" * 100_000)
    args = ["shard", "write", "a.txt", "--tokenizer", "t.py:encode", "--length", "4", "--out", "d"]
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from hvd_train.cli import main; main(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "words\n"
        for _ in range(presses):
            job.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, errors = job.communicate(timeout=seconds(60))
    assert job.returncode == -signal.SIGINT
    assert "Traceback" not in errors
    if presses == 1:
        assert not Path("d").exists()

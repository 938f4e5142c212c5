"""A signal while a file is read ends with the name of that file."""

from __future__ import annotations

import os
import re
import signal
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.data.crash import in_child
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.places import plain
from hvd_train.errors import DataError
from hvd_train.tools.shard import main
from tests.launching import run
from tests.unit.data.shards import write_foreign

SIGNALS = [signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("thread", [False, True], ids=["main", "thread"])
def test_the_name_is_on_stderr(number: signal.Signals, thread: bool) -> None:
    script = (
        "import signal, sys, threading; from hvd_train.data.crash import naming\n"
        "def work():\n    naming('data/good.h5')(int)\n"
        "    naming('data/bad.h5')(signal.raise_signal, int(sys.argv[1]))\n"
        + ("t = threading.Thread(target=work); t.start(); t.join()" if thread else "work()")
    )
    job = run([sys.executable, "-c", script, str(int(number))], deadline_s=60)
    assert job.returncode == -number
    assert re.search(r'File "<data/bad\.h5>", line \d+ in the HDF5 library reads this file', job.stderr)
    assert "good.h5" not in job.stderr


def test_a_handler_that_is_on_is_left_as_it_is() -> None:
    script = (
        "import faulthandler, os, sys, tempfile; from hvd_train.data.crash import naming\n"
        "log = tempfile.TemporaryFile(); faulthandler.enable(file=log); naming('a.h5')(int)\n"
        "if os.fork() == 0: os.abort()\n"
        "os.wait(); log.seek(0); sys.exit(b'Aborted' not in log.read())"
    )
    job = run([sys.executable, "-c", script], deadline_s=60)
    assert job.returncode == 0
    assert job.stderr == ""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_child_that_dies_is_an_error_with_the_files_name(number: signal.Signals) -> None:
    with pytest.raises(DataError, match=rf"a\.h5: the process died of {number.name} while it read this file"):
        in_child("a.h5", lambda: os.kill(os.getpid(), number))
    with pytest.raises(DataError, match=r"a\.h5: the process ended with exit code 3 while"):
        in_child("a.h5", lambda: os._exit(3))


def test_a_child_returns_its_result_or_raises_its_error(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 5)
    assert in_child(path, lambda: read_info(path, plain(("inputs", "targets")))).num_samples == 5
    assert in_child(path, lambda: None) is None
    with pytest.raises(DataError, match="no dataset `x`"):
        in_child(path, lambda: read_info(path, plain(("x",))))


@pytest.fixture
def crashing(tmp_path: Path) -> Path:
    """A chunk of no bytes under the fletcher32 filter, where HDF5 expects at least the four of the checksum;
    some versions of it read beyond the end of the chunk then."""
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        file["inputs"] = np.zeros((300, 4), np.float32)
        dataset = file.create_dataset("targets", data=np.arange(300.0), chunks=(64,), fletcher32=True)
        chunk = dataset.id.get_chunk_info(1)
    raw = bytearray(path.read_bytes())
    key = raw.rfind(struct.pack("<I", chunk.size), 0, raw.find(struct.pack("<Q", chunk.byte_offset)))
    raw[key : key + 4] = bytes(4)
    path.write_bytes(raw)
    return path


def test_a_file_on_which_hdf5_may_fail(crashing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(crashing.with_name("good.h5"), 5)
    assert main(["check", str(crashing.parent)]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"{crashing}: damaged", f"{crashing.with_name('good.h5')}: good"]
    assert f"{crashing}: " in output.err
    training = ["-m", "hvd_train", "--data", str(crashing), "--task", "regression", "--max-rounds", "1"]
    job = run([sys.executable, *training], deadline_s=120, cwd=crashing.parent)
    assert job.returncode not in (0, 1)
    assert str(crashing) in job.stderr

"""What `shard write` shows of how far it is."""

from __future__ import annotations

import gzip
import struct
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from hvd_train.data.progress import Step
from hvd_train.tools import shard_progress
from hvd_train.tools.shard import main
from hvd_train.tools.shard_progress import WriteProgress, text

ROWS = 2000


def csv(folder: Path) -> list[str]:
    (folder / "a.csv").write_text("x,targets\n" + "".join(f"{i},{i % 3}\n" for i in range(ROWS)))
    return [str(folder / "a.csv"), "--inputs", "x"]


def idx(folder: Path) -> list[str]:
    values = np.arange(ROWS * 8, dtype="u1").tobytes()
    (folder / "x").write_bytes(gzip.compress(b"\0\0\x08\x02" + struct.pack(">2I", ROWS, 8) + values))
    (folder / "y").write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", ROWS) + bytes(ROWS)))
    return [str(folder / "x"), str(folder / "y")]


def tokens(folder: Path) -> list[str]:
    (folder / "tokens.py").write_text("def encode(line):\n    return list(line.encode())\n")
    (folder / "a.txt").write_text("some words\n" * 1000)
    return [str(folder / "a.txt"), "--tokenizer", f"{folder / 'tokens.py'}:encode", "--length", "16"]


def tar(folder: Path) -> list[str]:
    with tarfile.open(folder / "a.tar", "w") as file:
        array = BytesIO()
        np.save(array, np.zeros(4))
        for i in range(20):
            for name, content in ((f"{i:04}.cls", b"1"), (f"{i:04}.npy", array.getvalue())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, BytesIO(content))
    return [str(folder / "a.tar")]


def npz(folder: Path) -> list[str]:
    np.savez(folder / "a.npz", inputs=np.zeros((ROWS, 2)), targets=np.arange(ROWS) % 3)
    return [str(folder / "a.npz")]


COUNTED, CHECKED, SORTED = "read to count rows", "read to check the size", "read to count classes or groups"


@pytest.mark.parametrize(
    ("source", "options", "steps"),
    [
        (csv, [], [(COUNTED, "bytes"), ("read", "rows")]),
        (idx, [], [(CHECKED, "bytes"), ("read", "rows")]),
        (tokens, [], [(COUNTED, "bytes"), ("read", "rows")]),
        (tar, ["--shuffle"], [(COUNTED, "bytes"), ("read", "rows"), ("written", "rows")]),
        (npz, ["--by-class"], [(SORTED, "rows"), ("read", "rows"), ("written", "rows")]),
        (
            npz,
            ["--by-class", "--split", "validation=0.5"],
            [(SORTED, "rows"), ("read to count classes", "rows"), ("read", "rows"), ("written", "rows")],
        ),
    ],
)
def test_every_pass_is_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: Callable[[Path], list[str]],
    options: list[str],
    steps: list[tuple[str, str]],
) -> None:
    seen: list[Step] = []
    monkeypatch.setattr(WriteProgress, "report", lambda _, step: seen.append(step))
    assert main(["write", *source(tmp_path), *options, "--out", str(tmp_path / "d")]) == 0
    assert list(dict.fromkeys((step.doing, step.unit) for step in seen)) == steps
    for doing, _ in steps:
        of_pass = [step for step in seen if step.doing == doing]
        assert all(0 <= step.done <= step.of and step.of for step in of_pass)
        assert of_pass[-1].done > 0


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step("read", 1000, 5000), "1,000 of 5,000 rows read"),
        (Step("read to count rows", 3 << 20, 1 << 33, "bytes"), "3 of 8,192 MiB read to count rows"),
        (Step("opened", 1, 2, "files"), "1 of 2 files opened"),
    ],
)
def test_a_step_in_words(step: Step, words: str) -> None:
    assert text(step) == words


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shard_progress, "_LINE_S", 0.0)
    with WriteProgress() as progress:
        progress.report(Step("read to count rows", 1 << 20, 4 << 20, "bytes"))
        progress.report(Step("read", 3, 4))
    assert capsys.readouterr().err == (
        "hvd_train: 1 of 4 MiB read to count rows (25 %)\nhvd_train: 3 of 4 rows read (75 %)\n"
    )


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shard_progress, "_DRAW_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with WriteProgress() as progress:
        progress.report(Step("read", 3, 4))
        progress.report(Step("written", 1, 4))
        (task,) = progress._progress.tasks
        assert (task.description, task.completed, task.total) == ("1 of 4 rows written", 1, 4)

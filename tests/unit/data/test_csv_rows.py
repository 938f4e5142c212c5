"""CSV files with lines that are longer than what is read at once."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from hvd_train.data.sources import csv_rows
from hvd_train.data.sources.csv_rows import whole_rows
from hvd_train.errors import DataError
from hvd_train.tools.shard import main
from tests.unit.data.test_shard_formats import read

ROWS = [b"a,b,c\n", b'1,"two\nlines ""quoted"",\n",3\n', b'4,5" wide,6\r\n', b'"",,"\n"\n', b'7,8,"9"']


def pieces(content: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    monkeypatch.setattr(csv_rows, "_READ_BYTES", size)
    return [bytes(piece) for piece in whole_rows(io.BytesIO(content), b",", "a.csv")]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 1000])
def test_pieces_end_where_rows_end(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    content = b"".join(ROWS)
    found = pieces(content, size, monkeypatch)
    assert b"".join(found) == content
    assert found[0] == ROWS[0]
    ends = {len(b"".join(ROWS[: i + 1])) for i in range(len(ROWS))}
    at = 0
    for piece in found:
        at += len(piece)
        assert at in ends
    if size == 1:
        assert found == ROWS


def test_pieces_of_random_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for _ in range(300):
        rows = []
        for _ in range(rng.randrange(1, 6)):
            texts = ["".join(rng.choices('ab",\n', k=rng.randrange(4))) for _ in range(2)]
            quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
            rows.append(",".join(quoted).encode() + b"\n")
        assert pieces(b"".join(rows), 1, monkeypatch) == rows


def test_a_row_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "MOST_ROW_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"a\.csv: a line is longer than 1 MiB, or a quotation mark is miss"):
        pieces(b'a,b\n1,"' + b"2\n" * (1 << 20), 1 << 16, monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
def test_lines_that_are_longer_than_a_block(tmp_path: Path, packed: bool) -> None:
    import gzip

    long = "many words " * 500_000
    lines = [f'{i},"{long},{i}\n",{i % 3}' for i in range(4)]
    content = ("x,text,targets\n" + "\n".join(lines)).encode()
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    assert main(["write", str(path), "--inputs", "x", "--out", str(tmp_path / "d"), "--shards", "2"]) == 0
    inputs, targets = read(tmp_path / "d", "inputs", "targets")
    assert (inputs.tolist(), targets.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 0])


def test_lines_that_end_as_they_once_did_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"x,targets\r1,0\r2,1\r")
    assert main(["write", str(tmp_path / "a.csv"), "--out", str(tmp_path / "d")]) == 0
    assert read(tmp_path / "d", "inputs")[0].tolist() == [1, 2]

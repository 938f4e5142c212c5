"""`hvd_train shard info`: the table of shards, that of their values, and what looks wrong; and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.tools.shard import main
from tests.unit.data.shards import write_foreign


def foreign(path: Path, **datasets: Any) -> str:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return str(path)


def words(line: str) -> list[str]:
    """The cells of a line of a table."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> list[list[str]]:
    """The lines of the two tables and of what looks wrong."""
    capsys.readouterr()
    assert main(["info", *args]) == 0
    out = capsys.readouterr().out
    return [part.splitlines() for part in out.split("\n\n")]


def test_own_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    main(["write", "digits", "--out", out, "--shards", "2", "--by-class"])
    headers, values = printed(capsys, out)
    names = ["shard", "part", "samples", "inputs", "targets", "layout", "classes", "scale", "checksums"]
    assert headers[0].split() == names
    for line, classes in zip(headers[1:], ("0-4", "5-9"), strict=True):
        assert words(line)[1:8] == [
            "train",
            line.split()[2],
            "uint8 [8, 8]",
            "int64 []",
            "contiguous",
            classes,
            "0.0625",
        ]
    counts = "0: 178, 1: 182, 2: 177, 3: 183, 4: 181, 5: 182, 6: 181, 7: 179, 8: 174, 9: 180"
    assert [words(line) for line in values] == [
        [
            "values of",
            "dataset",
            "rows read",
            "range",
            "mean",
            "deviation",
            "NaN",
            "inf",
            "constant",
            "classes",
        ],
        [out, "inputs", "1,797", "0 to 16", "4.884", "6.017", "0", "0", "3 of 64", "-"],
        [out, "targets", "1,797", "0 to 9", "4.491", "2.865", "0", "0", "0 of 1", counts],
    ]


def test_foreign_files_with_what_looks_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = np.random.default_rng(0).normal(size=(40, 3)).astype("f4")
    inputs[7, 1], inputs[8, 2], inputs[:, 0] = np.nan, -np.inf, 0.5
    (tmp_path / "f").mkdir()
    for name, labels in (("a", [1, 2]), ("b", [4, -100])):
        foreign(tmp_path / "f" / f"{name}.h5", inputs=inputs, targets=np.tile(labels, 20))
    folder = str(tmp_path / "f")
    _, values, lines = printed(capsys, folder)
    expected = np.delete(inputs.reshape(-1), [22, 26]).astype("f8")
    assert words(values[1]) == [
        folder,
        "inputs",
        "80",
        f"{expected.min():.6g} to {expected.max():.6g}",
        f"{expected.mean():.4g}",
        f"{expected.std():.4g}",
        "2",
        "2",
        "1 of 3",
        "-",
    ]
    assert words(values[2])[2:4] == ["80", "1 to 4"]
    assert words(values[2])[-1] == "-100: 20, 1: 20, 2: 20, 4: 20"
    assert [line.partition(":")[0].removeprefix(f"{folder}/") for line in lines] == ["a.h5", "a.h5", "b.h5"]
    assert "`inputs` holds 2 NaN and 2 inf among 240 values, a share of 0.017;" in lines[0]
    assert "1 of the 3 components of `inputs` are the same in every row (positions: 0)." in lines[1]
    assert "of the classes 0 to 4, `targets` never holds 0, 3." in lines[2]


def test_many_rows_are_read_in_part_unless_all_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = np.arange(200_000) // 1000
    targets[targets == 7] = 5
    path = foreign(tmp_path / "a.h5", inputs=np.ones((200_000, 1), bool), targets=targets)
    _, values, lines = printed(capsys, path)
    assert words(values[1])[2:] == ["200,000", "1 to 1", "1", "0", "0", "0", "1 of 1", "-"]
    assert words(values[2])[2] == "131,072 of 200,000"
    assert len(lines) == 1, "whether class 7 is missing is not known"
    _, values, lines = printed(capsys, path, "--all")
    assert words(values[2])[2] == "200,000"
    assert words(values[2])[-1] == "199 of 0 to 199"
    assert "of the classes 0 to 199, `targets` never holds 7." in lines[1]


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            [-1, 1, 1],
            "`targets` holds -1; expected class numbers 0, 1, 2, ... Set data.classes = ['-1', '1'], or",
        ),
        (
            np.eye(3),
            "`targets` has the shape [3] a sample; expected one integer a sample. Set data.one_hot = true if",
        ),
        (
            [0.0, 2.0, 1.0],
            "`targets` is of type float64; expected integers from 0 on. List the values that are",
        ),
    ],
)
def test_targets_that_a_classification_would_refuse(
    targets: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(tmp_path / "a.h5", inputs=np.array([0.5, 1, -1]), targets=np.array(targets))
    _, _, (line,) = printed(capsys, path)
    assert line.startswith(f"for the task `classification`: {path}: {sentence}")


def test_quantities_and_tokens_are_not_taken_for_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    path = foreign(tmp_path / "a.h5", inputs=rng.normal(size=(30, 2)), targets=rng.normal(size=30))
    assert len(printed(capsys, path)) == 2
    path = foreign(
        tmp_path / "b.h5", inputs=np.arange(12).reshape(3, 4), targets=np.arange(12).reshape(3, 4) + 1
    )
    assert len(printed(capsys, path)) == 2
    assert len(printed(capsys, path, "--targets", "inputs")) == 2


def test_files_that_cannot_be_trained_on_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "a.h5", 10)
    foreign(tmp_path / "b.h5", inputs=np.zeros((4, 5), "f4"), targets=np.arange(4))
    _, values, lines = printed(capsys, str(tmp_path))
    assert words(values[1])[2:4] == ["14", "0 to 9.5"]
    assert words(values[1])[-2] == "-", "the constant components of unlike samples"
    assert "b.h5: a sample of `inputs` is float32 [5], but float32 [3] in" in lines[0]


def test_a_shard_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "b.h5", 0)
    assert len(printed(capsys, str(tmp_path))) == 1
    write_foreign(tmp_path / "a.h5", 10)
    headers, values = printed(capsys, str(tmp_path))
    assert [line.split()[2] for line in headers] == ["samples", "10", "0"]
    assert words(values[1])[2] == "10"


def test_values_that_cannot_be_read_are_named_below_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_foreign(tmp_path / "a.h5", 10)
    write_foreign(tmp_path / "b.h5", 10, chunks=True, compression="gzip")
    with h5py.File(tmp_path / "b.h5") as file:
        offset = file["inputs"].id.get_chunk_info(0).byte_offset
    with open(tmp_path / "b.h5", "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 8)
    headers, values, lines = printed(capsys, str(tmp_path))
    assert len(headers) == 3
    assert words(values[1])[2] == "10"
    assert lines[0].startswith(f"{tmp_path}/b.h5: dataset `inputs`, rows 0 to 9: ")


def test_json_has_the_values_of_each_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    main(["write", "digits", "--out", out, "--shards", "2", "--by-class"])
    ill = np.array([[0.5, np.nan], [1.5, 2.5]])
    path = foreign(tmp_path / "a.h5", inputs=ill, targets=np.array([0.5, 1.5]))
    capsys.readouterr()
    assert main(["info", out, path, "--json"]) == 0
    output = capsys.readouterr()
    first, second, other = json.loads(output.out)
    assert [shard["part"] for shard in (first, second, other)] == ["train", "train", ""]
    assert first["num_samples"] + second["num_samples"] == 1797
    assert first["fields"]["inputs"] == {"shape": [8, 8], "dtype": "uint8"}
    assert first["values"]["targets"]["counts"] == {"0": 178, "1": 182, "2": 177, "3": 183, "4": 181}
    assert second["values"]["targets"]["lowest"] == 5
    assert "counts" not in first["values"]["inputs"]
    assert other["values"]["inputs"] == {
        "rows": 2,
        "count": 4,
        "nan": 1,
        "plus_inf": 0,
        "minus_inf": 0,
        "filled": 0,
        "lowest": 0.5,
        "highest": 2.5,
        "mean": 1.5,
        "deviation": pytest.approx((2 / 3) ** 0.5),
        "components": 2,
        "constant": 0,
    }
    assert output.err.startswith(f"hvd_train: {path}: `inputs` holds 1 NaN among 4 values")
    assert len(output.err.splitlines()) == 1

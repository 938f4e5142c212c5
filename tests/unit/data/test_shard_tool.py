"""`hvd_train shard` as a person types it."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig, ModelConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.errors import DataError, UserError
from hvd_train.tasks.built_in import Classification
from hvd_train.tools.shard import main
from tests.deadlines import seconds
from tests.unit.data.shards import write_foreign


@pytest.fixture
def idx_pair(tmp_path: Path) -> tuple[str, str]:
    images, labels = tmp_path / "images-idx3-ubyte.gz", tmp_path / "labels-idx1-ubyte.gz"
    pixels = bytes(range(240)) * 2
    images.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 40, 3, 4) + pixels))
    labels.write_bytes(
        gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 40) + bytes(i % 10 for i in range(40)))
    )
    return str(images), str(labels)


def test_idx_files_become_two_shards_and_a_validation_part(tmp_path: Path, idx_pair: tuple[str, str]) -> None:
    out = str(tmp_path / "mnist")
    assert main(["write", *idx_pair, "--out", out, "--shards", "2"]) == 0
    assert main(["write", *idx_pair, "--out", out, "--part", "validation", "--compression", "gzip"]) == 0
    catalog = open_catalog(DataConfig(path=out))
    assert [span.num_rows for span in catalog.train] == [20, 20]
    assert [span.num_rows for span in catalog.validation] == [40]
    assert catalog.sample.scale == 1 / 255
    assert main(["check", out]) == 0
    assert main(["write", *idx_pair, "--out", out, "--shards", "2"]) == 2
    assert main(["write", *idx_pair, "--out", out, "--shards", "2", "--force", "--by-class"]) == 0
    assert open_catalog(DataConfig(path=out)).shards[0].class_counts == (4,) * 5


def test_npz_with_names_and_scale(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((8, 2), "u1"), y=np.zeros(8))
    source, out = str(tmp_path / "a.npz"), str(tmp_path / "out")
    assert main(["write", source, "--out", out, "--inputs", "x", "--targets", "y", "--scale", "0.125"]) == 0
    sample = open_catalog(DataConfig(path=out)).sample
    assert (sample.scale, sample.num_classes) == (0.125, None)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (np.array([-1, 1, 1, -1]), "a.npz: `targets` holds -1 in row 0; expected class numbers 0, 1, 2"),
        (np.array([0.0, 1.0, 1.0, 0.0]), "a.npz: `targets` is of type float64; expected integers from 0 on"),
        (np.eye(4), "a.npz: `targets` has the shape [4] a sample; expected one integer a sample"),
        (np.array([True, False, True, True]), ""),
        (np.array([0, 1, -100, 1]), ""),
        (np.array([0.5, 1.0, 1.0, 0.0]), ""),
    ],
)
def test_targets_that_no_classification_accepts_are_written_and_named(
    targets: np.ndarray, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be meant for another task; what is said is what the training says."""
    np.savez(tmp_path / "a.npz", inputs=np.ones((4, 2)), targets=targets)
    out = str(tmp_path / "out")
    assert main(["write", str(tmp_path / "a.npz"), "--out", out]) == 0
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)
    assert main(["check", out]) == 0
    sample = open_catalog(DataConfig(path=out)).sample
    try:
        Classification(ModelConfig()).build_model(sample)
    except UserError as error:
        training = str(error)
        assert words.partition(": ")[2] in training
        assert words or targets.dtype.kind == "f"
    else:
        assert not words


def test_idx_labels_below_zero_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, labels = tmp_path / "i", tmp_path / "l"
    inputs.write_bytes(b"\0\0\x08\x02" + struct.pack(">2I", 3, 2) + bytes(6))
    labels.write_bytes(b"\0\0\x09\x01" + struct.pack(">I3b", 3, 0, 1, -2))
    assert main(["write", str(inputs), str(labels), "--out", str(tmp_path / "out")]) == 0
    assert f"{labels}: `targets` holds -2 in row 2" in capsys.readouterr().err


def test_digits_shuffled(tmp_path: Path) -> None:
    out = str(tmp_path / "d")
    assert main(["write", "digits", "--out", out, "--shards", "4", "--shuffle", "--seed", "3"]) == 0
    assert [span.num_rows for span in open_catalog(DataConfig(path=out)).train] == [449, 449, 449, 450]


def test_check_says_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d"
    main(["write", "digits", "--out", str(out), "--shards", "2"])
    first, second = sorted(out.glob("*.h5"))
    raw = bytearray(second.read_bytes())
    with h5py.File(second) as file:
        raw[file["inputs"].id.get_offset() + 3] ^= 1
    second.write_bytes(raw)
    capsys.readouterr()
    assert main(["check", str(out)]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"{first}: good", f"{second}: damaged"]
    (message,) = output.err.splitlines()
    assert message.startswith(f"{second}: dataset `inputs`, rows 0 to 898: not what was written.")
    assert main(["check", str(first)]) == 0
    second.write_bytes(raw[:-20])
    assert main(["check", str(out)]) == 1
    assert "Expected a complete HDF5 file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["info", "nothing"], r"PATH = 'nothing': no such file or folder"),
        (["check", "nothing"], r"PATH = 'nothing': no such file or folder"),
        (["info"], r"no PATH was given"),
        (["write", "--out", "d"], r"sources '': expected `digits`"),
        (["write", "digits", "--out", "file/d"], r"file/d: cannot be written: .*Give --out"),
        (["write", "digits", "--out", "d", "--shards", "0"], r"--shards 0: expected 1 to 1797"),
        (["info", "file"], r"file: .*Expected a complete HDF5 file"),
    ],
)
def test_an_impossible_request_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert main(args) == 2
    assert re.fullmatch(rf"hvd_train: {message}.*\n", capsys.readouterr().err)


def test_a_wrong_flag_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["write", "digits", "--outt", "x"])
    assert end.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_it_imports_neither_torch_nor_mpi_and_help_not_even_h5py() -> None:
    script = (
        "import sys; from hvd_train.tools.shard import main\n"
        "try: main(['write', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'mpi4py', 'horovod', 'h5py', 'numpy', 'sklearn'} & set(sys.modules)\n"
        "import hvd_train.data.catalog, hvd_train.data.readers.make\n"
        "import hvd_train.data.writer, hvd_train.data.check\n"
        "import hvd_train.tools.shard_info\n"
        "assert not {'torch', 'mpi4py', 'horovod', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=seconds(60))
    assert done.returncode == 0, done.stderr
    assert "--by-class" in done.stdout


@pytest.mark.mnist
@pytest.mark.skipif(
    "MNIST_DIR" not in os.environ, reason="MNIST_DIR does not name a folder with MNIST's idx files"
)
def test_mnist(tmp_path: Path) -> None:
    folder, out = Path(os.environ["MNIST_DIR"]), str(tmp_path / "mnist")

    def idx(part: str) -> list[str]:
        return [str(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]

    assert main(["write", *idx("train"), "--out", out, "--shards", "2"]) == 0
    assert main(["write", *idx("t10k"), "--out", out, "--part", "validation"]) == 0
    assert main(["check", out]) == 0
    catalog = open_catalog(DataConfig(path=out))
    assert [span.num_rows for span in (*catalog.train, *catalog.validation)] == [30000, 30000, 10000]
    assert (catalog.sample.num_classes, catalog.sample.fields["inputs"].shape) == (10, (28, 28))
    # The published counts of the labels of the training part.
    counts = np.sum([info.class_counts for info in catalog.shards[:2]], axis=0)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_check_counts_values_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = np.ones((40, 2, 3), "f4")
    inputs[5, 1, 2] = np.nan
    inputs[33] = np.inf
    targets = np.arange(40.0)
    targets[39] = -np.inf
    np.savez(tmp_path / "a.npz", inputs=inputs, targets=targets)
    out = tmp_path / "d"
    assert main(["write", str(tmp_path / "a.npz"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["check", str(out)]) == 0
    assert capsys.readouterr().out.rstrip().split("; ") == [
        f"{out}/train-00000-of-00001.h5: good",
        "7 values of `inputs` not finite (NaN or infinite), the first in row 5",
        "1 value of `targets` not finite (NaN or infinite), the first in row 39",
    ]


def test_a_shard_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "a.h5", 10)
    write_foreign(tmp_path / "b.h5", 0)
    assert main(["check", str(tmp_path)]) == 0
    good, empty = capsys.readouterr().out.splitlines()
    assert good.endswith("a.h5: good")
    assert empty.endswith("b.h5: good; no samples: a training skips it")


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_scale_that_is_not_finite_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: str
) -> None:
    assert main(["write", "digits", "--out", str(tmp_path / "d"), "--scale", scale]) == 2
    assert capsys.readouterr().err == f"hvd_train: --scale = {scale}: expected a finite number.\n"


def test_long_double_becomes_float64(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((8, 2), np.longdouble) / 3, targets=np.zeros(8))
    assert main(["write", str(tmp_path / "a.npz"), "--out", str(tmp_path / "d")]) == 0
    assert open_catalog(DataConfig(path=str(tmp_path / "d"))).sample.fields["inputs"].dtype == "float64"
    assert main(["check", str(tmp_path / "d")]) == 0


def test_shards_that_no_training_takes_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "a.h5", 10)
    write_foreign(tmp_path / "b.h5", 0)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["inputs"] = np.zeros((4, 5), "f4")
        file["targets"] = np.arange(4)
    assert main(["check", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines()[0::2] == [f"{tmp_path}/a.h5: good", f"{tmp_path}/c.h5: unlike the others"]
    (message,) = output.err.splitlines()
    with pytest.raises(DataError, match=re.escape(message)):
        open_catalog(DataConfig(path=str(tmp_path)))

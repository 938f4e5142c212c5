"""Chunks that passed a filter which HDF5 does not bring: read with hdf5plugin, else refused by its name."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.hdf5.filters import _OF_HDF5PLUGIN
from hvd_train.data.places import plain
from hvd_train.errors import UnsupportedShard
from tests.launching import Job, run
from tests.unit.data.recipes import hdf5_tool
from tests.unit.data.shards import inputs_of, write_foreign

hdf5plugin = pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")

ZSTD, NOWHERE = 32015, 32999
"""The second has no owner."""
NAMES = ("inputs", "targets")
WITHOUT_CHECKSUMS = ("earliest", "v108")
"""Of the headers: the number of a filter can be changed."""
HIDDEN = "import sys; sys.modules['hdf5plugin'] = None; "
"""What makes hdf5plugin as if it were not installed, in a process that has not imported it."""


def packed(path: Path, number: int, *, skipped: tuple[int, ...] = (), written: int = 4) -> Path:
    """Inputs float32 [40, 3] in chunks of 10 rows, the first `written` of which are written, and passed the
    filter of this number unless they are among `skipped`: what HDF5 records, without the filter."""
    with h5py.File(path, "w", libver=WITHOUT_CHECKSUMS) as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((10, 3))
        creation.set_filter(NOWHERE, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((40, 3))
        dataset = h5py.h5d.create(file.id, b"inputs", h5py.h5t.IEEE_F32LE, space, creation)
        for chunk in range(written):
            raw = inputs_of(10 * chunk, 10).tobytes() if chunk in skipped else b"some packed bytes"
            dataset.write_direct_chunk((10 * chunk, 0), raw, int(chunk in skipped))
        file["targets"] = np.arange(40) % 7
    raw = path.read_bytes()
    recorded = struct.pack("<4H", NOWHERE, 0, 1, 1)  # no name, optional, one value
    assert raw.count(recorded) == 1
    path.write_bytes(raw.replace(recorded, struct.pack("<4H", number, 0, 1, 1)))
    return path


def shard(*args: str, hidden: bool = True, **environment: str) -> Job:
    """`hvd_train shard`, without hdf5plugin unless `hidden` is false."""
    script = (
        HIDDEN if hidden else "import sys; "
    ) + "from hvd_train.tools.shard import main; sys.exit(main())"
    script = script.replace("main()", f"main({list(args)!r})")
    return run([sys.executable, "-c", script], deadline_s=60, env={**os.environ, **environment})


def message(path: Path, number: str, remedy: str) -> str:
    return f"{path}: dataset `inputs` needs the HDF5 filter {number}, which is not installed. {remedy}\n"


INSTALL = "Install it where the ranks run: `pip install hdf5plugin`."
ELSEWHERE = (
    "Install its plugin and set HDF5_PLUGIN_PATH to the folder of the plugin, or write the file without "
    "filters on a machine that has it: `h5repack -f NONE OLD.h5 NEW.h5`."
)


def test_every_filter_of_hdf5plugin_is_known() -> None:
    assert {(n, name) for name, n in hdf5plugin.FILTERS.items()} <= {
        (n, "bshuf" if name == "bitshuffle" else name) for n, name in _OF_HDF5PLUGIN.items()
    }


@pytest.mark.parametrize("number", sorted(_OF_HDF5PLUGIN))
def test_without_hdf5plugin_the_filter_and_the_package_are_named(tmp_path: Path, number: int) -> None:
    """In this process a filter is registered as soon as a test has used it."""
    path = packed(tmp_path / "a.h5", number)
    expected = message(path, f"{_OF_HDF5PLUGIN[number]} (number {number})", INSTALL)
    checked = shard("check", str(path))
    assert (checked.returncode, checked.stdout) == (1, f"{path}: not supported\n")
    assert checked.stderr == expected


def test_info_and_a_training_say_the_same(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.h5", ZSTD)
    expected = f"hvd_train: {message(path, 'zstd (number 32015)', INSTALL)}"
    described = shard("info", str(path))
    assert (described.returncode, described.stderr) == (2, expected)
    script = HIDDEN + f"from hvd_train.cli import main; sys.exit(main(['--data', {str(path)!r}]))"
    trained = run([sys.executable, "-c", script], cwd=tmp_path, deadline_s=120)
    assert trained.returncode == 2
    assert trained.stderr == expected


def test_a_filter_that_is_in_no_package_is_named_by_its_number(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.h5", NOWHERE)
    with pytest.raises(UnsupportedShard) as refused:
        read_info(path, plain(NAMES))
    assert f"{refused.value}\n" == message(path, "number 32999", ELSEWHERE)


def test_a_filter_that_is_in_no_package_is_named_as_the_file_names_it(tmp_path: Path) -> None:
    """What a file says is shortened, and escaped where it is not printable."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=WITHOUT_CHECKSUMS) as file:
        file.create_dataset("inputs", data=inputs_of(0, 40), chunks=(10, 3), **hdf5plugin.Zstd())
        file["targets"] = np.arange(40)
        name = file["inputs"].id.get_create_plist().get_filter(0)[3]
    raw = bytearray(path.read_bytes())
    at = raw.index(name)
    raw[at - 8 : at - 6] = NOWHERE.to_bytes(2, "little")
    raw[at : at + 9] = b"A\n\xff\x1b zstd"
    path.write_bytes(raw)
    shortened = r"A\n\xff\x1b zstd filter; see https://github.com/HDFGroup/hdf5_pl... (109 characters)"
    with pytest.raises(UnsupportedShard) as refused:
        read_info(path, plain(NAMES))
    assert f"{refused.value}\n" == message(path, f"{shortened} (number 32999)", ELSEWHERE)


@pytest.mark.parametrize(
    "options",
    [
        *(hdf5plugin.Bitshuffle(), hdf5plugin.Blosc(), hdf5plugin.Blosc2(), hdf5plugin.BZip2()),
        *(hdf5plugin.LZ4(), hdf5plugin.Zstd(), hdf5plugin.Zfp(reversible=True)),
    ],
    ids=lambda options: type(options).__name__,
)
def test_with_hdf5plugin_it_is_read(tmp_path: Path, options: Any) -> None:
    """In a process that has not imported hdf5plugin before."""
    path = write_foreign(tmp_path / "a.h5", 40, chunks=(10, 3), compression=options)
    checked = shard("check", str(path), hidden=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, f"{path}: good\n", "")
    with ShardFile(path, plain(NAMES)) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 40), inputs_of(0, 40))


def test_an_hdf5plugin_that_is_too_old_or_broken(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.h5", ZSTD)
    zstd, folder = "zstd (number 32015)", tmp_path / "site"
    folder.mkdir()
    for content, remedy in (
        (
            "version = '1.4.0'",
            "hdf5plugin 1.4.0 does not have it. Install a newer one: `pip install --upgrade hdf5plugin`.",
        ),
        (
            "raise OSError('libx.so: cannot open shared object file')",
            "hdf5plugin, which has it, cannot be imported: libx.so: cannot open shared object file. "
            "Install it again: `pip install --force-reinstall hdf5plugin`.",
        ),
    ):
        (folder / "hdf5plugin.py").write_text(content)
        places = os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))
        checked = shard("check", str(path), hidden=False, PYTHONPATH=places)
        assert (checked.returncode, checked.stderr) == (1, message(path, zstd, remedy))


def test_the_remedies_of_a_filter_that_is_in_no_package(tmp_path: Path) -> None:
    """Those of `ELSEWHERE`, with a filter that there is."""
    path = write_foreign(tmp_path / "a.h5", 40, chunks=(10, 3), compression=hdf5plugin.Zstd())
    assert shard("check", str(path)).returncode == 1
    assert shard("check", str(path), HDF5_PLUGIN_PATH=hdf5plugin.PLUGIN_PATH).stdout == f"{path}: good\n"
    subprocess.run(
        [hdf5_tool("h5repack"), "-f", "NONE", path, tmp_path / "new.h5"],
        env={**os.environ, "HDF5_PLUGIN_PATH": hdf5plugin.PLUGIN_PATH},
        check=True,
    )
    assert shard("check", str(tmp_path / "new.h5")).stdout == f"{tmp_path / 'new.h5'}: good\n"


def test_a_filter_that_every_chunk_skipped_is_not_needed(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.h5", NOWHERE, skipped=(0, 1, 2, 3))
    with ShardFile(path, plain(NAMES)) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 40), inputs_of(0, 40))
    assert shard("check", str(path)).stdout == f"{path}: good\n"


def test_a_filter_of_chunks_that_were_never_written_is_not_needed(tmp_path: Path) -> None:
    with ShardFile(packed(tmp_path / "a.h5", NOWHERE, written=0), plain(NAMES)) as file:
        assert not file.read("inputs", 0, 40).any()


def test_a_filter_that_only_the_last_chunk_passed_is_needed(tmp_path: Path) -> None:
    """It is found at the header, before a row is read."""
    with pytest.raises(UnsupportedShard, match="needs the HDF5 filter number 32999"):
        read_info(packed(tmp_path / "a.h5", NOWHERE, skipped=(0, 1, 2)), plain(NAMES))


def test_a_second_filter_is_found_behind_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((40,))
        creation.set_shuffle()
        creation.set_filter(NOWHERE, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((40,))
        dataset = h5py.h5d.create(file.id, b"inputs", h5py.h5t.IEEE_F32LE, space, creation)
        dataset.write_direct_chunk((0,), b"packed", 1)  # the shuffle was skipped
        file["targets"] = np.arange(40)
    with pytest.raises(UnsupportedShard, match="needs the HDF5 filter number 32999"):
        read_info(path, plain(NAMES))


def test_a_dataset_that_is_not_read_needs_no_filter(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.h5", NOWHERE)
    assert read_info(path, plain(("targets",))).num_samples == 40


def test_a_chunk_that_the_filter_refuses_is_damaged(tmp_path: Path) -> None:
    """Where the filter is available, a failure is not reported as a filter that is missing."""
    path = packed(tmp_path / "a.h5", 1)
    checked = shard("check", str(path))
    assert (checked.returncode, checked.stdout) == (1, f"{path}: damaged\n")
    first = checked.stderr.splitlines()[0]
    assert first.startswith(f"{path}: dataset `inputs`, rows 0 to 39: ")
    assert first.endswith(". It was damaged or changed after it was written: copy or write it again.")
    assert "shard check" not in checked.stderr

"""Memory of `shard write`, by the kind of its source. See README.md beside this file."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow
from PIL import Image
from pyarrow import parquet

MIB = 1 << 20
LARGE = 127 * MIB
"""Bytes of a line, an image, a member or a row group that is just below what the bound allows."""

TOKENIZER = "import numpy\n\n\ndef encode(line):\n    return numpy.frombuffer(line.encode(), 'u1')[::4]\n"

RUN = (
    "import re, sys; from pathlib import Path; from hvd_train.tools.shard import main\n"
    "code = main(['write', *sys.argv[1:]])\n"
    "status = Path('/proc/self/status').read_text()\n"
    "print('peak KiB', re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])\n"
    "sys.exit(code)\n"
)


def blocks(num_bytes: int, size: int = 4 * MIB) -> Iterator[npt.NDArray[np.uint8]]:
    """Bytes without a pattern."""
    rng = np.random.default_rng(0)
    while num_bytes > 0:
        yield rng.integers(0, 256, min(size, num_bytes), np.uint8)
        num_bytes -= size


def letters(num_bytes: int, width: int) -> Iterator[bytes]:
    """Lines of `width` bytes."""
    for block in blocks(num_bytes, max(1, 4 * MIB // width) * width):
        lines = (block[: len(block) // width * width] % 26 + 97).reshape(-1, width)
        lines[:, ::6], lines[:, -1] = 32, 10
        yield lines.tobytes()


def targets(folder: Path, rows: int) -> str:
    np.save(folder / "y.npy", np.arange(rows) % 7)
    return str(folder / "y.npy")


def npy(folder: Path, num_bytes: int) -> list[str]:
    rows = num_bytes // 4096
    array = np.lib.format.open_memmap(folder / "x.npy", "w+", np.uint8, (rows, 4096))
    for i, block in enumerate(blocks(rows * 4096)):
        array[i * 1024 : i * 1024 + len(block) // 4096] = block.reshape(-1, 4096)
    array.flush()
    return [str(folder / "x.npy"), targets(folder, rows)]


def idx(folder: Path, num_bytes: int) -> list[str]:
    rows = num_bytes // 4096
    with gzip.open(folder / "x", "wb", 1) as file:
        file.write(b"\0\0\x08\x03" + struct.pack(">3I", rows, 64, 64))
        for block in blocks(rows * 4096):
            file.write(block.tobytes())
    (folder / "y").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", rows) + bytes(i % 7 for i in range(rows)))
    return [str(folder / "x"), str(folder / "y")]


def hdf5(folder: Path, num_bytes: int) -> list[str]:
    rows = num_bytes // 4096
    with h5py.File(folder / "x.h5", "w") as file:
        inputs = file.create_dataset("inputs", (rows, 4096), "u1", chunks=(1024, 4096), compression=1)
        for i, block in enumerate(blocks(rows * 4096)):
            inputs[i * 1024 : i * 1024 + len(block) // 4096] = block.reshape(-1, 4096)
        file["targets"] = np.arange(rows) % 7
    return [str(folder / "x.h5")]


def row_groups(folder: Path, num_bytes: int, of: int = 8 * MIB) -> list[str]:
    values = pyarrow.list_(pyarrow.float32(), 1024)
    schema = pyarrow.schema([("inputs", values), ("targets", pyarrow.int64())])
    with parquet.ParquetWriter(folder / "x.parquet", schema) as writer:
        for block in blocks(num_bytes, of // 4096 * 4096):
            flat = pyarrow.array(block.astype(np.float32)[: len(block) // 4096 * 1024])
            rows = len(flat) // 1024
            arrays = [pyarrow.FixedSizeListArray.from_arrays(flat, 1024), pyarrow.array(np.arange(rows) % 7)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), row_group_size=rows)
    return [str(folder / "x.parquet")]


def csv(folder: Path, num_bytes: int) -> list[str]:
    """Numbers, 100 a line."""
    line = np.array([f"{i % 1000 / 1000:.3f}" for i in range(1 << 16)])
    with open(folder / "x.csv", "w") as file:
        file.write(",".join([*(f"x{i}" for i in range(100)), "targets"]) + "\n")
        for block in blocks(num_bytes // 3, 1 << 16):
            numbers = line[block.astype(np.intp) * 256][: len(block) // 100 * 100].reshape(-1, 100)
            file.writelines(",".join(row) + ",1\n" for row in numbers.tolist())
    return [str(folder / "x.csv")]


def csv_lines(folder: Path, num_bytes: int) -> list[str]:
    """A few numbers, and a text that is not used."""
    with open(folder / "x.csv", "wb") as file:
        file.write(b"x,text,targets\n")
        for i in range(num_bytes // LARGE):
            file.write(f"{i},".encode())
            for piece in letters(LARGE - 64, 4096):
                file.write(piece.replace(b"\n", b" "))
            file.write(b",1\n")
    return [str(folder / "x.csv"), "--inputs", "x"]


def text(folder: Path, num_bytes: int, width: int = 256) -> list[str]:
    with open(folder / "x.txt", "wb") as file:
        for lines in letters(num_bytes, width):
            file.write(lines)
    return [str(folder / "x.txt")]


def tokens(folder: Path, num_bytes: int, width: int = 256) -> list[str]:
    (folder / "tokens.py").write_text(TOKENIZER)
    return [*text(folder, num_bytes, width), "--tokenizer", f"{folder / 'tokens.py'}:encode"]


def pictures(num_bytes: int, height: int, width: int, colours: bool) -> Iterator[bytes]:
    for block in blocks(num_bytes, height * width * (3 if colours else 1)):
        file = io.BytesIO()
        shape = (height, width, 3) if colours else (height, width)
        Image.fromarray(block.reshape(shape)).save(file, "png", compress_level=0)
        yield file.getvalue()


def images(
    folder: Path, num_bytes: int, height: int = 512, width: int = 512, colours: bool = False
) -> list[str]:
    size = height * width * (3 if colours else 1)
    for i, content in enumerate(pictures(num_bytes // size * size, height, width, colours)):
        path = folder / "x" / f"class{i % 7}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [str(folder / "x")]


def webdataset(
    folder: Path, num_bytes: int, height: int = 512, width: int = 512, colours: bool = False
) -> list[str]:
    size = height * width * (3 if colours else 1)
    with tarfile.open(folder / "x.tar", "w") as file:
        for i, content in enumerate(pictures(num_bytes // size * size, height, width, colours)):
            for name, member in ((f"{i:07}.cls", str(i % 7).encode()), (f"{i:07}.png", content)):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                file.addfile(info, io.BytesIO(member))
    return [str(folder / "x.tar")]


SOURCES: dict[str, Callable[[Path, int], list[str]]] = {
    "npy": npy,
    "idx, gzip": idx,
    "HDF5, gzip": hdf5,
    "Parquet": row_groups,
    "CSV": csv,
    "text, bytes": text,
    "text, tokenizer": tokens,
    "WebDataset": webdataset,
    "images": images,
    "Parquet, row groups of 127 MiB": lambda folder, size: row_groups(folder, size, LARGE),
    "CSV, lines of 127 MiB": csv_lines,
    "text, tokenizer, lines of 127 MiB": lambda folder, size: tokens(folder, size, LARGE),
    "WebDataset, images of 127 MiB": lambda folder, size: webdataset(folder, size, 6600, 6700, True),
    "images of 127 MiB": lambda folder, size: images(folder, size, 6600, 6700, True),
}


def peak(args: list[str], out: Path) -> int:
    """Bytes that the process had in memory at most, files that it maps among them."""
    command = [sys.executable, "-c", RUN, *args, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return 1024 * int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0, help="of each source")
    parser.add_argument("--sources", nargs="*", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    result = []
    for source in options.sources:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            args = [*SOURCES[source](folder, int(options.gib * (1 << 30))), "--shards", "4"]
            row: dict[str, str | int] = {"source": source}
            for kind, more in (("mib", []), ("mib_shuffled", ["--shuffle", "--split", "validation=0.1"])):
                start = time.monotonic()
                row[kind] = peak([*args, *more], folder / "out") // MIB
                print(
                    f"{source} {' '.join(more)}: {row[kind]} MiB, {time.monotonic() - start:.0f} s",
                    flush=True,
                )
            result.append(row)
    if options.json:
        facts = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": pyarrow.__version__,
            "h5py": h5py.__version__,
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "gib": options.gib,
            "rows": result,
        }
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Size of shards, and the rates at which they are written and read, with each compression. See README.md
beside this file."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.data.deal import Span
from hvd_train.data.format import Compression
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.places import plain
from hvd_train.data.rows import Rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part

COMPRESSIONS: tuple[Compression, ...] = ("none", "gzip", "lz4", "zstd", "blosc")
BATCH = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="of each kind of data, before compression")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    return parser.parse_args()


def images(num_bytes: int) -> npt.NDArray[Any]:
    """8-bit images with a smooth background, an object and little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64] / 64
    rows = num_bytes // (64 * 64)
    result = np.empty((rows, 64, 64), np.uint8)
    for row in range(rows):
        a, b, c, d = rng.random(4)
        shape = 120 * np.exp(-20 * ((x - a) ** 2 + (y - b) ** 2)) + 60 * (c * x + d * y)
        result[row] = shape + rng.normal(0, 1.5, (64, 64)) + 8
    return result


def spectra(num_bytes: int) -> npt.NDArray[Any]:
    """float32 counts of a detector: small whole numbers."""
    rng = np.random.default_rng(0)
    means = 3 + 40 * np.exp(-((np.arange(1024) - 400) ** 2) / 5000)
    return rng.poisson(means, (num_bytes // 4096, 1024)).astype(np.float32)


def noise(num_bytes: int) -> npt.NDArray[Any]:
    """float32 values of which no bit can be told from others."""
    return np.random.default_rng(0).random((num_bytes // 4096, 1024), np.float32)


KINDS: dict[str, Callable[[int], npt.NDArray[Any]]] = {
    "uint8 images": images,
    "float32 counts": spectra,
    "float32 noise": noise,
}


def read_s(path: Path, order: Sequence[int]) -> float:
    """Seconds to read all batches in this order."""
    info = read_info(path, plain(("inputs", "targets")))
    rows = Rows([Span(shard=str(path), start=0, stop=info.num_samples)], info.fields, verify=False)
    batch = rows.empty(BATCH)
    start = time.perf_counter()
    for first in order:
        rows.read_into(batch, 0, first, first + BATCH)
    seconds = time.perf_counter() - start
    rows.close()
    return seconds


def measure(inputs: npt.NDArray[Any], compression: Compression, repeat: int) -> dict[str, float]:
    """MiB/s of values before compression, and the size as a fraction of them; medians."""
    mib = inputs.nbytes / 2**20
    write, in_order, random = [], [], []
    firsts = list(range(0, len(inputs) - BATCH + 1, BATCH))
    shuffled = np.random.default_rng(0).permutation(firsts).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "train-00000-of-00001.h5"
        for _ in range(repeat):
            start = time.perf_counter()
            write_part(
                scratch, Arrays(inputs, np.zeros(len(inputs), np.int64)), compression=compression, force=True
            )
            write.append(mib / (time.perf_counter() - start))
            in_order.append(mib / read_s(path, firsts))
            random.append(mib / read_s(path, shuffled))
        size = path.stat().st_size / inputs.nbytes
    return {
        "size": size,
        "write_mib_s": statistics.median(write),
        "read_in_order_mib_s": statistics.median(in_order),
        "read_at_random_mib_s": statistics.median(random),
    }


def main() -> None:
    given = arguments()
    rows = []
    print("| data | compression | size | written, MiB/s | read in order, MiB/s | batches at random, MiB/s |")
    print("|---|---|---|---|---|---|")
    for kind, make in KINDS.items():
        inputs = make(given.mib << 20)
        for compression in COMPRESSIONS:
            found = measure(inputs, compression, given.repeat)
            rows.append({"data": kind, "compression": compression, **found})
            rates = " | ".join(f"{value:,.0f}" for key, value in found.items() if key != "size")
            print(f"| {kind} | {compression} | {100 * found['size']:.0f} % | {rates} |", flush=True)
    if given.json:
        conditions = {
            "mib": given.mib,
            "repeat": given.repeat,
            "batch": BATCH,
            "h5py": h5py.__version__,
            "hdf5": h5py.version.hdf5_version,
            "numpy": np.__version__,
            "machine": platform.machine(),
            "processor": platform.processor(),
            "python": platform.python_version(),
        }
        given.json.write_text(json.dumps({"rows": rows, "conditions": conditions}, indent=1) + "\n")


if __name__ == "__main__":
    main()

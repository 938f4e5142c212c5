"""What `data.redeal` costs in reads: bytes read from the files and seconds of reading in each epoch, for
parts that stay and parts that go round, in memory and as a stream. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.readers.plan import ReadingPlan

_WIDTH = 1024
_EPOCHS = 6


def write_shards(folder: Path, shards: int, rows: int) -> None:
    """Foreign files of float32 [rows, 1024], 4 KiB a row."""
    for number in range(shards):
        with h5py.File(folder / f"s{number}.h5", "w") as file:
            inputs = file.create_dataset("inputs", (rows, _WIDTH), "f4", chunks=(64, _WIDTH))
            for start in range(0, rows, 4096):
                stop = min(start + 4096, rows)
                inputs[start:stop] = np.arange(start, stop, dtype="f4")[:, None]
            file.create_dataset("targets", data=np.arange(rows) % 7)


def bytes_read() -> int:
    """By this process so far, from disk or from the kernel's cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def measure(catalog: Catalog, data: DataConfig, world_size: int) -> dict[str, Any]:
    """Rank 0 reads some epochs in batches of 64: what each read, and how long that took."""
    plan = ReadingPlan(catalog=catalog, data=data, seed=0, rank=0, world_size=world_size)
    reader = plan.reader(0)
    megabytes, seconds = [], []
    for epoch in range(_EPOCHS):
        before, began = bytes_read(), time.perf_counter()
        reader.start_epoch(epoch)
        while reader.left:
            reader.next_batch(64)
        megabytes.append((bytes_read() - before) / 1e6)
        seconds.append(time.perf_counter() - began)
    reader.close()
    part = plan.samples_per_rank[0] * (4 * _WIDTH + 8) / 1e6
    return {
        "reading": data.reading,
        "redeal": data.redeal,
        "part_megabytes": part,
        "megabytes_by_epoch": megabytes,
        "seconds_by_epoch": seconds,
    }


def main() -> None:
    """Prints a line for each reading and kind of deal, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8192, help="of a shard, 4 KiB each")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.shards, options.rows)
        catalog = open_catalog(DataConfig(path=folder))
        for reading in ("memory", "stream"):
            for redeal in ("never", "epoch"):
                data = DataConfig(path=folder, reading=reading, redeal=redeal)  # type: ignore[arg-type]
                found = measure(catalog, data, options.ranks)
                results.append(found)
                first, later = found["megabytes_by_epoch"][0], found["megabytes_by_epoch"][1:]
                print(
                    f"{reading:7} {redeal:6} part {found['part_megabytes']:.1f} MB; read in the first epoch "
                    f"{first:.1f} MB, in a later one {statistics.median(later):.1f} MB; seconds of an epoch "
                    f"{statistics.median(found['seconds_by_epoch'][1:]):.2f}"
                )
    if options.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "h5py": h5py.__version__,
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "options": {k: v for k, v in vars(options).items() if k != "json"},
        }
        options.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

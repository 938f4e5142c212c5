"""Samples/s of the ways to read shards, beside numpy, the DataLoader, and tensors in memory in a training.
See README.md beside this file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.averaging_cost import write_data
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.local_step import LocalStep, make_optimizer
from hvd_train.algorithm.transformed_reader import TransformedReader
from hvd_train.algorithm.worker import Worker
from hvd_train.algorithm.workers.pool import make_transformer
from hvd_train.config import Config, DataConfig, ModelConfig, OptimConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.deal import Span, deal
from hvd_train.data.numbering import Numbering, Origins
from hvd_train.data.readers.ahead import ReadsAhead
from hvd_train.data.readers.base import ArrayBatch, Reader
from hvd_train.data.readers.make import make_reader
from hvd_train.tasks.building import build
from hvd_train.tasks.load import make_task

_BATCH = 64
_CHUNK_ROWS = 256
_SCALE = np.float32(1 / 255)
_PLAIN = "contiguous"
_LARGE = 1 << 40

Clock = Callable[[], float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""By what seconds are counted; CPU time is that of all threads of a process."""

FILES = {"gzip": "gzip", "lz4": "LZ4", "zstd": "Zstd"}
"""The compressed files: h5py's name of the filter, or that of hdf5plugin's class."""


def write_files(folder: Path, mnist: str | None, ranks: int) -> tuple[dict[str, Path], str]:
    """A folder of shards for each way in which they are stored, as many shards as ranks; and which data."""
    plain = folder / _PLAIN
    name = write_data(plain, mnist, ranks)
    found = {_PLAIN: plain}
    has_plugin = importlib.util.find_spec("hdf5plugin") is not None
    for kind, filtering in FILES.items():
        if filtering == "gzip" or has_plugin:
            found[kind] = folder / kind
            found[kind].mkdir()
            for shard in plain.glob("*.h5"):
                _compress(shard, found[kind] / shard.name, filtering)
    return found, name


def _compress(old: Path, new: Path, filtering: str) -> None:
    options: Mapping[str, Any] = {"compression": "gzip"}
    if filtering != "gzip":
        import hdf5plugin

        options = getattr(hdf5plugin, filtering)()
    with h5py.File(old, locking=False) as source, h5py.File(new, "w") as target:
        target.attrs["hvd_train_scale"] = 1 / 255
        for name in ("inputs", "targets"):
            values = source[name][...]
            chunks = (_CHUNK_ROWS, *values.shape[1:])
            target.create_dataset(name, data=values, chunks=chunks, **options)


class Rows(Dataset[tuple[torch.Tensor, int]]):
    """Rows of one file, read by h5py one by one, as a Dataset usually does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: h5py.File | None = None
        with h5py.File(path, locking=False) as file:
            self._length = len(file["targets"])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._file is None:  # in the process that reads
            self._file = h5py.File(self._path, locking=False)
        inputs = torch.from_numpy(self._file["inputs"][index])
        return inputs.to(torch.float32) * float(_SCALE), int(self._file["targets"][index])


def of_loader(path: Path, workers: int) -> Iterator[Any]:
    """Batches without an end."""
    loader = DataLoader(Rows(path), _BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


def of_numpy(catalog: Catalog) -> Iterator[Any]:
    """The rows in memory, gathered and converted by numpy."""
    reader = make_reader(catalog.train, DataConfig(reading="memory"), 0, catalog.sample.fields, _LARGE)
    whole = cast(ArrayBatch, reader.next_batch(reader.num_samples))
    inputs, targets = whole["inputs"], whole["targets"]
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(targets))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            yield inputs[rows].astype(np.float32) * _SCALE, targets[rows]


def of_reader(catalog: Catalog, reading: str) -> Iterator[Any]:
    """What a training draws, with the conversion of the built-in models."""
    data = DataConfig(reading=reading)  # type: ignore[arg-type]
    reader = make_reader(catalog.train, data, 0, catalog.sample.fields, _LARGE)
    epoch = 0
    while True:
        while (batch := reader.next_batch(_BATCH)) is not None:
            yield torch.from_numpy(batch["inputs"]).to(torch.float32) * float(_SCALE), batch["targets"]
        epoch += 1
        reader.start_epoch(epoch)


def rates(files: Mapping[str, Path], args: argparse.Namespace) -> dict[str, list[float]]:
    """Batches/s of each way in every repetition, by the clock that was chosen; the ways take turns."""
    plain = open_catalog(DataConfig(path=str(files[_PLAIN])))
    ways = {
        "numpy": of_numpy(plain),
        **{f"{reading} {_PLAIN}": of_reader(plain, reading) for reading in ("memory", "mmap", "stream")},
        **{
            f"stream {kind}": of_reader(open_catalog(DataConfig(path=str(path))), "stream")
            for kind, path in files.items()
            if kind != _PLAIN
        },
        **{f"DataLoader, {n} workers": of_loader(next(files[_PLAIN].glob("*.h5")), n) for n in (0, 2)},
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(args.repetitions + 1):
        for way, batches in ways.items():
            count = 60 if "DataLoader" in way else 60_000 // _BATCH  # an epoch: all of what is read ahead
            began = args.clock()
            for _ in range(count):
                next(batches)
            if repetition:  # the first reads the files and verifies their rows
                found[way].append(count / (args.clock() - began))
    return found


def ratio(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of the ratios, and its 95 % interval."""
    logs = [math.log(a / b) for a, b in zip(one, other, strict=True)]
    half = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    mean = statistics.fmean(logs)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


@dataclass
class Tensors(Reader):
    """What readers are compared with: rows that are tensors in memory, in random order."""

    inputs: torch.Tensor
    targets: torch.Tensor
    spans: tuple[Span, ...]
    mode: Any = "memory"
    restarted: bool = False
    epoch: int = 0
    position: int = 0
    order: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples = len(self.targets)
        self.start_epoch(0)

    @property
    def left(self) -> int:
        return self.num_samples - self.position

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.position, self.order = epoch, 0, torch.randperm(self.num_samples)

    def next_batch(self, size: int) -> ArrayBatch | None:
        rows = self.order[self.position : self.position + size]
        self.position += size
        return {"inputs": self.inputs[rows].numpy(), "targets": self.targets[rows].numpy()}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return ""

    def open(self) -> None: ...

    def origins(self, start: int, stop: int) -> Origins:
        rows = self.order[start:stop].numpy()
        return Origins(self.spans, np.zeros(len(rows), np.intp), rows)

    def close(self) -> None: ...


def _worker(files: Mapping[str, Path], way: str, rank: int, ranks: int) -> Worker:
    """One rank's training of the 500-100 mlp, from its part."""
    reading, _, kind = way.partition(" ")
    data = DataConfig(path=str(files[kind or _PLAIN]), reading=reading if kind else "memory")  # type: ignore[arg-type]
    catalog = open_catalog(data)
    parts = deal(catalog.train, ranks)
    reader = make_reader(parts[rank], data, 0, catalog.sample.fields, _LARGE)
    if kind:
        reader = ReadsAhead(reader, _BATCH)
    else:
        whole = cast(ArrayBatch, reader.next_batch(reader.num_samples))
        tensors = [torch.from_numpy(whole[name]) for name in ("inputs", "targets")]
        reader = Tensors(tensors[0], tensors[1], parts[rank])
    config = Config(data=data, model=ModelConfig(hidden=(500, 100)))
    task = make_task(config)
    model = build(task, catalog)
    step = LocalStep(
        Gradients(model, task, OptimConfig()), make_optimizer(model, OptimConfig()), OptimConfig()
    )
    rows = [sum(span.num_rows for span in part) for part in parts]
    transformed = TransformedReader(
        reader,
        make_transformer(None, task, config, catalog.sample),
        Numbering(catalog.shards),
        batch_size=_BATCH,
        last_batch="keep",
    )
    return Worker(transformed, step, batch_size=_BATCH, accumulate=1, samples_per_rank=rows)


def _train(
    files: Mapping[str, Path],
    ways: Sequence[str],
    rank: int,
    ranks: int,
    barrier: Barrier,
    pairs: int,
    clock: Clock,
) -> list[list[tuple[float, float]]]:
    """Of each way, seconds of pairs of blocks: of the way, and of the tensors next to it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = _worker(files, "tensors", rank, ranks)
    workers = [_worker(files, way, rank, ranks) for way in ways]
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    for worker in (tensors, *workers):
        _seconds(worker, 940, barrier, clock)  # an epoch: all rows are verified
    for pair in range(pairs):
        for times, worker in zip(found, workers, strict=True):
            both = [(0, worker), (1, tensors)]
            seconds = [0.0, 0.0]
            for index, each in both if pair % 2 else reversed(both):
                seconds[index] = _seconds(each, 120, barrier, clock)
            times.append((seconds[0], seconds[1]))
    return found


def _seconds(worker: Worker, steps: int, barrier: Barrier, clock: Clock) -> float:
    barrier.wait()
    began = clock()
    worker.run(steps)
    barrier.wait()
    return clock() - began


def _rank(send: Any, *args: Any) -> None:
    send.send(_train(*args))


def shares(
    files: Mapping[str, Path], ranks: int, pairs: int, clock: Clock
) -> dict[str, tuple[float, float, float]]:
    """Samples/s of each way as a share of those from tensors in memory, with `ranks` processes at once."""
    ways = [f"{reading} {_PLAIN}" for reading in ("memory", "mmap", "stream")]
    ways += [f"stream {kind}" for kind in files if kind != _PLAIN]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(ranks)
    ends = [context.Pipe(duplex=False) for _ in range(ranks)]
    jobs = [
        context.Process(target=_rank, args=(end, files, ways, rank, ranks, barrier, pairs, clock))
        for rank, (_, end) in enumerate(ends)
    ]
    for job in jobs:
        job.start()
    found = [receive.recv() for receive, _ in ends]
    for job in jobs:
        job.join()
    return {
        way: ratio([tensors for _, tensors in times], [mine for mine, _ in times])
        for way, times in zip(ways, found[0], strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9, help="turns of each way of reading")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of blocks of 120 steps, of each way")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="that train at once, if any")
    parser.add_argument("--mnist", default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where others use the machine")
    args = parser.parse_args()
    chosen, args.clock = args.clock, CLOCKS[args.clock]
    torch.set_num_threads(1)
    load = os.getloadavg()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files, data = write_files(Path(folder), args.mnist, 1)
        measured = rates(files, args)
        loader = "DataLoader, 0 workers"
        for way, values in measured.items():
            to_numpy, to_loader = ratio(values, measured["numpy"]), ratio(values, measured[loader])
            median = statistics.median(values)
            print(
                f"{way:22} {median:9,.0f} batches/s, numpy x {_text(to_numpy)}, {loader} x {_text(to_loader)}"
            )
            result[way] = {"batches_per_s": values, "to_numpy": to_numpy, "to_loader": to_loader}
        for ranks in args.ranks:
            for way, found in shares(files, ranks, args.pairs, args.clock).items():
                print(f"{ranks} ranks train, {way:18} {_text(found)} of tensors in memory")
                result[f"{ranks} ranks train, {way}"] = found
    if args.json:
        state = {"data": data, "machine": platform.platform(), "cores": os.cpu_count(), "load_before": load}
        versions = {"torch": torch.__version__, "numpy": np.__version__, "h5py": h5py.__version__}
        everything = {
            "results": result,
            **state,
            "versions": versions,
            "options": {
                "repetitions": args.repetitions,
                "pairs": args.pairs,
                "ranks": args.ranks,
                "clock": chosen,
            },
        }
        args.json.write_text(json.dumps(everything, indent=1, default=str) + "\n")
    return 0


def _text(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"


if __name__ == "__main__":
    sys.exit(main())

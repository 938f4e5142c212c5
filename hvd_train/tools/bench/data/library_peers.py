"""Other libraries for training data, on the same samples in files of their own, if installed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvd_train.tools.bench.data.contestants import SEED, Batches, Contestant, Pair
from hvd_train.tools.bench.data.samples import Samples

_SHUFFLED = 10_000
"""Samples of WebDataset's buffer, which mixes what it reads in order."""


def webdataset(wds: Any, folder: Path, samples: Samples) -> Contestant:
    """WebDataset, the module `wds`: one tar file with the bytes of each sample, mixed in a buffer."""
    path, shape = folder / "samples.tar", samples.inputs.shape[1:]
    with wds.TarWriter(str(path)) as tar:
        for row, (inputs, target) in enumerate(zip(samples.inputs, samples.targets, strict=True)):
            tar.write({"__key__": f"{row:09d}", "inputs": inputs.tobytes(), "targets": target.tobytes()})

    def decoded(sample: dict[str, bytes]) -> tuple[Any, Any]:
        inputs = np.frombuffer(sample["inputs"], samples.inputs.dtype).reshape(shape)
        target = np.frombuffer(sample["targets"], samples.targets.dtype)
        return inputs, target.reshape(samples.targets.shape[1:])

    def collated(rows: list[tuple[Any, Any]]) -> Pair:
        inputs, targets = zip(*rows, strict=True)
        return np.stack(inputs), np.stack(targets)

    def batches(size: int) -> Batches:
        for epoch in itertools.count(SEED):
            rows = wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
            mixed = rows.shuffle(_SHUFFLED, seed=epoch).map(decoded)
            yield from mixed.batched(size, collation_fn=collated, partial=True)

    setting = f"tar, buffer of {_SHUFFLED:,} samples"
    return Contestant(name="WebDataset", setting=setting, files=[path], batches=batches)


def streaming(mosaic: Any, folder: Path, samples: Samples) -> Contestant:
    """The StreamingDataset of MosaicML's module `mosaic` on local shards, shuffled, in torch's DataLoader."""
    columns = {"x": f"ndarray:{samples.inputs.dtype}", "y": f"ndarray:{samples.targets.dtype}"}
    with mosaic.MDSWriter(out=str(folder), columns=columns) as writer:
        for inputs, target in zip(samples.inputs, samples.targets, strict=True):
            writer.write({"x": inputs, "y": np.atleast_1d(target)})

    def batches(size: int) -> Batches:
        data = mosaic.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=size)
        for batch in _endless(torch.utils.data.DataLoader(data, batch_size=size)):
            yield batch["x"], batch["y"].reshape(len(batch["y"]), *samples.targets.shape[1:])

    files = sorted(folder.glob("*.mds"))
    return Contestant(name="Streaming", setting="MDS, 0 workers", files=files, batches=batches)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader

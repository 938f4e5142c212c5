"""A worker process: it makes the task and transforms the batches that its rank sends, one after the other."""

from __future__ import annotations

import contextlib
import random
import socket
import traceback
from typing import NamedTuple

import numpy as np
import torch

from hvd_train.algorithm.transformed_reader import Raw, apply
from hvd_train.algorithm.workers.channel import Channel
from hvd_train.config import Config
from hvd_train.data.format import SampleSpec
from hvd_train.errors import TaskError
from hvd_train.tasks.base import Batch
from hvd_train.tasks.draws import Draws
from hvd_train.tasks.load import make_task
from hvd_train.tasks.transforming import Transform, transform_of


class SetUp(NamedTuple):
    """The first message to a worker."""

    config: Config

    sample: SampleSpec


class Failed(NamedTuple):
    """The answer of a worker that could not do what it was asked."""

    reason: str


def main(fd: int) -> None:
    """Works until the other end of the socket `fd` is closed: its rank has ended, or needs it no longer."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        _serve(Channel(socket.socket(fileno=fd)))


def _serve(channel: Channel) -> None:
    (config, sample), _ = channel.receive()
    try:
        transform = _make_transform(config, sample)
    except Exception:
        channel.send(Failed(traceback.format_exc()))
        return
    channel.send(None)
    while True:
        (epoch, rows), tensors = channel.receive()
        raw = Raw({name: tensor.numpy() for name, tensor in tensors.items()}, epoch, rows)
        try:
            result = _transformed(transform, config, raw)
        except Exception:
            channel.send(Failed(traceback.format_exc()))
        else:
            channel.send(None, result)


def _make_transform(config: Config, sample: SampleSpec) -> Transform:
    task = make_task(config)
    torch.manual_seed(config.seed)
    task.build_model(sample)  # called before every other method; the model is not needed
    return transform_of(task)


def _transformed(transform: Transform, config: Config, raw: Raw) -> Batch:
    """For one that draws from global generators, these are those of the batch's first row: what it draws does
    not depend on the number of workers."""
    assert raw.rows is not None  # workers are given them
    seed = Draws(config.seed, raw.epoch, raw.rows[:1]).seed(0)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    batch = apply(transform, config.seed, raw)
    if not isinstance(batch, dict) or not all(_can_be_sent(name, value) for name, value in batch.items()):
        raise TaskError(
            f"transform of {config.task} returned {_described(batch)}; with data.workers expected a "
            "dictionary of dense tensors on the CPU. Return one, or set data.workers = 0."
        )
    return batch


def _can_be_sent(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _described(batch: object) -> str:
    if not isinstance(batch, dict):
        return type(batch).__name__
    bad = next((name, value) for name, value in batch.items() if not _can_be_sent(name, value))
    return f"{type(bad[1]).__name__} as {bad[0]!r}"

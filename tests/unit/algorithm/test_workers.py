"""Worker processes give what the rank itself would, in the same order, and fail with one message."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import hvd_train
from hvd_train.algorithm.transformed_reader import InThread, TransformedReader, Transformer
from hvd_train.algorithm.workers.channel import Channel
from hvd_train.algorithm.workers.pool import InProcesses, Workers
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, DataConfig, ModelConfig, StopConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.numbering import Numbering
from hvd_train.data.readers.make import make_reader
from hvd_train.errors import ConfigError, TaskError, WorkerLost
from hvd_train.tasks.base import Batch
from hvd_train.tasks.built_in import Classification
from hvd_train.tasks.load import make_task
from tests.deadlines import Deadline
from tests.mpi.jobs import model_bytes
from tests.unit.data.shards import write_foreign

TASKS = Path(__file__).with_name("augmenting.py")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_foreign(tmp_path / "a.h5", 53)
    return Config(seed=6, task=f"{TASKS}:Noisy", data=DataConfig(path=str(tmp_path / "a.h5"), batch_size=4))


@pytest.fixture
def catalog(config: Config) -> Catalog:
    return open_catalog(config.data)


def reader_of(catalog: Catalog, transformer: Transformer) -> TransformedReader:
    reader = make_reader(catalog.train, DataConfig(), 6, catalog.sample.fields, 1 << 30)
    return TransformedReader(reader, transformer, Numbering(catalog.shards), batch_size=4)


def drawn(reader: TransformedReader) -> list[Batch]:
    """The batches that are left in the epoch."""
    return [one.batch for one in iter(reader.next_batch, None) if one and one.batch is not None]


def require_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("count", [1, 2])
def test_batches_are_the_same_to_the_bit(count: int, config: Config, catalog: Catalog) -> None:
    """Two epochs, a resume in the middle of one, and an epoch that begins anew."""
    task = make_task(config)
    task.build_model(catalog.sample)
    alone = reader_of(catalog, InThread(task, config.seed))

    with Workers(count) as workers:
        reader = reader_of(catalog, InProcesses(workers, config, catalog.sample))
        for each in (alone, reader):
            each.start_epoch(0)
        require_equal(drawn(reader), drawn(alone))
        states = []
        for each in (alone, reader):
            each.start_epoch(1)
            for _ in range(5):
                each.next_batch()
            states.append(each.state_dict())
        assert states[0] == states[1], "batches that are prepared ahead do not count"
        rest = drawn(alone)
        require_equal(drawn(reader), rest)
        reader.start_epoch(0)
        reader.next_batch()
        reader.load_state_dict(states[1])
        assert not reader.restarted
        require_equal(drawn(reader), rest)
        reader.close()


def test_rows_that_were_not_trained_on_are_not_searched(config: Config, catalog: Catalog) -> None:
    """The third batch holds a value that is not finite, and is prepared when the second is trained on."""
    order = reader_of(catalog, InThread(Classification(ModelConfig()), 6))
    rows = [batch["inputs"][:, 0].int().tolist() for batch in drawn(order)]
    with h5py.File(config.data.path, "r+") as file:
        file["inputs"][rows[2][1], 2] = np.nan
    with Workers(1) as workers:
        reader = reader_of(catalog, InProcesses(workers, config, catalog.sample))
        began = reader.state_dict()
        found = []
        for _ in range(2):
            found += [one.batch for one in [reader.next_batch()] if one and one.batch is not None]
            assert reader.not_finite_since(began) == ""
        found += drawn(reader)
        assert [len(batch["inputs"]) for batch in found if batch] == [len(numbers) for numbers in rows]
        assert reader.not_finite_since(began) == (
            f"{config.data.path}: `inputs` holds nan in row {rows[2][1]}"
        )
        reader.close()


def test_global_generators_do_not_depend_on_the_number_of_workers(config: Config, catalog: Catalog) -> None:
    config = replace(config, task=f"{TASKS}:Global")
    found = []
    for count in (1, 2):
        with Workers(count) as workers:
            reader = reader_of(catalog, InProcesses(workers, config, catalog.sample))
            found.append(drawn(reader))
            reader.close()
    require_equal(*found)


def test_a_transform_that_fails_and_a_worker_that_is_killed(config: Config, catalog: Catalog) -> None:
    config = replace(config, task=f"{TASKS}:Failing")
    messages = []
    with Workers(1) as workers:
        reader = reader_of(catalog, InProcesses(workers, config, catalog.sample))
        while len(messages) < 2:
            try:
                assert reader.next_batch()
            except TaskError as error:
                messages.append(str(error))
        reader.start_epoch(1)
        with pytest.raises(WorkerLost) as caught:
            drawn(reader)
        reader.close()
    failed, listing = sorted(messages, key=lambda message: "names" in message)
    start = (
        f"transform of {config.task} failed in a process of data.workers. Correct it; with data.workers = 0 "
        "it is called in the rank's own process. Traceback (most recent call last):\n"
    )
    assert failed.startswith(start)
    assert f'File "{TASKS}", line ' in failed
    assert failed.endswith("ArithmeticError: row 21 is odd\n")
    assert (
        f"transform of {config.task} returned list as 'names'; with data.workers expected a dictionary of "
        "dense tensors on the CPU. Return one, or set data.workers = 0."
    ) in listing
    begin, _, end = str(caught.value).partition(") ")
    assert begin.startswith("worker process 1 of 1 (pid ")
    assert end == (
        "was ended by SIGKILL; expected it to transform batches until the end of the run. If memory was "
        "short, as SIGKILL often means, set a lower data.workers or data.batch_size; else see what it "
        "printed."
    )


def test_a_task_that_a_worker_cannot_make(config: Config, catalog: Catalog) -> None:
    config = replace(config, task=f"{TASKS}:Unbuilt")
    with Workers(1) as workers, pytest.raises(TaskError) as caught:
        InProcesses(workers, config, catalog.sample)
    message = str(caught.value)
    assert message.startswith(f"a process of data.workers cannot make the task {config.task}:\nTraceback")
    assert message.endswith("LookupError: no pretrained weights here\n")


def test_a_task_or_a_communicator_that_exists_is_refused(config: Config) -> None:
    config = replace(config, data=replace(config.data, workers=2))
    with pytest.raises(ConfigError) as caught:
        hvd_train.train(config, make_task(config))
    assert str(caught.value) == (
        "data.workers = 2: expected 0 with a task as an object. The processes make the task themselves and "
        "are started before the ranks connect: name the task in config.task, and leave both arguments out."
    )
    with pytest.raises(ConfigError, match="expected 0 with a communicator that exists"):
        hvd_train.train(config, comm=SoloCommunicator())


def test_a_run_is_the_same_with_workers(config: Config, tmp_path: Path) -> None:
    config = replace(
        config,
        runs=str(tmp_path),
        threads=torch.get_num_threads(),
        stop=StopConfig(max_epochs=2, patience=0),
    )
    models = []
    for workers in (0, 1):
        data = replace(config.data, workers=workers)
        result = hvd_train.train(replace(config, name=f"w{workers}", data=data))
        models.append(model_bytes(result.run))
    assert models[0] == models[1]


RANK = """
import os, sys
from hvd_train.config import Config, DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.algorithm.workers.pool import InProcesses, Workers
from tests.unit.algorithm.test_workers import drawn, reader_of
config = Config(task=sys.argv[1], data=DataConfig(path=sys.argv[2]))
catalog = open_catalog(config.data)
with Workers(2) as workers:
    reader = reader_of(catalog, InProcesses(workers, config, catalog.sample))
    while True:
        reader.start_epoch(0)
        drawn(reader)
"""


def test_workers_end_when_their_rank_is_killed(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, f"{TASKS}:Endless", config.data.path],
        env={**os.environ, "AUGMENTING_FOLDER": str(folder)},
    )
    deadline = Deadline(120)
    try:
        while len(list(folder.iterdir())) < 2:
            assert rank.poll() is None
            assert not deadline.passed()
            threading.Event().wait(0.05)
        for pid in folder.iterdir():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # as a launcher does
                os.kill(int(pid.name), number)
            pid.unlink()
        while len(list(folder.iterdir())) < 2:  # they go on
            assert rank.poll() is None
            assert not deadline.passed()
            threading.Event().wait(0.05)
    finally:
        rank.kill()
        rank.wait()
    for pid in folder.iterdir():
        while Path(f"/proc/{pid.name}").exists():
            assert not deadline.passed(), "a worker is left"
            threading.Event().wait(0.05)


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ends = [Channel(end) for end in socket.socketpair()]
    yield ends[0], ends[1]
    for end in ends:
        end.close()


def test_tensors_of_any_shape_and_type_arrive(channels: tuple[Channel, Channel]) -> None:
    """Larger ones than those before, and smaller ones; what arrived stays as it is."""
    ours, theirs = channels
    sent, received = [], []
    for i, size in enumerate((3, 1000, 7, 0, 5000, 2, 1, 4)):
        whole = torch.arange(2 * size, dtype=torch.float64).reshape(size, 2) + i
        sent.append(
            {
                "strided": whole[:, 1],
                "complex": torch.complex(whole, -whole),
                "bool": whole > size,
                "half": whole.bfloat16(),
                "scalar": torch.tensor(i, dtype=torch.uint8),
            }
        )
        ours.send(("message", i), sent[-1])
        message, tensors = theirs.receive()
        assert message == ("message", i)
        received.append(tensors)
    require_equal(received, sent)


def test_a_closed_connection_is_an_error(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()
    with pytest.raises(ConnectionError):
        ours.send("message")

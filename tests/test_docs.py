"""The documents say what is so: names, figures and links in them are compared with the code."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hvd_train
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.header import Row, StepDone
from hvd_train.algorithm.transformed_reader import InThread, TransformedReader
from hvd_train.algorithm.worker import Worker, steps_per_epoch
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, DataConfig, ModelConfig, StopConfig, flatten
from hvd_train.data.catalog import open_catalog
from hvd_train.data.numbering import Numbering
from hvd_train.data.readers.make import make_reader
from hvd_train.data.sources import Arrays
from hvd_train.data.windows import BLOCK_BYTES, WINDOW_BLOCKS
from hvd_train.data.writer import write_part
from hvd_train.record.events import SCHEMA_FILE
from hvd_train.record.wording import REASONS
from hvd_train.tasks.built_in import Classification
from tests.launching import ROOT, command, run
from tests.markdown import documents, inline_code, tables

ALGORITHM = ROOT / "docs" / "algorithm.md"
EVENTS = ROOT / "docs" / "events.md"

FOREIGN_OPTIONS = {
    # mpirun, horovodrun, srun and sbatch; pip; the benchmark
    *("--hostfile", "--oversubscribe", "--bind-to", "--host", "--gloo", "--mpi", "--nodes", "--ntasks"),
    *("--with-ft", "--signal", "--batch", "--cpus-per-task", "--wait", "--kill-on-bad-exit", "--check-build"),
    *("--prompt", "--rounds"),  # of an example, and of a benchmark
    *("--map-by", "--array", "--chdir", "--ntasks-per-node", "--output", "--time", "--version", "--logdir"),
}
"""Long options in the documents that are not this program's."""


def options_of(*words: str) -> set[str]:
    """The long options that --help of a command lists."""
    job = run([sys.executable, *words, "--help"], deadline_s=60, env={"COLUMNS": "200"})
    assert job.returncode == 0, job.output
    return set(re.findall(r"--[a-z][-.\w]*", job.stdout))


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    train = ["-m", "hvd_train"]
    found = options_of(*train) | {"--config"}
    for name in ("write", "info", "check"):
        found |= options_of(*train, "shard", name)
    found |= options_of(*train, "bench", "allreduce") | options_of(*train, "bench", "data")
    for name in (
        "launch",
        "doctor",
        "init",
        "restarts",
        "status",
        "dashboard",
        "report",
        "evaluate",
        "predict",
        "export",
    ):
        found |= options_of(*train, name)
    found |= options_of("benchmarks/averaging_cost.py") | options_of("-m", "benchmarks.ring_between_hosts")
    benchmarks = [f"benchmarks.{name}" for name in ("reading", "augmentation", "convergence", "every_step")]
    for module in ("tests.faults.mutants", *benchmarks):
        found |= options_of("-m", module)
    return found | FOREIGN_OPTIONS


def test_every_option_exists(known_options: set[str]) -> None:
    for path in documents():
        named = set(re.findall(r"(?<![-\w|])--[a-z][-.\w]*\w", path.read_text()))
        assert named <= known_options, f"{path.name}: {sorted(named - known_options)}"


def test_every_configuration_key_exists() -> None:
    keys = set(flatten(Config()))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    named = 0
    for path in documents():
        for code in inline_code(path):
            found = re.fullmatch(r"(\w+)\.(\w+)", code)
            if found and found[1] in sections and not code.endswith(".py"):
                named += 1
                assert code in keys, f"{path.name}: `{code}`"
    assert named > 10


def test_every_public_name_exists() -> None:
    for path in documents():
        for name in re.findall(r"\bhvd_train\.([A-Za-z]\w+)(?=[(:`])", path.read_text()):
            assert hasattr(hvd_train, name) or (ROOT / "hvd_train" / f"{name}.py").exists(), (
                f"{path.name}: {name}"
            )


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere() -> None:
    for path in documents():
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            other = (path.parent / file).resolve() if file else path
            assert other.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(other), f"{path.name}: {target}"


def test_every_file_that_is_named_exists() -> None:
    pattern = re.compile(
        r"(?:hvd_train|docs|tests|examples|launch|slurm|scripts|hostfiles|cmake|benchmarks)/[\w./-]+"
    )
    for path in documents():
        for code in inline_code(path):
            if pattern.fullmatch(code):
                assert (ROOT / code).exists(), f"{path.name}: {code}"


def test_the_event_log_is_described_as_its_schema_has_it() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    sections = dict(
        zip(re.findall(r"^## (.+)$", EVENTS.read_text(), re.MULTILINE), tables(EVENTS), strict=True)
    )
    assert sections.keys() == {"Every event", *schema["properties"]["event"]["enum"]}
    for event, rows in sections.items():
        described = [cell.strip("`") for cell, _ in rows[1:]]
        part = schema if event == "Every event" else schema["$defs"][event]
        expected = [name for name in part["properties"] if part is schema or name != "event"]
        assert described == expected, event
        added = {n for n, p in part["properties"].items() if "earlier versions" in p.get("description", "")}
        assert set(described) <= {*part["required"], *added, "event"}, event


def rows_of(path: Path, heading: str) -> list[list[str]]:
    """The rows below the heading of the table whose first cell of the heading this is."""
    (found,) = [t for t in tables(path) if t[0][0] == heading]
    return found[1:]


def test_the_headers_columns_are_those_of_the_code() -> None:
    named = [cell.strip("`") for cell, _ in rows_of(ALGORITHM, "column")]
    assert named == [f.name for f in fields(Row)]
    assert f"an allreduce of {8 * len(named)} p bytes" in ALGORITHM.read_text()


def test_the_reasons_to_stop_are_those_of_the_code() -> None:
    named = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows_of(ALGORITHM, "reason")))
    assert set(named) == set(REASONS)
    for key in re.findall(r"`stop\.(\w+)`", ALGORITHM.read_text()):
        assert hasattr(StopConfig(), key)


def test_the_size_of_the_state_is_right() -> None:
    layers = [nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 100), nn.ReLU(), nn.Linear(100, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = FlatState(model, optimizer, SoloCommunicator())
    numel = sum(p.numel() for p in model.parameters())
    assert f"For\nthe {numel:,} float32 parameters" in ALGORITHM.read_text()
    assert f"S = {state.num_bytes:,} bytes" in ALGORITHM.read_text()


def test_the_example_of_an_epoch_is_right(tmp_path: Path) -> None:
    assert "with k = 10 the first round goes\nthrough three of them and uses 264 and 204 samples" in (
        ALGORITHM.read_text()
    )
    used = []
    for rows in (100, 70):
        arrays = Arrays(inputs=np.zeros((rows, 2), np.float32), targets=np.zeros(rows, np.int64))
        write_part(tmp_path / str(rows), arrays, part="train")
        data = DataConfig(path=str(tmp_path / str(rows)))
        catalog = open_catalog(data)
        reader = make_reader(catalog.train, data, 0, catalog.sample.fields, 1 << 20)
        assert steps_per_epoch([100, 70], 32, 1) == 4
        worker = Worker(
            TransformedReader(
                reader, InThread(Classification(ModelConfig()), 0), Numbering(catalog.shards), batch_size=32
            ),
            lambda batches: StepDone(0.0, sum(len(b["targets"]) for b in batches)),
            batch_size=32,
            accumulate=1,
            samples_per_rank=[100, 70],
        )
        used.append(worker.run(10).samples)
        assert worker.progress == 2.5
        worker.close()
    assert used == [264, 204]


def test_the_window_of_the_stream_is_right() -> None:
    assert f"a window of {WINDOW_BLOCKS} blocks of about {BLOCK_BYTES >> 10} KiB" in ALGORITHM.read_text()


def numbers(cell: str) -> list[float]:
    return [float(n) for n in cell.strip("()").split(",")]


EXAMPLE = """
import json, sys
import torch
from hvd_train.algorithm.averaging import drift
from hvd_train.algorithm.distances import squared_distance
from hvd_train.comm.factory import connect
from hvd_train.algorithm.header import Row, exchange

given = json.loads(sys.argv[1])
with connect("mpi") as comm:
    mine = {name: row[comm.rank] for name, row in given.items()}
    buffer = comm.buffer(len(mine["x"]), torch.float32)

    def average(values, weight):
        buffer.live.copy_(torch.tensor(values))
        seen = {}
        comm.average(buffer, weight, lambda part, start: seen.update(slice=part.tolist(), start=start))
        return {**seen, "anchor": buffer.anchor.tolist(), "live": buffer.live.tolist()}

    average(mine["x"], 1.0)
    buffer.live.copy_(torch.tensor(mine["y"]))
    far = squared_distance(buffer.live, buffer.anchor)
    before = exchange(comm, Row(samples=mine["samples"][0], loss_sum=0.0, distance=far))
    share = float(before.shares[comm.rank])
    staged = (torch.tensor(mine["y"]) * share).tolist()
    result = average(mine["y"], float(before.weights[comm.rank]))
    owned = slice(buffer.start, buffer.stop)
    moved = squared_distance(buffer.anchor[owned], buffer.previous[owned])
    after = exchange(comm, Row(samples=1, loss_sum=0.0, moved=moved))
    sick = comm.rank == 0
    health = exchange(comm, Row(samples=mine["samples"][0], loss_sum=0.0, finite=float(not sick)))
    values = [float("nan")] + mine["y"][1:] if sick else mine["y"]
    without = average(values, float(health.weights[comm.rank]))
    row = {
        **result, "share": share, "staged": staged, "owns": [buffer.start, buffer.stop], "far": far,
        "moved": moved, "drift": drift(before, after["moved"]), "without": without["live"],
        "share_without": float(health.shares[comm.rank]),
    }
    rows = comm.allgather(row)
    if comm.rank == 0:
        print(json.dumps(rows))
"""


@pytest.mark.mpi
def test_the_round_in_numbers_is_what_three_ranks_do() -> None:
    first, measured, sick = (t for t in tables(ALGORITHM) if t[0][1:] == ["rank 0", "rank 1", "rank 2"])
    names = ["x", "y", "samples", "share", "staged", "owns", "slice", "anchor"]
    shown = {name: [numbers(c) for c in cells[1:]] for name, cells in zip(names, first[1:], strict=True)}
    given = json.dumps({name: shown[name] for name in ("x", "y", "samples")})
    job = run(command("mpirun", 3, ["-c", EXAMPLE, given]), deadline_s=60)
    assert job.returncode == 0, job.output
    ranks = json.loads(job.stdout)
    for name in ("staged", "owns", "slice", "anchor"):
        assert [row[name] for row in ranks] == shown[name], name
    assert [row["live"] for row in ranks] == shown["anchor"]
    assert [[row["share"]] for row in ranks] == shown["share"]
    for name, cells in zip(("far", "moved"), measured[1:], strict=True):
        assert [[row[name]] for row in ranks] == [numbers(c) for c in cells[1:]], name
    assert "= 92 - 45 = 47" in ALGORITHM.read_text()
    assert {row["drift"] for row in ranks} == {47.0}
    for name, cells in zip(("share_without", "without"), sick[1:], strict=True):
        expected = [numbers(c) for c in cells[1:]]
        assert [row[name] if name == "without" else [row[name]] for row in ranks] == expected, name


def test_every_decision_is_recorded_in_the_same_form() -> None:
    folder = ROOT / "docs" / "adr"
    records = sorted(folder.glob("0*.md"))
    assert [int(r.name[:4]) for r in records] == list(range(1, len(records) + 1))
    listed = re.findall(r"\]\((0[^)]+)\)", (folder / "README.md").read_text())
    assert listed == [r.name for r in records]
    for record in records:
        heads = re.findall(r"^#+ .+$", record.read_text(), re.MULTILINE)
        assert heads[0].startswith(f"# {int(record.name[:4])}. "), record.name
        assert heads[1:] == ["## Context", "## Decision", "## Consequence"], record.name


def test_the_changelog_has_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    released = f"## [{hvd_train.__version__}]" in text
    assert released or f"## [Unreleased]\n\nTo become {hvd_train.__version__}." in text

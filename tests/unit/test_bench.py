"""`bench allreduce`: its options, what it checks results by, its rows and its limit; without a launcher."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from hvd_train.cli import main
from hvd_train.errors import CommunicationError, ConfigError
from hvd_train.tools.bench.allreduce.limit import wire_seconds
from hvd_train.tools.bench.allreduce.options import Options, parse_size, size_name
from hvd_train.tools.bench.allreduce.peers import OWN
from hvd_train.tools.bench.allreduce.rows import add_ratios, best_of_each, bus_bytes_per_s, spread_of
from hvd_train.tools.bench.allreduce.text import in_words
from hvd_train.tools.bench.allreduce.values import Expected, Values, weight
from hvd_train.tools.bench.command import parse

NUMEL = 30_001
"""Two whole periods of the values, and a rest."""


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("64B", 64), ("64", 64), ("4MiB", 4 << 20), ("2kB", 2000), ("1GiB", 1 << 30), ("12 KiB", 12 << 10)],
)
def test_a_size_has_a_unit(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "1.5MiB", "-4B", "0B", "6B", "4mib", "4 M iB"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sizes"):
        parse_size(text)


def test_a_size_is_named_in_its_largest_unit() -> None:
    assert [size_name(n) for n in (64, 4 << 20, 3 << 10, 1 << 30)] == ["64 B", "4 MiB", "3 KiB", "1 GiB"]


def test_options_are_read() -> None:
    options = parse(["allreduce", "--sizes", "64B, 4MiB,64B", "--backends", "ring,mpi", "--json"])
    assert options.num_bytes == (64, 4 << 20)
    assert options.named_backends == ("ring", "mpi")
    assert (options.repeat, options.wire, options.wire_rate, options.json) == (20, "float32", None, True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--backends", "ring,nccl"], "expected names of ring, mpi, horovod, gloo"),
        (["--repeat", "0"], "expected at least 1 call"),
        (["--wire-rate", "-1"], "expected bits per second"),
        (["--sizes", ","], "expected at least one size"),
    ],
)
def test_invalid_options_are_refused(args: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(["allreduce", *args])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["bench"], "expected `bench allreduce`"),
        (["bench", "reduce"], "`bench reduce`: expected `bench allreduce`"),
        (["bench", "allreduce", "--sizes", "5B"], "whole float32 elements"),
        (["bench", "allreduce"], "started as one process. Expected at least 2 ranks"),
    ],
)
def test_an_impossible_measurement_is_one_message(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def mean_of(size: int) -> torch.Tensor:
    live = torch.zeros(NUMEL)
    total = torch.zeros(NUMEL, dtype=torch.float64)
    for rank in range(size):
        Values(rank).write(live)
        total += weight(rank) * live.double()
    return (total / sum(map(weight, range(size)))).float()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_right_mean_is_accepted_and_a_wrong_element_is_not(size: int) -> None:
    expected = Expected(range(size), mean=True, calls=1)
    mean = mean_of(size)
    expected.check(mean, "ring", size, thorough=True)
    expected.check(mean, "ring", size, thorough=False)
    rng = np.random.default_rng(size)
    for index in (0, NUMEL - 1, *rng.integers(0, NUMEL, 20)):
        wrong = mean.clone()
        wrong[index] += 0.01 * (1 + wrong[index].abs())
        with pytest.raises(CommunicationError, match=f"element {index} of {NUMEL}.*expected"):
            expected.check(wrong, "ring", size, thorough=True)
    for bad in (float("nan"), float("inf")):
        wrong = mean.clone()
        wrong[0] = bad
        with pytest.raises(CommunicationError, match="No figure is given for a wrong result"):
            expected.check(wrong, "ring", size, thorough=False)


def test_sampling_includes_the_ends_of_every_slice() -> None:
    size = 3
    expected = Expected(range(size), mean=True, calls=1)
    base, extra = divmod(NUMEL, size)
    starts = [r * base + min(r, extra) for r in range(size)]
    for index in (*starts, *(start - 1 for start in starts[1:]), NUMEL - 1):
        wrong = mean_of(size)
        wrong[index] *= 1.5
        with pytest.raises(CommunicationError, match=f"element {index} "):
            expected.check(wrong, "mpi", size, thorough=False)


def test_values_of_another_rank_or_one_rank_too_few_are_wrong() -> None:
    live = torch.zeros(NUMEL)
    total = torch.zeros(NUMEL)
    for rank in range(3):
        Values(rank).write(live)
        total += live
    Expected(range(3), mean=False, calls=1).check(total, "mpi", 3, thorough=True)
    Expected(range(3), mean=False, calls=2).check(3 * total, "mpi", 3, thorough=True)
    for ranks, calls in ((range(2), 1), ((0, 1, 3), 1), (range(3), 2)):
        with pytest.raises(CommunicationError):
            Expected(ranks, mean=False, calls=calls).check(total, "mpi", 3, thorough=True)


def row(backend: str, setting: str, seconds: float, cold: bool = True) -> dict[str, Any]:
    return {"backend": backend, "setting": setting, "num_bytes": 4 << 20, "cold": cold} | spread_of([seconds])


def test_the_fastest_setting_of_a_peer_counts_and_never_what_hvd_train_makes_of_it() -> None:
    best, others = best_of_each(
        [
            row("mpi", "default", 3.0),
            row("mpi", "segmented", 2.0),
            row("mpi", OWN, 1.0),
            row("ring", "a", 0.5),
        ]
    )
    assert [(r["backend"], r["setting"]) for r in best] == [("mpi", "segmented"), ("ring", "a")]
    assert [r["setting"] for r in others] == ["default", OWN]
    limit = {"num_bytes": 4 << 20, "cold": True, "limit_s": 0.4}
    add_ratios(best, best, [limit])
    assert [(r["times_ring"], r["times_limit"]) for r in best] == [(4.0, 5.0), (1.0, 1.25)]
    warm = [row("ring", "a", 0.5, cold=False)]
    add_ratios(warm, best, [limit])
    assert (warm[0]["times_ring"], warm[0]["times_limit"]) == (None, None)


def test_medians_and_bandwidth() -> None:
    assert spread_of([3.0, 1.0, 2.0, 9.0]) == {
        "median_s": 2.5,
        "min_s": 1.0,
        "max_s": 9.0,
        "repetitions": 4,
    }
    assert bus_bytes_per_s(100, 4, 0.5) == 2 * 3 / 4 * 100 / 0.5


@pytest.mark.parametrize(
    ("wire", "seconds"), [("float32", 1.0), ("bfloat16", 0.5), ("float16", 0.5), ("int8", 0.25 + 1 / 256)]
)
def test_the_limit_of_the_wire(wire: str, seconds: float) -> None:
    # Two hosts: a whole buffer each way.
    assert wire_seconds(1000, 2, wire, 8000.0) == seconds
    assert wire_seconds(1000, 4, wire, 8000.0) == 1.5 * seconds


def test_the_report_in_words_has_what_the_object_has() -> None:
    best, others = best_of_each([row("mpi", "default", 3e-3), row("ring", "average", 5e-7)])
    limits = [row("limit", "memory", 4e-7) | {"wire_s": 2e-3, "limit_s": 2e-3}]
    for rows in (best, others):
        add_ratios(rows, best, limits)
    report = {
        "rows": [r | {"bus_bytes_per_s": 1e9} for r in best],
        "variants": others,
        "limit": limits,
        "control": [],
        "libraries": {"ring": "shared memory"},
        "left_out": {"gloo": "no torch.distributed"},
        "world": {"ranks": 2, "hosts": 1, "cores_of_rank": [2, 2]},
        "date": "2026-01-02",
        "versions": {"torch": "2.0"},
        "machine": {"host": "h", "cores": 2, "cpu": "c", "system": "s", "load_before": 0.0},
        "options": vars(Options()),
    }
    text = in_words(json.loads(json.dumps(report)))
    lines = [line.split() for line in text.splitlines()]
    assert next(x for x in lines if "ring" in x[2:3])[:7] == [
        "4",
        "MiB",
        "ring",
        "average",
        "cold",
        "0.50",
        "us",
    ]
    assert any(x[:5] == ["4", "MiB", "mpi", "default", "cold"] and "6000.00" in x for x in lines)
    assert any(x[2:4] == ["limit", "wire"] and "2.00" in x for x in lines)
    assert "gloo: left out: no torch.distributed" in text

"""The study of benchmarks/convergence.py: what is trained next, what is not repeated, and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks.study import data, ranks
from benchmarks.study.intervals import Interval, interval, paired
from benchmarks.study.plan import MOST_RATES, Cell, next_rate, next_training, trainings_left
from benchmarks.study.problems import PROBLEMS, SELECTION, TEST, Problem, Training, folder_of
from benchmarks.study.report import outcome, table
from benchmarks.study.results import Results
from benchmarks.study.rules import DILOCO, REFERENCE, Rule
from hvd_train.config import Config
from tests.launching import ROOT
from tests.markdown import tables

MLP = next(p for p in PROBLEMS if p.name == "mlp")
SMALL = replace(MLP, rules=(REFERENCE, DILOCO), rates=(0.025, 0.05, 0.1), seeds=range(3))
FIGURES = {"averages": 300, "bytes": 1.5e9}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "results.jsonl")


def train_all(problem: Problem, results: Results, error: Mapping[float, float]) -> list[Training]:
    """All that the plan asks for, with the error of each learning rate and 0.001 for each seed."""
    done = []
    while (training := next_training([problem], results)) is not None:
        seed = 0.0 if training.part == SELECTION else 0.001 * training.seed
        results.append({**training.key(), **FIGURES, "error": error[training.rate] + seed})
        done.append(training)
    return done


def rates_tried(error: Mapping[float, float]) -> list[float]:
    tried: dict[float, float] = {}
    while (rate := next_rate((0.025, 0.05, 0.1), tried)) is not None:
        tried[rate] = error[rate]
    return list(tried)


def test_every_given_rate_is_tried_and_then_further_ones_while_the_best_is_at_the_edge() -> None:
    assert rates_tried({0.025: 3, 0.05: 2, 0.1: 3}) == [0.025, 0.05, 0.1]
    assert rates_tried({0.025: 3, 0.05: 2, 0.1: 1, 0.2: 0, 0.4: 1}) == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert rates_tried({0.0125: 1, 0.025: 1, 0.05: 2, 0.1: 3, 0.00625: 2}) == [
        *(0.025, 0.05, 0.1, 0.0125, 0.00625)
    ]


def test_rates_are_halved_as_long_as_all_diverge_and_no_more_than_the_limit() -> None:
    tried: dict[float, float] = {}
    while (rate := next_rate((0.025, 0.05, 0.1), tried)) is not None:
        tried[rate] = math.inf
    assert len(tried) == MOST_RATES
    assert min(tried) == 0.025 / 2 ** (MOST_RATES - 3)


def test_the_rate_is_chosen_by_other_rows_and_another_seed_than_those_of_the_final_trainings(
    results: Results,
) -> None:
    problem = replace(SMALL, rules=(REFERENCE,))
    done = train_all(problem, results, {0.025: 0.03, 0.05: 0.02, 0.1: 0.03})
    alike = [(t.rate, t.part, t.seed) for t in done if t.split == "alike"]
    assert alike == [
        *((rate, SELECTION, 100) for rate in (0.025, 0.05, 0.1)),
        *((0.05, TEST, seed) for seed in range(3)),
    ]
    assert [t.folder for t in done if t.split == "alike"][2:4] == [
        *("mnist-38400-4-alike-selection", "mnist-38400-4-alike-test")
    ]


def test_a_study_goes_on_after_the_last_complete_line(tmp_path: Path) -> None:
    path, error = tmp_path / "results.jsonl", {0.025: 0.03, 0.05: 0.02, 0.1: 0.03}
    done = train_all(SMALL, Results(path), error)
    assert len(done) == 2 * 2 * (3 + 3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:50])
    again = Results(path)
    assert trainings_left(SMALL, again) == len(done) - 7
    left = train_all(SMALL, again, error)
    assert [t.key() for t in left] == [t.key() for t in done[7:]]
    assert path.read_text() == "".join(lines)


def test_what_has_other_settings_is_trained_again(results: Results) -> None:
    error = {0.025: 0.03, 0.05: 0.02, 0.1: 0.03}
    count = len(train_all(SMALL, results, error))
    assert next_training([SMALL], results) is None
    assert len(train_all(replace(SMALL, batch=64), results, error)) == count
    slow = Rule(name=DILOCO.name, sync={**DILOCO.sync, "outer_lr": 0.5})
    assert len(train_all(replace(SMALL, rules=(REFERENCE, slow)), results, error)) == count / 2


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.name}-{p.ranks}")
def test_every_training_can_be_configured_and_has_the_same_samples(problem: Problem) -> None:
    assert problem.rows % (problem.ranks * problem.batch) == 0, "every step has a full batch"
    for rule in problem.rules:
        training = Training(problem=problem, split="split", rule=rule, rate=0.1, seed=0, part=TEST)
        config = training.config()
        assert isinstance(config, Config)
        assert config.learning_rate.total == problem.samples
        assert problem.samples == problem.steps * problem.batch * problem.ranks
        assert problem.steps >= 3 * config.sync.period


def test_intervals_are_those_of_students_t() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert not Interval(0.1, 0.1).excludes_zero
    assert Interval(-0.2, 0.1).excludes_zero


def test_differences_are_taken_between_the_same_seeds() -> None:
    found = paired({0: 3.0, 1: 5.0, 2: 4.0}, {2: 3.0, 1: 3.0, 0: 1.0, 9: 100.0})
    assert found is not None
    assert found.mean == pytest.approx(5 / 3)
    assert paired({0: 1.0}, {0: 2.0}) is None
    assert paired({0: 1.0, 1: math.inf}, {0: 2.0, 1: 2.0}) is None


def test_the_table_has_means_and_differences(results: Results) -> None:
    train_all(replace(SMALL, rules=(REFERENCE,)), results, {0.025: 0.03, 0.05: 0.02, 0.1: 0.03})
    assert table([SMALL], results)[1:] == [
        ["mlp, 4 ranks (%)", "k = 10", "300", "1,500", *(["2.10", "", "0.05"] * 2)]
    ], "rules that are not finished are left out"
    train_all(SMALL, results, {0.025: 0.026, 0.05: 0.03, 0.1: 0.03, 0.0125: 0.03})
    assert table([SMALL], results)[2] == [
        *("", "nesterov, k = 100", "300", "1,500"),
        *(["2.70", "**+0.60 (+0.60 to +0.60)**", "0.025"] * 2),
    ]


def test_a_final_training_that_diverges_is_counted(results: Results) -> None:
    problem = replace(SMALL, rules=(REFERENCE,))
    cell = Cell(problem=problem, split="alike", rule=REFERENCE)
    for rate, error in ((0.025, 0.03), (0.05, 0.02), (0.1, 0.03)):
        results.append({**cell.training(rate, 100, SELECTION).key(), **FIGURES, "error": error})
    for seed, error in ((0, 0.02), (1, None), (2, 0.02)):
        results.append({**cell.training(0.05, seed, TEST).key(), **FIGURES, "error": error})
    found = outcome(problem, "alike", REFERENCE, results)
    assert found is not None
    assert found.diverged == 1


def test_one_rank_trains_what_is_left_and_keeps_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tabular = next(p for p in PROBLEMS if p.name == "tabular")
    problem = replace(tabular, ranks=1, rows=640, batch=64, epochs=3, seeds=range(2), rules=(REFERENCE,))
    path = tmp_path / "results.jsonl"
    data.write_data(problem, tmp_path / "data", tmp_path)
    monkeypatch.setattr(ranks, "PROBLEMS", [problem])
    monkeypatch.setattr("sys.argv", ["ranks", str(tmp_path / "data"), str(tmp_path / "runs"), str(path)])
    ranks.main()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(capsys.readouterr().out.splitlines()) >= 2 * (3 + 2)
    for line in lines:
        assert (line["rounds"], line["averages"], line["samples"], line["bytes"]) == (3, 3, 1920, 0)
        assert line["error"] == line["metrics"]["error"] > 0
        assert str(tmp_path) not in json.dumps(line)
    assert not list((tmp_path / "runs").iterdir())
    ranks.main()
    assert len(path.read_text().splitlines()) == len(lines)


def test_shards_split_by_class_have_two_classes_on_each_of_eight_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = replace(MLP, ranks=8, rows=400, batch=5)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 1050))
    images = np.zeros((len(labels), 2, 2), np.uint8)
    monkeypatch.setattr(data, "_read_mnist", lambda folder, part: (images, labels))
    data.write_data(problem, tmp_path, tmp_path)
    classes = {}
    for split in ("alike", "split"):
        shards = sorted((tmp_path / folder_of(problem, split, TEST)).glob("train-*.h5"))
        classes[split] = [set(h5py.File(shard)["targets"][:].tolist()) for shard in shards]
    assert classes["split"] == [{c, c + 1} for c in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert len(classes["alike"]) == 8
    assert min(map(len, classes["alike"])) > 5


def test_the_table_in_the_documents_is_the_report_of_the_results_that_are_kept() -> None:
    kept = Results(ROOT / "benchmarks" / "results" / "convergence.jsonl")
    assert tables(ROOT / "docs" / "choosing.md")[-1] == table(PROBLEMS, kept)

"""Checkpoints that are damaged, foreign, or of an earlier version: refused with one error, or read."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvd_train
from hvd_train.algorithm.optimizer_state import OptimizerState
from hvd_train.algorithm.progress import Progress
from hvd_train.algorithm.stopping import Watch
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import CheckpointConfig, StopConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.data.rows import Rows
from hvd_train.errors import RunDirectoryError
from hvd_train.io.stateful import Stateful
from hvd_train.record.events import read_events
from hvd_train.record.reports import NullRecorder
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.layout import checkpoint_of, saved_config
from hvd_train.run.random_state import RandomState
from hvd_train.run.restore import restore, saved_states
from hvd_train.run.saved_checkpoint import SavedCheckpoint, find_checkpoint, newest_whole, rank_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
"""`run-schema-N`: a run of two ranks, left by the last version with that schema. `latest` is of round 40."""

SPEC = SampleSpec(inputs="x", targets="x", fields={"x": FieldSpec(shape=(2,), dtype="float32")})


def parts(model: nn.Module) -> dict[str, Stateful]:
    """Real parts of a run."""
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    watch = Watch(StopConfig())
    watch.after_evaluation(4, 0.5)
    return {
        "progress": Progress(rounds=4, samples=100, looked_at_epoch=1),
        "watch": watch,
        "optimizer": OptimizerState(model, optimizer, lambda name, value: True),
        "random": RandomState(0, 0, 1),
    }


def save(run: Path, rounds: int, best: bool = False) -> Path:
    """A checkpoint in the folder `run`."""
    model = nn.Linear(2, 1)
    Checkpoints(
        folder=run / "checkpoints",
        comm=SoloCommunicator(),
        config=CheckpointConfig(keep=9),
        model=model,
        parts=parts(model),
        shared=frozenset(),
        sample=SPEC,
        recorder=NullRecorder(),
    ).save(rounds, "every", best)
    return run / "checkpoints" / f"round-{rounds}"


def flip(file: Path, at: int = -9, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def test_a_bit_that_flips_anywhere_in_a_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    manifest = folder / "manifest.json"
    content, expected = manifest.read_bytes(), SavedCheckpoint.open(folder).manifest
    refused = 0
    for at in range(len(content)):
        flip(manifest, at, bit=at % 7)
        found: object = None
        try:
            found = SavedCheckpoint.open(folder).manifest
        except RunDirectoryError as error:
            refused += str(error).startswith(f"{manifest}: ")
        assert found in (None, expected), at
        manifest.write_bytes(content)
    assert refused > 0.7 * len(content), "only spaces may change"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": 5}, "it is of round 5, in a folder named round-4"),
        ({"round": "4"}, "Expected `int`, got `str` - at `round`"),
        ({"world_size": 0}, "Expected `int` >= 1 - at `world_size`"),
        ({"world_size": 2}, "it lists the files .*; expected model.safetensors and one for each of 2 ranks"),
        ({"world_size": 10**30}, "one for each of 1000000000000000000000000000000 ranks"),
        ({"files": []}, "Expected `object`, got `array` - at `files`"),
        ({"sample": {**SPEC.to_json(), "scalf": 2.0}}, "the sample has scalf, which this program does not"),
        ({"sample": {**SPEC.to_json(), "inputs": "y"}}, "the sample has y and x, but no such fields"),
        ({"sample": {**SPEC.to_json(), "fields": {"x": {"shape": [-2], "dtype": "int8"}}}}, r"shape \[-2\]"),
        ({"sample": {**SPEC.to_json(), "fields": {"x": {"shape": [2], "dtype": "flot"}}}}, "'flot' not und"),
        ({"new": 1}, "unknown field `new`"),
    ],
)
def test_a_foreign_manifest_is_refused_by_its_first_fault(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Of schema 1, which has no checksum of its own."""
    file = save(tmp_path, 4) / "manifest.json"
    values = {**json.loads(file.read_text()), "schema": 1}
    del values["checksum"]
    file.write_text(json.dumps(values))
    assert SavedCheckpoint.open(file.parent).round == 4
    file.write_text(json.dumps({**values, **change}))
    with pytest.raises(RunDirectoryError, match=f"{file}: damaged: .*{message}"):
        SavedCheckpoint.open(file.parent)


def test_the_error_names_the_nearest_good_checkpoint(tmp_path: Path) -> None:
    folders = {rounds: save(tmp_path, rounds, best=rounds == 10) for rounds in (10, 20, 30, 40)}
    flip(folders[30] / rank_file(0))
    with pytest.raises(RunDirectoryError, match=rf"damaged: .* Go on from {folders[20]}, which is whole"):
        SavedCheckpoint.open(folders[30]).require_whole()
    flip(folders[20] / "manifest.json", 5)
    (folders[10] / "model.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match=rf"Go on from {folders[40]}, which is whole"):
        SavedCheckpoint.open(folders[30]).require_whole()
    shutil.rmtree(folders[40])
    with pytest.raises(RunDirectoryError, match="No other checkpoint there is whole"):
        SavedCheckpoint.open(folders[30]).require_whole()


def test_auto_goes_on_from_the_newest_that_is_whole(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == (None, ())
    folders = [save(tmp_path, rounds) for rounds in (10, 20, 30, 40)]
    assert newest_whole(tmp_path) == (folders[3], ())
    flip(folders[3] / "model.safetensors")
    (folders[2] / "manifest.json").unlink()
    found, left = newest_whole(tmp_path)
    assert found == folders[1]
    assert [line.partition(": ")[0] for line in left] == [
        f"{folders[3]}/model.safetensors",
        f"{folders[2]}/manifest.json",
    ]
    assert all(line.endswith("The run goes on from round-20, which is whole.") for line in left)
    shutil.rmtree(folders[3])
    assert newest_whole(tmp_path)[0] == folders[1]
    for folder in folders[:2]:
        flip(folder / rank_file(0))
    with pytest.raises(
        RunDirectoryError, match=r"no checkpoint in .* is whole: .*round-10/.*round-30/manifest"
    ):
        newest_whole(tmp_path)


def test_after_a_resume_from_before_the_undone_rounds_come_last(tmp_path: Path) -> None:
    folders = {rounds: save(tmp_path, rounds, best=rounds == 30) for rounds in (10, 30)}
    folders[12] = save(tmp_path, 12)
    assert checkpoint_of(tmp_path, "latest") == folders[12]
    flip(folders[12] / "model.safetensors")
    assert newest_whole(tmp_path)[0] == folders[10]
    flip(folders[10] / "model.safetensors")
    assert newest_whole(tmp_path)[0] == folders[30]


@pytest.mark.parametrize("pointer", ["best", "latest"])
@pytest.mark.parametrize("content", [b"round-10\n", b"\xff\xfe", b"", b"../../etc", b"round-\xc2\xb2", None])
def test_a_pointer_that_is_damaged_names_no_other_model(
    content: bytes | None, pointer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rounds in (10, 20):
        save(tmp_path, rounds, best=True)
    line = tmp_path / "checkpoints" / pointer
    line.unlink() if content is None else line.write_bytes(content)
    found = find_checkpoint(tmp_path, pointer)
    assert found is not None
    assert found.round == 20
    assert ("names 'round-10', but index.json next to it round-20" in capsys.readouterr().err) is (
        content == b"round-10\n"
    )


def test_without_an_index_a_damaged_best_is_no_model_and_a_damaged_latest_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "run-schema-1", run)
    assert [find_checkpoint(run, p).round for p in ("best", "latest")] == [20, 40]  # type: ignore[union-attr]
    for pointer in ("best", "latest"):
        (run / "checkpoints" / pointer).write_bytes(b"roune-20")
    assert find_checkpoint(run, "best") is None
    assert find_checkpoint(run, "latest").round == 40  # type: ignore[union-attr]
    with pytest.raises(RunDirectoryError, match=r"no checkpoint `best`: .*round 40: take `latest`"):
        hvd_train.load_model(run)


def test_a_file_that_is_not_regular_is_not_opened(tmp_path: Path) -> None:
    """A pipe without a writer would block for ever."""
    folder = save(tmp_path, 10)
    for name in ("manifest.json", "model.safetensors", rank_file(0)):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(RunDirectoryError, match=f"{name}: cannot be read: not a file"):
            SavedCheckpoint.open(folder).require_whole()
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    for name in ("latest", "index.json"):
        (folder.parent / name).unlink()
        os.mkfifo(folder.parent / name)
    assert newest_whole(tmp_path)[0] == folder


@pytest.mark.parametrize("path", ["no/such", "n" * 300])
def test_a_path_that_does_not_exist(path: str, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"neither a run's folder nor a checkpoint|cannot be read"):
        find_checkpoint(tmp_path / path, "latest")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("progress", {"rounds": "4"}, "Expected `int`, got `str` - at `rounds`"),
        ("progress", {"looked_at_epoch": None}, "got `null`"),
        ("progress", {"state_dict": 1}, "unknown field `state_dict`"),
        ("watch", {"curve": [[4, 0.5], [5]]}, r"array` of length 2, got 1 - at `curve\[1\]"),
        ("watch", {"since_best": -1}, "Expected `int` >= 0"),
        ("random", {"place": [0]}, "`place`"),
        ("random", {"torch": torch.zeros(3, dtype=torch.uint8)}, "`torch` is not a state of torch's"),
        ("random", {"torch": torch.zeros(3)}, "`torch` is not a state of torch's generator"),
        (
            "optimizer",
            {"weight/exp_avg": torch.ones(1)},
            r"`weight/exp_avg` is torch.float32 \[1\]; expected .*\[1, 2",
        ),
        ("optimizer", {"weight/exp_avg": torch.ones(1, 2).double()}, "torch.float64"),
        (
            "optimizer",
            {"weight/momentum": torch.ones(1, 2)},
            "not in the state of this optimizer, which keeps exp_avg, ",
        ),
        (
            "optimizer",
            {"other/exp_avg": torch.ones(1)},
            "of parameter `other`, which the model does not have",
        ),
        ("optimizer", {"weight/step": "1"}, "`weight/step` is str; expected torch.float32"),
    ],
)
def test_a_state_is_loaded_by_its_schema_or_not_at_all(
    part: str, change: dict[str, Any], message: str
) -> None:
    taker = parts(nn.Linear(2, 1))[part]
    before = {key: repr(value) for key, value in taker.state_dict().items()}
    saved = parts(nn.Linear(2, 1))[part].state_dict()
    with pytest.raises(hvd_train.errors.UserError, match=message):
        taker.load_state_dict({**saved, **change})
    for key in saved:
        with pytest.raises(hvd_train.errors.UserError, match=r"missing required field|it lacks"):
            taker.load_state_dict({k: v for k, v in saved.items() if k != key})
    assert {key: repr(value) for key, value in taker.state_dict().items()} == before, "nothing was taken"
    taker.load_state_dict(saved)


def test_a_part_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    saved = SavedCheckpoint.open(save(tmp_path, 4))
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(7.0)
    all_parts = parts(nn.Linear(2, 1))
    more = all_parts | {"schedule": Progress()}
    fewer = {name: part for name, part in all_parts.items() if name != "watch"}
    for wanted in (more, fewer):
        with pytest.raises(
            RunDirectoryError, match=r"state of optimizer, progress, random, watch; expected that"
        ):
            saved_states(saved, 0, wanted)
    states = saved_states(saved, 0, all_parts)
    for other, message in (
        (nn.Linear(2, 2), r"`weight` is torch.float32 \[1, 2\]; the model has torch.float32 \[2, 2\]"),
        (
            nn.Linear(2, 1).double(),
            r"`weight` is torch.float32 \[1, 2\]; the model has torch.float64",
        ),
        (nn.Linear(2, 1, bias=False), "it has `bias`, which the model does not have"),
        (nn.Sequential(nn.Linear(2, 1)), "it lacks `0.bias`"),
    ):
        with pytest.raises(
            RunDirectoryError, match=rf"{message}.*Resume with the model that the run began with"
        ):
            restore(saved, other, all_parts, states)
    assert bool((model.weight == 7).all()), "nothing was taken"
    restore(saved, model, all_parts, states)
    assert torch.equal(model.weight, saved.model()["weight"])


def validation_error(model: nn.Module, config: hvd_train.Config) -> float:
    catalog = open_catalog(config.data)
    rows = Rows(catalog.validation, catalog.sample.fields)
    batch = rows.read(0, len(rows))
    wrong = model(torch.from_numpy(batch["inputs"])).argmax(1) != torch.from_numpy(batch["targets"])
    return float(wrong.double().mean())


@pytest.mark.parametrize(("schema", "best_round"), [(1, 20), (2, 30)])
def test_a_run_of_each_schema_is_loaded_resumed_and_read(
    tmp_path: Path, schema: int, best_round: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / f"run-schema-{schema}", run)
    evaluations = {
        e["round"]: e["error"] for e in read_events(run / "events.jsonl") if e["event"] == "evaluation"
    }
    config = saved_config(run)
    for pointer, rounds in (("best", best_round), ("latest", 40)):
        error = validation_error(hvd_train.load_model(run, pointer), config)
        assert error == pytest.approx(evaluations[rounds], abs=1e-9)
    manifests = [json.loads(p.read_text()) for p in run.glob("checkpoints/round-*/manifest.json")]
    assert {m["schema"] for m in manifests} == {schema}

    again = replace(config, resume=str(run), backend="solo", stop=replace(config.stop, max_rounds=44))
    result = hvd_train.train(again)
    assert (result.reason, result.run) == ("max_rounds", run)
    events = list(read_events(run / "events.jsonl"))
    assert [e["round"] for e in events if e["event"] == "header"] == [0, 40]
    stop = events[-1]
    assert (stop["event"], stop["round"], stop["missing"]) == ("stop", 44, "")
    best = min({**evaluations, 44: result.final}.items(), key=lambda item: item[1])
    assert (stop["best_round"], result.best) == best
    newest = find_checkpoint(run, "latest")
    assert newest is not None
    assert (newest.round, newest.manifest.schema, newest.world_size) == (44, 2, 1)
    assert validation_error(hvd_train.load_model(run), config) == pytest.approx(result.best, abs=1e-9)

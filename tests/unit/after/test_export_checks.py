"""What an export says of itself, and what is never published."""

from __future__ import annotations

import io
import json
import pickletools
import re
import shutil
import sys
import zipfile
from pathlib import Path

import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch

import hvd_train
from hvd_train.after.export import publish
from hvd_train.after.export.compare import Comparison
from hvd_train.after.export.options import Format
from hvd_train.after.export.run import produce
from hvd_train.after.export.samples import open_samples
from hvd_train.after.trained import open_trained
from hvd_train.cli import main
from hvd_train.config_file import to_mapping, tomllib
from hvd_train.errors import ExportDiffers
from hvd_train.io import atomic
from tests.unit.after.runs import FORMATS, of, trained
from tests.unit.data.shards import write_foreign


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("plain"), of("Norm"))


def test_the_card_says_what_the_file_is(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    argv = ["export", str(plain), "--format", "onnx", "--out", str(out), "--checkpoint", "latest"]
    assert main([*argv, "--samples", "20"]) == 0
    card = tomllib.loads((tmp_path / "m.onnx.toml").read_text())
    assert card["inputs"] == [{"name": "inputs", "dtype": "float32", "shape": ["batch", 3]}]
    (output,) = card["outputs"]
    assert (output["name"], output["dtype"], output["shape"]) == ("outputs", "float32", ["batch", 7])
    assert output["largest_difference"] == card["comparison"]["largest_difference"] <= output["limit"]
    assert card["preprocessing"] == {"included": ["the transform of Norm"], "left_out": []}
    assert card["comparison"]["samples"] == 20
    assert card["model"]["round"] == 2
    (evaluation,) = (
        event
        for event in map(json.loads, (plain / "events.jsonl").read_text().splitlines())
        if event["event"] == "evaluation" and event["round"] == 2
    )
    assert card["metrics"]["values"] == evaluation["metrics"]
    assert (card["data"]["training_rows"], card["data"]["validation_rows"]) == (90, 60)
    assert card["data"]["training_shards"] == [{"file": f"{card['data']['path']}/a.h5", "rows": 90}]
    assert card["data"]["sample"]["fields"]["inputs"] == {"shape": [3], "dtype": "float32"}
    assert card["versions"]["export"].keys() >= {"hvd_train", "torch", "onnx", "onnxruntime"}
    assert card["versions"]["training"]["torch"] == torch.__version__
    assert card["configuration"] == to_mapping(open_trained(plain).config)
    metadata = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    assert (metadata["round"], metadata["preprocessing"]) == ("2", "the transform of Norm")


def test_what_a_file_cannot_hold_is_named(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    assert main(["export", str(plain), "--out", str(out)]) == 0
    assert "left out  the transform of Norm (apply it before the model)" in capsys.readouterr().out
    with safetensors.safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["left_out"] == "the transform of Norm (apply it before the model)"
    assert (about["format"], about["format_version"], about["run"]) == ("pt", "1", "r")


@pytest.mark.parametrize(
    ("task", "why"), [("NeedsTargets", "from the inputs alone"), ("Branches", "Data-dependent branching")]
)
def test_a_transform_that_no_graph_can_hold_is_left_out(
    task: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, of(task))
    out = tmp_path / "m.pt2"
    assert main(["export", str(run), "--format", "torch-export", "--out", str(out)]) == 0
    assert f"left out  the transform of {task} (apply it before input): " in capsys.readouterr().out
    card = tomllib.loads((tmp_path / "m.pt2.toml").read_text())
    assert why in card["preprocessing"]["left_out"][0]
    assert card["inputs"][0]["name"] == "input"


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("Branching", "no graph can be made of the model _Branching: .*Data-dependent branching"),
        ("ByName", r"calls the model with input=Tensor; expected tensors as\s+positional arguments"),
    ],
)
def test_a_model_of_which_no_graph_can_be_made_is_refused(
    task: str, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, of(task))
    capfd.readouterr()
    before = sorted(tmp_path.iterdir())
    for form in ("torch-export", "onnx"):
        assert main(["export", str(run), "--format", form, "--out", str(tmp_path / "m")]) == 2
        said = capfd.readouterr().err
        assert re.search(why, said)
        assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert main(["export", str(run), "--out", str(tmp_path / "m")]) == 0


def test_outputs_that_differ_are_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, of("Random"))
    before = sorted(tmp_path.iterdir())
    for form in FORMATS:
        assert main(["export", str(run), "--format", form, "--out", str(tmp_path / "m")]) == 1
        assert "output 0 differs by up to " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def damaged(content: bytes, at: int, bit: int = 0x40) -> bytes:
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


@pytest.mark.parametrize("form", FORMATS)
def test_a_byte_that_changes_is_found(
    form: Format, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the disk any byte, by the checksum; before that one in the values, by the model that is loaded."""
    run = open_trained(plain)
    samples = open_samples(run, "", 100)
    product = produce(run, run.model, samples, form)
    content = product.content
    weight = run.model.state_dict()["5.weight"].numpy().tobytes()
    inside = content.find(weight)
    assert inside > 0

    places = [
        0,
        9,
        inside,
        inside + len(weight) - 1,
        *range(0, len(content), len(content) // 7),
        len(content) - 1,
    ]
    for at in places:
        for bit in (0x01, 0x80):
            wrong = damaged(content, at, bit)
            monkeypatch.setattr(publish, "write", lambda path, _, wrong=wrong: atomic.write(path, wrong))
            with pytest.raises(ExportDiffers, match="bytes on the disk are not those that were written"):
                publish.publish(product, run.task, run.model, samples, tmp_path / "m", lambda _: "card")
            assert list(tmp_path.iterdir()) == []

    if form != "onnx":  # exact: the last bit of one value
        with pytest.raises(ExportDiffers, match=r"5\.weight` differs"):
            publish.check(product, damaged(content, inside, 0x01), run.task, run.model, samples)
    with pytest.raises(ExportDiffers, match="output 0 differs" if form == "onnx" else r"5\.weight` differs"):
        publish.check(product, damaged(content, inside + 3), run.task, run.model, samples)
    with pytest.raises(ExportDiffers, match="cannot be loaded"):
        publish.check(product, content[: len(content) // 2], run.task, run.model, samples)
    assert publish.check(product, content, run.task, run.model, samples).difference < 1e-4
    samples.close()


def test_the_archive_of_torch_export_has_no_pickle_and_no_samples(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.pt2"
    assert main(["export", str(plain), "--format", "torch-export", "--out", str(out)]) == 0
    with zipfile.ZipFile(out) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert [content for name, content in contents.items() if "sample_inputs" in name] == [b""]
    configs = [json.loads(content) for name, content in contents.items() if name.endswith("config.json")]
    entries = [entry for config in configs for entry in config["config"].values()]
    assert len(entries) == len(hvd_train.load_model(plain).state_dict()) + 1  # the transform's mean
    assert not any(entry["use_pickle"] for entry in entries)
    for content in contents.values():
        with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind: there is no object in it
            pickletools.dis(content, io.StringIO())


def test_an_existing_file_is_refused_before_anything_is_done(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", str(plain), "--out"]
    out, other = tmp_path / "m", tmp_path / "n"
    out.write_text("mine")
    assert main([*argv, str(out)]) == 2
    assert f"{out} exists already" in capsys.readouterr().err
    (tmp_path / "n.toml").write_text("mine = true")
    assert main([*argv, str(other)]) == 2
    assert f"{other}.toml, the name of the model card, exists already" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "no" / "m")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "n.toml"]
    assert (out.read_text(), (tmp_path / "n.toml").read_text()) == ("mine", "mine = true")


def test_a_file_never_stands_without_its_card(plain: Path, tmp_path: Path) -> None:
    """What a kill between the two leaves is a card, which does not stop the next export."""
    out = tmp_path / "m"
    assert main(["export", str(plain), "--out", str(out)]) == 0
    assert (tmp_path / "m.toml").stat().st_ctime_ns <= out.stat().st_ctime_ns
    out.unlink()
    assert main(["export", str(plain), "--out", str(out)]) == 0


def test_the_name_is_by_run_and_round_and_the_samples_are_those_that_are_named(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = write_foreign(tmp_path / "other.h5", 11)
    argv = ["export", str(plain), "--checkpoint", "round-2", "--data", str(other)]
    assert main(argv) == 0
    assert f"compared  11 samples of {other}: largest difference 0 " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "other.h5",
        "r-round-2.safetensors",
        "r-round-2.safetensors.toml",
    ]


def test_data_that_has_moved_is_named_with_the_remedy(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "r"
    shutil.copytree(plain, run)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("/data", "/gone"))
    out = tmp_path / "m"
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "Or give samples for the comparison by --data." in capsys.readouterr().err
    (run / "events.jsonl").unlink()
    other = write_foreign(tmp_path / "other.h5", 1)
    assert main(["export", str(run), "--out", str(out), "--data", str(other)]) == 0
    card = tomllib.loads((tmp_path / "m.toml").read_text())
    assert "no such file or folder" in card["data"]["not_found"]
    assert card["metrics"] == card["versions"]["training"] == {}


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_missing_is_named(
    name: str, plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert main(["export", str(plain), "--format", "onnx"]) == 2
    assert f"--format onnx needs {name}, which is not installed. Install the extra `export`" in (
        capsys.readouterr().err
    )


def test_export_is_one_process(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert main(["export", str(plain)]) == 2
    assert "rank 1 of 2; expected one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "0"], "--samples = 0: expected at least 1"),
        (["--checkpoint", "newest"], "--checkpoint = 'newest': expected best, latest or round-N"),
        (["--out", "/"], "--out = '/': expected the name of a file"),
        (["--checkpoint", "round-77"], "has no checkpoint `round-77`"),
    ],
)
def test_wrong_options_are_one_message(
    options: list[str], said: str, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(plain), *options]) == 2
    assert said in capsys.readouterr().err


def test_figures_that_are_not_finite_are_compared_as_such() -> None:
    nan, inf = float("nan"), float("inf")
    same = Comparison(exact=False)
    same.add([torch.tensor([nan, inf, 1.0])], [torch.tensor([nan, inf, 1.0])])
    assert (same.failure(), same.difference, same.largest) == ("", 0.0, 1.0)
    for wrong in (
        torch.tensor([1.0, inf, 1.0]),
        torch.tensor([nan, -inf, 1.0]),
        torch.tensor([nan, inf, nan]),
    ):
        other = Comparison(exact=False)
        other.add([torch.tensor([nan, inf, 1.0])], [wrong])
        assert "output 0 differs by up to inf" in other.failure()
    other.add([torch.zeros(2, 3)], [torch.zeros(2, 4)])
    assert (
        "its outputs are ['torch.float32 [2, 4]']; the model's are ['torch.float32 [2, 3]']"
        in other.failure()
    )

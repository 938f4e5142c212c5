"""README.md: every command in it is run, and what it shows is what the program prints."""

from __future__ import annotations

import gzip
import os
import re
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.cli import parse
from hvd_train.config_file import from_mapping, tomllib
from tests.launching import AS_ROOT, BIN, ROOT, Job, run, tool
from tests.markdown import Block, blocks, inline_code

README = ROOT / "README.md"
BLOCKS = blocks(README)
MAKE = "make "

BY_SLURM = ("sbatch ", "launch/srun.sh ")
"""How commands begin that need Slurm: tests/cluster/test_readme_slurm.py runs them."""

NOT_RUN = {
    ". .venv/bin/activate": "the environment of the tests is active already",
    "python -m hvd_train dashboard": "it serves until it is interrupted: tests/unit/monitor does that",
    **dict.fromkeys(BY_SLURM, "there is no Slurm; the script's syntax and the training options are checked"),
}
"""Commands, by how they begin, that are not run here, and why. Those of `make` are compared with CI's."""

MNIST = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

# The README's users have as many cores as they start ranks; the tests' machine may have one.
OVERSUBSCRIBE = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def commands(block: Block) -> list[str]:
    lines = (line.partition("  #")[0].strip() for line in block.text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def units() -> list[list[Block]]:
    """Each block of commands, with the Python block that stands right behind it: users run them one after
    the other."""
    found = []
    for block, after in zip(BLOCKS, [*BLOCKS[1:], None], strict=True):
        if block.language == "sh" and not any(c.startswith(MAKE) for c in commands(block)):
            follows = after is not None and after.language == "python" and after.section == block.section
            found.append([block, after] if follows and after is not None else [block])
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout, so that `runs` and `data` appear there, with files that a user has."""
    copy = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "data", "__pycache__", "*.egg-info")
    for name in ("examples", "hostfiles", "launch", "scripts", "slurm"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    shutil.copytree(ROOT / "hvd_train", copy / "hvd_train", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt"):
        shutil.copy(ROOT / name, copy)
    (copy / "measurements").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        with h5py.File(copy / "measurements" / f"{i}.h5", "w") as file:
            kind = rng.integers(0, 3, 300)
            file["spectrum"] = (rng.normal(size=(300, 20)) + kind[:, None]).astype(np.float32)
            file["kind"] = kind
    return copy


def environment(checkout: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(checkout), "VENV": str(BIN.parent), **AS_ROOT, **OVERSUBSCRIBE}


NO_TRAINING = (
    " shard ",
    " status",
    " report ",
    " bench ",
    " evaluate ",
    " predict ",
    " export ",
    " doctor",
    " init ",
    "--help",
    "--check-hosts",
    "--dry-run",
)


def is_training(command: str) -> bool:
    starts = "-m hvd_train" in command or command.startswith("launch/")
    return starts and not any(word in command for word in NO_TRAINING)


def training_options(command: str) -> list[str]:
    """What hvd_train itself is given by a command."""
    words = shlex.split(command)
    for mark in ("hvd_train", "--", "slurm/train.sh"):
        if mark in words:
            return words[words.index(mark) + 1 :]
    return []


def execute(command: str, checkout: Path) -> Job:
    job = run(
        ["bash", "-euo", "pipefail", "-c", command], deadline_s=100, cwd=checkout, env=environment(checkout)
    )
    assert job.returncode == 0, f"{command}\n{job.output}"
    return job


def run_command(command: str, checkout: Path) -> None:
    if any(command.startswith(beginning) for beginning in NOT_RUN):
        scripts = re.findall(r"\S+\.sh", command)
        for script in scripts:
            execute(f"bash -n {script}", checkout)
            parse(training_options(command))
        return
    if "horovodrun" in command:
        tool("horovodrun")
    if command.startswith("pip install"):
        install(command, checkout)
    elif is_training(command):
        job = execute(command if "--max-rounds" in command else f"{command} --max-rounds 4", checkout)
        assert re.search(r"stopped +\w", job.stdout), job.output
    else:
        execute(command, checkout)


def install(command: str, checkout: Path) -> None:
    """In an environment of its own, without the network: the tests' environment meets the requirements."""
    execute("python -m venv --without-pip own", checkout)
    (site,) = (checkout / "own" / "lib").glob("python3*/site-packages")
    (theirs,) = (BIN.parent / "lib").glob("python3*/site-packages")
    (site / "theirs.pth").write_text(f"{theirs}\n")
    offline = "export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1"
    job = execute(f"unset PYTHONPATH; {offline}; own/bin/python -m {command}", checkout)
    assert "Successfully installed hvd_train" in job.stdout, job.output
    elsewhere = checkout / "elsewhere"
    elsewhere.mkdir()
    train = "unset PYTHONPATH; cd elsewhere; ../own/bin/hvd_train --max-rounds 4"
    job = execute(f"{train}; ../own/bin/python -c 'import hvd_train; print(hvd_train.__file__)'", checkout)
    assert str(site) in job.stdout
    assert "stopped " in job.stdout


@pytest.mark.mpi
@pytest.mark.parametrize("unit", units(), ids=lambda unit: commands(unit[0])[0][:50])
def test_every_command_runs(unit: list[Block], checkout: Path) -> None:
    block, python = unit[0], unit[1:]
    if any(name in block.text for name in MNIST):
        if "MNIST_DIR" not in os.environ:
            pytest.skip("MNIST_DIR names no folder with the idx files of MNIST")
        for name in MNIST:
            packed = Path(os.environ["MNIST_DIR"], name)
            plain = packed.with_suffix("")
            (checkout / name).write_bytes(
                packed.read_bytes() if packed.exists() else gzip.compress(plain.read_bytes(), 1)
            )
    for command in commands(block):
        run_command(command, checkout)
    for program in python:
        (checkout / "program.py").write_text(program.text)
        execute("python program.py", checkout)


def test_the_reasons_for_not_running_are_needed() -> None:
    all_commands = [c for b in BLOCKS if b.language == "sh" for c in commands(b)]
    for beginning in NOT_RUN:
        assert any(c.startswith(beginning) for c in all_commands), f"nothing begins with {beginning!r}"


def test_ci_runs_what_make_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [c for b in BLOCKS if b.language == "sh" for c in commands(b) if c.startswith(MAKE)]
    assert named == ["make train", "make test"]
    for command in named:
        assert re.search(rf"^ *{command}\b", ci, re.MULTILINE), command
    for code in inline_code(README):
        if code.startswith(MAKE):
            _, target, *variables = shlex.split(code)
            assert target in targets, code
            for variable in variables:
                name, _, options = variable.partition("=")
                assert name == "ARGS", code
                parse(shlex.split(options))


def test_python_blocks_that_are_not_run_stand_in_an_example() -> None:
    run_blocks = [b for unit in units() for b in unit[1:]]
    excerpts = [b for b in BLOCKS if b.language == "python" and b not in run_blocks]
    assert len(excerpts) == 2
    for block, name in zip(excerpts, ("tabular.py", "own_loop.py"), strict=True):
        assert f"examples/{name}" in README.read_text()
        lines = iter((ROOT / "examples" / name).read_text().splitlines())
        for line in block.text.splitlines():
            if line.strip() != "...":
                assert line in lines, f"examples/{name} has no line, or not in this order: {line}"


def test_the_configuration_that_is_shown_is_valid() -> None:
    shown = [b for b in BLOCKS if b.language == "toml"]
    assert len(shown) == 1
    config = from_mapping(tomllib.loads(shown[0].text), "README.md")
    assert config.model.hidden == (500, 100)


def form(line: str) -> str:
    """A printed line without what differs between runs: figures, the host, the run's name."""
    line = re.sub(r"/[-/.\w]*runs/[-\w]+", "RUN", line)
    line = re.sub(r"\(([\w.-]+)\), backend", "(HOST), backend", line)
    return re.sub(r" +", " ", re.sub(r"\d[\d,.]*", "#", line)).strip()


@pytest.mark.mpi
def test_the_main_job_prints_what_is_shown(checkout: Path) -> None:
    job = execute("launch/mpirun.sh --host localhost:2 -np 2 -- --patience 2", checkout)
    printed = [form(line) for line in job.stdout.splitlines()]
    (shown,) = [b for b in BLOCKS if b.language == "text"]
    for line in shown.text.splitlines():
        wanted = form(line.removesuffix("..."))
        assert any(p == wanted or (line.endswith("...") and p.startswith(wanted)) for p in printed), (
            f"README.md shows\n{wanted}\nbut the program prints\n" + "\n".join(printed)
        )
    exact = [line for line in shown.text.splitlines() if line.startswith(("hvd_train", "data ", "digits "))]
    assert len(exact) == 3
    assert all(line in job.stdout for line in exact)


def test_the_proof_is_the_figure_that_is_shown() -> None:
    text = README.read_text()
    best = re.search(r"^error +best (0\.\d+)", text, re.MULTILINE)
    assert best
    assert f"is {100 * float(best[1]):.1f} %" in text

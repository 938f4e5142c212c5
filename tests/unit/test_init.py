"""`hvd_train init`: which files it writes, where they come from, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hvd_train.config_file import load_config
from hvd_train.tools.init import FILES, main
from tests.deadlines import seconds
from tests.launching import ROOT, environment

PROJECT = ROOT / "hvd_train" / "project"
NAMES = [name for name, _ in FILES]
SOURCES = {
    "hosts": ROOT / "hostfiles" / "openmpi.hosts",
    **{name: ROOT / name for name in NAMES if name.startswith("slurm/")},
}
"""Files that the checkout uses itself."""


def files_in(folder: Path) -> list[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return sorted(str(p.relative_to(folder)) for p in found)


def test_a_new_folder_receives_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "my project"
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert files_in(folder) == sorted(NAMES) == files_in(PROJECT)
    for name in NAMES:
        assert (folder / name).read_bytes() == (SOURCES.get(name) or PROJECT / name).read_bytes()
        assert not (folder / name).is_symlink()
        assert os.access(folder / name, os.W_OK)
        assert os.access(folder / name, os.X_OK) == os.access(PROJECT / name, os.X_OK)
        assert f"\n{name} " in f"\n{said}"
    assert said.endswith(f"Train: cd '{folder}' && python -m hvd_train --config run.toml\n")
    assert load_config(folder / "run.toml").task == "task.py:MyTask"


def test_what_stands_beside_them_stays(tmp_path: Path) -> None:
    (tmp_path / "data.h5").write_text("mine")
    (tmp_path / "slurm").mkdir()
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "data.h5").read_text() == "mine"


def test_existing_files_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sh").write_text("mine")
    (tmp_path / "hosts").symlink_to("nowhere")
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"hvd_train: {tmp_path} has hosts, slurm/train.sh already" in said.err
    assert files_in(tmp_path) == ["slurm/train.sh"]
    assert (tmp_path / "slurm" / "train.sh").read_text() == "mine"


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_no_place_for_a_folder(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([str(tmp_path / folder)]) == 2
    assert "Name a folder that can be written." in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_it_loads_neither_torch_nor_mpi(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from hvd_train.cli import main\n"
        f"assert main(['init', {str(tmp_path / 'new')!r}]) == 0\n"
        "print([name for name in ('torch', 'mpi4py', 'h5py', 'numpy') if name in sys.modules])"
    )
    job = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment({"PYTHONPATH": str(ROOT)}),
        timeout=seconds(60),
        check=True,
    )
    assert job.stdout.splitlines()[-1] == "[]"


def test_what_is_built_has_the_files_themselves(tmp_path: Path) -> None:
    """In the checkout some are links to files outside of the package."""
    tree = tmp_path / "tree"
    for name in ("hvd_train", "slurm", "hostfiles", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", build],
        cwd=tree,
        env=environment(),
        capture_output=True,
        timeout=seconds(60),
        check=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as built:
        for name in NAMES:
            member = built.getmember(f"{archive.name.removesuffix('.tar.gz')}/hvd_train/project/{name}")
            assert member.isfile()
            assert bool(member.mode & 0o100) == os.access(PROJECT / name, os.X_OK)
            content = built.extractfile(member)
            assert content is not None
            assert content.read() == (PROJECT / name).read_bytes()

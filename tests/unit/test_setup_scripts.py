"""Which MPI set-up takes, when it refuses to guess, and what the launch scripts pass on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "dirname", "sed")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder to be all of PATH: the shell's own tools, no MPI, no Slurm, no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return folder


def install(folder: Path, name: str, script: str = "exit 0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)
    return path


def run(machine: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(machine), "VENV": str(machine.parent / "venv"), **variables}
    environment.setdefault("PATH", str(machine))
    bash = shutil.which("bash")
    assert bash is not None
    command = [bash, str(ROOT / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def which_mpi(machine: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(machine, "scripts/setup.sh", "--which-mpi", **variables)


def test_a_machine_without_an_mpi_uses_the_wheel(machine: Path) -> None:
    done = which_mpi(machine)
    assert (done.returncode, done.stdout.split()) == (0, ["wheel"])


def test_the_machines_own_mpicc_is_taken(machine: Path) -> None:
    mpicc = install(machine, "mpicc")
    install(machine, "sinfo")
    done = which_mpi(machine)
    assert (done.returncode, done.stdout.split()) == (0, ["system", str(mpicc)])


def test_the_environments_own_mpicc_is_not_the_machines(machine: Path) -> None:
    inside = machine.parent / "venv" / "bin"
    install(inside, "mpicc")
    done = which_mpi(machine, PATH=f"{inside}:{machine}")
    assert (done.returncode, done.stdout.split()) == (0, ["wheel"])


@pytest.mark.parametrize("tool", ["srun", "sinfo"])
def test_slurm_without_mpicc_is_refused(machine: Path, tool: str) -> None:
    install(machine, tool)
    done = which_mpi(machine)
    assert done.returncode == 2
    assert f"this machine has Slurm ({machine / tool}) but no mpicc" in done.stderr
    assert "module load" in done.stderr
    assert "MPI=wheel" in done.stderr


@pytest.mark.parametrize(
    "sign", [{"MODULESHOME": "/opt/modules"}, {"LMOD_CMD": "/opt/lmod"}, {"BASH_FUNC_module%%": "() { :; }"}]
)
def test_environment_modules_without_mpicc_are_refused(machine: Path, sign: dict[str, str]) -> None:
    done = which_mpi(machine, **sign)
    assert done.returncode == 2
    assert "environment modules but no mpicc" in done.stderr


def test_the_wheel_can_be_asked_for_on_a_cluster(machine: Path) -> None:
    install(machine, "sinfo")
    install(machine, "mpicc")
    done = which_mpi(machine, MPI="wheel")
    assert (done.returncode, done.stdout.split()) == (0, ["wheel"])


def test_system_without_mpicc_is_an_error(machine: Path) -> None:
    done = which_mpi(machine, MPI="system")
    assert done.returncode == 2
    assert "MPI=system, but there is no mpicc on PATH" in done.stderr


def test_an_unknown_choice_names_the_known_ones(machine: Path) -> None:
    done = which_mpi(machine, MPI="openmpi")
    assert done.returncode == 2
    assert "MPI is 'openmpi', expected auto, wheel or system" in done.stderr


def test_the_choice_of_the_first_setup_is_remembered(machine: Path) -> None:
    state = machine.parent / "venv" / ".hvd_train"
    state.mkdir(parents=True)
    (state / "mpi.choice").write_text("wheel\n")
    install(machine, "sinfo")
    assert which_mpi(machine).stdout.split() == ["wheel"]
    assert which_mpi(machine, MPI="auto").returncode == 2


@pytest.mark.parametrize(("python", "seen"), [(None, "there is no"), ("exit 1", "3.10 or later is needed")])
def test_an_unfit_python_is_refused(machine: Path, python: str | None, seen: str) -> None:
    name = machine / "python3"
    if python is not None:
        install(machine, "python3", python)
    done = run(machine, "scripts/setup.sh", PYTHON=str(name))
    assert done.returncode == 1
    assert seen in done.stderr
    assert str(name) in done.stderr
    assert not (machine.parent / "venv").exists()


def test_a_python_without_venv_names_the_package_to_install(machine: Path) -> None:
    install(machine, "python3", "[[ $2 != *ensurepip* ]]")
    done = run(machine, "scripts/setup.sh")
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "srun"])
def test_the_scripts_give_hvd_train_launch_all_that_they_are_given(machine: Path, launcher: str) -> None:
    python = install(machine.parent / "venv" / "bin", "python", 'printf "%s\\n" "$0" "$@"; exit 75')
    given = ["-np", "2", "--", "--name", "two words; $HOME", "--", ""]
    done = run(machine, f"launch/{launcher}.sh", *given)
    assert done.returncode == 75
    expected = [str(python), "-m", "hvd_train", "launch", "--launcher", launcher, *given]
    assert done.stdout.split("\n")[:-1] == expected


def test_a_missing_environment_is_reported(machine: Path, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    for name in ("env.sh", "mpirun.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch" / name)
    script = os.path.relpath(tmp_path / "launch" / "mpirun.sh", ROOT)
    for venv, said in (
        ("", "no environment found"),
        ("/nowhere", "there is no environment in VENV=/nowhere"),
    ):
        done = run(machine, script, "-np", "2", VENV=venv)
        assert done.returncode == 1
        assert said in done.stderr

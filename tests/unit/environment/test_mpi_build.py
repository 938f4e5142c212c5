"""The record of the build's MPI: found, written, read back, compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_train.environment import mpi_build
from hvd_train.errors import EnvironmentMismatch, MPIMismatch

ROOT = Path(__file__).resolve().parents[3]
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI someone@somewhere Distribution, ident: 5.0.11"

FAKE_LIBRARY = """
#include <string.h>
int MPI_Get_library_version(char *text, int *length) {
    strcpy(text, "MPICH Version:      9.8.7\\nMPICH Release date: some day\\n");
    *length = (int)strlen(text);
    return 0;
}
"""


def record(folder: Path, mpi: dict[str, str] | None, schema: int = 1) -> Path:
    path = folder / "_build.json"
    path.write_text(json.dumps({"schema": schema, "mpi": mpi}))
    return path


def recorded_open_mpi(folder: Path) -> Path:
    library = folder / "libmpi.so.40"
    library.touch()
    return record(folder, {"abi": "openmpi", "library": str(library), "version": OPEN_MPI})


def find_mpi(path: str) -> tuple[dict[str, object], str]:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "find_mpi.py"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def test_a_record_is_read_back(tmp_path: Path) -> None:
    mpi = mpi_build.load(recorded_open_mpi(tmp_path)).mpi
    assert mpi is not None
    assert (mpi.abi, mpi.library, mpi.version) == ("openmpi", str(tmp_path / "libmpi.so.40"), OPEN_MPI)


def test_no_record_and_no_mpi_take_any_mpi(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", record(tmp_path, None)):
        assert mpi_build.load(path).mpi is None
        assert mpi_build.mpi4py_environment(path) == {}
        mpi_build.check_mpi(OPEN_MPI, path)


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"schema": 1, "mpi": {"abi": "openmpi"}}', '{"schema": 2, "mpi": null}']
)
def test_a_damaged_record_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "_build.json"
    path.write_text(text)
    with pytest.raises(EnvironmentMismatch, match=re.escape(str(path))):
        mpi_build.load(path)


def test_mpi4py_is_told_the_recorded_library(tmp_path: Path) -> None:
    environment = mpi_build.mpi4py_environment(recorded_open_mpi(tmp_path))
    assert environment == {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so.40")}


def open_mpi_of_an_environment(tmp_path: Path, version: str) -> tuple[Path, str]:
    """The record of an Open MPI from the package index, and its library."""
    library = tmp_path / "lib" / "libmpi.so.40"
    library.parent.mkdir()
    library.touch()
    (tmp_path / "pyvenv.cfg").touch()
    path = tmp_path / "_build.json"
    mpi = {"abi": "openmpi", "library": str(library), "version": f"Open MPI v{version}, package: x"}
    path.write_text(json.dumps({"schema": 1, "mpi": mpi}))
    return path, str(library)


def test_open_mpi_4_in_an_environment_gets_its_prefix(tmp_path: Path) -> None:
    path, library = open_mpi_of_an_environment(tmp_path, "4.1.8")
    expected = {"MPI4PY_LIBMPI": library, "OPAL_PREFIX": str(tmp_path)}
    assert mpi_build.mpi4py_environment(path) == expected
    (tmp_path / "pyvenv.cfg").unlink()
    assert mpi_build.mpi4py_environment(path) == {"MPI4PY_LIBMPI": library}


def test_the_pmix_of_an_environment_is_told_not_to_ask_for_munge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, library = open_mpi_of_an_environment(tmp_path, "5.0.11")
    monkeypatch.setenv("PMIX_SECURITY_MODE", "munge,native")
    expected = {"MPI4PY_LIBMPI": library, "PMIX_MCA_psec": "native"}
    assert mpi_build.mpi4py_environment(path) == expected
    monkeypatch.setenv("PMIX_SECURITY_MODE", "native")
    assert mpi_build.mpi4py_environment(path) == {"MPI4PY_LIBMPI": library}


def test_a_recorded_library_that_is_gone_is_an_error(tmp_path: Path) -> None:
    path = recorded_open_mpi(tmp_path)
    (tmp_path / "libmpi.so.40").unlink()
    with pytest.raises(
        MPIMismatch, match=r"Open MPI 5\.0\.11, whose library .*libmpi\.so\.40 is not there.*make setup"
    ):
        mpi_build.mpi4py_environment(path)


@pytest.mark.parametrize("seen", [OPEN_MPI, "Open MPI v5.0.11", "Open MPI v5.0.11, package: Debian OpenMPI"])
def test_the_same_mpi_passes_whoever_packaged_it(tmp_path: Path, seen: str) -> None:
    mpi_build.check_mpi(seen, recorded_open_mpi(tmp_path))


@pytest.mark.parametrize(
    ("seen", "named"),
    [
        ("Open MPI v5.0.1, package: x", "Open MPI 5.0.1"),
        ("Open MPI v5.0.11rc1, package: x", "Open MPI 5.0.11rc1"),
        ("MPICH Version:      5.0.2\nMPICH Release date: x", "MPICH 5.0.2"),
        ("An MPI nobody knows\nwith more lines", "An MPI nobody knows"),
    ],
)
def test_another_mpi_is_an_error_that_names_both(tmp_path: Path, seen: str, named: str) -> None:
    with pytest.raises(MPIMismatch) as caught:
        mpi_build.check_mpi(seen, recorded_open_mpi(tmp_path))
    message = str(caught.value)
    assert f"is {named}, but the package was built beside Open MPI 5.0.11" in message
    assert "make setup" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (OPEN_MPI, ("Open MPI", "5.0.11")),
        ("Intel(R) MPI Library 2021.13 for Linux* OS", ("Intel MPI", "2021.13")),
        ("MPI VERSION    : CRAY MPICH version 8.1.29.5 (ANL base 3.4a2)", ("Cray MPICH", "8.1.29.5")),
        ("MVAPICH2 Version      :\t2.3.7", ("MVAPICH", "2.3.7")),
        ("MPICH Version:      4.2.1", ("MPICH", "4.2.1")),
    ],
)
def test_family_and_version_of_known_mpis(line: str, expected: tuple[str, str]) -> None:
    assert mpi_build.parse_version(line) == expected


def test_without_mpicc_null_is_recorded_and_reported(tmp_path: Path) -> None:
    found, said = find_mpi(str(tmp_path))
    assert found == {"schema": 1, "mpi": None}
    assert "no mpicc on PATH" in said


@pytest.fixture
def mpich_like(tmp_path: Path) -> Path:
    """A folder with an mpicc that answers like MPICH's, and a real shared library beside it."""
    (tmp_path / "lib.c").write_text(FAKE_LIBRARY)
    library = tmp_path / "libmpi_vendor.so.12"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "lib.c"], check=True)
    mpicc = tmp_path / "mpicc"
    mpicc.write_text(f'#!/bin/sh\n[ "$1" = -show ] && echo "gcc -L{tmp_path} -lmpifort -lmpi_vendor"\n')
    mpicc.chmod(0o755)
    return tmp_path


def test_the_library_behind_mpicc_is_loaded_and_asked(mpich_like: Path) -> None:
    found, _ = find_mpi(f"{mpich_like}:/usr/bin:/bin")
    library = str(mpich_like / "libmpi_vendor.so.12")
    assert found["mpi"] == {"abi": "mpich", "library": library, "version": "MPICH Version:      9.8.7"}


def test_horovods_wheel_is_cached_per_mpi(mpich_like: Path) -> None:
    def key(path: str) -> str:
        command = [sys.executable, ROOT / "cmake" / "horovod" / "key.py"]
        environment = {**os.environ, "PATH": path}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    system = f"{mpich_like}:/usr/bin:/bin"
    assert key(system) == key(system)
    assert key(system) != key("/nowhere")


def test_each_patch_of_horovod_says_why() -> None:
    patches = sorted((ROOT / "cmake" / "horovod" / "patches").glob("*.patch"))
    assert patches
    for patch in patches:
        assert patch.read_text().startswith("Why: "), patch.name


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "libmpi.so.40").write_text("not a library")
    mpicc = tmp_path / "mpicc"
    mpicc.write_text(f"#!/bin/sh\necho {tmp_path}\n")
    mpicc.chmod(0o755)
    found, said = find_mpi(f"{tmp_path}:/usr/bin:/bin")
    assert found["mpi"] is None
    assert str(tmp_path / "libmpi.so.40") in said

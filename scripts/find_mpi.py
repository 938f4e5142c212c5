"""Find the MPI that the mpicc on PATH compiles for, and print it as the build's record, one line of JSON:

    {"schema": 1, "mpi": {"abi": "openmpi", "library": "/opt/libmpi.so.40", "version": "Open MPI v5.0.11"}}

`mpi` is null where there is no mpicc, or where its library cannot be loaded; the reason goes to stderr.
Nothing is compiled. setup.py writes the line into the package; the cache key of Horovod's wheel holds it.
"""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# MPI_MAX_LIBRARY_VERSION_STRING is 256 in Open MPI and 8192 in MPICH.
LONGEST_VERSION = 8192


def find() -> dict[str, str] | None:
    """ABI, absolute path and version of the MPI library, or None with the reason on stderr."""
    mpicc = shutil.which("mpicc")
    if mpicc is None:
        print("no mpicc on PATH: no MPI is recorded, only single-process runs are certain", file=sys.stderr)
        return None
    failures = []
    for path in candidates(mpicc):
        try:
            return probe(path)
        except (OSError, AttributeError) as error:
            failures.append(f"  {path}: {error}")
    print(f"the MPI library of {mpicc} cannot be loaded:", *failures, sep="\n", file=sys.stderr)
    return None


def candidates(mpicc: str) -> list[Path]:
    """The places where the library may be, best first."""
    dirs, suffixes = wrapper_output(mpicc, "--showme:libdirs").split(), (".so.40", ".so")
    names = ["mpi"]
    if not dirs:
        words = shlex.split(wrapper_output(mpicc, "-show"))
        dirs, suffixes = [word[2:] for word in words if word.startswith("-L")], (".so.12", ".so")
        # Vendors rename the library: -lmpi_gnu_91. The Fortran and C++ bindings are not it.
        named = [word[2:] for word in words if re.match(r"-lmpi(?!fort|cxx)", word)]
        names = [*named, *names]
    dirs.append(str(Path(mpicc).resolve().parent.parent / "lib"))
    paths = [Path(d) / f"lib{name}{suffix}" for d in dirs for name in names for suffix in suffixes]
    return [path for path in dict.fromkeys(paths) if path.exists()]


def wrapper_output(mpicc: str, option: str) -> str:
    """What the compiler wrapper prints for `option`; empty if it does not know it."""
    done = subprocess.run([mpicc, option], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def probe(path: Path) -> dict[str, str]:
    """Load the library and ask it. MPI allows this question before MPI_Init."""
    library = ctypes.CDLL(str(path))
    text, length = ctypes.create_string_buffer(LONGEST_VERSION), ctypes.c_int()
    code = library.MPI_Get_library_version(text, ctypes.byref(length))
    if code != 0:
        raise OSError(f"MPI_Get_library_version returned {code}")
    return {
        "abi": "openmpi" if hasattr(library, "ompi_mpi_comm_self") else "mpich",
        "library": str(path.absolute()),
        "version": text.value.decode(errors="replace").splitlines()[0].strip(),
    }


if __name__ == "__main__":
    print(json.dumps({"schema": 1, "mpi": find()}))

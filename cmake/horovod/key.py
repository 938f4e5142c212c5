"""Print the name under which a wheel of Horovod is cached: everything that its binary depends on.

Readable parts first; the hash at the end covers all of it, how it is built, and where the MPI library lies.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIND_MPI = HERE.parents[1] / "scripts" / "find_mpi.py"


def key() -> str:
    """A file name such as `torch2.13.0+cpu-cpython-311-x86_64-linux-gnu-1f2e3d4c5b6a`."""
    mpi = subprocess.run(
        [sys.executable, str(FIND_MPI)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    # The wheel finds a library of the environment by a relative path, any other by its own.
    mpi = mpi.replace(sys.prefix, "$prefix")
    readable = f"torch{version('torch')}-{sysconfig.get_config_var('SOABI')}"
    recipe = [path.read_text() for path in (HERE / "build.cmake", *sorted(HERE.glob("patches/*.patch")))]
    inputs = [readable, mpi, sysconfig.get_platform(), *platform.libc_ver(), *recipe]
    return f"{readable}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]}"


if __name__ == "__main__":
    print(key())

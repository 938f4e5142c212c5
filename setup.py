"""Metadata, and the record of the MPI that the build saw (hvd_train/_build.json)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TEST = ["pytest", "pytest-timeout", "jsonschema"]


class BuildPyWithRecord(build_py):
    """Builds the package and writes the record: for an editable install beside the sources."""

    def run(self) -> None:
        super().run()
        found = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "find_mpi.py")],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        print(f"hvd_train: the build saw {found.stdout.strip()}")
        top = ROOT if self.editable_mode else Path(self.build_lib)
        (top / "hvd_train" / "_build.json").write_text(found.stdout)


def version() -> str:
    match = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "hvd_train" / "__init__.py").read_text(), re.MULTILINE
    )
    if match is None:
        raise SystemExit('hvd_train/__init__.py has no line of the form: __version__ = "1.2.3"')
    return match.group(1)


setup(
    name="hvd_train",
    version=version(),
    description="Masterless distributed training of PyTorch models on HDF5 shards, on MPI clusters",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hvd_train", "hvd_train.*"]),
    package_data={"hvd_train": ["py.typed", "**/*.json", "**/*.toml"]},
    install_requires=[
        "numpy",
        "torch>=2.4",
        "h5py",
        "safetensors",
        "tyro",
        "msgspec",
        'tomli; python_version < "3.11"',
        "tomli-w",
        "rich",
        "xxhash",
    ],
    extras_require={
        "mpi": ["mpi4py"],
        "demo": ["scikit-learn"],
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "import-linter", "pre-commit"],
    },
    entry_points={"console_scripts": ["hvd_train = hvd_train.__main__:main"]},
    cmdclass={"build_py": BuildPyWithRecord},
)

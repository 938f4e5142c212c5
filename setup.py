"""Metadata, the C++ extension, and the record of the MPI that the build saw (hvd_train/_build.json)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
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


class BuildExtWithCMake(build_ext):
    """Builds hvd_train.comm._shm by CMake's target `_shm`. Where that cannot be done the package is installed
    without it, and says so: everything but the backend `ring` works."""

    def build_extension(self, ext: Extension) -> None:
        if shutil.which("cmake") is None or shutil.which("c++") is None:
            self._go_without("there is no cmake or no c++ on PATH")
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve() / "cpp"
        configure = ["cmake", "-S", str(ROOT), "-B", str(work), "-D", "HVD_TRAIN_CSRC=ON"]
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
            "Python_EXECUTABLE": sys.executable,
        }
        configure += [f"-D{key}={value}" for key, value in options.items()]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work), "--target", "_shm"], check=True)
        except subprocess.CalledProcessError as error:
            self._go_without(f"`{' '.join(error.cmd)}` failed")

    def _go_without(self, reason: str) -> None:
        print(f"hvd_train: {reason}: the backend `ring` is not built, everything else works")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


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
    package_data={"hvd_train": ["py.typed", "**/*.pyi", "**/*.json", "**/*.toml"]},
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
    ext_modules=[Extension("hvd_train.comm._shm", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtWithCMake, "build_py": BuildPyWithRecord},
)

"""Metadata, the C++ extensions, and the record of the MPI that the build saw (hvd_train/_build.json)."""

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
EXTENSIONS = {
    "hvd_train.liveness._signs": "a rank in a long step cannot show the others that it works",
    "hvd_train.comm._shm": "the backend `ring` is not built",
    "hvd_train.comm._ring": "`ring` averages within one host only",
}
"""What is compiled, and what is missing without it."""
MONITOR = ["plotly>=6", "jinja2", "starlette>=0.37", "uvicorn"]
TENSORBOARD = ["tensorboardX"]
METRICS = ["prometheus-client"]
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
PARQUET = ["pyarrow"]
FILTERS = ["hdf5plugin"]
IMAGES = ["pillow"]
TEST = [
    *("pytest", "pytest-timeout", "jsonschema", "hypothesis"),
    *("httpx2", "playwright", "axe-playwright-python", *MONITOR),
    *(*TENSORBOARD, "tensorboard", *METRICS, "mlflow-skinny", "wandb"),
    *(*EXPORT, *PARQUET, *IMAGES),
]


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
    """Builds each of `EXTENSIONS` by CMake's target of its name, `_ring` only where there is an MPI. What
    cannot be built is left out, with a message that says what is missing then; everything else works."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        without = EXTENSIONS[ext.name]
        mpicxx = shutil.which("mpicxx")
        if shutil.which("cmake") is None or shutil.which("c++") is None:
            reason = "there is no cmake or no c++ on PATH"
        elif name == "_ring" and mpicxx is None:
            reason = "there is no mpicxx on PATH"
        else:
            reason = self._build(name, Path(self.get_ext_fullpath(ext.name)).resolve().parent, mpicxx)
        if reason:
            print(f"hvd_train: {reason}: {without}, everything else works")

    def _build(self, name: str, target: Path, mpicxx: str | None) -> str:
        """Builds one target; returns what went wrong."""
        work = Path(self.build_temp).resolve() / "cpp"
        options = {
            "HVD_TRAIN_CSRC": "ON",
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
            "Python_EXECUTABLE": sys.executable,
        }
        if name == "_ring" and mpicxx is not None:
            options["MPI_CXX_COMPILER"] = mpicxx
        try:
            configure = ["cmake", "-S", str(ROOT), "-B", str(work)]
            subprocess.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], check=True)
            subprocess.run(["cmake", "--build", str(work), "--target", name], check=True)
        except subprocess.CalledProcessError as error:
            return f"`{' '.join(error.cmd)}` failed"
        return ""

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def version() -> str:
    match = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "hvd_train" / "_version.py").read_text(), re.MULTILINE
    )
    if match is None:
        raise SystemExit('hvd_train/_version.py has no line of the form: __version__ = "1.2.3"')
    return match.group(1)


setup(
    name="hvd_train",
    version=version(),
    description="Masterless distributed training of PyTorch models on HDF5 shards, on MPI clusters",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hvd_train", "hvd_train.*"]),
    # project/ has links to files beside the package; what is built has these files themselves.
    package_data={
        "hvd_train": [
            "py.typed",
            "**/*.pyi",
            "**/*.json",
            "**/*.toml",
            "project/*",
            "project/slurm/*",
            "monitor/web/page/*",
        ]
    },
    install_requires=[
        "numpy",
        "torch>=2.4",
        "torchmetrics>=1.4",
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
        "monitor": MONITOR,
        "tensorboard": TENSORBOARD,
        "metrics": METRICS,
        "export": EXPORT,
        "parquet": PARQUET,
        "filters": FILTERS,
        "images": IMAGES,
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "import-linter", "pre-commit", "matplotlib"],
    },
    entry_points={"console_scripts": ["hvd_train = hvd_train.__main__:main"]},
    ext_modules=[Extension(name, sources=[], optional=True) for name in EXTENSIONS],
    cmdclass={"build_ext": BuildExtWithCMake, "build_py": BuildPyWithRecord},
)

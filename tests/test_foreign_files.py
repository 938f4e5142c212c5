"""Files that other packages wrote: each is trained on as docs/data.md says, or refused in a way that helps.

The packages are installed by CI alone; elsewhere the tests of one that is not there are skipped.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.cli import main
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.places import plain
from hvd_train.errors import DataError
from hvd_train.tools.shard import main as shard
from tests.deadlines import seconds
from tests.foreign_writers import INPUTS, KIND, SUFFIXES, WRITERS
from tests.launching import ROOT
from tests.markdown import tables
from tests.mpi.jobs import events
from tests.unit.data.recipes import refusal, written_again

IMPORTED = {"pytables": "tables"}
"""The names of packages that are imported by another one."""
FILES = {
    "PyTables, a table with an index": "pytables_table",
    "PyTables, arrays": "pytables_arrays",
    "PyTables, `CArray` with blosc or blosc2": "pytables_blosc",
    "PyTables, `VLArray` of objects": "pytables_objects",
    'pandas, `to_hdf(NAME, key="df")`': "pandas_fixed",
    'pandas, `to_hdf(NAME, key="df", format="table")`': "pandas_table",
    "pandas, the same with `data_columns=True`": "pandas_columns",
    "h5netcdf, variables": "h5netcdf_variables",
    'hdf5storage, `savemat(format="7.3")`': "hdf5storage_matlab",
    "hdf5storage, `write(matlab_compatible=False)`": "hdf5storage_python",
    "anndata, dense `X`": "anndata_dense",
    "anndata, sparse `X`": "anndata_csr",
    "Keras, `save_weights` or `save`": "keras_weights",
}
"""What docs/data.md says of each, and the name of what writes it."""
(TABLE,) = (table for table in tables(ROOT / "docs" / "data.md") if table[0][0] == "written by")
TRAINED = {row[0]: row[2] for row in TABLE[1:] if row[2].startswith("`--data")}
REFUSED = {row[0]: row[2] for row in TABLE[1:] if row[0] not in TRAINED}
Write = Callable[[str], Path]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A function that has a package write one of its files, once."""
    folder = tmp_path_factory.mktemp("foreign")

    def write(name: str) -> Path:
        package = name.partition("_")[0]
        needed = [IMPORTED.get(package, package), *(["tables"] if package == "pandas" else [])]
        for module in needed:
            if find_spec(module) is None:
                pytest.skip(f"{module} is not installed: `.ci/run` installs it")
        suffix = ".h5ad" if package == "anndata" else SUFFIXES.get(name, ".h5")
        path = folder / f"{name}{suffix}"
        if not path.exists():
            command = [sys.executable, "-m", "tests.foreign_writers", name, str(path)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=seconds(120))
        return path

    return write


def rows_of(path: Path, place: str) -> np.ndarray:
    with ShardFile(path, plain((place,))) as file:
        return file.read(place, 0, file.info.num_samples)


def test_the_table_has_all_files() -> None:
    assert [row[0] for row in TABLE[1:]] == list(FILES)
    others = {"anndata_csc", "keras_model", "pandas_series"}
    assert set(FILES.values()) | others == set(WRITERS)


@pytest.mark.parametrize("file", TRAINED)
def test_what_is_trained_on(
    file: str, tmp_path: Path, written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the options of the table."""
    if "blosc" in file:
        pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed: `.ci/run` installs it")
    monkeypatch.chdir(tmp_path)
    path = written(FILES[file])
    options = shlex.split(re.findall("`(--data.*?)`", TRAINED[file])[0])
    common = ["--data", str(path), "--data.validation", "0.2", "--max-rounds", "2", "--name", "run"]
    assert main([*common, *options]) == 0
    (header,) = events(tmp_path / "runs" / "run", "header")
    assert sum(header["samples_per_rank"]) + header["validation_samples"] == 300
    assert np.isfinite([e["error"] for e in events(tmp_path / "runs" / "run", "evaluation")]).all()


@pytest.mark.parametrize(
    ("name", "place", "values"),
    [
        ("pytables_table", "run/events[x,z]", INPUTS[:, :5]),
        ("pytables_arrays", "labels", KIND),
        ("pandas_fixed", "df/block0_values", INPUTS),
        ("pandas_fixed", "df/block1_values[0]", KIND),
        ("pandas_series", "s/values", INPUTS[:, 0]),
        ("pandas_table", "df/table[values_block_0]", INPUTS),
        ("pandas_columns", "df/table[f,a]", INPUTS[:, [5, 0]]),
        ("h5netcdf_variables", "inputs", INPUTS),
        ("hdf5storage_matlab", "inputs", INPUTS.T),
        ("hdf5storage_python", "g/inputs", INPUTS),
        ("anndata_dense", "X", INPUTS),
        ("anndata_dense", "obs/kind/codes", KIND),
        ("anndata_dense", "obs/n", KIND),
    ],
)
def test_the_values_are_those_that_were_written(
    written: Write, name: str, place: str, values: np.ndarray
) -> None:
    np.testing.assert_array_equal(rows_of(written(name), place), values)


@pytest.mark.parametrize(
    ("name", "group", "said", "places"),
    [
        (
            "pandas_fixed",
            "df",
            "a DataFrame of pandas in the format `fixed`: its columns are in `df/block0_values` (a, b, c, d, "
            "e, f), `df/block1_values` (kind). Name one of these, or a column of it by its number: "
            "`df/block0_values[0]`. Strings are in none of them: write these with format='table', "
            "data_columns=True.",
            ("df/block0_values", "df/block1_values", "df/block0_values[0]"),
        ),
        (
            "pandas_columns",
            "df",
            "a table of pandas: `df/table` has the columns `a`, `b`, `c`, `d`, `e`, `f`, `kind`, `name`. "
            "Name those to read, such as `df/table[a]`. Columns have names of their own if they are written "
            "with data_columns=True.",
            ("df/table[a]",),
        ),
        ("pandas_series", "s", "a Series of pandas. Name `s/values`.", ("s/values",)),
        (
            "anndata_dense",
            "obs/kind",
            "a categorical column of anndata. Name its class numbers, `obs/kind/codes`; -1 is a missing one, "
            "for data.ignore_index. The names of the classes are in `obs/kind/categories`.",
            ("obs/kind/codes",),
        ),
        (
            "anndata_dense",
            "obs/seen",
            "a column of anndata with missing values, which `obs/seen/mask` marks. Name `obs/seen/values`.",
            ("obs/seen/values", "obs/seen/mask"),
        ),
        (
            "anndata_dense",
            "obs",
            "a table of anndata. Name one of its columns: `obs/kind`, `obs/n`, `obs/seen`.",
            ("obs/n",),
        ),
    ],
)
def test_what_to_name_in_place_of_a_group(
    written: Write, name: str, group: str, said: str, places: tuple[str, ...]
) -> None:
    path = written(name)
    assert refusal(path, (group,)) == f"{path}: `{group}` is {said}"
    for place in places:
        assert len(rows_of(path, place)) == 300


@pytest.mark.parametrize("name", ["anndata_csr", "anndata_csc"])
def test_a_sparse_matrix_is_written_dense(written: Write, name: str) -> None:
    path = written(name)
    message = refusal(path, ("X",))
    kind = name.removeprefix("anndata_")
    assert message.startswith(
        f"{path}: `X` is a sparse matrix of anndata ({kind}_matrix [300, 6]). Expected an array with a row "
        "for each sample: write it dense, with h5py"
    )
    assert REFUSED["anndata, sparse `X`"].strip("`") in message
    dense = written_again(path, message, "obs")
    np.testing.assert_array_equal(rows_of(dense, "X"), np.maximum(INPUTS, 0))
    np.testing.assert_array_equal(rows_of(dense, "obs/kind/codes"), KIND)


@pytest.mark.parametrize("name", ["keras_weights", "keras_model"])
def test_weights_of_a_model_are_no_samples(written: Write, name: str) -> None:
    path = written(name)
    message = refusal(path)
    assert message == (
        f"{path}: `inputs` is no dataset of samples: the file has the weights of a Keras model, not data. "
        "Set data.path to a file of samples."
    )
    assert REFUSED["Keras, `save_weights` or `save`"].strip("`") in message


def test_objects_are_not_loaded(written: Write) -> None:
    message = refusal(written("pytables_objects"), ("inputs",))
    assert REFUSED["PyTables, `VLArray` of objects"].strip("`") in message
    assert message.endswith(
        "They are Python objects, which PyTables or pandas pickled: to load them could run any program, so "
        "it is not done. Write them again as numbers; of a DataFrame, with format='table', data_columns=True."
    )


def test_indexes_of_tables_are_not_listed(written: Write) -> None:
    path = written("pandas_columns")
    assert refusal(path).startswith(
        f"{path}: no dataset `inputs`; the file has `df/table` [300] compound values (`index`, `a`, `b`, "
    )
    assert "_i_" not in refusal(path)


def test_the_commands_of_shard(written: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written("pytables_table"))
    places = ["--inputs", "run/events[x,z]", "--targets", "run/events[kind]"]
    assert shard(["check", path, *places]) == 0
    assert shard(["info", path, *places]) == 0
    assert "float64 [5]" in capsys.readouterr().out


def test_the_files_of_the_tests_of_pytables() -> None:
    """Of many versions and of both byte orders: what they have is read as h5py reads it, or refused."""
    found = find_spec("tables")
    if found is None or found.origin is None:
        pytest.skip("tables is not installed: `.ci/run` installs it")
    folder = Path(found.origin).parent / "tests"
    paths = sorted([*folder.glob("*.h5"), *folder.glob("*.mat")])
    num_read, refusals = 0, list[tuple[Path, str]]()
    for path in paths:
        for name in datasets_of(path):
            try:
                rows = rows_of(path, name)
            except DataError as error:
                refusals.append((path, str(error)))
                continue
            with h5py.File(path, locking=False) as file:
                np.testing.assert_array_equal(rows, file[name][...])
            num_read += 1
    assert [said for path, said in refusals if not said.startswith(str(path)) or "damaged" in said] == []
    assert (num_read > 50, len(refusals) > 20) == (True, True)


def datasets_of(path: Path) -> list[str]:
    """By their names, links left out."""
    names: list[str] = []

    def take(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            names.append(name)

    with h5py.File(path, locking=False) as file:
        file.visititems(take)
    return names

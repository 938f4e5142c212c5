"""Files as other packages write them: `python -m tests.foreign_writers NAME FILE` writes one.

In a process of its own: these packages bring libraries of HDF5 that are not h5py's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np

INPUTS = np.random.default_rng(0).normal(size=(300, 6)).astype("f4")
KIND = (INPUTS[:, 0] > 0).astype("i8")
NAMES = np.where(KIND, "yes", "no")


def pytables_table(path: str) -> None:
    import tables

    rows = np.zeros(300, [("x", "f4", (4,)), ("z", "f8"), ("kind", "i1"), ("name", "S5")])
    rows["x"], rows["z"], rows["kind"], rows["name"] = INPUTS[:, :4], INPUTS[:, 4], KIND, NAMES
    with tables.open_file(path, "w") as file:
        filters = tables.Filters(complevel=5, complib="zlib")
        table = file.create_table("/run", "events", obj=rows, filters=filters, createparents=True)
        table.cols.kind.create_index()


def pytables_arrays(path: str) -> None:
    import tables

    with tables.open_file(path, "w") as file:
        file.create_earray("/", "inputs", obj=INPUTS)
        file.create_array("/", "labels", KIND)


def pytables_blosc(path: str) -> None:
    import tables

    with tables.open_file(path, "w") as file:
        for complib in ("blosc", "blosc2"):
            filters = tables.Filters(complevel=5, complib=complib)
            file.create_carray("/", complib, obj=INPUTS, filters=filters)
        file.create_array("/", "labels", KIND)


def pytables_objects(path: str) -> None:
    import tables

    with tables.open_file(path, "w") as file:
        array = file.create_vlarray("/", "inputs", tables.ObjectAtom())
        for row in INPUTS[:3]:
            array.append(list(row))


def _frame() -> object:
    import pandas

    frame = pandas.DataFrame(INPUTS, columns=list("abcdef"))
    return frame.assign(kind=KIND, name=NAMES)


def pandas_fixed(path: str) -> None:
    _frame().to_hdf(path, key="df")


def pandas_series(path: str) -> None:
    _frame()["a"].to_hdf(path, key="s")


def pandas_table(path: str) -> None:
    _frame().to_hdf(path, key="df", format="table")


def pandas_columns(path: str) -> None:
    _frame().to_hdf(path, key="df", format="table", data_columns=True)


def h5netcdf_variables(path: str) -> None:
    import h5netcdf

    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"time": 300, "channel": 6}
        file.create_variable("inputs", ("time", "channel"), "f4")[:] = INPUTS
        file.create_variable("kind", ("time",), "i8")[:] = KIND


def hdf5storage_matlab(path: str) -> None:
    import hdf5storage

    arrays = {"inputs": INPUTS, "targets": INPUTS[:, :1]}
    hdf5storage.savemat(path, arrays, format="7.3", appendmat=False)


def hdf5storage_python(path: str) -> None:
    import hdf5storage

    hdf5storage.write({"inputs": INPUTS, "kind": KIND}, path="/g", filename=path, matlab_compatible=False)


def _anndata(matrix: object) -> object:
    import anndata
    import pandas

    index = [f"cell {i}" for i in range(300)]
    obs = pandas.DataFrame({"kind": pandas.Categorical(NAMES), "n": KIND}, index=index)
    obs["seen"] = pandas.array([None, *KIND[1:]], dtype="Int64")
    return anndata.AnnData(matrix, obs=obs)


def anndata_dense(path: str) -> None:
    _anndata(INPUTS).write_h5ad(path)


def anndata_csr(path: str) -> None:
    from scipy.sparse import csr_matrix

    _anndata(csr_matrix(np.maximum(INPUTS, 0))).write_h5ad(path)


def anndata_csc(path: str) -> None:
    from scipy.sparse import csc_matrix

    _anndata(csc_matrix(np.maximum(INPUTS, 0))).write_h5ad(path)


def _keras_model() -> object:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), keras.layers.Dense(2)])


def keras_weights(path: str) -> None:
    _keras_model().save_weights(path)


def keras_model(path: str) -> None:
    _keras_model().save(path)


WRITERS: dict[str, Callable[[str], None]] = {
    name: writer for name, writer in globals().items() if callable(writer) and name[0] != "_" and "_" in name
}
"""By name: the package, `_`, and what it writes."""
SUFFIXES = {"keras_weights": ".weights.h5", "hdf5storage_matlab": ".mat", "h5netcdf_variables": ".nc"}
"""Of those that have one of their own; anndata's is .h5ad, of all others .h5."""

if __name__ == "__main__":
    WRITERS[sys.argv[1]](sys.argv[2])

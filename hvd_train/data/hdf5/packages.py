"""What pandas, anndata and Keras write as a group in place of a dataset, and what to name instead."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from hvd_train.data.hdf5.recipes import by_h5py
from hvd_train.data.hdf5.types import columns, is_text
from hvd_train.io.text import listed, shown

_MOST_BLOCKS = 100


def known_as(node: h5py.HLObject | None, file: h5py.File, name: str) -> str:
    """What a package has at `name`, which is no dataset, and what to do about it: the rest of a sentence that
    begins with the name. Empty for what is of no known package."""
    if _has_weights(file):
        return (
            "is no dataset of samples: the file has the weights of a Keras model, not data. Set data.path to "
            "a file of samples."
        )
    if not isinstance(node, h5py.Group):
        return ""
    encoding, pandas = _text(node, "encoding-type"), _text(node, "pandas_type")
    if encoding in ("csr_matrix", "csc_matrix"):
        return _sparse(node, name, encoding)
    if encoding == "categorical":
        return (
            f"is a categorical column of anndata. Name its class numbers, `{name}/codes`; -1 is a missing "
            f"one, for data.ignore_index. The names of the classes are in `{name}/categories`."
        )
    if encoding.startswith("nullable-"):
        return f"is a column of anndata with missing values, which `{name}/mask` marks. Name `{name}/values`."
    if encoding == "dataframe":
        order = [f"`{name}/{shown(str(column))}`" for column in node.attrs.get("column-order", ())]
        return f"is a table of anndata. Name one of its columns: {listed(order) or 'it has none'}."
    if pandas == "frame":
        return _fixed(node, name)
    if pandas in ("frame_table", "appendable_frame", "series_table"):
        return _table(node, name)
    if pandas == "series":
        return f"is a Series of pandas. Name `{name}/values`."
    return ""


def _sparse(node: h5py.Group, name: str, encoding: str) -> str:
    key = repr(name)
    length, index = (
        ("len(dense)", "number, old") if encoding == "csr_matrix" else ("dense.shape[1]", "old, number")
    )
    index = index.replace("old", "x['indices'][...]")
    dense = (
        f"x = old[{key}]; dense = np.zeros(x.attrs['shape'], x['data'].dtype); "
        f"number = np.repeat(np.arange({length}), np.diff(x['indptr'][...])); "
        f"dense[{index}] = x['data'][...]; new[{key}] = dense"
    )
    return (
        f"is a sparse matrix of anndata ({encoding} {list(map(int, node.attrs['shape']))}). Expected an "
        f"array with a row for each sample: write it dense, {by_h5py(dense)}"
    )


def _fixed(node: h5py.Group, name: str) -> str:
    blocks = []
    for number in range(min(int(node.attrs.get("nblocks", 0)), _MOST_BLOCKS)):
        values, items = (_child(node, f"block{number}_{part}") for part in ("values", "items"))
        if isinstance(values, h5py.Dataset) and isinstance(items, h5py.Dataset) and values.ndim == 2:
            names = [shown(_word(item)) for item in items[: values.shape[1]]]
            blocks.append(f"`{name}/block{number}_values` ({listed(names, 8)})")
    seen = f"its columns are in {listed(blocks)}" if blocks else "it has no columns of numbers"
    return (
        f"is a DataFrame of pandas in the format `fixed`: {seen}. Name one of these, or a column of it by "
        f"its number: `{name}/block0_values[0]`. Strings are in none of them: write these with "
        "format='table', data_columns=True."
    )


def _table(node: h5py.Group, name: str) -> str:
    table = _child(node, "table")
    kinds = columns(table.id.get_type()) if isinstance(table, h5py.Dataset) else []
    names = [shown(column) for column, _ in kinds if column != "index"]
    numbers = [shown(column) for column, kind in kinds if column != "index" and not is_text(_element(kind))]
    return (
        f"is a table of pandas: `{name}/table` has the columns {listed([f'`{n}`' for n in names])}. Name "
        f"those to read, such as `{name}/table[{(numbers or names or ['NAME'])[0]}]`. Columns have names of "
        "their own if they are written with data_columns=True."
    )


def _element(kind: Any) -> Any:
    return kind.get_super() if isinstance(kind, h5py.h5t.TypeArrayID) else kind


def _has_weights(file: h5py.File) -> bool:
    """Whether it is what Keras writes for `save_weights` or `save`."""
    if "keras_version" in file.attrs or "layer_names" in file.attrs:
        return True
    layers = _child(file, "layers")
    if not isinstance(layers, h5py.Group):
        return False
    first = next(iter(layers), None)
    layer = None if first is None else _child(layers, first)
    return isinstance(layer, h5py.Group) and isinstance(_child(layer, "vars"), h5py.Group)


def _child(group: h5py.Group, name: str) -> h5py.HLObject | None:
    """What is in the group under this name, unless a link leads away from it."""
    return group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None


def _text(node: h5py.Group, attribute: str) -> str:
    """A text attribute; empty if there is none."""
    value = node.attrs.get(attribute, "")
    return _word(value) if isinstance(value, (str, bytes, np.bytes_)) else ""


def _word(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)

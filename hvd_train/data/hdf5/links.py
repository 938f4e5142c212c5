"""Finding a dataset in an HDF5 file.

A shard is data, not a program: links that leave the file, virtual datasets and external storage are
refused, so that reading a shard opens that one file and no other. If links are to be followed, this is done
here, one by one, and not by HDF5: see `following`.
"""

from __future__ import annotations

from typing import Any

import h5py

from hvd_train.data import format as fmt
from hvd_train.data.facts import decode
from hvd_train.data.hdf5.attributes import Attributes
from hvd_train.data.hdf5.contents import contents
from hvd_train.data.hdf5.following import FOLLOW, LinkedFiles
from hvd_train.data.hdf5.packages import known_as
from hvd_train.data.hdf5.raw_files import with_raw_files
from hvd_train.data.hdf5.recipes import by_h5py
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import listed, shown

_MAX_LINKS = 16
_MOST_SOURCES = 3
_SET_NAMES = "Set data.inputs and data.targets to the names of the datasets of inputs and targets."


def open_dataset(file: h5py.File, name: str, path: str, files: LinkedFiles) -> h5py.Dataset:
    """The dataset `name`, which has samples along its first axis, and its values in the file, or in `files`
    where links are followed. What a virtual one leads to is not known here.

    Raises `UnsupportedShard`, and `DataError` for a dataset that hvd_train wrote into the file.
    """
    dataset = find(file, name, path, files)
    if not isinstance(dataset, h5py.Dataset):
        if _was_written(file, name):
            raise DataError(
                f"{path}: no dataset `{name}`, which hvd_train wrote; {contents(file)}. The file is damaged: "
                "copy or write it again."
            )
        if known := known_as(dataset, file if dataset is None else dataset.file, name):
            raise UnsupportedShard(f"{path}: `{name}` {known}")
        kind = {h5py.Group: ", but a group", h5py.Datatype: ", but a named type"}.get(type(dataset), "")
        raise UnsupportedShard(f"{path}: no dataset `{name}`{kind}; {contents(file)}. {_SET_NAMES}")
    if dataset.is_virtual or dataset.external:
        if not files.follow:
            raise UnsupportedShard(f"{path}: dataset `{name}` {_elsewhere(dataset, name)}")
        if dataset.is_virtual:  # which has a shape, but HDF5 may open its sources to find it
            return dataset
        dataset = with_raw_files(dataset, files)
    if _is_dimension(dataset):
        raise UnsupportedShard(
            f"{path}: dataset `{name}` is a netCDF dimension without values. Expected a variable; "
            f"{contents(file)}. {_SET_NAMES}"
        )
    if _is_empty_of_matlab(dataset):
        raise UnsupportedShard(
            f"{path}: dataset `{name}` is an empty array of MATLAB: its values are the lengths of the axes. "
            "Expected at least 1 sample: leave the file out."
        )
    if not dataset.shape:
        kind = "a single value" if dataset.shape == () else "without values (a null dataspace)"
        raise UnsupportedShard(
            f"{path}: dataset `{name}` is {kind}. Expected samples along its first axis; {contents(file)}. "
            f"{_SET_NAMES}"
        )
    return dataset


def _is_empty_of_matlab(dataset: h5py.Dataset) -> bool:
    """Whether it stands for an empty array: MATLAB writes the lengths of its axes in its place."""
    mark = Attributes(dataset, "", "").texts(["MATLAB_empty"])
    return mark not in ({}, {"MATLAB_empty": "0"})


def _is_dimension(dataset: h5py.Dataset) -> bool:
    """Whether it is in the file only so that variables have a dimension of this name: it reads as zeros."""
    marks = "CLASS" in dataset.attrs and h5py.h5ds.is_scale(dataset.id)
    name = h5py.h5ds.get_scale_name(dataset.id) if marks else b""
    return bool(name.startswith(b"This is a netCDF dimension but not a netCDF variable"))


def _was_written(file: h5py.File, name: str) -> bool:
    """Whether hvd_train recorded a dataset of this name when it wrote the file."""
    facts = [file.attrs[key] for key in (fmt.ATTR_FACTS, fmt.ATTR_FACTS_DIGEST) if key in file.attrs]
    return len(facts) == 2 and name in decode(*map(bytes, facts)).datasets


def find(
    file: h5py.File, name: str, path: str = "", files: LinkedFiles | None = None
) -> h5py.HLObject | None:
    """The object at `name`, None if there is none. Links are followed by hand: opening an external one would
    open its file. Raises `UnsupportedShard` for links that do not lead to an object in the file, or in one of
    `files` if these may be followed, and `DataError` where such a file cannot be opened."""
    path = path or file.filename
    root = file
    parts = [part for part in name.split("/") if part]
    group: Any = file
    done: list[str] = []
    links: list[str] = []
    while parts:
        part = parts.pop(0)
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) and _is_utf8(part) else None
        if isinstance(link, h5py.ExternalLink) and not (files and files.follow):
            raise UnsupportedShard(f"{path}: `{name}` is {_external(link, name)}")
        if isinstance(link, (h5py.SoftLink, h5py.ExternalLink)):
            links.append(link.path)
            if len(links) > _MAX_LINKS:
                kind = "links" if root is not file else "soft links"
                raise UnsupportedShard(
                    f"{path}: `{name}` leads through more than {_MAX_LINKS} {kind}, as a cycle of "
                    f"{kind} does; {contents(file)}. {_SET_NAMES}"
                )
            if isinstance(link, h5py.ExternalLink) and files:
                root, done = files.open(files.path_of(link.filename, root.filename, f"`{name}`")), []
            absolute = link.path.startswith("/")
            parts = [p for p in ([] if absolute else done) + link.path.split("/") + parts if p and p != "."]
            group, done = root, []
        elif isinstance(link, h5py.HardLink):
            group = _opened(group, part)
            done.append(part)
        elif links:
            raise UnsupportedShard(f"{path}: `{name}` {_broken(links[-1], root, root is file)}")
        else:
            return None
    return group


def _opened(group: h5py.Group, name: str) -> h5py.HLObject:
    """What a hard link leads to. Of a dataset h5py itself would ask the file whether it can be written."""
    found = h5py.h5o.open(group.id, name.encode())
    return h5py.Dataset(found, readonly=True) if isinstance(found, h5py.h5d.DatasetID) else group[name]


def _broken(target: str, file: h5py.File, own: bool) -> str:
    """That the last of some links leads to nothing in `file`, and what to do."""
    if own:
        seen = f"leads by a soft link to `{shown(target)}`, which is not in the file"
        return f"{seen}; {contents(file)}. {_SET_NAMES}"
    return (
        f"leads by links to {shown(file.filename)}:{shown(target)}, which is not in that file; "
        f"{contents(file)}. Correct the link, or put the dataset there."
    )


def _external(link: h5py.ExternalLink, name: str) -> str:
    """What an external link is, and what to do."""
    return (
        f"an external link to {shown(link.filename)}:{shown(link.path)}. Expected the dataset in this file: "
        f"{FOLLOW}, name the other file as the shard, or copy the dataset, "
        f"{by_h5py(f'new.copy(old[{name!r}], {name!r})')}"
    )


def _is_utf8(name: str) -> bool:
    """Whether h5py takes the name; arguments of a command that are not UTF-8 have surrogates."""
    return name.encode(errors="ignore").decode() == name


def _elsewhere(dataset: h5py.Dataset, name: str) -> str:
    """That a dataset has its values elsewhere, and what to do."""
    creation = dataset.id.get_create_plist()
    if dataset.is_virtual:
        kind, count, source = "is virtual", creation.get_virtual_count(), creation.get_virtual_filename
    else:
        kind, count = "has external storage", creation.get_external_count()

        def source(index: int) -> str:
            return str(creation.get_external(index)[0].decode(errors="backslashreplace"))

    files = ["other datasets of this file" if f == "." else shown(f) for f in map(source, range(count))]
    return (
        f"{kind}: its values are in {listed(list(dict.fromkeys(files)), _MOST_SOURCES)}. Expected them in "
        f"the dataset: {FOLLOW}, or, with all of that in place, write it again, by `h5repack -l CONTI OLD.h5 "
        "NEW.h5` or "
        f"{by_h5py(f'new[{name!r}] = old[{name!r}][...]')}"
    )

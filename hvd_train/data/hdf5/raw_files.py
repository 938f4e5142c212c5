"""External storage: the values of a dataset in files of their own, without any structure."""

from __future__ import annotations

import os

import h5py

from hvd_train.data.files import require_regular
from hvd_train.data.hdf5.following import LinkedFiles
from hvd_train.errors import DataError, UnsupportedShard

_PREFIX = "HDF5_EXTFILE_PREFIX"


def with_raw_files(dataset: h5py.Dataset, files: LinkedFiles) -> h5py.Dataset:
    """The same dataset, opened so that names of its raw files are relative to the folder of its HDF5 file,
    not to the working directory. Closes `dataset`.

    Raises `UnsupportedShard` for a file that is not to be read, and `DataError` for one that is missing or
    has not all values: HDF5 reads zeros in their place.
    """
    path, name = dataset.file.filename, dataset.name
    what = f"dataset `{name.strip('/')}`"
    if os.environ.get(_PREFIX):
        raise UnsupportedShard(f"{path}: {what} has external storage, and {_PREFIX} is set. Unset it.")
    left = dataset.size * dataset.id.get_type().get_size()
    for raw, offset, size in dataset.external:
        target = files.path_of(raw, path, what)
        require_regular(target, "the values of a dataset")
        used, there = min(left, size), os.path.getsize(target)
        if there < offset + used:
            raise DataError(
                f"{target}: {there} bytes, but {what} of {path} has {used} from byte {offset} on in it. The "
                "file is incomplete: copy it again."
            )
        left -= used
    file = dataset.file
    dataset.id.close()
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_efile_prefix(b"${ORIGIN}")
    return h5py.Dataset(h5py.h5d.open(file.id, name.encode(), access))

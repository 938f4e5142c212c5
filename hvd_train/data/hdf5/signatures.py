"""Formats that share suffixes with HDF5, told by their first bytes, and how to make HDF5 files of them."""

from __future__ import annotations

from pathlib import Path

_NETCDF_3 = ("netCDF-3", "Write it as netCDF-4: `nccopy -k netCDF-4 OLD.nc NEW.nc`.")
_OTHERS = {
    b"CDF\x01": _NETCDF_3,
    b"CDF\x02": _NETCDF_3,
    b"CDF\x05": _NETCDF_3,
    b"\x0e\x03\x13\x01": ("HDF4", "Convert it: `h4toh5convert OLD.hdf NEW.h5`."),
    b"\xcd\xf3\x00\x01": ("a CDF of NASA", "Write its arrays as HDF5."),
    b"MATLAB 5.0 MAT-file": (
        "a MAT-file before version 7.3",
        "Save it in MATLAB with '-v7.3', which is HDF5.",
    ),
}


def other_format(path: str | Path) -> str:
    """What the file is, and what to do, if it is in one of these formats; else empty. Raises `OSError`."""
    with open(path, "rb") as file:
        first = file.read(max(map(len, _OTHERS)))
    for signature, (name, remedy) in _OTHERS.items():
        if first.startswith(signature):
            return f"{name}, expected HDF5. {remedy}"
    return ""

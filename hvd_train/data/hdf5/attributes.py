"""Attributes of a dataset that say something of its values: reading them, and refusing damaged ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import h5py
import numpy as np

from hvd_train.data.format import Array
from hvd_train.errors import DataError
from hvd_train.io.text import shown


@final
@dataclass(frozen=True)
class Attributes:
    """The attributes of `dataset`, `name` in the file `path`. Each is read only when it is asked for: others,
    such as netCDF's lists of references, may be of any type."""

    dataset: h5py.Dataset
    path: str
    name: str

    def __contains__(self, attribute: str) -> bool:
        return attribute in self.dataset.attrs

    def numbers(self, attribute: str, least: int = 1, most: int = 1) -> Array:
        """Its finite or infinite numbers or NaN, [least ... most], in native byte order; empty if there is no
        such attribute. Raises `DataError`."""
        if attribute not in self:
            return np.empty(0)
        value = np.asarray(self._read(attribute))
        if value.dtype.kind not in "iuf" or not least <= value.size <= most:
            count = (
                f"{least} to {most} numbers"
                if least < most
                else "1 number"
                if most == 1
                else f"{most} numbers"
            )
            raise self.error(attribute, value, count)
        return value.reshape(-1).astype(value.dtype.newbyteorder("="))

    def texts(self, attributes: Iterable[str]) -> dict[str, str]:
        """Those of these attributes that are there, in words."""
        return {name: shown(str(self._read(name))) for name in attributes if name in self}

    def flag(self, attribute: str) -> bool | None:
        """`true` or `false`; None if there is no such attribute. Raises `DataError`."""
        if attribute not in self:
            return None
        value = np.asarray(self._read(attribute)).reshape(-1)
        text = value[0] if value.size == 1 else ""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        words = {"true": True, "false": False}
        if not isinstance(text, str) or text.lower() not in words:
            raise self.error(attribute, value, "`true` or `false`")
        return words[text.lower()]

    def error(self, attribute: str, seen: Any, expected: str) -> DataError:
        """That an attribute is damaged, to be raised."""
        return DataError(
            f"{self.path}: dataset `{self.name}` has the attribute {attribute} = {shown(str(seen))}; "
            f"expected {expected}. Correct it, or remove it if the values are stored as they are meant, "
            f"{self.removal([attribute])}."
        )

    def removal(self, attributes: Iterable[str]) -> str:
        """How to remove them, as the end of a sentence."""
        statements = "; ".join(f"del file[{self.name!r}].attrs[{each!r}]" for each in attributes)
        return f"with h5py, from `file = h5py.File(NAME, 'r+')`: `{statements}`"

    def _read(self, attribute: str) -> Any:
        try:
            return self.dataset.attrs[attribute]
        except (OSError, RuntimeError, ValueError, TypeError) as error:  # of a type that h5py does not read
            return f"unreadable ({error})"

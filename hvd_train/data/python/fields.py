"""The fields of a row, from what a sample of a Python dataset has by its own names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, final

import numpy as np

from hvd_train.data.classes import Encoder
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.places import Place, Places
from hvd_train.data.python.samples import quoted
from hvd_train.errors import DataError

Forms = Mapping[str, FieldSpec]

_NAMING = ("inputs", "targets", "fields")
"""The options that name fields."""


@final
class Fields:
    """Names of a sample's fields, and how their values become those of a row.

    Args:
        dataset: its name, for messages.
        forms: of the fields of a sample, by their own names.
        places: of the fields of a row.
        texts: the fields of a row that may be text.
        options: how the names of options begin, for messages.

    Raises `DataError` for a field that a sample lacks, a place that is more than a name, and text without
    classes.
    """

    def __init__(
        self,
        dataset: str,
        forms: Forms,
        places: Places,
        texts: Collection[str] = (),
        options: Literal["data.", "--"] = "data.",
    ) -> None:
        self._dataset = dataset
        self._options = options
        self._forms = forms
        self._keys = {name: self._key(name, place) for name, place in places.places.items()}
        self._encoders = {
            name: self._encoder(self._keys[name], place)
            for name, place in places.places.items()
            if place.coding is not None
        }
        self.specs = {name: self._spec(name) for name in places.places if name not in texts}
        """Of the fields of a row that are not text."""

    def values_of(self, fields: Mapping[str, Array], rows: int) -> dict[str, Array]:
        """The arrays into which to read the samples of these fields of rows, by the samples' names: the given
        ones where values stay as they are."""
        values: dict[str, Array] = {}
        for name, out in fields.items():
            if name not in self._encoders:
                values.setdefault(self._keys[name], out)
        for key in self.keys_of(fields):
            form = self._forms[key]
            values.setdefault(key, np.empty((rows, *form.shape), form.dtype))
        return values

    def keys_of(self, names: Collection[str]) -> list[str]:
        """What the samples call these fields of a row, each once."""
        return list(dict.fromkeys(self._keys[name] for name in names))

    def convert(self, values: Mapping[str, Array], name: str, first_row: int) -> Array:
        """The values of one field of rows. Raises `DataError` for a value that is no class."""
        read = values[self._keys[name]]
        return self._encoders[name].encode(read, first_row) if name in self._encoders else read

    def _key(self, name: str, place: Place) -> str:
        if place.padding is not None or place.axis:
            option = "data.max_length" if place.padding else "data.samples_axis"
            raise DataError(
                f"{option}: {self._dataset} is a Python dataset, whose samples have one shape. Expected it "
                "with files alone: leave it out, and pad or turn the values in the dataset."
            )
        if place.columns or place.cut or place.bounds or place.has_groups:
            raise DataError(
                f"`{name}` = '{place}': {self._dataset} is a Python dataset. Expected the name of a field of "
                f"its samples, {quoted(self._forms)}: name one, and cut it in the dataset."
            )
        if place.dataset not in self._forms:
            raise DataError(
                f"{self._dataset}: a sample has the fields {quoted(self._forms)}; expected "
                f"`{place.dataset}`. Name them in {', '.join(self._options + o for o in _NAMING)}, or return "
                "such a field."
            )
        return place.dataset

    def _encoder(self, key: str, place: Place) -> Encoder:
        assert place.coding is not None  # the caller has looked
        form = self._forms[key]
        return Encoder(place.coding, np.dtype(form.dtype), form.shape, f"{self._dataset}: `{key}`")

    def _spec(self, name: str) -> FieldSpec:
        key, encoder = self._keys[name], self._encoders.get(name)
        form, place = self._forms[key], "" if key == name else key
        if encoder is not None:
            return FieldSpec(shape=encoder.shape, dtype="int64", place=place, coding=encoder.coding)
        if form.dtype == "object":
            raise DataError(
                f"{self._dataset}: `{key}` of a sample is text; expected numbers. List the texts that are "
                f"classes in {self._options}classes if it is the targets, else leave it out."
            )
        return FieldSpec(shape=form.shape, dtype=form.dtype, place=place)

"""The samples of a dataset with `__getitem__` and `__len__`."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from hvd_train.data.damage import Range
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.python.base import MadeSamples
from hvd_train.data.python.samples import Forms, digest_of_values, in_words
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.user_module import place_of
from hvd_train.liveness import mark

_ATTRIBUTES = ("targets", "labels")
"""In which datasets have the targets of all samples, as those of torchvision do."""


@final
class Indexed(MadeSamples):
    """Reads each sample when it is asked for, one at a time, whatever thread asks: datasets that read files
    are seldom made for several.

    Args:
        dataset: with `__getitem__` and `__len__`.
        file: that defines it, for messages.
    """

    def __init__(self, name: str, dataset: Any, file: str) -> None:
        self.name = name
        self._dataset = dataset
        self._file = file
        self._lock = threading.Lock()
        self._count = _length(name, dataset)
        self._forms = Forms(name, self._sample(0))
        self._targets = ""
        self._known: Array | None = None

    def settle(self, targets: str) -> None:
        """See `MadeSamples`. The targets are known where the dataset has an attribute with them."""
        self._targets, self._known = targets, None
        form = self.forms.get(targets)
        if form is None or form.shape:
            return
        for attribute in _ATTRIBUTES:
            values = _values(getattr(self._dataset, attribute, None), self._count)
            if values is not None and (values.dtype == object) == (form.dtype == "object"):
                self._known, self._attribute = values, attribute
                return

    @property
    def known_length(self) -> int:
        return self._count

    @property
    def num_samples(self) -> int:
        return self._count

    @property
    def forms(self) -> Mapping[str, FieldSpec]:
        return self._forms.by_key

    @property
    def class_names(self) -> tuple[str, ...]:
        """By the attribute `classes`, as torchvision has it."""
        names = getattr(self._dataset, "classes", None)
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            return ()
        return tuple(names)

    def at_hand(self, keys: Collection[str]) -> bool:
        return self._known is not None and list(keys) == [self._targets]

    def read_into(self, start: int, stop: int, out: Mapping[str, Array], part: Sequence[Range]) -> None:
        if self._known is not None and self.at_hand(out):
            out[self._targets][...] = self._known[start:stop]
            return
        for index in range(start, stop):
            arrays = self._forms.take(self._sample(index), index, out)
            if self._known is not None and self._targets in arrays:
                self._compare(index, arrays[self._targets][()], self._known[index])
            for key, array in arrays.items():
                out[key][index - start] = array[()]  # text as an object
            mark()

    def blocks(self, keys: Sequence[str], rows: int, start: int = 0) -> Iterator[dict[str, Array]]:
        for first in range(start, self._count, rows):
            stop = min(first + rows, self._count)
            out = self._forms.empty(keys, stop - first)
            self.read_into(first, stop, out, ())
            yield out

    def facts(self) -> dict[str, Any]:
        known = {}
        if self._known is not None:
            known = {f"the values of `{self._attribute}` (a digest)": digest_of_values(self._known)}
        return {"samples": self._count, "sample 0": in_words(self.forms), **known}

    def _sample(self, index: int) -> Any:
        try:
            with self._lock:
                return self._dataset[index]
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{self.name}: sample {index} cannot be read: {type(error).__name__}: {error}"
                f"{place_of(error, self._file)}. Expected a sample for each of 0 to {self._count - 1}: "
                "correct the dataset; a training leaves such samples out by data.on_damage = 'skip'."
            ) from error

    def _compare(self, index: int, seen: Any, expected: Any) -> None:
        if seen != expected:
            raise UnsupportedShard(
                f"{self.name}: the target of sample {index} is {_shown(seen)}, but its attribute "
                f"`{self._attribute}` has {_shown(expected)} there. Expected the same, since the classes are "
                "counted by that attribute: correct it, or give it another name."
            )


def _length(name: str, dataset: Any) -> int:
    try:
        count = len(dataset)
    except Exception as error:
        raise DataError(
            f"{name}: its length is not known: {type(error).__name__}: {error}. Expected `__len__` beside "
            "`__getitem__`: define it."
        ) from error
    if not count:
        raise DataError(f"{name}: 0 samples. Expected at least 1.")
    return count


def _values(attribute: Any, count: int) -> Array | None:
    """A whole number, a boolean or a text for each of so many samples; None for anything else."""
    if attribute is None or callable(attribute):
        return None
    try:
        values = np.asarray(attribute)
    except Exception:  # it is something else than targets
        return None
    if values.shape != (count,):
        return None
    if values.dtype.kind == "U":
        return np.array([text.encode() for text in values.tolist()], object)
    return values if values.dtype.kind in "biu" else None


def _shown(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

"""The samples of a Python object by their numbers: one interface, with and without an index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hvd_train.data.damage import Range
from hvd_train.data.format import Array, FieldSpec


class MadeSamples(ABC):
    """The samples of a Python object. Every method but `settle` may be called from several threads; raises
    `DataError`, with the dataset and the number of the sample, for one that cannot be used."""

    name: str
    """As the user named it: `module:make_dataset`."""

    @property
    @abstractmethod
    def known_length(self) -> int | None:
        """How many there are; None where that is known only after all were read."""

    @abstractmethod
    def settle(self, targets: str) -> None:
        """What is known of the samples before they are read: their number and fields, and the values of
        `targets`, a field, where it can be. Once for a name."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """How many there are; after `settle`."""

    @property
    @abstractmethod
    def forms(self) -> Mapping[str, FieldSpec]:
        """Shape and dtype of each field of a sample. Text has the dtype `object`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, in the order of their numbers; empty if that is not known."""
        return ()

    @abstractmethod
    def at_hand(self, keys: Collection[str]) -> bool:
        """Whether these fields are in memory, so that no sample has to be made for them."""

    @abstractmethod
    def read_into(self, start: int, stop: int, out: Mapping[str, Array], part: Sequence[Range]) -> None:
        """Reads the samples `start` up to `stop`, a field into each array [samples, ...] of its dtype.

        Args:
            part: the samples that are read together with these, sooner or later.
        """

    @abstractmethod
    def blocks(self, keys: Sequence[str], rows: int, start: int = 0) -> Iterator[dict[str, Array]]:
        """These fields of the samples from number `start` on, in order, so many at a time."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What must be the same in every process, as plain values by what they are; after `settle`."""

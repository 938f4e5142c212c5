"""The samples of an iterable: it has no index, so what a rank reads is held in memory."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import numpy as np
import numpy.typing as npt
import xxhash

from hvd_train.data.blocks import row_bytes
from hvd_train.data.damage import Range
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.python.base import MadeSamples
from hvd_train.data.python.memory import Limit
from hvd_train.data.python.samples import Forms, digest_of_values, in_words
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.user_module import place_of
from hvd_train.liveness import mark


@dataclass(frozen=True)
class _Held:
    """Some samples in memory."""

    numbers: npt.NDArray[np.int64]
    """Theirs, ascending."""
    arrays: Mapping[str, Array]
    num_bytes: int


@final
class Iterated(MadeSamples):
    """Iterates once to count the samples, and once more for each part of them that is read, which it then
    holds in memory. All passes must give the same samples in the same order: their number and targets are
    compared.

    Args:
        make: makes the iterable anew, for each pass.
        limit: of the memory that is held.
        file: that defines it, for messages.
    """

    def __init__(self, name: str, make: Callable[[], Iterable[Any]], limit: Limit, file: str) -> None:
        self.name = name
        self._make = make
        self._limit = limit
        self._file = file
        self._lock = threading.RLock()
        self._targets: str | None = None
        self._forms: Forms | None = None
        self._hashes = array("Q")
        """Of the targets of each sample."""
        self._held: list[_Held] = []
        self._known: Array | None = None
        self._begun: Iterator[Any] | None = None

    def settle(self, targets: str) -> None:
        """See `MadeSamples`. Iterates over all samples; raises `DataError` where there are more than all
        ranks can hold."""
        with self._lock:
            if self._targets != targets:
                self._count_and_note(targets)

    def _count_and_note(self, targets: str) -> None:
        forms = self._known_forms()
        form = forms.by_key.get(targets)
        kept = form is not None and form.shape == () and form.dtype != "object"
        most = self._limit.of_all_ranks // max(1, self._sample_bytes)
        self._held, self._hashes, values = [], array("Q"), bytearray()
        for index, sample in enumerate(self._samples()):
            arrays = forms.take(sample, index, forms.by_key)
            self._hashes.append(_hash(arrays.get(targets)))
            if kept:
                values += arrays[targets].tobytes()
            if index >= most:
                raise DataError(
                    f"{self.name}: no end after {index:,} samples of {self._sample_bytes:,} bytes; the ranks "
                    f"can hold {self._limit.of_all_ranks:,} bytes. {self._remedy()}"
                )
        self._targets = targets
        self._known = np.frombuffer(bytes(values), forms.by_key[targets].dtype) if kept else None

    @property
    def known_length(self) -> None:
        return None

    @property
    def num_samples(self) -> int:
        return len(self._hashes)

    @property
    def forms(self) -> Mapping[str, FieldSpec]:
        return self._known_forms().by_key

    def at_hand(self, keys: Collection[str]) -> bool:
        return True

    def read_into(self, start: int, stop: int, out: Mapping[str, Array], part: Sequence[Range]) -> None:
        targets = self._targets or ""
        if self._known is not None and list(out) == [targets]:
            out[targets][...] = self._known[start:stop]
            return
        with self._lock:
            if self._copy(start, stop, out) < stop - start:
                self.hold([*part, (start, stop)])
                self._copy(start, stop, out)

    def _copy(self, start: int, stop: int, out: Mapping[str, Array]) -> int:
        """Copies what is held of these samples, and returns how many those are."""
        found = 0
        for held in self._held:
            first, last = np.searchsorted(held.numbers, (start, stop)).tolist()
            at = held.numbers[first:last] - start
            for key, values in out.items():
                values[at] = held.arrays[key][first:last]
            found += last - first
        return found

    def hold(self, part: Sequence[Range]) -> None:
        """Holds these samples in memory, by one more pass if some of them are not held. What was held before
        is dropped where there is no room for both. Raises `DataError`."""
        with self._lock:
            wanted = np.unique(np.concatenate([np.arange(*rows, dtype=np.int64) for rows in part]))
            missing = self._missing(wanted)
            if not len(missing):
                return
            held = sum(one.num_bytes for one in self._held)
            if held + len(missing) * self._sample_bytes > self._limit.of_this_rank:
                self._held, missing = [], wanted
            num_bytes = len(missing) * self._sample_bytes
            if num_bytes > self._limit.of_this_rank:
                raise DataError(
                    f"{self.name}: this rank reads {len(missing):,} samples, {num_bytes:,} bytes; it can "
                    f"hold {self._limit.of_this_rank:,}, and an iterable has no index to read them by. "
                    f"{self._remedy()}"
                )
            self._held.append(_Held(missing, self._collect(missing), num_bytes))

    def blocks(self, keys: Sequence[str], rows: int, start: int = 0) -> Iterator[dict[str, Array]]:
        forms, at = self._known_forms(), 0
        out = forms.empty(keys, rows)
        for index, sample in enumerate(self._samples()):
            if index < start:
                continue
            for key, value in forms.take(sample, index, keys).items():
                out[key][at] = value[()]
            at += 1
            if at == rows:
                yield out
                out, at = forms.empty(keys, rows), 0
        if at:
            yield {key: values[:at] for key, values in out.items()}

    def facts(self) -> dict[str, Any]:
        targets = digest_of_values(np.frombuffer(self._hashes, np.uint64))
        return {
            "samples": self.num_samples,
            "sample 0": in_words(self.forms),
            "the targets (a digest)": targets,
        }

    def _known_forms(self) -> Forms:
        """By the first sample, which is read for them if there was no pass yet."""
        if self._forms is None:
            samples = self._pass()
            for first in samples:
                self._forms = Forms(self.name, first)
                self._begun = chain((first,), samples)
                return self._forms
            raise DataError(f"{self.name}: 0 samples. Expected at least 1.")
        return self._forms

    @property
    def _sample_bytes(self) -> int:
        return sum(map(row_bytes, self.forms.values()))

    def _missing(self, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        for held in self._held:
            wanted = np.setdiff1d(wanted, held.numbers, assume_unique=True)
        return wanted

    def _collect(self, numbers: npt.NDArray[np.int64]) -> dict[str, Array]:
        """These samples, by a pass over all."""
        forms = self._known_forms()
        arrays = forms.empty(forms.by_key, len(numbers))
        at, count = 0, 0
        for index, sample in enumerate(self._samples()):
            count += 1
            if at < len(numbers) and numbers[at] == index:
                taken = forms.take(sample, index, arrays)
                if _hash(taken.get(self._targets or "")) != self._hashes[index]:
                    raise UnsupportedShard(self._differs(f"another target in sample {index}"))
                for key, value in taken.items():
                    arrays[key][at] = value[()]
                at += 1
            if count > self.num_samples:
                break
        if count != self.num_samples:
            more = f"more than {self.num_samples}" if count > self.num_samples else str(count)
            raise UnsupportedShard(self._differs(f"{more} samples in place of {self.num_samples}"))
        return arrays

    def _differs(self, seen: str) -> str:
        return (
            f"{self.name}: a further pass gave {seen}. Expected the same samples in the same order in every "
            f"pass: seed what is random, or write them once: {self._command}."
        )

    def _samples(self) -> Iterator[Any]:
        """All of them; the pass of which the first was read goes on."""
        begun, self._begun = self._begun, None
        return begun or self._pass()

    def _pass(self) -> Iterator[Any]:
        index = 0
        try:
            for sample in self._make():
                yield sample
                index += 1
                mark()
        except DataError:
            raise
        except (Exception, SystemExit) as error:
            raise UnsupportedShard(
                f"{self.name}: no sample {index}: {type(error).__name__}: {error}"
                f"{place_of(error, self._file)}. Expected an iterable that gives every sample: correct it."
            ) from error

    @property
    def _command(self) -> str:
        return f"`hvd_train shard write --from {self.name} --out FOLDER`"

    def _remedy(self) -> str:
        return f"Write shards of it, {self._command}, or give it `__getitem__` and `__len__`."


def _hash(targets: Array | None) -> int:
    """Of the targets of a sample; 0 without any."""
    if targets is None:
        return 0
    return xxhash.xxh3_64_intdigest(targets.item() if targets.dtype == object else targets.tobytes())

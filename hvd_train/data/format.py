"""What a shard and a manifest say, and what one sample looks like. Plain values; nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy.typing as npt

from hvd_train.data.layout import Layout

Array = npt.NDArray[Any]

Compression = Literal["none", "gzip", "lz4", "zstd", "blosc"]
"""Of the chunks of a shard; all but gzip are filters of hdf5plugin."""


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How the values of targets in a file become class numbers, int64."""

    names: tuple[str, ...] = ()
    """The values that are classes, in the order of their numbers; empty: the values are the numbers."""

    ignored: int | None = None
    """A value that marks targets without a class, besides -100; None for no other."""

    one_hot: bool = False
    """Whether there is a number for each class along the last axis of a sample: 1 for its class, else 0."""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How rows of any length become rows of one."""

    length: int
    """Values of a row; shorter rows have zeros after their own."""

    truncate: bool = False
    """Whether longer rows are cut; else they are refused."""

    marks: bool = False
    """Whether the field has no values, but marks them: true for a value, false for padding."""


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One field of a sample: its `shape` without the sample axis, and its numpy `dtype` by name."""

    shape: tuple[int, ...]
    dtype: str

    place: str = ""
    """Where it is in a file; empty for the dataset of its own name."""

    axis: int = 0
    """The axis of the dataset along which the samples are."""

    coding: Coding | None = None
    """How its values became class numbers; None for values as they are."""

    follow_links: bool = field(default=False, compare=False)
    """Whether it may be in another file, which a link leads to, or a virtual dataset."""

    padding: Padding | None = None
    """Of rows of any length; None for rows that all have this shape."""

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}{', padded' if self.padding else ''}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, without those that say nothing."""
        return {key: value for key, value in asdict(self).items() if value not in ("", 0, None)}


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """One sample of the whole data set, the same on every rank; what a task builds its model for."""

    inputs: str
    """Name of the field of inputs; a key of `fields` and of every batch."""

    targets: str
    """Name of the field of targets; likewise."""

    fields: Mapping[str, FieldSpec]
    """Every field of a sample."""

    weights: str = ""
    """Name of the field with a weight for each sample; empty if there is none."""

    mask: str = ""
    """Name of the field that marks what counts of the targets; empty if there is none."""

    num_classes: int | None = None
    """Classes of integer or boolean targets (tokens of the vocabulary for next-token, those of the inputs
    included): largest value of all shards plus one; None for targets of another type. Reading it raises
    `DataError` where the values cannot be class numbers."""

    scale: float = 1.0
    """What integer inputs are multiplied by before the model."""

    standardize: Literal["", "component", "channel", "all"] = ""
    """Of which values the built-in models know mean and deviation, see `DataConfig.standardize`; empty where
    they take the inputs as they are."""

    names: tuple[str, ...] = ()
    """Of the classes, in the order of their numbers, as a manifest lists them; empty if it lists none, or if
    the values in the files are names (`Coding`)."""

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes back."""
        fields = {name: field.to_json() for name, field in self.fields.items()}
        plain = {key: value for key, value in vars(self).items() if key[0] != "_" and value not in ("", ())}
        return {**plain, "fields": fields}

    def contents(self) -> dict[str, Any]:
        """As `to_json`, without where the values may be."""
        fields = {name: replace(field, follow_links=False) for name, field in self.fields.items()}
        return {**self.to_json(), "fields": {name: field.to_json() for name, field in fields.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SampleSpec:
        """The inverse of `to_json`."""
        fields = {name: _field(field) for name, field in values["fields"].items()}
        return cls(**{**values, "fields": fields, "names": tuple(values.get("names", ()))})

    def mask_of(self, name: str) -> str:
        """The name of the field that marks the values of field `name`, whose rows are padded; empty if they
        are not."""
        padding = self.fields[name].padding
        return mask_name(name) if padding and not padding.marks else ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, in the order of their numbers: by the values in the files, or by the
        manifest; empty if nothing but the numbers is known, or they are no classes."""
        coding = self.fields[self.targets].coding
        names = coding.names if coding else self.names
        return () if names == tuple(map(str, range(len(names)))) else names


def _field(values: Mapping[str, Any]) -> FieldSpec:
    coding = values.get("coding")
    if coding is not None:
        coding = Coding(**{**coding, "names": tuple(coding["names"])})
    padding = values.get("padding")
    padding = None if padding is None else Padding(**padding)
    return FieldSpec(**{**values, "shape": tuple(values["shape"]), "coding": coding, "padding": padding})


def mask_name(name: str) -> str:
    """Of the field that marks the values of field `name`."""
    return f"{name}_mask"


SCHEMA_VERSION = 2
"""Version of the layout of the shards and manifests that this program writes. Later versions that only add
facts keep the number.

1: all facts about a shard are optional, and no checksum covers the scale or the classes.
2: a shard has its `Facts` and their digest, a manifest has the digests of its shards and its own; one that
   lacks them is damaged.
"""

READABLE_SCHEMAS = (1, 2)

MANIFEST_NAME = "manifest.json"

# Where a shard written by this program keeps its metadata. A file with none of these is read as
# well. What grows with the data is in datasets, since an attribute is limited to 64 KiB.
ATTR_SCHEMA = "hvd_train_schema"
ATTR_FACTS = "hvd_train_facts"
ATTR_FACTS_DIGEST = "hvd_train_facts_digest"
GROUP = "_hvd_train"
CLASS_COUNTS = f"{GROUP}/class_counts"
CHECKSUMS = f"{GROUP}/checksums"

# Schema 1 had these in place of the facts.
ATTR_NUM_SAMPLES = "hvd_train_num_samples"
ATTR_SCALE = "hvd_train_scale"
ATTR_CHECKSUM_ROWS = "checksum_rows"


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What was written as one dataset."""

    shape: tuple[int, ...]
    """Rows first."""

    dtype: str
    """By its numpy name, without byte order."""

    checksums: str
    """Digest of the checksums of its blocks."""

    scale: float | None = None
    """What its values are multiplied by."""

    class_counts: str | None = None
    """Digest of the class counts."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that was written as a shard, but for the values themselves, which the checksums cover."""

    schema: int
    checksum_rows: int
    """Rows of one checksummed block of every dataset."""

    datasets: Mapping[str, DatasetFacts]


def is_class_dtype(dtype: str) -> bool:
    """Whether targets of this dtype are taken as class numbers (or tokens)."""
    return dtype.startswith(("int", "uint", "bool"))


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """The header of one shard: everything that is known without reading its samples."""

    path: str
    """The file, as it was named by the configuration or the manifest."""

    num_samples: int
    """Rows; 0 for a shard without samples."""

    fields: Mapping[str, FieldSpec]
    """The datasets that were asked for."""

    layouts: Mapping[str, Layout]
    """How they are stored."""

    contiguous: bool
    """Whether every dataset is contiguous in the file, and has rows of one length."""

    class_counts: tuple[int, ...] | None
    """Samples of each class in the last dataset asked for, as recorded in the shard."""

    scale: float | None
    """What the first dataset asked for is multiplied by, as recorded in the shard."""

    checksum_rows: int | None
    """Rows of one checksummed block; None where the shard carries no checksums."""

    facts_digest: str | None
    """Digest of the shard's `Facts`, by which its manifest knows it; None for schema 1 and foreign files."""

    unpacked: tuple[str, ...] = ()
    """What attributes do to the values of datasets, a clause each, such as CF's `scale_factor`."""

    growing: bool = False
    """Whether a program is adding rows, in SWMR mode."""

    indexed: tuple[str, str] | None = field(default=None, compare=False)
    """Of a header from an index, which the file has not confirmed: the names of inputs and targets."""

    def renamed(self, path: str) -> ShardInfo:
        """The header of a shard that is the same but for its path. Faster than `replace`, for many shards."""
        other = object.__new__(ShardInfo)
        other.__dict__.update(self.__dict__, path=path)
        return other

    def continues(self, first: ShardInfo) -> bool:
        """Whether the rows may be those of `first`, and more of them if that was growing, as far as their
        number, fields, layout and recorded facts say."""
        names = ["fields", "checksum_rows", "facts_digest"]
        if first.growing:
            return self._equals(first, names) and self.num_samples >= first.num_samples
        return self._equals(first, [*names, "num_samples", "layouts"])

    def _equals(self, other: ShardInfo, names: list[str]) -> bool:
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def chunk_rows(self) -> int | None:
        """Rows of one HDF5 chunk of the first dataset asked for; None where it is not chunked."""
        chunk = next(iter(self.layouts.values())).chunk
        return chunk[0] if chunk else None

    @property
    def compressed(self) -> bool:
        """Whether any dataset passes through a filter (compression, shuffle, checksum)."""
        return any(layout.filtered for layout in self.layouts.values())

    @cached_property
    def held_bytes(self) -> int:
        """Memory for decoded rows while the file is open, at most."""
        return sum(layout.held_bytes for layout in self.layouts.values())


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One line of a manifest."""

    file: str
    """Relative to the manifest's folder."""

    num_samples: int

    class_counts: tuple[int, ...] | None = None
    """Samples of each class; None for targets that are not class numbers."""

    facts_digest: str | None = None
    """Digest of the shard's `Facts`; None for a shard of schema 1."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards next to a manifest.json, by part, in the order in which ranks take them."""

    schema: int = SCHEMA_VERSION
    sample: SampleSpec
    train: tuple[ShardEntry, ...] = ()
    validation: tuple[ShardEntry, ...] = ()
    digest: str | None = None
    """Digest of all the rest; None for a manifest of schema 1."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers; empty if none are known."""

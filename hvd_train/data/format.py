"""What a shard and a manifest say, and what one sample looks like. Plain values; nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One dataset of a sample: its `shape` without the sample axis, and its numpy `dtype` by name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """One sample of the whole data set, the same on every rank; what a task builds its model for."""

    inputs: str
    """Name of the dataset of inputs; a key of `fields` and of every batch."""

    targets: str
    """Name of the dataset of targets; likewise."""

    fields: Mapping[str, FieldSpec]
    """Every dataset of a sample."""

    num_classes: int | None = None
    """Classes of integer targets (tokens of the vocabulary for next-token): largest target of all shards
    plus one; None for targets that are not integers."""

    scale: float = 1.0
    """What integer inputs are multiplied by before the model."""

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SampleSpec:
        """The inverse of `to_json`."""
        fields = {
            name: FieldSpec(shape=tuple(f["shape"]), dtype=f["dtype"]) for name, f in values["fields"].items()
        }
        return cls(**{**values, "fields": fields})


SCHEMA_VERSION = 1
"""Version of the layout of shards and manifests. Later versions that only add facts keep the number."""

MANIFEST_NAME = "manifest.json"

# Where a shard written by this program keeps its facts. All of them are optional: a file without them
# is read as well. What grows with the data lies in datasets, since an attribute ends at 64 KiB.
ATTR_SCHEMA = "hvd_train_schema"
ATTR_NUM_SAMPLES = "hvd_train_num_samples"
ATTR_SCALE = "hvd_train_scale"
GROUP = "_hvd_train"
ATTR_CHECKSUM_ROWS = "checksum_rows"
CLASS_COUNTS = f"{GROUP}/class_counts"
CHECKSUMS = f"{GROUP}/checksums"


def is_class_dtype(dtype: str) -> bool:
    """Whether targets of this dtype are taken as class numbers (or tokens)."""
    return dtype.startswith(("int", "uint", "bool"))


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """The header of one shard: everything that is known without reading its samples."""

    path: str
    """The file, as it was named by the configuration or the manifest."""

    num_samples: int
    """Rows; at least 1."""

    fields: Mapping[str, FieldSpec]
    """The datasets that were asked for."""

    chunk_rows: int | None
    """Rows of one HDF5 chunk of the first dataset asked for; None where it is not chunked."""

    contiguous: bool
    """Whether every dataset lies in one piece in the file."""

    compressed: bool
    """Whether any dataset passes through a filter (compression, shuffle, checksum)."""

    class_counts: tuple[int, ...] | None
    """Samples of each class in the last dataset asked for, as recorded in the shard."""

    scale: float | None
    """What the first dataset asked for is multiplied by, as recorded in the shard."""

    checksum_rows: int | None
    """Rows of one checksummed block; None where the shard carries no checksums."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One line of a manifest."""

    file: str
    """Relative to the manifest's folder."""

    num_samples: int

    class_counts: tuple[int, ...] | None = None
    """Samples of each class; None for targets that are not class numbers."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards that lie beside a manifest.json, by part, in the order in which ranks take them."""

    schema: int = SCHEMA_VERSION
    sample: SampleSpec
    train: tuple[ShardEntry, ...] = ()
    validation: tuple[ShardEntry, ...] = ()

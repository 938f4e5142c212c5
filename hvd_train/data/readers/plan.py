"""Who reads what in every epoch, by the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog
from hvd_train.data.deal import Span
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.ahead import ReadsAhead
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.epochs import EpochReader
from hvd_train.data.readers.make import reader_of
from hvd_train.data.screen import Screen


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """How the ranks read the training rows of `catalog`."""

    catalog: Catalog
    data: DataConfig
    seed: int
    rank: int
    world_size: int

    @property
    def is_shared(self) -> bool:
        """Whether the ranks share every batch, and the order of all rows, rather than having rows of their
        own."""
        return self.data.order == "global"

    @property
    def sharing(self) -> int:
        """Ranks that share a batch."""
        return self.world_size if self.is_shared else 1

    @cached_property
    def parts(self) -> Sequence[tuple[Span, ...]]:
        """The rows of every rank, or those that all share, as one part."""
        return self.catalog.parts(1 if self.is_shared else self.world_size, self.data.batch_size)

    @property
    def samples_per_part(self) -> list[int]:
        """Rows of each."""
        return [sum(span.num_rows for span in part) for part in self.parts]

    @property
    def shards_per_rank(self) -> list[int]:
        """How many shards each rank reads in an epoch."""
        shards = [len({span.shard for span in part}) for part in self.parts]
        return shards * self.world_size if self.is_shared else shards

    @property
    def samples_per_rank(self) -> list[int]:
        """Rows that each rank reads in an epoch, up to a batch."""
        if not self.is_shared:
            return self.samples_per_part
        (rows,), ranks = self.samples_per_part, self.world_size
        return [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]

    @property
    def share(self) -> Share:
        """What this rank takes of every batch."""
        if not self.is_shared:
            return ALONE
        return Share(self.rank, self.world_size, min(2, self.data.batch_size))

    def reader(
        self,
        memory_budget_bytes: int,
        screen: Screen | None = None,
        copies: Mapping[str, str] | None = None,
    ) -> EpochReader:
        """Of this rank.

        Args:
            memory_budget_bytes: for the rows that it holds; where the ranks share the order of rows the same
                on all, as `memory` and `stream` have different ones.
            screen: marks the rows that are left out; None: no marks.
            copies: of files, which are read in their place.
        """
        data, share = self.data, self.share

        def make(rows: AnyRows, *, repeats: bool) -> Reader:
            reader = reader_of(rows, data, self.seed, memory_budget_bytes, repeats=repeats, share=share)
            return ReadsAhead(reader, data.batch_size * self.sharing, data.last_batch)

        return EpochReader(
            make,
            self.parts,
            self.catalog.sample.fields,
            0 if self.is_shared else self.rank,
            screen,
            self.catalog.shards,
            copies,
            rotates=data.redeal == "epoch",
        )

"""Who reads what in every epoch, by the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog
from hvd_train.data.deal import Span
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.epochs import EpochReader
from hvd_train.data.readers.make import reader_of


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

    def reader(self, memory_budget_bytes: int) -> EpochReader:
        """Of this rank.

        Args:
            memory_budget_bytes: for the rows that it holds; where the ranks share the order of rows the same
                on all, as `memory` and `stream` have different ones.
        """
        share = ALONE
        if self.is_shared:
            share = Share(self.rank, self.world_size, min(2, self.data.batch_size))
        return EpochReader(
            partial(
                reader_of,
                data=self.data,
                seed=self.seed,
                memory_budget_bytes=memory_budget_bytes,
                share=share,
            ),
            self.parts,
            self.catalog.sample.fields,
            0 if self.is_shared else self.rank,
            rotates=self.data.redeal == "epoch",
        )

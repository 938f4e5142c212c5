"""The whole of `hvd_train predict`: every rank writes finished parts, and one copies them into the file."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from hvd_train.after.predict.job import Job, open_job
from hvd_train.after.predict.options import Options
from hvd_train.after.predict.parts import Parts
from hvd_train.after.predict.tables import open_table
from hvd_train.comm.agree import require_equal, together
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.errors import OutputError
from hvd_train.io.atomic import replacing
from hvd_train.io.output import discard, warn
from hvd_train.io.text import counted
from hvd_train.liveness import mark, phase
from hvd_train.preparation import share_cores
from hvd_train.run.claim import Claim, NoClaim, Ownership
from hvd_train.tasks.base import Task
from hvd_train.tasks.models import describe

PROGRESS_S = 10.0
"""Seconds between two lines of progress."""


def run(options: Options) -> None:
    """Predicts, as the options say. Collective where a launcher started several processes.

    Raises `UserError` for what cannot be predicted, on every rank before the first part is begun.
    """
    with connect(options.backend, shared_folder=Path(options.out).absolute().parent) as comm:
        predict(options, comm)


def predict(options: Options, comm: Communicator, task: Task | None = None) -> None:
    """The same with a communicator. Collective.

    Args:
        task: the task that was trained, where the configuration does not name it.
    """
    phase("set-up")
    require_equal(comm, "options", vars(options), "Give every rank the same options.")
    share_cores(options.threads, comm)
    job = open_job(options, comm, task)
    require_equal(comm, "data", job.facts(), "Every rank must see the same run and shards.")
    parts = replace(job.parts, digest=comm.broadcast(job.parts.digest))
    for line in job.warnings if comm.rank == 0 else ():
        warn(line)
    held = together(comm, lambda: parts.begin() if comm.rank == 0 else NoClaim())
    with held:
        together(comm, parts.require_seen)
        missing = _missing(parts, comm)
        progress = _Progress(parts, comm, missing)
        progress.header(job)
        phase("predictions")
        for part in missing[comm.rank :: comm.size]:
            parts.write(part, job.predictor.predict(*parts.bounds(part)))
            progress.report()
        job.predictor.rows.close()
        phase("writing of the file")
        comm.barrier()  # all parts are there
        together(comm, lambda: _finish(options, job, parts, held))
        progress.end()


def _missing(parts: Parts, comm: Communicator) -> list[int]:
    """The parts that are to be made; the ranks read those that are there. Collective."""
    if comm.broadcast(parts.whole.exists()):
        return []
    there = comm.broadcast(together(comm, parts.there if comm.rank == 0 else list))
    mine = [part for part in there[comm.rank :: comm.size] if _is_whole(parts, part)]
    whole = {part for of_rank in comm.allgather(mine) for part in of_rank}
    return [part for part in range(parts.count) if part not in whole]


def _is_whole(parts: Parts, part: int) -> bool:
    mark()
    return part < parts.count and parts.is_whole(part)


def _finish(options: Options, job: Job, parts: Parts, held: Ownership) -> None:
    """On the rank that holds the claim: copies the parts into the file, and removes them."""
    if not isinstance(held, Claim):
        return
    try:
        if not parts.whole.exists():
            with replacing(parts.whole) as temporary:
                nan_rows, first = _copy(parts, temporary, job.attributes(options.data))
            if nan_rows:
                warn(
                    f"{nan_rows:,} of {counted(parts.num_rows, 'row')} have predictions that are not a "
                    f"number; the first is row {first} of {parts.out}, {job.place_of(first)}."
                )
        parts.publish(held)
    except OSError as error:
        raise OutputError(
            f"{parts.out}: {error.strerror or error}. Expected to write the file there: make room, and start "
            "the same command again, which goes on with the parts that are whole."
        ) from None


def _copy(parts: Parts, path: Path, attributes: dict[str, str | int]) -> tuple[int, int]:
    """Copies all parts into a new file, one in memory at a time; returns how many rows have predictions that
    are not a number, and the first of these."""
    nan_rows, first = 0, -1
    table = open_table(path, parts.out.suffix, parts.fields, parts.num_rows, attributes)
    try:
        for part in range(parts.count):
            rows = parts.read(part)
            table.append(rows.arrays)
            first = rows.first_nan if first < 0 else first
            nan_rows += rows.nan_rows
            mark()
    finally:
        table.close()
    return nan_rows, first


class _Progress:
    """What rank 0 prints; on other ranks nothing."""

    def __init__(self, parts: Parts, comm: Communicator, missing: list[int]) -> None:
        self._parts = parts
        self._ranks = comm.size
        self._prints = comm.rank == 0
        self._found = parts.count - len(missing)
        self._rows = self._rows_of(missing)
        """That are to be predicted."""
        self._began = self._printed = time.monotonic()

    def header(self, job: Job) -> None:
        """What is predicted, and what is there already."""
        if not self._prints:
            return
        parts = self._parts
        self._say(
            f"model     {job.trained.folder}, {job.trained.checkpoint}: {describe(job.trained.model)}\n"
            f"data      {counted(parts.num_rows, 'row')} in {counted(len(job.spans), 'shard')}\n"
            f"parts     {counted(parts.count, 'part')} of {counted(parts.rows, 'row')} on "
            f"{counted(self._ranks, 'rank')}, in {parts.folder}"
        )
        if self._found:
            self._say(f"goes on   {self._found:,} of {counted(parts.count, 'part')} were found there")
        foreign = parts.num_foreign()
        if foreign:
            warn(
                f"{parts.folder} has {counted(foreign, 'part')} of other predictions (another checkpoint or "
                "task, other data or options): not used, and removed at the end."
            )

    def report(self) -> None:
        """A line now and then."""
        now = time.monotonic()
        if self._prints and now - self._printed >= PROGRESS_S:
            self._printed = now
            done = self._rows_of(self._parts.there())
            new = max(0, done - self._parts.num_rows + self._rows)
            rate = new / (now - self._began)
            self._say(f"rows      {done:,} of {self._parts.num_rows:,}, {rate:,.0f} rows/s")

    def end(self) -> None:
        """The last line."""
        if self._prints:
            seconds = time.monotonic() - self._began
            rate = f", {self._rows / seconds:,.0f} rows/s" if self._rows else ""
            rows = counted(self._parts.num_rows, "row")
            self._say(f"written   {rows}, {seconds:,.1f} s{rate}: {self._parts.out}")

    def _rows_of(self, numbers: list[int]) -> int:
        return sum(stop - start for start, stop in map(self._parts.bounds, numbers))

    def _say(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError:  # its reader has left, or its disk is full: the file matters more
            discard(sys.stdout)

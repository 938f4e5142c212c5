"""One job at a time in a run's folder, on any file system that the hosts share, however the job before ended.

    RUN/.claim-3.json      the job that is training; the highest number counts

A claim is a file with the next number, made under its full name by a hard link, which one of several jobs can
do. It names its holder, which renews its modification time. At its end it is marked as released; its name
stays, so that no number is used twice. A job that finds a claim takes over if the holder has ended:
that is known at once on the same host, by /proc, and for an earlier start of the same Slurm job; elsewhere it
counts as ended when the claim has not been renewed for `STALE_S`. Clocks of hosts are never compared, and
nothing is locked.

Imports no torch. Nothing here is collective: rank 0 holds the claim of its job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import msgspec
from typing_extensions import Self

from hvd_train.errors import RunDirectoryError, RunTakenOver
from hvd_train.io.output import warn
from hvd_train.io.regular import open_regular
from hvd_train.run.holder import Holder

BEAT_S = 5.0
"""Seconds between two renewals of a claim."""

STALE_S = 60.0
"""A claim from elsewhere that is not renewed for so long counts as that of a job that has ended. Many times
`BEAT_S`: a thread renews it, which waits while another one holds the GIL."""

POLL_S = 5.0
"""Seconds between two reads of the file by `poll`."""

_WAIT_POLL_S = 0.5
"""Seconds between two reads of a claim while a job waits to take it over."""

_NAME = re.compile(r"\.claim-(\d+)\.json")


class Ownership(ABC):
    """A rank's part in its job's claim to the run's folder. Rank 0 has a `Claim`, every other `NoClaim`."""

    @abstractmethod
    def check(self) -> None:
        """Reads the claim. Call it right before something is given its final name in the run's folder.

        Raises `RunTakenOver` if another job has taken the run over.
        """

    @abstractmethod
    def poll(self) -> None:
        """`check`, if the last one was more than `POLL_S` ago."""

    @abstractmethod
    def release(self) -> None:
        """Ends the claim. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@final
class NoClaim(Ownership):
    """For ranks that publish nothing themselves."""

    def check(self) -> None: ...

    def poll(self) -> None: ...

    def release(self) -> None: ...


@final
@dataclass(kw_only=True)
class Claim(Ownership):
    """A claim of this process; made by `take`."""

    folder: Path
    number: int
    took_over: bool
    """Whether the claim before it was not released: what its holder has left may be incomplete."""
    beat_s: float
    holder: Holder
    _polled: float = field(default_factory=time.monotonic, init=False)
    _released: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self._path = _path(self.folder, self.number)
        self._beats = threading.Thread(target=self._renew, name="hvd_train-claim", daemon=True)
        self._beats.start()

    def check(self) -> None:
        self._polled = time.monotonic()
        try:
            # Opening it makes a network file system ask its server; a directory listing may be out of date.
            seen, newest = _read_claim(self._path), _newest(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                return  # not known; where the folder cannot be read, what is written next fails by itself
            seen, newest = None, 0
        if seen is None or seen.holder != self.holder or newest != self.number:
            raise self._taken_over()

    def poll(self) -> None:
        if time.monotonic() - self._polled >= POLL_S:
            self.check()

    def release(self) -> None:
        if self._released.is_set():
            return
        self._released.set()
        self._beats.join(timeout=1)  # it may hang where the file system does
        with contextlib.suppress(OSError, RunTakenOver):
            self.check()
            with _prepared(self.folder, dataclasses.replace(self.holder, released=True)) as temporary:
                os.replace(temporary, self._path)

    def _renew(self) -> None:
        while not self._released.wait(self.beat_s):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _taken_over(self) -> RunTakenOver:
        seen = None
        with contextlib.suppress(OSError):
            seen = _read_claim(_path(self.folder, _newest(self.folder)))
        by = None if seen is None else seen.holder
        return RunTakenOver(
            f"{self.folder} was taken over by {by or 'another job, or it was removed'}. This job gave no "
            "sign of life for too long; it ends and writes nothing more. The other one goes on from what was "
            "saved last."
        )


def take(
    folder: Path,
    environ: Mapping[str, str] = os.environ,
    *,
    stale_s: float | None = None,
    beat_s: float | None = None,
) -> Claim:
    """Claims the run's folder for this process, and says on standard error if it takes it over.

    Args:
        folder: which exists.
        environ: names the Slurm job, if any.
        stale_s, beat_s: instead of `STALE_S` and `BEAT_S`.

    Raises `RunDirectoryError` if a running job holds it, and `OSError` if the folder cannot be written.
    """
    stale_s = STALE_S if stale_s is None else stale_s
    beat_s = BEAT_S if beat_s is None else beat_s
    mine = Holder.this_process(environ)
    while True:
        before = _newest(folder)
        ended = _ended(folder, before, mine, stale_s) if before else ""
        if ended is None or not _create(folder, before + 1, mine):
            continue  # another job was faster
        if _newest(folder) != before + 1:
            # This process was suspended, while other jobs took, released and removed claims.
            _path(folder, before + 1).unlink(missing_ok=True)
            continue
        if ended:
            warn(f"{folder} is taken over from {ended}.")
        _remove_older(folder, before + 1)
        return Claim(folder=folder, number=before + 1, took_over=bool(ended), beat_s=beat_s, holder=mine)


def _ended(folder: Path, number: int, mine: Holder, stale_s: float) -> str | None:
    """Who held this claim, and why it no longer does; empty if it was released, None if it was removed
    meanwhile. Raises `RunDirectoryError` if its holder is running."""
    path = _path(folder, number)
    seen = _read_claim(path)
    if seen is None:
        return None
    holder = seen.holder
    if holder is not None and holder.released:
        return ""
    if holder is not None and holder.is_earlier_start_than(mine):
        return f"{holder}, an earlier start of this job"
    lives = None if holder is None else holder.lives(mine)
    if lives:
        raise _in_use(folder, holder)
    if lives is False:
        return f"{holder}, which has ended"
    who = holder or "an unknown job"
    warn(f"{folder} is claimed by {who}. Waiting {stale_s:g} s for a sign of life from there.")
    deadline = time.monotonic() + stale_s
    while time.monotonic() < deadline:
        time.sleep(min(_WAIT_POLL_S, stale_s))
        now = _read_claim(path)
        if now is None or (now.holder is not None and now.holder.released):
            return None
        if now != seen:
            raise _in_use(folder, now.holder)
    return f"{who}, which gave no sign of life for {stale_s:g} s"


def _in_use(folder: Path, holder: Holder | None) -> RunDirectoryError:
    return RunDirectoryError(
        f"{folder} is in use by {holder or 'another job'}; expected one job at a time. Wait for its end, or "
        "choose another name."
    )


@dataclass(frozen=True)
class Seen:
    """A claim, as a file shows it."""

    holder: Holder | None
    """None for a file that is not, or not yet, a claim."""
    changed_ns: int
    """Of the file: when the claim was made or renewed last, by the clock of the file's host."""


def _read_claim(path: Path) -> Seen | None:
    """The claim in a file; None if there is no file."""
    try:
        with open_regular(path) as file:  # a network file system asks its server when it opens a file
            content, changed_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    try:
        return Seen(msgspec.json.decode(content, type=Holder), changed_ns)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Seen(None, changed_ns)


def _path(folder: Path, number: int) -> Path:
    return folder / f".claim-{number}.json"


def _numbers(folder: Path) -> list[int]:
    return [int(match[1]) for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]


def forget(folder: Path) -> None:
    """Removes all claims. For the holder, before it removes the folder."""
    _remove_older(folder, _newest(folder) + 1)


def last_claim(folder: Path) -> Seen | None:
    """The claim that counts, released or not; None if there is none. Raises OSError."""
    newest = _newest(folder)
    return _read_claim(_path(folder, newest)) if newest else None


def _newest(folder: Path) -> int:
    """The highest number; 0 if there is none yet."""
    return max(_numbers(folder), default=0)


@contextlib.contextmanager
def _prepared(folder: Path, holder: Holder) -> Iterator[Path]:
    """A file with the whole content of a claim, under a name of its own."""
    temporary = folder / f".claim-{holder.token}.tmp"
    try:
        temporary.write_bytes(msgspec.json.encode(holder) + b"\n")
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _create(folder: Path, number: int, mine: Holder) -> bool:
    """Makes a claim with its whole content at once; False if another job has made one of this number."""
    path = _path(folder, number)
    with _prepared(folder, mine) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            seen = _read_claim(path)  # a network file system may repeat a request whose answer was lost
            return seen is not None and seen.holder == mine
        except OSError:
            return _create_without_links(path, msgspec.json.encode(mine) + b"\n")
    return True


def _create_without_links(path: Path, content: bytes) -> bool:
    """The same where there are no hard links: others may see the file before its content."""
    try:
        file = open(path, "xb")  # noqa: SIM115, closed below
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _remove_older(folder: Path, number: int) -> None:
    for older in _numbers(folder):
        if older < number:
            with contextlib.suppress(OSError):
                _path(folder, older).unlink(missing_ok=True)

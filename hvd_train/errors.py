"""The exception tree. What a user can cause is a `UserError` and ends the program with exit code 2.

    HvdTrainError
    |-- UserError                what the user gave cannot be run; exit code 2
    |   |-- ConfigError          a key, a flag or a value
    |   |-- DataError            a shard, a manifest, a dataset
    |   |   `-- UnsupportedShard a shard that need not be damaged
    |   |-- TaskError            the user's task, model or optimizer
    |   |-- EnvironmentMismatch  what is installed, or what started the program
    |   |   |-- MPIMismatch      the MPI at run time is not the one that was built against
    |   |   `-- LauncherMismatch the ranks do not connect as the launcher promised
    |   |-- RunDirectoryError    a run's folder or a checkpoint in it
    |   |-- OutputError          a file that is to be written
    |   `-- RanksDisagree        the ranks were not given the same thing
    |-- CommunicationError       what went wrong between ranks; exit code 1
    |   |-- RankLost             a rank died or its host cannot be reached
    |   |-- BarrierTimeout       some ranks did not arrive in time
    |   |-- SizeMismatch         the ranks called one collective with different arguments
    |   |-- WireOverflow         a value does not fit into the type that carries it between hosts
    |   `-- BitsDiffer           the ranks do not hold the same bits after an average
    |-- CheckpointNotSaved       the run finished, but its model is not on disk; exit code 1
    |-- WorkerLost             a process of data.workers ended during the run; exit code 1
    |-- ExportDiffers            an exported file is not the model; exit code 1
    |-- RunTakenOver             another job has taken over the run's folder; exit code 1
    `-- ViewReplaced             a tensor of the flat state was replaced from outside

Each message states what was seen, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class HvdTrainError(Exception):
    """Base of every error that hvd_train raises on purpose.

    `agreed` is true if every rank raises it, with the same message, from values that all ranks know: one
    rank's report is enough.
    """

    agreed = False

    def __init__(self, *args: object, agreed: bool | None = None) -> None:
        super().__init__(*args)
        if agreed is not None:
            self.agreed = agreed


class UserError(HvdTrainError):
    """What the user gave cannot be run. Found before the first step; exit code 2."""


class ConfigError(UserError):
    """A configuration key, a flag or a value that cannot be used."""


class DataError(UserError):
    """A shard, a manifest or a dataset that cannot be used."""


class UnsupportedShard(DataError):
    """A shard that need not be damaged, but that cannot be read as it is, or with what is installed here."""


class TaskError(UserError):
    """The user's task, model, loss or optimizer cannot be used."""


class EnvironmentMismatch(UserError):
    """The installed software, or the launcher, does not fit the run."""


class MPIMismatch(EnvironmentMismatch):
    """The MPI found at run time is not the one that was recorded when the package was built."""


class LauncherMismatch(EnvironmentMismatch):
    """The world that this process sees is not the one that its launcher promised. Each process
    finds this by itself; they need not be connected."""

    agreed = True


class RunDirectoryError(UserError):
    """A run directory or a checkpoint that cannot be created, found or read."""


class OutputError(UserError):
    """A file that was to be written exists already, or cannot be written."""


class RanksDisagree(UserError):
    """The ranks of one job were given different configurations, data, models or versions."""

    agreed = True


class CheckpointNotSaved(HvdTrainError):
    """The run finished, but the final or the best model is not on disk; exit code 1."""

    agreed = True


class WorkerLost(HvdTrainError):
    """A process that transforms batches for a rank ended during the run; exit code 1."""


class ExportDiffers(HvdTrainError):
    """An exported file, loaded again, is not the model; it was not published. Exit code 1."""


class CommunicationError(HvdTrainError):
    """Something between ranks failed; exit code 1."""


class RankLost(CommunicationError):
    """A rank died, or its host cannot be reached. The values in live buffers are undefined."""


class BarrierTimeout(CommunicationError):
    """Some ranks did not arrive at a barrier in time.

    `missing` holds their ranks, in ascending order; it is empty if the backend does not know them.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class SizeMismatch(CommunicationError):
    """The ranks called one collective with different sizes or types, or with invalid weights."""

    agreed = True


class WireOverflow(CommunicationError):
    """A sum of differences from the anchor does not fit into the type that carries it between hosts, or is
    not finite. The anchor is unchanged."""

    agreed = True


class BitsDiffer(CommunicationError):
    """The ranks do not hold the same bits after an average."""

    agreed = True


class RunTakenOver(HvdTrainError):
    """Another job trains in the run's folder, as this one gave no sign of life for too long."""

    agreed = True


class ViewReplaced(HvdTrainError):
    """A parameter, buffer or optimizer tensor is no longer where the flat state put it."""

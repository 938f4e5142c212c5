"""What the ranks of a host hold at the peak of a training, in bytes. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one rank's training holds; the same on every rank."""

    words: str
    """Of which model."""

    state_bytes: int
    """S: what is averaged. Several copies of it are kept."""

    gradient_bytes: int

    own_bytes: int = 0
    """What the rank keeps beside S: frozen parameters, optimizer state that is not averaged."""

    activation_bytes: int = 0
    """A batch, and what the passes on it make."""

    model_bytes: int = 0
    """Of the model's file in a checkpoint."""

    ema_bytes: int = 0
    """Of the moving average: all slices together."""

    outer_bytes: int = 0
    """Of what an outer optimizer keeps in its two slots: all slices together."""

    stepped_bytes: int = 0
    """Of x_t as the optimizer of averaged gradients steps it: all slices together."""

    sliced_moment_bytes: int = 0
    """Of that optimizer's state: all slices together."""

    staged_bytes: int = 0
    """Of the gradients that are averaged between hosts while the backward pass runs."""

    averaged_moment_bytes: int = 0
    """Of the optimizer's averaged state, which rank 0 saves for all."""

    own_moment_bytes: int = 0
    """Of the optimizer's state that each rank saves."""

    wide_bytes: int = 0
    """Of half types in S as float32, in which they are summed."""

    data_bytes: int = 0
    """All training rows."""

    window_bytes: int = 0
    """What a rank holds of its rows at most if it reads them as a stream."""

    reading: str = "auto"
    """Of `data.reading`."""

    order: str = "rank"
    """Of `data.order`."""

    process_bytes: int = 0
    """Memory of its own that a process has once everything is loaded: Python, torch, MPI."""

    library_bytes: int = 0
    """Files that the processes of a host map together."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The ranks of a host. Rank 0, which holds more than the others, is assumed to be among them."""

    ranks: int
    world_size: int
    num_hosts: int
    backend: str

    @property
    def copies(self) -> int:
        """Copies of S: live values and two slots; where ranks share memory one pair of slots for all."""
        return self.ranks + 2 if self.backend == "ring" else 3 * self.ranks


def state_bytes(need: Need, at: Place) -> int:
    """State, slices and gradients at the peak: at the start, in a step, in an average or in a checkpoint."""
    sliced = need.state_bytes + need.wide_bytes // 2 + need.ema_bytes + need.outer_bytes
    sliced += need.stepped_bytes + need.sliced_moment_bytes
    slices = at.ranks * sliced // at.world_size
    steady = at.copies * need.state_bytes + slices + at.ranks * need.own_bytes
    if at.backend == "ring" and at.num_hosts > 1:
        steady += need.state_bytes // at.num_hosts + at.ranks * need.staged_bytes  # inboxes, staging
    elif at.backend != "ring":
        steady += at.ranks * need.wide_bytes
    gradients = at.ranks * need.gradient_bytes
    start = at.ranks * need.state_bytes  # the tensors as the model was built, beside the buffers
    step = (
        gradients + at.ranks * need.activation_bytes
    )  # or an evaluation, while the gradients are still there
    average = gradients + (at.ranks * need.state_bytes if at.backend == "horovod" else 0)
    # A file is held three times: as copies of the tensors, as the format has it, and as bytes to write. While
    # rank 0 packs the model it still has the bytes of the other file, and while it packs the moving average
    # those of both.
    kept = (need.outer_bytes // 2 + need.sliced_moment_bytes) // at.world_size
    own = 3 * at.ranks * (need.own_moment_bytes + kept)
    moments = need.averaged_moment_bytes
    models = 4 if need.ema_bytes else 3
    save = gradients + own + max(3 * moments, moments + models * need.model_bytes)
    return steady + max(start, step, average, save)


def loaded_bytes(need: Need, at: Place, free_bytes: int) -> int:
    """Programs and data."""
    part = need.data_bytes if need.order == "global" else need.data_bytes // at.world_size
    fits = part <= free_bytes // 2 // at.ranks
    whole = need.reading == "memory" or (need.reading == "auto" and fits)
    data = part if whole else 0 if need.reading == "mmap" else min(part, need.window_bytes)
    return need.library_bytes + at.ranks * (need.process_bytes + data)

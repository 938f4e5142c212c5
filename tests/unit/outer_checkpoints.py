"""What checkpoints hold of owned slices, put together from the files of all ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hvd_train.run.saved_checkpoint import SavedCheckpoint


def kept(folder: Path, part: str = "outer") -> dict[str, Tensor]:
    """Every value that the ranks have kept of their slices, by `name of what/parameter`: flat. Single numbers
    are left out."""
    saved = SavedCheckpoint.open(folder)
    pieces: dict[str, dict[int, Tensor]] = {}
    for rank in range(saved.world_size):
        state = saved.part(rank, part)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                pieces.setdefault(key, {})[state["offsets"][key.partition("/")[2]]] = value
    return {key: torch.cat([parts[offset] for offset in sorted(parts)]) for key, parts in pieces.items()}


def steps(folder: Path) -> set[int]:
    """Outer steps, as the ranks have counted them."""
    saved = SavedCheckpoint.open(folder)
    return {saved.part(rank, "outer")["steps"] for rank in range(saved.world_size)}


def optimizer_steps(folder: Path) -> set[float]:
    """Steps of the optimizer of averaged gradients, as the ranks have counted them for each parameter."""
    saved = SavedCheckpoint.open(folder)
    states = [saved.part(rank, "sliced") for rank in range(saved.world_size)]
    return {float(value) for of in states for key, value in of.items() if key.startswith("step/")}


def check_nesterov(run: Path, *, rounds: int, lr: float, momentum: float, first: int = 1) -> None:
    """That each round's parameters follow from those and the momentum of the round before: the outer gradient
    is u_(t+1) - mu u_t."""
    folder = run / "checkpoints"
    for round_ in range(first, rounds):
        before, after = (load_file(folder / f"round-{n}" / "model.safetensors") for n in (round_, round_ + 1))
        u, v = (kept(folder / f"round-{n}") for n in (round_, round_ + 1))
        assert u.keys() == v.keys() == {f"momentum/{name}" for name in before}
        assert steps(folder / f"round-{round_}") == {round_ - first + 1}
        for name, x in before.items():
            old, new = (k[f"momentum/{name}"].view_as(x) for k in (u, v))
            assert (new != 0).any(), name
            expected = x - lr * ((new - momentum * old) + momentum * new)
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)

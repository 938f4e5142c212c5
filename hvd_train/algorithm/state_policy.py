"""Which state of a model and its optimizer is averaged, and in which rounds.

Parameters are averaged in every round. The optimizer's moments, each by its name, and the floating-point
buffers may have a period of their own, in rounds, as the states of local Adam have in DES-LOC (A. Iacob et
al., "DES-LOC: Desynced Low Communication Adaptive Optimizers for Training Foundation Models", 2025,
arXiv:2505.22549).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvd_train.algorithm.optimizer_state import COUNTERS, initial_state, sparse_parameters
from hvd_train.config.sync import BUFFERS, Policy, require_states
from hvd_train.config_values import require
from hvd_train.errors import ConfigError

_SECOND_MOMENTS = ("exp_avg_sq", "exp_inf")
"""What optimizers call that by which they divide `exp_avg`."""


@dataclass(frozen=True, kw_only=True)
class StatePolicy:
    """What happens to each state in an average."""

    optimizer_state: Policy = "average"
    """Of the moments that `moments` does not name."""

    batch_norm: Literal["average", "keep"] = "average"
    """Of the floating-point buffers."""

    moments: Mapping[str, Policy] = field(default_factory=dict)
    """Of single moments, by their names in the optimizer's state: `exp_avg`."""

    every_rounds: Mapping[str, int] = field(default_factory=dict)
    """Rounds between two averages of a moment, or of `buffers`; 1 where it is not named."""

    def __post_init__(self) -> None:
        require_states(self.moments, self.every_rounds)

    def of_moment(self, key: str) -> Policy:
        """Of the moment with this name."""
        return self.moments.get(key, self.optimizer_state)

    def every(self, name: str) -> int:
        """The period, in rounds, of a moment or of `buffers`."""
        return self.every_rounds.get(name, 1)

    @property
    def tells_moments_apart(self) -> bool:
        """Whether the optimizer's state must exist, so that its moments are known. Otherwise it is all kept,
        or all reset, and is created in the first step."""
        return self.optimizer_state == "average" or bool(self.moments or self.every_rounds.keys() - {BUFFERS})

    def check(self, keys: Collection[str], optimizer: str) -> None:
        """Raises `ConfigError` for a name that is none of the moments `keys` of `optimizer`, and for a
        period of what is not averaged."""
        kept = f"{optimizer} keeps {', '.join(sorted(keys)) or 'no moments with these arguments'}"
        for name, policy in self.moments.items():
            require(name in keys, f"sync.moments.{name}", policy, f"the name of a moment: {kept}")
        for name, rounds in self.every_rounds.items():
            if name == BUFFERS:
                continue
            known = f"{BUFFERS!r}, or the name of a moment: {kept}"
            require(name in keys, f"sync.every_rounds.{name}", rounds, known)
            if self.of_moment(name) != "average":
                raise ConfigError(
                    f"sync.every_rounds.{name} = {rounds}: {name} is not averaged, its policy is "
                    f"{self.of_moment(name)!r}; expected a moment with the policy 'average'. Leave it out, "
                    f"or set sync.moments.{name} = 'average'."
                )

    def remark(self, keys: Collection[str]) -> str:
        """What the user should know of the choice for an optimizer with the moments `keys`; empty if there
        is nothing.

        A step of Adam divides `exp_avg` by a root of the second moment. The second moment of a rank is 0
        where that rank has had no gradient. An average of both, or of the second alone, leaves no mean
        gradient beside a 0; one of `exp_avg` alone does.
        """
        if "exp_avg" not in keys or self.of_moment("exp_avg") != "average":
            return ""
        for second in (key for key in _SECOND_MOMENTS if key in keys):
            is_averaged = self.of_moment(second) == "average"
            if is_averaged and self.every("exp_avg") % self.every(second) == 0:
                continue
            return (
                f"exp_avg is averaged in rounds in which {second} is not. Where a rank has had no gradient "
                f"(of a unit that was never active, a token that it has not seen), its {second} is 0, and "
                f"the exp_avg of others makes steps of any length. Average {second} whenever exp_avg is: "
                f"with the policy 'average', and sync.every_rounds.exp_avg a multiple of that of {second}."
            )
        return ""


class OwnMoments:
    """The moments that are not averaged, where others of the same optimizer are: each rank's own.

    Args:
        policy: of each moment.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, policy: StatePolicy) -> None:
        self._optimizer = optimizer
        self._policy = policy
        self._initial = {
            p: {key: _compact(value) for key, value in state.items()}
            for p, state in initial_state(optimizer, sparse_parameters(model)).items()
        }
        keys = {key for p in self._initial for key in optimizer.state[p]}
        self._keeps = any(policy.of_moment(key) == "keep" for key in keys - COUNTERS)

    @torch.no_grad()
    def after_average(self, healthy: bool) -> None:
        """Gives those with the policy `reset` their initial values. On a rank whose values were not finite,
        and which keeps some, its whole state begins anew, counters and averaged moments included: a second
        moment that begins at zero beside a first one that does not would make steps of any length."""
        anew = self._keeps and not healthy
        for p, initial in self._initial.items():
            held = self._optimizer.state[p]
            for key, value in initial.items():
                reset = key not in COUNTERS and self._policy.of_moment(key) == "reset"
                if not (anew or reset) or key not in held:
                    continue
                if isinstance(held[key], Tensor):
                    held[key].copy_(value)
                else:
                    held[key] = value


def _compact(value: Any) -> Any:
    """Of a tensor one element where all are equal, as in most initial values; it is copied to all."""
    if not isinstance(value, Tensor) or not value.numel():
        return value
    first = value.reshape(-1)[:1].clone()
    return first.reshape(()) if bool((value == first).all()) else value

"""Parameters by patterns: what is frozen, and what is said of a pattern that fits nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvd_train.errors import ConfigError
from hvd_train.tasks.parameters import freeze


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))
    layers[3].weight = layers[2].weight
    return layers


def trained(net: nn.Module) -> list[str]:
    return [name for name, p in net.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ((), ["0.weight", "0.bias", "2.weight", "2.bias", "3.bias"]),
        (("0.*",), ["2.weight", "2.bias", "3.bias"]),
        (("*.weight",), ["0.bias", "2.bias", "3.bias"]),
        (("[02].bias", "3.weight"), ["0.weight", "3.bias"]),  # one of the two names of a shared one
    ],
)
def test_what_fits_a_pattern_is_frozen(patterns: tuple[str, ...], left: list[str]) -> None:
    net = model()
    freeze(net, patterns)
    assert trained(net) == left
    compiled = torch.compile(model())
    freeze(compiled, patterns)  # type: ignore[arg-type]
    assert [name.removeprefix("_orig_mod.") for name in trained(compiled)] == left  # type: ignore[arg-type]


def test_a_pattern_that_fits_nothing_names_what_is_near() -> None:
    with pytest.raises(ConfigError, match=r"model\.freeze = '2\.wieght': no parameter .*near it 2\.weight"):
        freeze(model(), ("2.wieght",))
    with pytest.raises(ConfigError, match=r"There are 6, among them 0\.weight, 0\.bias, 2\.weight, 2\.bias"):
        freeze(model(), ("ZZZZZZ",))


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(ConfigError, match=r"no parameter is left to train; expected at least one of 6"):
        freeze(model(), ("*",))

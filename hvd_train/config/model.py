"""The built-in models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvd_train.config_values import require, require_usable


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The built-in models. Your own task builds its own model and may ignore these keys."""

    name: Literal["mlp", "cnn"] = "mlp"
    """`mlp`: fully connected layers. `cnn`: convolutions, for images and for token sequences."""

    hidden: tuple[int, ...] = (128, 64)
    """Widths of the hidden layers of `mlp`, and of the layers after the convolutions of `cnn`."""

    channels: tuple[int, ...] = (32, 64)
    """Output channels of each convolution of `cnn`."""

    embedding: int = 32
    """Width of a token's embedding (next-token)."""

    context: int = 8
    """Tokens that `mlp` sees before the one it predicts (next-token)."""

    dropout: float = 0.0
    """Probability of dropping a hidden unit while training."""

    def __post_init__(self) -> None:
        require_usable(self, "model.")
        for name in ("hidden", "channels"):
            widths = getattr(self, name)
            require(all(w >= 1 for w in widths), f"model.{name}", widths, "every width to be at least 1")
        require(self.embedding >= 1, "model.embedding", self.embedding, "a width of at least 1")
        require(self.context >= 1, "model.context", self.context, "at least 1 token")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a probability in [0, 1)")

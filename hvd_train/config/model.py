"""The built-in models, and what a model starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hvd_train.config_values import require, require_usable


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The built-in models, and what a model starts from. Your own task builds its own model and may ignore
    these keys, except `init` and what follows it."""

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

    init: str = ""
    """Start from these weights instead of random ones: a safetensors file, a run (its best checkpoint, else
    its latest), or one of its checkpoints. A resumed run goes on from its own checkpoint."""

    init_strict: bool = True
    """Require the same names in `init` as in the model. If false, tensors that are missing there keep their
    initial values, and others there are not used. Shapes must be equal in both cases."""

    init_map: dict[str, str] = field(default_factory=dict)
    """Renames the tensors of `init`: a prefix there -> a prefix in the model, such as `encoder.` ->
    `backbone.encoder.`. The longest prefix that fits counts; an empty one fits every name."""

    freeze: tuple[str, ...] = ()
    """Do not train the parameters whose names fit one of these patterns, such as `backbone.*`."""

    compile: bool = False
    """Compile the model, built in or your own, by torch.compile for training; needs a C++ compiler."""

    def __post_init__(self) -> None:
        require_usable(self, "model.")
        for name in ("hidden", "channels"):
            widths = getattr(self, name)
            require(all(w >= 1 for w in widths), f"model.{name}", widths, "every width to be at least 1")
        require(self.embedding >= 1, "model.embedding", self.embedding, "a width of at least 1")
        require(self.context >= 1, "model.context", self.context, "at least 1 token")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a probability in [0, 1)")
        for name, unset in (("init_strict", True), ("init_map", {})):
            value = getattr(self, name)
            require(self.init != "" or value == unset, f"model.{name}", value, "model.init to be set with it")
        require("" not in self.freeze, "model.freeze", self.freeze, "patterns of names, none of them empty")

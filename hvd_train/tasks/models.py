"""The built-in models, for tasks that do not define their own.

They take samples as the shards hold them: integers of any width are scaled, other floating-point types
become the type of the parameters, images without a channel axis get one, and they apply `data.standardize`. A
loaded model can therefore be called on raw samples, and a task need not know which model it was given.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.config import ModelConfig
from hvd_train.data.format import SampleSpec
from hvd_train.data.grouping import channels_last
from hvd_train.errors import TaskError
from hvd_train.tasks.inputs import Inputs

KERNEL = 3


def build_model(config: ModelConfig, spec: SampleSpec, num_outputs: int) -> nn.Module:
    """A model from the inputs of `spec` to [B, num_outputs]. Raises `TaskError` for a shape it cannot use."""
    shape = spec.fields[spec.inputs].shape
    if config.name == "mlp":
        return Mlp(Inputs(spec), shape, config.hidden, num_outputs, config.dropout)
    if len(shape) not in (2, 3):
        raise TaskError(
            f"model cnn: `{spec.inputs}` has the shape {list(shape)} a sample; expected images [height, "
            "width] or [channels, height, width]. Take model.name = 'mlp', or store the samples as images."
        )
    if channels_last(shape):
        raise TaskError(
            f"model cnn: `{spec.inputs}` has the shape {list(shape)} a sample, which looks like channels "
            "last; expected [channels, height, width]. Store the images with the channels first."
        )
    if len(shape) == 2 and spec.standardize == "channel":
        raise TaskError(
            f"data.standardize = 'channel': `{spec.inputs}` has the shape {list(shape)} a sample, which the "
            "model cnn takes as [height, width]; expected [channels, height, width]. Take 'all'."
        )
    return Cnn(Inputs(spec), shape, config.channels, config.hidden, num_outputs, config.dropout)


def build_sequence_model(config: ModelConfig, vocabulary: int) -> nn.Module:
    """A causal model from integer tokens [B, T] to logits [B, T, vocabulary]: those of position t depend on
    the tokens up to t only."""
    if config.name == "mlp":
        return TokenMlp(vocabulary, config.embedding, config.context, config.hidden, config.dropout)
    return TokenCnn(vocabulary, config.embedding, config.channels, config.hidden, config.dropout)


def describe(model: nn.Module) -> str:
    """A short description of a model: `mlp 64-128-64-10`, or the class of a model that is not built in."""
    return model.summary if isinstance(model, (Mlp, Cnn, TokenMlp, TokenCnn)) else type(model).__name__


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards every module is in the mode that it was in.

    Not `torch.inference_mode`: a tensor that a module made in it, and kept, could not be used in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(modes[0][1])  # by `train`, which a model may have overridden
        for module, mode in modes[1:]:
            if module.training is not mode:
                module.train(mode)


def scales_integers(model: nn.Module) -> bool:
    """Whether the model multiplies integer inputs by the scale of its sample."""
    return isinstance(model, (Mlp, Cnn))


def _dense(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Fully connected layers from widths[0] to widths[-1] with ReLU (and dropout) between them."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(width, following), nn.ReLU(inplace=True)]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def _dash(widths: Sequence[int]) -> str:
    return "-".join(map(str, widths))


def _dtype(layers: nn.Sequential) -> torch.dtype:
    """Of the parameters of `layers`."""
    return next(layers.parameters()).dtype


@final
class Mlp(nn.Module):
    """Fully connected layers with ReLU between them: [B, *shape] -> [B, num_outputs]."""

    def __init__(
        self,
        inputs: Inputs,
        shape: Sequence[int],
        hidden: Sequence[int],
        num_outputs: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = (math.prod(shape), *hidden, num_outputs)
        self.inputs = inputs
        self.layers = _dense(widths, dropout)
        self.shape = tuple(shape)
        self.summary = f"mlp {_dash(widths)}"

    def forward(self, inputs: Tensor) -> Tensor:
        size = inputs.shape[0]  # len() would fix the size of a traced batch
        samples = self.inputs(inputs.reshape(size, *self.shape), _dtype(self.layers))
        outputs: Tensor = self.layers(samples.reshape(size, -1))
        return outputs


@final
class Cnn(nn.Module):
    """Convolutions 3 x 3, each with ReLU and a maximum over 2 x 2 while the image is large enough for it,
    then fully connected layers: [B, H, W] or [B, C, H, W] -> [B, num_outputs]."""

    def __init__(
        self,
        inputs: Inputs,
        shape: Sequence[int],
        channels: Sequence[int],
        hidden: Sequence[int],
        num_outputs: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        depth, height, width = (1, *shape) if len(shape) == 2 else shape
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((depth, *channels)):
            layers += [nn.Conv2d(before, after, KERNEL, padding=KERNEL // 2), nn.ReLU(inplace=True)]
            if min(height, width) >= 2:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            depth = after
        self.features = nn.Sequential(*layers)
        widths = (depth * height * width, *hidden, num_outputs)
        self.layers = _dense(widths, dropout)
        self.has_channels = len(shape) == 3
        self.summary = f"cnn {_dash(channels)} | {_dash(widths)}"

    def forward(self, inputs: Tensor) -> Tensor:
        images = self.inputs(inputs, _dtype(self.layers))
        features = self.features(images if self.has_channels else images.unsqueeze(1))
        outputs: Tensor = self.layers(features.flatten(1))
        return outputs


@final
class TokenMlp(nn.Module):
    """The embeddings of the last `context` tokens side by side, then fully connected layers, the same ones
    at every position. Positions before the first token are zeros."""

    def __init__(
        self, vocabulary: int, embedding: int, context: int, hidden: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        widths = (context * embedding, *hidden, vocabulary)
        self.context = context
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.layers = _dense(widths, dropout)
        self.summary = f"mlp {context} tokens x {embedding} | {_dash(widths)}"

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = F.pad(self.embedding(tokens.long()), (0, 0, self.context - 1, 0))
        windows = embedded.unfold(1, self.context, 1).flatten(2)  # [B, T, embedding * context]
        logits: Tensor = self.layers(windows)
        return logits


@final
class TokenCnn(nn.Module):
    """Causal convolutions over 3 tokens with ReLU, each dilated twice as far as the one before, then fully
    connected layers at every position."""

    def __init__(
        self, vocabulary: int, embedding: int, channels: Sequence[int], hidden: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        depths = (embedding, *channels)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, KERNEL, dilation=2**i)
            for i, (before, after) in enumerate(itertools.pairwise(depths))
        )
        widths = (depths[-1], *hidden, vocabulary)
        self.layers = _dense(widths, dropout)
        self.summary = f"cnn {_dash(depths)} | {_dash(widths)}"

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.embedding(tokens.long()).transpose(1, 2)  # [B, depth, T]
        for i, convolution in enumerate(self.convolutions):
            # Zeros on the left only: position t sees nothing that comes after it.
            padded = F.pad(features, ((KERNEL - 1) * 2**i, 0))
            features = F.relu(convolution(padded))
        logits: Tensor = self.layers(features.transpose(1, 2))
        return logits

"""Formats that hold the model as a graph: traced by torch.export, the number of rows left open."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hvd_train.after.export.calls import Traceable, call_of, short, tensors_of, traceable, without
from hvd_train.after.export.product import FEW, MORE, Input, Product, Runner, input_of, require_same
from hvd_train.after.export.samples import Samples
from hvd_train.after.trained import Trained
from hvd_train.errors import TaskError

BATCH = "batch"
"""The name of the first axis of every input."""


class GraphFormat(ABC):
    """How a traced model is written and read. Both may raise any error of the library."""

    @abstractmethod
    def write(self, program: ExportedProgram, names: Sequence[str], about: Mapping[str, str]) -> bytes:
        """The bytes of a file.

        Args:
            names: of the inputs.
            about: metadata.
        """

    @abstractmethod
    def load(self, content: bytes, program: ExportedProgram) -> Runner:
        """Reads such bytes of `program`. Raises `ExportDiffers` for values that differ from its own."""


def graph(
    trained: Trained, model: nn.Module, samples: Samples, form: GraphFormat, about: Mapping[str, str]
) -> Product:
    """A graph of the task's transform and `model`, or of `model` alone where that cannot be.

    Raises `TaskError` for a model of which no graph can be made.
    """
    why = ""
    for candidate in traceable(trained, model, samples.repeated(FEW)):
        chosen = without(candidate, why) if why else candidate
        inputs, example = _inputs(trained, model, samples, chosen)
        try:
            return _product(chosen, inputs, example, form, about)
        except TaskError:
            raise
        except Exception as error:  # of torch, of the converter, or of the user's code
            why = short(error)
    raise TaskError(
        f"no graph can be made of the model {type(model).__name__}: {why}. Expected operations on tensors "
        "alone, and a free number of rows. Change its forward, or take --format safetensors."
    )


def _product(
    chosen: Traceable,
    inputs: tuple[Input, ...],
    example: tuple[Tensor, ...],
    form: GraphFormat,
    about: Mapping[str, str],
) -> Product:
    about = {**about, "preprocessing": "; ".join(chosen.included), "left_out": "; ".join(chosen.left_out)}
    with _quiet():
        program = _trace(chosen, example)
        content = form.write(program, chosen.names, about)
    return Product(
        content=content,
        inputs=inputs,
        included=chosen.included,
        left_out=chosen.left_out,
        exact=False,
        arguments=lambda batch, call: (chosen.feed(batch, call), {}),
        load=lambda content: _load(form, content, program),
    )


def _inputs(
    trained: Trained, model: nn.Module, samples: Samples, candidate: Traceable
) -> tuple[tuple[Input, ...], tuple[Tensor, ...]]:
    """The inputs of a candidate, and zeros like those: a file must not hold samples."""
    fed = []
    for size in (FEW, MORE):
        batch = samples.repeated(size)
        fed.append(candidate.feed(batch, call_of(trained.task, model, batch)))
    inputs = tuple(input_of(name, *pair) for name, *pair in zip(candidate.names, *fed, strict=True))
    for given in inputs:
        if given.shape[:1] != (BATCH,) or BATCH in given.shape[1:] or "any" in given.shape:
            raise TaskError(
                f"the loss calls the model with `{given.name}` of shape {list(given.shape)}; expected the "
                "rows along the first axis, and only there. Change the call, or take --format safetensors."
            )
    return inputs, tuple(torch.zeros_like(tensor) for tensor in fed[0])


def _trace(candidate: Traceable, example: tuple[Tensor, ...]) -> ExportedProgram:
    axis = Dim(BATCH, min=1)
    shapes = tuple({0: axis} for _ in example)
    try:
        program = torch.export.export(candidate.module, example, dynamic_shapes=shapes, strict=False)
    except (
        Exception
    ):  # by its byte code, which is slower, torch can trace some more: `len` of a tensor, NumPy
        program = torch.export.export(candidate.module, example, dynamic_shapes=shapes, strict=True)
    program.example_inputs = None  # they would be written as a pickle
    for name, value in {**program.state_dict, **program.constants}.items():
        if type(value) not in (Tensor, nn.Parameter):
            raise TypeError(f"`{name}` is {type(value).__name__}, expected a plain tensor")
    return program


def _load(form: GraphFormat, content: bytes, program: ExportedProgram) -> Runner:
    with _quiet():
        return form.load(content, program)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters log and print, which is for those who develop them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@final
class TorchExport(GraphFormat):
    """The archive of torch.export.save. It holds values as plain bytes and the graph as JSON: no pickle.
    `torch.export.load` reads pickles where a file has some; here it is given what was just written."""

    def write(self, program: ExportedProgram, names: Sequence[str], about: Mapping[str, str]) -> bytes:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files=dict(about))
        return file.getvalue()

    def load(self, content: bytes, program: ExportedProgram) -> Runner:
        found = torch.export.load(io.BytesIO(content))
        require_same(found.state_dict, program.state_dict, "its tensors")
        require_same(found.constants, program.constants, "its constants")
        module = found.module()
        return lambda *inputs: tensors_of(module(*inputs))

"""The format ONNX, read by ONNX Runtime. The only module that imports either."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.export import ExportedProgram

from hvd_train.after.export.graphs import BATCH, GraphFormat
from hvd_train.after.export.product import Runner
from hvd_train.errors import EnvironmentMismatch, TaskError

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

_MOST_BYTES = 2**31 - 2**20
"""Of a file: protobuf's limit, less what the graph takes."""


def require_packages() -> None:
    """Raises `EnvironmentMismatch` if a package is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentMismatch(
            f"--format onnx needs {', '.join(missing)}, which is not installed. Install the extra `export`: "
            "pip install 'hvd_train[export]'."
        )


def versions() -> dict[str, str]:
    """Of the packages that write and read ONNX."""
    import onnx
    import onnxruntime
    import onnxscript

    return {p.__name__: str(p.__version__) for p in (onnx, onnxruntime, onnxscript)}


@final
class Onnx(GraphFormat):
    """One file with the graph and its values. The converter may combine values (a norm with the layer before
    it, for example), so they are compared by the outputs that they give."""

    def write(self, program: ExportedProgram, names: Sequence[str], about: Mapping[str, str]) -> bytes:
        tensors = [t for t in program.state_dict.values() if isinstance(t, Tensor)]
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        if num_bytes > _MOST_BYTES:
            raise TaskError(
                f"the model has {num_bytes:,} bytes; expected at most {_MOST_BYTES:,}, the limit of one ONNX "
                "file. Take --format torch-export or safetensors."
            )
        outputs = [f"outputs_{i}" for i in range(len(program.graph_signature.user_outputs))]
        exported = torch.onnx.export(
            program,
            input_names=list(names),
            output_names=outputs if len(outputs) > 1 else ["outputs"],
            dynamic_shapes=tuple({0: BATCH} for _ in names),
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        model = exported.model_proto
        for key, value in about.items():
            model.metadata_props.add(key=key, value=value)
        return bytes(model.SerializeToString())

    def load(self, content: bytes, program: ExportedProgram) -> Runner:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, arrays)]

        return run

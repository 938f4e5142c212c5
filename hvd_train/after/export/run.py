"""`hvd_train export`, the whole. One process, not collective."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hvd_train._version import __version__
from hvd_train.after.export import onnx_format
from hvd_train.after.export.card import card
from hvd_train.after.export.graphs import TorchExport, graph
from hvd_train.after.export.options import SUFFIXES, Format, Options
from hvd_train.after.export.product import Product, safetensors
from hvd_train.after.export.publish import Checked, card_of, publish, require_free
from hvd_train.after.export.samples import Samples, open_samples
from hvd_train.after.trained import Trained, open_trained
from hvd_train.run.model_state import unwrapped
from hvd_train.tasks.models import describe

FORMAT_VERSION = "1"
"""Of the metadata in the files."""


def export(options: Options) -> Path:
    """Writes the model of a run and its card, and prints what was done; returns the file.

    Raises `UserError` for a run, a model or a file that cannot be used, and `ExportDiffers` if what was
    written is not the model.
    """
    if options.format == "onnx":
        onnx_format.require_packages()
    if options.out:
        require_free(Path(options.out))
    trained = open_trained(options.run, options.checkpoint)
    default = f"{trained.folder.name}-{trained.checkpoint}{SUFFIXES[options.format]}"
    out = Path(options.out or default)
    require_free(out)
    model = unwrapped(trained.model)
    samples = open_samples(trained, options.data, options.samples)
    versions = onnx_format.versions() if options.format == "onnx" else {}
    try:
        product = produce(trained, model, samples, options.format)

        def text(checked: Checked) -> str:
            about = {"file": out.name, "format": options.format}
            return card(trained, model, product, samples, checked, about=about, versions=versions)

        checked = publish(product, trained.task, model, samples, out, text)
    finally:
        samples.close()
    _print(trained, model, product, samples, checked, out)
    return out


def produce(trained: Trained, model: nn.Module, samples: Samples, form: Format) -> Product:
    """The model in a format. Raises `TaskError` where it cannot be."""
    about = {
        "format_version": FORMAT_VERSION,
        "hvd_train": __version__,
        "run": trained.folder.name,
        "round": str(trained.saved.round),
    }
    if form == "safetensors":
        return safetensors(trained, model, samples, about)
    return graph(trained, model, samples, onnx_format.Onnx() if form == "onnx" else TorchExport(), about)


def _print(
    trained: Trained, model: nn.Module, product: Product, samples: Samples, checked: Checked, out: Path
) -> None:
    numel = sum(p.numel() for p in model.parameters())
    print(
        f"model     {describe(model)}, {numel:,} parameters, round {trained.saved.round} of {trained.folder}"
    )
    for name, lines in (("includes", product.included), ("left out", product.left_out)):
        for line in lines:
            print(f"{name}  {line}")
    comparison = checked.comparison
    limit = " and ".join(f"{comparison.limit(output):.3g}" for output in comparison.outputs)
    print(
        f"compared  {samples.count:,} samples of {samples.source}: largest difference "
        f"{comparison.difference:.3g} (limit {limit}), outputs up to {comparison.largest:.3g}"
    )
    print(f"wrote     {out} ({checked.num_bytes:,} bytes), sha256 {checked.sha256}")
    print(f"card      {card_of(out)}", flush=True)

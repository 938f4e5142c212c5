"""Writing an exported model: nothing gets its name before it was read back and compared with the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hvd_train.after.export.calls import call_of, short
from hvd_train.after.export.compare import Comparison
from hvd_train.after.export.product import Product
from hvd_train.after.export.samples import Samples
from hvd_train.errors import ConfigError, ExportDiffers
from hvd_train.io.atomic import replacing, sync, write
from hvd_train.tasks.base import Task

CARD_TITLE = "# Model card, written by hvd_train export."
"""The first line of every card."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the check of a written file found."""

    sha256: str

    num_bytes: int

    comparison: Comparison


def card_of(out: Path) -> Path:
    """The file of the model card that belongs to `out`."""
    return out.with_name(f"{out.name}.toml")


def require_free(out: Path) -> None:
    """Raises `ConfigError` if a file must not be written as `out`. A card without its export, which a kill
    between the two leaves, is no obstacle."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}. Make it, or name another file.")
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already; expected a new name. Give another --out, or move the file.")
    card = card_of(out)
    if os.path.lexists(card) and not _is_card(card):
        raise ConfigError(
            f"{card}, the name of the model card, exists already and is none. Give another --out, or move it."
        )


def _is_card(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(CARD_TITLE)) == CARD_TITLE.encode()


def publish(
    product: Product,
    task: Task,
    model: nn.Module,
    samples: Samples,
    out: Path,
    card: Callable[[Checked], str],
) -> Checked:
    """Writes `product` and its card.

    The bytes that were produced are compared with those that were read back from the disk, and what the
    library makes of the latter with the model, on all samples. Then the card gets its name, then the file:
    there is never a file without a card.

    Args:
        card: the text of the model card.

    Raises `ExportDiffers` if the file is not the model, and `ConfigError` if it cannot be written. Neither
    leaves a file.
    """
    produced = hashlib.sha256(product.content).hexdigest()
    try:
        with replacing(out) as temporary:
            write(temporary, product.content)
            content = _read_back(temporary)
            if hashlib.sha256(content).hexdigest() != produced:
                raise _differs(out, "its bytes on the disk are not those that were written")
            try:
                comparison = check(product, content, task, model, samples)
            except ExportDiffers as error:
                raise _differs(out, str(error)) from None
            checked = Checked(sha256=produced, num_bytes=len(content), comparison=comparison)
            text = card(checked)
            require_free(out)  # another program may have written it meanwhile
            with replacing(card_of(out)) as temporary_card:
                write(temporary_card, text.encode())
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror or error}. Give another --out."
        ) from None
    return checked


def _differs(out: Path, why: str) -> ExportDiffers:
    return ExportDiffers(
        f"{out} was not written: the file was read again, and {why}. Expected the model of the run. Export "
        "it again; if the message comes back, take another --format, and check the disk and the memory."
    )


def _read_back(path: Path) -> bytes:
    """The bytes of a file, from the disk where the system can be asked to forget its copy."""
    sync(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def check(product: Product, content: bytes, task: Task, model: nn.Module, samples: Samples) -> Comparison:
    """Loads `content` and compares its outputs with the model's. Raises `ExportDiffers`."""
    try:
        run = product.load(content)
    except ExportDiffers:
        raise
    except Exception as error:  # each library has its own
        raise ExportDiffers(f"it cannot be loaded: {short(error)}") from error
    comparison = Comparison(product.exact)
    for batch in samples.batches():
        call = call_of(task, model, batch)
        args, kwargs = product.arguments(batch, call)
        try:
            with torch.no_grad():
                outputs = run(*args, **kwargs)
        except Exception as error:
            raise ExportDiffers(
                f"it does not run on a batch of {len(next(iter(batch.values())))}: {short(error)}"
            ) from error
        comparison.add(call.outputs, outputs)
    failure = comparison.failure()
    if failure:
        raise ExportDiffers(failure)
    return comparison

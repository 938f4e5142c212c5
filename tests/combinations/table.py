"""Writes the tables of docs/combinations.md: `python -m tests.combinations.table`. Whether a combination is
refused, and by which message, is what the program itself says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch

import hvd_train
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.base import Communicator
from hvd_train.comm.horovod import HorovodCommunicator
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import HvdTrainError
from tests.combinations.rounds import Model, Rounds
from tests.combinations.rules import BACKENDS, COMMON, RULES, SHORT_WIRES, config, of_one_key, sync
from tests.launching import ROOT

DOCUMENT = ROOT / "docs" / "combinations.md"
BEGIN = "<!-- What follows is written by `python -m tests.combinations.table`. -->\n"


def refusal(of: Callable[[], Any]) -> str:
    """The message that refuses something; empty if nothing does."""
    try:
        of()
    except HvdTrainError as error:
        return str(error)
    return ""


def refused_on(rule: str, backend: str, wire: str = "float32") -> str:
    return refusal(lambda: config("runs", "r", sync(rule, wire=wire), backend=backend))


def refused_wires(rule: str, backend: str) -> str:
    """The message for the first of the short wires that is refused."""
    return next(filter(None, (refused_on(rule, backend, wire) for wire in SHORT_WIRES)), "")


def refused_parts(*rules: str, two_types: bool = False) -> str:
    """By the parts of a training, for a model with parameters of one type or of two."""

    def make() -> None:
        module = Model(two_types=two_types)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        SyncParts(module, optimizer, SoloCommunicator(), config("runs", "r", sync(*rules)))

    return refusal(make)


def refused_resume(rule: str) -> str:
    """Of a run that was ended after three rounds."""
    with tempfile.TemporaryDirectory() as runs, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        hvd_train.train(config(runs, "r", sync(rule)), comm=SoloCommunicator())
        longer = config(runs, "r", sync(rule), rounds=5)
        return refusal(lambda: hvd_train.train(longer, comm=SoloCommunicator()))


def refused_loss(rule: str) -> str:
    rounds = Rounds(SoloCommunicator(), config("runs", "r", sync(rule)))
    rounds.round()
    return refusal(lambda: rounds.rebind(SoloCommunicator()))


def averages_parameters(rule: str) -> bool:
    return sync(rule).mode == "average"


class Messages:
    """Numbers the messages that refuse something, in the order in which they are met."""

    def __init__(self) -> None:
        self._seen: list[str] = []

    def cell(self, message: str, otherwise: str = "yes") -> str:
        if not message:
            return otherwise
        if message not in self._seen:
            self._seen.append(message)
        return f"no ({self._seen.index(message) + 1})"

    def listed(self) -> str:
        code = (f"`` {text} ``" if "`" in text else f"`{text}`" for text in self._seen)
        return "".join(f"{number}. {text}\n" for number, text in enumerate(code, 1))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def written(rule: str) -> str:
    """The keys of a rule, as in a configuration file."""
    flat: dict[str, Any] = {}
    for key, value in RULES[rule].items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    values = {key: f'"{v}"' if isinstance(v, str) else v for key, v in flat.items()}
    return ", ".join(f"`{key} = {value}`" for key, value in values.items())


def rules(messages: Messages) -> str:
    rows = []
    for rule in RULES:
        cells = [messages.cell(refused_on(rule, backend)) for backend in BACKENDS]
        cells += [
            messages.cell(refused_wires(rule, "ring")),
            messages.cell(refused_parts(rule, two_types=True)),
            "yes" if averages_parameters(rule) else "",
        ]
        resumed = messages.cell(refused_resume(rule))
        rows.append([rule, written(rule), *cells, resumed, resumed, messages.cell(refused_loss(rule))])
    head = ["rule", "keys of `sync`", *(f"`{backend}`" for backend in BACKENDS)]
    head += ["short wire", "two types", "overlap", "resume", "other ranks", "lost rank"]
    return table(head, rows)


def pairs(messages: Messages) -> str:
    names = list(RULES)
    rows = []
    for i, rule in enumerate(names):
        cells = [
            "" if of_one_key(rule, other) else messages.cell(refused_parts(rule, other))
            for other in names[:i]
        ]
        rows.append([rule, *cells, *[""] * (len(names) - 1 - i)])
    return table(["", *names[:-1]], rows[1:])


def refused_survivors(kind: type[Communicator]) -> str:
    """By a backend that cannot lose ranks: all say the same but for their names."""
    if kind.survivors is not Communicator.survivors:
        return ""
    solo = SoloCommunicator()
    message = refusal(solo.survivors)
    return message.replace(solo.where, "RANK").replace(f"`{solo.name}` ({solo.library})", "`NAME` (LIBRARY)")


def backends(messages: Messages) -> str:
    kinds = dict(
        zip(BACKENDS, (SoloCommunicator, MPICommunicator, RingCommunicator, HorovodCommunicator), strict=True)
    )
    rows = []
    for name, kind in kinds.items():
        wires = refused_wires("fixed", name)
        background = kind.start_average is not Communicator.start_average
        overlap = "yes" if background else "done at the start"
        rows.append([f"`{name}`", messages.cell(wires), overlap, messages.cell(refused_survivors(kind))])
    return table(["backend", "short wire", "overlap", "lost rank"], rows)


def tables() -> str:
    """The generated part of the document."""
    messages = Messages()
    parts = [
        f"## Rules\n\nThe other keys are at their defaults, but for {common()}.\n\n{rules(messages)}",
        f"## Two rules together\n\nEmpty: two values of one key.\n\n{pairs(messages)}",
        f"## Backends\n\n{backends(messages)}",
    ]
    return BEGIN + "\n" + "".join(parts) + "## Messages\n\n" + messages.listed()


def common() -> str:
    return " and ".join(f"`{key} = {value}`" for key, value in COMMON.items())


def document(text: str) -> str:
    """The document with the tables as they are now."""
    return text.partition(BEGIN)[0] + tables()


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))

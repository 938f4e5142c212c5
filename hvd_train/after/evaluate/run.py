"""`hvd_train evaluate`: every metric of a run's model, on all ranks of a job."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from hvd_train.after.evaluate.options import Options
from hvd_train.after.evaluate.text import text
from hvd_train.after.evaluate.worst import WorstSamples, described
from hvd_train.after.trained import Trained, open_trained
from hvd_train.algorithm.evaluate import ValidationEvaluator
from hvd_train.comm.agree import together
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.config import Config
from hvd_train.data.labels import IGNORED
from hvd_train.data.readers.base import RowNumbers
from hvd_train.data.rows import Rows
from hvd_train.data.screen import evaluation_screen
from hvd_train.data.selection import Selection, validation_rows
from hvd_train.errors import DataError
from hvd_train.io.output import warn
from hvd_train.io.text import counted
from hvd_train.monitor import evaluation_page
from hvd_train.preparation import share_cores
from hvd_train.record.evaluation import Evaluation
from hvd_train.run.layout import saved_config
from hvd_train.run.shards import find_shards_together, select_rows_together
from hvd_train.tasks.base import Batch
from hvd_train.tasks.load import make_task
from hvd_train.tasks.metric_names import GROUPS


def run(options: Options) -> int:
    """Evaluates, and prints the result on rank 0; returns the exit code. Collective."""
    with connect(options.backend, shared_folder=Path(options.run).absolute().parent) as comm:
        evaluation = evaluate(options, comm)
        if comm.rank == 0:
            print(json.dumps(evaluation.to_json()) if options.json else text(evaluation), flush=True)
            if options.page:
                evaluation_page.write(evaluation, Path(options.page))
    return 0


def evaluate(options: Options, comm: Communicator) -> Evaluation:
    """The figures, the same on every rank. Collective."""
    if options.page:
        together(comm, evaluation_page.require)
    share_cores(options.threads, comm)
    trained = together(comm, lambda: _open(options))
    selected = _select(options, trained, comm)
    for line in selected.warnings if comm.rank == 0 else ():
        warn(line)
    screen = evaluation_screen(trained.config.data, trained.saved.sample)
    rows = Rows(selected.spans, trained.saved.sample.fields, screen=screen, known=selected.shards)
    worst = WorstSamples(trained.task, trained.model, options.worst)

    def also(numbers: RowNumbers, batch: Batch) -> None:
        _require_classes(trained, rows, numbers, batch)
        worst.add(numbers, batch)

    evaluator = together(
        comm,
        lambda: ValidationEvaluator(
            comm,
            trained.task,
            trained.model,
            rows,
            batch_size=options.batch_size or trained.config.evaluate.batch_size,
            also=also,
        ),
    )
    figures = evaluator.evaluate()
    largest = worst.of_all_ranks(comm)
    sample = trained.saved.sample
    samples = together(
        comm,
        lambda: described(trained.task, trained.model, rows, sample, largest) if comm.rank == 0 else [],
    )
    values = {name: value for name, value in evaluator.values.items() if isinstance(value, list)}
    return Evaluation(
        run=str(trained.folder),
        checkpoint=trained.checkpoint,
        round=trained.saved.round,
        data=options.data or trained.config.data.path,
        num_samples=len(rows),
        metrics=figures,
        values=values,
        undefined=evaluator.undefined(),
        remarks=[*_remarks(trained, len(rows)), *_left_out(evaluator, comm)],
        worst=comm.broadcast(samples),
        class_names=list(sample.class_names),
    )


def _left_out(evaluator: ValidationEvaluator, comm: Communicator) -> list[str]:
    """What of the data did not count. Collective."""
    left_out, first = evaluator.left_out()
    if not left_out:
        return []
    place = next(place for place in comm.allgather(first) if place)
    return [
        f"{counted(left_out, 'row')} of {evaluator.num_samples:,} left out, by data.not_finite = 'skip': the "
        f"first is {place}"
    ]


def _open(options: Options) -> Trained:
    config = _with_all_metrics(saved_config(Path(options.run)))
    return open_trained(options.run, options.checkpoint, make_task(config))


def _with_all_metrics(config: Config) -> Config:
    if config.task not in GROUPS:
        return config
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, metrics=("all",)))


def _select(options: Options, trained: Trained, comm: Communicator) -> Selection:
    """The rows to evaluate on. Collective."""
    sample, data = trained.saved.sample, trained.config.data
    if options.data:
        return select_rows_together(options.data, sample, tuple(sample.fields), comm)
    shards = find_shards_together(data, comm)
    return together(comm, lambda: validation_rows(shards, data))


def _require_classes(trained: Trained, rows: Rows, numbers: RowNumbers, batch: Batch) -> None:
    """Raises `DataError` for a class that the model of a built-in task does not have."""
    sample = trained.saved.sample
    if trained.config.task not in ("classification", "next-token") or sample.num_classes is None:
        return
    for name in dict.fromkeys((sample.targets, sample.inputs)):
        if name == sample.inputs and trained.config.task == "classification":
            continue
        wrong = _outside(batch[name], sample.num_classes)
        if len(wrong):
            row, value = int(numbers[wrong[0, 0]]), int(batch[name][tuple(wrong[0])])
            (span,) = rows.locate(row, row + 1)
            raise DataError(
                f"{span.shard}: `{name}` holds {value} in row {span.start}; the model has the classes 0 to "
                f"{sample.num_classes - 1}. Evaluate on data with the classes of the training."
            )


def _outside(values: Tensor, num_classes: int) -> Tensor:
    """The places of values that are no class, [n, dimensions]."""
    wide = values.long()
    return torch.nonzero(((wide < 0) | (wide >= num_classes)) & (wide != IGNORED))


def _remarks(trained: Trained, num_samples: int) -> list[str]:
    sample = trained.saved.sample
    if trained.config.task != "classification" or sample.num_classes is None:
        return []
    from hvd_train.tasks.metrics import MOST_CLASSES, is_binned

    if sample.num_classes > MOST_CLASSES:
        return [f"more than {MOST_CLASSES:,} classes: no confusion matrix, and no ROC curves"]
    if is_binned(sample.num_classes, num_samples):
        return ["many samples: the areas under the ROC curves are from 4,096 bins of the log-odds"]
    return []

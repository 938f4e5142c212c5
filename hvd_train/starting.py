"""What a training is, in plain values, when it starts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from hvd_train.algorithm.local_sgd import LocalSGD
from hvd_train.config import flatten
from hvd_train.preparation import Prepared
from hvd_train.record.reports import RunStart
from hvd_train.tasks.models import describe


def run_start(
    prepared: Prepared,
    folder: Path,
    training: LocalSGD,
    init: str,
    compile_s: Sequence[float],
    readings: Sequence[str],
) -> RunStart:
    """The header of a run.

    Args:
        folder: of the run.
        init: what the model starts from, in words.
        compile_s: seconds that compiling the model took on each rank.
        readings: how each rank reads its rows, and why so.
    """
    config = prepared.config
    layers = training.observer.layers
    rules = {f.name: getattr(config.stop, f.name) for f in dataclasses.fields(config.stop)}
    return RunStart(
        run=str(folder),
        round=training.progress.rounds,
        task=type(prepared.task).__name__ if prepared.task_is_given else config.task,
        model=describe(prepared.model),
        num_parameters=sum(p.numel() for p in prepared.model.parameters()),
        layers=[entry.name for entry in layers],
        init=init,
        num_frozen=sum(p.numel() for p in prepared.model.parameters() if not p.requires_grad),
        layer_sizes=[entry.holder.numel() for entry in layers],
        world_size=prepared.comm.size,
        hosts=prepared.hosts,
        host_of_rank=prepared.host_of_rank,
        backend=prepared.comm.name,
        lost_rank="ends the job",
        stall_timeout_s=config.sync.stall_timeout_s,
        sees_signs=prepared.comm.size == 1 or prepared.comm.liveness.sees_signs,
        compile_s=compile_s,
        threads=prepared.threads,
        period=config.sync.period if config.sync.mode != "none" else None,
        schedule=training.period.words if config.sync.mode == "average" else "",
        mode=config.sync.mode,
        batch_size=config.data.batch_size,
        data=config.data.path,
        shards_per_rank=prepared.plan.shards_per_rank,
        samples_per_rank=prepared.plan.samples_per_rank,
        reading=readings,
        validation_samples=training.evaluator.num_samples,
        values={name: found.values.figures() for name, found in prepared.surveys.items()},
        remarks=prepared.remarks,
        metric=config.evaluate.metric,
        stop_rules={name: rule for name, rule in rules.items() if rule},
        config_hash=hashlib.sha256(repr(sorted(flatten(config).items())).encode()).hexdigest()[:16],
        task_is_given=prepared.task_is_given,
        versions=prepared.versions,
    )

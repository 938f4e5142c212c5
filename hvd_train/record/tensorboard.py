"""A sink that writes event files of TensorBoard into the run's folder.

`tensorboard --logdir RUNS` then compares runs by their names. A resumed run goes on in a file of its own,
which tells TensorBoard from which step on the curves of the files before it do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from hvd_train.config import flatten
from hvd_train.config_file import load_config
from hvd_train.errors import EnvironmentMismatch, UserError
from hvd_train.record.reports import (
    CheckpointReport,
    EvaluationReport,
    FaultReport,
    LayerReport,
    MachineReport,
    Report,
    RoundReport,
    RunStart,
    StopReport,
)

_LEAST_GAP_S, _MOST_POINTS = 0.25, 5000
"""Two rounds in the file are at least so many seconds apart, and at least this part of the time so far: each
takes a millisecond, and a week of training has 40,000."""
_MOST_LAYERS = 64
_FLUSH_S = 5
_CONFIG_FILE = "config.toml"


@final
class TensorBoard:
    """The sink. Of quick rounds some are left out, and more the longer the run; of other events none."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        try:
            import tensorboardX
        except ImportError:
            raise EnvironmentMismatch(
                "record.tensorboard: tensorboardX is not installed. Install it with "
                "`pip install 'hvd_train[tensorboard]'`."
            ) from None
        self._library: Any = tensorboardX
        self._clock = clock
        self._began_s = self._last_s = -math.inf
        self._writer: Any = None
        self._layers: list[str] = []

    def record(self, event: RunStart | Report) -> None:
        if isinstance(event, RunStart):
            self._begin(event)
        elif self._writer is not None:
            for tag, value in self._scalars(event):
                if math.isfinite(value):
                    self._writer.add_scalar(tag, value, event.round)
            if isinstance(event, FaultReport):
                self._writer.add_text(f"fault/{event.kind}", event.message, event.round)
            if isinstance(event, (StopReport, EvaluationReport)):
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _begin(self, start: RunStart) -> None:
        self.close()
        self._began_s = self._clock()
        after = start.round + 1 if start.round else None
        # The library names a file by the second, and would replace that of a start in the same one.
        self._writer = self._library.SummaryWriter(
            start.run, purge_step=after, flush_secs=_FLUSH_S, filename_suffix=f".after-{start.round:09d}"
        )
        self._layers = list(start.layers) if len(start.layers) <= _MOST_LAYERS else []
        file = Path(start.run) / _CONFIG_FILE
        text = file.read_text(encoding="utf-8")
        self._writer.add_text("configuration", f"```toml\n{text}\n```", start.round)
        self._add_hyperparameters(start, file)

    def _add_hyperparameters(self, start: RunStart, file: Path) -> None:
        try:
            keys = flatten(load_config(file))
        except UserError:
            return  # of a task that has none
        plain = (bool, int, float)
        known = {key: value if isinstance(value, plain) else str(value) for key, value in keys.items()}
        summaries = self._library.summary.hparams(
            {**known, "ranks": start.world_size}, {f"evaluation/{start.metric}": 0}
        )
        for summary in summaries:
            self._writer.file_writer.add_summary(summary)

    def _scalars(self, event: Report) -> list[tuple[str, float]]:
        if isinstance(event, RoundReport):
            now = self._clock()
            if 0 <= now - self._last_s < max(_LEAST_GAP_S, (now - self._began_s) / _MOST_POINTS):
                return []
            self._last_s = now
            found = [("training/loss", event.loss), ("training/learning_rate", event.lr)]
            found += [("training/period", event.period), ("training/epoch", event.epoch)]
            found += [] if event.drift is None else [("training/drift", event.drift)]
            seconds = sum(spread.median for spread in event.seconds.values())
            found += [("training/samples_per_s", event.samples / seconds)] if seconds > 0 else []
            return [*found, *((f"seconds/{phase}", s.median) for phase, s in event.seconds.items())]
        if isinstance(event, EvaluationReport):
            named = {**event.metrics, "best": event.best, "seconds": event.seconds}
            return [(f"evaluation/{name}", value) for name, value in named.items()]
        if isinstance(event, LayerReport):
            figures = zip(self._layers, event.update, event.norm, strict=False)
            return [
                (f"relative_step/{name}", math.log10(update / norm / event.period))
                for name, update, norm in figures
                if update > 0 and norm > 0
            ]
        if isinstance(event, MachineReport):
            return [
                ("machine/memory_of_largest_rank", max(event.rss_bytes)),
                ("machine/memory_left", min(event.available_bytes)),
                ("machine/cores_of_median_rank", sorted(event.cpu)[len(event.cpu) // 2]),
            ]
        return [("checkpoint/seconds", event.seconds)] if isinstance(event, CheckpointReport) else []

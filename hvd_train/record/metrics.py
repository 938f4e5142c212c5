"""A sink that serves a run's figures to Prometheus.

Names follow https://prometheus.io/docs/practices/naming/: base units, and `_total` for what only grows.
"""

from __future__ import annotations

from typing import Any, final

from hvd_train.errors import ConfigError, EnvironmentMismatch
from hvd_train.record.reports import (
    CheckpointReport,
    EvaluationReport,
    FaultReport,
    MachineReport,
    Report,
    RoundReport,
    RunStart,
    StopReport,
)


@final
class Metrics:
    """The sink, and the server in threads of its own.

    Args:
        port: to listen on.
        host: the address of this host to listen on.

    Raises `ConfigError` for a port that cannot be used, `EnvironmentMismatch` without prometheus-client.
    """

    def __init__(self, port: int, host: str) -> None:
        try:
            import prometheus_client
        except ImportError:
            raise EnvironmentMismatch(
                "record.metrics_port: prometheus-client is not installed. Install it with "
                "`pip install 'hvd_train[metrics]'`."
            ) from None
        self._registry = prometheus_client.CollectorRegistry()
        self._make(prometheus_client)
        self._host_of_rank: list[str] = []
        self._sent = 0
        try:
            self._server, _ = prometheus_client.start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(
                f"record.metrics_port = {port}: {host} cannot be listened on: {error.strerror or error}. "
                "Choose another port, or another record.metrics_host."
            ) from None

    def _make(self, library: Any) -> None:
        def gauge(name: str, text: str, *labels: str) -> Any:
            return library.Gauge(f"hvd_train_{name}", text, labels, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Any:
            return library.Counter(f"hvd_train_{name}", text, labels, registry=self._registry)

        self._run = library.Info("hvd_train_run", "What is trained", registry=self._registry)
        self._ranks = gauge("ranks", "Ranks of the job")
        self._running = gauge("running", "1 until the run has stopped")
        self._stopped = gauge("stopped", "1 for the reason for which the run has stopped", "reason")
        self._round = gauge("round", "Rounds done")
        self._epoch = gauge("epoch", "Passes over all shards done")
        self._loss = gauge("loss", "Mean training loss of the last round")
        self._lr = gauge("learning_rate", "Learning rate of the last round")
        self._period = gauge("period_steps", "Local steps of the last round")
        self._drift = gauge("drift", "Mean squared distance of the ranks' parameters, when last measured")
        self._error = gauge("error", "The metric that the stop rules follow, in the last evaluation")
        self._best = gauge("error_best", "Its best value")
        self._metric = gauge("metric", "Every metric of the last evaluation", "metric")
        self._rss = gauge("rank_resident_memory_bytes", "Resident memory of a rank", "rank", "host")
        self._cores = gauge("rank_cpu_cores", "Cores that a rank keeps busy", "rank", "host")
        self._throttled = gauge("rank_throttled_ratio", "Share of periods held back", "rank", "host")
        self._available = gauge("host_available_memory_bytes", "Memory that a host can give", "host")
        self._samples = counter("samples", "Samples used since this start")
        self._seconds = counter("phase_seconds", "Seconds of the median rank in a phase", "phase")
        self._evaluations = counter("evaluations", "Evaluations since this start")
        self._checkpoints = counter("checkpoints", "Checkpoints since this start")
        self._pauses = counter("checkpoint_seconds", "Seconds in which checkpoints were written")
        self._sent_bytes = counter("sent_bytes", "Bytes given to MPI for other hosts by all ranks")
        self._faults = counter("faults", "Faults that the run survived, or that ended it", "kind")

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self._server.server_port)

    def record(self, event: RunStart | Report) -> None:
        if isinstance(event, RunStart):
            self._begin(event)
            return
        self._round.set(event.round)
        if isinstance(event, RoundReport):
            self._of_round(event)
        elif isinstance(event, EvaluationReport):
            self._evaluations.inc()
            self._error.set(event.error)
            self._best.set(event.best)
            for name, value in event.metrics.items():
                self._metric.labels(name).set(value)
        elif isinstance(event, MachineReport):
            self._of_machine(event)
        elif isinstance(event, CheckpointReport):
            self._checkpoints.inc()
            self._pauses.inc(event.seconds)
        elif isinstance(event, FaultReport):
            self._faults.labels(event.kind).inc()
        elif isinstance(event, StopReport):
            self._running.set(0)
            self._stopped.labels(event.reason).set(1)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _begin(self, start: RunStart) -> None:
        self._host_of_rank = [start.hosts[i] for i in start.host_of_rank]
        self._hosts = start.hosts
        self._ranks.set(start.world_size)
        self._running.set(1)
        self._round.set(start.round)
        named = {"run": start.run, "task": start.task, "model": start.model, "backend": start.backend}
        self._run.info({**named, "metric": start.metric, "version": start.versions.get("hvd_train", "")})

    def _of_round(self, event: RoundReport) -> None:
        self._samples.inc(event.samples)
        self._epoch.set(event.epoch)
        self._loss.set(event.loss)
        self._lr.set(event.lr)
        self._period.set(event.period)
        if event.drift is not None:
            self._drift.set(event.drift)
        for phase, seconds in event.seconds.items():
            self._seconds.labels(phase).inc(max(0.0, seconds.median))

    def _of_machine(self, event: MachineReport) -> None:
        for rank, host in enumerate(self._host_of_rank):
            self._rss.labels(rank, host).set(event.rss_bytes[rank])
            self._cores.labels(rank, host).set(event.cpu[rank])
            self._throttled.labels(rank, host).set(event.throttled[rank])
        for host, free in zip(self._hosts, event.available_bytes, strict=True):
            self._available.labels(host).set(free)
        if event.sent_bytes is not None:
            self._sent_bytes.inc(max(0, event.sent_bytes - self._sent))
            self._sent = event.sent_bytes

"""The sinks that a configuration asks for. For rank 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hvd_train.config import RecordConfig
from hvd_train.errors import ConfigError, UserError
from hvd_train.io.user_module import load_module
from hvd_train.record.background import Background, Sink, close_all


def make_sinks(config: RecordConfig) -> list[Background]:
    """One recorder for each. Raises `UserError` for what cannot be used; then nothing is left of the
    others."""
    makers: dict[str, Callable[[], Sink]] = {}
    if config.tensorboard:
        from hvd_train.record.tensorboard import TensorBoard

        makers["record.tensorboard"] = TensorBoard
    if config.metrics_port:
        from hvd_train.record.metrics import Metrics

        makers["record.metrics_port"] = partial(Metrics, config.metrics_port, config.metrics_host)
    makers |= {f"record.sinks: {name}": partial(_of_user, name) for name in config.sinks}
    made: list[Background] = []
    try:
        for name, make in makers.items():
            made.append(Background(name, make))
    except BaseException:
        close_all(made)
        raise
    return made


def _of_user(name: str) -> Sink:
    """What the factory `file.py:factory` or `package.module:factory` makes."""
    source, colon, factory_name = name.rpartition(":")
    if not colon or not source:
        raise ConfigError(f"record.sinks: {name!r}: expected file.py:factory or package.module:factory.")
    module = load_module(source, "record.sinks", ConfigError)
    factory: Any = getattr(module, factory_name, None)
    if not callable(factory):
        raise ConfigError(f"record.sinks: {source} has no function {factory_name!r} that makes the sink.")
    try:
        sink = factory()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of the user, or of the library that it uses
        raise ConfigError(f"record.sinks: {name} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(sink, "record", None)):
        raise ConfigError(
            f"record.sinks: {name} gave {sink!r}; expected an object with a method record(event)."
        )
    made: Sink = sink
    return made

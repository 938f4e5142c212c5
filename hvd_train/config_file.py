"""The configuration as TOML and as nested tables: reading, key by key, and writing."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import tomli_w

from hvd_train.config import Config, flatten
from hvd_train.errors import ConfigError
from hvd_train.io.text import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def from_mapping(values: Mapping[str, Any], source: str) -> Config:
    """A `Config` from nested tables.

    Raises `ConfigError` that names `source` and the key, and for an unknown key the nearest known one.
    """
    _check_keys(values, Config, "", source)
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {str(error).replace('`$.', '`')}.") from None


def _check_keys(values: Mapping[str, Any], cls: type, prefix: str, source: str) -> None:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown key `{prefix}{key}`. {_nearest(prefix + key)}")
        section: object = known[key].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: `{prefix}{key}` = {value!r}: expected a table [{prefix}{key}].")
            _check_keys(value, section, f"{prefix}{key}.", source)
        for table in value if isinstance(value, list) else ():
            _check_table(table, cls, key, f"{source}: ", prefix)


def _check_table(table: object, cls: type, key: str, where: str, prefix: str) -> None:
    """Of a list of tables such as [[optim.groups]]."""
    (element, *_) = get_args(get_type_hints(cls)[key]) or (None,)
    if not (isinstance(element, type) and dataclasses.is_dataclass(element)) or not isinstance(
        table, Mapping
    ):
        return
    known = [f.name for f in dataclasses.fields(element)]
    for name in table:
        if name not in known:
            raise ConfigError(
                f"{where}unknown key `{name}` in [[{prefix}{key}]]; expected {', '.join(known)}."
            )


def _nearest(key: str) -> str:
    """Advice for an unknown key: the same name in another section, else the name spelt most like it."""
    keys = list(flatten(Config()))
    leaf = key.rpartition(".")[2]
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    by_path = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    by_leaf = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.6)
    near = same_leaf or by_path or [k for k in keys if k.rpartition(".")[2] in by_leaf]
    return f"Did you mean `{near[0]}`?" if near else "`python -m hvd_train --help` lists the keys."


def flat_values(text: str) -> dict[str, object]:
    """The keys of a configuration's text by their paths, whatever they are. Raises ValueError."""

    def flat(tables: Mapping[str, Any], prefix: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in tables.items():
            path = f"{prefix}{key}"
            found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
        return found

    return flat(tomllib.loads(text), "")


def load_config(path: str | Path) -> Config:
    """Reads a TOML file. Raises `ConfigError` with the file, the key, what was seen and expected."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot read the configuration: {error}. Give --config an existing file."
        ) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    try:
        return from_mapping(values, str(path))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def embedded_config() -> Config:
    """The configuration of the embedded default: the handwritten digits, two shards split by class."""
    return load_config(Path(__file__).parent / "demo" / "digits.toml")


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested tables of plain values; fields that are None are left out, as TOML has no null."""
    table: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            table[f.name] = to_mapping(value)
        elif value is not None:
            table[f.name] = list(map(_plain, value)) if isinstance(value, tuple) else value
    return table


def _plain(value: Any) -> Any:
    return to_mapping(value) if dataclasses.is_dataclass(value) else value


def to_toml(config: Config) -> str:
    """The whole configuration, defaults included, as TOML that `load_config` reads back."""
    return tomli_w.dumps(to_mapping(config))

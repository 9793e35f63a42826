"""Frozen dataclasses out of plain data, with errors that name the field; knows nothing of models."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from typing import Any

T = typing.TypeVar("T")


class ConfigError(ValueError):
    """A field that is unknown, of the wrong type or out of its limits; the message names the field."""


def require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: {message}")


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, name, f"is {value!r}; choose one of {', '.join(allowed)}")


def from_dict(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Builds a dataclass from plain data; unknown fields and wrong types raise :class:`ConfigError`."""
    require(isinstance(values, dict), prefix or cls.__name__, "must be a table")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        require(name in fields, f"{prefix}{name}", f"is not a field; known: {', '.join(fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        require(name in values or not required, f"{prefix}{name}", "is missing")
    return cls(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, f"{name}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, (list, tuple)), name, "must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item, name) for item in value)
    if typing.get_origin(hint) is dict:
        require(isinstance(value, dict), name, "must be a table")
        return {key: _convert(typing.get_args(hint)[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, name, f"must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def parse_override(text: str) -> tuple[str, Any]:
    """``"moe.n_routed_experts=0"`` -> ``("moe.n_routed_experts", 0)``; values are TOML, bare words are strings."""
    key, equals, value = text.partition("=")
    require(bool(equals and key), text, "write key=value")
    try:
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()

"""What every config is: a frozen dataclass whose fields are checked, and that may have a JSON file of its own."""

import json
import os
import reprlib
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from m2f_video.files import parse_json, read_json

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class ConfigError(ValueError):
    """A configuration value that no model can be built from; the message names the field and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with this message unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def check_fields(config: object, requirement: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Check fields of a config by what their values, or all values of a tuple, must be, such as "must be positive".

    Raises:
        ConfigError: for one of them `holds` is not true; the message names it.
    """
    for name in names:
        value = getattr(config, name)
        good = all(map(holds, value)) if isinstance(value, tuple) else holds(value)
        require(good, f"{type(config).__name__}.{name} {requirement}, got {shown(value)}")


def shown(value: object) -> str:
    """A value, whatever its length and depth, as a message can show it."""
    try:
        return f"{_SHORT.repr(value):.60}"
    except ValueError:  # an integer with more digits than Python writes
        return "a number of thousands of digits"


class CheckedConfig:
    """Checks the type of every field of a config, and makes lists tuples, before the config checks their values."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            path = f"{type(self).__name__}.{item.name}"
            object.__setattr__(self, item.name, _convert(hints[item.name], getattr(self, item.name), path))
        self._check()

    def _check(self) -> None: ...


class FileConfig(CheckedConfig):
    """A config that has a JSON file of its own; its `to_dict` and `from_dict` say what is in it."""

    def replace(self, **changes: Any) -> Self:
        """A copy with the given fields changed; it is validated again."""
        return replace(self, **changes)  # type: ignore[type-var]  # subclasses are dataclasses

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only; `from_dict` is its inverse."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from plain containers; fields left out keep their defaults.

        Raises:
            ConfigError: an unknown field or a value of the wrong type; the message names it.
        """
        raise NotImplementedError

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of a file.

        Raises:
            ConfigError: not JSON, or not a valid config.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"the config is not valid JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: a pipe or device, not JSON, or not a valid config; the message names the file.
        """
        try:
            data = read_json(path)
        except ValueError as error:  # which names the file
            raise ConfigError(str(error)) from error
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def differences(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """This config's value and the other's of each field that differs, by dotted name; None where there is none."""
        mine, theirs = flatten(self.to_dict()), flatten(other.to_dict())
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return {name: (mine.get(name), theirs.get(name)) for name in names}


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def build_config(cls: type, data: dict[str, Any], path: str) -> Any:
    """Build dataclass `cls` from plain data, checking names and types; `path` prefixes names in messages."""
    known = {f.name for f in fields(cls)}
    for name in sorted(map(str, data.keys() - known))[:1]:
        raise ConfigError(f"unknown config field {path}{shown(name)[1:-1]}; known: {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    arguments = {name: _convert(hints[name], value, path + name) for name, value in data.items()}
    try:
        return cls(**arguments)
    except TypeError as error:  # a field without default is missing
        raise ConfigError(f"{path or 'config: '}{error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check `value`, as JSON has it, against a field's type and give what the field holds."""
    origin = get_origin(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        if isinstance(value, dict):
            return build_config(hint, value, path + ".")
        matches = isinstance(value, hint)
    elif origin in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        resolved = isinstance(value, str) and all(map(is_dataclass, options))  # "timm:NAME": the config itself reads it
        absent = value is None and type(None) in get_args(hint)
        if absent or resolved or type(value) in options:
            return value
        return _convert(options[0], value, path)
    elif origin is tuple:
        element, *rest = get_args(hint)
        matches = isinstance(value, list | tuple) and (rest == [...] or len(value) == 1 + len(rest))
        if matches:
            return tuple(_convert(element, item, f"{path}[{i}]") for i, item in enumerate(value))
    elif origin is dict:
        matches = isinstance(value, dict)
        if matches:
            of_keys, of_values = get_args(hint)
            return {_convert(of_keys, k, path): _convert(of_values, v, f"{path}.{k!s:.40}") for k, v in value.items()}
    elif origin is Literal:
        matches = value in get_args(hint)
    elif hint is float:
        matches = type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
    else:
        matches = type(value) is hint and (hint is not int or -(2**63) <= value < 2**63)  # exact: true is not an int
    require(matches, f"{path} must be {_type_name(hint)}, got {shown(value)}")
    return float(value) if hint is float else value


def _type_name(hint: Any) -> str:
    if hint is float:
        return "a finite float"
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("typing.", "")

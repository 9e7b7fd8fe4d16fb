"""Which functions a twin does the work of, and whether they are still what it was written for.

A twin that stands for `attention_mask` must step back when somebody edits `attention_mask`: by a patch at run time, or
in the file. So the digests of the source of all such functions are kept beside the twins. After a change,
`python -m m2f_video.acceleration` writes them anew, once the tests say that the twins do what the functions now say.
"""

import inspect
import io
import json
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from torch import nn

FILE = Path(__file__).with_name("written_for.json")

_OURS = ("m2f_video.modeling.", "m2f_video.ops")
_PASSING = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@dataclass(frozen=True)
class Function:
    """A function, or a constant of one: where it is found, its name there, and itself when it was looked up."""

    place: Any  # namespace of a module or class
    name: str
    value: Any
    title: str

    @property
    def is_ours(self) -> bool:
        """Whether it is of this project, and not PyTorch's."""
        return self.title.startswith(_OURS)

    def digest(self) -> str:
        """Of a function's source, or of a number."""
        function = _plain_function(self.value)
        return _hash(repr(self.value)) if function is None else _hash_source(function.__code__)


def functions_of(modules: Iterable[type[nn.Module]], arguments: Iterable[type]) -> list[Function]:
    """What the forwards of modules are made of, and the properties of arguments."""
    found: dict[str, Function] = {}
    for module in modules:
        _add_method(module, "forward", found)
    for kind in arguments:
        for name, value in vars(kind).items():
            if isinstance(value, property):
                _add_method(kind, name, found)
    return list(found.values())


def _add_method(kind: type, name: str, found: dict[str, Function]) -> None:
    """Add a method of a class, and all of ours that it names: methods of the class, functions of its module."""
    base = next((base for base in kind.__mro__ if name in vars(base)), None)
    if base is None:
        return
    title = f"{base.__module__}.{base.__qualname__}.{name}"
    function = _plain_function(vars(base)[name])
    if title in found or not (function is not None or name == "forward" or _is_written_down(title)):
        return
    found[title] = Function(vars(base), name, vars(base)[name], title)
    if base.__module__.startswith(_OURS) and function is not None:
        for other in _names(function.__code__):
            _add_method(kind, other, found)
        _add_functions(function, found)


def _add_functions(function: FunctionType, found: dict[str, Function]) -> None:
    """Add all functions of ours, and constants, that one names, and those that these name.

    They are called by where they are named: what somebody put there instead need not be a function of ours.
    """
    place = function.__globals__
    for name in _names(function.__code__):
        value, title = place.get(name), f"{place['__name__']}.{name}"
        is_ours = isinstance(value, FunctionType) and (value.__module__ or "").startswith(_OURS)
        is_constant = isinstance(value, int | float | str) and not name.startswith("__")
        if title not in found and (is_ours or is_constant or _is_written_down(title)):
            found[title] = Function(place, name, value, title)
            if isinstance(value, FunctionType):
                _add_functions(value, found)


def _is_written_down(title: str) -> bool:
    return title.removeprefix("m2f_video.") in _written_for()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _plain_function(value: Any) -> FunctionType | None:
    """The function behind a method, static method or property; None where there is none of ours."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def changed(function: Function) -> str | None:
    """What is wrong with a function: it is not the one that twins were written for."""
    if not function.is_ours:
        place = getattr(function.value, "__globals__", {}).get("__name__")  # __module__ may be that of what it wraps
        return None if place and function.title.startswith(f"{place}.") else f"{function.title} is patched"
    title = function.title.removeprefix("m2f_video.")
    if _written_for().get(title) != function.digest():
        return f"{title} is not what the twin was written for"
    return None


@cache
def _written_for() -> dict[str, str]:
    digests: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8"))
    return digests


@cache
def _hash_source(code: CodeType) -> str:
    """Of a function's source, without comments, docstrings and layout; empty where there is no source."""
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        return ""
    lines = iter(io.StringIO(inspect.cleandoc("\n" + source)).readline, "")
    words, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type not in _PASSING and not (token.type == tokenize.STRING and before in _PASSING):
            words.append(token.string)
        before = token.type
    return _hash(" ".join(words))


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


def digests(functions: Iterable[Function]) -> dict[str, str]:
    """Of the functions that are ours, as they are now."""
    ours = {function.title.removeprefix("m2f_video."): function for function in functions if function.is_ours}
    return {title: ours[title].digest() for title in sorted(ours)}

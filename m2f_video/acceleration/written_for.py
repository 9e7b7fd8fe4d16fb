"""Which functions a twin does the work of, and whether they are still what it was written for.

A twin that stands for `attention_mask` must step back when somebody edits `attention_mask`: by a patch at run time, or
in the file. So the digests of the source of all such functions are kept beside the twins, and of what they name: other
functions, constants, classes and modules. After a change, `python -m m2f_video.acceleration` writes them anew, once the
tests say that the twins do what the functions now say.
"""

import inspect
import io
import json
import linecache
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

FILE = Path(__file__).with_name("written_for.json")

_OURS = ("m2f_video.modeling.", "m2f_video.ops")
_PASSING = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@dataclass(frozen=True)
class Function:
    """A function, or what one names: where it is found, its name there, and itself when it was looked up."""

    place: Any  # namespace of a module or class
    name: str
    value: Any
    title: str

    @property
    def is_ours(self) -> bool:
        """Whether it is of this project, and not PyTorch's."""
        return self.title.startswith(_OURS)

    @property
    def function(self) -> FunctionType | None:
        """What is behind a method, static or class method or property; None where there is none in Python."""
        return _plain_function(self.value)

    @property
    def code(self) -> CodeType | None:
        """What a function does, which can be exchanged in it."""
        return None if self.function is None else self.function.__code__

    def digest(self) -> str:
        """Of a function's source and the kind of thing it is, a number, or the name of a class or module."""
        if self.code is not None:
            return _hash_source(self.code, type(self.value).__name__)
        if isinstance(self.value, type):
            return _hash(f"{self.value.__module__}.{self.value.__qualname__}")
        return _hash(self.value.__name__ if isinstance(self.value, ModuleType) else repr(self.value))


def functions_of(modules: Iterable[type[nn.Module]], arguments: Iterable[type]) -> list[Function]:
    """What the forwards of modules are made of, and the methods and properties of arguments."""
    found: dict[str, Function] = {}
    for module in modules:
        _add_method(module, "forward", found)
    for kind in arguments:
        prefix = f"{kind.__module__}.{kind.__qualname__}."
        written = {title.removeprefix(prefix) for title in _written_titles() if title.startswith(prefix)}
        own = {name for name, value in vars(kind).items() if _plain_function(value) and not name.startswith("__")}
        for name in sorted(own | written):
            _add_method(kind, name, found)
            found.setdefault(prefix + name, Function(vars(kind), name, vars(kind).get(name), prefix + name))  # gone
    return list(found.values())


def _add_method(kind: type, name: str, found: dict[str, Function]) -> None:
    """Add a method of a class, and all of ours that it names: methods of the class, functions of its module."""
    base = next((base for base in kind.__mro__ if name in vars(base)), None)
    if base is None:
        return
    for heir in kind.__mro__[: kind.__mro__.index(base)]:  # which have it from the base, and may get their own
        absent = f"{heir.__module__}.{heir.__qualname__}.{name}"
        if absent.startswith(_OURS) and base.__module__.startswith(_OURS):
            found.setdefault(absent, Function(vars(heir), name, None, absent))
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
    """Add all functions of ours, constants, classes and modules that one names, and what these functions name.

    They are called by where they are named: what somebody put there instead need not be a function of ours.
    """
    place = function.__globals__
    for name in _names(function.__code__):
        value, title = place.get(name), f"{place['__name__']}.{name}"
        is_ours = isinstance(value, FunctionType) and (value.__module__ or "").startswith(_OURS)
        is_named = isinstance(value, int | float | str | type | ModuleType) and not name.startswith("__")
        if title not in found and (is_ours or is_named or _is_written_down(title)):
            found[title] = Function(place, name, value, title)
            if isinstance(value, FunctionType):
                _add_functions(value, found)


def _is_written_down(title: str) -> bool:
    return title in _written_titles()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _plain_function(value: Any) -> FunctionType | None:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def changed(function: Function) -> str | None:
    """What is wrong with a function: it is not the one that twins were written for."""
    place = getattr(function.function, "__globals__", {}).get("__name__")  # where it finds what it names
    if not function.is_ours:
        return None if place and function.title.startswith(f"{place}.") else f"{function.title} is patched"
    title = function.title.removeprefix("m2f_video.")
    if function.code is not None and not (place or "").startswith(_OURS):
        return f"{title} is a function of {place}"
    if _written_for().get(title) != function.digest():
        return f"{title} is not what the twin was written for"
    return None


@cache
def _written_for() -> dict[str, str]:
    digests: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8"))
    return digests


@cache
def _written_titles() -> frozenset[str]:
    return frozenset(f"m2f_video.{title}" for title in _written_for())


@cache
def _hash_source(code: CodeType, kind: str) -> str:
    """Of a function's source, without comments, docstrings and layout; empty where there is none that made it."""
    try:
        source = inspect.getsource(code)
        if code not in _codes_of(code.co_filename):  # the file was changed after it was imported
            return ""
    except (OSError, TypeError, SyntaxError, ValueError, tokenize.TokenError):  # or is being changed
        return ""
    lines = iter(io.StringIO(inspect.cleandoc("\n" + source)).readline, "")
    words, before = [kind], tokenize.NEWLINE
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type not in _PASSING and not (token.type == tokenize.STRING and before in _PASSING):
            words.append(token.string)
        before = token.type
    return _hash(" ".join(words))


@cache
def _codes_of(file: str) -> frozenset[CodeType]:
    """Of all functions that are in a file now."""
    found, new = set[CodeType](), [compile("".join(linecache.getlines(file)), file, "exec", dont_inherit=True)]
    while new:
        inner = [constant for code in new for constant in code.co_consts if isinstance(constant, CodeType)]
        found.update(inner)
        new = inner
    return frozenset(found)


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


def digests(functions: Iterable[Function]) -> dict[str, str]:
    """Of the functions that are ours, as they are now."""
    ours = {function.title.removeprefix("m2f_video."): function for function in functions if function.is_ours}
    return {title: ours[title].digest() for title in sorted(ours)}

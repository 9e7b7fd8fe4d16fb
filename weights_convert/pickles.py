"""Plain pickles of weights, read without running anything they ask for.

The original checkpoints are pickles of numpy arrays. A pickle is a program: it may name any function of any module.
Here it gets only the stand-ins below, which rebuild arrays and tensors from bytes after checking them, and containers.
Not even numpy's own unpickling code runs.
"""

import io
import math
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from weights_convert.errors import CheckpointError

# What a broken or hostile pickle raises inside the unpickler, beside refused names.
BROKEN_PICKLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
REFUSED = (
    "it asks for {}, and only plain arrays, tensors and containers are read; do not trust this file, or have its state "
    "dict saved alone"
)


class PickledTensor:
    """An array or tensor on its way out of a pickle; ``tensor`` is None until the pickle has given its content."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor | None = None) -> None:
        self.tensor = tensor

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Fill in the content as numpy's ndarray pickles it."""
        _version, shape, dtype, fortran, raw = state
        self.tensor = _tensor(raw, dtype, shape, "F" if fortran else "C")


class _PickledDtype:
    """A numpy dtype: booleans, integers and floats only, so neither objects nor records."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: str, _align: object = None, _copy: object = None) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"[biuf][1248]", spec):
            raise CheckpointError(f"it holds an array of type {spec!r}; only numbers can be weights")
        self.spec, self.order = spec, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise CheckpointError(f"it holds an array of byte order {order!r}; the file is damaged")
        self.order = order


class _PickledDict(dict[Any, Any]):
    """An OrderedDict; the attributes some pickles hang on it (``_metadata``) are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


class _StandIn:
    """What the pickle gets for a name: it can be called and nothing else, so no state can be set on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise CheckpointError("it tries to change the functions that read it; do not trust this file")


def _tensor(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> torch.Tensor:
    if not isinstance(dtype, _PickledDtype):
        raise CheckpointError("it holds an array without a proper type; the file is damaged")
    data = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
    kind = np.dtype(dtype.spec).newbyteorder(dtype.order)  # type: ignore[arg-type]
    if not isinstance(data, bytes) or len(data) != kind.itemsize * math.prod(shape):
        raise CheckpointError(f"it holds too few or too many bytes for an array of shape {shape}; the file is damaged")
    array: np.ndarray = np.ndarray(shape, kind, buffer=data, order=order)
    return torch.from_numpy(np.array(array, dtype=dtype.spec, order="C"))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise CheckpointError(f"it encodes text as {encoding!r}; the file is damaged")
    return text.encode("latin1")


def _storage(data: bytes) -> PickledTensor:
    """A torch storage inside a plain pickle is a small torch file of its own."""
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise CheckpointError("it holds a torch storage that is none; the file is damaged")
    return PickledTensor(torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage))


def _strided(storage: PickledTensor, offset: int, size: Any, stride: Any, *_flags: object) -> PickledTensor:
    if storage.tensor is None:
        raise CheckpointError("it holds a tensor without content; the file is damaged")
    return PickledTensor(torch.as_strided(storage.tensor, size, stride, offset))  # checks the bounds


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): PickledTensor,
    ("numpy", "dtype"): _PickledDtype,
    ("collections", "OrderedDict"): _PickledDict,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _strided,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_flags: tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = lambda _type, _shape, _code: PickledTensor()
    _ALLOWED[_core + ".multiarray", "scalar"] = lambda dtype, raw: PickledTensor(_tensor(raw, dtype, ()))
    _ALLOWED[_core + ".numeric", "_frombuffer"] = lambda *args: PickledTensor(_tensor(*args))
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    _ALLOWED[_builtins, "set"] = set
    _ALLOWED[_builtins, "frozenset"] = frozenset
    _ALLOWED[_builtins, "bytes"] = lambda: b""  # the empty one, in protocols before 3


class _RestrictedUnpickler(pickle._Unpickler):
    """In Python, because the one in C allocates whatever a few hostile bytes ask for: lengths, places in its memo."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    read: Callable[[int], bytes]
    append: Callable[[object], None]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(REFUSED.format(f"{module}.{name}"))
        return _StandIn(_ALLOWED[module, name])

    def load_bytearray8(self) -> None:
        self.append(self.read(*struct.unpack("<Q", self.read(8))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def load_pickle(data: bytes) -> object:
    """Read a plain pickle (not a torch.save file) of arrays, tensors and containers.

    Args:
        data: The content of the file.

    Returns:
        What was pickled, with a `PickledTensor` for every array and tensor.

    Raises:
        CheckpointError: If the pickle names anything else, holds object arrays, or is truncated or damaged.
    """
    try:
        return _RestrictedUnpickler(io.BytesIO(data), encoding="latin1").load()
    except CheckpointError:
        raise
    except BROKEN_PICKLE as error:
        raise CheckpointError(f"it is a truncated or damaged pickle ({error}); fetch it again") from error

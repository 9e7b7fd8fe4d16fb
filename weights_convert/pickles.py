"""Pickles of weights, read without running anything they ask for.

The original checkpoints are pickles of numpy arrays, and a torch.save file has a pickle inside. A pickle is a program:
it may name any function of any module, and a few bytes of it may ask for much memory or time. Here it gets only the
stand-ins below, which rebuild arrays and tensors from bytes after checking them, and containers. Not even numpy's own
unpickling code runs. Keys are texts or small integers, so that nothing deep is ever hashed; steps, what is given to
functions, and nesting are bounded.
"""

import math
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

from weights_convert.bounds import MAX_VALUES, TOO_LARGE, all_values
from weights_convert.errors import CheckpointError

# What a broken or hostile pickle raises inside the unpickler, beside refused names.
BROKEN_PICKLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_STEPS_OF_A_CALL = 20  # which takes as long
_MAX_LINE = 1 << 28  # bytes; protocol 0 writes an array as a line
_MAX_DIMENSIONS = 32


@dataclass(slots=True, eq=False)
class PickledTensor:
    """An array on its way out of a pickle; ``tensor`` is None until the pickle has given its content."""

    tensor: torch.Tensor | None = None

    def set_state(self, state: Any) -> None:
        """Fill in the content as numpy's ndarray pickles it."""
        _version, shape, dtype, fortran, raw = _parts(state)
        self.tensor = _array(raw, dtype, shape, "F" if fortran else "C").tensor


class PickledStorage:
    """The memory of tensors.

    Attributes:
        dtype: Of its numbers; what has no dtype of its own is bytes.
        data: Its bytes, of shape (bytes,).
    """

    __slots__ = ("data", "dtype")

    def __init__(self, dtype: torch.dtype, count: Any) -> None:
        self.dtype = dtype
        self.data: np.ndarray = np.empty(count * dtype.itemsize, dtype=np.uint8)


@dataclass(slots=True, eq=False)
class UnreadTensor:
    """A tensor of a kind that weights never are, which the pickle may hold beside them."""

    kind: str


class _PickledDtype:
    """A numpy dtype: booleans, integers and floats only, so neither objects nor records."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: Any, _align: object = None, _copy: object = None) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"[biuf][1248]", spec):
            shown = repr(spec[:20]) if isinstance(spec, str) else type(spec).__name__
            raise CheckpointError(
                f"it holds an array of type {shown}; only numbers are read: have its weights saved alone"
            )
        self.spec, self.order = spec, "="

    def set_state(self, state: Any) -> None:
        order = _parts(state)[1]
        if not isinstance(order, str) or order not in ("<", ">", "|", "="):
            raise CheckpointError("it holds an array of an unknown byte order; the file is damaged")
        self.order = order


class _PickledDict(dict[Any, Any]):
    """An OrderedDict, defaultdict or Counter; the attributes some pickles hang on it (``_metadata``) are dropped."""

    def __init__(self, items: Any = ()) -> None:
        _put(self, items.items() if isinstance(items, dict) else _parts(items))


@dataclass(slots=True, eq=False)
class _StandIn:
    """What the pickle gets for a name: it can be called and nothing else, so no state can be set on it."""

    function: Callable[..., Any]


def _parts(values: Any) -> list[Any]:
    """The parts of a container; a tensor is none, and may claim any number of parts."""
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise CheckpointError(f"it takes a {type(values).__name__} apart; the file is damaged")
    return list(values)


def _check_hashed(values: Iterable[Any], kinds: tuple[type, ...], refusal: str) -> None:
    """Refuse what may take for ever to hash: all but None, small integers and these kinds."""
    for value in values:
        if not (value is None or type(value) in kinds or (type(value) is int and value.bit_length() <= 64)):
            raise CheckpointError(f"it has a {type(value).__name__} {refusal}")


def _put(target: Any, items: Iterable[Any]) -> None:
    """Set items of a dictionary."""
    for key, value in items:
        _check_hashed((key,), (str, bool), "as a key; only texts and small integers are read as keys")
        dict.__setitem__(target, key, value)


def _members(values: Any = ()) -> set[Any]:
    members = _parts(values)
    _check_hashed(members, (str, bytes, bool, float), "in a set; only texts and numbers are read there")
    return set(members)


def _sizes(values: Any) -> tuple[int, ...]:
    """A shape or strides, of as many dimensions as a tensor may have and of numbers that are quick to multiply."""
    if (
        not isinstance(values, tuple)
        or len(values) > _MAX_DIMENSIONS
        or not all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    ):
        raise CheckpointError("it holds a tensor of an impossible shape; the file is damaged")
    return values


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> PickledTensor:
    if not isinstance(dtype, _PickledDtype):
        raise CheckpointError("it holds an array without a proper type; the file is damaged")
    data = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
    kind = np.dtype(dtype.spec).newbyteorder(dtype.order)  # type: ignore[arg-type]
    shape = _sizes(shape)
    if not isinstance(data, bytes) or len(data) != kind.itemsize * math.prod(shape):
        raise CheckpointError(
            f"it holds too few or too many bytes for an array of shape {shape!s:.60}; the file is damaged"
        )
    array: np.ndarray = np.ndarray(shape, kind, buffer=data, order=order)
    return PickledTensor(torch.from_numpy(np.array(array, dtype=dtype.spec, order="C")))


def _encode(text: str, encoding: Any = "latin1") -> bytes:
    if not isinstance(encoding, str) or encoding not in ("latin1", "latin-1"):
        shown = repr(encoding[:20]) if isinstance(encoding, str) else type(encoding).__name__
        raise CheckpointError(f"it encodes text as {shown}; the file is damaged")
    return text.encode("latin1")


def _strided(
    storage: Any, offset: Any, size: Any, stride: Any, _gradient: Any = None, _hooks: Any = None, *others: Any
) -> torch.Tensor | UnreadTensor:
    """A tensor; the others are its dtype, where that is not the storage's, and the marks of a view."""
    if not isinstance(storage, PickledStorage):
        raise CheckpointError("it holds a tensor without content; the file is damaged")
    if any(other for other in others if not isinstance(other, torch.dtype)):
        return UnreadTensor("conjugate or negative view")
    dtype = next((other for other in others if isinstance(other, torch.dtype)), storage.dtype)
    flat = torch.empty(0, dtype=dtype).set_(torch.from_numpy(storage.data).untyped_storage())
    return torch.as_strided(flat, _sizes(size), _sizes(stride), *_sizes((offset,)))  # checks the bounds


def _of_type(function: Any, _type: object, args: Any, _state: object) -> Any:
    """A tensor with attributes; classes of tensors other than PyTorch's own are refused by their names."""
    if not isinstance(function, _StandIn) or function.function is not _strided:
        return UnreadTensor("subclass")
    return _strided(*_parts(args))


def _never(*_args: object) -> Any:
    raise CheckpointError("it makes a tensor out of nothing; do not trust this file")


def _unread(kind: str) -> Callable[..., UnreadTensor]:
    return lambda *_args: UnreadTensor(kind)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): lambda *_args: PickledTensor(),
    ("numpy", "dtype"): _PickledDtype,
    ("collections", "OrderedDict"): _PickledDict,
    ("collections", "Counter"): _PickledDict,
    ("collections", "defaultdict"): lambda *_factory: _PickledDict(),
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): lambda sizes=(): _sizes(sizes),
    ("torch", "device"): lambda *_name: None,
    ("torch", "Tensor"): _never,
    ("torch.nn.parameter", "Parameter"): _never,
    ("torch._utils", "_rebuild_tensor"): _strided,
    ("torch._utils", "_rebuild_tensor_v2"): _strided,
    ("torch._utils", "_rebuild_tensor_v3"): _strided,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_flags: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_flags: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch._utils", "_rebuild_sparse_tensor"): _unread("sparse"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unread("meta"),
    ("torch._utils", "_rebuild_qtensor"): _unread("quantized"),
    ("torch._utils", "_rebuild_nested_tensor"): _unread("nested"),
    ("torch.serialization", "_get_layout"): lambda *_name: None,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = lambda _type, _shape, _code: PickledTensor()
    _ALLOWED[_core + ".multiarray", "scalar"] = lambda dtype, raw: _array(raw, dtype, ())
    _ALLOWED[_core + ".numeric", "_frombuffer"] = _array
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    _ALLOWED[_builtins, "set"] = _members
    _ALLOWED[_builtins, "frozenset"] = lambda values=(): frozenset(_members(values))
    _ALLOWED[_builtins, "bytes"] = lambda: b""  # the empty one, in protocols before 3
    _ALLOWED[_builtins, "bytearray"] = lambda data=b"", *_encoding: data
    _ALLOWED[_builtins, "complex"] = complex
    for _factory in ("bool", "dict", "float", "int", "list", "long", "str", "tuple", "unicode"):  # of a defaultdict
        _ALLOWED[_builtins, _factory] = _never

_STORAGES = {
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "QInt32": torch.int32,  # no quantized tensor is built, whose storages these are
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "Short": torch.int16,
}
# What a pickle names and can do nothing with: dtypes and the like, and storages, which stand for their dtypes.
_CONSTANTS: dict[tuple[str, str], Any] = {
    **{("torch", name + "Storage"): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype | torch.qscheme | torch.layout | torch.memory_format)
    },
}


FindStorage = Callable[[torch.dtype, str, int], PickledStorage]
LoadStorage = Callable[[bytes], PickledStorage]


class _Bounded:
    """A file that says at once when it holds less than what is asked for: a few bytes may ask for any length."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def readline(self) -> bytes:
        line = self.file.readline(_MAX_LINE)
        if len(line) == _MAX_LINE:
            raise CheckpointError(TOO_LARGE)
        return line

    def read(self, count: int) -> bytes:
        if count > 1 << 16 and count > self.size - self.file.tell():
            raise EOFError("it ends too early")
        return self.file.read(count)


class _RestrictedUnpickler(pickle._Unpickler):
    """In Python, because the one in C allocates whatever a few hostile bytes ask for, such as places in its memo."""

    dispatch: ClassVar[dict[int, Any]] = {}
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, file: BinaryIO, size: int, find_storage: FindStorage | None, load_storage: LoadStorage | None
    ) -> None:
        super().__init__(_Bounded(file, size), encoding="latin1")
        self._find_storage, self._load_storage = find_storage, load_storage
        self._steps_left = MAX_VALUES
        self._content_left = 4 * size + 1000  # protocol 2 gives the bytes of an array to two functions

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONSTANTS:
            return _CONSTANTS[module, name]
        if (module, name) == ("torch.storage", "_load_from_bytes") and self._load_storage:
            return _StandIn(self._load_storage)
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"it asks for {f'{module}.{name}':.80}, and only plain arrays, tensors and containers are read; "
                "do not trust this file, or have its state dict saved alone"
            )
        return _StandIn(_ALLOWED[module, name])

    def persistent_load(self, pid: Any) -> Any:
        """Give the storage that a tensor of a torch file names."""
        kind, dtype, key, _device, count, *view = _parts(pid)
        if (
            self._find_storage is None
            or not (isinstance(kind, str) and kind == "storage" and isinstance(dtype, torch.dtype))
            or not (isinstance(key, str) and type(count) is int and count >= 0)
            or any(part is not None for part in view)
        ):
            raise CheckpointError("it names content that it does not hold; the file is damaged")
        return self._find_storage(dtype, key, count)

    def step(self, count: int = 1) -> None:
        self._steps_left -= count
        if self._steps_left < 0:
            raise CheckpointError(TOO_LARGE)

    def spend(self, values: Any) -> None:
        """Count what a function is given: the same bytes given again and again would take any memory and time."""
        if not isinstance(values, tuple) or len(values) > 10:  # more than any function takes
            raise CheckpointError("it gives a function something else than arguments; the file is damaged")
        for value in values:
            if isinstance(value, (str, bytes, tuple, list, dict, set, frozenset)):
                self._content_left -= len(value)
        if self._content_left < 0:
            raise CheckpointError("it makes more of its content than it holds; do not trust this file")

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _StandIn):
            raise CheckpointError("it calls what is no function; the file is damaged")
        self.step(_STEPS_OF_A_CALL)
        self.spend(args)
        self.append(function.function(*args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledTensor | _PickledDtype):
            self.spend(state)
            target.set_state(state)
        elif not isinstance(target, _PickledDict):  # whose attributes are of no use here
            raise CheckpointError("it tries to change the functions that read it; do not trust this file")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put([key, value])

    def load_setitems(self) -> None:
        self.put(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.put(items)

    def load_append(self) -> None:
        value = self.stack.pop()
        self.target(list).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        self.target(list).extend(values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        self.target(set).update(_members(values))

    def load_frozenset(self) -> None:
        values = self.pop_mark()  # which changes what is appended to
        self.append(frozenset(_members(values)))

    def load_bytearray8(self) -> None:
        self.append(self.read(*struct.unpack("<Q", self.read(8))))

    def load_object(self) -> None:
        """Refuse what makes an object without calling a function: nothing that is read here is made so."""
        raise pickle.UnpicklingError("it makes an object of a class")

    load_inst = load_obj = load_newobj = load_newobj_ex = load_ext1 = load_ext2 = load_ext4 = load_object

    def put(self, items: list[Any]) -> None:
        """Set items of a dictionary: keys and values in turn."""
        _put(self.target(dict), zip(items[::2], items[1::2], strict=True))

    def target(self, kind: type) -> Any:
        """The container that the next values go into."""
        if not isinstance(self.stack[-1], kind):
            raise CheckpointError(f"it adds to a {type(self.stack[-1]).__name__}; the file is damaged")
        return self.stack[-1]


def _counted(load: Callable[[_RestrictedUnpickler], None]) -> Callable[[_RestrictedUnpickler], None]:
    def load_counted(unpickler: _RestrictedUnpickler) -> None:
        unpickler.step()
        load(unpickler)

    return load_counted


for _code, _load in pickle._Unpickler.dispatch.items():
    _RestrictedUnpickler.dispatch[_code] = _counted(getattr(_RestrictedUnpickler, _load.__name__))


def load_pickle(
    file: BinaryIO, size: int, find_storage: FindStorage | None = None, load_storage: LoadStorage | None = None
) -> object:
    """Read one pickle of arrays, tensors and containers; the file is left after it.

    Args:
        file: Open where the pickle begins.
        size: Of the file in bytes.
        find_storage: Gives the content of a tensor in a torch file, by its dtype, name and number of values.
        load_storage: Gives the content of a tensor in a plain pickle, where it is a small torch file of its own.

    Returns:
        What was pickled, with a `PickledTensor` for every array and an `UnreadTensor` for every tensor of a kind that
        weights never are. Containers nest at most 50 deep and never within themselves.

    Raises:
        CheckpointError: If the pickle names anything else, holds object arrays, is truncated or damaged, or too large.
        MemoryError: If the content does not fit.
    """
    try:
        content = _RestrictedUnpickler(file, size, find_storage, load_storage).load()
    except CheckpointError:
        raise
    except BROKEN_PICKLE as error:
        raise CheckpointError(f"it is a truncated or damaged pickle ({error!s:.80}); fetch it again") from error
    for value in all_values(content):
        if isinstance(value, int) and value.bit_length() > 1024:
            raise CheckpointError("it holds a number of more than 1024 bits; do not trust this file")
    return content

"""Kernels in C++ for inference on a CPU, compiled for the machine when they are first asked for.

They do what PyTorch's operators would do in several passes over tensors that fit no cache. Each has a way in PyTorch
beside it, which is what runs where the kernels were not asked for, cannot be compiled, or do not know the inputs.
`prepare_for_inference` asks for them.

The compiled library is kept in a folder `m2f_video` of TORCH_EXTENSIONS_DIR, by default `~/.cache/torch_extensions`,
under a name that stands for sources, flags, compiler and instruction set. CXX names another compiler than g++.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from m2f_video.files import atomic_path
from m2f_video.ops.conditions import only_values

SOURCES = Path(__file__).with_name("csrc")
FLAGS = (
    *("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
DTYPES = (torch.float32, torch.bfloat16)
"""That the kernels know, in the order of their numbers in C++."""


class KernelError(RuntimeError):
    """The kernels cannot be compiled, kept or loaded."""


def why_no_kernels() -> str | None:
    """Why the kernels cannot be compiled here; None where nothing speaks against it."""
    if not sys.platform.startswith("linux"):
        return f"they are for Linux, this is {sys.platform}"
    try:
        command = _compiler()
    except ValueError as error:
        return f"CXX is no command: {error}"
    if shutil.which(command[0]) is None:
        return f"there is no C++ compiler {command[0]!r}; install g++, or name another in CXX"
    return None


def load() -> None:
    """Compile the kernels, where that was not done before, and load them.

    Raises:
        KernelError: they cannot be compiled; the message says why.
    """
    _library()


def runs(*tensors: Tensor | None) -> bool:
    """Whether the kernels know these inputs: of one dtype of `DTYPES` on a CPU, without derivatives or tracing."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    if dtype not in DTYPES or any(tensor.device.type != "cpu" or tensor.dtype != dtype for tensor in given):
        return False
    if not only_values(*given):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None:
        return False  # what records operators or works on tensors without memory
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in given)


def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether the kernels' own matrix products of this type are made for this machine's instructions."""
    return bool(_library().fast_products(ctypes.c_int64(DTYPES.index(dtype))))


def call(name: str, like: Tensor, *args: Tensor | float | None) -> None:
    """Call a kernel.

    Args:
        name: of it.
        like: whose dtype its tensors have that differ in it.
        args: in its order: contiguous tensors, numbers as its signature has them (int is int64, float is float), and
            None for a null pointer. Number of the dtype and of threads go before them.
    """
    values: list[object] = [ctypes.c_int64(DTYPES.index(like.dtype)), ctypes.c_int64(torch.get_num_threads())]
    for arg in args:
        if isinstance(arg, Tensor):
            if not arg.is_contiguous() or arg.device.type != "cpu" or type(arg) not in (Tensor, nn.Parameter):
                raise ValueError(
                    f"kernel {name} takes contiguous tensors on a CPU, got a {type(arg).__name__} with strides "
                    f"{arg.stride()} on {arg.device}"
                )
            values.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, float):
            values.append(ctypes.c_float(arg))
        else:
            values.append(ctypes.c_void_p() if arg is None else ctypes.c_int64(arg))
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    with record_function(f"m2f_video::{name}") if profiled else nullcontext():
        getattr(_library(), name)(*values)


@cache
def _library() -> ctypes.CDLL:
    if reason := why_no_kernels():
        raise KernelError(f"the kernels for a CPU cannot be compiled: {reason}; or prepare with compile='none'")
    sources = sorted(SOURCES.glob("*.cpp"))
    digest = hashlib.sha256(repr((*_compiler(), *FLAGS)).encode())
    for file in (*sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(file.read_bytes())
    # what the compiler defines names its version and all instruction sets of this machine
    digest.update(_run("-march=native", "-dM", "-E", "-x", "c++", os.devnull).encode())
    path = folder() / f"kernels-{digest.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                _run(*FLAGS, *map(str, sources), "-o", str(temporary))
                with temporary.open("rb") as compiled:  # so that a power cut leaves no file that is cut off
                    os.fsync(compiled.fileno())
        for place in (path.parent, path):
            status = place.stat()
            if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o002:
                raise KernelError(f"{place} is not loaded from: others could have written it; remove it")
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"the kernels for a CPU cannot be kept or loaded: {error}; name another folder in TORCH_EXTENSIONS_DIR"
        ) from error


def folder() -> Path:
    """Where the compiled library is kept."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen) / "m2f_video"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions" / "m2f_video"


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++") or ["g++"]


def _run(*args: str) -> str:
    """Standard output of the compiler."""
    command = [*_compiler(), *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # the user's own
    if result.returncode:
        message = "\n".join(result.stderr.splitlines()[:20])
        raise KernelError(f"the kernels for a CPU do not compile: {shlex.join(command)}\n{message}")
    return result.stdout

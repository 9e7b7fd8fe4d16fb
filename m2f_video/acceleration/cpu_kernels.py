"""Kernels in C++ for inference on a CPU, compiled for the machine when they are first asked for.

They do what PyTorch's operators would do in several passes over tensors that fit no cache. Each has a way in PyTorch
beside it, which is what runs where the kernels were not asked for, cannot be compiled, or do not know the inputs.
`prepare_for_inference` asks for them.

The compiled library is kept in a folder `m2f_video` of TORCH_EXTENSIONS_DIR, by default `~/.cache/torch_extensions`,
under a name that stands for sources, flags, compiler and instruction set. CXX names another compiler than g++.

What is kept ends in a SHA-256 of it and its name: a library that was cut off, changed or exchanged is compiled again.
It is read once and loaded from memory, so that nothing becomes of it when the file does; and it is not looked for in
folders that other users can write to.
"""

import ctypes
import hashlib
import logging
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from m2f_video.files import atomic_path, special_kind

SOURCES = Path(__file__).with_name("csrc")
FLAGS = (
    *("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
DTYPES = (torch.float32, torch.bfloat16)
"""That the kernels know, in the order of their numbers in C++."""

_LOGGER = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size
_EXPORTED = re.compile(r"^EXPORT \w+ (\w+)\(", re.MULTILINE)


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
        return f"there is no C++ compiler {command[0]!r:.100}; install g++, or name another in CXX"
    try:
        folder()
    except KernelError as error:
        return str(error)
    return None


def load() -> None:
    """Compile the kernels, where that was not done before, and load them.

    Raises:
        KernelError: they cannot be compiled; the message says why.
    """
    _library()


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
        path = Path(os.path.realpath(path.parent), path.name)  # links that are followed later might be others by then
        _check_folders(path.parent)
        library = _read_kept(path)
        if library is None:
            _make_folders(path.parent)
            _LOGGER.warning("m2f-video: compiling kernels for this processor, once: up to 10 seconds")
            library = _compile(sources)
            _keep(library, path)
        return _load(library, path, sources)
    except OSError as error:
        raise KernelError(
            f"the kernels for a CPU cannot be kept or loaded: {error}; name another folder in TORCH_EXTENSIONS_DIR"
        ) from error


def folder() -> Path:
    """Where the compiled library is kept.

    Raises:
        KernelError: nowhere: the user has no home.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen) / "m2f_video"
    try:
        cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # neither HOME nor the system names one
        raise KernelError(
            "there is no home folder to keep compiled kernels in; name a folder in TORCH_EXTENSIONS_DIR"
        ) from error
    return cache_folder / "torch_extensions" / "m2f_video"


def _check_folders(innermost: Path) -> None:
    """Refuse to load from where other users could put a library: all folders up to the root have to be ours or root's.

    In a folder with the sticky bit, as /tmp has it, others cannot touch what is ours.

    Raises:
        KernelError: one of them is not; the message names it.
    """
    for directory in (innermost, *innermost.parents):
        try:
            status = directory.stat()
        except FileNotFoundError:  # it is made later, by us
            continue
        if status.st_uid not in (os.getuid(), 0):
            raise KernelError(
                f"{directory} is not loaded from, as it belongs to another user; name another folder in "
                "TORCH_EXTENSIONS_DIR"
            )
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise KernelError(
                f"{directory} is not loaded from, as other users can write to it; chmod go-w it, or name another "
                "folder in TORCH_EXTENSIONS_DIR"
            )


def _make_folders(innermost: Path) -> None:
    """Make a folder and its parents for the user alone, whatever the umask."""
    for directory in (*reversed(innermost.parents), innermost):
        if not directory.is_dir():
            directory.mkdir(mode=0o700, exist_ok=True)


def _read_kept(path: Path) -> bytes | None:
    """The library that was kept; None where there is none that is whole and nobody else can have written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it is not there, or a link: what is compiled takes its place, or says what is wrong
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
        os.close(descriptor)
        return None
    with open(descriptor, "rb") as file:
        content = file.read()
    library, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return library if _digest(library, path) == digest else None


def _compile(sources: list[Path]) -> bytes:
    with TemporaryDirectory(prefix="m2f_video-") as directory:  # linkers replace their output, and any lock on it
        output = Path(directory) / "kernels.so"
        _run(*FLAGS, *map(str, sources), "-o", str(output))
        return output.read_bytes()


def _keep(library: bytes, path: Path) -> None:
    if special_kind(path):  # in a folder that is ours alone, so that nobody reads from it
        path.unlink()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(library + _digest(library, path))
        file.flush()
        os.fsync(file.fileno())  # so that a power cut leaves no file that is cut off


def _digest(library: bytes, path: Path) -> bytes:
    return hashlib.sha256(path.name.encode() + library).digest()


def _load(library: bytes, path: Path, sources: list[Path]) -> ctypes.CDLL:
    """Load a library from memory, where nobody can cut it off while it runs."""
    descriptor = os.memfd_create(path.name)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(library)
        loaded = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError as error:
        os.close(descriptor)
        raise OSError(f"{path}: {error}") from error
    # It stays open: another library that got its number would be taken for this one, as the linker goes by the name.
    names = [name for file in sources for name in _EXPORTED.findall(file.read_text(encoding="utf-8"))]
    if missing := [name for name in names if not hasattr(loaded, name)]:
        raise KernelError(f"the compiled kernels are not whole, they have no {missing[0]}; remove {path}")
    return loaded


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++") or ["g++"]


def _run(*args: str) -> str:
    """Standard output of the compiler."""
    command = [*_compiler(), *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # the user's own
    if result.returncode:
        said = result.stderr.replace(f"{SOURCES}/", "").splitlines()
        reason = next((line for line in said if "error" in line), f"it ends with {result.returncode}")
        error = KernelError(f"the kernels for a CPU do not compile: {command[0]:.60}: {reason:.150}")
        error.add_note(shlex.join(command) + "\n" + "\n".join(said[:20]))
        raise error
    return result.stdout

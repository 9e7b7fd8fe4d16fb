"""Files: read as what they are or refused in one line, and written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_SPECIAL: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_LONGEST_NAME = 240  # bytes; file systems take 255
# What may be a number that neither int64 nor float64 holds; inside of texts it costs time, and nothing else.
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
_LARGE_EXPONENT = re.compile(rb"[0-9.][eE]\+?[0-9]{3}")


def special_kind(path: str | os.PathLike[str]) -> str | None:
    """What a path is that is neither a regular file nor a folder, such as "a named pipe"; None where it is one.

    Opening such a thing may block for ever, so that files from outside are asked for this first.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # missing, or no path at all: opening it says so
        return None
    return next((kind for is_kind, kind in _SPECIAL if is_kind(mode)), None)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse pipes, sockets and devices, whose reading may block for ever.

    Raises:
        ValueError: the path is one.
    """
    if kind := special_kind(path):
        raise ValueError(f"{path} is {kind}, not a regular file; copy its content to a file first")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file as `parse_json` does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pipe or device, or no JSON; the message names the file.
        OSError: it cannot be read.
    """
    check_regular(path)
    content = Path(path).read_bytes()
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file, or cut off: {error}") from error


def parse_json(content: bytes | str) -> Any:
    """Parse JSON from a stranger: numbers fit into int64 or float64, and nesting is bounded.

    Raises:
        ValueError: it is no JSON, nests too deeply, or holds a number out of range.
    """
    digits = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if b"\0" in digits:  # UTF-16 or 32
        digits = digits.replace(b"\0", b"")
    long = _LONG_INTEGER.search(digits) is not None
    try:
        return json.loads(
            content,
            parse_int=_integer if long else None,
            parse_float=_float if long or _LARGE_EXPONENT.search(digits) else None,
        )
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Refuse what must not make place for a file that is to be written: folders, pipes, sockets and devices.

    Raises:
        IsADirectoryError: the path is a folder.
        ValueError: it is a pipe, a socket or a device.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, and a file of that name is to be written; move it away")
    if kind := special_kind(path):
        raise ValueError(f"{path} is {kind}; name a regular file to write to")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the system that names no file, as a full disk does, name this one."""
    with _renaming(None, path):
        yield


@contextlib.contextmanager
def _renaming(temporary: Path | None, path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error that names a temporary file, or none, name the one that it stands for."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary), f"file:{temporary}"):
            raise
        remedy = "; free some or write elsewhere" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(error.errno, f"{os.strerror(error.errno)}{remedy}", str(path)) from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of an empty temporary file beside `path`, renamed to `path` on success, removed on any exception.

    The suffix is kept, so that writers which go by it choose the same format. What writers of `path` have left there
    that were killed is removed first.

    Raises:
        IsADirectoryError: there is a folder of that name.
        ValueError: there is a pipe or device of that name.
        OSError: the file cannot be written.
    """
    final = Path(path)
    check_replaceable(final)
    remove_leftovers(final)
    temporary = _temporary(final)
    try:
        with _renaming(temporary, final), _held(temporary, os.O_CREAT):
            yield temporary
            os.replace(temporary, final)  # while it is held: another writer would take it for a leftover
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file, and its name in its folder, on the disk, so that they outlast a power cut.

    Raises:
        OSError: it cannot be written.
    """
    for place, flags in ((path, os.O_RDWR), (path.parent, os.O_RDONLY)):
        if place.is_dir() and os.name == "nt":  # where folders cannot be opened
            continue
        descriptor = os.open(place, flags)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if place == path or error.errno != errno.EINVAL:  # a file system that syncs no folders
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside `path`, renamed to `path` on success and removed on any exception.

    Raises:
        FileExistsError: `path` is a file, or a folder with something in it.
        OSError: the folder cannot be written.
    """
    final = Path(path)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise FileExistsError(f"{final}: it exists already; remove it or name another folder")
    with made_directory(final.absolute().parent), temporary_folder(final) as temporary:
        yield temporary
        os.replace(temporary, final)


@contextlib.contextmanager
def temporary_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder beside `path`, named after it; what is still there when the block ends is removed.

    What writers of `path` have left there that were killed is removed first.

    Raises:
        OSError: the folder cannot be made.
    """
    final = Path(path).absolute()
    remove_leftovers(final)
    temporary = _temporary(final)
    temporary.mkdir()
    try:
        with _renaming(temporary, path), _held(temporary):
            yield temporary
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


@contextlib.contextmanager
def made_directory(directory: Path) -> Iterator[Path]:
    """Make a directory and its parents; on an exception remove again those that were made."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
    except BaseException:
        for path in missing:  # the innermost first
            with contextlib.suppress(OSError):  # someone else has written there meanwhile: it stays
                path.rmdir()
        raise


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, made where missing and removed at the end; when the process dies, the system lets go of it.

    It excludes processes on one machine, and on several where their file system shares its locks: NFS does (version 3
    with lockd running; when a machine dies, its locks end with its lease), Lustre where it is mounted with `flock`.
    Where there are no locks, a warning says so, and it counts as held.

    Args:
        path: of the file, in a folder that is there.
        wait: until it is free.

    Yields:
        Whether it is held, and not by another process.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    is_mine = True
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        is_mine = False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{path.parent} cannot be locked: let no second run write there ({error.strerror})", stacklevel=4)
    if not is_mine:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # Windows lets nobody remove what is open
            path.unlink()  # while it is locked: who has it open will look for a new one
        lock.release()


def remove_leftovers(final: Path) -> None:
    """Remove what writers of `final` that were killed have left beside it.

    Those that are at work hold a lock, and what they write stays; so does everything where there are no such locks.
    """
    stem, suffix = _parts(final)
    name = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}{re.escape(suffix)}")
    with contextlib.suppress(OSError):  # no such folder, or not ours to look into: then there is nothing to remove
        for path in list(final.parent.iterdir()):
            if name.fullmatch(path.name) and not path.is_symlink() and special_kind(path) is None and _is_free(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _temporary(final: Path) -> Path:
    stem, suffix = _parts(final)
    return final.with_name(f".{stem}.{uuid.uuid4().hex[:8]}{suffix}")


def _parts(final: Path) -> tuple[str, str]:
    """What the name of a temporary file begins and ends with: that of the final one, unless it would be too long."""
    if len(os.fsencode(final.name)) <= _LONGEST_NAME:
        return final.stem, final.suffix
    suffix = final.suffix if len(os.fsencode(final.suffix)) < 20 else ""
    return hashlib.sha256(os.fsencode(final.name)).hexdigest(), suffix


@contextlib.contextmanager
def _held(path: Path, flags: int = 0) -> Iterator[None]:
    """Hold the lock by which `remove_leftovers` knows that a temporary file or folder is being written."""
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is removed either
        if flags:
            path.touch()
        yield
        return
    descriptor = os.open(path, (os.O_RDWR if flags else os.O_RDONLY) | os.O_CLOEXEC | flags, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock of a temporary file or folder; False where that cannot be told."""
    try:
        import fcntl
    except ImportError:
        return False
    descriptor = -1
    try:
        descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return True


def _integer(text: str) -> int:
    number = int(text) if len(text) < 25 else 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"the number {text[:20]}... does not fit into 64 bits")
    return number


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:20]}... is out of the range of floating point")
    return number

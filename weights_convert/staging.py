"""Folders that are written whole or not at all."""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from weights_convert.errors import CheckpointError

_STAGING = ".writing-"
_LEFTOVER = re.compile(rf"{re.escape(_STAGING)}[a-z0-9_]{{8}}")


@contextmanager
def staged_folder(folder: Path, keep: Collection[str] = (), named: Path | None = None) -> Iterator[Path]:
    """Give an empty folder of the same name, whose files replace those of ``folder`` when the block ends well.

    A failed or interrupted block changes nothing and leaves nothing behind; what a killed one left is removed first.

    Args:
        folder: Made where missing, and its parents too.
        keep: Names of files that stay as they are where they are there already.
        named: What errors say that cannot be written, if not the folder.

    Raises:
        CheckpointError: If the files cannot be written.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with TemporaryDirectory(dir=folder, prefix=_STAGING) as temporary, _locked(Path(temporary)):
            staging = Path(temporary, folder.absolute().name)
            staging.mkdir(exist_ok=True)  # the root has no name
            yield staging
            ready = {file: folder / file.name for file in sorted(staging.iterdir())}
            for final in ready.values():
                if final.exists() and not final.is_file():
                    raise CheckpointError(f"{final.name} is in the way and no regular file; move it")
            for file, final in ready.items():
                if final.name not in keep or not final.exists():
                    file.replace(final)
        done = True
    except (OSError, SafetensorError, CheckpointError) as error:
        cause = error.__cause__ or error  # of one folder staged within another, which names a temporary one
        reason = getattr(cause, "strerror", None) or cause
        raise CheckpointError(f"{named or folder} cannot be written: {reason}") from cause
    finally:
        if not done:
            for parent in created:
                with suppress(OSError):
                    parent.rmdir()


def is_occupied(target: Path) -> bool:
    """Whether there is something where a checkpoint is to be written; what a killed writer left is nothing."""
    if target.is_dir():
        return any(not _LEFTOVER.fullmatch(path.name) for path in target.iterdir())
    return os.path.lexists(target)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Try to hold a folder against those who would take it for a leftover; gives whether it is held."""
    try:
        import fcntl
    except ImportError:  # Windows, where leftovers stay
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:  # someone else holds it, or the file system has no locks
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers have left that were killed; what others are writing is locked."""
    for path in list(folder.glob(f"{_STAGING}*")):
        if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with _locked(path) as free:
                if free:
                    shutil.rmtree(path)

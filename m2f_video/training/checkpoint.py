"""Checkpoints of a training run: one file each, complete or not there at all.

The state of a run is its weights, their moving average, the optimiser, the loss scale and the number of steps done.
Everything random in a step is a function of the seed and the step, so that there is no other state to save.
"""

import errno
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from m2f_video.files import atomic_path

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})\.pt")
_UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, and an earlier one is used."""


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Step and file of each checkpoint of a run, by rising step."""
    folder = output / FOLDER
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in files if (match := _NAME.fullmatch(path.name)))


def save_checkpoint(output: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps, then remove all but the latest `keep` checkpoints up to this one.

    The file is on disk under a temporary name before it gets its own: a process killed at any moment leaves the earlier
    checkpoints and, at most, a temporary file, which the next call removes. Checkpoints of later steps are damaged
    ones that were passed over; they stay under another name.

    Raises:
        OSError: the file cannot be written.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        leftover.unlink()
    path = folder / f"step-{step:08d}.pt"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"format": FORMAT, "step": step, **state}, file)
        except RuntimeError as error:  # so PyTorch ends when only a part could be written
            raise OSError(f"{path} cannot be written, the disk may be full: {_first_line(error)}") from error
        file.flush()
        os.fsync(file.fileno())
    kept = [old for number, old in list_checkpoints(output) if number <= step][-keep:]
    for number, old in list_checkpoints(output):
        if number > step:
            old.replace(old.with_name(f"{old.name}.damaged"))
        elif old not in kept:
            old.unlink()
    return path


def load_latest_checkpoint(output: Path) -> dict[str, Any] | None:
    """The state of the latest checkpoint that can be read; None where there is none at all.

    A damaged file is left as it is, with a warning, and the one before it is taken.

    Raises:
        ValueError: there are checkpoints, and none can be read; or a newer version wrote them.
        OSError: the system does not let a file be read.
        RuntimeError: there is not enough memory.
    """
    checkpoints = list_checkpoints(output)
    for step, path in reversed(checkpoints):
        try:
            state = _read(path, step)
        except _UNREADABLE as error:
            if not _is_damage(error):
                raise
            warnings.warn(f"{path} is damaged and passed over ({_first_line(error)})", CheckpointWarning, stacklevel=2)
            continue
        if state["format"] != FORMAT:
            raise ValueError(f"{path} has format {state['format']}, not {FORMAT}; a newer m2f-video wrote it: upgrade")
        return state
    if checkpoints:
        raise ValueError(
            f"none of the {len(checkpoints)} checkpoints in {output / FOLDER} can be read; start a new run"
        )
    return None


def _read(path: Path, step: int) -> dict[str, Any]:
    """Load a file whose checksums are right: `torch.load` does not look at them and would give wrong weights."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):  # PyTorch stores entries as they are
            raise ValueError("its directory is damaged")
        if archive.testzip():
            raise ValueError("its checksums are wrong")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError("it is no checkpoint of a run")
    if state["step"] != step:
        raise ValueError(f"it holds step {state['step']}")
    return state


def _is_damage(error: Exception) -> bool:
    """Whether an error tells of the file, and not of a system that is short of memory or refuses to read."""
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL  # a place before the file's beginning, as a damaged directory names one
    return "allocate memory" not in str(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__

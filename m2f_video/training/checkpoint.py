"""Checkpoints of a training run: one file each, complete or not there at all.

The state of a run is its weights, their moving average, the optimiser, the loss scale and the number of steps done.
Everything random in a step is a function of the seed and the step, so that there is no other state to save.
"""

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from m2f_video.video_io import atomic_path

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})\.pt")
_UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)  # what torch.load says


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, and an earlier one is used."""


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Step and file of each checkpoint of a run, by rising step."""
    folder = output / FOLDER
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in files if (match := _NAME.fullmatch(path.name)))


def save_checkpoint(output: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps, then remove all but the latest `keep` checkpoints.

    The file is on disk under a temporary name before it gets its own: a process killed at any moment leaves the earlier
    checkpoints and, at most, a temporary file, which the next call removes.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        leftover.unlink()
    path = folder / f"step-{step:08d}.pt"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    for _, old in list_checkpoints(output)[:-keep]:
        old.unlink()
    return path


def load_latest_checkpoint(output: Path) -> dict[str, Any] | None:
    """The state of the latest checkpoint that can be read; None where there is none at all.

    A damaged file is left as it is, with a warning, and the one before it is taken.

    Raises:
        ValueError: there are checkpoints, and none can be read; or a newer version wrote them.
    """
    checkpoints = list_checkpoints(output)
    for step, path in reversed(checkpoints):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if state["step"] != step:
                raise ValueError(f"it holds step {state['step']}")
        except _UNREADABLE as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"{path} is damaged and passed over ({reason[:120]})", CheckpointWarning, stacklevel=2)
            continue
        if state["format"] != FORMAT:
            raise ValueError(f"{path} has format {state['format']}, not {FORMAT}; a newer m2f-video wrote it: upgrade")
        return state
    if checkpoints:
        raise ValueError(
            f"none of the {len(checkpoints)} checkpoints in {output / FOLDER} can be read; start a new run"
        )
    return None

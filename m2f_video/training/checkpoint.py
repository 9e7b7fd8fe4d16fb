"""Checkpoints of a training run: one file each, complete or not there at all.

The state of a run is its weights, their moving average, the optimiser, the loss scale and the number of steps done.
Everything random in a step is a function of the seed and the step, so that there is no other state to save.
"""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2f_video.files import atomic_path, parse_json
from weights_convert import ConversionError, read_torch_file

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})\.pt")
# What the state of a run holds, beside `format`.
_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "config": (str,),
    "data": (str,),
    "validation": (str, type(None)),
    "workers": (int,),
    "model": (dict,),
    "average": (dict, type(None)),
    "optimizer": (dict,),
    "scaler": (dict,),
    "best": (dict, type(None)),
}


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, and an earlier one is used."""


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Step and file of each checkpoint of a run, by rising step."""
    folder = output / FOLDER
    files = folder.iterdir() if folder.is_dir() else ()
    matches = ((_NAME.fullmatch(path.name), path) for path in files if not path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def checkpoint_file(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps of a run is kept."""
    return output / FOLDER / f"step-{step:08d}.pt"


def save_checkpoint(output: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps, then remove all but the latest `keep` checkpoints up to this one.

    The file is on disk under a temporary name before it gets its own: a process killed at any moment leaves the earlier
    checkpoints and, at most, a temporary file, which the next call removes. Checkpoints of later steps are damaged
    ones that were passed over; they stay under another name.

    Raises:
        OSError: the file cannot be written.
    """
    path = checkpoint_file(output, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".step-*"):
        if not leftover.is_dir():
            leftover.unlink()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"format": FORMAT, "step": step, **state}, file)
        except RuntimeError as error:  # so PyTorch ends when only a part could be written
            reason = str(error).partition("\n")[0]
            raise OSError(f"{path} cannot be written, the disk may be full: {reason:.120}") from error
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

    A damaged file, or one that is no whole state of a run, is left as it is, with a warning, and the one before it is
    taken. Nothing in a file is executed.

    Raises:
        ValueError: there are checkpoints, and none can be read; or a newer version wrote them.
        OSError: the system does not let a file be read.
        MemoryError: there is not enough memory.
    """
    checkpoints = list_checkpoints(output)
    for step, path in reversed(checkpoints):
        try:
            state = _checked(read_torch_file(path), step)
        except ValueError as error:
            unnamed = error.__cause__ if isinstance(error.__cause__, ConversionError) else error
            reason = str(unnamed).removeprefix(f"{path}: ").removeprefix(f"{path} ")
            warnings.warn(f"{path} is damaged and passed over ({reason:.120})", CheckpointWarning, stacklevel=2)
            continue
        if state["format"] > FORMAT:  # whose run must not go on from an earlier one
            raise ValueError(f"{path} has format {state['format']}, not {FORMAT}; a newer m2f-video wrote it: upgrade")
        return state
    if checkpoints:
        raise ValueError(
            f"none of the {len(checkpoints)} checkpoints in {output / FOLDER} can be read; start a new run"
        )
    return None


def _checked(state: object, step: int) -> dict[str, Any]:
    """A state with all that a run needs to go on, each of its kind; whether it fits the run is for the trainer to say.

    What a newer version wrote may have another form.

    Raises:
        ValueError: something is missing or of another kind.
    """
    if not isinstance(state, dict) or not isinstance(state.get("format"), int) or state["format"] < FORMAT:
        raise ValueError("it is no checkpoint of a run")
    if state["format"] > FORMAT:
        return state
    for name, kinds in _KINDS.items():
        if name not in state:
            raise ValueError(f"it has no {name}")
        if not isinstance(state[name], kinds):
            raise ValueError(f"its {name} is a {type(state[name]).__name__}")
    if state["step"] != step:
        raise ValueError(f"it holds step {state['step']!r:.20}")
    for name in ("model", "average"):
        for key, tensor in (state[name] or {}).items():
            if not isinstance(key, str) or not _is_whole(tensor):
                raise ValueError(f"its {name} has no weights at {key!r:.60}")
    moments, best = state["optimizer"].get("state"), state["best"]  # the groups are those of the config
    if (
        not isinstance(moments, dict)
        or not all(isinstance(number, int) and isinstance(values, dict) for number, values in moments.items())
        or not all(_is_whole(value) for values in moments.values() for value in values.values())
    ):
        raise ValueError("its optimizer is not as the optimizer keeps it")
    if not all(isinstance(value, int | float) for value in state["scaler"].values()):
        raise ValueError("its scaler is not as the scaler keeps it")
    if best is not None and not all(isinstance(best.get(name), int | float) for name in ("step", "AP")):
        raise ValueError("its best evaluation has no step or no AP")
    try:
        parse_json(state["config"])
    except ValueError as error:
        raise ValueError(f"its config is not JSON: {error!s:.60}") from error
    return state


def _is_whole(value: object) -> bool:
    """Whether this is a tensor that holds as many numbers as it claims: a stride of 0 makes any number of one."""
    return isinstance(value, Tensor) and value.nbytes <= value.untyped_storage().nbytes()

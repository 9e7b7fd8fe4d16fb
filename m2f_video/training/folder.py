"""The folder of a run: its files, who may write there, and what a run goes on from."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2f_video.config import ConfigError
from m2f_video.files import locked, made_directory
from m2f_video.training.checkpoint import FOLDER, checkpoint_file, list_checkpoints, load_latest_checkpoint
from m2f_video.training.config import TrainConfig
from m2f_video.training.log import EVALUATIONS_FILE, STEPS_FILE, TENSORBOARD_FOLDER

FINAL_FOLDER, BEST_FOLDER, CONFIG_FILE = "final", "best", "train.json"
LOCK_FILE = ".lock"
"""That is there while a run is at work in its folder, and after one that was killed; it means nothing by itself."""


@contextmanager
def held_folder(output: Path) -> Iterator[None]:
    """Hold the folder of a run, made where missing, so that no other run writes there; the system ends that in a kill.

    Raises:
        ValueError: another run holds it.
        OSError: it cannot be written, or files and folders are in each other's place.
    """
    for path in (output, *(output / name for name in (FOLDER, FINAL_FOLDER, BEST_FOLDER, TENSORBOARD_FOLDER))):
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(
                f"{path} is a file, where a training run needs a folder; move it, or write elsewhere"
            )
    for path in (output / name for name in (CONFIG_FILE, STEPS_FILE, EVALUATIONS_FILE, LOCK_FILE)):
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a folder, where a training run needs a file; move it, or write elsewhere"
            )
    with made_directory(output), locked(output / LOCK_FILE) as is_mine:
        if not is_mine:
            raise ValueError(f"another training run is at work in {output}; wait for its end, or write elsewhere")
        yield


def check_unused(output: Path) -> None:
    """Make sure that a new run may write to a folder.

    Raises:
        ValueError: there is a run in it.
    """
    traces = (FINAL_FOLDER, BEST_FOLDER, CONFIG_FILE, STEPS_FILE, EVALUATIONS_FILE)
    if list_checkpoints(output) or any((output / name).exists() for name in traces):
        raise ValueError(f"{output} holds a training run already; go on with it by resume, or write elsewhere")


def state_to_resume(output: Path, config: TrainConfig, data: str, validation: str | None) -> dict[str, Any] | None:
    """The state of the latest checkpoint, whose run had the same config and data; None where there is none.

    Args:
        output: folder of the run.
        config: of the run that is to go on.
        data: fingerprint of the training videos.
        validation: that of the validation videos, where there are any.

    Raises:
        ValueError: no checkpoint can be read, or the run had another config or other data.
    """
    state = load_latest_checkpoint(output)
    if state is None:
        return None
    try:
        before = TrainConfig.from_json(state["config"])
    except ConfigError as error:
        raise ConfigError(f"{checkpoint_file(output, state['step'])}: {error}") from error
    if names := before.differences(config):
        raise ValueError(
            f"the run in {output} has another {', '.join(list(names)[:5])}; resume it with the config it began with "
            f"({output / CONFIG_FILE})"
        )
    for kind, was, now in (("training", state["data"], data), ("validation", state["validation"], validation)):
        if was != now:
            raise ValueError(
                f"the {kind} videos are not those that the run in {output} began with (another dataset, or its "
                "annotations, labels or videos have changed); give or restore them, or start a new run"
            )
    return state

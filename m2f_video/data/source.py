"""Opening a dataset by the text that names it on a command line or in a recipe."""

import os
from pathlib import Path
from typing import Literal

from m2f_video.data.synthetic import DIFFICULTIES, STANDARD_SPLITS, SyntheticVideos
from m2f_video.data.youtube_vis import YouTubeVis

Split = Literal["train", "val", "test"]

SYNTHETIC = "synthetic"
_SPLIT_FILES = {
    "train": (),
    "val": ("val.json", "valid.json", "annotations_valid.json", "val_instances.json", "val_instances_.json"),
    "test": ("test.json", "annotations_test.json", "test_instances.json"),
}
"""Annotation files of a split in a folder that may hold several, before those that `YouTubeVis` looks for."""


def is_synthetic(source: str | os.PathLike[str]) -> bool:
    """Whether `open_dataset` takes this for the synthetic benchmark. A path object never is."""
    return isinstance(source, str) and source.partition(":")[0] == SYNTHETIC


def open_dataset(
    source: str | os.PathLike[str],
    split: Split,
    num_videos: int | None = None,
    frames: str | os.PathLike[str] | None = None,
) -> YouTubeVis | SyntheticVideos:
    """Open a split of a dataset.

    Args:
        source: a dataset in the YouTubeVIS format: its annotation file, which is taken whatever the split; or a folder,
            where to validate `val.json`, `valid.json`, OVIS's `annotations_valid.json` or LV-VIS's
            `val_instances.json` is looked for, to test `test.json` and so on, and then what `YouTubeVis` looks for. Or
            a standard split of the synthetic benchmark: `synthetic:easy`, `synthetic:medium`, `synthetic:hard`, or
            `synthetic` for the medium one (a folder of that name is `./synthetic`).
        split: which part.
        num_videos: only the first so many videos; None takes all.
        frames: folder of the videos' folders of frames; None looks where published datasets have it (see
            `find_frames`).

    Raises:
        FileNotFoundError: there is no such dataset or folder of frames, or a folder holds other splits but not this
            one.
        DatasetError: the file is not in the format.
        ValueError: an unknown split or difficulty, `num_videos` is not positive, or `frames` with the synthetic
            benchmark.
    """
    if split not in _SPLIT_FILES:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(_SPLIT_FILES)}")
    if num_videos is not None and num_videos < 1:
        raise ValueError(f"num_videos must be positive, got {num_videos}")
    if isinstance(source, str) and is_synthetic(source):
        if frames is not None:
            raise ValueError(f"{source} is rendered, it has no folder of frames; leave out {frames}")
        return _standard_split(source, split, num_videos)
    if not Path(source).exists():
        raise FileNotFoundError(
            f"{source}: there is no such dataset; give a folder or annotation file in the YouTubeVIS format, or "
            f"{SYNTHETIC}:{{{','.join(DIFFICULTIES)}}}"
        )
    return YouTubeVis(_find_split(Path(source), split), frames, num_videos=num_videos)


def _standard_split(source: str, split: Split, num_videos: int | None) -> SyntheticVideos:
    _, colon, difficulty = source.partition(":")
    if colon and difficulty not in DIFFICULTIES:
        raise ValueError(f"{source}: unknown difficulty {difficulty!r}; difficulties: {', '.join(DIFFICULTIES)}")
    standard = STANDARD_SPLITS[split]
    count = min(num_videos or standard["num_videos"], standard["num_videos"])
    return SyntheticVideos(count, standard["seed"], difficulty or "medium")


def _find_split(path: Path, split: Split) -> Path:
    """The annotation file of a split, or the path itself where `YouTubeVis` is to look."""
    for name in _SPLIT_FILES[split]:
        if (path / name).is_file():
            return path / name
    others = [name for names in _SPLIT_FILES.values() for name in names if (path / name).is_file()]
    if split != "train" and others:  # what is left would be train.json, and another split measured than was meant
        raise FileNotFoundError(
            f"{path}: the folder holds {' and '.join(others)} but no {_SPLIT_FILES[split][0]} for the split "
            f"{split!r}; choose another split, or give the annotation file"
        )
    return path

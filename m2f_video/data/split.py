"""Splitting a dataset in the YouTubeVIS format into two by video, as a stand-in for validation sets without truth."""

import heapq
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2f_video.data.annotations import FRAMES_FOLDER, DatasetError, find_annotations, find_frames, read_annotations
from m2f_video.files import new_folder

TRAIN_FILE, VAL_FILE = "train.json", "val.json"


def split_dataset(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    fraction: float = 0.1,
    seed: int = 0,
    frames: str | os.PathLike[str] | None = None,
) -> tuple[int, int]:
    """Write `OUT/train.json` and `OUT/val.json`, which share the videos of a dataset, and a link to its frames.

    Whole videos move, drawn at random but so that every category stays in both parts where that is possible: first
    come videos whose categories `val` still lacks, and the last video of a category in `train` stays there as long as
    there is another choice. `OUT/JPEGImages` is a symbolic link: the source must stay where it is.

    Args:
        source: the annotation file, or a folder with one of `ANNOTATION_FILES`, such as `train.json`.
        out: folder to make; it must not exist, or be empty.
        fraction: of the videos, how many go to `val`; at least one goes, and one stays.
        seed: of the draw.
        frames: folder of the videos' folders of frames; None looks where published datasets have it (see
            `find_frames`).

    Returns:
        number of videos in train and in val.

    Raises:
        FileNotFoundError: there is no such dataset.
        FileExistsError: `out` is a file, or a folder with something in it.
        DatasetError: the annotation file is not in the format, or has fewer than two videos.
        ValueError: fraction is not between 0 and 1, or the seed is negative.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")
    file = find_annotations(source)
    parsed = read_annotations(file)
    folder = find_frames(file, frames, parsed.videos.values())
    if len(parsed.videos) < 2:
        raise DatasetError(f"{file}: it takes two videos to split a dataset, this one has {len(parsed.videos)}")
    categories = {video: {row.category_id for row in rows} for video, rows in parsed.instances().items()}
    count = min(max(round(fraction * len(categories)), 1), len(categories) - 1)
    chosen = _choose(categories, count, np.random.default_rng(seed))
    with new_folder(Path(out)) as temporary:
        _write_part(parsed.data, categories.keys() - chosen, temporary / TRAIN_FILE)
        _write_part(parsed.data, chosen, temporary / VAL_FILE)
        (temporary / FRAMES_FOLDER).symlink_to(folder.resolve(), target_is_directory=True)
    return len(categories) - count, count


def _choose(categories: dict[int, set[int]], count: int, random: np.random.Generator) -> set[int]:
    """Ids of `count` videos for the second part; `categories` are those in each video."""
    ids = list(categories)
    order = [ids[index] for index in random.permutation(len(ids))]
    remaining: dict[int, int] = {}  # in how many videos of the first part a category is
    for present in categories.values():
        for category in present:
            remaining[category] = remaining.get(category, 0) + 1
    covered: set[int] = set()
    chosen: set[int] = set()

    def rank(place: int) -> tuple[int, int, int]:
        """The least is the best; the order drawn above decides among equals."""
        present = categories[order[place]]
        return sum(remaining[category] == 1 for category in present), -len(present - covered), place

    # Ranks only ever rise, so that the first whose rank is still what it was is the best of all.
    queue = [rank(place) for place in range(len(order))]
    heapq.heapify(queue)
    while len(chosen) < count:
        place = queue[0][2]
        if (now := rank(place)) != queue[0]:
            heapq.heapreplace(queue, now)
            continue
        heapq.heappop(queue)
        best = order[place]
        chosen.add(best)
        covered |= categories[best]
        for category in categories[best]:
            remaining[category] -= 1
    return chosen


def _write_part(data: Mapping[str, Any], videos: set[int], file: Path) -> None:
    part = {
        **data,
        "videos": [row for row in data["videos"] if row["id"] in videos],
        "annotations": [row for row in data.get("annotations") or () if row["video_id"] in videos],
    }
    file.write_text(json.dumps(part), encoding="utf-8")

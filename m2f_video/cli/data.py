"""The commands `m2f-video data synthesize | check | split`: they call the library and print."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2f_video.cli.console import one_line, progress_bars

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]


def synthesize(
    out: Folder,
    /,
    videos: int,
    seed: int = 0,
    difficulty: Literal["easy", "medium", "hard"] = "medium",
    frames: int = 16,
    height: int = 192,
    width: int = 320,
) -> int:
    """Render videos of the synthetic benchmark and write them in the YouTubeVIS format.

    Writes OUT/train.json and OUT/JPEGImages/000000/00000.jpg and so on. The same seed gives the same videos on every
    machine.

    Example: m2f-video data synthesize shapes --videos 200 --seed 1 --difficulty medium

    Args:
        out: folder to make; it must not exist, or be empty.
        videos: number of videos.
        seed: of all videos; video i depends on seed and i only. The benchmark trains on 0, validates on 1000 and tests
            on 2000.
        difficulty: how hard to segment and follow the objects are.
        frames: of each video.
        height: of the frames, in pixels.
        width: of the frames, in pixels.
    """
    from m2f_video.data.synthetic import SyntheticVideos
    from m2f_video.data.write import write_youtube_vis

    if videos < 1:
        raise ValueError(f"--videos must be positive, got {videos}")
    dataset = SyntheticVideos(videos, seed, difficulty, frames, height, width)
    with progress_bars(unit="video") as update:
        write_youtube_vis(dataset, out, info=dataset.info, progress=partial(update, "render"))
    print(f"written to {out}: {videos} {difficulty} videos of {frames} frames, {width}x{height}, seed {seed}")
    return 0


def check(path: Source, /, frames: Path | None = None) -> int:
    """Look for faults in a dataset in the YouTubeVIS format; exit with 1 where there are any.

    Prints one line for each fault: the file, the annotation's id, and what is wrong. Annotations of crowds are counted,
    but are no fault; training leaves them out.

    Example: m2f-video data check ytvis_2021/train

    Args:
        path: annotation file, or a folder with train.json, instances.json (YouTubeVIS), annotations_train.json (OVIS)
            or train_instances.json (LV-VIS).
        frames: folder of the videos' folders of frames; by default found where published datasets have it, such as
            JPEGImages beside the annotation file.
    """
    from m2f_video.data.validate import check_dataset

    with progress_bars(unit="row") as update:
        report = check_dataset(path, frames, progress=partial(update, "check"))
    for fault in report.faults:
        print(one_line(fault))
    print(
        f"{report.file}: {report.num_videos} videos, {report.num_frames} frames, {report.num_annotations} annotations "
        f"({report.num_crowds} of crowds), {len(report.faults)} faults"
    )
    return 1 if report.faults else 0


def split(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    out: Folder,
    /,
    fraction: float = 0.1,
    seed: int = 0,
    frames: Path | None = None,
) -> int:
    """Split a dataset in the YouTubeVIS format by video, to have a part with truth to validate on.

    Writes OUT/train.json, OUT/val.json, and OUT/JPEGImages, a link to the frames of SRC. Every category stays in both
    parts where that is possible.

    Example: m2f-video data split ytvis_2021/train mini --fraction 0.1 --seed 0

    Args:
        source: annotation file, or a folder with train.json, instances.json (YouTubeVIS), annotations_train.json
            (OVIS) or train_instances.json (LV-VIS).
        out: folder to make; it must not exist, or be empty.
        fraction: of the videos, how many go to val.json.
        seed: of the random choice.
        frames: folder of the videos' folders of frames; by default found where published datasets have it, such as
            JPEGImages beside the annotation file.
    """
    from m2f_video.data.split import split_dataset

    train, val = split_dataset(source, out, fraction, seed, frames)
    print(f"written to {out}: {train} videos in train.json, {val} in val.json")
    return 0


DATA_COMMANDS: dict[str, Callable[..., int]] = {"synthesize": synthesize, "check": check, "split": split}
"""Functions of `m2f-video data` by the name of their command."""

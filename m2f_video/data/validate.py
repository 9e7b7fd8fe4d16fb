"""Checking a dataset in the YouTubeVIS format for faults: what its reader finds, and then every frame and mask."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from m2f_video.data.annotations import (
    Annotation,
    DatasetError,
    Fault,
    VideoRecord,
    find_annotations,
    find_frames,
    read_annotations,
)
from m2f_video.files import check_regular
from m2f_video.results.masks import compress_segmentation, mask_area
from m2f_video.video import image_size

Progress = Callable[[int, int], None]
"""Called with (videos and annotations done, videos and annotations in all)."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What a dataset holds and what is wrong with it.

    Attributes:
        file: its annotation file.
        faults: of rows in the order of the file, then of frames and masks.
        num_videos: videos, as far as their rows can be read.
        num_frames: frames of these, by the annotation file.
        num_annotations: their annotations, crowds included.
        num_crowds: annotations of crowds, which training leaves out.
    """

    file: str
    faults: tuple[Fault, ...]
    num_videos: int = 0
    num_frames: int = 0
    num_annotations: int = 0
    num_crowds: int = 0


def check_dataset(
    path: str | os.PathLike[str], frames: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> DatasetReport:
    """Look for everything in a dataset that would break training or evaluation, or make them wrong.

    That is: a file that does not parse; fields that are missing or of the wrong type; ids that are there twice; videos
    and categories that do not exist; lists that are not as long as the video; frames that are missing, unreadable or
    of another size than stated; segmentations that are damaged, of another size or without a pixel; and annotations
    without any.

    Args:
        path: the annotation file, or a folder with one of `ANNOTATION_FILES`, such as `train.json`.
        frames: folder of the videos' folders of frames; None looks where published datasets have it (see
            `find_frames`).
        progress: see `Progress`.

    Raises:
        FileNotFoundError: there is no such dataset, or no such folder as `frames`.
    """
    file = find_annotations(path)
    faults: list[Fault] = []
    try:
        parsed = read_annotations(file, per_frame=("areas", "bboxes"), report=faults.append)
    except DatasetError as error:
        return DatasetReport(file=str(file), faults=(_fault_of(error, file),))
    folder = None
    try:
        folder = find_frames(file, frames, parsed.videos.values())
    except FileNotFoundError as error:
        if frames is not None:
            raise
        faults.append(_fault_of(error, file))
    checks = chain(
        (_check_frames(video, folder) for video in parsed.videos.values()),
        (_check_masks(annotation, parsed.videos[annotation.video_id], file) for annotation in parsed.annotations),
    )
    for done, found in enumerate(checks, start=1):
        faults += found
        if progress is not None:
            progress(done, len(parsed.videos) + len(parsed.annotations))
    return DatasetReport(
        file=str(file),
        faults=tuple(faults),
        num_videos=len(parsed.videos),
        num_frames=sum(video.num_frames for video in parsed.videos.values()),
        num_annotations=len(parsed.annotations),
        num_crowds=sum(annotation.crowd for annotation in parsed.annotations),
    )


def _fault_of(error: Exception, file: Path) -> Fault:
    """A fault from an error whose message may begin with the file's name."""
    return Fault(file=str(file), message=str(error).removeprefix(f"{file}: "))


def _check_frames(video: VideoRecord, folder: Path | None) -> Iterator[Fault]:
    """The faults of a video's frames, by their headers; none where there is no folder of frames."""
    for file in [] if folder is None else [folder / name for name in video.file_names]:
        try:
            check_regular(file)
            if not file.is_file():
                yield Fault(file=str(file), message=f"the frame of video {video.id} is missing")
                continue
            height, width = image_size(file)
        except (ValueError, OSError) as error:
            yield _fault_of(error, file)
            continue
        if (height, width) != (video.height, video.width):
            stated = f"video {video.id} is {video.height} x {video.width}"
            message = f"the frame is {height} x {width} (height x width), but {stated}"
            yield Fault(file=str(file), message=message)


def _check_masks(annotation: Annotation, video: VideoRecord, file: Path) -> Iterator[Fault]:
    """The faults of an annotation's segmentations."""
    messages = []
    if all(segmentation is None or segmentation == [] for segmentation in annotation.segmentations):
        messages.append("it has no segmentation in any frame")
    for index, segmentation in enumerate(annotation.segmentations):
        try:
            rle = compress_segmentation(segmentation, video.height, video.width)
        except ValueError as error:
            messages.append(f"frame {index}: {error}")
        else:
            if rle is not None and not mask_area(rle):
                messages.append(f"frame {index}: the segmentation is empty; null says that an object is absent")
    for message in messages:
        message = f"annotation {annotation.id}: {message}"
        yield Fault(file=str(file), message=message, annotation_id=annotation.id)

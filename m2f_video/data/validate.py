"""Checking a dataset in the YouTubeVIS format for faults, part by part."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f_video.data.annotations import (
    DatasetError,
    category_count_fault,
    check_length,
    find_annotations,
    find_frames,
    get_field,
    get_picture_size,
    is_area,
    is_inner_path,
    read_annotations,
)
from m2f_video.files import check_regular
from m2f_video.results.masks import compress_segmentation, mask_area
from m2f_video.video import image_size

Progress = Callable[[int, int], None]
"""Called with (videos and annotations done, videos and annotations in all)."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something wrong with a dataset.

    Attributes:
        file: the annotation file, or the frame that is meant.
        message: what is wrong.
        annotation_id: the annotation that is meant, None where it is no annotation's fault.
    """

    file: str
    message: str
    annotation_id: int | None = None

    def __str__(self) -> str:
        annotation = "" if self.annotation_id is None else f"annotation {self.annotation_id}: "
        return f"{self.file}: {annotation}{self.message}"


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What a dataset holds and what is wrong with it.

    Attributes:
        file: its annotation file.
        faults: in the order of the file.
        num_videos: videos.
        num_frames: frames of all videos, by the annotation file.
        num_annotations: annotations, crowds included.
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
        progress: called with (videos and annotations done, videos and annotations in all).

    Raises:
        FileNotFoundError: there is no such dataset, or no such folder as `frames`.
    """
    file = find_annotations(path)
    try:
        data = read_annotations(file)
    except DatasetError as error:
        return DatasetReport(file=str(file), faults=(_fault_of(error, file),))
    videos, annotations = data["videos"], data["annotations"]
    faults: list[Fault] = []
    folder = None
    try:
        folder = find_frames(file, frames, videos)
    except FileNotFoundError as error:
        if frames is not None:
            raise
        faults.append(_fault_of(error, file))
    done, total = 0, len(videos) + len(annotations)

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    if not videos:
        faults.append(Fault(file=str(file), message="there are no videos"))
    faults += _check_categories(data["categories"], file)
    for video in videos:
        faults += _check_video(video, folder, file)
        count()
    faults += _twice((row.get("id") for row in videos), "video", file)
    video_of = {row["id"]: row for row in videos if type(row.get("id")) is int}
    categories = {row["id"] for row in data["categories"] if type(row.get("id")) is int}
    for annotation in annotations:
        id_ = annotation["id"] if type(annotation.get("id")) is int else None
        messages = _check_annotation(annotation, video_of, categories)
        faults += [Fault(file=str(file), annotation_id=id_, message=message) for message in messages]
        count()
    faults += _twice((row.get("id") for row in annotations), "annotation", file)
    return DatasetReport(
        file=str(file),
        faults=tuple(faults),
        num_videos=len(videos),
        num_frames=sum(len(names) for row in videos if isinstance(names := row.get("file_names"), list)),
        num_annotations=len(annotations),
        num_crowds=sum(bool(row.get("iscrowd")) for row in annotations),
    )


def _fault_of(error: Exception, file: Path) -> Fault:
    """A fault from an error whose message may begin with the file's name."""
    return Fault(file=str(file), message=str(error).removeprefix(f"{file}: "))


def _check_categories(categories: list[dict[str, Any]], file: Path) -> Iterator[Fault]:
    if message := category_count_fault(len(categories)):
        yield Fault(file=str(file), message=message)
    for row in categories:
        for key, kind in (("id", int), ("name", str)):
            try:
                get_field(row, key, kind, "a category")
            except DatasetError as error:
                yield Fault(file=str(file), message=str(error))
    for key in ("id", "name"):
        yield from _twice((row.get(key) for row in categories), f"category {key}", file)


def _twice(values: Iterable[Any], what: str, file: Path) -> Iterator[Fault]:
    """A fault for each value that is there more than once."""
    counts: dict[Any, int] = {}
    for value in values:
        if isinstance(value, int | str):
            counts[value] = counts.get(value, 0) + 1
    for value, count in counts.items():
        if count > 1:
            id_ = value if what == "annotation" else None
            yield Fault(file=str(file), annotation_id=id_, message=f"{what} {value!r:.60} is there {count} times")


def _check_video(video: dict[str, Any], folder: Path | None, file: Path) -> Iterator[Fault]:
    where = f"video {video.get('id')!s:.60}"
    try:
        get_field(video, "id", int, where)
        names = get_field(video, "file_names", list, where)
        size = get_picture_size(video, where)
    except DatasetError as error:
        yield Fault(file=str(file), message=str(error))
        return
    if not names:
        yield Fault(file=str(file), message=f"{where} has no frames")
    try:
        check_length(video, len(names), where)
    except DatasetError as error:
        yield Fault(file=str(file), message=str(error))
    for name in names:
        if not is_inner_path(name):
            message = f"{where}: {name!r:.60} is no name of a frame inside the folder of frames"
            yield Fault(file=str(file), message=message)
        elif folder is not None:
            fault = _check_frame(folder / name, size, where)
            if fault is not None:
                yield fault


def _check_frame(file: Path, size: tuple[int, int], where: str) -> Fault | None:
    """The fault of one frame, by its header; None where it is as stated."""
    try:
        check_regular(file)
        if not file.is_file():
            return Fault(file=str(file), message=f"the frame of {where} is missing")
        actual = image_size(file)
    except (ValueError, OSError) as error:
        return _fault_of(error, file)
    if actual != size:
        message = f"the frame is {actual[0]} x {actual[1]} (height x width), but {where} is {size[0]} x {size[1]}"
        return Fault(file=str(file), message=message)
    return None


def _check_annotation(
    annotation: dict[str, Any], video_of: dict[int, dict[str, Any]], categories: set[int]
) -> Iterator[str]:
    """What is wrong with one annotation."""
    for key, known in (("id", None), ("video_id", video_of), ("category_id", categories)):
        try:
            value = get_field(annotation, key, int, "the annotation")
        except DatasetError as error:
            yield str(error)
            continue
        if known is not None and value not in known:
            yield f"there is no {key.removesuffix('_id')} {value}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield f"'iscrowd' must be 0 or 1, got {annotation['iscrowd']!r:.60}"
    if "segmentations" not in annotation:
        yield "'segmentations' is missing"
    video_id = annotation.get("video_id")
    video = video_of.get(video_id, {}) if type(video_id) is int else {}
    names = video.get("file_names")
    for key in ("segmentations", "areas", "bboxes"):
        value = annotation.get(key)
        if value is None and (key != "segmentations" or key not in annotation):  # areas are then measured
            continue
        if not isinstance(value, list):
            yield f"{key!r} must be a list, got {value!r:.60}"
        elif isinstance(names, list) and len(value) != len(names):
            yield f"{len(value)} {key} for the {len(names)} frames of video {video_id}"
    segmentations, height, width = annotation.get("segmentations"), video.get("height"), video.get("width")
    areas = annotation.get("areas")
    if isinstance(areas, list) and not all(map(is_area, areas)):
        yield "'areas' must be numbers of pixels, null where the object is absent"
    # without a size it is the video's fault, reported there
    if isinstance(segmentations, list) and type(height) is type(width) is int and min(height, width) > 0:
        yield from _check_segmentations(segmentations, height, width)


def _check_segmentations(segmentations: list[Any], height: int, width: int) -> Iterator[str]:
    if all(segmentation is None or segmentation == [] for segmentation in segmentations):
        yield "it has no segmentation in any frame"
    for index, segmentation in enumerate(segmentations):
        try:
            rle = compress_segmentation(segmentation, height, width)
        except ValueError as error:
            yield f"frame {index}: {error}"
        else:
            if rle is not None and not mask_area(rle):
                yield f"frame {index}: the segmentation is empty; null says that an object is absent"

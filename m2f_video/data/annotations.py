"""Annotation files in the YouTubeVIS format and COCO's: finding, parsing, and taking fields out with clear errors."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from m2f_video.files import check_regular, read_json
from m2f_video.results.masks import check_picture_size

ANNOTATION_FILES = (
    "train.json",
    "instances.json",
    "annotations_train.json",
    "train_instances.json",
    "train_instances_.json",
)
"""Annotation files that are looked for, in this order, where a dataset is given as a folder: those of YouTubeVIS 2019,
YouTubeVIS 2021, OVIS and LV-VIS, which comes with either name."""

FRAMES_FOLDER = "JPEGImages"

MOST_CATEGORIES = 5000
"""The precision of each takes 200 kB in an evaluation."""


class DatasetError(ValueError):
    """Annotations or frames that are not in the YouTubeVIS format; the message names file, place and fault."""


def find_annotations(path: str | os.PathLike[str]) -> Path:
    """The annotation file of a dataset given as that file or as a folder that holds one of `ANNOTATION_FILES`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a pipe or device.
    """
    file = Path(path)
    check_regular(file)
    if file.is_file():
        return file
    if not file.exists():
        raise FileNotFoundError(f"{file}: there is no such dataset")
    for name in ANNOTATION_FILES:
        if (file / name).is_file():
            return file / name
    raise FileNotFoundError(f"{file}: the folder holds no {' or '.join(ANNOTATION_FILES)}; give the annotation file")


def find_frames(
    annotations: Path, frames: str | os.PathLike[str] | None = None, videos: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """The folder of frames that belongs to an annotation file.

    Args:
        annotations: the file.
        frames: the folder, where it is known. None looks where published datasets have it: `JPEGImages` beside the file
            (YouTubeVIS 2021), `train/JPEGImages` (YouTubeVIS 2019, LV-VIS), `JPEGImages/train` (LV-VIS) and `train`
            (OVIS), where the file's name is of that part, such as `train.json`, `train_instances.json` or
            `annotations_train.json`.
        videos: rows of the file's videos: of several such folders the first is taken that has their first frame.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if frames is not None:
        if not Path(frames).is_dir():
            raise FileNotFoundError(f"{frames}: there is no such folder of frames")
        return Path(frames)
    part = annotations.stem.removeprefix("annotations_").removesuffix("_").removesuffix("_instances")
    names = (FRAMES_FOLDER, f"{part}/{FRAMES_FOLDER}", f"{FRAMES_FOLDER}/{part}", part)
    folders = [folder for name in names if (folder := annotations.parent / name).is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"{annotations}: there is no folder of frames, none of {', '.join(names)} beside it; name it (--frames, "
            "--validation-frames)"
        )
    listed = (row.get("file_names") for row in videos)
    first = next((names[0] for names in listed if isinstance(names, list) and names), None)
    with_first = (folder for folder in folders if is_inner_path(first) and (folder / str(first)).exists())
    return next(with_first, folders[0])


def read_annotations(file: Path, items: str = "videos") -> dict[str, Any]:
    """Parse an annotation file; `annotations` is an empty list where the file has none, as test sets do.

    Args:
        file: the file.
        items: what is annotated: `videos`, or `images` in COCO's format.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is a pipe or device, is not JSON, or has no list of items or categories.
    """
    try:
        data = read_json(file)
    except ValueError as error:
        raise DatasetError(f"{file}: not an annotation file: {str(error).removeprefix(f'{file}: ')}") from error
    if not isinstance(data, dict):
        raise DatasetError(f"{file}: not an annotation file: it holds no JSON object")
    data["annotations"] = data.get("annotations") or []
    for key in (items, "categories", "annotations"):
        if not isinstance(data.get(key), list) or not all(isinstance(row, dict) for row in data[key]):
            raise DatasetError(f"{file}: not an annotation file: {key!r} must be a list of objects")
    return data


def category_names(categories: list[dict[str, Any]], file: Path) -> dict[int, str]:
    """Names by category id, by rising id.

    Raises:
        DatasetError: there are none, or an id or a name is there twice.
    """
    if not 1 <= len(categories) <= MOST_CATEGORIES:
        raise DatasetError(f"{file}: {category_count_fault(len(categories))}")
    names: dict[int, str] = {}
    taken: set[str] = set()
    for row in categories:
        id_, name = get_field(row, "id", int, f"{file}: a category"), get_field(row, "name", str, f"{file}: a category")
        if id_ in names or name in taken:
            raise DatasetError(f"{file}: category {id_} ({name:.60}) is there twice")
        names[id_] = name
        taken.add(name)
    return dict(sorted(names.items()))


def category_count_fault(count: int) -> str | None:
    """What is wrong with the number of categories, None where nothing is."""
    if not count:
        return "there are no categories"
    return f"{count} categories are too many, it may be {MOST_CATEGORIES}" if count > MOST_CATEGORIES else None


def check_length(video: Mapping[str, Any], num_frames: int, where: str) -> None:
    """Check that the number of frames a video says it has, where it does, is that of its file names.

    Raises:
        DatasetError: it is another one; the message starts with `where`.
    """
    length = video.get("length")
    if length is not None and (type(length) is not int or length != num_frames):
        raise DatasetError(f"{where}: length is {length!r:.60}, but there are {num_frames} file names")


def is_area(area: Any) -> bool:
    """Whether this may stand in an annotation's `areas`: a number of pixels, or null where the object is absent."""
    if isinstance(area, bool) or not isinstance(area, int | float | np.number):
        return area is None
    return bool(0 <= area < 2**31)


def get_field(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """A field of a row of an annotation file.

    Raises:
        DatasetError: it is missing or of another type; the message starts with `where`.
    """
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DatasetError(f"{where}: {key!r} must be {kind.__name__}, got {value!r:.60}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DatasetError(f"{where}: {key!r} does not fit into 64 bits: {value!r:.60}")
    return value


def get_picture_size(row: dict[str, Any], where: str) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        DatasetError: one is missing, no integer or not positive, or no picture is that large; the message starts with
            `where`.
    """
    for key in ("height", "width"):
        if get_field(row, key, int, where) < 1:
            raise DatasetError(f"{where}: {key} must be positive, got {row[key]}")
    height, width = row["height"], row["width"]
    try:
        check_picture_size(height, width)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error
    return height, width


def is_inner_path(name: Any) -> bool:
    """Whether a file name of an annotation file leads to a place inside the folder it is relative to."""
    if not isinstance(name, str) or not name or name.startswith("/") or "\0" in name:
        return False
    try:
        longest = max(map(len, os.fsencode(name).split(b"/")))
    except UnicodeEncodeError:  # JSON can hold what no file system can
        return False
    return longest < 256 and len(name) < 4096 and ".." not in PurePosixPath(name).parts

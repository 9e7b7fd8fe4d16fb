"""Annotation files in the YouTubeVIS format and COCO's: finding, parsing, and taking fields out with clear errors."""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

ANNOTATION_FILES = ("train.json", "instances.json")
"""Annotation files that are looked for, in this order, where a dataset is given as a folder."""

FRAMES_FOLDER = "JPEGImages"


class DatasetError(ValueError):
    """Annotations or frames that are not in the YouTubeVIS format; the message names file, place and fault."""


def find_annotations(path: str | os.PathLike[str]) -> Path:
    """The annotation file of a dataset given as that file or as a folder that holds one of `ANNOTATION_FILES`.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path)
    if file.is_file():
        return file
    if not file.exists():
        raise FileNotFoundError(f"{file}: there is no such dataset")
    for name in ANNOTATION_FILES:
        if (file / name).is_file():
            return file / name
    raise FileNotFoundError(f"{file}: the folder holds no {' or '.join(ANNOTATION_FILES)}; give the annotation file")


def find_frames(annotations: Path, frames: str | os.PathLike[str] | None = None) -> Path:
    """The folder of frames that belongs to an annotation file.

    Args:
        annotations: the file.
        frames: the folder, where it is known. None looks for `JPEGImages` beside the file, then for `NAME/JPEGImages`
            beside `NAME.json`, as YouTubeVIS 2019 is packed.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if frames is not None:
        if not Path(frames).is_dir():
            raise FileNotFoundError(f"{frames}: there is no such folder of frames")
        return Path(frames)
    beside = annotations.parent / FRAMES_FOLDER
    below = annotations.parent / annotations.stem / FRAMES_FOLDER
    for folder in (beside, below):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{annotations}: there is no folder of frames, neither {beside} nor {below}; name it")


def read_annotations(file: Path, items: str = "videos") -> dict[str, Any]:
    """Parse an annotation file; `annotations` is an empty list where the file has none, as test sets do.

    Args:
        file: the file.
        items: what is annotated: `videos`, or `images` in COCO's format.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is not JSON, or has no list of items or categories.
    """
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: not an annotation file: {error}") from error
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
    names: dict[int, str] = {}
    for row in categories:
        id_, name = get_field(row, "id", int, f"{file}: a category"), get_field(row, "name", str, f"{file}: a category")
        if id_ in names or name in names.values():
            raise DatasetError(f"{file}: category {id_} ({name}) is there twice")
        names[id_] = name
    if not names:
        raise DatasetError(f"{file}: there are no categories")
    return dict(sorted(names.items()))


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


def get_side(row: dict[str, Any], key: str, where: str) -> int:
    """A height or width in pixels.

    Raises:
        DatasetError: it is missing, no integer or not positive; the message starts with `where`.
    """
    side: int = get_field(row, key, int, where)
    if side < 1:
        raise DatasetError(f"{where}: {key} must be positive, got {side}")
    return side


def is_inner_path(name: Any) -> bool:
    """Whether a file name of an annotation file leads to a place inside the folder it is relative to."""
    return isinstance(name, str) and bool(name) and not name.startswith("/") and ".." not in PurePosixPath(name).parts

"""Ground truth and results in the YouTubeVIS format, read and checked.

The format is COCO's with a list per frame: `videos`, `categories` and `annotations` in one file, a list of rows
`{"video_id", "category_id", "score", "segmentations"}` in the other.

Shape letters: T frames, H height, W width.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2f_video.results import Rle, check_rle

Source = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


class EvaluationWarning(UserWarning):
    """Part of the results or annotations is not used as it stands."""


@dataclass(frozen=True, kw_only=True)
class MaskTrack:
    """One object through a video, annotated or predicted.

    Attributes:
        id: of the annotation, or the number of the row in the results, from 0.
        video_id: video it belongs to.
        category_id: its class, an id of the data set.
        masks: T compressed COCO encodings, `counts` as bytes; None where the object is absent.
        pixels: (T,) int64, area of each mask; 0 where it is None or empty.
        area: mean area over the frames where it is not 0, which decides between small, medium and large: as the
            file's `areas` state it for annotations, measured for predictions. 0 where there is none.
        score: confidence of a prediction; 1 for annotations.
        crowd: an annotation that stands for a group: matching it counts neither for nor against a prediction.
    """

    id: int
    video_id: int
    category_id: int
    masks: tuple[Rle | None, ...]
    pixels: np.ndarray
    area: float
    score: float = 1.0
    crowd: bool = False


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """An annotated data set.

    Attributes:
        source: file it comes from, or a word for it, for messages.
        sizes: (height, width, frames) of each video by its id.
        categories: names by id, in rising order of the ids.
        tracks: annotations, in the order of the file.
    """

    source: str
    sizes: dict[int, tuple[int, int, int]]
    categories: dict[int, str]
    tracks: tuple[MaskTrack, ...]


def load_ground_truth(source: Source | Mapping[str, Any], progress: Progress | None = None) -> GroundTruth:
    """Read and check annotations.

    Masks may be polygons, compressed or uncompressed run lengths, or null where the object is absent.

    Args:
        source: path of a JSON file, or its parsed content.
        progress: see `Progress`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is malformed; the message names file, row and fault.
    """
    name, data = _read(source, "ground truth")
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{name}: annotations are an object with videos, categories and annotations, got a {_kind(data)}; are "
            "annotations and results swapped?"
        )
    sizes: dict[int, tuple[int, int, int]] = {}
    for row, video in enumerate(_rows(data, "videos", name)):
        where = f"{name}: video row {row}"
        video_id = _new_id(video, sizes, where)
        height, width, frames = (_integer(video, key, where, least=1) for key in ("height", "width", "length"))
        if height * width >= 2**31:
            raise ValueError(f"{where}: run lengths cannot describe masks of {width} x {height} pixels")
        sizes[video_id] = (height, width, frames)
    categories: dict[int, str] = {}
    for row, category in enumerate(_rows(data, "categories", name)):
        where = f"{name}: category row {row}"
        categories[_new_id(category, categories, where)] = str(_get(category, "name", where))
    tracks: dict[int, MaskTrack] = {}
    rows = _rows(data, "annotations", name)
    for row, annotation in enumerate(rows):
        where = f"{name}: annotation row {row}"
        track_id = _new_id(annotation, tracks, where)
        tracks[track_id] = _annotation(annotation, track_id, sizes, categories, f"{where} (id {track_id})")
        if progress is not None:
            progress("annotations", row + 1, len(rows))
    _warn_of_lengths(tracks.values(), sizes, f"{name}: annotation id")
    return GroundTruth(
        source=name, sizes=sizes, categories=dict(sorted(categories.items())), tracks=tuple(tracks.values())
    )


def load_results(
    source: Source | Sequence[Mapping[str, Any]], ground_truth: GroundTruth, progress: Progress | None = None
) -> list[MaskTrack]:
    """Read and check results against the data set they are for.

    As in the original evaluator, rows of categories that the data set does not have are left out, and of a row with
    more or fewer frames than its video those in common count; both give an `EvaluationWarning`.

    Args:
        source: path of a JSON file, or its parsed content: a list of rows with compressed run lengths or null.
        ground_truth: the data set.
        progress: see `Progress`.

    Returns:
        The tracks, in the order of the rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is malformed; the message names file, row and fault.
    """
    name, rows = _read(source, "results")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Sequence):
        raise ValueError(
            f"{name}: results are a list of rows, got a {_kind(rows)}; of a tracks.json only the list under 'results' "
            "is meant"
        )
    if not rows:
        raise ValueError(f"{name}: the list of results is empty, there is nothing to evaluate")
    tracks: list[MaskTrack] = []
    unknown: list[MaskTrack] = []
    for row, result in enumerate(rows):
        track = _result(result, row, ground_truth, f"{name}: row {row}")
        (tracks if track.category_id in ground_truth.categories else unknown).append(track)
        if progress is not None:
            progress("results", row + 1, len(rows))
    if unknown:
        warnings.warn(
            f"{name}: {len(unknown)} of {len(rows)} rows have a category_id that {ground_truth.source} does not have, "
            f"and are left out: {_shorten(sorted({track.category_id for track in unknown}))}; category ids are the "
            "data set's, mostly from 1",
            EvaluationWarning,
            stacklevel=2,
        )
    _warn_of_lengths(tracks, ground_truth.sizes, f"{name}: row")
    return tracks


def _annotation(
    row: Mapping[str, Any],
    track_id: int,
    sizes: Mapping[int, tuple[int, int, int]],
    categories: Mapping[int, str],
    where: str,
) -> MaskTrack:
    video_id = _integer(row, "video_id", where)
    if video_id not in sizes:
        raise ValueError(f"{where}: video_id {video_id} is not among the videos; add the video or remove the row")
    category_id = _integer(row, "category_id", where)
    if category_id not in categories:
        raise ValueError(f"{where}: category_id {category_id} is not among the categories")
    crowd = row.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{where}: iscrowd must be 0 or 1, got {crowd!r}")
    masks = _masks(row, sizes[video_id], where, annotated=True)
    areas = _list(row, "areas", where)
    if len(areas) != len(masks):
        raise ValueError(f"{where}: {len(areas)} areas for {len(masks)} segmentations; there is one for each frame")
    if not all(area is None or (_is_number(area) and area >= 0) for area in areas):
        raise ValueError(f"{where}: areas must be numbers of pixels, null where the object is absent")
    return MaskTrack(
        id=track_id,
        video_id=video_id,
        category_id=category_id,
        masks=masks,
        pixels=_pixels(masks),
        area=_mean_visible(np.array([area or 0 for area in areas])),
        crowd=bool(crowd),
    )


def _result(row: Any, number: int, ground_truth: GroundTruth, where: str) -> MaskTrack:
    video_id = _integer(row, "video_id", where)
    if video_id not in ground_truth.sizes:
        raise ValueError(
            f"{where}: video_id {video_id} is not among the {len(ground_truth.sizes)} videos of {ground_truth.source}; "
            "are these the annotations that the results were made for?"
        )
    score = _get(row, "score", where)
    if not _is_number(score):
        raise ValueError(f"{where}: the score must be a finite number, got {score!r}")
    category_id = _integer(row, "category_id", where)
    masks = _masks(row, ground_truth.sizes[video_id], where, annotated=False)
    pixels = _pixels(masks)
    return MaskTrack(
        id=number,
        video_id=video_id,
        category_id=category_id,
        masks=masks,
        pixels=pixels,
        area=_mean_visible(pixels),
        score=float(score),
    )


def _masks(
    row: Mapping[str, Any], size: tuple[int, int, int], where: str, *, annotated: bool
) -> tuple[Rle | None, ...]:
    """The masks of a row, checked, `counts` as bytes; None where absent."""
    height, width, _ = size
    masks: list[Rle | None] = []
    for frame, mask in enumerate(_list(row, "segmentations", where)):
        place = f"{where}, frame {frame}"
        if mask is None or (annotated and mask == []):
            masks.append(None)
            continue
        if isinstance(mask, list) or (isinstance(mask, Mapping) and isinstance(mask.get("counts"), list)):
            if not annotated:
                raise ValueError(
                    f'{place}: results take compressed run lengths only, {{"size": [H, W], "counts": text}}; encode '
                    "the mask with pycocotools.mask.encode"
                )
            masks.append(_compress(mask, height, width, place))
            continue
        if isinstance(mask, Mapping) and isinstance(mask.get("counts"), bytes):  # as pycocotools gives them
            mask = {**mask, "counts": mask["counts"].decode("ascii", "replace")}
        check_rle(mask, height, width, place)
        masks.append({"size": [height, width], "counts": mask["counts"].encode("ascii")})
    if not masks:
        raise ValueError(f"{where}: the list of segmentations is empty; there is one, or null, for each frame")
    return tuple(masks)


def _compress(mask: list | Mapping[str, Any], height: int, width: int, where: str) -> Rle:
    """Polygons or uncompressed run lengths as compressed ones."""
    from pycocotools import mask as coco

    if isinstance(mask, list):
        _check_polygons(mask, height, width, where)
        return coco.merge(coco.frPyObjects(mask, height, width))
    if mask.get("size") not in ([height, width], (height, width)):
        raise ValueError(
            f"{where}: the mask is {mask.get('size')} but the video is [{height}, {width}] (height, width)"
        )
    counts = mask["counts"]
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
        raise ValueError(f"{where}: the run lengths are damaged, they do not cover {height} x {width} pixels")
    return coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _check_polygons(polygons: list, height: int, width: int, where: str) -> None:
    """Coordinates far outside would let pycocotools allocate without bound."""
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_number, polygon)):
            raise ValueError(f"{where}: a polygon is a list of at least three points, x, y, x, y, ... in pixels")
        points = np.array(polygon).reshape(-1, 2)
        if (np.abs(points - [width / 2, height / 2]) > [1.5 * width, 1.5 * height]).any():
            raise ValueError(f"{where}: the polygon lies far outside of the picture, {width} x {height}")


def _pixels(masks: Sequence[Rle | None]) -> np.ndarray:
    """(T,) int64, area of each mask."""
    from pycocotools import mask as coco

    pixels = np.zeros(len(masks), np.int64)
    visible = [frame for frame, mask in enumerate(masks) if mask is not None]
    if visible:
        pixels[visible] = coco.area([masks[frame] for frame in visible])
    return pixels


def _mean_visible(areas: np.ndarray) -> float:
    visible = areas[areas > 0]
    return float(visible.mean()) if len(visible) else 0.0


def _warn_of_lengths(tracks: Any, sizes: Mapping[int, tuple[int, int, int]], row: str) -> None:
    wrong = [track for track in tracks if len(track.masks) != sizes[track.video_id][2]]
    if wrong:
        first = wrong[0]
        warnings.warn(
            f"{row} {first.id} has {len(first.masks)} segmentations but its video {sizes[first.video_id][2]} frames, "
            f"{len(wrong)} such row(s) in all; only the frames that an annotation and a result both have are compared",
            EvaluationWarning,
            stacklevel=3,
        )


def _read(source: Any, word: str) -> tuple[str, Any]:
    """(name for messages, parsed content)."""
    if not isinstance(source, str | os.PathLike):
        return word, source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of {word}")
    try:
        return str(path), json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file, or cut off: {error}") from error


def _rows(data: Mapping[str, Any], key: str, name: str) -> Sequence[Any]:
    rows = data.get(key)
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        reason = f"is a {_kind(rows)}, not a list" if rows else "is missing or empty"
        raise ValueError(
            f"{name}: {key!r} {reason}; needed are annotations of the YouTubeVIS format. The public validation and "
            "test files hold none: split a part off the training file"
        )
    return rows


def _new_id(row: Any, known: Mapping[int, Any], where: str) -> int:
    number = _integer(row, "id", where)
    if number in known:
        raise ValueError(f"{where}: id {number} is used before; ids must differ")
    return number


def _get(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be an object, got a {_kind(row)}")
    if key not in row:
        raise ValueError(f"{where} has no {key!r}; it has {_shorten(sorted(map(str, row)))}")
    return row[key]


def _integer(row: Any, key: str, where: str, least: int | None = None) -> int:
    value = _get(row, key, where)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or (least is not None and value < least):
        kind = "an integer" if least is None else f"an integer of at least {least}"
        raise ValueError(f"{where}: {key} must be {kind}, got {value!r}")
    return int(value)


def _list(row: Any, key: str, where: str) -> list | tuple:
    value = _get(row, key, where)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: {key} must be a list with an entry for each frame, got a {_kind(value)}")
    return value


def _is_number(value: Any) -> bool:
    """Whether it is a number with a finite float; whole numbers of JSON can be too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _kind(value: Any) -> str:
    names = {dict: "JSON object", list: "list", type(None): "null", str: "text"}
    return names.get(type(value), type(value).__name__)


def _shorten(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")

"""Ground truth and results in the YouTubeVIS format, read and checked.

The format is COCO's with a list per frame: `videos`, `categories` and `annotations` in one file, a list of rows
`{"video_id", "category_id", "score", "segmentations"}` in the other.

Shape letters: T frames, H height, W width.
"""

import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from m2f_video.data.annotations import category_count_fault, is_area
from m2f_video.files import check_regular, parse_json, read_json
from m2f_video.results.masks import Rle, check_picture_size, compress_segmentation

Source = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

_MOST_UNPACKED, _MOST_UNPACKED_RATIO = 2**26, 20  # bytes; run lengths pack to a half or a third


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
            file's `areas` state it for annotations, measured for predictions and where there are no `areas`. 0 where
            there is none.
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
        height, width = (_integer(video, key, where, least=1) for key in ("height", "width"))
        try:
            check_picture_size(height, width)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        sizes[video_id] = (height, width, _length(video, where))
    categories: dict[int, str] = {}
    rows = _rows(data, "categories", name)
    if message := category_count_fault(len(rows)):
        raise ValueError(f"{name}: {message}")
    for row, category in enumerate(rows):
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
    more or fewer frames than its video those in common count; both give an `EvaluationWarning`. No rows at all are no
    error: nothing was found then.

    Args:
        source: path of a JSON file or of a submission's zip with `results.json`, or the parsed content: a list of rows
            with compressed run lengths or null.
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
        raise ValueError(f"{where}: iscrowd must be 0 or 1, got {crowd!r:.60}")
    masks = _masks(row, sizes[video_id], where, annotated=True)
    pixels = _pixels(masks)
    areas = pixels
    if row.get("areas") is not None:
        stated = _list(row, "areas", where)
        if len(stated) != len(masks):
            raise ValueError(
                f"{where}: {len(stated)} areas for {len(masks)} segmentations; there is one for each frame"
            )
        if not all(map(is_area, stated)):
            raise ValueError(f"{where}: areas must be numbers of pixels, null where the object is absent")
        areas = np.array([area or 0 for area in stated])
    return MaskTrack(
        id=track_id,
        video_id=video_id,
        category_id=category_id,
        masks=masks,
        pixels=pixels,
        area=_mean_visible(areas),
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
        raise ValueError(f"{where}: the score must be a finite number, got {score!r:.60}")
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
        if mask is None:
            masks.append(None)
            continue
        if not annotated and (isinstance(mask, list) or isinstance(_counts(mask), list)):
            raise ValueError(
                f"{where}, frame {frame}: results take compressed run lengths only, "
                '{"size": [H, W], "counts": text}; encode the mask with pycocotools.mask.encode'
            )
        if isinstance(counts := _counts(mask), bytes):  # as pycocotools gives them
            mask = {**mask, "counts": counts.decode("ascii", "replace")}
        try:
            rle = compress_segmentation(mask, height, width)
        except ValueError as error:
            raise ValueError(f"{where}, frame {frame}: {error}") from error
        masks.append(None if rle is None else {"size": [height, width], "counts": rle["counts"].encode("ascii")})
    if not masks:
        raise ValueError(f"{where}: the list of segmentations is empty; there is one, or null, for each frame")
    return tuple(masks)


def _counts(mask: Any) -> Any:
    return mask.get("counts") if isinstance(mask, Mapping) else None


def _length(video: Mapping[str, Any], where: str) -> int:
    """Number of frames that a video says it has, or that it lists."""
    names = video.get("file_names")
    count = len(names) if isinstance(names, list | tuple) else None
    if count and video.get("length") is None:
        return count
    length = _integer(video, "length", where, least=1)
    if count is not None and length != count:
        raise ValueError(f"{where}: length is {length}, but there are {count} file names")
    return length


def _pixels(masks: Sequence[Rle | None]) -> np.ndarray:
    """(T,) int64, area of each mask."""
    from pycocotools import mask as coco

    # one by one: with NumPy 2 the areas of a list are taken of at most 255 masks
    return np.array([0 if mask is None else int(coco.area(mask)) for mask in masks], np.int64)


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
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of {word}")
    return str(path), _read_zip(path) if zipfile.is_zipfile(path) else read_json(path)


def _read_zip(path: Path) -> Any:
    """What the only JSON file of a zip holds, such as the submission that `write_submission` writes."""
    limit = max(_MOST_UNPACKED, _MOST_UNPACKED_RATIO * path.stat().st_size)
    content = b""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if PurePosixPath(entry.filename).suffix == ".json"]
            for entry in entries[:1]:
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile("its entry is packed by another method than deflate")
                with archive.open(entry) as file:
                    content = file.read(limit + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a zip that can be read: {error!s:.120}") from error
    if len(entries) != 1:
        raise ValueError(f"{path}: a zip of results holds one JSON file, this one {len(entries)}")
    name = f"{entries[0].filename:.60}"
    if len(content) > limit:
        raise ValueError(f"{path}: {name} has more than {limit} bytes; unpack it and give the file")
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {name} is not a JSON file, or cut off: {error}") from error


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
        raise ValueError(f"{where} has no {key!r}; it has {_shorten(sorted(map(str, row))):.120}")
    return row[key]


def _integer(row: Any, key: str, where: str, least: int | None = None) -> int:
    value = _get(row, key, where)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or (least is not None and value < least):
        kind = "an integer" if least is None else f"an integer of at least {least}"
        raise ValueError(f"{where}: {key} must be {kind}, got {value!r:.60}")
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

"""Ground truth and results in the YouTubeVIS format, read and checked.

The format is COCO's with a list per frame: `videos`, `categories` and `annotations` in one file, a list of rows
`{"video_id", "category_id", "score", "segmentations"}` in the other.

Shape letters: T frames, H height, W width.
"""

import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from m2f_video.data.annotations import Row, parse_annotations
from m2f_video.files import check_regular, parse_json, read_json
from m2f_video.results.masks import Rle, check_rle, compress_segmentation, mask_area

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
        masks: T compressed COCO encodings; None where the object is absent.
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
    parsed = parse_annotations(data, name, with_frames=False, per_frame=("areas",))
    if not parsed.annotations:
        raise ValueError(
            f"{name}: 'annotations' is missing or empty. The public validation and test files hold none: split a part "
            "off the training file"
        )
    sizes = {id_: (video.height, video.width, video.num_frames) for id_, video in parsed.videos.items()}
    tracks: list[MaskTrack] = []
    for annotation in parsed.annotations:
        tracks.append(
            _track(
                annotation.segmentations,
                sizes[annotation.video_id],
                compress_segmentation,
                f"{name}: annotation {annotation.id}",
                annotation.areas,
                id=annotation.id,
                video_id=annotation.video_id,
                category_id=annotation.category_id,
                crowd=annotation.crowd,
            )
        )
        if progress is not None:
            progress("annotations", len(tracks), len(parsed.annotations))
    _warn_of_lengths(tracks, sizes, f"{name}: annotation id")
    return GroundTruth(source=name, sizes=sizes, categories=parsed.categories, tracks=tuple(tracks))


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
    if not isinstance(rows, list | tuple):
        raise ValueError(f"{name}: results are a list of rows; of a tracks.json only the list under 'results' is meant")
    tracks: list[MaskTrack] = []
    unknown: list[MaskTrack] = []
    for row, result in enumerate(rows):
        track = parse_result(result, row, ground_truth, name)
        (tracks if track.category_id in ground_truth.categories else unknown).append(track)
        if progress is not None:
            progress("results", row + 1, len(rows))
    if unknown:
        ids = sorted({track.category_id for track in unknown})
        warnings.warn(
            f"{name}: {len(unknown)} of {len(rows)} rows have a category_id that {ground_truth.source} does not have, "
            f"and are left out: {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}; category ids are the "
            "data set's, mostly from 1",
            EvaluationWarning,
            stacklevel=2,
        )
    _warn_of_lengths(tracks, ground_truth.sizes, f"{name}: row")
    return tracks


def parse_result(result: Any, number: int, ground_truth: GroundTruth, name: str) -> MaskTrack:
    """Check a row of results; whether its category and its number of frames are the data set's is the caller's matter.

    Args:
        result: the row.
        number: its place in the results, from 0.
        ground_truth: the data set; only its videos matter.
        name: of the results, for messages.

    Raises:
        ValueError: it is malformed; the message names file, row and fault.
    """
    if not isinstance(result, Mapping):
        raise ValueError(f"{name}: row {number} must be an object, got {result!r:.60}")
    row = Row(result, f"row {number}", name)
    video_id, category_id = row.get("video_id", int), row.get("category_id", int)
    score: Any = result.get("score")
    if video_id not in ground_truth.sizes:
        row.fault(
            f"video_id {video_id} is not among the {len(ground_truth.sizes)} videos of {ground_truth.source}; are "
            "these the annotations that the results were made for?"
        )
    is_number = isinstance(score, int | float | np.number) and not isinstance(score, bool)
    if not is_number or not abs(score) <= sys.float_info.max:  # whole numbers can be too large for a float
        row.fault(f"the score must be a finite number, got {score!r:.60}")
    return _track(
        row.get("segmentations", list),
        ground_truth.sizes[video_id],
        check_rle,
        f"{name}: {row.where}",
        id=number,
        video_id=video_id,
        category_id=category_id,
        score=float(score),
    )


def _track(
    segmentations: Sequence[Any],
    size: tuple[int, int, int],
    check: Callable[[Any, int, int], Rle | None],
    where: str,
    areas: Sequence[Any] | None = None,
    **fields: Any,
) -> MaskTrack:
    """A track of these fields, whose masks are checked and measured; areas that are stated go before."""
    if not segmentations:
        raise ValueError(f"{where}: the list of segmentations is empty; there is one, or null, for each frame")
    masks: list[Rle | None] = []
    for frame, mask in enumerate(segmentations):
        try:
            masks.append(None if mask is None else check(mask, *size[:2]))
        except ValueError as error:
            raise ValueError(f"{where}, frame {frame}: {error}") from error
    # one by one: with NumPy 2 pycocotools takes the areas of a list of at most 255 masks
    pixels = np.array([0 if mask is None else mask_area(mask) for mask in masks], np.int64)
    stated = pixels if areas is None else np.array([area or 0 for area in areas])
    visible = stated[stated > 0]
    area = float(visible.mean()) if len(visible) else 0.0
    return MaskTrack(masks=tuple(masks), pixels=pixels, area=area, **fields)


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

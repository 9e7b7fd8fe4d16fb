"""Reading results from files: `tracks.json` as a whole, `tracks.jsonl` as masks are asked for."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from m2f_video.files import check_regular, read_json
from m2f_video.results.masks import Rle, check_picture_size, check_rle
from m2f_video.results.track import Track, show_few
from m2f_video.results.tracks_file import TRACKS_LINES_FILE, FrameMasks, TracksLines

TRACKS_FILE = "tracks.json"
_MOST_MASKS = 2**27  # 1 GiB, were all of them None

Result = TypeVar("Result")


def read_result(make: Callable[..., Result], path: str | os.PathLike[str], every_track: bool) -> Result:
    """What `VideoSegmentation.load` does.

    Args:
        make: `VideoSegmentation`, which takes what is read.
        path: see there.
        every_track: see there.

    Raises:
        FileNotFoundError: see there.
        ValueError: see there.
    """
    file = Path(path)
    if file.is_dir():
        names = (TRACKS_LINES_FILE,) if every_track else (TRACKS_FILE, TRACKS_LINES_FILE)
        file = next((file / name for name in names if (file / name).exists()), file / names[0])
    check_regular(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such result file")
    try:
        if file.suffix != ".jsonl":
            if every_track:
                raise ValueError(f"the tracks that were left out are in {TRACKS_LINES_FILE} alone")
            return make(**_whole(read_json(file)))
        lines = TracksLines(file)
        result = make(**_by_line(lines, every_track))
    except ValueError as error:
        raise ValueError(f"{file}: not a result of this program: {str(error).removeprefix(f'{file}: ')}") from error
    if not lines.complete:
        warnings.warn(
            f"{lines.path} is of a run that was stopped or is at work: {len(lines.frames)} frames, and the tracks "
            f"as they were {lines.frames_since} frames before",
            stacklevel=3,
        )
    return result


def make_track(row: Any, where: str, id_: int, query_id: int, segmentations: Sequence[Rle | None]) -> Track:
    """A track of a row of parsed JSON that has `category`, `category_id`, `score` and perhaps `certainty`.

    Args:
        row: of a file.
        where: what it is, for messages.
        id_: of the track.
        query_id: of the track.
        segmentations: of the track.

    Raises:
        ValueError: a value is missing or of a wrong type.
    """
    return Track(
        id=id_,
        label=get_value(row, "category", str, where),
        label_id=get_value(row, "category_id", int, where) - 1,
        score=get_value(row, "score", (int, float), where),
        certainty=get_value({"certainty": math.nan} | row, "certainty", (int, float), where),  # older files have none
        query_id=query_id,
        segmentations=segmentations,
    )


def row_of(track: Track) -> dict[str, Any]:
    """What files say of a track beside its masks; `make_track` reads it."""
    return {
        "id": track.id,
        "category_id": track.label_id + 1,
        "category": track.label,
        "score": track.score,
        "certainty": track.certainty,
    }


def number_queries(tracks: Sequence[Sequence[Rle | None]]) -> list[int]:
    """For the masks of each track the number, from 0, of the first track that has the same ones."""
    first: dict[tuple[str | None, ...], int] = {}
    keys = (tuple(None if rle is None else rle["counts"] for rle in masks) for masks in tracks)
    return [first.setdefault(key, index) for index, key in enumerate(keys)]


def spread_masks(seen: Mapping[int, Mapping[int, Rle]], num_frames: int) -> dict[int, tuple[Rle | None, ...]]:
    """One mask, or None, for every frame, of tracks whose masks are known by track and frame.

    Raises:
        ValueError: there are more tracks and frames than fit into memory.
    """
    if len(seen) * num_frames > _MOST_MASKS:
        raise ValueError(f"{len(seen)} tracks in {num_frames} frames are too many for a result in memory")
    return {id_: tuple(masks.get(frame) for frame in range(num_frames)) for id_, masks in seen.items()}


def get_value(data: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of parsed JSON.

    Raises:
        ValueError: it is missing or of another type; the message says where.
    """
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"{where} has no {key!r}")
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {key!r} has the wrong type, {type(value).__name__}")
    return value


def _whole(data: Any) -> dict[str, Any]:
    """Fields of a result from a parsed `tracks.json`."""
    fields = read_fields(data)
    rows = get_value(data, "results", list, "the file")
    masks = [
        check_masks(get_value(row, "segmentations", list, f"result {index}"), fields, f"result {index}")
        for index, row in enumerate(rows)
    ]
    tracks: list[Track] = []
    for index, (row, query_id) in enumerate(zip(rows, number_queries(masks), strict=True)):
        id_ = get_value(row, "id", int, f"result {index}") if "id" in row else index + 1
        tracks.append(make_track(row, f"result {index}", id_, query_id, masks[index]))
    frames = get_value(data["video"], "frames", list, "video")
    if any(type(frame) is not int for frame in frames):
        raise ValueError(f"video: frames must be whole numbers, got {show_few(frames)}")
    return {**fields, "frames": tuple(frames), "tracks": tuple(tracks)}


def check_masks(rows: Sequence[Any], size: dict[str, Any], where: str) -> tuple[Rle | None, ...]:
    """Check run lengths from a file.

    Args:
        rows: of parsed JSON, one a frame.
        size: `height` and `width` that they must have.
        where: whose they are, for messages.

    Raises:
        ValueError: one is damaged, or of another size; the message names its frame.
    """
    masks: list[Rle | None] = []
    for position, rle in enumerate(rows):
        try:
            masks.append(None if rle is None else check_rle(rle, size["height"], size["width"]))
        except ValueError as error:
            raise ValueError(f"{where}, frame {position}: {error}") from error
    return tuple(masks)


def _by_line(lines: TracksLines, every_track: bool) -> dict[str, Any]:
    """Fields of a result from a `tracks.jsonl`."""
    if not lines.frames:
        raise ValueError("there is no frame in it yet")
    if every_track and lines.others is None:
        raise ValueError("it does not say which tracks were left out: a complete one in windows does")
    fields, tracks = read_fields(lines.header), []
    for index, row in enumerate(lines.tracks + (lines.others or []) if every_track else lines.tracks):
        where = f"track {index} of the last line of tracks"
        key = get_value(row, "masks", int, where)
        tracks.append(make_track(row, where, get_value(row, "id", int, where), key, FrameMasks(lines, key)))
    made = get_value(lines.header, "made", dict, "the header")
    return {**fields, "frames": lines.frames, "tracks": tuple(tracks), "made": made}


def read_fields(data: Any) -> dict[str, Any]:
    """Of a result, what files say of the video and of the classes.

    Args:
        data: parsed JSON, with `video` and `categories`.

    Raises:
        ValueError: a part is missing or wrong; the message says which.
    """
    video = get_value(data, "video", dict, "the file")
    height, width = get_value(video, "height", int, "video"), get_value(video, "width", int, "video")
    check_picture_size(height, width)
    labels = []
    for index, category in enumerate(get_value(data, "categories", list, "the file")):
        if get_value(category, "id", int, f"category {index}") != index + 1:
            raise ValueError(f"category {index}: ids must count from 1, got {category['id']}")
        labels.append(get_value(category, "name", str, f"category {index}"))
    return {
        "source": get_value(video, "source", str, "video"),
        "width": width,
        "height": height,
        "fps": get_value(video, "fps", (int, float), "video"),
        "labels": tuple(labels),
    }

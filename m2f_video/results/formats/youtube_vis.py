"""Results as rows of a YouTubeVIS submission: one per track, with a mask or null for every frame."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from m2f_video.files import atomic_path, read_json
from m2f_video.results.formats.methods import Formats, Progress
from m2f_video.results.masks import check_picture_size, plain_rle
from m2f_video.results.reading import Result, check_masks, get_value, make_track, number_queries, row_of

Row = dict[str, Any]

_AT_ONCE = 64  # tracks, with a temporary file each


def youtube_vis_rows(result: Formats, video_id: int) -> list[Row]:
    """See `VideoSegmentation.to_youtube_vis`."""
    rows: list[Row] = [{"video_id": video_id, **row_of(track), "segmentations": []} for track in result.tracks]
    for frame in range(len(result.frames)):  # frame by frame, as they are read
        for row, track in zip(rows, result.tracks, strict=True):
            row["segmentations"].append(track.segmentations[frame])
    return rows


def write_youtube_vis(
    result: Formats, path: str | os.PathLike[str], video_id: int = 1, progress: Progress | None = None
) -> None:
    """Write what `VideoSegmentation.to_youtube_vis` gives to a JSON file, with one frame in memory at a time.

    Args:
        result: the tracks.
        path: of the file. It appears when it is complete, and not at all when anything fails.
        video_id: of the video in the dataset.
        progress: see `Progress`; of more than 64 tracks the frames are read once for each 64.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for first in range(0, len(result.tracks), _AT_ONCE):
            tracks = result.tracks[first : first + _AT_ONCE]
            with ExitStack() as stack:
                columns = [
                    stack.enter_context(TemporaryFile("w+", encoding="utf-8", dir=temporary.parent)) for _ in tracks
                ]
                for frame in range(len(result.frames)):
                    for track, column in zip(tracks, columns, strict=True):
                        column.write((", " if frame else "") + json.dumps(track.segmentations[frame]))
                    if progress is not None:
                        progress(frame + 1, len(result.frames))
                for place, (track, column) in enumerate(zip(tracks, columns, strict=True), first):
                    row = json.dumps({"video_id": video_id, **row_of(track)}, allow_nan=False).removesuffix("}")
                    file.write((",\n" if place else "\n") + row + ', "segmentations": [')
                    column.seek(0)
                    shutil.copyfileobj(column, file)
                    file.write("]}")
        file.write("]\n")


def read_youtube_vis(
    make: Callable[..., Result],
    source: str | os.PathLike[str] | Sequence[Any],
    labels: Sequence[str],
    video_id: int | None,
    size: tuple[int, int] | None,
    fps: float,
    frames: Iterable[int] | None,
) -> Result:
    """See `VideoSegmentation.from_youtube_vis`; `make` is that class."""
    if not isinstance(source, str | os.PathLike):
        return make(**_fields(list(source), labels, video_id, size, frames), source="<youtube-vis>", fps=fps)
    rows = read_json(source)
    if isinstance(rows, dict) and "results" in rows:
        raise ValueError(f"{source} is a tracks.json; read it with VideoSegmentation.load")
    try:
        if not isinstance(rows, list):
            raise ValueError("results are a list of rows")
        return make(**_fields(rows, labels, video_id, size, frames), source=Path(source).stem, fps=fps)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _fields(
    rows: list[Any],
    labels: Sequence[str],
    video_id: int | None,
    size: tuple[int, int] | None,
    frames: Iterable[int] | None,
) -> Row:
    """Of a result."""
    numbered = _of_video(rows, video_id)
    masks = [get_value(row, "segmentations", (list, tuple), f"row {number}") for number, row in numbered]
    size = size or _size(masks)
    check_picture_size(*size)
    sizes = {"height": size[0], "width": size[1]}
    checked = [check_masks(each, sizes, f"row {number}") for (number, _), each in zip(numbered, masks, strict=True)]
    tracks = []
    for place, ((number, row), query) in enumerate(zip(numbered, number_queries(checked), strict=True)):
        where = f"row {number}"
        category = get_value(row, "category_id", int, where)
        if not 1 <= category <= len(labels):
            raise ValueError(f"{where}: category_id {category} is none of the {len(labels)} labels, counted from 1")
        id_ = get_value(row, "id", int, where) if "id" in row else place + 1
        tracks.append(make_track(row | {"category": labels[category - 1]}, where, id_, query, checked[place]))
    if frames is None:
        frames = range(max(map(len, masks), default=0))
    return {**sizes, "frames": tuple(frames), "labels": tuple(labels), "tracks": tuple(tracks)}


def _of_video(rows: list[Any], video_id: int | None) -> list[tuple[int, Row]]:
    """The rows of a video, each with its number."""
    of_video: dict[int, list[tuple[int, Row]]] = {}
    for number, row in enumerate(rows):
        of_video.setdefault(get_value(row, "video_id", int, f"row {number}"), []).append((number, row))
    if video_id is None:
        if len(of_video) > 1:
            few = ", ".join(map(str, sorted(of_video)[:8]))
            raise ValueError(f"the rows are of {len(of_video)} videos ({few}, ...); say which with video_id")
        return next(iter(of_video.values()), [])
    return of_video.get(video_id, [])


def _size(masks: Iterable[Sequence[Any]]) -> tuple[int, int]:
    """That the first mask states."""
    stated: Iterator[Any] = (plain_rle(rle) for each in masks for rle in each if rle is not None)
    for rle in stated:
        if rle is not None:
            return rle["size"][0], rle["size"][1]
    raise ValueError("there is no mask to tell the size of the video by; give size=(height, width)")

"""A result as a table: a row for every track in every frame where it is seen."""

import csv
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from m2f_video.files import atomic_path
from m2f_video.results.formats.methods import Formats, Progress
from m2f_video.results.masks import mask_area, mask_box

COLUMNS: dict[str, type] = {
    "frame": int,
    "time": float,
    "id": int,
    "label": str,
    "label_id": int,
    "score": float,
    "certainty": float,
    "x": int,
    "y": int,
    "width": int,
    "height": int,
    "area": int,
}
"""Of the table, with their types: `frame` in the source, from 0, `time` in seconds, the box and the area in pixels."""


def optional(name: str, what: str) -> Any:
    """A package that only some results need.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{what} needs {name}: pip install 'm2f-video[results]' ({error})") from error


def table_rows(result: Formats, frame: int) -> Iterator[tuple[Any, ...]]:
    """Rows of a frame, in the order of the tracks, with values as `COLUMNS` has them."""
    number = result.frames[frame]
    for track in result.tracks:
        rle = track.segmentations[frame]
        if rle is not None and (box := mask_box(rle)) is not None:
            of_track = track.id, track.label, track.label_id, track.score, track.certainty
            yield (number, number / result.fps, *of_track, *box, mask_area(rle))


def write_csv(result: Formats, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """See `VideoSegmentation.to_csv`."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for frame in range(len(result.frames)):
            writer.writerows(table_rows(result, frame))
            if progress is not None:
                progress(frame + 1, len(result.frames))


def data_frame(result: Formats) -> Any:
    """See `VideoSegmentation.to_dataframe`."""
    pandas = optional("pandas", "to_dataframe")
    rows = [row for frame in range(len(result.frames)) for row in table_rows(result, frame)]
    types = {name: "int64" if kind is int else "float64" for name, kind in COLUMNS.items() if kind is not str}
    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(types)

"""Results as a folder of maps, a PNG a frame, whose pixels are numbers of tracks: as DAVIS has its annotations.

`ids.json` beside them says what the numbers stand for, so that the folder can be read back.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from m2f_video.files import new_folder, read_json
from m2f_video.results.formats.methods import Formats, Progress
from m2f_video.results.formats.one_id import owner_map
from m2f_video.results.masks import Rle, check_picture_size, encode_mask
from m2f_video.results.reading import Result, get_value, make_track, number_queries, read_fields, row_of, spread_masks
from m2f_video.results.tracks_file import categories_of

IDS_FILE = "ids.json"
_LARGEST, _VOID = 255, 255


def davis_palette() -> np.ndarray:
    """The 256 colours of PASCAL VOC, which DAVIS took over, uint8 RGB (256, 3).

    Of a number's bits, from the lowest on, each first goes to red, each second to green and each third to blue, where
    it fills bits from the highest on.
    """
    numbers, bits = np.arange(256)[:, None], np.arange(24)
    shifted = ((numbers >> bits) & 1) << (7 - bits // 3)
    return np.stack([shifted[:, channel::3].sum(1) for channel in range(3)], 1).astype(np.uint8)


def write_png(result: Formats, folder: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """See `VideoSegmentation.to_png`."""
    from PIL import Image

    values = _values([track.id for track in result.tracks])
    table, palette = np.array([0, *values], np.uint8), davis_palette().tobytes()
    with new_folder(folder) as temporary:
        for position, number in enumerate(result.frames):
            image = Image.fromarray(table[owner_map(result, position)])
            image.putpalette(palette)
            image.save(temporary / f"{number:05d}.png")
            if progress is not None:
                progress(position + 1, len(result.frames))
        size = {"width": result.width, "height": result.height}
        said = {
            "video": {"source": result.source, **size, "fps": result.fps},
            "categories": categories_of(result.labels),
            "tracks": [{"value": value, **row_of(track)} for value, track in zip(values, result.tracks, strict=True)],
        }
        (temporary / IDS_FILE).write_text(json.dumps(said, allow_nan=False), encoding="utf-8")


def _values(ids: list[int]) -> list[int]:
    """What stands for each track: its id where all fit into a pixel, else its place, from 1."""
    if len(ids) > _LARGEST:
        raise ValueError(
            f"{len(ids)} tracks are more than the {_LARGEST} that a pixel can tell apart; leave some out with "
            "dataclasses.replace(result, tracks=result.tracks[:255])"
        )
    return ids if all(1 <= id_ <= _LARGEST for id_ in ids) else list(range(1, len(ids) + 1))


def read_png(make: Callable[..., Result], folder: str | os.PathLike[str], fps: float) -> Result:
    """See `VideoSegmentation.from_png`; `make` is that class."""
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: there is no such folder")
    files = sorted(place.glob("*.png"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise ValueError(f"{place} holds no PNG files")
    named = (place / IDS_FILE).exists()
    try:
        maps: dict[int, dict[int, Rle]] = {}
        size = (0, 0)
        for position, file in enumerate(files):
            size, masks = _read_map(file, size, None if named else _VOID)
            for value, rle in masks.items():
                maps.setdefault(value, {})[position] = rle
        head = _stated(read_json(place / IDS_FILE)) if named else _foreign(place.name, size, fps, sorted(maps))
        if (head["height"], head["width"]) != size:
            raise ValueError(f"the maps are {size} but {IDS_FILE} says {head['height']} x {head['width']}")
        rows: dict[int, dict[str, Any]] = head.pop("rows")
        if unknown := sorted(set(maps) - set(rows)):
            raise ValueError(f"the maps hold {unknown[0]}, of which {IDS_FILE} says nothing")
        spread = spread_masks({value: maps.get(value, {}) for value in rows}, len(files))
        queries = number_queries(list(spread.values()))
        tracks = [
            make_track(row, f"track {value}", get_value(row, "id", int, f"track {value}"), query, spread[value])
            for (value, row), query in zip(rows.items(), queries, strict=True)
        ]
        return make(**head, frames=_numbers(files), tracks=tuple(tracks))
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from error


def _stated(data: Any) -> dict[str, Any]:
    """What `ids.json` says: fields of a result, and rows of tracks by their value."""
    rows: dict[int, dict[str, Any]] = {}
    for index, row in enumerate(get_value(data, "tracks", list, IDS_FILE)):
        value = get_value(row, "value", int, f"{IDS_FILE}, track {index}")
        if value in rows or not 1 <= value <= _LARGEST:
            raise ValueError(f"{IDS_FILE}, track {index}: a value is one track's, from 1 to {_LARGEST}, got {value}")
        rows[value] = row
    return {**read_fields(data), "rows": rows}


def _foreign(name: str, size: tuple[int, int], fps: float, values: list[int]) -> dict[str, Any]:
    """The same for maps that nothing is known about."""
    rows = {value: {"id": value, "category_id": 1, "category": "object", "score": 1.0} for value in values}
    return {"source": name, "height": size[0], "width": size[1], "fps": fps, "labels": ("object",), "rows": rows}


def _read_map(file: Path, size: tuple[int, int], void: int | None) -> tuple[tuple[int, int], dict[int, Rle]]:
    """Size of a map and its masks by value, but for that of pixels that are nobody's to say."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"{file.name} is no map of numbers: its pixels are {image.mode}")
            check_picture_size(image.height, image.width)
            values = np.asarray(image).astype(np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file.name} is no PNG, or cut off: {error}") from error
    if size not in ((0, 0), values.shape):
        raise ValueError(f"{file.name} is {values.shape} (height, width), and those before it {size}")
    masks = {}
    for value in np.unique(values).tolist():
        if value and value != void and (rle := encode_mask(values == value)) is not None:
            masks[value] = rle
    return (values.shape[0], values.shape[1]), masks


def _numbers(files: list[Path]) -> tuple[int, ...]:
    """Of the frames: what the files are named, where that is a number, else their places."""
    if all(file.stem.isascii() and file.stem.isdecimal() and len(file.stem) < 18 for file in files):
        return tuple(int(file.stem) for file in files)
    return tuple(range(len(files)))

"""Results in COCO's format: an image is a frame, an annotation a track in it.

The lists `videos` and `tracks` and the keys `track_id`, `frame_index`, `score` and `certainty` are added, as TAO does;
readers of COCO leave them alone.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from m2f_video.files import atomic_path, read_json
from m2f_video.results.formats.methods import Formats, Progress
from m2f_video.results.masks import Rle, check_picture_size, compress_segmentation, mask_area, mask_box
from m2f_video.results.reading import Result, get_value, make_track, number_queries, row_of, spread_masks
from m2f_video.results.track import check_position
from m2f_video.results.tracks_file import categories_of

Row = dict[str, Any]


def coco_dict(result: Formats, frame: int | None = None) -> Row:
    """See `VideoSegmentation.to_coco`."""
    length = len(result.frames)
    frames = range(length) if frame is None else (check_position(frame, length),)
    return _head(result) | {"images": list(_images(result, frames)), "annotations": list(_annotations(result, frames))}


def write_coco(result: Formats, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Write what `coco_dict` gives of all frames to a JSON file, with one frame in memory at a time.

    Args:
        result: the tracks.
        path: of the file. It appears when it is complete, and not at all when anything fails.
        progress: see `Progress`.

    Raises:
        OSError: the file cannot be written.
    """
    frames = range(len(result.frames))

    def told() -> Iterator[int]:
        for frame in frames:
            yield frame
            if progress is not None:
                progress(frame + 1, len(frames))

    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(_head(result), allow_nan=False).removesuffix("}"))
        for name, rows in (("images", _images(result, frames)), ("annotations", _annotations(result, told()))):
            file.write(f',\n"{name}": [')
            for number, row in enumerate(rows):
                file.write((",\n" if number else "\n") + json.dumps(row, allow_nan=False))
            file.write("]")
        file.write("}\n")


def _head(result: Formats) -> Row:
    size = {"width": result.width, "height": result.height}
    return {
        "videos": [{"id": 1, "name": result.source, **size, "fps": result.fps, "length": len(result.frames)}],
        "categories": categories_of(result.labels),
        "tracks": [{"video_id": 1, **row_of(track)} for track in result.tracks],
    }


def _images(result: Formats, frames: Iterable[int]) -> Iterator[Row]:
    for frame in frames:
        number = result.frames[frame]
        yield {
            "id": frame + 1,
            "video_id": 1,
            "file_name": f"{number:05d}.jpg",
            "frame_index": number,
            "width": result.width,
            "height": result.height,
        }


def _annotations(result: Formats, frames: Iterable[int]) -> Iterator[Row]:
    ids = count(1)
    for frame in frames:
        for track in result.tracks:
            rle = track.segmentations[frame]
            if rle is None or (box := mask_box(rle)) is None:
                continue
            yield {
                "id": next(ids),
                "image_id": frame + 1,
                "video_id": 1,
                "track_id": track.id,
                "category_id": track.label_id + 1,
                "iscrowd": 0,
                "bbox": list(box),
                "area": mask_area(rle),
                "segmentation": rle,
                "score": track.score,
            }


def read_coco(make: Callable[..., Result], source: str | os.PathLike[str] | Mapping[str, Any]) -> Result:
    """See `VideoSegmentation.from_coco`; `make` is that class."""
    if isinstance(source, Mapping):
        return make(**_fields(dict(source), "<coco>"))
    data = read_json(source)
    try:
        return make(**_fields(data, Path(source).stem))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _fields(data: Any, name: str) -> Row:
    """Of a result."""
    images = _read_images(get_value(data, "images", list, "the file"))
    height, width = images[0]["height"], images[0]["width"]
    category_ids, labels = _read_categories(get_value(data, "categories", list, "the file"))
    places = {image["id"]: place for place, image in enumerate(images)}
    stated = _rows(data, "tracks")
    tracks = {_id(row, f"track {place}"): dict(row) for place, row in enumerate(stated)}
    if len(tracks) != len(stated):
        raise ValueError("two tracks have the same id")
    seen: dict[int, dict[int, Rle]] = {id_: {} for id_ in tracks}
    for place, row in enumerate(get_value(data, "annotations", list, "the file")):
        where = f"annotation {row['id'] if isinstance(row, dict) and type(row.get('id')) is int else place}"
        id_ = _track_id(row, place, len(images), where)
        image = get_value(row, "image_id", int, where)
        if image not in places:
            raise ValueError(f"{where}: image_id {image} is not among the images")
        _merge(tracks.setdefault(id_, {}), row, where)
        masks = seen.setdefault(id_, {})
        if places[image] in masks:
            raise ValueError(f"{where}: track {id_} is there twice in image {image}")
        segmentation = get_value(row, "segmentation", (dict, list), where)
        try:
            rle = compress_segmentation(segmentation, height, width)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if rle is not None:
            masks[places[image]] = rle
    spread = spread_masks(seen, len(images))
    made = []
    for (id_, row), query in zip(tracks.items(), number_queries([spread[id_] for id_ in tracks]), strict=True):
        where = f"track {id_}"
        if (category := get_value(row, "category_id", int, where)) not in category_ids:
            raise ValueError(f"{where}: category_id {category} is not among the categories")
        label_id = category_ids.index(category)
        row = {"score": 1.0} | row | {"category_id": label_id + 1, "category": labels[label_id]}
        made.append(make_track(row, where, id_, query, spread[id_]))
    video = next(iter(_rows(data, "videos")), {})
    return {
        "source": get_value({"name": name} | video, "name", str, "the video"),
        "width": width,
        "height": height,
        "fps": get_value({"fps": 25.0} | video, "fps", (int, float), "the video"),
        "frames": tuple(image["frame_index"] for image in images),
        "labels": tuple(labels),
        "tracks": tuple(made),
    }


def _read_images(rows: Sequence[Any]) -> list[Row]:
    """The images in the order of the video, all of one size, each with its `frame_index`."""
    images = []
    for place, row in enumerate(rows):
        where = f"image {place}"
        image = {key: get_value(row, key, int, where) for key in ("id", "width", "height")}
        images.append(image | {"frame_index": get_value({"frame_index": place} | row, "frame_index", int, where)})
    if not images:
        raise ValueError("there are no images")
    if len({image["id"] for image in images}) != len(images):
        raise ValueError("two images have the same id")
    sizes = sorted({(image["height"], image["width"]) for image in images})
    if len(sizes) > 1:
        raise ValueError(f"the images are of one video, but have sizes {sizes[0]} and {sizes[1]} (height, width)")
    check_picture_size(*sizes[0])
    return sorted(images, key=lambda image: image["frame_index"])


def _read_categories(rows: Sequence[Any]) -> tuple[list[int], list[str]]:
    ids = [_id(row, f"category {place}") for place, row in enumerate(rows)]
    if len(set(ids)) != len(ids):
        raise ValueError("two categories have the same id")
    return ids, [get_value(row, "name", str, f"category {place}") for place, row in enumerate(rows)]


def _track_id(row: Any, place: int, num_images: int, where: str) -> int:
    """Of an annotation; in a single image each is a track of its own where none is named."""
    if isinstance(row, dict) and "track_id" not in row:
        if num_images == 1:
            return place + 1
        raise ValueError(f"{where} has no 'track_id': which objects of several images are the same, the file must say")
    return int(get_value(row, "track_id", int, where))


def _merge(track: Row, row: Row, where: str) -> None:
    """Note what an annotation says of its track: the class, which stays, and a score, the largest of which counts."""
    category = get_value(row, "category_id", int, where)
    if track.setdefault("category_id", category) != category:
        raise ValueError(f"{where}: its track has category_id {track['category_id']!s:.20}, and it has {category}")
    if row.get("score") is not None:
        score = get_value(row, "score", (int, float), where)
        track["score"] = max(get_value({"score": score} | track, "score", (int, float), where), score)


def _rows(data: Row, name: str) -> list[Row]:
    """A list of objects that need not be there."""
    rows = get_value({name: []} | data, name, list, "the file")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name!r} holds something that is no object")
    return rows


def _id(row: Any, where: str) -> int:
    return int(get_value(row, "id", int, where))

"""Results in the text format of MOTS (Voigtlaender et al., "MOTS: Multi-Object Tracking and Segmentation", 2019).

A line is an object in a frame: `frame id class height width counts`, run lengths as COCO compresses them. Objects of a
frame do not overlap.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from m2f_video.files import atomic_path, check_regular
from m2f_video.results.formats.methods import Formats, Progress
from m2f_video.results.formats.one_id import own_masks
from m2f_video.results.masks import Rle, check_rle
from m2f_video.results.reading import Result, number_queries, spread_masks
from m2f_video.results.track import Track

_IGNORED = 10000  # id of what a dataset leaves out
_MOST_FRAMES = 2**24


def write_mots(result: Formats, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """See `VideoSegmentation.to_mots`."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii", newline="\n") as file:
        for position, number in enumerate(result.frames):
            for track, rle in own_masks(result, position):
                fields = number, track.id, track.label_id + 1, result.height, result.width, rle["counts"]
                file.write(" ".join(map(str, fields)) + "\n")
            if progress is not None:
                progress(position + 1, len(result.frames))


def read_mots(
    make: Callable[..., Result],
    path: str | os.PathLike[str],
    labels: Sequence[str],
    size: tuple[int, int] | None,
    fps: float,
    frames: Iterable[int] | None,
) -> Result:
    """See `VideoSegmentation.from_mots`; `make` is that class."""
    check_regular(path)
    seen: dict[int, dict[int, Rle]] = {}  # by track and number of the frame
    classes: dict[int, int] = {}
    with Path(path).open(encoding="ascii", errors="replace") as file:
        for line, text in enumerate(file, 1):
            try:
                number, id_, category, rle = _parse(text)
                if id_ == _IGNORED:
                    continue
                if not 1 <= category <= len(labels):
                    raise ValueError(f"class {category} is none of the {len(labels)} labels, counted from 1")
                if classes.setdefault(id_, category) != category:
                    raise ValueError(f"track {id_} is of class {classes[id_]} before, and of {category} here")
                if seen.setdefault(id_, {}).setdefault(number, rle) is not rle:
                    raise ValueError(f"track {id_} is there twice in frame {number}")
                size = size or (rle["size"][0], rle["size"][1])
                if rle["size"] != list(size):
                    raise ValueError(f"the mask is {rle['size']} (height, width), and the video {list(size)}")
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
    if size is None:
        raise ValueError(f"{path} holds no mask to tell the size of the video by; give size=(height, width)")
    try:
        return make(
            source=Path(path).stem,
            height=size[0],
            width=size[1],
            fps=fps,
            **_frames_and_tracks(seen, classes, tuple(labels), frames),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _frames_and_tracks(
    seen: dict[int, dict[int, Rle]], classes: dict[int, int], labels: tuple[str, ...], frames: Iterable[int] | None
) -> dict[str, tuple]:
    named = {number for masks in seen.values() for number in masks}
    if frames is None and (last := max(named, default=0)) > _MOST_FRAMES:
        raise ValueError(f"frame {last} is of no video that is read without frames=: it says which there are")
    numbers = tuple(range(last + 1)) if frames is None else tuple(frames)
    if missing := sorted(named - set(numbers)):
        raise ValueError(f"it has masks in frame {missing[0]}, which is not among the frames given")
    places = {number: place for place, number in enumerate(numbers)}
    placed = {id_: {places[number]: rle for number, rle in masks.items()} for id_, masks in seen.items()}
    spread = spread_masks(placed, len(numbers))
    tracks = []
    for (id_, masks), query in zip(spread.items(), number_queries(list(spread.values())), strict=True):
        label_id = classes[id_] - 1
        tracks.append(
            Track(id=id_, label=labels[label_id], label_id=label_id, score=1.0, query_id=query, segmentations=masks)
        )
    return {"frames": numbers, "labels": labels, "tracks": tuple(tracks)}


def _parse(text: str) -> tuple[int, int, int, Rle]:
    """Frame, id, class and mask of a line."""
    fields = text.split()
    if len(fields) != 6 or not all(field.isdecimal() and len(field) < 10 for field in fields[:5]):
        raise ValueError(f"a line is 'frame id class height width counts', got {text.strip()!r:.60}")
    number, id_, category, height, width = map(int, fields[:5])
    return number, id_, category, check_rle({"size": [height, width], "counts": fields[5]}, height, width)

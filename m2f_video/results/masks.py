"""Masks as COCO's run-length encodings: the one form in which they are kept, saved and compared.

What files of strangers hold in their place (polygons, run lengths of any kind) is checked and turned into that form
here and nowhere else.

Shape letters: H height, W width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rle = dict[str, Any]
"""A mask in COCO's compressed run-length encoding: `{"size": [H, W], "counts": str}`."""

_MOST_PIXELS, _MOST_SIDE = 2**28, 2**16
# pycocotools walks along the outlines of polygons in steps of a fifth of a pixel, and takes 16 bytes for each.
_STEPS_PER_PIXEL = 5
_MOST_STEPS = 2**24
_MERGED_AT_ONCE = 64  # one by one, each polygon costs as much as all before it


def encode_mask(mask: np.ndarray) -> Rle | None:
    """COCO run-length encoding of a mask (H, W), bool or 0 and 1; None where it is empty.

    Raises:
        ValueError: the mask is not two-dimensional or not of that type.
    """
    from pycocotools import mask as coco

    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8) or mask.size == 0:
        raise ValueError(f"a mask must be (H, W) of type bool or uint8, got shape {mask.shape} and type {mask.dtype}")
    if not mask.any():
        return None
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8, copy=False)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Rle) -> np.ndarray:
    """Mask (H, W), bool, of a well-formed encoding; `check_rle` is for others."""
    from pycocotools import mask as coco

    return coco.decode(rle).astype(bool)


def mask_area(rle: Rle) -> int:
    """Number of pixels of a well-formed encoding; `check_rle` is for others."""
    from pycocotools import mask as coco

    return int(coco.area(rle))


def mask_box(rle: Rle) -> tuple[int, int, int, int] | None:
    """Smallest box around a well-formed encoding, x, y, width and height in pixels; None where it has no pixel."""
    from pycocotools import mask as coco

    x, y, width, height = map(int, coco.toBbox(rle))
    return (x, y, width, height) if width and height else None


def intersections(ours: Sequence[Rle], theirs: Sequence[Rle]) -> np.ndarray:
    """Pixels that each of our masks shares with each of theirs, int64 (ours, theirs); of well-formed encodings.

    All are of one frame, and none is empty.
    """
    from pycocotools import mask as coco

    if not ours or not theirs:
        return np.zeros((len(ours), len(theirs)), np.int64)
    shares = coco.iou(ours, theirs, [True] * len(theirs))  # of "crowds" what is shared counts by the area of ours
    return np.rint(shares * coco.area(ours)[:, None]).astype(np.int64)


def check_picture_size(height: int, width: int) -> None:
    """Refuse what no picture has: memory is taken by the size that a file states.

    Raises:
        ValueError: the picture is too large; all masks of one that is not have areas and coordinates within 32 bits.
    """
    if height * width > _MOST_PIXELS or max(height, width) > _MOST_SIDE:
        raise ValueError(
            f"a picture of {height} x {width} (height x width) is too large for a mask: it may have {_MOST_PIXELS} "
            f"pixels, and {_MOST_SIDE} a side"
        )


def plain_rle(rle: Any) -> Rle | None:
    """A compressed run-length encoding without further keys and with integer sides; None where it is none.

    Some programs write sides as whole floats, and add keys of their own; pycocotools gives `counts` as bytes. Whether
    the run lengths are sound is not looked at, `check_rle` does.
    """
    if not isinstance(rle, Mapping) or not isinstance(rle.get("counts"), str | bytes):
        return None
    size = _sides(rle)
    return None if size is None else {"size": size, "counts": _text(rle["counts"])}


def check_rle(rle: Any, height: int, width: int, *, listed: bool = False) -> Rle:
    """Check run lengths. pycocotools reads past the end of malformed ones, so it must not see them.

    Args:
        rle: of a file, or as pycocotools gives it, with `counts` as bytes.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        listed: `counts` may be uncompressed too, a list of numbers of pixels.

    Returns:
        The same mask as `plain_rle` gives it, without runs of no pixel between others: where two masks have such runs
        at one place, pycocotools compares no further.

    Raises:
        ValueError: it is no mask of such a picture.
    """
    check_picture_size(height, width)
    counts = rle.get("counts") if isinstance(rle, Mapping) else None
    if not isinstance(counts, (str, bytes, list) if listed else (str, bytes)):
        raise ValueError(
            f'a segmentation is null or {{"size": [H, W], "counts": text}}, as pycocotools.mask.encode gives it, '
            f"got {rle!r:.60}"
        )
    if _sides(rle) != [height, width]:
        size = rle.get("size")
        raise ValueError(f"the mask is {size!s:.60} but the video is [{height}, {width}] (height, width)")
    runs = _listed_runs(counts) if isinstance(counts, list) else _text_runs(_text(counts))
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the run lengths are damaged, they do not cover {height} x {width} pixels")
    if isinstance(counts, list) or not runs[1:].all():
        return {"size": [height, width], "counts": _encode_runs(runs, height, width)}
    return {"size": [height, width], "counts": _text(counts)}


def compress_segmentation(segmentation: Any, height: int, width: int) -> Rle | None:
    """One instance in one frame, as annotation files hold it, as compressed run lengths.

    Args:
        segmentation: parsed JSON: null; a list of polygons, each [x0, y0, x1, y1, ...] in pixels; or run lengths,
            `{"size": [H, W], "counts": ...}`, counts being a list or COCO's compressed text.
        height: of the frame, in pixels.
        width: of the frame, in pixels.

    Returns:
        run lengths, possibly without a pixel; None where the instance is not annotated (null or no polygon).

    Raises:
        ValueError: it is none of these, is damaged, or belongs to a frame of another size; or the frame's size or the
            outlines are more than a picture has.
    """
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        return _compress_polygons(segmentation, height, width)
    return check_rle(segmentation, height, width, listed=True)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """The mask of one instance in one frame, bool (H, W), possibly without a pixel; see `compress_segmentation`."""
    rle = compress_segmentation(segmentation, height, width)
    return None if rle is None else decode_mask(rle)


def _text(counts: str | bytes) -> str:
    return counts if isinstance(counts, str) else counts.decode("ascii", "replace")


def _sides(rle: Mapping[str, Any]) -> list[int] | None:
    """Height and width of an encoding, None where they are no positive whole numbers."""
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    whole = (type(side) is int or (type(side) is float and side.is_integer()) for side in size)
    return [int(side) for side in size] if all(whole) and min(size) > 0 else None


def _encode_runs(runs: np.ndarray, height: int, width: int) -> str:
    """Compressed text of run lengths that cover the picture column by column, the first being of the background."""
    from pycocotools import mask as coco

    total = height * width
    # where runs of no pixel lie between, two changes at one place are none
    ends, changes = np.unique(np.cumsum(runs)[:-1], return_counts=True)
    ends = ends[(changes % 2 == 1) & (ends < total)]
    counts = np.diff(ends, prepend=0, append=total).tolist()
    text: bytes = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    return text.decode("ascii")


def _listed_runs(counts: Sequence[Any]) -> np.ndarray | None:
    """Uncompressed run lengths, int64; None where one is no number of pixels that a picture can have."""
    if not all(type(run) is int and 0 <= run <= _MOST_PIXELS for run in counts):
        return None
    return np.array(counts, np.int64)


def _text_runs(counts: str) -> np.ndarray | None:
    """Run lengths of a COCO `counts` string, int64; None where it is malformed.

    A number is written five bits a character from the lowest on, character 48 + bits; bit 5 says that another
    follows, bit 4 of the last is the sign. From the fourth number on it is the difference to the last but one.
    """
    try:
        chars = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(chars) or chars.min() < 0 or chars.max() > 63 or chars[-1] & 32:
        return None
    ends = np.flatnonzero(chars & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 6:  # 30 bits, more than any picture has pixels; from 7 on pycocotools reads another number
        return None
    place = np.arange(len(chars)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((chars & 31) << (5 * place), starts)
    runs -= np.where(chars[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _compress_polygons(polygons: list[Any], height: int, width: int) -> Rle:
    from pycocotools import mask as coco

    check_picture_size(height, width)
    steps = 0.0
    for polygon in polygons:
        steps += _count_steps(polygon, height, width)
        if steps > min(_MOST_STEPS, 4 * _STEPS_PER_PIXEL * (height + 2) * (width + 2)):
            raise ValueError(f"the polygons' outlines are longer than any in a frame of {height} x {width} pixels")
    parts = coco.frPyObjects(polygons, height, width)
    while len(parts) > 1:
        parts = [coco.merge(parts[n : n + _MERGED_AT_ONCE]) for n in range(0, len(parts), _MERGED_AT_ONCE)]
    return {"size": [height, width], "counts": parts[0]["counts"].decode("ascii")}


def _count_steps(polygon: Any, height: int, width: int) -> float:
    """How many steps pycocotools takes along a polygon, once it is known to be one near the frame."""
    if not isinstance(polygon, list | tuple) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon must be a list [x0, y0, x1, y1, ...] of at least three points")
    if not all(type(number) in (int, float) and -(2**63) <= number < 2**63 for number in polygon):
        raise ValueError("a polygon holds something that is no coordinate")
    points = np.array(polygon, float).reshape(-1, 2)
    if (np.abs(points - [width / 2, height / 2]) > [1.5 * width, 1.5 * height]).any():
        raise ValueError(f"a polygon lies far outside its frame of {height} x {width} (height x width)")
    edges = np.abs(np.diff(points, axis=0, append=points[:1])).max(1)
    return float(_STEPS_PER_PIXEL * edges.sum()) + len(edges)

"""Segmentations as annotation files hold them: polygons and run lengths, compressed or not, into masks.

Shape letters: H height, W width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from m2f_video.results.masks import Rle, check_picture_size, check_rle, decode_mask, encode_runs, plain_rle

# pycocotools walks along the outlines in steps of a fifth of a pixel, and takes 16 bytes for each.
_STEPS_PER_PIXEL = 5
_MOST_STEPS = 2**24
_MERGED_AT_ONCE = 64  # one by one, each polygon costs as much as all before it


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """The mask of one instance in one frame, bool (H, W), possibly without a pixel; see `compress_segmentation`."""
    rle = compress_segmentation(segmentation, height, width)
    return None if rle is None else decode_mask(rle)


def compress_segmentation(segmentation: Any, height: int, width: int) -> Rle | None:
    """One instance in one frame as compressed run lengths.

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
    check_picture_size(height, width)
    if isinstance(segmentation, list):
        return _compress_polygons(segmentation, height, width)
    counts = segmentation.get("counts") if isinstance(segmentation, Mapping) else None
    if not isinstance(counts, list):
        return check_rle(segmentation, height, width)
    sized = plain_rle({**segmentation, "counts": ""})
    if sized is None or list(sized["size"]) != [height, width]:
        size = segmentation.get("size")
        raise ValueError(f"the mask is {size!s:.60} but the video is [{height}, {width}] (height, width)")
    return encode_runs(counts, height, width)


def _compress_polygons(polygons: list[Any], height: int, width: int) -> Rle:
    from pycocotools import mask as coco

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

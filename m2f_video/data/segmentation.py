"""Segmentations as annotation files hold them: polygons and run lengths, compressed or not, into masks.

Shape letters: H height, W width.
"""

from typing import Any

import numpy as np

from m2f_video.results import check_rle, decode_mask

_MOST_PIXELS = 2**28  # a wrong size in a file must not take all memory


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """The mask of one instance in one frame.

    Args:
        segmentation: parsed JSON: null; a list of polygons, each [x0, y0, x1, y1, ...] in pixels; or run lengths,
            `{"size": [H, W], "counts": ...}`, counts being a list or COCO's compressed text.
        height: of the frame, in pixels.
        width: of the frame, in pixels.

    Returns:
        bool (H, W), possibly without a pixel; None where the instance is not annotated (null or no polygon).

    Raises:
        ValueError: it is none of these, is damaged, or belongs to a frame of another size.
    """
    if segmentation is None or segmentation == []:
        return None
    if height * width > _MOST_PIXELS:
        raise ValueError(f"a frame of {height} x {width} (height x width) is too large for a mask")
    if isinstance(segmentation, list):
        return _decode_polygons(segmentation, height, width)
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        return _decode_counts(segmentation, height, width)
    check_rle(segmentation, height, width, "run lengths")
    return decode_mask(segmentation)


def _decode_polygons(polygons: list[Any], height: int, width: int) -> np.ndarray:
    from pycocotools import mask as coco

    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon must be a list [x0, y0, x1, y1, ...] of at least three points")
        if not all(type(number) in (int, float) for number in polygon):
            raise ValueError("a polygon holds something that is no number")
        # what pycocotools draws grows with the edges' length, so a wild number would take all memory
        columns_inside = all(-width <= x <= 2 * width for x in polygon[::2])
        if not (columns_inside and all(-height <= y <= 2 * height for y in polygon[1::2])):
            raise ValueError(f"a polygon lies far outside its frame of {height} x {width} (height x width)")
    return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)


def _decode_counts(rle: dict[str, Any], height: int, width: int) -> np.ndarray:
    if rle.get("size") != [height, width]:
        raise ValueError(f"run lengths: the mask is {rle.get('size')} but the video is [{height}, {width}]")
    counts = rle["counts"]
    if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
        raise ValueError(f"run lengths: they do not cover {height} x {width} pixels")
    runs = np.arange(len(counts)) % 2 == 1  # the first run is background
    return np.repeat(runs, counts).reshape(width, height).T  # column by column

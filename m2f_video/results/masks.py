"""Masks as COCO's run-length encodings, the one form in which they are kept, saved and compared.

Shape letters: H height, W width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rle = dict[str, Any]
"""A mask in COCO's compressed run-length encoding: `{"size": [H, W], "counts": str}`."""

_MOST_PIXELS, _MOST_SIDE = 2**28, 2**16


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


def plain_rle(rle: Any) -> Rle | None:
    """A compressed run-length encoding without further keys and with integer sides; None where it is none.

    Some programs write sides as whole floats and add keys of their own. Whether the run lengths are sound is not
    looked at, `check_rle` does.
    """
    if not isinstance(rle, Mapping) or not isinstance(rle.get("counts"), str):
        return None
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    if all(type(side) is int and side > 0 for side in size) and len(rle) == 2 and type(rle) is dict:
        return rle
    sides = [int(side) for side in size if _is_whole(side) and side > 0]
    return {"size": sides, "counts": rle["counts"]} if len(sides) == 2 else None


def _is_whole(number: Any) -> bool:
    return type(number) is int or (type(number) is float and number.is_integer())


def _as_bytes(rle: Rle) -> Rle:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def decode_mask(rle: Rle) -> np.ndarray:
    """Mask (H, W), bool, of a well-formed encoding; `check_rle` is for others."""
    from pycocotools import mask as coco

    return coco.decode(_as_bytes(rle)).astype(bool)


def mask_area(rle: Rle) -> int:
    """Number of pixels of a well-formed encoding; `check_rle` is for others."""
    from pycocotools import mask as coco

    return int(coco.area(_as_bytes(rle)))


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


def check_rle(rle: Any, height: int, width: int) -> Rle:
    """Check a segmentation of a file. pycocotools reads past the end of a malformed one, so it must not see it.

    Returns:
        The same mask as `plain_rle` gives it, without runs of no pixel between others: where two masks have such runs
        at one place, pycocotools compares no further.

    Raises:
        ValueError: it is no mask of such a picture.
    """
    check_picture_size(height, width)
    plain = plain_rle(rle)
    if plain is None:
        raise ValueError(f'a segmentation is null or {{"size": [H, W], "counts": text}}, got {rle!r:.60}')
    if list(plain["size"]) != [height, width]:
        raise ValueError(f"the mask is {plain['size']!s:.60} but the video is [{height}, {width}] (height, width)")
    runs = _run_lengths(plain["counts"])
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the run lengths are damaged, they do not cover {height} x {width} pixels")
    return plain if runs[1:].all() else encode_runs(runs.tolist(), height, width)


def encode_runs(runs: Sequence[Any], height: int, width: int) -> Rle:
    """Compressed run-length encoding of uncompressed run lengths, column by column, the first of the background.

    Raises:
        ValueError: they do not cover the picture.
    """
    from pycocotools import mask as coco

    check_picture_size(height, width)
    total = height * width
    if not all(type(run) is int and 0 <= run <= total for run in runs) or sum(runs) != total:
        raise ValueError(f"the run lengths are damaged, they do not cover {height} x {width} pixels")
    # where runs of no pixel lie between, two changes at one place are none
    ends, changes = np.unique(np.cumsum(np.array(runs, np.int64))[:-1], return_counts=True)
    ends = ends[(changes % 2 == 1) & (ends < total)]
    counts = np.diff(ends, prepend=0, append=total).tolist()
    rle = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _run_lengths(counts: str) -> np.ndarray | None:
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

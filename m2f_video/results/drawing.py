"""Drawing tracks on the frames they were found in.

Shape letters: N tracks, H height, W width. Frames are RGB, uint8, (H, W, 3).
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from m2f_video.results.palette import palette

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside


def track_colors(numbers: Iterable[int]) -> np.ndarray:
    """The colours of these numbers, uint8 RGB (N, 3).

    Each depends on its number alone, and is clearly unlike those of the 29 numbers before and after it, also to eyes
    without long or medium cones (`m2f_video.results.palette`). They come again after 60 numbers.
    """
    colors = palette()
    return colors[[(number - 1) % len(colors) for number in numbers]].reshape(-1, 3)


def draw_tracks(
    frame: np.ndarray, masks: Iterable[np.ndarray], colors: np.ndarray, texts: Sequence[str], alpha: float = 0.45
) -> np.ndarray:
    """Draw tracks on a frame: filled and outlined masks, each with a tag at its top. The first track is on top.

    Args:
        frame: uint8 RGB (H, W, 3); not changed.
        masks: N of bool (H, W), one in memory at a time if they come so; an empty one draws nothing.
        colors: uint8 RGB (N, 3).
        texts: what the N tags say; an empty one draws no tag, nor does one for which the frame has no place left.
        alpha: opacity of the fill, from 0 to 1.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        ValueError: shapes, types, counts or alpha are not as above.
    """
    _check_drawing(frame, colors, texts, alpha)
    owner = np.zeros(frame.shape[:2], np.min_scalar_type(len(texts)))  # the topmost track of a pixel, from 1; 0: none
    tops = []
    for number, mask in enumerate(masks, 1):
        if mask.shape != owner.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"a mask of this frame is bool {owner.shape}, got shape {mask.shape} and type {mask.dtype}"
            )
        if number > len(texts):
            raise ValueError(f"there are more masks than the {len(texts)} texts")
        seen = mask & (owner == 0)
        owner[seen] = number
        # A tag belongs at the top of what is seen of its track; one hidden altogether keeps a tag, at its own top.
        tops.append(_top(seen) or _top(mask))
    if len(tops) < len(texts):
        raise ValueError(f"there are {len(tops)} masks but {len(texts)} texts")
    image = _fill(frame, owner, colors, alpha)
    _outline(image, owner, colors)
    return _draw_tags(image, tops, colors, texts)


def _top(mask: np.ndarray) -> tuple[int, int, int] | None:
    """Where a tag points to: x of the top of a mask, its first row, and the row after its last; None if empty.

    Of a mask in pieces the largest counts, so that a stray speck does not take the tag away from its object.
    """
    mask = _largest_piece(mask)
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    # The middle of the topmost tenth rather than of the topmost row, so that tags stay calm from frame to frame.
    band = mask[top : top + max(1, (bottom - top) // 10)]
    return int(np.median(np.nonzero(band)[1])), top, bottom


def _largest_piece(mask: np.ndarray, grid: int = 4) -> np.ndarray:
    """The mask without all but its largest piece; pieces are told apart on every `grid`-th pixel, for speed."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask[::grid, ::grid])
    if count < 2:
        return mask
    largest = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    height, width = mask.shape
    return mask & largest.repeat(grid, 0).repeat(grid, 1)[:height, :width]


def _fill(frame: np.ndarray, owner: np.ndarray, colors: np.ndarray, alpha: float) -> np.ndarray:
    """The frame with each owned pixel mixed with its owner's colour."""
    from PIL import Image

    color_of = np.concatenate([np.zeros((1, 3), np.uint8), colors])
    painted = np.where(owner[..., None] > 0, color_of[owner], frame)
    return np.array(Image.blend(Image.fromarray(frame), Image.fromarray(painted), alpha))


def _outline(image: np.ndarray, owner: np.ndarray, colors: np.ndarray) -> None:
    """Draw along the inner edge of what each track owns a light line in its colour, along the outer edge a dark one."""
    height, width = owner.shape
    thickness = min(3, max(1, round(min(height, width) / 360)))
    inner = _edges(owner, thickness) & (owner > 0)
    outer = _edges(owner > 0, 1) & (owner == 0)
    light = (colors * 0.7 + 255 * 0.3).astype(np.uint8)
    image[inner] = light[owner[inner] - 1]
    image[outer] //= 2


def _edges(owner: np.ndarray, distance: int) -> np.ndarray:
    """Pixels that have another owner at most `distance` pixels away along a row or a column."""
    edges = np.zeros(owner.shape, bool)
    for step in range(1, distance + 1):
        across = owner[:, step:] != owner[:, :-step]
        down = owner[step:] != owner[:-step]
        edges[:, step:] |= across
        edges[:, :-step] |= across
        edges[step:] |= down
        edges[:-step] |= down
    return edges


def _draw_tags(
    image: np.ndarray, tops: list[tuple[int, int, int] | None], colors: np.ndarray, texts: Sequence[str]
) -> np.ndarray:
    """Draw the tags, none over another: the first has the choice of place, and one without a free place is left out."""
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    size = min(32, max(11, round(min(height, width) / 36)))
    font, padding = _font(size), max(2, size // 4)
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    taken: list[Box] = []
    for top_of_mask, color, text in zip(tops, colors.tolist(), texts, strict=True):
        if top_of_mask is None or not (text := _shorten(" ".join(text.split()), font, width - 2 * padding)):
            continue
        tag = round(font.getlength(text)) + 2 * padding, size + padding
        place = _place(top_of_mask, tag, (width, height), taken)
        if place is None:
            continue
        taken.append(place)
        left, top, right, bottom = place
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius=padding, fill=tuple(color))
        dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 120  # ITU-R BT.601 luma
        ink = (16, 16, 16) if dark else (255, 255, 255)
        draw.text(((left + right) / 2, (top + bottom) / 2), text, fill=ink, font=font, anchor="mm")
    return np.asarray(canvas)


def _place(
    top_of_mask: tuple[int, int, int], tag: tuple[int, int], frame: tuple[int, int], taken: list[Box]
) -> Box | None:
    """A free place in the frame for a tag (width, height); None where there is none.

    Above its mask, else inside at the top, or below, else the nearest to the first of these.
    """
    (x, top, bottom), (width, height) = top_of_mask, tag
    rightmost, lowest = frame[0] - width, frame[1] - height
    if rightmost < 0 or lowest < 0:
        return None
    left = min(max(0, x - width // 2), rightmost)
    for y in (top - height - 2, top + 2, bottom + 2):
        if 0 <= y <= lowest and not any(_overlap((left, y, left + width, y + height), other) for other in taken):
            return left, y, left + width, y + height
    return _nearest_free((left, min(max(0, top - height - 2), lowest)), tag, (rightmost, lowest), taken)


def _nearest_free(wanted: tuple[int, int], tag: tuple[int, int], last: tuple[int, int], taken: list[Box]) -> Box | None:
    """The free place for a tag (width, height) that is nearest to a wanted corner (x, y); `last` is the last corner.

    It is at the wanted row or column, or touches a tag that is there already.
    """
    width, height = tag
    rows = {y for box in taken for y in (box[1] - height, box[3]) if 0 <= y <= last[1]}
    nearest: tuple[int, int, int] | None = None  # distance, x, y
    for y in sorted({wanted[1]} | rows, key=lambda y: (abs(y - wanted[1]), y)):
        down = abs(y - wanted[1])
        if nearest is not None and down >= nearest[0]:
            break
        beside = [box for box in taken if box[1] < y + height and y < box[3]]
        columns = (wanted[0], *(x for box in beside for x in (box[0] - width, box[2])))
        free = [
            (down + abs(x - wanted[0]), x, y)
            for x in columns
            if 0 <= x <= last[0] and not any(box[0] < x + width and x < box[2] for box in beside)
        ]
        nearest = min([*free, *([] if nearest is None else [nearest])], default=None)
    return None if nearest is None else (nearest[1], nearest[2], nearest[1] + width, nearest[2] + height)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _shorten(text: str, font: Any, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels; empty when nothing of it fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…" if text else ""


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _check_drawing(frame: np.ndarray, colors: np.ndarray, texts: Sequence[str], alpha: float) -> None:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or frame.size == 0:
        raise ValueError(f"a frame is uint8 RGB (H, W, 3), got shape {frame.shape} and type {frame.dtype}")
    if colors.shape != (len(texts), 3) or colors.dtype != np.uint8:
        raise ValueError(
            f"colors are uint8 ({len(texts)}, 3) for {len(texts)} texts, got shape {colors.shape} and type "
            f"{colors.dtype}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")

"""Drawing tracks on the frames they were found in.

Shape letters: N tracks, H height, W width. Frames are RGB, uint8, (H, W, 3).
"""

import colorsys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_TONES = ((0.80, 1.00), (0.55, 1.00), (0.85, 0.82))  # saturation and value: vivid, light, deep


def track_colors(numbers: Iterable[int]) -> np.ndarray:
    """The colours of these numbers, uint8 RGB (N, 3): bright, and each clearly unlike that of the next numbers.

    Hues advance by the golden ratio, which spreads any run of them evenly over the circle, and saturation and
    brightness alternate.
    """
    colors = []
    for number in numbers:
        saturation, value = _TONES[number % len(_TONES)]
        rgb = colorsys.hsv_to_rgb((0.56 + number * _GOLDEN_RATIO) % 1.0, saturation, value)
        colors.append([round(255 * channel) for channel in rgb])
    return np.array(colors, np.uint8).reshape(-1, 3)


def draw_tracks(
    frame: np.ndarray, masks: Iterable[np.ndarray], colors: np.ndarray, texts: Sequence[str], alpha: float = 0.45
) -> np.ndarray:
    """Draw tracks on a frame: filled and outlined masks, each with a tag at its top. The first track is on top.

    Args:
        frame: uint8 RGB (H, W, 3); not changed.
        masks: N of bool (H, W), one in memory at a time if they come so; an empty one draws nothing.
        colors: uint8 RGB (N, 3).
        texts: what the N tags say; an empty one draws no tag.
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
    """Draw the tags; the first has the choice of place, and lies on top where there is no free place."""
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    size = min(32, max(11, round(min(height, width) / 36)))
    font, padding = _font(size), max(2, size // 4)
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    taken: list[Box] = []
    tags: list[tuple[Box, str, tuple[int, ...]]] = []
    for top_of_mask, color, text in zip(tops, colors.tolist(), texts, strict=True):
        text = _shorten(text, font, width - 2 * padding)
        if top_of_mask is None or not text:
            continue
        tag = round(font.getlength(text)) + 2 * padding, size + padding
        place = _place(top_of_mask, tag, (width, height), taken)
        taken.append(place)
        tags.append((place, text, tuple(color)))
    for (left, top, right, bottom), text, color in reversed(tags):
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius=padding, fill=color)
        dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 120  # ITU-R BT.601 luma
        ink = (16, 16, 16) if dark else (255, 255, 255)
        draw.text(((left + right) / 2, (top + bottom) / 2), text, fill=ink, font=font, anchor="mm")
    return np.asarray(canvas)


def _place(top_of_mask: tuple[int, int, int], tag: tuple[int, int], frame: tuple[int, int], taken: list[Box]) -> Box:
    """A place in the frame for a tag (width, height): above its mask, else inside at the top, below, or the nearest."""
    (x, top, bottom), (width, height) = top_of_mask, tag
    left = min(max(0, x - width // 2), max(0, frame[0] - width))
    lowest = max(0, frame[1] - height)
    choices = [top - height - 2, top + 2, bottom + 2]
    choices += [top + sign * step for step in range(height // 2, frame[1], max(1, height // 2)) for sign in (1, -1)]
    places = [(left, y, left + width, y + height) for y in choices if 0 <= y <= lowest]
    for place in places:
        if not any(_overlap(place, other) for other in taken):
            return place
    y = min(max(0, top - height - 2), lowest)
    return left, y, left + width, y + height


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

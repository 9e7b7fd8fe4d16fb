"""Drawing tracks on the frames they were found in.

Shape letters: N tracks, H height, W width. Frames are RGB, uint8, (H, W, 3).
"""

import colorsys
import dataclasses
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from m2f_video.video.reader import VideoError, VideoReader, VideoSource, VideoWriter, as_frame_rate, open_video

if TYPE_CHECKING:
    from m2f_video.results.tracks import Track, VideoSegmentation

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_FILLED_AT_ONCE = 2**22  # pixels, whose numbers and products take several times the memory of the frame
_TONES = ((0.80, 1.00), (0.55, 1.00), (0.85, 0.82))  # saturation and value: vivid, light, deep


def track_colors(n: int) -> np.ndarray:
    """Colours 0 to n-1, uint8 RGB (n, 3): bright, and each clearly unlike the ones before and after it.

    A colour depends on its number alone, not on `n`. Hues advance by the golden ratio, which spreads any run of
    them evenly over the circle, and saturation and brightness alternate.

    Raises:
        ValueError: n is negative.
    """
    if n < 0:
        raise ValueError(f"the number of colours must not be negative, got {n}")
    return np.array([_color(index) for index in range(n)], np.uint8).reshape(n, 3)


def draw_tracks(
    frame: np.ndarray, masks: np.ndarray, colors: np.ndarray, texts: Sequence[str], alpha: float = 0.45
) -> np.ndarray:
    """Draw tracks on a frame: filled and outlined masks, each with a tag at its top. The first track is on top.

    Args:
        frame: uint8 RGB (H, W, 3); not changed.
        masks: bool (N, H, W); an empty one draws nothing.
        colors: uint8 RGB (N, 3).
        texts: what the N tags say; an empty one draws no tag.
        alpha: opacity of the fill, from 0 to 1.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        ValueError: shapes, types, counts or alpha are not as above.
    """
    _check_drawing(frame, masks, colors, texts, alpha)
    owner = np.zeros(frame.shape[:2], np.min_scalar_type(len(masks)))  # the topmost track of a pixel, from 1; 0: none
    for index in reversed(range(len(masks))):
        owner[masks[index]] = index + 1
    image = _fill(frame, owner, colors, alpha)
    _outline(image, owner, colors)
    # A tag belongs at the top of what is seen of its track; one hidden altogether keeps a tag, at its own top.
    tops = [_top(owner == index + 1) or _top(mask) for index, mask in enumerate(masks)]
    return _draw_tags(image, tops, colors, texts)


def render_overlay(
    segmentation: "VideoSegmentation",
    video: VideoReader | VideoSource,
    path: str | os.PathLike[str],
    min_score: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a video of the segmented frames with their tracks drawn in.

    Higher scores are drawn on top. Of tracks with one query's masks only the best label is drawn. Where frames were
    skipped the frame rate is divided accordingly, so that the overlay plays as long as the source does. There is no
    sound. The file appears when it is complete, and not at all when anything fails.

    Args:
        segmentation: the tracks.
        video: the video they were found in; it is read again, one frame in memory at a time.
        path: of the file to write; .mp4 plays everywhere.
        min_score: draw only tracks of at least this score.
        progress: called with (frames drawn, frames in all) after each frame.

    Raises:
        VideoError: the video differs in size from what was segmented, or ends before the last segmented frame.
        OSError: the file cannot be written.
    """
    reader = video if isinstance(video, VideoReader) else open_video(video)
    if (reader.width, reader.height) != (segmentation.width, segmentation.height):
        raise VideoError(
            f"{reader.source}: the video is {reader.width}x{reader.height} but the segmented one was "
            f"{segmentation.width}x{segmentation.height}; give the video that was segmented"
        )
    drawn = dataclasses.replace(segmentation, tracks=_tracks_to_draw(segmentation, min_score))
    colors = np.array([_color(track.id) for track in drawn.tracks], np.uint8).reshape(-1, 3)
    texts = [f"{track.label} {track.score:.2f}" for track in drawn.tracks]
    total, position = len(segmentation.frames), 0
    with VideoWriter(path, _overlay_rate(segmentation), reader.width, reader.height) as writer:
        for read, frame in enumerate(reader):
            if reader.frame_index(read) != segmentation.frames[position]:
                continue
            writer.write(draw_tracks(frame, drawn.masks(position), colors, texts))
            position += 1
            if progress is not None:
                progress(position, total)
            if position == total:
                return
        raise VideoError(
            f"{reader.source}: frame {segmentation.frames[position]} was segmented but the video does not give it; "
            "give the video that was segmented, and the same frames of it"
        )


def _tracks_to_draw(segmentation: "VideoSegmentation", min_score: float) -> tuple["Track", ...]:
    """Tracks of at least `min_score`, best first, one per query."""
    best: dict[int, Track] = {}
    for track in segmentation.tracks:
        if track.score >= min_score:
            best.setdefault(track.query_id, track)
    return tuple(best.values())


def _overlay_rate(segmentation: "VideoSegmentation") -> Fraction:
    rate, frames = as_frame_rate(segmentation.fps), segmentation.frames
    if len(frames) > 1:
        rate = rate * (len(frames) - 1) / (frames[-1] - frames[0])
    return max(rate, Fraction(1, 3600))  # the encoder takes none that are much slower


def _color(index: int) -> tuple[int, int, int]:
    saturation, value = _TONES[index % len(_TONES)]
    red, green, blue = colorsys.hsv_to_rgb((0.56 + index * _GOLDEN_RATIO) % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


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
    image = frame.copy()
    weight = round(256 * alpha)
    tint = colors.astype(np.uint16) * weight + 128  # 255 * 256 still fits
    pixels, owners = image.reshape(-1, 3), owner.reshape(-1)
    for start in range(0, len(owners), _FILLED_AT_ONCE):
        part = slice(start, start + _FILLED_AT_ONCE)
        covered = np.flatnonzero(owners[part])
        mixed = pixels[part][covered] * np.uint16(256 - weight) + tint[owners[part][covered] - 1]
        pixels[part][covered] = mixed >> 8
    return image


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


def _check_drawing(
    frame: np.ndarray, masks: np.ndarray, colors: np.ndarray, texts: Sequence[str], alpha: float
) -> None:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or frame.size == 0:
        raise ValueError(f"a frame is uint8 RGB (H, W, 3), got shape {frame.shape} and type {frame.dtype}")
    if masks.ndim != 3 or masks.shape[1:] != frame.shape[:2] or masks.dtype != np.bool_:
        raise ValueError(
            f"masks are bool (N, {frame.shape[0]}, {frame.shape[1]}) for this frame, got shape {masks.shape} and type "
            f"{masks.dtype}"
        )
    if colors.shape != (len(masks), 3) or colors.dtype != np.uint8:
        raise ValueError(f"colors are uint8 ({len(masks)}, 3), got shape {colors.shape} and type {colors.dtype}")
    if len(texts) != len(masks):
        raise ValueError(f"there are {len(masks)} masks but {len(texts)} texts")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")

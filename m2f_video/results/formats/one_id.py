"""Maps of a frame with one number a pixel: where masks overlap, the best score wins.

Shape letters: H height, W width.
"""

from collections.abc import Iterator

import numpy as np

from m2f_video.results.formats.methods import Formats
from m2f_video.results.masks import Rle, decode_mask, encode_mask
from m2f_video.results.track import Track, check_position


def owner_map(result: Formats, frame: int) -> np.ndarray:
    """Whose each pixel is: place in `result.tracks`, from 1, and 0 for nobody's; unsigned (H, W).

    Raises:
        IndexError: there is no such frame.
    """
    check_position(frame, len(result.frames))
    owner = np.zeros((result.height, result.width), np.min_scalar_type(len(result.tracks)))
    masks = [track.segmentations[frame] for track in result.tracks]
    for place in range(len(masks), 0, -1):  # the best last
        if (rle := masks[place - 1]) is not None:
            owner[decode_mask(rle)] = place
    return owner


def instance_map(result: Formats, frame: int) -> np.ndarray:
    """See `VideoSegmentation.instance_map`."""
    return np.array([0, *(track.id for track in result.tracks)], np.int64)[owner_map(result, frame)]


def semantic_map(result: Formats, frame: int) -> np.ndarray:
    """See `VideoSegmentation.semantic_map`."""
    return np.array([0, *(track.label_id + 1 for track in result.tracks)], np.int32)[owner_map(result, frame)]


def own_masks(result: Formats, frame: int) -> Iterator[tuple[Track, Rle]]:
    """The tracks that own a pixel of a frame, each with what it owns."""
    owner = owner_map(result, frame)
    for place in np.unique(owner).tolist():
        if place and (rle := encode_mask(owner == place)) is not None:
            yield result.tracks[place - 1], rle

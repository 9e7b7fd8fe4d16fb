"""One object through a video."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2f_video.results.masks import Rle, decode_mask, mask_area, mask_box, plain_rle
from m2f_video.results.tracks_file import FrameMasks


@dataclass(frozen=True, kw_only=True)
class Track:
    """One object through a video.

    Attributes:
        id: number of the track, from 1, unique in its result.
        label: name of its class.
        label_id: class of the model, from 0.
        score: confidence in [0, 1], by which tracks are ranked; in windows averaged over all windows of the video, also
            where the object is not seen.
        certainty: how sure the model is of the class where it sees the object, in [0, 1], by which tracks are left out
            and drawn; by default the score.
        query_id: the model's query whose masks these are; a query with two likely classes gives two tracks.
        segmentations: one COCO run-length encoded mask per frame of the result, None where the object is absent. Of a
            result that was read from a `tracks.jsonl` they are read from it when they are asked for.

    Raises:
        ValueError: the score is no finite number, or a segmentation is not what is described above.
    """

    id: int
    label: str
    label_id: int
    score: float
    certainty: float = math.nan
    query_id: int
    segmentations: Sequence[Rle | None]

    def __post_init__(self) -> None:
        if math.isnan(self.certainty):
            object.__setattr__(self, "certainty", self.score)
        for name in ("score", "certainty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"track {self.id}: the {name} must be a finite number, got {getattr(self, name)}")
        if isinstance(self.segmentations, FrameMasks):  # which looks at each when it is asked for
            return
        segmentations = []
        for position, rle in enumerate(self.segmentations):
            if rle is not None and (rle := plain_rle(rle)) is None:
                raise ValueError(
                    f"track {self.id}, frame {position}: a segmentation is None or a compressed COCO encoding, "
                    '{"size": [H, W], "counts": str}'
                )
            segmentations.append(rle)
        object.__setattr__(self, "segmentations", tuple(segmentations))

    @property
    def num_frames_visible(self) -> int:
        """Number of frames with a mask."""
        if isinstance(self.segmentations, FrameMasks):
            return self.segmentations.num_visible
        return sum(rle is not None for rle in self.segmentations)

    def mask(self, frame: int) -> np.ndarray:
        """Mask in a frame, bool (H, W); all False where the object is absent.

        Args:
            frame: position in the result, from 0; not the frame's number in the source.

        Raises:
            IndexError: there is no such frame.
            ValueError: no frame has a mask, so that its size is unknown here (`VideoSegmentation.masks` knows it).
        """
        if (rle := self._at(frame)) is not None:
            return decode_mask(rle)
        size = next((other["size"] for other in self.segmentations if other is not None), None)
        if size is None:
            raise ValueError(f"track {self.id} has no mask in any frame; use VideoSegmentation.masks({frame})")
        return np.zeros(size, bool)

    def area(self, frame: int) -> int:
        """Number of pixels of the mask in a frame; `frame` as in `mask`."""
        rle = self._at(frame)
        return 0 if rle is None else mask_area(rle)

    def box(self, frame: int) -> tuple[int, int, int, int] | None:
        """Smallest box around the mask in a frame: x, y, width and height in pixels; None where the object is absent.

        The box covers columns x to x + width - 1. `frame` as in `mask`.
        """
        rle = self._at(frame)
        return None if rle is None else mask_box(rle)

    @property
    def boxes(self) -> tuple[tuple[int, int, int, int] | None, ...]:
        """`box` in every frame."""
        return tuple(None if rle is None else mask_box(rle) for rle in self.segmentations)

    def __repr__(self) -> str:
        seen = f"{self.num_frames_visible} of {len(self.segmentations)} frames"
        return f"<Track {self.id}: {self.label!r:.60}, score {self.score:.3f}, {seen}>"

    def _at(self, frame: int) -> Rle | None:
        return self.segmentations[check_position(frame, len(self.segmentations))]


def check_position(frame: int, count: int) -> int:
    """A position in a result of so many frames.

    Raises:
        IndexError: there is no such frame.
    """
    if not 0 <= frame < count:
        raise IndexError(f"frame {frame}: the result has {count} frames, counted from 0 whatever their source numbers")
    return frame


def show_few(values: Sequence[Any]) -> str:
    """The first of some values, for a message."""
    shown = ", ".join(f"{value!s:.20}" for value in values[:8])
    return f"({shown}{', ...' if len(values) > 8 else ''})"

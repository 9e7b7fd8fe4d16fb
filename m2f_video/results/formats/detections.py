"""Results as `supervision.Detections`, which its annotators, trackers and zones take.

Shape letters: N detections, H height, W width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f_video.results.formats.methods import Formats
from m2f_video.results.formats.table import optional
from m2f_video.results.masks import decode_mask, mask_box


class FrameDetections(Sequence[Any]):
    """A `supervision.Detections` for each frame, made when it is asked for.

    Args:
        result: the tracks.

    Raises:
        ImportError: supervision is not installed.
    """

    def __init__(self, result: Formats) -> None:
        self._result, self._supervision = result, optional("supervision", "to_supervision")

    def __len__(self) -> int:
        return len(self._result.frames)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._detections(position) for position in range(*index.indices(len(self)))]
        return self._detections(range(len(self))[index])

    def __repr__(self) -> str:
        return f"<detections in {len(self)} frames of {self._result.source}>"

    def _detections(self, frame: int) -> Any:
        seen = [(track, track.segmentations[frame]) for track in self._result.tracks]
        rows = [(track, rle, box) for track, rle in seen if rle is not None and (box := mask_box(rle)) is not None]
        if not rows:
            return self._supervision.Detections.empty()
        boxes = np.array([box for *_, box in rows], np.float32)  # (N, 4) as x, y, width, height
        boxes[:, 2:] += boxes[:, :2]
        return self._supervision.Detections(
            xyxy=boxes,
            mask=np.stack([decode_mask(rle) for _, rle, _ in rows]),  # (N, H, W)
            confidence=np.array([track.score for track, *_ in rows], np.float32),
            class_id=np.array([track.label_id for track, *_ in rows], int),
            tracker_id=np.array([track.id for track, *_ in rows], int),
            data={"class_name": np.array([track.label for track, *_ in rows])},
        )

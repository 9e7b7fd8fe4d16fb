"""How annotated and predicted tracks overlap: the only place that touches masks, for all metrics.

Shape letters: T frames, D predicted tracks, G annotated tracks.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from m2f_video.evaluation.annotations import GroundTruth, MaskTrack, Progress

MAX_DETECTIONS = 100
"""Predictions of a (video, category) that count, those with the highest scores."""

# Numbers of intersections: 1 GiB of them, and of a pairing what some arrays as large, and TrackEval's, leave room for.
_MOST_INTERSECTIONS, _MOST_OF_A_PAIRING, _TRACKEVAL_PER_PAIR = 2**28, 2**26, 100


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """The tracks of one category in one video.

    Attributes:
        video_id: id of the video.
        category_id: id of the category.
        detections: D predictions by falling score; among equals in the order of the rows.
        annotations: G annotations, in the order of the file.
        intersections: (T, D, G) int32, pixels that both masks have in a frame; T is the largest number of frames of
            any of the tracks, at most that of the video or the longest annotation.
    """

    video_id: int
    category_id: int
    detections: tuple[MaskTrack, ...]
    annotations: tuple[MaskTrack, ...]
    intersections: np.ndarray

    def areas(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of the predictions (T, D) and of the annotations (T, G) in each frame."""
        T = len(self.intersections)
        return _padded(self.detections, T), _padded(self.annotations, T)

    def frame_iou(self) -> np.ndarray:
        """(T, D, G), IoU of the masks in each frame; 0 where both are empty."""
        detections, annotations = self.areas()
        return _divide(self.intersections, detections[:, :, None] + annotations[:, None] - self.intersections)

    def track_iou(self) -> np.ndarray:
        """(D, G), spatio-temporal IoU: the intersections of all frames over the unions of all frames.

        Of two lists of different length the frames in common count.
        """
        detections, annotations = self.areas()
        T, intersection = len(self.intersections), self.intersections.sum(0, dtype=np.int64)
        areas = detections.T @ _listed(self.annotations, T) + _listed(self.detections, T).T @ annotations  # (D, G)
        return _divide(intersection, areas - intersection)


def pair_tracks(
    ground_truth: GroundTruth, results: Iterable[MaskTrack], progress: Progress | None = None
) -> list[Pairing]:
    """Compare all predictions with the annotations of their video and category.

    Args:
        ground_truth: the data set.
        results: predictions; all of its categories and videos (`load_results` sees to that).
        progress: see `Progress`.

    Returns:
        One for each (category, video) with any track, by category id, then video id.

    Raises:
        ValueError: there are more masks to compare with each other than memory is for.
    """
    annotations, detections = defaultdict(list), defaultdict(list)
    for track in ground_truth.tracks:
        annotations[track.category_id, track.video_id].append(track)
    for track in results:
        detections[track.category_id, track.video_id].append(track)
    keys = sorted(annotations.keys() | detections.keys())
    pairings: list[Pairing] = []
    total = 0
    for done, key in enumerate(keys):
        best = sorted(detections[key], key=lambda track: -track.score)[:MAX_DETECTIONS]
        T = _num_frames(best, annotations[key], ground_truth.sizes[key[1]][2])
        total += T * len(best) * len(annotations[key])
        pairs = (len(best) + 1) * (len(annotations[key]) + 1)
        if total > _MOST_INTERSECTIONS or (T + _TRACKEVAL_PER_PAIR) * pairs > _MOST_OF_A_PAIRING:
            raise ValueError(
                f"video {key[1]}, category {key[0]}: {len(best)} predicted and {len(annotations[key])} annotated "
                f"tracks of {T} frames are too many to compare; measure fewer videos at a time, or shorter ones"
            )
        pairings.append(
            Pairing(
                category_id=key[0],
                video_id=key[1],
                detections=tuple(best),
                annotations=tuple(annotations[key]),
                intersections=_intersections(best, annotations[key], T),
            )
        )
        if progress is not None:
            progress("masks", done + 1, len(keys))
    return pairings


def _num_frames(detections: Sequence[MaskTrack], annotations: Sequence[MaskTrack], video_length: int) -> int:
    annotated = max((len(track.masks) for track in annotations), default=0)
    detected = max((len(track.masks) for track in detections), default=0)
    return max(annotated, min(detected, video_length))


def _intersections(detections: Sequence[MaskTrack], annotations: Sequence[MaskTrack], T: int) -> np.ndarray:
    """(T, D, G) int32."""
    from pycocotools import mask as coco

    intersections = np.zeros((T, len(detections), len(annotations)), np.int32)
    detected, annotated = _padded(detections, T), _padded(annotations, T)
    for t in np.flatnonzero(detected.any(1) & annotated.any(1)):
        rows, columns = np.flatnonzero(detected[t]).tolist(), np.flatnonzero(annotated[t]).tolist()
        # Against crowds pycocotools divides by the detection's area instead of the union. Times that area gives the
        # intersection back, to rounding, without decoding a mask.
        covered = coco.iou(
            [detections[row].masks[t] for row in rows],
            [annotations[column].masks[t] for column in columns],
            [1] * len(columns),
        )
        intersections[t][np.ix_(rows, columns)] = np.rint(covered * detected[t, rows, None])
    return intersections


def _padded(tracks: Sequence[MaskTrack], T: int) -> np.ndarray:
    """(T, N) int64, areas of N tracks."""
    areas = np.zeros((T, len(tracks)), np.int64)
    for index, track in enumerate(tracks):
        areas[: len(track.pixels), index] = track.pixels[:T]
    return areas


def _listed(tracks: Sequence[MaskTrack], T: int) -> np.ndarray:
    """(T, N) int64, 1 in the frames that are in a track's list, whether it has a mask there or not."""
    lengths = np.array([len(track.masks) for track in tracks], np.int64)
    return (np.arange(T)[:, None] < lengths).astype(np.int64)


def _divide(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.divide(intersection, union, out=np.zeros(union.shape), where=union > 0)

"""Average precision and recall of mask tracks, as YouTubeVIS measures them (arXiv 1905.04804, section 5.1).

COCO's protocol with tracks in the place of boxes: predictions of a video and category are matched to annotations
greedily by falling score, at ten thresholds of the spatio-temporal IoU. Precision is interpolated at 101 recalls.

Shape letters: T IoU thresholds, R recall thresholds, K categories, A area ranges, M limits of detections,
D predicted tracks, G annotated tracks.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2f_video.evaluation.annotations import GroundTruth, Progress, Source, load_ground_truth, load_results
from m2f_video.evaluation.pairing import MAX_DETECTIONS, Pairing, pair_tracks

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0, 1, 101)
DETECTION_LIMITS = (1, 10, MAX_DETECTIONS)
"""Detections of a (video, category)."""
AREA_RANGES = np.array([[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]])
"""All, small, medium, large; mean pixels in visible frames, both ends included."""
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoAPResult:
    """What `evaluate` measures. Numbers are fractions, -1 where there is no annotation to measure by.

    Attributes:
        stats: the numbers of `STATS` over all categories.
        per_category: the same numbers of each category, by its id.
        precision: (T, R, K, A, M), at each recall; 0 at recalls that are not reached.
        recall: (T, K, A, M), the highest reached.
        scores: (T, R, K, A, M), score at which a recall is reached; 0 where it is not.
        categories: names by id, in the order of K.
    """

    stats: dict[str, float]
    per_category: dict[int, dict[str, float]]
    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray
    categories: dict[int, str]


def evaluate(ground_truth: Source | Mapping[str, Any], results: Source | Sequence[Mapping[str, Any]]) -> VideoAPResult:
    """Measure results of video instance segmentation against annotations, both in the YouTubeVIS format.

    Args:
        ground_truth: annotations, as a path or parsed; see `load_ground_truth`.
        results: rows of a submission, as a path or parsed; see `load_results`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one of them is malformed; the message names file, row and fault.
    """
    truth = load_ground_truth(ground_truth)
    return average_precision(truth, pair_tracks(truth, load_results(results, truth)))


def average_precision(
    ground_truth: GroundTruth, pairings: Sequence[Pairing], progress: Progress | None = None
) -> VideoAPResult:
    """Average precision and recall of predictions paired with their data set's annotations (`pair_tracks`)."""
    T, R, K, A, M = len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), len(ground_truth.categories), 4, len(DETECTION_LIMITS)
    precision, scores = np.full((T, R, K, A, M), -1.0), np.full((T, R, K, A, M), -1.0)
    recall = np.full((T, K, A, M), -1.0)
    of_category: dict[int, list[Pairing]] = defaultdict(list)
    for pairing in pairings:
        of_category[pairing.category_id].append(pairing)
    for k, category_id in enumerate(ground_truth.categories):
        matches = [match_pairing(pairing) for pairing in of_category[category_id]]
        num_annotations = sum((match.num_annotations for match in matches), np.zeros(A, np.int64))
        measured = [a for a in range(A) if num_annotations[a]]
        for m, limit in enumerate(DETECTION_LIMITS):
            for a in measured:
                curves = _curves([match.first(limit, a) for match in matches], int(num_annotations[a]))
                precision[:, :, k, a, m], recall[:, k, a, m], scores[:, :, k, a, m] = curves
        if progress is not None:
            progress("categories", k + 1, K)
    return VideoAPResult(
        stats=_summarise(precision, recall),
        per_category={
            category_id: _summarise(precision[:, :, [k]], recall[:, [k]])
            for k, category_id in enumerate(ground_truth.categories)
        },
        precision=precision,
        recall=recall,
        scores=scores,
        categories=dict(ground_truth.categories),
    )


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Matched predictions of one video and category, by falling score.

    Attributes:
        scores: (D,).
        true_positive: bool (A, T, D), which are right.
        false_positive: bool (A, T, D), which are wrong; those that are neither do not count.
        num_annotations: int (A,), how many there are to find.
    """

    scores: np.ndarray
    true_positive: np.ndarray
    false_positive: np.ndarray
    num_annotations: np.ndarray

    def first(self, limit: int, a: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores and flags of the first so many, in an area range."""
        return self.scores[:limit], self.true_positive[a, :, :limit], self.false_positive[a, :, :limit]


def match_pairing(pairing: Pairing) -> Matches:
    """Give each prediction, by falling score, the free annotation with the highest IoU that reaches the threshold.

    Annotations that are ignored (crowds, and those outside of the area range) are taken only where no other is left.
    A prediction that takes one is ignored too, as is one outside of the area range that takes none. A crowd can be
    taken many times.
    """
    D, G, A, T = len(pairing.detections), len(pairing.annotations), len(AREA_RANGES), len(IOU_THRESHOLDS)
    iou = pairing.track_iou()  # (D, G)
    crowd = np.array([track.crowd for track in pairing.annotations], bool)
    ignored = crowd | _outside(np.array([track.area for track in pairing.annotations]))  # (A, G)
    outside = _outside(np.array([track.area for track in pairing.detections]))  # (A, D)
    taken = np.zeros((A, T, G), bool)
    matched, skipped = np.zeros((A, T, D), bool), np.zeros((A, T, D), bool)
    for d in range(D):
        skipped[:, :, d] = outside[:, None, d]
        if not G:
            continue
        free = (iou[d] >= IOU_THRESHOLDS[:, None]) & (crowd | ~taken)  # (A, T, G)
        counted = free & ~ignored[:, None]
        free = np.where(counted.any(-1, keepdims=True), counted, free)
        # The last of equals: as the protocol goes through the annotations, a later one replaces an equal one.
        best = G - 1 - np.where(free, iou[d], -1)[:, :, ::-1].argmax(-1)  # (A, T)
        found = free.any(-1)
        taken |= found[:, :, None] & (best[:, :, None] == np.arange(G))
        matched[:, :, d] = found
        skipped[:, :, d] = np.where(found, np.take_along_axis(ignored, best, axis=1), skipped[:, :, d])
    return Matches(
        scores=np.array([track.score for track in pairing.detections], float),
        true_positive=matched & ~skipped,
        false_positive=~matched & ~skipped,
        num_annotations=(~ignored).sum(1),
    )


def _outside(areas: np.ndarray) -> np.ndarray:
    """(A, N) bool, whether each of N areas lies outside of each range."""
    return (areas < AREA_RANGES[:, :1]) | (areas > AREA_RANGES[:, 1:])


def _curves(
    videos: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], num_annotations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision (T, R), recall (T,) and scores (T, R) of one category, area range and limit of detections."""
    score, true_positive, false_positive = (np.concatenate(parts, axis=-1) for parts in zip(*videos, strict=True))
    T, R = len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS)
    order = np.argsort(-score, kind="stable")
    if not len(order):
        return np.zeros((T, R)), np.zeros(T), np.zeros((T, R))
    true_sum = true_positive[:, order].cumsum(1).astype(float)  # (T, N)
    false_sum = false_positive[:, order].cumsum(1).astype(float)
    recall = true_sum / num_annotations
    precision = true_sum / (false_sum + true_sum + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    position = np.stack([np.searchsorted(row, RECALL_THRESHOLDS) for row in recall])  # (T, R)
    reached = position < len(order)
    position = np.where(reached, position, 0)
    return (
        np.where(reached, np.take_along_axis(precision, position, axis=1), 0),
        recall[:, -1],
        np.where(reached, score[order][position], 0),
    )


def _summarise(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """The numbers of `STATS` from precision (T, R, K, A, M) and recall (T, K, A, M)."""
    values = [
        precision[..., 0, 2],
        precision[0, ..., 0, 2],
        precision[5, ..., 0, 2],
        *(precision[..., a, 2] for a in (1, 2, 3)),
        *(recall[..., 0, m] for m in (0, 1, 2)),
        *(recall[..., a, 2] for a in (1, 2, 3)),
    ]
    return {name: _mean_defined(value) for name, value in zip(STATS, values, strict=True)}


def _mean_defined(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0

"""Tracking metrics of mask tracks: HOTA (arXiv 2009.07736), IDF1 (arXiv 1609.01775), identity switches (CLEAR MOT).

They look at every frame and need hard decisions, unlike average precision: predictions under a score threshold are left
out. Predictions meet annotations of their own category only. The metrics themselves are TrackEval's, the evaluation
code of the HOTA paper's authors.

Shape letters: T frames, D predicted tracks, G annotated tracks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from m2f_video.evaluation.annotations import GroundTruth, Progress, Source, load_ground_truth, load_results
from m2f_video.evaluation.pairing import Pairing, pair_tracks

SCORE_THRESHOLD = 0.3
MATCH_IOU = 0.5
"""Mask IoU in a frame from which on IDF1, identity switches and the rule on crowds call it a match; TrackEval's."""


@dataclass(frozen=True, kw_only=True)
class TrackingMetrics:
    """Numbers of one category or of all together.

    The fractions are -1 where there is neither an annotated nor a predicted mask.

    Attributes:
        HOTA: higher order tracking accuracy, mean over IoU thresholds 0.05, 0.1, ..., 0.95, as are DetA and AssA.
        DetA: its part that judges detection.
        AssA: its part that judges association: whether the masks of a track keep to one object.
        IDF1: F1 of masks under the best one-to-one assignment of whole tracks.
        id_switches: how often an object's track changes to another one.
    """

    HOTA: float
    DetA: float
    AssA: float
    IDF1: float
    id_switches: int

    def to_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrackingResult:
    """What `evaluate_tracking` measures.

    Attributes:
        score_threshold: predictions that score less were left out.
        combined: over all categories, each mask weighing the same.
        per_category: by category id.
    """

    score_threshold: float
    combined: TrackingMetrics
    per_category: dict[int, TrackingMetrics]


def evaluate_tracking(
    ground_truth: Source | Mapping[str, Any],
    results: Source | Sequence[Mapping[str, Any]],
    score_threshold: float = SCORE_THRESHOLD,
) -> TrackingResult:
    """Measure how well results follow the annotated objects, both in the YouTubeVIS format.

    Args:
        ground_truth: annotations, as a path or parsed; see `load_ground_truth`.
        results: rows of a submission, as a path or parsed; see `load_results`.
        score_threshold: predictions that score less are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one of them is malformed, or the threshold is no finite number.
        ImportError: trackeval is not installed.
    """
    truth = load_ground_truth(ground_truth)
    return tracking_metrics(truth, pair_tracks(truth, load_results(results, truth)), score_threshold)


def tracking_metrics(
    ground_truth: GroundTruth,
    pairings: Sequence[Pairing],
    score_threshold: float = SCORE_THRESHOLD,
    progress: Progress | None = None,
) -> TrackingResult:
    """Tracking metrics of predictions paired with their data set's annotations (`pair_tracks`).

    Annotations of crowds are not objects to follow: predicted masks that match no other annotation and lie in a crowd
    by more than half are left out, as KITTI MOTS does.

    Raises:
        ValueError: the threshold is no finite number.
        ImportError: trackeval is not installed.
    """
    if not np.isfinite(score_threshold):
        raise ValueError(f"the score threshold must be a finite number, got {score_threshold}")
    metrics = _metrics()  # before the work, as they may be missing
    sequences: dict[int, dict[int, dict[str, Any]]] = {category_id: {} for category_id in ground_truth.categories}
    for done, pairing in enumerate(pairings):
        sequences[pairing.category_id][pairing.video_id] = pairing_numbers(pairing, score_threshold)
        if progress is not None:
            progress("tracking", done + 1, len(pairings))
    categories: dict[int, dict[str, Any]] = {
        category_id: {
            name: metric.combine_sequences({video: numbers[name] for video, numbers in videos.items()})
            for name, metric in metrics.items()
        }
        for category_id, videos in sequences.items()
        if videos
    }
    combined = {
        name: metric.combine_classes_det_averaged({category: numbers[name] for category, numbers in categories.items()})
        for name, metric in metrics.items()
    }
    return TrackingResult(
        score_threshold=score_threshold,
        combined=_summarise(combined),
        per_category={
            category_id: _summarise(categories[category_id]) if category_id in categories else _UNDEFINED
            for category_id in ground_truth.categories
        },
    )


def pairing_numbers(pairing: Pairing, score_threshold: float = SCORE_THRESHOLD) -> dict[str, dict[str, Any]]:
    """What TrackEval counts in a video for a category: numbers by name of `hota`, `identity` and `clear`.

    Counts of several add up, and AssA does weighted by HOTA_TP.

    Raises:
        ImportError: trackeval is not installed.
    """
    sequence = _sequence(pairing, score_threshold)
    return {name: metric.eval_sequence(sequence) for name, metric in _metrics().items()}


_UNDEFINED = TrackingMetrics(HOTA=-1.0, DetA=-1.0, AssA=-1.0, IDF1=-1.0, id_switches=0)


def _metrics() -> dict[str, Any]:
    try:
        from trackeval.metrics import CLEAR, HOTA, Identity
    except ImportError as error:
        raise ImportError("tracking metrics need trackeval: pip install 'm2f-video[eval]'") from error
    config = {"THRESHOLD": MATCH_IOU, "PRINT_CONFIG": False}
    return {"hota": HOTA(), "identity": Identity(config), "clear": CLEAR(config)}


def _summarise(numbers: Mapping[str, Mapping[str, Any]]) -> TrackingMetrics:
    hota, identity, clear = numbers["hota"], numbers["identity"], numbers["clear"]
    if not identity["IDTP"] + identity["IDFN"] + identity["IDFP"]:
        return _UNDEFINED
    return TrackingMetrics(
        HOTA=float(np.mean(hota["HOTA"])),
        DetA=float(np.mean(hota["DetA"])),
        AssA=float(np.mean(hota["AssA"])),
        IDF1=float(identity["IDF1"]),
        id_switches=int(clear["IDSW"]),
    )


def _sequence(pairing: Pairing, score_threshold: float) -> dict[str, Any]:
    """The tracks of a video and category as TrackEval's metrics take them: ids that are used count from 0.

    Frames in which nothing is visible change none of them, and are left out.
    """
    detected, annotated, iou = _visible(pairing, score_threshold)
    used = detected.any(1) | annotated.any(1)
    detected, annotated, iou = detected[used], annotated[used], iou[used]
    detection_id, annotation_id = (present.any(0).cumsum() - 1 for present in (detected, annotated))
    T = len(iou)
    return {
        "num_timesteps": T,
        "num_gt_dets": int(annotated.sum()),
        "num_tracker_dets": int(detected.sum()),
        "num_gt_ids": int(annotated.any(0).sum()),
        "num_tracker_ids": int(detected.any(0).sum()),
        "gt_ids": [annotation_id[annotated[t]] for t in range(T)],
        "tracker_ids": [detection_id[detected[t]] for t in range(T)],
        "similarity_scores": [iou[t][np.ix_(detected[t], annotated[t])].T for t in range(T)],
    }


def _visible(pairing: Pairing, score_threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which predictions (T, D) and annotations (T, G) count in which frame, and the IoU of all (T, D, G)."""
    detection_areas, annotation_areas = pairing.areas()
    iou = pairing.frame_iou()
    confident = np.array([track.score >= score_threshold for track in pairing.detections], bool)
    crowd = np.array([track.crowd for track in pairing.annotations], bool)
    detected, annotated = (detection_areas > 0) & confident, (annotation_areas > 0) & ~crowd
    in_crowd = 2 * pairing.intersections[:, :, crowd].sum(2, dtype=np.int64) > detection_areas
    for t in np.flatnonzero((detected & in_crowd).any(1)):
        detected[t] &= ~in_crowd[t] | _matched(iou[t], detected[t], annotated[t])
    return detected, annotated, iou


def _matched(iou: np.ndarray, detected: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """Which of D predictions have a partner in the best one-to-one matching of a frame; iou is (D, G)."""
    from scipy.optimize import linear_sum_assignment

    possible = np.where((iou >= MATCH_IOU) & detected[:, None] & annotated, iou, 0)
    rows, columns = linear_sum_assignment(possible, maximize=True)
    matched = np.zeros(len(detected), bool)
    matched[rows[possible[rows, columns] > 0]] = True
    return matched

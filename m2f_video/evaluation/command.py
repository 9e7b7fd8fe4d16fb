"""The `eval` command for results that exist already."""

import importlib.util
import warnings
from pathlib import Path

from m2f_video.console import print_table, progress_bars
from m2f_video.evaluation import report
from m2f_video.evaluation.annotations import EvaluationWarning, load_ground_truth, load_results
from m2f_video.evaluation.pairing import pair_tracks
from m2f_video.evaluation.tracking import SCORE_THRESHOLD, tracking_metrics
from m2f_video.evaluation.video_ap import average_precision


def eval_results(
    annotations: Path,
    results: Path,
    json: Path | None = None,
    tracking: bool = True,
    score_threshold: float = SCORE_THRESHOLD,
) -> int:
    """Measure results against annotations, both in the YouTubeVIS format: video AP and AR, HOTA, IDF1, id switches.

    Example: m2f-video eval --annotations valid.json --results results.json --json report.json

    Args:
        annotations: JSON file with videos, categories and annotations.
        results: JSON file with the rows of a submission: video_id, category_id, score, segmentations.
        json: write the numbers to this file, as fractions; -1 where there is nothing to measure by.
        tracking: measure HOTA, IDF1 and id switches too; needs the extra m2f-video[eval] and is left out, with a
            warning, where it is not installed.
        score_threshold: tracking leaves out predictions that score less; AP takes all.
    """
    if json is not None:
        report.check_writable(json)
    if tracking and importlib.util.find_spec("trackeval") is None:
        warnings.warn(
            "HOTA, IDF1 and id switches are left out, they need trackeval: pip install 'm2f-video[eval]'",
            EvaluationWarning,
            stacklevel=2,
        )
        tracking = False
    with progress_bars() as progress:
        ground_truth = load_ground_truth(annotations, progress)
        pairings = pair_tracks(ground_truth, load_results(results, ground_truth, progress), progress)
        ap = average_precision(ground_truth, pairings, progress)
        followed = tracking_metrics(ground_truth, pairings, score_threshold, progress) if tracking else None
    if json is not None:
        report.write_report(json, ap, followed)
    for table in report.tables(ap, followed):
        print_table(table)
    if json is not None:
        print(f"written to {json}")
    return 0

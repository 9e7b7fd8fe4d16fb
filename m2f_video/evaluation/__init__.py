"""Measuring video instance segmentation: video AP and AR as YouTubeVIS does, HOTA, IDF1 and identity switches.

`evaluate` measures results that exist, `evaluate_model` those that a model gives.
"""

from m2f_video.evaluation.annotations import EvaluationWarning, GroundTruth, MaskTrack, load_ground_truth, load_results
from m2f_video.evaluation.pairing import Pairing, pair_tracks
from m2f_video.evaluation.predict import evaluate_model, predict_on_all_ranks, predict_videos, prepare_ground_truth
from m2f_video.evaluation.report import tables, to_dict, write_report, write_results, write_submission
from m2f_video.evaluation.tracking import TrackingMetrics, TrackingResult, evaluate_tracking, tracking_metrics
from m2f_video.evaluation.video_ap import STATS, VideoAPResult, average_precision, evaluate

__all__ = [
    "STATS",
    "EvaluationWarning",
    "GroundTruth",
    "MaskTrack",
    "Pairing",
    "TrackingMetrics",
    "TrackingResult",
    "VideoAPResult",
    "average_precision",
    "evaluate",
    "evaluate_model",
    "evaluate_tracking",
    "load_ground_truth",
    "load_results",
    "pair_tracks",
    "predict_on_all_ranks",
    "predict_videos",
    "prepare_ground_truth",
    "tables",
    "to_dict",
    "tracking_metrics",
    "write_report",
    "write_results",
    "write_submission",
]

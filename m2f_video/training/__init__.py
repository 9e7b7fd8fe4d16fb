"""Training: targets, matching and losses."""

from m2f_video.training.losses import LossConfig, LossOutput, NonFinitePredictionError, VideoMask2FormerLoss
from m2f_video.training.matcher import Match
from m2f_video.training.targets import ClipTarget, LabelSource, prepare_target

__all__ = [
    "ClipTarget",
    "LabelSource",
    "LossConfig",
    "LossOutput",
    "Match",
    "NonFinitePredictionError",
    "VideoMask2FormerLoss",
    "prepare_target",
]

"""Training: targets, matching, losses, and the loop."""

from m2f_video.distributed import Worker, join_workers
from m2f_video.training.config import TRAIN_PRESETS, TrainConfig
from m2f_video.training.losses import (
    LossConfig,
    LossNorms,
    LossOutput,
    NonFinitePredictionError,
    VideoMask2FormerLoss,
    loss_norms,
)
from m2f_video.training.matcher import HungarianMatcher, Match, Matcher
from m2f_video.training.optim import OptimConfig
from m2f_video.training.targets import ClipTarget, LabelSource, prepare_target
from m2f_video.training.trainer import Trainer

__all__ = [
    "TRAIN_PRESETS",
    "ClipTarget",
    "HungarianMatcher",
    "LabelSource",
    "LossConfig",
    "LossNorms",
    "LossOutput",
    "Match",
    "Matcher",
    "NonFinitePredictionError",
    "OptimConfig",
    "TrainConfig",
    "Trainer",
    "VideoMask2FormerLoss",
    "Worker",
    "join_workers",
    "loss_norms",
    "prepare_target",
]

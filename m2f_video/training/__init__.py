"""Training: targets, matching, losses, and the loop."""

from m2f_video.distributed import Worker, join_workers
from m2f_video.training.batches import ClipOrder, Collate
from m2f_video.training.config import TRAIN_PRESETS, TrainConfig
from m2f_video.training.given_model import recompute_activations
from m2f_video.training.losses import (
    LossConfig,
    LossNorms,
    LossOutput,
    NonFinitePredictionError,
    VideoMask2FormerLoss,
    loss_norms,
)
from m2f_video.training.matcher import HungarianMatcher, Match, Matcher
from m2f_video.training.optim import (
    OptimConfig,
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    update_average,
)
from m2f_video.training.targets import ClipTarget, LabelSource, prepare_target
from m2f_video.training.trainer import Trainer

__all__ = [
    "TRAIN_PRESETS",
    "ClipOrder",
    "ClipTarget",
    "Collate",
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
    "build_optimizer",
    "join_workers",
    "learning_rate",
    "loss_norms",
    "parameter_groups",
    "prepare_target",
    "recompute_activations",
    "set_learning_rate",
    "update_average",
]

"""Training learns: four videos are segmented and tracked almost without fault after a minute."""

from pathlib import Path

import pytest

from m2f_video import VideoMask2FormerConfig
from m2f_video.config import PreprocessingConfig
from m2f_video.data import AugmentConfig, SyntheticVideos
from m2f_video.evaluation import evaluate_model
from m2f_video.training import LossConfig, OptimConfig, TrainConfig, Trainer


def overfitted_ap(model: VideoMask2FormerConfig, folder: Path) -> float:
    """AP on the four videos that a model was trained on for 100 steps."""
    videos = SyntheticVideos(4, difficulty="easy", num_frames=2, height=96, width=128)
    config = TrainConfig(
        model=model.replace(preprocessing=PreprocessingConfig(shortest_edge=96)),
        loss=LossConfig(num_points=512),
        augment=AugmentConfig(shortest_edges=(), flip=0.0),
        optim=OptimConfig(learning_rate=2e-3, backbone_factor=1.0, clip_norm=1.0, schedule="cosine", warmup_steps=20),
        steps=100,
        batch_size=4,
        checkpoint_every=100,
        num_workers=0,
    )
    trained = Trainer(config, videos, folder).train()
    return evaluate_model(trained, videos).stats["AP"]


@pytest.mark.slow  # a minute of training
def test_four_videos_are_learnt(tiny_config: VideoMask2FormerConfig, tmp_path: Path) -> None:
    assert overfitted_ap(tiny_config, tmp_path) > 0.95

"""A training run so small that a step takes tens of milliseconds."""

import csv
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2f_video.config import (
    PixelDecoderConfig,
    PreprocessingConfig,
    SwinConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.data import AugmentConfig, SyntheticVideos
from m2f_video.data.synthetic import SyntheticVideo
from m2f_video.training import LossConfig, OptimConfig, TrainConfig, Trainer
from m2f_video.training.checkpoint import load_latest_checkpoint
from m2f_video.training.optim import parameter_groups

MODEL = VideoMask2FormerConfig(
    backbone=SwinConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, drop_path_rate=0.2),
    pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=32, num_layers=1, ffn_dim=64, num_heads=4, num_points=2),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=32, num_queries=5, num_layers=2, num_heads=4, ffn_dim=64),
    labels=SyntheticVideos.labels,
    preprocessing=PreprocessingConfig(shortest_edge=32),
)
CONFIG = TrainConfig(
    model=MODEL,
    loss=LossConfig(num_points=32),
    augment=AugmentConfig(shortest_edges=()),
    optim=OptimConfig(ema_decay=0.9, milestones=(3,), warmup_steps=2),
    steps=3,
    batch_size=2,
    checkpoint_every=1,
    log_every=2,
    num_workers=0,
)
"""Everything that is random or has a state takes part: dropped paths, points, the average of the weights."""

EXACT = CONFIG.replace(
    model=MODEL.replace(backbone=SwinConfig(**{**vars(MODEL.backbone), "drop_path_rate": 0.0})),
    loss=LossConfig(matching="masks", mask_loss="masks"),
)
"""Nothing is drawn but the clips, so that it does not matter how a batch is divided."""


class KeptVideos(SyntheticVideos):
    """Synthetic videos that paint their textures once, which is most of the work of a clip."""

    @cache  # noqa: B019  # the few that there are live as long as the tests
    def __getitem__(self, index: int, /) -> SyntheticVideo:
        return super().__getitem__(index)


VIDEOS = KeptVideos(4, num_frames=4, height=32, width=64)
HARD = KeptVideos(4, difficulty="hard", num_frames=4, height=32, width=64)
"""Instances come and go, and some clips have more of them than the model has queries."""


class Stopped(BaseException):
    """What ends a run in the middle, as an interrupt does."""


def train(output: Path | str, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
    """Train to the end; the trainer is given back to look at."""
    trainer = Trainer(config, options.pop("videos", VIDEOS), output, **options)
    trainer.train()
    return trainer


def train_until(step: int, output: Path, config: TrainConfig = CONFIG, **options: Any) -> None:
    """Train, but end like a killed process right after a step's checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        save = Trainer._save

        def stopping(trainer: Trainer) -> None:
            save(trainer)
            if trainer.steps_done == step:
                raise Stopped

        patch.setattr(Trainer, "_save", stopping)
        with pytest.raises(Stopped):
            train(output, config, **options)


@cache
def _stopped_run(step: int) -> TemporaryDirectory:
    folder = TemporaryDirectory()  # removed when the tests end
    train_until(step, Path(folder.name))
    return folder


def copy_stopped_run(step: int, output: Path) -> None:
    """Of a run that `train_until` stopped, which is made once."""
    shutil.copytree(_stopped_run(step).name, output, dirs_exist_ok=True)


def rows(output: Path, name: str = "log.csv") -> list[dict[str, str]]:
    """Of a run's log, without the times."""
    with (output / name).open(encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def column(output: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(output)]


def final_weights(output: Path) -> bytes:
    return (output / "final" / "model.safetensors").read_bytes()


def plain_descent(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """In place of AdamW, which makes a step of any size of a gradient that is zero but for rounding."""
    return torch.optim.SGD(parameter_groups(model, config), lr=config.learning_rate)


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Between weights of the same names."""
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def assert_same_end(output: Path, whole: Path) -> None:
    """Weights, log and state of two runs are equal to the bit."""
    assert final_weights(output) == final_weights(whole)
    assert rows(output) == rows(whole)
    ours, theirs = load_latest_checkpoint(output), load_latest_checkpoint(whole)
    assert _flat(ours) == _flat(theirs)


def _flat(state: Any) -> Any:
    """A checkpoint's content, in a form that compares bit by bit; the config may differ in what is free to change."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.flatten().contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(state, dict):
        return {key: _flat(value) for key, value in state.items() if key != "config"}
    return [_flat(value) for value in state] if isinstance(state, list) else state

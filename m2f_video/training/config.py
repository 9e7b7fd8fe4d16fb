"""What a training run is made from: one nested dataclass, its presets, JSON both ways."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from m2f_video.checked_config import ConfigError, FileConfig, build_config, check_fields
from m2f_video.config import (
    MODEL_TYPE,
    PRESETS,
    PRESETS_IN_WORDS,
    PixelDecoderConfig,
    PreprocessingConfig,
    TimmBackboneConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.data.augment import AugmentConfig
from m2f_video.data.clip import ClipSampling
from m2f_video.training.losses import LossConfig
from m2f_video.training.optim import OptimConfig
from m2f_video.training.targets import LabelSource

CHANGEABLE = frozenset({"checkpoint_every", "keep_checkpoints", "evaluate_every", "log_every", "num_workers"})
"""Fields that do not change the weights a run ends with, so that it may be resumed with other values."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FileConfig):
    """A training run; the defaults are the published recipe for YouTubeVIS 2019 with Swin-tiny.

    Raises:
        ConfigError: a field has a value no run can be made from; the message names it.
    """

    model: VideoMask2FormerConfig = field(default_factory=VideoMask2FormerConfig)
    """What is trained. Its labels become those of the data."""
    loss: LossConfig = field(default_factory=LossConfig)
    """How predictions are matched, and what is minimised."""
    sampling: ClipSampling = field(default_factory=ClipSampling)
    """Which frames of a video make a clip."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How clips are varied."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights are updated."""
    label_source: LabelSource = "any_frame"
    """`any_frame` trains an instance seen in any frame of a clip with its class; `last_frame` as the original does: one
    that is absent from the last frame as no object."""
    steps: int = 6000
    """Updates of the weights."""
    batch_size: int = 16
    """Clips of an update, over all workers and accumulated parts together."""
    accumulation: int = 1
    """Parts into which a worker's share of the batch is split to save memory; loss and gradients stay the same but for
    rounding and for which random points are drawn."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the matrix products in backbone and transformer decoder; pixel decoder (as in the original), weights,
    losses and optimiser stay in float32. float16 scales the loss."""
    activation_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass rather than keep them."""
    seed: int = 0
    """Of the weights, the clips, the points and what is dropped."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""
    evaluate_every: int = 0
    """Steps between evaluations on the validation videos, where there are any; 0 evaluates after the last step only."""
    log_every: int = 20
    """Steps between lines on the console."""
    num_workers: int = 2
    """Processes that prepare clips; 0 prepares them in the training process."""

    def _check(self) -> None:
        positive = ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every")
        check_fields(self, "must be positive", lambda value: value > 0, *positive)
        check_fields(self, "must not be negative", lambda value: value >= 0, "seed", "evaluate_every", "num_workers")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"TrainConfig.batch_size={self.batch_size} is not divisible by accumulation={self.accumulation}"
            )
        if self.model.temporal != "joint":
            raise ConfigError("TrainConfig.model.temporal must be 'joint'; an image model has no clips to learn from")

    @classmethod
    def preset(cls, name: str) -> Self:
        """The recipe of a preset, by name (one of `TRAIN_PRESETS`).

        Raises:
            ConfigError: no such preset; the message lists them.
        """
        if name == "demo":
            return replace(cls(), **_demo())
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r:.60}; presets: demo; {PRESETS_IN_WORDS}")
        steps, milestone = (6000, 4000) if name.endswith("2019") else (8000, 5500)
        return cls(model=VideoMask2FormerConfig.preset(name), optim=OptimConfig(milestones=(milestone,)), steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only; `from_dict` is its inverse."""
        return {**json.loads(json.dumps(asdict(self))), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from plain containers; fields left out keep their defaults.

        Raises:
            ConfigError: an unknown field or a value of the wrong type; the message names it.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"a training config must be a JSON object, got {type(data).__name__}")
        if data.get("model_type") == MODEL_TYPE:
            raise ConfigError('this is the config of a model; a training config holds it as {"model": {...}}')
        data = dict(data)
        if isinstance(data.get("model"), dict):
            try:
                data["model"] = VideoMask2FormerConfig.from_dict(data["model"])
            except ConfigError as error:
                raise ConfigError(f"model: {error}") from error
        return build_config(cls, data, path="")

    def differences(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """As `FileConfig.differences`, without the fields of `CHANGEABLE`."""
        both = super().differences(other)
        return {name: values for name, values in both.items() if name.split(".")[0] not in CHANGEABLE}


def _demo() -> dict[str, Any]:
    """A small model for the synthetic benchmark, trained from random weights on a CPU."""
    return {
        "model": VideoMask2FormerConfig(
            backbone=TimmBackboneConfig(name="regnetx_002"),
            pixel_decoder=PixelDecoderConfig(hidden_dim=64, mask_dim=64, num_layers=2, ffn_dim=256, num_heads=4),
            transformer_decoder=TransformerDecoderConfig(
                hidden_dim=128, num_queries=20, num_layers=6, num_heads=4, ffn_dim=512
            ),
            preprocessing=PreprocessingConfig(shortest_edge=128),
        ),
        "loss": LossConfig(class_weight=4.0, num_points=512),
        "sampling": ClipSampling(frame_range=15),
        "augment": AugmentConfig(shortest_edges=(128,)),
        "optim": OptimConfig(
            learning_rate=8e-4, backbone_factor=1.0, clip_norm=1.0, schedule="cosine", warmup_steps=200, ema_decay=0.999
        ),
        "steps": 6000,
        "batch_size": 8,
        "num_workers": 1,
    }


TRAIN_PRESETS: tuple[str, ...] = ("demo", *PRESETS)
"""Names that `TrainConfig.preset` knows: `demo`, and the published recipes."""

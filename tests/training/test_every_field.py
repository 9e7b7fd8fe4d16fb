"""Every field of every config changes what is trained; those of the model alone are in `tests/test_config.py`."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2f_video.checked_config import CheckedConfig
from m2f_video.data import AugmentConfig, CameraMotion
from m2f_video.data.synthetic_difficulty import Difficulty
from m2f_video.training import OptimConfig, TrainConfig, Trainer
from m2f_video.training.config import CHANGEABLE
from tests.test_config import CASES
from tests.training.tiny_run import CONFIG, EXACT, HARD, train

BASE = CONFIG.replace(steps=2, optim=OptimConfig(milestones=(1,)), checkpoint_every=2)
CHANGES: dict[str, Any] = {
    "model": EXACT.model,
    "loss.class_weight": 3.0,
    "loss.mask_weight": 3.0,
    "loss.dice_weight": 1.0,
    "loss.no_object_weight": 0.3,
    "loss.num_points": 50,
    "loss.oversample_ratio": 2.0,
    "loss.importance_sample_ratio": 0.5,
    "loss.matching": "masks",
    "loss.mask_loss": "masks",
    "loss.deep_supervision": False,
    "sampling.num_frames": 3,
    "sampling.frame_range": 0,
    "augment.brightness": 0.5,
    "augment.contrast": 0.5,
    "augment.saturation": 0.5,
    "augment.hue": 0.2,
    "augment.rotation": 30.0,
    "augment.crop": (0.5, 0.9),
    "augment.flip": 1.0,
    "augment.shortest_edges": (48,),
    "augment.longest_edge": 64,
    "optim.learning_rate": 2e-4,
    "optim.backbone_factor": 0.2,
    "optim.weight_decay": 0.5,
    "optim.clip_norm": 1.0,
    "optim.schedule": "cosine",
    "optim.milestones": (2,),
    "optim.gamma": 0.5,
    "optim.warmup_steps": 2,
    "optim.ema_decay": 0.5,
    "label_source": "last_frame",
    "steps": 1,
    "batch_size": 1,
    "accumulation": 2,  # the points are others then
    "precision": "bfloat16",
    "seed": 1,
}
"""Fields that change the weights a run ends with, and to what."""

SPARE = replace(BASE.model, transformer_decoder=replace(BASE.model.transformer_decoder, num_queries=20))
WITH = {
    "augment.longest_edge": {"augment": AugmentConfig(shortest_edges=(48,))},
    "loss.no_object_weight": {"model": SPARE},  # of five queries none is without an instance
}
"""What has to be set for a field to matter."""

STEERING = CHANGEABLE | {"activation_checkpointing"}
"""Fields that change no weight; each has a test of its own in `test_trainer.py`."""


def names(config: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if is_dataclass(value) and name != "model":
            yield from names(value, f"{name}.")
        else:
            yield name


def changed(base: TrainConfig, name: str) -> TrainConfig:
    part, _, field = name.partition(".")
    return base.replace(**{part: replace(getattr(base, part), **{field: CHANGES[name]}) if field else CHANGES[name]})


def trained(output: Path, config: TrainConfig) -> dict[str, Tensor]:
    """Weights after training, without what takes longest of so short a run: writing it down."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_save", "_write"):
            patch.setattr(Trainer, name, lambda *_: None)
        return train(output, config, videos=HARD).model.state_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(tmp_path_factory.mktemp("base"), BASE)


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_changes_the_result(name: str, base: dict[str, Tensor], tmp_path: Path) -> None:
    plain, expected = BASE.replace(**WITH.get(name, {})), base
    if name in WITH:
        expected = trained(tmp_path / "plain", plain)
    assert not same_weights(trained(tmp_path / "changed", changed(plain, name)), expected)


def test_nothing_but_a_field_changes_it(base: dict[str, Tensor], tmp_path: Path) -> None:
    assert same_weights(trained(tmp_path, BASE), base)


def same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    shared = ours.keys() & theirs.keys()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in shared)


def test_no_field_is_forgotten() -> None:
    assert sorted(names(TrainConfig())) == sorted(CHANGES.keys() | STEERING)


OF_DATA = {Difficulty, CameraMotion}
"""What data is made by; each has a test of all its fields in `tests/data/test_synthetic.py` and `test_coco.py`."""


def test_no_config_is_forgotten() -> None:
    def below(kind: type) -> Iterator[type]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    found = {kind for kind in below(CheckedConfig) if is_dataclass(kind) and kind.__module__.startswith("m2f_video.")}
    parts = {type(getattr(TrainConfig(), field.name)) for field in fields(TrainConfig)}
    assert found == {TrainConfig} | {kind for kind in parts if is_dataclass(kind)} | set(CASES) | OF_DATA

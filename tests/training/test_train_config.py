"""The config of a run: presets, JSON both ways, and what is no config."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from m2f_video import VideoMask2FormerConfig
from m2f_video.checked_config import ConfigError, flatten
from m2f_video.config import PRESETS, TimmBackboneConfig
from m2f_video.data import AugmentConfig
from m2f_video.training import TRAIN_PRESETS, OptimConfig, TrainConfig
from m2f_video.training.config import CHANGEABLE
from tests.test_config import HOSTILE, messages_of
from tests.training.tiny_run import CONFIG


@pytest.mark.parametrize("name", TRAIN_PRESETS)
def test_presets_are_written_and_read_back(name: str, tmp_path: Path) -> None:
    config = TrainConfig.preset(name)
    (tmp_path / "train.json").write_text(config.to_json())
    assert TrainConfig.from_file(tmp_path / "train.json") == config
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.preset(name).differences(config) == {}


@pytest.mark.parametrize("name", PRESETS)
def test_published_recipes(name: str) -> None:
    config = TrainConfig.preset(name)
    assert config.model == VideoMask2FormerConfig.preset(name)
    assert (config.steps, config.optim.milestones) == ((6000, (4000,)) if "2019" in name else (8000, (5500,)))
    assert config == TrainConfig(model=config.model, optim=config.optim, steps=config.steps)
    optim = {"learning_rate": 1e-4, "backbone_factor": 0.1, "weight_decay": 0.05, "clip_norm": 0.01, "gamma": 0.1}
    assert optim.items() <= dataclasses.asdict(config.optim).items()
    assert (config.batch_size, config.sampling.num_frames, config.sampling.frame_range) == (16, 2, 20)
    assert (config.augment.shortest_edges, config.loss.num_points) == ((360, 480), 12544)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'tiny'; presets: demo; swin_tiny, swin_small"):
        TrainConfig.preset("tiny")


def test_fields_left_out_keep_their_defaults() -> None:
    config = TrainConfig.from_dict({"optim": {"learning_rate": 1}, "model": {"backbone": "timm:resnet50"}})
    assert config == TrainConfig(
        optim=OptimConfig(learning_rate=1.0),
        model=VideoMask2FormerConfig(backbone=TimmBackboneConfig(name="resnet50")),
    )
    assert TrainConfig.from_dict({}) == TrainConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"step": 3}, "unknown config field step; known: .*steps"),
        ({"optim": {"lr": 3}}, "unknown config field optim.lr"),
        ({"model": {"layers": 3}}, "model: unknown config field layers"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": True}, "steps must be int"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"accumulation": 0}, "accumulation must be positive"),
        ({"checkpoint_every": 0}, "checkpoint_every must be positive"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be positive"),
        ({"log_every": 0}, "log_every must be positive"),
        ({"seed": -1}, "seed must not be negative"),
        ({"evaluate_every": -1}, "evaluate_every must not be negative"),
        ({"num_workers": -1}, "num_workers must not be negative"),
        ({"batch_size": 4, "accumulation": 3}, "batch_size=4 is not divisible by accumulation=3"),
        ({"precision": "float64"}, "precision must be .*float64"),
        ({"label_source": "first_frame"}, "label_source must be"),
        ({"activation_checkpointing": 1}, "activation_checkpointing must be bool"),
        ({"optim": {"learning_rate": 0}}, "OptimConfig.learning_rate must be positive, got 0"),
        ({"optim": {"milestones": 4000}}, "optim.milestones must be"),
        ({"optim": {"learning_rate": float("nan")}}, "learning_rate must be a finite float"),
        ({"loss": {"dice_weight": -1}}, "LossConfig.dice_weight"),
        ({"augment": {"flip": 2}}, "AugmentConfig.flip must be in"),
        ({"sampling": {"num_frames": 0}}, "ClipSampling.num_frames must be positive"),
        ({"model": {"temporal": "per_frame"}}, "an image model has no clips to learn from"),
        ({"model": 3}, "model must be VideoMask2FormerConfig"),
        ([], "must be a JSON object, got list"),
        (VideoMask2FormerConfig().to_dict(), 'a training config holds it as {"model": '),
    ],
)
def test_what_is_no_config_is_named_with_its_file(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(data)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=f"^{file}: .*{message}"):
        TrainConfig.from_file(file)


def test_files_that_are_not_json(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    with pytest.raises(FileNotFoundError, match=r"train\.json"):
        TrainConfig.from_file(file)
    for content in (b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"steps": 1' + b"0" * 5000 + b"}", b'{"seed": 1e999}'):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"^{file}: "):
            TrainConfig.from_file(file)
        with pytest.raises(ConfigError, match="not valid JSON"):
            TrainConfig.from_json(content.decode(errors="replace"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=f"^{file} is a named pipe"):
        TrainConfig.from_file(file)


@pytest.mark.parametrize("name", [name for name in flatten(TrainConfig().to_dict()) if not name.startswith("model.")])
def test_every_field_takes_hostile_values_with_one_short_line(name: str) -> None:
    messages = messages_of(TrainConfig.from_dict, TrainConfig().to_dict(), name, [*HOSTILE, [-1] * 2])
    assert len(messages) > len(HOSTILE) / 2
    for message in messages:
        assert len(message) < 300
        assert name.split(".")[-1] in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("learning_rate", 0.0),
        ("backbone_factor", -1.0),
        ("weight_decay", -0.1),
        ("clip_norm", -0.1),
        ("schedule", "linear"),
        ("milestones", (0,)),
        ("gamma", 0.0),
        ("gamma", 1.5),
        ("warmup_steps", -1),
        ("ema_decay", 1.0),
    ],
)
def test_values_out_of_range(field: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=f"OptimConfig.{field}"):
        OptimConfig(**{field: bad})


def test_differences_are_named_by_their_path() -> None:
    other = CONFIG.replace(augment=AugmentConfig(shortest_edges=(), flip=0.25), steps=9)
    assert CONFIG.differences(other) == {"augment.flip": (0.5, 0.25), "steps": (3, 9)}
    timm = CONFIG.replace(model=CONFIG.model.replace(backbone="timm:resnet50"))
    assert {"model.backbone.type", "model.backbone.name"} <= set(CONFIG.differences(timm))
    assert {"model.backbone.type", "model.backbone.name"} <= set(timm.differences(CONFIG))


def test_a_run_may_be_resumed_with_other_values_of_what_the_weights_do_not_depend_on() -> None:
    others = {name: getattr(CONFIG, name) + 1 for name in CHANGEABLE}
    assert CONFIG.differences(CONFIG.replace(**others)) == {}
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= CHANGEABLE

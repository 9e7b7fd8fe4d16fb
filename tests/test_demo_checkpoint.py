"""The trained model inside the package, by its name `demo`."""

import os
from pathlib import Path

import pytest
import torch

from m2f_video import VideoMask2Former, VideoProcessor
from m2f_video.data import SHAPES, STANDARD_SPLITS, SyntheticVideos
from m2f_video.evaluation import evaluate_model
from m2f_video.hub import DEMO_FOLDER


def test_it_is_small_and_holds_nothing_but_config_and_weights() -> None:
    assert sorted(file.name for file in DEMO_FOLDER.iterdir()) == ["config.json", "model.safetensors"]
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) < 12e6


def test_its_name_loads_model_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name is ./demo
    model = VideoMask2Former.from_pretrained("demo")
    assert model.config.labels == VideoProcessor.from_pretrained("demo").labels == SHAPES
    assert model.dtype == torch.float32
    with pytest.raises(ValueError, match=r"config\.json"):
        VideoMask2Former.from_pretrained(os.path.join(".", "demo"))


def test_it_finds_shapes_it_was_not_trained_on() -> None:
    model = VideoMask2Former.from_pretrained("demo")
    videos = SyntheticVideos(4, STANDARD_SPLITS["test"]["seed"], "easy", num_frames=4)
    assert evaluate_model(model, videos).stats["AP50"] > 0.6

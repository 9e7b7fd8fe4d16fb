"""The tiny model whose numbers tests/golden holds."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f_video.config import (
    PixelDecoderConfig,
    PreprocessingConfig,
    SwinConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.data import SyntheticVideos
from m2f_video.hub import load_state_dict_strictly
from m2f_video.modeling.video_mask2former import VideoMask2Former
from tests.golden_files import original_weights
from weights_convert import from_native, hf_config_from_native, to_native, write_checkpoint


def pytest_collection_finish() -> None:
    """What was imported is not looked at by every garbage collection, which takes a twentieth of the time otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models here are too small to share


@pytest.fixture(scope="session")
def tiny_config() -> VideoMask2FormerConfig:
    return VideoMask2FormerConfig(
        backbone=SwinConfig(
            embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4, drop_path_rate=0.0
        ),
        pixel_decoder=PixelDecoderConfig(hidden_dim=64, mask_dim=64, num_layers=2),
        transformer_decoder=TransformerDecoderConfig(hidden_dim=64, num_queries=10, num_layers=3, ffn_dim=128),
        labels=("person", "giant_panda", "lizard", "parrot", "skateboard"),
        preprocessing=PreprocessingConfig(shortest_edge=64),  # by default frames of any size are made 480 pixels high
    )


def synthetic_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """A video of moving shapes, uint8 (T, H, W, 3)."""
    video = SyntheticVideos(1, difficulty="easy", num_frames=num_frames, height=height, width=width)[0]
    return video.clip(range(num_frames)).frames.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="session")
def tiny_model(tiny_config: VideoMask2FormerConfig) -> VideoMask2Former:
    """With the golden weights. Shared by all tests: leave it as it is."""
    model = VideoMask2Former(tiny_config)
    load_state_dict_strictly(model, to_native(original_weights()), source="tests/golden/tiny")
    return model.requires_grad_(False).eval()


@pytest.fixture
def folder(tiny_model: VideoMask2Former, tmp_path: Path) -> Path:
    """The tiny model, saved."""
    tiny_model.save_pretrained(tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def hf_folder(tiny_model: VideoMask2Former, tmp_path: Path) -> Path:
    """The tiny model, in the format of transformers."""
    config, preprocessor = hf_config_from_native(tiny_model.config.to_dict())
    write_checkpoint(tmp_path / "hf", from_native(tiny_model.state_dict()), config, preprocessor)
    return tmp_path / "hf"

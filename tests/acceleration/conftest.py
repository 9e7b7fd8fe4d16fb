import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from m2f_video import VideoMask2Former
from m2f_video.acceleration import cpu_kernels
from m2f_video.config import (
    PixelDecoderConfig,
    PreprocessingConfig,
    SwinConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.parity import random_model

IN_LANES = VideoMask2FormerConfig(  # of widths that the compiled kernels know
    backbone=SwinConfig(embed_dim=32, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), window_size=3, drop_path_rate=0.0),
    pixel_decoder=PixelDecoderConfig(hidden_dim=64, mask_dim=64, num_layers=1, ffn_dim=64, num_heads=4, num_points=4),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=64, num_queries=5, num_layers=3, num_heads=4, ffn_dim=64),
    labels=("cat", "dog"),
    preprocessing=PreprocessingConfig(shortest_edge=64),
)
BACKBONES = {"swin": IN_LANES, "timm": IN_LANES.replace(backbone="timm:test_resnet")}


def of_kind(kind: Any) -> PixelDecoderConfig:
    """A pixel decoder of the paper's table, in these widths."""
    depth = {"num_layers": 2} if kind == "bifpn" else {}
    return PixelDecoderConfig(kind=kind, hidden_dim=64, mask_dim=64, **depth)


@pytest.fixture(scope="session")
def build() -> Callable[[str], VideoMask2Former]:
    """Makes a new model, the same each time: of a backbone's name, of a field of the decoder and its value, or of the
    kind of a pixel decoder.
    """

    @cache
    def made(name: str) -> VideoMask2Former:
        if name in BACKBONES:
            return random_model(BACKBONES[name], 0)
        field, value = name.split("/")
        if field == "kind":
            return random_model(IN_LANES.replace(pixel_decoder=of_kind(value)), 0)
        decoder = replace(IN_LANES.transformer_decoder, **{field: value})
        return random_model(IN_LANES.replace(transformer_decoder=decoder), 0)

    return lambda name="swin": copy.deepcopy(made(name))


@pytest.fixture
def model(build: Callable[[str], VideoMask2Former]) -> VideoMask2Former:
    return build("swin")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that have been called."""
    names: list[str] = []
    call = cpu_kernels.call
    monkeypatch.setattr(cpu_kernels, "call", lambda name, *args: (names.append(name), call(name, *args))[1])
    return names


def clip(frames: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(1, frames, 3, height, width, generator=torch.Generator().manual_seed(0))

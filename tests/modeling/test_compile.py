"""The model has no part that PyTorch's compiler or exporter has to leave out."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from m2f_video import VideoMask2Former
from m2f_video.config import PixelDecoderConfig, SwinConfig, TransformerDecoderConfig, VideoMask2FormerConfig
from m2f_video.parity import random_model
from tests.tolerances import assert_close

CONFIG = VideoMask2FormerConfig(
    backbone=SwinConfig(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=7),
    pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=32, num_layers=1, ffn_dim=64, num_heads=4),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=32, num_queries=7, num_layers=3, num_heads=4, ffn_dim=64),
)
SMALL = CONFIG.replace(
    backbone=SwinConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=32, num_queries=7, num_layers=1, num_heads=4, ffn_dim=64),
)
"""Of each kind of part one: PyTorch takes seconds to trace a layer."""


def check_one_graph(config: VideoMask2FormerConfig, dynamic: bool, *sizes: tuple[int, int, int]) -> None:
    model = random_model(config, 0).requires_grad_(False)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    with torch.no_grad():
        for frames, height, width in sizes:
            clip = torch.randn(1, frames, 3, height, width)
            ours, expected = compiled(clip), model(clip)
            assert_close(ours.class_queries_logits, expected.class_queries_logits)
            assert_close(ours.masks_queries_logits, expected.masks_queries_logits)
            assert counter.frame_count == 1


def test_the_model_is_one_graph() -> None:
    check_one_graph(SMALL, False, (2, 64, 96))


@pytest.mark.slow
def test_the_whole_model_is_one_graph_for_clips_of_any_size() -> None:
    # maps of up to one window, as at stride 32 of smaller frames, would be another graph
    check_one_graph(CONFIG, True, (2, 256, 288), (3, 288, 256))


class Encoder(torch.nn.Module):
    def __init__(self, model: VideoMask2Former) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> object:
        return self.model.encode_frames(frames)


def check_export(module: torch.nn.Module, clip: Tensor, name: str) -> None:
    with torch.no_grad():
        exported = torch.export.export(module, (clip,)).module()
        assert_close(getattr(exported(clip), name), getattr(module(clip), name))


def clip() -> Tensor:
    return torch.randn(1, 2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_the_model_exports() -> None:
    check_export(random_model(SMALL, 0).requires_grad_(False), clip(), "masks_queries_logits")


@pytest.mark.slow
def test_both_halves_and_the_whole_export(tiny_model: VideoMask2Former) -> None:
    check_export(tiny_model, clip(), "masks_queries_logits")
    check_export(Encoder(tiny_model), clip()[0], "mask_features")

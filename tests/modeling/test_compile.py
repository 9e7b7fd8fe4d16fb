import torch
from torch._dynamo.testing import CompileCounter

from m2f_video.config import PixelDecoderConfig, SwinConfig, TransformerDecoderConfig, VideoMask2FormerConfig
from m2f_video.parity import random_model
from tests.tolerances import assert_close

CONFIG = VideoMask2FormerConfig(
    backbone=SwinConfig(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=7),
    pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=32, num_layers=1, ffn_dim=64, num_heads=4),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=32, num_queries=7, num_layers=3, num_heads=4, ffn_dim=64),
)


def test_the_whole_model_is_one_graph_for_clips_of_any_size() -> None:
    model = random_model(CONFIG, 0).requires_grad_(False)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        # maps of up to one window, as at stride 32 of smaller frames, would be another graph
        for frames, height, width in ((2, 256, 288), (3, 288, 256)):
            clip = torch.randn(1, frames, 3, height, width)
            ours, expected = compiled(clip), model(clip)
            assert_close(ours.class_queries_logits, expected.class_queries_logits)
            assert_close(ours.masks_queries_logits, expected.masks_queries_logits)
            assert counter.frame_count == 1

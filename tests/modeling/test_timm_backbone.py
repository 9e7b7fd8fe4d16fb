import pickle
from pathlib import Path

import pytest
import torch

from m2f_video.config import (
    ConfigError,
    PixelDecoderConfig,
    TimmBackboneConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.modeling.timm_backbone import TimmBackbone
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import random_model
from tests.tolerances import assert_close, identical
from weights_convert import from_native, hf_config_from_native, write_checkpoint


def config(name: str) -> VideoMask2FormerConfig:
    return VideoMask2FormerConfig(
        backbone=f"timm:{name}",
        pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=8, num_layers=1, ffn_dim=16, num_heads=2),
        transformer_decoder=TransformerDecoderConfig(
            hidden_dim=16, num_queries=4, num_layers=2, ffn_dim=16, num_heads=2
        ),
        labels=("cat", "dog"),
    )


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", (64, 128, 256, 512)), ("test_convnext", (24, 32, 48, 64)), ("convnext_atto", (40, 80, 160, 320))],
)
def test_maps_of_timm_models(name: str, channels: tuple[int, ...]) -> None:
    backbone = TimmBackbone(name=name).eval()
    assert backbone.channels == channels
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 96))
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3))
    assert [level.shape for level in maps] == [(2, c, *size) for c, size in zip(channels, sizes, strict=True)]


def test_maps_with_channels_last_are_turned() -> None:
    backbone = TimmBackbone(name="swin_tiny_patch4_window7_224").eval()
    assert backbone.channels == (96, 192, 384, 768)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 224, 224))
    assert [tuple(level.shape) for level in maps] == [(1, 96 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)]


def test_a_stem_at_stride_2_is_left_out() -> None:
    maps = TimmBackbone(name="resnet18")(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_end_to_end(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = VideoMask2Former(config("test_convnext")).eval()
    pixel_values = torch.randn(1, 2, 3, *size)
    with torch.no_grad():
        output = model(pixel_values)
        chunked = model(pixel_values, frames_per_chunk=1)
    assert output.class_queries_logits.shape == (1, 4, 3)
    height, width = model.backbone(pixel_values[0])[0].shape[-2:]
    assert output.masks_queries_logits.shape == (1, 4, 2, height, width)
    assert_close(chunked.masks_queries_logits, output.masks_queries_logits)


def test_another_frame_size_than_the_model_was_made_for() -> None:
    backbone = TimmBackbone(name="swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 96, 160))
    assert [level.shape[-2:] for level in maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]


def test_a_mistyped_name_gets_suggestions() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet19'; did you mean .*resnet18"):
        TimmBackbone(name="resnet19")


def test_a_name_like_no_other_gets_advice() -> None:
    with pytest.raises(ConfigError, match=r"no model '@@@@'; timm.list_models\(\)"):
        TimmBackbone(name="@@@@")


def test_a_tag_of_pretrained_weights_is_part_of_the_name(tmp_path: Path) -> None:
    model = VideoMask2Former(config("resnet18.a1_in1k"))
    assert model.backbone.channels == (64, 128, 256, 512)
    model.save_pretrained(tmp_path)
    loaded = VideoMask2Former.from_pretrained(tmp_path)
    assert loaded.config.backbone == TimmBackboneConfig(name="resnet18.a1_in1k")
    assert identical(loaded, model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18.nobody", r"no pretrained weights 'resnet18\.nobody'; its tags: .*resnet18\.a1_in1k"),
        ("test_resnet.", r"no pretrained weights 'test_resnet\.'"),
    ],
)
def test_a_tag_that_timm_does_not_know_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimmBackbone(name=name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit", "crossvit_9_240"])
def test_a_model_without_these_strides_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' does not give features at strides \(4, 8, 16, 32\)"):
        TimmBackbone(name=name)


def test_the_error_reaches_who_builds_the_model() -> None:
    with pytest.raises(ConfigError, match="resnet18"):
        VideoMask2Former(config("resnet19"))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet26", marks=pytest.mark.slow)])
def test_an_original_resnet_is_loaded(name: str, tmp_path: Path) -> None:
    model = random_model(config(name), seed=0)
    weights = from_native(model.state_dict(), "detectron2")
    frozen = {key: tensor.numpy() for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": frozen, "__author__": "someone"}))
    loaded = VideoMask2Former.from_pretrained(tmp_path / "model_final.pkl", config=config(name))
    assert identical(loaded, model)


@pytest.mark.slow
def test_an_image_checkpoint_with_a_resnet_is_loaded(tmp_path: Path) -> None:
    model = random_model(config("resnet18").replace(temporal="per_frame"), seed=0)
    write_checkpoint(tmp_path, from_native(model.state_dict()), *hf_config_from_native(model.config.to_dict()))
    loaded = VideoMask2Former.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert identical(loaded, model)

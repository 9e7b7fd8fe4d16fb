"""Modules of your own: built, run in every mode, trained, saved with their names, and never lost silently."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from m2f_video import VideoMask2Former
from m2f_video.acceleration import accelerated, report
from m2f_video.checked_config import ConfigError
from m2f_video.config import MODULE_PARTS, VideoMask2FormerConfig
from m2f_video.modeling.cross_attention import CrossAttention, Level
from m2f_video.modeling.pixel_decoder import MSDeformAttnPixelDecoder, PixelDecoderOutput
from m2f_video.modeling.position_encoding import SinePosition3D
from m2f_video.modeling.swin import SwinTransformer
from m2f_video.modeling.transformer_decoder import DecoderLayer, TransformerDecoderOutput
from m2f_video.parity import random_model
from tests.acceleration.conftest import IN_LANES, clip
from tests.tolerances import relative_error
from weights_convert import ConversionError, hf_config_from_native


class MyAttention(CrossAttention):
    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, query: Tensor, level: Level, mask_logits: Tensor | None = None) -> Tensor:
        return super().forward(self.temperature * query, level, mask_logits)


class MyLayer(DecoderLayer):
    def forward(self, x: Tensor, query_position: Tensor, level: Level, mask_logits: Tensor | None) -> Tensor:
        return x + super().forward(x, query_position, level, mask_logits)


class MyPixelDecoder(MSDeformAttnPixelDecoder):
    def forward(self, maps: tuple[Tensor, ...], output_hidden: bool = False) -> PixelDecoderOutput:
        decoded = super().forward(maps, output_hidden)
        return replace(decoded, multi_scale=tuple(2 * level for level in decoded.multi_scale))


class MyBackbone(SwinTransformer):
    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        return tuple(level + level.roll(1, dims=1) for level in super().forward(frames))


class MyPosition(SinePosition3D):
    def forward(self, features: Tensor, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        pixel, frame = super().forward(features, frames, height, width)
        return 3 * pixel.flip(0), 3 * frame


MINE: dict[str, Any] = {
    "backbone": MyBackbone,
    "pixel_decoder": MyPixelDecoder,
    "decoder_layer": MyLayer,
    "cross_attention": MyAttention,
    "position_encoding": MyPosition,
}


def with_mine(*names: str) -> VideoMask2Former:
    torch.manual_seed(0)
    model = VideoMask2Former(IN_LANES, parts={name: MINE[name] for name in names})
    model.load_state_dict(random_model(IN_LANES, 0).state_dict(), strict=False)
    return model.eval()


def predict(model: VideoMask2Former) -> Tensor:
    return model(clip()).class_queries_logits.detach()


def test_every_part_can_be_ones_own() -> None:
    assert tuple(MINE) == MODULE_PARTS


@pytest.mark.parametrize("name", MODULE_PARTS)
def test_a_part_of_ones_own_runs_is_saved_and_comes_back(name: str, tmp_path: Path) -> None:
    model, mine = with_mine(name), MINE[name]
    expected = predict(model)
    with torch.no_grad():
        assert relative_error(expected, predict(random_model(IN_LANES, 0))) > 1e-3
        with accelerated(model) as fast:
            assert relative_error(predict(fast), expected) < 1e-4
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["parts"] == {name: f"{__name__}.{mine.__qualname__}"}
    with pytest.raises(ConfigError, match=f"{name} of its own .*{mine.__qualname__}.*give parts={{'{name}': ...}}"):
        VideoMask2Former.from_pretrained(tmp_path)
    again = VideoMask2Former.from_pretrained(tmp_path, parts={name: mine})
    assert torch.equal(predict(again), expected)
    with torch.no_grad():
        assert relative_error(predict(again.prepare_for_inference()), expected) < 1e-4
    with pytest.raises(ConversionError, match="parts"):
        hf_config_from_native(model.config.to_dict())


def test_what_is_not_ones_own_stays_fused() -> None:
    rows = report(with_mine("cross_attention").prepare_for_inference())
    assert {"SwinBlock", "MSDeformAttnPixelDecoder"} <= {row.type for row in rows if row.state == "fused"}
    assert any("MyAttention" in row.reason for row in rows)


def test_all_parts_at_once_learn() -> None:
    model = with_mine(*MODULE_PARTS).train()
    output = model(clip(2, 64, 64), output_auxiliary=True)
    assert output.auxiliary is not None
    torch.stack([each.class_queries_logits.square().mean() for each in output.auxiliary]).sum().backward()
    assert model.get_parameter("transformer_decoder.layers.0.cross_attn.temperature").grad is not None


def test_functions_make_parts_too(tmp_path: Path) -> None:
    def make(**sizes: Any) -> nn.Module:
        return MyAttention(**sizes)

    model = VideoMask2Former(IN_LANES, parts={"cross_attention": make})
    assert type(model.transformer_decoder.layers[0].cross_attn) is MyAttention
    model.save_pretrained(tmp_path)
    said = r"cross_attention was a .*make when the model was built first, now .*MyAttention"
    with pytest.warns(UserWarning, match=said):
        VideoMask2Former.from_pretrained(tmp_path, parts={"cross_attention": MyAttention})


def test_a_model_without_parts_says_nothing_of_them() -> None:
    assert "parts" not in VideoMask2Former(IN_LANES).config.to_dict()
    assert VideoMask2FormerConfig.from_dict(IN_LANES.to_dict()) == IN_LANES


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"attention": MyAttention}, "parts has 'attention'; a part of your own can be backbone, pixel_decoder"),
        (
            {"cross_attention": "mine.Attention"},
            "must be a class or function that makes a module, got 'mine.Attention'",
        ),
        ([MyAttention], "parts must be a dict of modules of your own by name"),
        ({"cross_attention": MyAttention(dim=4, num_heads=1)}, "must be a class or function that makes a module"),
        ({"cross_attention": lambda **_: None}, r"parts\['cross_attention'\] must make a torch\.nn\.Module, got None"),
        ({"pixel_decoder": lambda **_: print}, r"parts\['pixel_decoder'\] must make a torch\.nn\.Module, got <built"),
        ({"decoder_layer": lambda dim: dim}, r"must make a decoder_layer from dim, .*: got an unexpected keyword"),
        ({"backbone": lambda **_: nn.Identity()}, "a backbone has channels, .*; yours has None"),
    ],
)
def test_bad_parts_are_named(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoMask2Former(IN_LANES, parts=parts)


class Cached(CrossAttention):
    tables: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.scale = self.tables.setdefault("scale", torch.linspace(0, 1, dim))

    def forward(self, query: Tensor, level: Level, mask_logits: Tensor | None = None) -> Tensor:
        return self.scale * super().forward(query, level, mask_logits)


def test_parts_that_keep_tensors_are_loaded(tmp_path: Path) -> None:
    model = VideoMask2Former(IN_LANES, parts={"cross_attention": Cached}).eval()
    model.save_pretrained(tmp_path)
    Cached.tables.clear()  # as in a new process
    again = VideoMask2Former.from_pretrained(tmp_path, parts={"cross_attention": Cached})
    assert torch.equal(predict(again), predict(model))


def test_a_module_is_exchanged_before_those_in_it() -> None:
    layer = "transformer_decoder.layers.1"

    def attention(plain: nn.Module) -> nn.Module:
        return MyAttention(dim=IN_LANES.transformer_decoder.hidden_dim, num_heads=plain.num_heads)

    parts = {f"{layer}.cross_attn": attention, layer: lambda plain: MyLayer(dim=64, num_heads=2, ffn_dim=64)}
    made = VideoMask2Former(IN_LANES, parts=parts).get_submodule(layer)
    assert type(made) is MyLayer
    assert type(made.cross_attn) is MyAttention
    assert made.cross_attn.num_heads == 2


class MyDecoder(nn.Module):
    """That has nothing of ours but the class of what it gives."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.mask_product = plain.mask_product
        self.queries = nn.Parameter(torch.rand(3, plain.mask_head[2].out_features))
        self.classes = nn.Linear(self.queries.shape[1], IN_LANES.num_labels + 1)

    def forward(self, mask_features: Tensor, *_: object) -> TransformerDecoderOutput:
        x = self.queries.expand(len(mask_features), -1, -1) * mask_features.mean((1, 3, 4))[:, None]
        return TransformerDecoderOutput(self.classes(x), x)


def test_the_whole_transformer_decoder_may_be_ones_own(tmp_path: Path) -> None:
    parts = {"transformer_decoder": MyDecoder}
    model = VideoMask2Former(IN_LANES, parts=parts).eval()
    model.save_pretrained(tmp_path)
    again = VideoMask2Former.from_pretrained(tmp_path, parts=parts).prepare_for_inference()
    assert relative_error(predict(again), predict(model)) < 1e-4
    assert again.mask_product is again.transformer_decoder.mask_product


def made_of(kind: type[nn.Module], **sizes: Any) -> nn.Module:
    return kind(**sizes)


def test_a_partial_is_called_what_it_calls() -> None:
    model = VideoMask2Former(IN_LANES, parts={"cross_attention": functools.partial(made_of, MyAttention)})
    assert model.config.parts == {"cross_attention": f"{__name__}.made_of"}


def test_a_loss_or_matcher_is_recorded_and_no_part_of_the_network(tmp_path: Path) -> None:
    model = VideoMask2Former(IN_LANES, parts={"loss": made_of, "matcher": made_of})
    assert model.config.parts == {"loss": f"{__name__}.made_of", "matcher": f"{__name__}.made_of"}
    assert model.state_dict().keys() == VideoMask2Former(IN_LANES).state_dict().keys()
    model.save_pretrained(tmp_path)
    again = VideoMask2Former.from_pretrained(tmp_path)  # nobody gives them
    assert again.config == model.config
    assert hf_config_from_native(again.config.to_dict()) == hf_config_from_native(IN_LANES.to_dict())

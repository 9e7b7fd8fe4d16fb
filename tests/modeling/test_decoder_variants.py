"""What the papers compare: each class and field against its formula, and all of them in one model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2f_video.config import TransformerDecoderConfig, VideoMask2FormerConfig
from m2f_video.modeling.build import CROSS_ATTENTIONS, LAYER_ORDERS, POSITIONS
from m2f_video.modeling.cross_attention import (
    CrossAttention,
    FullCrossAttention,
    Level,
    MaskPooling,
    SpatiallyModulatedCrossAttention,
    attention_mask,
)
from m2f_video.modeling.position_encoding import NoPosition, SinePosition2D, SinePosition3D, sine_3d
from m2f_video.modeling.transformer_decoder import MaskedTransformerDecoder, SelfFirstDecoderLayer
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import random_model
from tests.acceleration.conftest import IN_LANES, clip
from tests.modeling.test_transformer_decoder import features, make_level, random_biases
from tests.tolerances import assert_close, relative_error

FIELDS: dict[str, dict[str, Any]] = {
    **{f"cross_attention {value}": {"cross_attention": value} for value in CROSS_ATTENTIONS},
    **{f"layer_order {value}": {"layer_order": value} for value in LAYER_ORDERS},
    **{f"temporal_position {value}": {"temporal_position": value} for value in POSITIONS},
    **{f"query_features {value}": {"query_features": value} for value in ("learnable", "zero")},
    **{f"single {scale}": {"features": "single", "scale": scale} for scale in (8, 16, 32)},
    "concatenated": {"features": "concatenated"},
    "concatenated, smca": {"features": "concatenated", "cross_attention": "smca"},
    "no layers": {"num_layers": 0},
    "dropout": {"dropout": 0.1},
}


def decoder(**changes: Any) -> MaskedTransformerDecoder:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "hidden_dim": 16, "mask_dim": 12, "num_queries": 5, "num_layers": 4}
    built = MaskedTransformerDecoder(**sizes | {"num_heads": 4, "ffn_dim": 20, "num_labels": 3} | changes).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.eval()


def inputs(pixels: int = 4) -> tuple[Tensor, Level, Tensor]:
    torch.manual_seed(1)
    level = make_level(pixels=pixels)
    return torch.randn(2, 5, 12, dtype=torch.float64), level, torch.randn(2, 5, 3 * pixels, dtype=torch.float64)


def attention(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    module = kind(dim=12, num_heads=3).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# --- cross-attention


def test_full_attention_is_masked_attention_without_a_mask() -> None:
    query, level, mask_logits = inputs()
    masked, full = attention(CrossAttention), attention(FullCrossAttention)
    random_biases(masked)
    full.load_state_dict(masked.state_dict())
    assert_close(full(query, level, mask_logits), masked(query, level).detach())
    assert relative_error(masked(query, level, mask_logits), full(query, level, mask_logits)) > 0.01


def test_mask_pooling_is_the_mean_of_what_a_mask_covers() -> None:
    query, level, mask_logits = inputs()
    mask_logits[0, 0] = -1  # covers nothing: all
    module = attention(MaskPooling)
    output = module(query, level, mask_logits)
    values = level.values.flatten(1, 2)
    for clip_index in range(2):
        for q in range(5):
            covered = values[clip_index][attention_mask(mask_logits)[clip_index, q]]
            assert_close(output[clip_index, q], module.out_proj(covered.mean(0)).detach())
    assert_close(module(query, level)[:, 0], module.out_proj(values.mean(1)).detach())


def test_mask_pooling_counts_more_pixels_than_float16_has_numbers() -> None:
    module = attention(MaskPooling).half()
    tokens = torch.full((1, 11, 6480, 12), 1.5, dtype=torch.float16)
    zeros = [torch.zeros(*size, dtype=torch.float16) for size in ((12,), (6480, 12), (11, 12), (1, 2, 11 * 6480))]
    output = module(torch.zeros(1, 2, 12).half(), Level(((60, 108),), tokens, *zeros[:3]), zeros[3])
    expected = module.float().out_proj(torch.full((12,), 1.5))
    assert relative_error(output[0, 0], expected) < 0.01


def test_smca_places_pixels_in_bfloat16_as_in_float32() -> None:
    module = attention(SpatiallyModulatedCrossAttention).bfloat16()
    with torch.no_grad():
        for layer in (module.centre[2], module.offsets, module.widths):
            layer.weight.zero_()
            layer.bias.fill_(-5 if layer is module.widths else 0)
    query = inputs()[0].bfloat16()
    rounded = module.log_prior(query, ((1, 240),)).float().softmax(-1)
    exact = module.float().log_prior(query.float(), ((1, 240),)).softmax(-1)
    assert (rounded - exact).abs().sum(-1).max() / 2 < 0.3  # total variation; 0.5 with pixels in bfloat16


def test_smca_weighs_keys_by_gaussians_around_predicted_places() -> None:
    query, level, _ = inputs(pixels=6)
    level = replace(level, sizes=((2, 3),))
    module = attention(SpatiallyModulatedCrossAttention)
    of_queries, of_keys, of_values = module.projections()
    q = nn.functional.linear(query, *of_queries).unflatten(-1, (3, 4))
    k = nn.functional.linear(level.keys.flatten(1, 2), *of_keys).unflatten(-1, (3, 4))
    v = nn.functional.linear(level.values.flatten(1, 2), *of_values).unflatten(-1, (3, 4))
    centres = module.centre(query).sigmoid()
    offsets, widths = (layer(query).unflatten(-1, (3, 2)) for layer in (module.offsets, module.widths))
    expected = torch.zeros(2, 5, 3, 4, dtype=torch.float64)
    for b in range(2):
        for i in range(5):
            for head in range(3):
                products = []
                for key in range(18):
                    row, column = divmod(key % 6, 3)
                    place = torch.tensor([(column + 0.5) / 3, (row + 0.5) / 2], dtype=torch.float64)
                    away = (place - centres[b, i] - offsets[b, i, head]) / widths[b, i, head].exp()
                    products.append(q[b, i, head] @ k[b, key, head] / 2 - away.square().sum())
                expected[b, i, head] = torch.stack(products).softmax(0) @ v[b, :, head]
    assert_close(module(query, level), module.out_proj(expected.flatten(2)).detach())


@pytest.mark.parametrize("kind", CROSS_ATTENTIONS.values())
@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck(kind: type[nn.Module], masked: bool) -> None:
    query, level, mask_logits = inputs(pixels=2)
    level = replace(level, sizes=((1, 2),))
    module = attention(kind)

    def attend(*tensors: Tensor) -> Tensor:
        keys = Level(level.sizes, *tensors[1:5])
        return module(tensors[0], keys, mask_logits if masked else None)

    tensors = (query, level.tokens, level.embedding, level.pixel_position, level.frame_position)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", CROSS_ATTENTIONS.values())
def test_frames_and_queries_of_other_clips_do_not_matter(kind: type[nn.Module]) -> None:
    query, level, mask_logits = inputs()
    together = attention(kind)(query, level, mask_logits)
    alone = attention(kind)(query[1:], replace(level, tokens=level.tokens[1:]), mask_logits[1:])
    assert_close(together[1:], alone.detach())


# --- the layer, the queries, the levels, the positions


def test_self_attention_first() -> None:
    torch.manual_seed(0)
    layer = SelfFirstDecoderLayer(dim=12, num_heads=3, ffn_dim=6).double()
    x, level, mask_logits = inputs()
    position = torch.randn(5, 12, dtype=torch.float64)
    itself = layer.self_attn_norm(x + layer.self_attn(x, position))
    crossed = layer.cross_attn_norm(itself + layer.cross_attn(itself + position, level, mask_logits))
    expected = layer.ffn_norm(crossed + layer.linear2(layer.linear1(crossed).relu()))
    assert_close(layer(x, position, level, mask_logits), expected.detach())


@pytest.mark.parametrize("query_features", ["learnable", "zero"])
def test_queries_that_are_not_supervised_predict_nothing(query_features: Any) -> None:
    built = decoder(query_features=query_features)
    output = built(*features(), output_auxiliary=True, output_hidden=True)
    assert len(output.auxiliary) == 4  # after each layer
    assert output.attention_masks[0].all()
    assert not output.attention_masks[1].all()
    expected = 0 if query_features == "zero" else built.query_features.weight
    assert torch.equal(output.queries[0], torch.zeros(2, 5, 16) + expected)
    assert ("query_features.weight" in built.state_dict()) == (query_features == "learnable")


def test_concatenated_levels_are_one_sequence_frame_by_frame() -> None:
    built = decoder(features="concatenated")
    seen: list[tuple[Tensor, Level, Tensor]] = []
    built.layers[2].cross_attn.register_forward_pre_hook(lambda _, args: seen.append(args))
    mask_features, levels = features()
    output = built(mask_features, levels, output_auxiliary=True)
    _, level, mask_logits = seen[0]
    assert level.sizes == ((2, 3), (4, 6), (8, 12))
    first = levels[0].flatten(3).transpose(2, 3) + built.level_embed.weight[0]
    assert_close(level.values[:, :, :6], first.detach())
    last = levels[2].flatten(3).transpose(2, 3) + built.level_embed.weight[2] + sine_3d(
        3, 8, 12, 16, dtype=torch.float64
    ).flatten(1, 2)  # fmt: skip
    assert_close(level.keys[:, :, 30:], last.detach())
    assert mask_logits.shape == (2, 5, 3 * 126)
    masks = output.auxiliary[2].masks_queries_logits[:, :, 1].detach()
    small = nn.functional.interpolate(masks, size=(4, 6), mode="bilinear").flatten(2)
    assert_close(mask_logits[:, :, 126 + 6 : 126 + 30], small)


@pytest.mark.parametrize(("scale", "index"), [(32, 0), (16, 1), (8, 2)])
def test_a_single_level(scale: int, index: int) -> None:
    built = decoder(features="single", scale=scale)
    mask_features, levels = features()
    others = tuple(torch.zeros_like(level) if i != index else level for i, level in enumerate(levels))
    output = built(mask_features, levels)
    assert torch.equal(built(mask_features, others).class_queries_logits, output.class_queries_logits)
    assert built.level_embed.weight.shape == (1, 16)
    changed = tuple(2 * level if i == index else level for i, level in enumerate(levels))
    assert relative_error(built(mask_features, changed).class_queries_logits, output.class_queries_logits) > 1e-4


def test_positions() -> None:
    tokens = torch.zeros(1, dtype=torch.float64)
    pixel, frame = SinePosition3D(dim=16)(tokens, 3, 4, 5)
    assert_close(pixel + frame[:, None], sine_3d(3, 4, 5, 16, dtype=torch.float64).flatten(1, 2))
    flat, still = SinePosition2D(dim=16)(tokens, 3, 4, 5)
    assert torch.equal(flat, pixel)
    assert not still.any()
    assert [position.shape for position in NoPosition(dim=16)(tokens, 3, 4, 5)] == [(20, 16), (3, 16)]
    assert not any(position.any() for position in NoPosition(dim=16)(tokens, 3, 4, 5))


def test_without_positions_in_time_frames_can_be_exchanged() -> None:
    mask_features, levels = features(batch=1)
    order = torch.tensor([2, 0, 1])
    exchanged = mask_features[:, order], tuple(level[:, order] for level in levels)
    for position, is_same in ((SinePosition2D, True), (SinePosition3D, False)):
        built = decoder(position_encoding=position)
        logits = built(mask_features, levels).class_queries_logits
        assert (relative_error(built(*exchanged).class_queries_logits, logits) < 1e-9) == is_same


def test_dropout_drops_in_training_alone() -> None:
    built, plain = decoder(dropout=0.5), decoder()
    arguments = features()
    assert torch.equal(built(*arguments).class_queries_logits, plain(*arguments).class_queries_logits)
    torch.manual_seed(0)
    first, second = (built.train()(*arguments).class_queries_logits for _ in range(2))
    assert relative_error(first, second) > 1e-3


# --- in a model


def config(name: str) -> VideoMask2FormerConfig:
    return IN_LANES.replace(transformer_decoder=replace(IN_LANES.transformer_decoder, **FIELDS[name]))


LIKE_OTHERS = (
    *("cross_attention masked", "layer_order cross_first", "temporal_position sine_3d"),  # what all others have
    *("single 16", "single 32", "query_features learnable", "concatenated, smca"),
)
"""Variants that are built of what others have too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in FIELDS]
)
def test_every_variant_runs_prepared_learns_and_is_saved(name: str, tmp_path: Any) -> None:
    model = random_model(config(name), 0)
    assert VideoMask2FormerConfig.from_dict(model.config.to_dict()) == model.config
    with torch.no_grad():
        plain = model(clip(2, 70, 90))
        full = model(clip(2, 70, 90), output_auxiliary=True)
    assert relative_error(full.class_queries_logits, plain.class_queries_logits) < 1e-4
    model.save_pretrained(tmp_path)
    prepared = VideoMask2Former.from_pretrained(tmp_path).prepare_for_inference()
    with torch.no_grad():
        fast = prepared(clip(2, 70, 90))
    assert relative_error(fast.class_queries_logits, plain.class_queries_logits) < 1e-4
    assert relative_error(fast.masks_queries_logits, plain.masks_queries_logits) < 1e-4
    model.train()
    output = model(clip(2, 64, 64), output_auxiliary=True)
    sum(
        (prediction.class_queries_logits.square().mean() + prediction.masks_queries_logits.square().mean())
        for prediction in output.auxiliary
    ).backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    unused = ["query_positions.weight", "level_embed.weight"] if name == "no layers" else []
    assert idle == [f"transformer_decoder.{name}" for name in unused]


def test_the_default_is_the_published_one() -> None:
    assert TransformerDecoderConfig() == TransformerDecoderConfig(
        dropout=0.0, cross_attention="masked", layer_order="cross_first", query_features="learnable_supervised",
        features="round_robin", scale=8, temporal_position="sine_3d",
    )  # fmt: skip

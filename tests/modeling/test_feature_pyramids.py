"""Pixel decoders that the paper compares: each against its formula, and all of them in a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video import VideoMask2Former
from m2f_video.acceleration import report
from m2f_video.config import PixelDecoderConfig, VideoMask2FormerConfig
from m2f_video.modeling.build import PIXEL_DECODERS
from m2f_video.modeling.feature_pyramids import (
    EPSILON,
    BidirectionalLayer,
    DeformableConv,
    FeatureAlignment,
    FeatureSelection,
    WeightedFusion,
)
from m2f_video.modeling.maps import resize
from m2f_video.modeling.pixel_decoder import PixelDecoderOutput
from m2f_video.parity import random_model
from tests.acceleration.conftest import IN_LANES, clip, of_kind
from tests.modeling.test_pixel_decoder import CHANNELS, maps
from tests.tolerances import assert_close, relative_error
from tests.training.test_train_overfit import overfitted_ap

PYRAMIDS = tuple(kind for kind in PIXEL_DECODERS if kind != "ms_deform_attn")
ENCODER = IN_LANES.pixel_decoder
FIELDS: dict[str, PixelDecoderConfig] = {
    **{kind: of_kind(kind) for kind in PYRAMIDS},
    **{f"num_levels {count}": replace(ENCODER, num_levels=count) for count in (1, 2, 4)},
    "no layers": replace(ENCODER, num_layers=0),
    "no layers, 1 level": replace(ENCODER, num_layers=0, num_levels=1),
    "heads and points": replace(ENCODER, num_heads=2, num_points=8),
    "bifpn, no layers": replace(of_kind("bifpn"), num_layers=0),
}


LIKE_OTHERS = ("num_levels 2", "num_levels 4", "no layers, 1 level", "heads and points", "bifpn, no layers")
"""Variants that are built of what others have too."""


def pyramid(kind: str, hidden_dim: int = 32) -> Any:
    torch.manual_seed(0)
    depth = {"num_layers": 1} if kind == "bifpn" else {}
    sizes = {"in_channels": CHANNELS, "hidden_dim": hidden_dim, "mask_dim": 12}
    decoder = PIXEL_DECODERS[kind](**sizes, **depth).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder.eval()


def tensors(output: PixelDecoderOutput) -> tuple[Tensor, ...]:
    return output.mask_features, *output.multi_scale


def laterals(decoder: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [conv(level) for conv, level in zip(decoder.lateral_convs, inputs[::-1], strict=True)]


# --- all of them alike


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (1, 1), (33, 200)])
@pytest.mark.parametrize("kind", PYRAMIDS)
def test_shapes(kind: str, size: tuple[int, int]) -> None:
    inputs = maps(2, *size)
    output = pyramid(kind)(inputs, output_hidden=True)
    assert output.mask_features.shape == (2, 12, *inputs[0].shape[2:])
    assert [level.shape for level in output.multi_scale] == [(2, 32, *level.shape[2:]) for level in inputs[:0:-1]]
    assert output.encoder_layers == ()
    assert pyramid(kind)(inputs).encoder_layers is None


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_maps_need_not_be_halves(kind: str) -> None:
    sizes = ((17, 23), (8, 11), (4, 5), (2, 2))  # of a backbone that leaves out what is over
    inputs = tuple(torch.randn(1, c, *size, dtype=torch.float64) for c, size in zip(CHANNELS, sizes, strict=True))
    output = pyramid(kind)(inputs)
    assert output.mask_features.shape[2:] == sizes[0]
    assert tuple(level.shape[2:] for level in output.multi_scale) == sizes[:0:-1]


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_gradcheck(kind: str) -> None:
    decoder = pyramid(kind)
    inputs = tuple(level.requires_grad_() for level in maps(1, 40, 60))
    weights = tuple(decoder.parameters())

    def decode(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tensors(decoder(leaves[:4]))

    assert torch.autograd.gradcheck(decode, inputs + weights, fast_mode=True)


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_frames_do_not_see_each_other(kind: str) -> None:
    decoder, inputs = pyramid(kind), maps(3)
    with torch.no_grad():
        together = tensors(decoder(inputs))
        for index in range(3):
            alone = tensors(decoder(tuple(level[index : index + 1] for level in inputs)))
            for ours, expected in zip(alone, together, strict=True):
                assert_close(ours, expected[index : index + 1])


def reached(kind: str) -> list[str]:
    """For each level, coarse to fine, and for the mask features: which maps they depend on, by their strides."""
    decoder, inputs = pyramid(kind), maps()
    with torch.no_grad():
        before = decoder(inputs)
        found = ["", "", "", ""]
        for index, stride in enumerate((4, 8, 16, 32)):
            after = decoder(tuple(-m if at == index else m for at, m in enumerate(inputs)))
            pairs = zip(
                (*after.multi_scale, after.mask_features), (*before.multi_scale, before.mask_features), strict=True
            )
            for at, (ours, others) in enumerate(pairs):
                found[at] += "" if torch.equal(ours, others) else f"{stride} "
    return found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", ["32 ", "16 ", "8 ", "4 "]),
        *[(kind, ["32 ", "16 32 ", "8 16 32 ", "4 8 16 32 "]) for kind in ("fpn", "semantic_fpn", "fapn")],
        ("bifpn", ["4 8 16 32 "] * 4),
    ],
)
def test_which_maps_reach_which_level(kind: str, expected: list[str]) -> None:
    assert reached(kind) == expected


# --- each against its formula


def test_none_projects() -> None:
    decoder, inputs = pyramid("none"), maps()
    output = decoder(inputs)
    conv, norm = decoder.lateral_convs[3]
    assert_close(output.mask_features, decoder.mask_projection(norm(F.conv2d(inputs[0], conv.weight))).detach())
    for ours, expected in zip(output.multi_scale, laterals(decoder, inputs)[:3], strict=True):
        assert torch.equal(ours, expected)


def fpn_levels(decoder: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    level, levels = None, []
    for conv, lateral in zip(decoder.output_convs, laterals(decoder, inputs), strict=True):
        if level is not None:
            lateral = lateral + F.interpolate(level, lateral.shape[2:], mode="bilinear", align_corners=False)
        level = conv(lateral)
        levels.append(level)
    return levels


def test_fpn() -> None:
    decoder, inputs = pyramid("fpn"), maps()
    output, levels = decoder(inputs), fpn_levels(decoder, inputs)
    for ours, expected in zip(output.multi_scale, levels[:3], strict=True):
        assert_close(ours, expected.detach())
    assert_close(output.mask_features, decoder.mask_projection(levels[3]).detach())


def test_semantic_fpn_sums_all_levels_for_the_masks() -> None:
    decoder, inputs = pyramid("semantic_fpn"), maps()
    output, levels = decoder(inputs), fpn_levels(decoder, inputs)
    for ours, expected in zip(output.multi_scale, levels[:3], strict=True):
        assert_close(ours, expected.detach())
    assert [len(stages) for stages in decoder.stages] == [3, 2, 1, 1]
    summed = decoder.stages[3][0](levels[3])
    for level, stages in zip(levels[:3], decoder.stages, strict=False):
        for stage in stages:
            level = F.interpolate(stage(level), scale_factor=2, mode="bilinear", align_corners=False)
        summed = summed + level
    assert_close(output.mask_features, decoder.mask_projection(summed).detach())


def test_feature_selection_adds_channels_by_their_mean() -> None:
    torch.manual_seed(0)
    select, x = FeatureSelection(dim=3).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    shares = (x.mean((2, 3)) @ select.importance.weight.flatten(1).T + select.importance.bias).sigmoid()
    assert_close(select(x), (x * (1 + shares[:, :, None, None])).detach())


def test_alignment_is_a_convolution_until_it_learns_offsets() -> None:
    torch.manual_seed(0)
    align = FeatureAlignment(dim=4).double()
    coarse, lateral = torch.randn(2, 2, 4, 6, 7, dtype=torch.float64)
    assert_close(align(coarse, lateral), F.conv2d(coarse, align.align.weight, padding=1).detach())
    with torch.no_grad():  # (y, x) of each of the nine samples
        align.offsets.bias.copy_(torch.tensor([0.0, 1.0]).repeat(9))
    moved = F.pad(coarse, (0, 1))[..., 1:]
    inner = F.conv2d(moved, align.align.weight, padding=1)[..., 1:]  # the border sees what was moved out
    assert_close(align(coarse, lateral)[..., 1:], inner.detach())


def test_offsets_come_of_both_maps() -> None:
    torch.manual_seed(0)
    align = FeatureAlignment(dim=4).double()
    nn.init.normal_(align.offsets.weight)
    coarse, lateral = torch.randn(2, 1, 4, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(align(coarse, -lateral), align(coarse, lateral)) > 0.1


def test_deformable_samples_keep_their_digits_in_bfloat16() -> None:
    torch.manual_seed(0)
    conv = DeformableConv(dim=4).bfloat16()
    x, offsets = torch.randn(1, 4, 3, 300).bfloat16(), torch.randn(1, 18, 3, 300).bfloat16()
    ours = conv(x, offsets).detach()
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours.float(), conv.float()(x.float(), offsets.float()).detach()) < 0.003  # one rounding


def test_fapn_aligns_selected_maps() -> None:
    decoder, inputs = pyramid("fapn"), maps()
    levels: list[Tensor] = []
    for index, lateral in enumerate(laterals(decoder, inputs)):
        if levels:
            lateral = lateral + decoder.alignments[index - 1](resize(levels[-1], lateral), lateral)
        levels.append(decoder.output_convs[index](lateral))
    for ours, expected in zip(tensors(decoder(inputs))[1:], levels[:3], strict=True):
        assert_close(ours, expected.detach())
    assert [type(conv[0]) for conv in decoder.lateral_convs] == [FeatureSelection] * 4


def test_fusion_is_a_weighted_mean_of_what_has_a_positive_weight() -> None:
    torch.manual_seed(0)
    fusion = WeightedFusion(dim=32, num_inputs=3).double()
    levels = torch.randn(3, 1, 32, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        fusion.weights.copy_(torch.tensor([1.0, 3.0, -2.0]))
        mean = (levels[0] + 3 * levels[1]) / (4 + EPSILON)
        assert_close(fusion(*levels), fusion.pointwise(fusion.depthwise(mean)))
        with pytest.raises(ValueError, match="zip"):
            fusion(*levels[:2])


def test_bifpn_goes_down_and_up() -> None:
    torch.manual_seed(0)
    layer = BidirectionalLayer(dim=32).double()
    p32, p16, p8, p4 = (torch.randn(1, 32, s, s, dtype=torch.float64) for s in (2, 4, 8, 16))

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    def down(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    to_16, to_8, to_4 = layer.top_down
    back_8, back_16, back_32 = layer.bottom_up
    middle_16 = to_16(p16, up(p32))
    middle_8 = to_8(p8, up(middle_16))
    out_4 = to_4(p4, up(middle_8))
    out_8 = back_8(p8, middle_8, down(out_4))
    out_16 = back_16(p16, middle_16, down(out_8))
    out_32 = back_32(p32, down(out_16))
    for ours, expected in zip(layer((p32, p16, p8, p4)), (out_32, out_16, out_8, out_4), strict=True):
        assert_close(ours, expected.detach())


# --- in a model


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        *((name, "swin") for name in FIELDS if name not in LIKE_OTHERS),
        *(pytest.param(name, "swin", marks=pytest.mark.slow) for name in LIKE_OTHERS),
        *(pytest.param(name, "timm", marks=pytest.mark.slow) for name in ("fapn", "num_levels 4")),
    ],
)
def test_every_variant_runs_prepared_learns_and_is_saved(name: str, backbone: str, tmp_path: Path) -> None:
    config = IN_LANES.replace(pixel_decoder=FIELDS[name])
    if backbone == "timm":
        config = config.replace(backbone="timm:test_resnet")
    model = random_model(config, 0)
    assert VideoMask2FormerConfig.from_dict(model.config.to_dict()) == model.config
    video = clip(3, 70, 90)
    with torch.no_grad():
        plain = model(video)
        chunked = model(video, frames_per_chunk=2, output_hidden=True)
    assert relative_error(chunked.masks_queries_logits, plain.masks_queries_logits) < 1e-4
    model.save_pretrained(tmp_path)
    again = VideoMask2Former.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(video).masks_queries_logits, plain.masks_queries_logits)
        fast = again.prepare_for_inference()(video)
    assert relative_error(fast.class_queries_logits, plain.class_queries_logits) < 1e-4
    assert relative_error(fast.masks_queries_logits, plain.masks_queries_logits) < 1e-4
    output = model.train()(clip(2, 64, 64), output_auxiliary=True)
    losses = [each.class_queries_logits.square().mean() for each in output.auxiliary]
    torch.stack([*losses, output.masks_queries_logits.square().mean()]).sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert idle == (["pixel_decoder.level_embed"] if name.startswith("no layers") else [])


@pytest.mark.parametrize("name", FIELDS)
def test_frames_are_encoded_one_by_one_and_inner_parts_fused(name: str) -> None:
    model = random_model(IN_LANES.replace(pixel_decoder=FIELDS[name]), 0).prepare_for_inference()
    rows = {row.name: row for row in report(model)}
    assert rows[""].state in ("fused", "oneDNN")
    whole = rows.get("pixel_decoder")
    if FIELDS[name].kind == "ms_deform_attn":
        assert whole is not None
        assert (whole.state == "fused") == (FIELDS[name].num_levels == 3)
        assert all(row.state == "fused" for row in rows.values() if row.type == "DeformableEncoderLayer")
    else:
        norms = [row for row in rows.values() if row.type == "GroupNorm"]
        assert norms
        assert all(row.state == "fused" for row in norms)


@pytest.mark.parametrize("kind", PIXEL_DECODERS)
def test_bfloat16(kind: str) -> None:
    model = random_model(IN_LANES.replace(pixel_decoder=of_kind(kind)), 0).bfloat16()
    frames = clip(1, 64, 64)[0]
    with torch.no_grad():
        expected = model.encode_frames(frames).mask_features
        assert expected.isfinite().all()
        fast = model.prepare_for_inference().encode_frames(frames).mask_features
    assert relative_error(fast.float(), expected.float()) < 0.05


@pytest.mark.parametrize(
    "name",
    [
        "fapn",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("num_levels 2", "semantic_fpn", "bifpn", "num_levels 4", "no layers")
        ),
    ],
)
def test_one_graph(name: str) -> None:
    decoder = random_model(IN_LANES.replace(pixel_decoder=FIELDS[name]), 0).pixel_decoder
    inputs = tuple(torch.randn(1, 32 * 2**i, 32 // 2**i, 24 // 2**i) for i in range(4))
    torch._dynamo.reset()
    with torch.no_grad():
        ours = torch.compile(decoder, fullgraph=True, backend="eager")(inputs)
        assert relative_error(ours.mask_features, decoder(inputs).mask_features) < 1e-6


def test_a_part_of_ones_own_is_called_as_what_it_replaces() -> None:
    class Mine(PIXEL_DECODERS["none"]):
        def __init__(self, **sizes: Any) -> None:
            self.sizes = sizes
            super().__init__(**{name: sizes[name] for name in ("in_channels", "hidden_dim", "mask_dim")})

    def sizes(config: PixelDecoderConfig) -> list[str]:
        return list(
            VideoMask2Former(IN_LANES.replace(pixel_decoder=config), parts={"pixel_decoder": Mine}).pixel_decoder.sizes
        )

    assert sizes(of_kind("fpn")) == ["in_channels", "hidden_dim", "mask_dim"]
    assert sizes(of_kind("bifpn")) == ["in_channels", "hidden_dim", "mask_dim", "num_layers"]
    assert sizes(ENCODER) == [
        "in_channels", "hidden_dim", "mask_dim", "num_layers", "ffn_dim", "num_heads", "num_points", "num_levels",
        "dropout",
    ]  # fmt: skip


# --- fields


OTHERS = {"num_layers": 3, "ffn_dim": 64, "num_heads": 4, "num_points": 2, "num_levels": 2, "dropout": 0.1}


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_another_kind_is_one_field_whatever_the_encoder_was(kind: Any) -> None:
    config = PixelDecoderConfig(**OTHERS)
    used = replace(config, kind=kind).arguments()
    assert used == {
        name: getattr(config, name) for name in ("hidden_dim", "mask_dim", "num_layers")[: 2 + (kind == "bifpn")]
    }


def test_the_default_is_the_published_one() -> None:
    assert PixelDecoderConfig() == PixelDecoderConfig(
        kind="ms_deform_attn", hidden_dim=256, mask_dim=256, num_layers=6, ffn_dim=1024, num_heads=8, num_points=4,
        num_levels=3, dropout=0.0,
    )  # fmt: skip


# --- learning


@pytest.mark.slow  # a minute of training each
@pytest.mark.parametrize("kind", PYRAMIDS)
def test_four_videos_are_learnt(kind: str, tiny_config: VideoMask2FormerConfig, tmp_path: Path) -> None:
    least = 0.7 if kind == "none" else 0.95  # there a pixel's mask feature has seen its surroundings alone
    assert overfitted_ap(tiny_config.replace(pixel_decoder=of_kind(kind)), tmp_path) > least

"""Against the transformers implementation itself, on random weights; see also the golden numbers beside this file."""

import math
import sys
from typing import Any

import pytest
import torch

from m2f_video.acceleration import cpu_kernels
from m2f_video.config import PixelDecoderConfig, SwinConfig, TransformerDecoderConfig, VideoMask2FormerConfig
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import (
    TOLERANCES,
    StageComparison,
    compare,
    compare_with_transformers,
    random_frames,
    random_model,
    transformers_model,
    within_tolerance,
)
from tests import tolerances
from tests.tolerances import differences
from weights_convert import ConversionError

pytest.importorskip("transformers")

SMALL = VideoMask2FormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=3),
    pixel_decoder=PixelDecoderConfig(hidden_dim=64, mask_dim=32, num_layers=2, ffn_dim=48, num_heads=4),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=64, num_queries=7, num_layers=4, num_heads=4, ffn_dim=40),
    labels=("cat", "dog", "owl"),
)
UNEQUAL_WIDTHS = SMALL.replace(
    transformer_decoder=TransformerDecoderConfig(hidden_dim=32, num_queries=7, num_layers=2, num_heads=4, ffn_dim=40)
)
WITHOUT_QKV_BIAS = SMALL.replace(
    backbone=SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=4, qkv_bias=False)
)
IN_LANES = SMALL.replace(  # of a width that the compiled kernels know
    backbone=SwinConfig(embed_dim=32, depths=(2, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=3),
)


def of_stage(comparisons: list[StageComparison]) -> dict[str, StageComparison]:
    return {comparison.stage: comparison for comparison in comparisons}


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (33, 130), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_stage_agrees(size: tuple[int, int], dtype: torch.dtype) -> None:
    ours, theirs = compare_with_transformers(random_model(SMALL, 1), random_frames(2, *size, seed=0), dtype)
    assert within_tolerance(ours, dtype), ours
    assert within_tolerance(theirs, dtype), theirs
    stages = of_stage(ours)
    assert len(stages) == 4 + 2 + 3 + 1 + 2 * 5 + 4 + 2
    assert all(stage.flips == (0, stage.flips[1]) for stage in ours if stage.flips)
    assert all(stage.cosine == pytest.approx(1, abs=1e-9) for stage in ours)
    assert [stage.stage for stage in ours] == [stage.stage for stage in theirs]


@pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs compiled kernels")
@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_every_stage_agrees_by_compiled_kernels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    call = cpu_kernels.call
    monkeypatch.setattr(cpu_kernels, "call", lambda name, *args: (called.add(name), call(name, *args)))
    model, frames = random_model(IN_LANES, 1), random_frames(2, *size, seed=0)
    ours, _ = compare_with_transformers(model, frames, torch.float32, prepare=True)
    assert within_tolerance(ours, torch.float32), ours
    assert all(stage.flips == (0, stage.flips[1]) for stage in ours if stage.flips)
    # window, masked and deformable attention, convolution, both norms, and linear layers where the machine is for them
    assert len(called) == 6 + cpu_kernels.has_fast_products(torch.float32)


@pytest.mark.parametrize("config", [UNEQUAL_WIDTHS, WITHOUT_QKV_BIAS, SMALL.replace(temporal="per_frame")])
def test_every_stage_agrees_for_other_configs(config: VideoMask2FormerConfig) -> None:
    ours, _ = compare_with_transformers(random_model(config, 2), random_frames(1, 70, 90, seed=1), torch.float64)
    assert within_tolerance(ours, torch.float64), ours


@pytest.mark.parametrize(("name", "size"), [("resnet18", (70, 90)), ("resnet50", (64, 96)), ("resnet50", (33, 130))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_stage_agrees_with_a_resnet(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = random_model(SMALL.replace(backbone=f"timm:{name}"), 1)
    ours, theirs = compare_with_transformers(model, random_frames(2, *size, seed=0), dtype)
    assert within_tolerance(ours, dtype), ours
    assert within_tolerance(theirs, dtype), theirs
    assert all(stage.flips == (0, stage.flips[1]) for stage in ours if stage.flips)


@pytest.mark.parametrize(
    ("parameter", "stage"),
    [
        ("backbone.stages.0.blocks.1.attn.relative_position_bias_table", "backbone stride 4"),
        ("backbone.out_norms.3.weight", "backbone stride 32"),
        ("pixel_decoder.level_embed", "pixel decoder layer 0"),
        ("pixel_decoder.layers.1.self_attn.sampling_offsets.bias", "pixel decoder layer 1"),
        ("pixel_decoder.mask_projection.bias", "mask features"),
        ("transformer_decoder.class_head.bias", "decoder 0 class logits"),
        ("transformer_decoder.layers.3.cross_attn.out_proj.bias", "decoder 4 class logits"),
        ("transformer_decoder.level_embed.weight", "decoder 1 class logits"),
    ],
)
def test_one_wrong_parameter_is_found_at_its_stage(parameter: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = random_model(SMALL, 1), random_model(SMALL, 1)
    with torch.no_grad():
        wrong.get_parameter(parameter).mul_(1.01)
    reference = transformers_model(right.double())
    monkeypatch.setattr("m2f_video.parity.transformers_model", lambda _model: reference)
    ours, theirs = compare_with_transformers(wrong, random_frames(1, 64, 96, seed=0), torch.float64)
    assert not within_tolerance(ours, torch.float64)
    assert within_tolerance(theirs, torch.float64)
    first = next(comparison.stage for comparison in ours if comparison.relative > TOLERANCES[torch.float64])
    assert first == stage


def test_the_reference_has_the_same_weights_and_dtype() -> None:
    model = random_model(SMALL, 3).double()
    reference = transformers_model(model)
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.float64}
    assert torch.equal(reference.class_predictor.weight, model.transformer_decoder.class_head.weight)
    assert not reference.training


def test_comparing_leaves_the_model_as_it_is() -> None:
    model = random_model(SMALL, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare_with_transformers(model, random_frames(1, 32, 32, seed=0), torch.float64)
    assert model.dtype == torch.float32
    assert differences(model.state_dict(), before) == {}


def test_a_model_in_training_mode_is_compared_in_evaluation_mode() -> None:
    model = random_model(SMALL, 1).train()  # with stochastic depth
    ours, _ = compare_with_transformers(model, random_frames(1, 64, 64, seed=0), torch.float64)
    assert within_tolerance(ours, torch.float64)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'm2f-video\[parity\]'"):
        compare_with_transformers(random_model(SMALL, 0), random_frames(1, 32, 32, seed=0), torch.float32)


# --- the comparison itself


def test_the_tolerances_are_those_of_the_tests() -> None:
    assert TOLERANCES == tolerances.TOLERANCES


def test_numbers_of_a_comparison() -> None:
    ours = {"a": torch.tensor([[3.0, 4.0]]), "mask": torch.tensor([True, False, True])}
    reference = {"a": torch.tensor([[3.0, 3.0]]), "mask": torch.tensor([True, True, True])}
    a, mask = compare(ours, reference)
    assert (a.stage, a.max_abs, a.flips) == ("a", 1.0, None)
    assert a.relative == pytest.approx(1 / math.sqrt(18))
    assert a.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert (mask.stage, mask.max_abs, mask.relative, mask.flips) == ("mask", 1.0, 0.0, (1, 3))


def test_a_number_that_is_none_is_not_within_tolerance() -> None:
    tensor = torch.ones(3)
    assert within_tolerance(compare({"a": tensor}, {"a": tensor}), torch.float32)
    for bad in (torch.nan, torch.inf):
        assert not within_tolerance(compare({"a": tensor * bad}, {"a": tensor}), torch.float32)


@pytest.mark.parametrize(
    ("ours", "message"),
    [({}, "stages on one side only: .*a"), ({"a": torch.ones(3), "b": torch.ones(3)}, "one side only: .*b"),
     ({"a": torch.ones(4)}, r"stage a is \(4,\), in the reference \(3,\)")],
)  # fmt: skip
def test_stages_that_do_not_correspond_are_named(ours: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(ours, {"a": torch.ones(3)})


def test_a_dtype_without_a_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float64.*float32.*not for torch.float16"):
        compare_with_transformers(random_model(SMALL, 0), random_frames(1, 32, 32, seed=0), torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "timm:test_convnext"}, "backbone.name = 'test_convnext'"),
        ({"pixel_decoder": PixelDecoderConfig(hidden_dim=64, num_heads=4, num_points=2)}, "num_points = 2"),
        ({"pixel_decoder": PixelDecoderConfig(hidden_dim=64, num_heads=8)}, "num_heads = 8 and .*num_heads = 4 differ"),
    ],
)
def test_a_model_that_transformers_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    model = VideoMask2Former(SMALL.replace(**changes)).eval()
    with pytest.raises(ConversionError, match=message):
        compare_with_transformers(model, random_frames(1, 32, 32, seed=0), torch.float32)


@pytest.mark.parametrize("size", [(64, 96), (1, 1), (70, 90)])
def test_random_frames_are_reproducible(size: tuple[int, int]) -> None:
    frames = random_frames(2, *size, seed=5)
    assert frames.shape == (2, 3, *size)
    assert frames.dtype == torch.float64
    assert torch.equal(frames, random_frames(2, *size, seed=5))
    assert not torch.equal(frames, random_frames(2, *size, seed=6))


def test_a_random_model_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    random_model(SMALL, 1)
    assert torch.equal(torch.rand(1), expected)


def test_statistics_of_batch_norms_are_moved() -> None:
    for name, buffer in random_model(SMALL.replace(backbone="timm:resnet18"), 1).named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert buffer.std() > 0, name
            assert name.endswith("mean") or buffer.min() >= 1


def test_every_parameter_of_a_random_model_is_moved() -> None:
    for name, parameter in random_model(SMALL, 1).named_parameters():
        assert parameter.std() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "prepare"), [(torch.float32, False), (torch.float32, True), (torch.float64, False)])
def test_the_published_size_agrees(dtype: torch.dtype, prepare: bool) -> None:
    config = VideoMask2FormerConfig.preset("swin_tiny_youtubevis_2021")
    ours, _ = compare_with_transformers(random_model(config, 0), random_frames(1, 480, 864, seed=0), dtype, prepare)
    assert within_tolerance(ours, dtype), ours

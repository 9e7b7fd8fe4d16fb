"""Against the transformers implementation itself, on random weights; see also the golden numbers beside this file."""

import math
import sys
from typing import Any

import pytest
import torch

from m2f_video.acceleration import cpu_kernels
from m2f_video.config import PixelDecoderConfig, SwinConfig, TransformerDecoderConfig, VideoMask2FormerConfig
from m2f_video.modeling.cross_attention import CrossAttention
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import (
    TOLERANCES,
    Parity,
    compare,
    compare_stage,
    model_stages,
    random_frames,
    random_model,
    transformers_model,
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


def flips(result: Parity) -> list[int]:
    return [stage.flips[0] for stage in result.stages if stage.flips]


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (33, 130), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_stage_agrees(size: tuple[int, int], dtype: torch.dtype) -> None:
    result = compare(random_model(SMALL, 1), random_frames(2, *size, seed=0), dtype=dtype, plain=True)
    assert result.passed, result.stages
    assert all(stage.relative <= TOLERANCES[dtype] for stage in result.own)
    assert len(result.stages) == 4 + 2 + 3 + 1 + 2 * 5 + 4 + 2
    assert flips(result) == [0] * 4
    assert all(stage.cosine == pytest.approx(1, abs=1e-9) for stage in result.stages)
    assert [stage.stage for stage in result.stages] == [stage.stage for stage in result.own]
    assert result.only_model == result.only_reference == []


@pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs compiled kernels")
@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_every_stage_agrees_by_compiled_kernels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    call = cpu_kernels.call
    monkeypatch.setattr(cpu_kernels, "call", lambda name, *args: (called.add(name), call(name, *args)))
    model, frames = random_model(IN_LANES, 1), random_frames(2, *size, seed=0)
    result = compare(model, frames)
    assert result.passed, result.stages
    assert result.only_reference == [f"decoder {index} attention mask" for index in range(4)]  # no twin makes one
    # window, masked and deformable attention, convolution, both norms, and linear layers where the machine is for them
    assert len(called) == 6 + cpu_kernels.has_fast_products(torch.float32)


@pytest.mark.parametrize("config", [UNEQUAL_WIDTHS, WITHOUT_QKV_BIAS, SMALL.replace(temporal="per_frame")])
def test_every_stage_agrees_for_other_configs(config: VideoMask2FormerConfig) -> None:
    result = compare(random_model(config, 2), random_frames(1, 70, 90, seed=1), dtype=torch.float64)
    assert result.passed, result.stages


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        ("resnet18", (70, 90), torch.float64),
        pytest.param("resnet50", (33, 130), torch.float32, marks=pytest.mark.slow),
        pytest.param("resnet18", (70, 90), torch.float32, marks=pytest.mark.slow),
        pytest.param("resnet50", (33, 130), torch.float64, marks=pytest.mark.slow),
        pytest.param("resnet50", (64, 96), torch.float32, marks=pytest.mark.slow),
        pytest.param("resnet50", (64, 96), torch.float64, marks=pytest.mark.slow),
    ],
)
def test_every_stage_agrees_with_a_resnet(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = random_model(SMALL.replace(backbone=f"timm:{name}"), 1)
    result = compare(model, random_frames(2, *size, seed=0), dtype=dtype, plain=True)
    assert result.passed, result.stages
    assert flips(result) == [0] * 4


@pytest.mark.parametrize(
    ("parameter", "stage"),
    [
        ("backbone.stages.0.blocks.1.attn.relative_position_bias_table", "backbone stride 4"),
        pytest.param("backbone.out_norms.3.weight", "backbone stride 32", marks=pytest.mark.slow),
        pytest.param("pixel_decoder.level_embed", "pixel decoder layer 0", marks=pytest.mark.slow),
        ("pixel_decoder.layers.1.self_attn.sampling_offsets.bias", "pixel decoder layer 1"),
        ("pixel_decoder.mask_projection.bias", "mask features"),
        pytest.param("transformer_decoder.class_head.bias", "decoder 0 class logits", marks=pytest.mark.slow),
        ("transformer_decoder.layers.3.cross_attn.out_proj.bias", "decoder 4 class logits"),
        pytest.param("transformer_decoder.level_embed.weight", "decoder 1 class logits", marks=pytest.mark.slow),
    ],
)
def test_one_wrong_parameter_is_found_at_its_stage(parameter: str, stage: str) -> None:
    right, wrong = random_model(SMALL, 1).double(), random_model(SMALL, 1).double()
    with torch.no_grad():
        wrong.get_parameter(parameter).mul_(1.01)
    result = compare(wrong, random_frames(1, 64, 96, seed=0), transformers_model(right), dtype=torch.float64)
    assert not result.passed
    first = next(comparison for comparison in result.stages if comparison.relative > TOLERANCES[torch.float64])
    assert first.stage == stage
    assert result.worst.relative >= first.relative


def test_the_reference_has_the_same_weights_and_dtype() -> None:
    model = random_model(SMALL, 3).double()
    reference = transformers_model(model)
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.float64}
    assert torch.equal(reference.class_predictor.weight, model.transformer_decoder.class_head.weight)
    assert not reference.training


def test_comparing_leaves_the_model_as_it_is() -> None:
    model = random_model(SMALL, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare(model, random_frames(1, 32, 32, seed=0), dtype=torch.float64)
    compare(model, random_frames(1, 32, 32, seed=0), plain=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.dtype == torch.float32
    assert differences(model.state_dict(), before) == {}


def test_a_model_in_training_mode_is_compared_in_evaluation_mode() -> None:
    model = random_model(SMALL, 1).train()  # with stochastic depth
    assert compare(model, random_frames(1, 64, 64, seed=0), dtype=torch.float64).passed
    assert model.training


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'm2f-video\[parity\]'"):
        compare(random_model(SMALL, 0), random_frames(1, 32, 32, seed=0))


# --- what cannot agree with itself


def shift_masks(module: CrossAttention, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    query, level, mask_logits = arguments
    return query, level, mask_logits - 1


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("edit", ["attention_mask", "hook", pytest.param("forward", marks=pytest.mark.slow)])
def test_an_edit_of_what_is_masked_is_found(edit: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(IN_LANES, 1)
    attention = model.transformer_decoder.layers[1].cross_attn
    if edit == "attention_mask":
        monkeypatch.setattr("m2f_video.modeling.cross_attention.attention_mask", lambda logits: logits > -1)
    elif edit == "hook":
        attention.register_forward_pre_hook(shift_masks)
    else:
        forward = attention.forward
        monkeypatch.setattr(attention, "forward", lambda query, level, logits: forward(query, level, logits - 1))
    result = compare(model, random_frames(1, 64, 96, seed=0), plain=plain, stages=("decoder",))
    assert not result.passed
    if plain:
        wrong = [stage.stage for stage in result.stages if stage.flips and stage.flips[0]]
        assert wrong[0] == f"decoder {0 if edit == 'attention_mask' else 1} attention mask"


def test_masks_of_the_reference_are_those_it_uses() -> None:
    model = random_model(SMALL, 1)
    reference = transformers_model(model)
    attention = reference.model.transformer_module.decoder.layers[2].cross_attn

    def allow_all(_module: Any, _inputs: Any, kwargs: dict[str, Any]) -> Any:
        return _inputs, kwargs | {"attn_mask": torch.zeros_like(kwargs["attn_mask"])}

    attention.register_forward_pre_hook(allow_all, with_kwargs=True)
    result = compare(model, random_frames(1, 64, 96, seed=0), reference, plain=True, stages=("decoder",))
    flipped = [stage.stage for stage in result.stages if stage.flips and stage.flips[0]]
    assert flipped[0] == "decoder 2 attention mask"
    assert not result.passed


def test_masks_that_are_added_are_masks() -> None:
    """Whether by minus infinity or by any large number, and where heads differ."""
    model = random_model(SMALL, 1)
    attention = model.transformer_decoder.layers[1].cross_attn
    attend = attention.attend
    attention.attend = lambda q, k, v, mask: attend(q, k, v, -1e4 * (~mask).float())
    result = compare(model, random_frames(1, 64, 96, seed=0), random_model(SMALL, 1), plain=True)
    assert result.passed
    assert flips(result) == [0] * 4


def test_a_prepared_reference_is_run_as_it_is_written() -> None:
    model, reference = random_model(IN_LANES, 1), random_model(IN_LANES, 1).prepare_for_inference()
    result = compare(model, random_frames(1, 64, 96, seed=0), reference, plain=True)
    assert result.passed
    assert flips(result) == [0] * 4
    assert len(result.own) == len(result.stages)


def test_attention_without_a_mask_is_a_stage_of_the_reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SMALL, 1)
    attention = model.transformer_decoder.layers[1].cross_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda query, level, logits: forward(query, level, None))
    result = compare(model, random_frames(1, 64, 96, seed=0), plain=True)
    assert result.only_reference == ["decoder 1 attention mask"]
    assert not result.passed


# --- other references, other stages


def test_the_decoders_of_a_backbone_that_transformers_lacks() -> None:
    model = random_model(SMALL.replace(backbone="timm:test_convnext"), 1)
    for dtype in TOLERANCES:
        result = compare(model, random_frames(2, 64, 96, seed=0), dtype=dtype, plain=True)
        assert result.passed, result.stages
        assert result.only_model == [f"backbone stride {stride}" for stride in (4, 8, 16, 32)]
        assert len(result.stages) == 2 + 3 + 1 + 2 * 5 + 4 + 2
        assert flips(result) == [0] * 4
    with torch.no_grad():
        model.pixel_decoder.mask_projection.bias.add_(1)
    reference = transformers_model(random_model(model.config, 1))
    wrong = [stage.stage for stage in compare(model, random_frames(1, 64, 96, seed=0), reference).stages
             if stage.relative > TOLERANCES[torch.float32]]  # fmt: skip
    assert wrong[0] == "mask features"


def test_a_changed_model_against_the_one_it_was() -> None:
    """Of clips, too, as both are video models."""
    clips = random_frames(6, 64, 96, seed=0).unflatten(0, (2, 3))
    model, original = random_model(SMALL, 1), random_model(SMALL, 1)
    same = compare(model, clips, original, plain=True)
    assert same.passed
    assert flips(same) == [0] * 4
    model.transformer_decoder.layers[2].linear2.register_forward_hook(lambda _module, _inputs, output: 1.1 * output)
    result = compare(model, clips, original)
    wrong = [stage.stage for stage in result.stages if stage.relative > TOLERANCES[torch.float32]]
    assert wrong[0] == "decoder 3 class logits"


def test_a_reference_that_is_a_function() -> None:
    model, frames = random_model(SMALL, 1), random_frames(1, 64, 96, seed=0)
    dtypes = []

    def reference(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        dtypes.append(pixels.dtype)
        stages = model_stages(random_model(SMALL, 1).double(), pixels)
        return {"mask features": stages["mask features"], "mine": pixels}

    result = compare(model, frames, reference, stages=("mask features", "mine"))
    assert dtypes == [torch.float64]
    assert result.passed
    assert (len(result.stages), result.own, result.only_reference) == (1, [], ["mine"])


def test_only_some_stages() -> None:
    model, frames = random_model(SMALL, 1), random_frames(1, 64, 96, seed=0)
    result = compare(model, frames, random_model(SMALL, 1), stages=("decoder 1", "backbone"), plain=True)
    assert [stage.stage for stage in result.stages] == [
        *(f"backbone stride {stride}" for stride in (4, 8, 16, 32)),
        *(f"decoder 1 {what}" for what in ("class logits", "mask logits", "attention mask")),
    ]
    with pytest.raises(ValueError, match=r"there is no stage 'decode'; there are: backbone stride 4, .*default path"):
        compare(model, frames, random_model(SMALL, 1), stages=("decode",))
    with pytest.raises(ValueError, match="no such stage in common"):
        compare(model, frames, lambda _pixels: {"other": torch.ones(1)})


# --- the comparison itself


def test_the_tolerances_are_those_of_the_tests() -> None:
    assert TOLERANCES == tolerances.TOLERANCES


def test_numbers_of_a_comparison() -> None:
    a = compare_stage("a", torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]))
    mask = compare_stage("mask", torch.tensor([True, False, True]), torch.tensor([True, True, True]))
    assert (a.stage, a.max_abs, a.flips) == ("a", 1.0, None)
    assert a.relative == pytest.approx(1 / math.sqrt(18))
    assert a.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert (mask.stage, mask.max_abs, mask.relative, mask.flips) == ("mask", 1.0, 0.0, (1, 3))
    assert compare_stage("zero", torch.zeros(3), torch.zeros(3)).relative == 0


def parity_of(*stages: tuple[str, torch.Tensor], tolerance: float | None = 5e-6) -> Parity:
    ones = torch.ones(3)
    return Parity([compare_stage(name, tensor * ones, ones) for name, tensor in stages], [], [], [], tolerance)


def test_a_number_that_is_none_is_not_within_tolerance() -> None:
    one = torch.tensor(1.0)
    assert parity_of(("a", one)).passed
    for bad in (torch.nan, torch.inf):
        for tolerance in (5e-6, None) if math.isnan(bad) else (5e-6,):
            result = parity_of(("a", 2 * one), ("b", one * bad), ("c", one), tolerance=tolerance)
            assert not result.passed
            assert result.worst.stage == "b"
            assert result.to_dict()["stages"][1]["relative"] is None
    assert parity_of(("a", one), ("b", 2 * one), tolerance=None).worst.stage == "b"


def test_stages_of_two_shapes_are_named_and_no_number() -> None:
    comparison = compare_stage("a", torch.ones(4), torch.ones(3))
    assert comparison.shapes == ((4,), (3,))
    assert math.isnan(comparison.relative)


def test_a_mask_for_each_head_is_compared_in_every_head() -> None:
    reference = torch.tensor([[[True, False]]])
    ours = torch.tensor([[[[True, False]], [[True, True]], [[False, False]]]])
    for pair in ((ours, reference), (reference, ours)):
        assert compare_stage("mask", *pair).flips == (2, 6)


@pytest.mark.parametrize(
    ("frames", "dtype", "message"),
    [
        (torch.ones(1, 3, 32, 32), torch.float16, r"float64.*float32.*not for torch.float16"),
        (torch.ones(3, 32, 32), torch.float32, r"must be \(F, 3, H, W\) or .*got \(3, 32, 32\)"),
        (torch.ones(0, 3, 32, 32), torch.float32, r"not empty, got \(0, 3, 32, 32\)"),
        (torch.full((1, 3, 32, 32), torch.nan), torch.float32, "NaN or infinity"),
        (torch.ones(1, 2, 3, 32, 32), torch.float32, "transformers has no model of clips"),
    ],
)
def test_bad_frames_are_refused(frames: torch.Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(random_model(SMALL, 0), frames, dtype=dtype)


def test_a_reference_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the reference is a Linear; give a VideoMask2Former, transformers'"):
        compare(random_model(SMALL, 0), torch.ones(1, 3, 32, 32), torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_decoder": PixelDecoderConfig(hidden_dim=64, num_heads=4, num_points=2)}, "num_points = 2"),
        ({"pixel_decoder": PixelDecoderConfig(kind="fpn", hidden_dim=64)}, "pixel_decoder.kind = 'fpn'"),
        ({"pixel_decoder": PixelDecoderConfig(hidden_dim=64, num_heads=4, num_levels=2)}, "num_levels = 2"),
        ({"pixel_decoder": PixelDecoderConfig(hidden_dim=64, num_heads=8)}, "num_heads = 8 and .*num_heads = 4 differ"),
    ],
)
def test_a_model_that_transformers_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    model = VideoMask2Former(SMALL.replace(**changes)).eval()
    with pytest.raises(ConversionError, match=message):
        compare(model, random_frames(1, 32, 32, seed=0))


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
@pytest.mark.parametrize(("dtype", "plain"), [(torch.float32, True), (torch.float32, False), (torch.float64, True)])
def test_the_published_size_agrees(dtype: torch.dtype, plain: bool) -> None:
    config = VideoMask2FormerConfig.preset("swin_tiny_youtubevis_2021")
    result = compare(random_model(config, 0), random_frames(1, 480, 864, seed=0), dtype=dtype, plain=plain)
    assert result.passed, result.stages

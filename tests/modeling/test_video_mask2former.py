import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2f_video.config import PixelDecoderConfig, SwinConfig, TransformerDecoderConfig, VideoMask2FormerConfig
from m2f_video.inference.features import FeatureBuffer
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former, VideoMask2FormerOutput
from m2f_video.parity import random_frames, random_model
from tests.tolerances import assert_close, differences, relative_error


def small_config(**changes: Any) -> VideoMask2FormerConfig:
    """As small as it gets, with all widths different."""
    fields: dict[str, Any] = {
        "backbone": SwinConfig(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=3, mlp_ratio=2.0),
        "pixel_decoder": PixelDecoderConfig(
            hidden_dim=64, mask_dim=20, num_layers=2, ffn_dim=24, num_heads=4, num_points=2
        ),
        "transformer_decoder": TransformerDecoderConfig(
            hidden_dim=48, num_queries=7, num_layers=4, num_heads=6, ffn_dim=40
        ),
        "labels": ("cat", "dog", "owl"),
    }
    return VideoMask2FormerConfig(**fields | changes)


def small_model(seed: int = 0, **changes: Any) -> VideoMask2Former:
    return random_model(small_config(**changes), seed).double()


def clips(batch: int, frames: int, height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    return random_frames(batch * frames, height, width, seed).unflatten(0, (batch, frames))


def predictions(output: VideoMask2FormerOutput) -> dict[str, Tensor]:
    return {
        "classes": output.class_queries_logits,
        "masks": output.masks_queries_logits,
        "embeddings": output.mask_embeddings,
    }


@pytest.fixture(scope="module")
def model() -> VideoMask2Former:
    return small_model().requires_grad_(False)


@pytest.fixture(scope="module")
def image_model() -> VideoMask2Former:
    return small_model(temporal="per_frame").requires_grad_(False)


# --- shapes


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (33, 47), (5, 130), (1, 1)])
@pytest.mark.parametrize("batch_and_frames", [(1, 1), (2, 3)])
def test_joint_shapes(model: VideoMask2Former, size: tuple[int, int], batch_and_frames: tuple[int, int]) -> None:
    (batch, frames), (height, width) = batch_and_frames, size
    output = model(clips(batch, frames, *size), output_auxiliary=True, output_hidden=True)
    mask_size = (-(-height // 4), -(-width // 4))
    assert output.class_queries_logits.shape == (batch, 7, 4)
    assert output.masks_queries_logits.shape == (batch, 7, frames, *mask_size)
    assert output.mask_embeddings.shape == (batch, 7, 20)
    assert [tuple(queries.shape) for queries in output.queries] == [(batch, 7, 48)] * 5
    assert len(output.auxiliary) == 5
    assert len(output.attention_masks) == 4
    assert output.features.mask_features.shape == (batch * frames, 20, *mask_size)
    assert [level.shape[:2] for level in output.features.backbone_maps] == [
        (batch * frames, 8 * 2**i) for i in range(4)
    ]
    assert len(output.features.encoder_layers) == 2
    assert all(torch.isfinite(tensor).all() for tensor in predictions(output).values())


def test_per_frame_shapes(image_model: VideoMask2Former) -> None:
    output = image_model(clips(2, 3))
    assert output.class_queries_logits.shape == (6, 7, 4)
    assert output.masks_queries_logits.shape == (6, 7, 1, 16, 24)


def test_nothing_more_is_given_unasked(model: VideoMask2Former) -> None:
    output = model(clips(1, 2))
    assert output.auxiliary is output.features is output.queries is output.attention_masks is None
    features = model.encode_frames(clips(1, 2)[0])
    assert features.backbone_maps is features.encoder_layers is None


# --- equivalences


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 80), st.integers(1, 80), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=15)
def test_default_path_equals_the_plain_one(
    batch: int, frames: int, height: int, width: int, seed: int, joint: bool
) -> None:
    model = small_model(seed, temporal="joint" if joint else "per_frame")
    pixel_values = clips(batch, frames, height, width, seed)
    with torch.no_grad():
        default = model(pixel_values, output_hidden=True)
        plain = model(pixel_values, output_auxiliary=True, output_hidden=True)
    assert differences(predictions(default), predictions(plain)) == {}
    assert all(torch.equal(a, b) for a, b in zip(default.attention_masks, plain.attention_masks, strict=True))


@pytest.mark.parametrize("size", [(64, 96), (45, 70)])
def test_clips_of_a_batch_equal_each_alone(model: VideoMask2Former, size: tuple[int, int]) -> None:
    pixel_values = clips(3, 2, *size)
    batched = predictions(model(pixel_values))
    for index in range(3):
        alone = predictions(model(pixel_values[index : index + 1]))
        assert differences(alone, {name: tensor[index : index + 1] for name, tensor in batched.items()}) == {}


def test_frames_of_a_per_frame_model_equal_each_alone(image_model: VideoMask2Former) -> None:
    pixel_values = clips(2, 3)
    batched = predictions(image_model(pixel_values))
    for index, frame in enumerate(pixel_values.flatten(0, 1)):
        alone = predictions(image_model(frame[None, None]))
        assert differences(alone, {name: tensor[index : index + 1] for name, tensor in batched.items()}) == {}


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 100])
def test_encoding_in_chunks_equals_encoding_at_once(model: VideoMask2Former, chunk: int) -> None:
    pixel_values = clips(2, 3)
    whole = model(pixel_values, output_hidden=True)
    chunked = model(pixel_values, output_hidden=True, frames_per_chunk=chunk)
    assert differences(predictions(chunked), predictions(whole)) == {}
    for name in ("multi_scale", "backbone_maps", "encoder_layers"):
        for ours, expected in zip(getattr(chunked.features, name), getattr(whole.features, name), strict=True):
            assert_close(ours, expected)


def test_the_two_halves_make_the_whole(model: VideoMask2Former) -> None:
    pixel_values = clips(2, 3)
    features = [model.encode_frames(part) for part in pixel_values.flatten(0, 1).split((1, 3, 2))]
    halves = model.decode_clip(FrameFeatures.concatenate(features), num_frames=3)
    assert differences(predictions(halves), predictions(model(pixel_values))) == {}


def test_all_frames_are_one_clip_by_default(model: VideoMask2Former) -> None:
    features = model.encode_frames(clips(1, 4)[0])
    assert differences(predictions(model.decode_clip(features)), predictions(model.decode_clip(features, 4))) == {}


def test_masks_can_be_left_out_and_made_later(model: VideoMask2Former) -> None:
    features = model.encode_frames(clips(1, 2)[0])
    full, bare = model.decode_clip(features), model.decode_clip(features, output_masks=False)
    assert bare.masks_queries_logits is None
    assert torch.equal(bare.class_queries_logits, full.class_queries_logits)
    some = model.mask_product(bare.mask_embeddings[:, [4, 1]], features.mask_features[None])
    assert_close(some, full.masks_queries_logits[:, [4, 1]])


def test_one_frame_is_the_same_to_both_models(model: VideoMask2Former, image_model: VideoMask2Former) -> None:
    image_model = copy.deepcopy(image_model)
    image_model.load_state_dict(model.state_dict())
    for pixel_values in (clips(1, 1), clips(3, 1, 50, 70)):
        assert differences(predictions(image_model(pixel_values)), predictions(model(pixel_values))) == {}
    longer = clips(1, 2)
    joint, per_frame = model(longer).class_queries_logits, image_model(longer).class_queries_logits
    assert relative_error(per_frame[:1], joint) > 1e-3


def test_permuting_frames_permutes_per_frame_predictions_only(
    model: VideoMask2Former, image_model: VideoMask2Former
) -> None:
    pixel_values, order = clips(1, 4), torch.tensor([2, 0, 3, 1])
    before, after = predictions(image_model(pixel_values)), predictions(image_model(pixel_values[:, order]))
    assert differences(after, {name: tensor[order] for name, tensor in before.items()}) == {}
    joint = model(pixel_values).class_queries_logits
    assert relative_error(model(pixel_values[:, order]).class_queries_logits, joint) > 1e-4


def test_every_frame_reaches_every_frames_masks(model: VideoMask2Former) -> None:
    pixel_values = clips(1, 3)
    changed = pixel_values.clone()
    changed[0, 1] = clips(1, 1, seed=9)[0]
    before, after = model(pixel_values).masks_queries_logits, model(changed).masks_queries_logits
    assert all(relative_error(after[:, :, frame], before[:, :, frame]) > 1e-4 for frame in range(3))


def test_input_is_cast_to_the_dtype_of_the_model() -> None:
    model, pixel_values = small_model().float(), clips(1, 2)
    assert model.dtype == torch.float32
    assert differences(predictions(model(pixel_values)), predictions(model(pixel_values.float()))) == {}


def test_float32_is_close_to_float64(model: VideoMask2Former) -> None:
    exact = model(clips(1, 2), output_hidden=True)
    rough = copy.deepcopy(model).float()(clips(1, 2), output_hidden=True)
    assert all(torch.equal(a, b) for a, b in zip(rough.attention_masks, exact.attention_masks, strict=True))
    expected = {name: tensor.float() for name, tensor in predictions(exact).items()}
    assert differences(predictions(rough), expected) == {}


def test_bfloat16_is_roughly_right(tiny_model: VideoMask2Former) -> None:
    """Judged before the first masked attention: a flipped bit shows a query other pixels, and all after it differs."""
    pixel_values = clips(1, 2).float()
    exact = tiny_model(pixel_values, output_auxiliary=True, output_hidden=True)
    rough = copy.deepcopy(tiny_model).bfloat16()(pixel_values, output_auxiliary=True, output_hidden=True)
    assert {tensor.dtype for tensor in predictions(rough).values()} == {torch.bfloat16}
    assert relative_error(rough.features.mask_features, exact.features.mask_features) < 0.03
    for ours, expected in zip(rough.features.multi_scale, exact.features.multi_scale, strict=True):
        assert relative_error(ours, expected) < 0.03
    ours, expected = rough.auxiliary[0], exact.auxiliary[0]
    assert relative_error(ours.class_queries_logits, expected.class_queries_logits) < 0.03
    assert relative_error(ours.masks_queries_logits, expected.masks_queries_logits) < 0.03
    assert (rough.attention_masks[0] == exact.attention_masks[0]).double().mean() > 0.95


# --- masked attention


def test_a_query_without_any_key_attends_everywhere(model: VideoMask2Former) -> None:
    model = copy.deepcopy(model)
    *_, last = model.transformer_decoder.mask_head
    last.weight.zero_()
    last.bias.zero_()
    features = model.encode_frames(clips(1, 2)[0])
    features.mask_features.copy_(features.mask_features.abs())

    def attended(bias: float) -> tuple[Tensor, Tensor]:
        last.bias.fill_(bias)
        output = model.decode_clip(features, output_hidden=True)
        return output.class_queries_logits, output.attention_masks[0]

    everywhere, mask = attended(1.0)
    assert mask.all()
    nowhere, mask = attended(-1.0)  # every mask logit is negative
    assert mask.all()
    assert torch.equal(everywhere, nowhere)


def test_a_query_blocked_in_one_frame_stays_blocked_there(model: VideoMask2Former) -> None:
    model = copy.deepcopy(model)
    *_, last = model.transformer_decoder.mask_head
    last.weight.zero_()
    last.bias.fill_(1.0)
    features = model.encode_frames(clips(1, 2)[0])
    features.mask_features.copy_(features.mask_features.abs())
    features.mask_features[1] *= -1
    output = model.decode_clip(features, output_hidden=True)
    for mask in output.attention_masks:
        first, second = mask.unflatten(2, (2, -1)).unbind(2)
        assert first.all()
        assert not second.any()


# --- training


def loss_of(output: VideoMask2FormerOutput, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (tensor * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)).sum()
        for prediction in output.auxiliary
        for tensor in (prediction.class_queries_logits, prediction.masks_queries_logits)
    ]
    return torch.stack(parts).sum()


def is_key_bias(name: str) -> bool:
    return name.endswith(("attn.qkv.bias", "attn.in_proj_bias"))


@pytest.mark.parametrize("hidden_dim", [64, 48])
def test_backward_reaches_every_parameter(hidden_dim: int) -> None:
    decoder = TransformerDecoderConfig(hidden_dim=hidden_dim, num_queries=7, num_layers=4, ffn_dim=40)
    model = small_model(transformer_decoder=decoder).train()
    torch.manual_seed(0)  # that no path is dropped for both clips
    loss_of(model(clips(2, 2), output_auxiliary=True)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-9] == []
    for name in filter(is_key_bias, gradients):  # softmax does not see what all keys have in common
        query, key, value = gradients[name].chunk(3)
        assert key.abs().max() < 1e-9 * max(query.abs().max(), value.abs().max())


def test_backward_is_the_derivative() -> None:
    model = small_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = ("pixel_decoder.level_embed", "transformer_decoder.query_features.weight", "backbone.patch_embed.proj.bias")
    for name in names:
        parameter, pixel_values = model.get_parameter(name), clips(1, 2, 40, 48)
        parameter.requires_grad_()
        gradient = torch.autograd.grad(loss_of(model(pixel_values, output_auxiliary=True)), parameter)[0]
        parameter.requires_grad_(False)
        direction = torch.randn_like(parameter)
        slopes = []
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * 1e-6)
            slopes.append(loss_of(model(pixel_values, output_auxiliary=True)))
            parameter.sub_(direction, alpha=sign * 1e-6)
        slope = (slopes[0] - slopes[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def test_training_mode_is_random_only_through_stochastic_depth_and_dropout(model: VideoMask2Former) -> None:
    steady = small_model(backbone=SwinConfig(**{**vars(small_config().backbone), "drop_path_rate": 0.0}))
    evaluated = predictions(steady(clips(1, 2)))
    assert differences(predictions(steady.train()(clips(1, 2))), evaluated) == {}
    training = copy.deepcopy(model).train()
    torch.manual_seed(0)
    assert not torch.equal(training(clips(1, 2)).class_queries_logits, model(clips(1, 2)).class_queries_logits)


# --- weights


def test_a_state_dict_must_fit_exactly(model: VideoMask2Former) -> None:
    state = model.state_dict()
    fresh = VideoMask2Former(model.config).double()
    fresh.load_state_dict(state)
    assert differences(fresh.state_dict(), state) == {}
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="extra"):
        fresh.load_state_dict(state)


def test_two_models_of_one_seed_are_the_same() -> None:
    assert differences(small_model(3).state_dict(), small_model(3).state_dict()) == {}
    assert differences(small_model(3).state_dict(), small_model(4).state_dict()) != {}


def test_device_and_dtype_are_those_of_the_weights() -> None:
    model = VideoMask2Former(small_config())
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.to("meta").device.type == "meta"
    assert model.bfloat16().dtype == torch.bfloat16


def test_a_model_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = VideoMask2Former(small_config())
    assert all(parameter.is_meta for parameter in model.parameters())


# --- bad input


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(2, 3, 64, 96), r"\(B, T, 3, H, W\) and not empty, got \(2, 3, 64, 96\)"),
        (torch.zeros(1, 2, 4, 64, 96), r"got \(1, 2, 4, 64, 96\)"),
        (torch.zeros(1, 2, 64, 96, 3), r"got \(1, 2, 64, 96, 3\)"),
        (torch.zeros(1, 0, 3, 64, 96), "not empty"),
        (torch.zeros(0, 2, 3, 64, 96), "not empty"),
        (torch.zeros(1, 2, 3, 0, 96), "not empty"),
        (torch.zeros(1, 2, 3, 64, 96, dtype=torch.uint8), "floating point, got torch.uint8; VideoProcessor"),
    ],
)
def test_pixel_values_that_are_none_are_refused(model: VideoMask2Former, pixel_values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(pixel_values)


@pytest.mark.parametrize("frames", [torch.zeros(1, 2, 3, 64, 96), torch.zeros(3, 64, 96), torch.zeros(0, 3, 64, 96)])
def test_frames_that_are_none_are_refused(model: VideoMask2Former, frames: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(F, 3, H, W\)"):
        model.encode_frames(frames)


@pytest.mark.parametrize("num_frames", [2, 4])
@pytest.mark.parametrize("temporal", ["joint", "per_frame"])
def test_frames_that_make_no_whole_clips_are_refused(temporal: str, num_frames: int) -> None:
    model = small_model(temporal=temporal)
    features = model.encode_frames(clips(1, 3, 32, 32)[0])
    with pytest.raises(ValueError, match=f"3 frames do not make clips of {num_frames} frames"):
        model.decode_clip(features, num_frames)


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_of_frames_must_be_positive(model: VideoMask2Former, count: int) -> None:
    with pytest.raises(ValueError, match="frames_per_chunk"):
        model(clips(1, 2, 32, 32), frames_per_chunk=count)
    with pytest.raises(ValueError, match=r"num_frames|clips of"):
        model.decode_clip(model.encode_frames(clips(1, 2, 32, 32)[0]), num_frames=count)


def test_no_features_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="no frame features"):
        FrameFeatures.concatenate([])


@pytest.mark.parametrize("capacity", [1, 2, 5, 6, 20])
def test_a_buffer_joins_features_whatever_its_room(model: VideoMask2Former, capacity: int) -> None:
    frames = clips(1, 6)[0]
    whole, buffer = model.encode_frames(frames), FeatureBuffer(capacity)
    for part in frames.split((1, 3, 2)):
        buffer.append(model.encode_frames(part))
    joined = buffer.features()
    assert_close(joined.mask_features, whole.mask_features)
    for ours, expected in zip(joined.multi_scale, whole.multi_scale, strict=True):
        assert_close(ours, expected)
        assert ours.flatten(2).transpose(1, 2).is_contiguous()  # tokens, as the decoder reads them


def test_a_buffer_without_features_or_with_two_sizes(model: VideoMask2Former) -> None:
    with pytest.raises(ValueError, match="capacity"):
        FeatureBuffer(0)
    buffer = FeatureBuffer(2)
    with pytest.raises(ValueError, match="no frame features"):
        buffer.features()
    buffer.append(model.encode_frames(clips(1, 1, 32, 32)[0]))
    with pytest.raises(ValueError, match="one size"):
        buffer.append(model.encode_frames(clips(1, 1, 32, 64)[0]))


def test_features_with_and_without_hidden_states_cannot_be_joined(model: VideoMask2Former) -> None:
    frames = clips(1, 2, 32, 32)[0]
    with pytest.raises(ValueError, match="hidden"):
        FrameFeatures.concatenate([model.encode_frames(frames, output_hidden=True), model.encode_frames(frames)])


def test_features_of_two_sizes_cannot_be_joined(model: VideoMask2Former) -> None:
    parts = [model.encode_frames(clips(1, 1, 32, width)[0]) for width in (32, 64)]
    with pytest.raises(ValueError, match="size"):
        FrameFeatures.concatenate(parts)


@pytest.mark.parametrize("config", [None, {}, "swin_tiny_youtubevis_2019", SwinConfig()])
def test_a_config_of_another_type_is_refused(config: object) -> None:
    with pytest.raises(TypeError, match=f"VideoMask2FormerConfig, got {type(config).__name__}"):
        VideoMask2Former(config)

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2f_video.modeling.cross_attention import Attention, CrossAttention, Level, SelfAttention, attention_mask
from m2f_video.modeling.position_encoding import sine_3d
from m2f_video.modeling.transformer_decoder import DecoderLayer, MaskedTransformerDecoder, MaskProduct, resize_frames
from tests.tolerances import assert_close, differences

SIZES = ((2, 3), (4, 6), (8, 12))


def transformer_decoder(*, num_layers: int = 4, in_channels: int = 16, queries: int = 5) -> MaskedTransformerDecoder:
    torch.manual_seed(0)
    decoder = MaskedTransformerDecoder(
        in_channels=in_channels,
        hidden_dim=16,
        mask_dim=12,
        num_queries=queries,
        num_layers=num_layers,
        num_heads=4,
        ffn_dim=20,
        num_labels=3,
    ).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder.eval()


def features(batch: int = 2, frames: int = 3, channels: int = 16, seed: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mask features and multi-scale features."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, frames, *size, generator=generator, dtype=torch.float64)

    return normal(12, 16, 24), tuple(normal(channels, *size) for size in SIZES)


# --- masked attention


def test_a_key_is_blocked_where_the_logit_is_negative() -> None:
    logits = torch.tensor([[[-1.0, 0.0, 1.0, -0.0, -1e-30, float("nan"), float("inf"), -float("inf")]]])
    assert attention_mask(logits).tolist() == [[[False, True, True, True, False, True, True, False]]]


def test_a_query_with_all_keys_blocked_sees_all() -> None:
    logits = torch.tensor([[[-1.0, -2.0, -3.0], [-1.0, 2.0, -3.0]], [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]])
    expected = [[[True] * 3, [False, True, False]], [[True] * 3, [True] * 3]]
    assert attention_mask(logits).tolist() == expected


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9999))
@settings(deadline=None)
def test_every_query_sees_something(batch: int, queries: int, keys: int, seed: int) -> None:
    logits = torch.randn(batch, queries, keys, generator=torch.Generator().manual_seed(seed)) - 1
    seen = attention_mask(logits)
    assert seen.any(-1).all()
    assert seen[logits >= 0].all()
    partly = (logits >= 0).any(-1)
    assert not seen[partly][logits[partly] < 0].any()


def make_level(batch: int = 2, frames: int = 3, pixels: int = 4, dim: int = 12) -> Level:
    shapes = ((batch, frames, pixels, dim), (dim,), (pixels, dim), (frames, dim))
    return Level(((1, pixels),), *(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def keys_and_values(level: Level) -> tuple[Tensor, Tensor]:
    """As the paper has them: frames outermost, positions in the keys alone."""
    value = level.tokens + level.embedding
    key = value + level.pixel_position + level.frame_position[:, None]
    return key.flatten(1, 2), value.flatten(1, 2)


def random_biases(attention: Attention) -> None:
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)


def torch_attention(attention: Attention) -> nn.MultiheadAttention:
    reference = nn.MultiheadAttention(attention.out_proj.in_features, attention.num_heads, batch_first=True).double()
    reference.load_state_dict(attention.state_dict())
    return reference


def test_cross_attention_equals_torch_multi_head_attention() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(dim=12, num_heads=3).double()
    random_biases(ours)
    reference = torch_attention(ours)
    query, level = torch.randn(2, 5, 12, dtype=torch.float64), make_level()
    key, value = keys_and_values(level)
    mask_logits = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_close(ours(query, level), reference(query, key, value)[0].detach())
    blocked = ~attention_mask(mask_logits).repeat_interleave(3, 0)
    assert_close(ours(query, level, mask_logits), reference(query, key, value, attn_mask=blocked)[0].detach())


def test_self_attention_equals_torch_multi_head_attention() -> None:
    torch.manual_seed(0)
    ours = SelfAttention(dim=12, num_heads=3).double()
    random_biases(ours)
    x, position = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    assert_close(ours(x, position), torch_attention(ours)(x + position, x + position, x)[0].detach())


def test_a_layer_is_cross_then_self_attention_then_ffn_all_post_norm() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(dim=8, num_heads=2, ffn_dim=6).double()
    x, level = torch.randn(2, 5, 8, dtype=torch.float64), make_level(dim=8)
    position, mask_logits = torch.randn(5, 8, dtype=torch.float64), torch.randn(2, 5, 12)
    crossed = layer.cross_attn_norm(x + layer.cross_attn(x + position, level, mask_logits))
    itself = layer.self_attn_norm(crossed + layer.self_attn(crossed, position))
    expected = layer.ffn_norm(itself + layer.linear2(layer.linear1(itself).relu()))
    assert_close(layer(x, position, level, mask_logits), expected.detach())


def test_gradcheck_of_a_layer() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(dim=4, num_heads=2, ffn_dim=6).double()
    level = make_level(1, 2, 3, 4)
    inputs = [torch.randn(*size, dtype=torch.float64) for size in ((1, 3, 4), (3, 4))]
    inputs += [level.tokens, level.embedding, level.pixel_position, level.frame_position]
    for tensor in inputs:
        tensor.requires_grad_()
    logits = torch.randn(1, 3, 6)
    assert torch.autograd.gradcheck(
        lambda x, p, *parts: layer(x, p, Level(((1, 3),), *parts), logits), inputs, fast_mode=True
    )


# --- masks


def test_mask_logits_are_dot_products() -> None:
    embeddings, pixels = torch.randn(2, 5, 12, dtype=torch.float64), features()[0]
    assert_close(MaskProduct()(embeddings, pixels), torch.einsum("bqc,btchw->bqthw", embeddings, pixels))


@pytest.mark.parametrize("size", [(8, 12), (3, 5), (16, 24), (20, 40)])
def test_resizing_is_bilinear_per_frame_without_antialiasing(size: tuple[int, int]) -> None:
    frames = torch.randn(2, 3, 4, 16, 24, dtype=torch.float64)
    resized = resize_frames(frames, size)
    assert resized.shape == (2, 3, 4, *size)
    one = nn.functional.interpolate(frames[1:, 2, 3:], size, mode="bilinear", align_corners=False, antialias=False)
    assert_close(resized[1:, 2, 3:], one)


def test_resized_products_are_products_with_resized_features() -> None:
    embeddings, pixels = torch.randn(2, 5, 12, dtype=torch.float64), features()[0]
    for size in SIZES:
        resized_features = MaskProduct()(embeddings, resize_frames(pixels, size))
        assert_close(resized_features, resize_frames(MaskProduct()(embeddings, pixels), size))


# --- the decoder


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7])
def test_a_prediction_before_and_after_every_layer(num_layers: int) -> None:
    output = transformer_decoder(num_layers=num_layers)(*features(), output_auxiliary=True, output_hidden=True)
    assert len(output.auxiliary) == len(output.queries) == num_layers + 1
    assert len(output.attention_masks) == num_layers
    for prediction in output.auxiliary:
        assert prediction.class_queries_logits.shape == (2, 5, 4)
        assert prediction.masks_queries_logits.shape == (2, 5, 3, 16, 24)
    assert torch.equal(output.class_queries_logits, output.auxiliary[-1].class_queries_logits)
    assert_close(
        MaskProduct()(output.mask_embeddings, features()[0]), output.auxiliary[-1].masks_queries_logits.detach()
    )


def test_layers_take_the_levels_in_turn_coarse_to_fine() -> None:
    output = transformer_decoder(num_layers=7)(*features(), output_hidden=True)
    keys = [3 * height * width for height, width in SIZES]
    assert [mask.shape for mask in output.attention_masks] == [(2, 5, keys[layer % 3]) for layer in range(7)]


def test_default_path_equals_the_plain_one() -> None:
    decoder = transformer_decoder(num_layers=7)
    with torch.no_grad():
        default = decoder(*features(), output_hidden=True)
        plain = decoder(*features(), output_auxiliary=True, output_hidden=True)
    assert default.auxiliary is None
    stages = [
        {"classes": output.class_queries_logits, "embeddings": output.mask_embeddings}
        | {f"queries {index}": queries for index, queries in enumerate(output.queries)}
        | {f"mask {index}": mask for index, mask in enumerate(output.attention_masks)}
        for output in (default, plain)
    ]
    assert differences(*stages) == {}


def test_nothing_hidden_is_given_unasked() -> None:
    output = transformer_decoder()(*features())
    assert output.auxiliary is output.queries is output.attention_masks is None


def test_the_first_prediction_does_not_depend_on_the_input() -> None:
    first = transformer_decoder()(*features(seed=0), output_auxiliary=True).auxiliary[0]
    other = transformer_decoder()(*features(seed=1), output_auxiliary=True).auxiliary[0]
    assert torch.equal(first.class_queries_logits, other.class_queries_logits)
    assert torch.equal(first.class_queries_logits[0], first.class_queries_logits[1])
    assert not torch.equal(first.masks_queries_logits, other.masks_queries_logits)


def test_layers_read_tokens_and_positions_of_their_level() -> None:
    decoder, (pixels, multi_scale) = transformer_decoder(num_layers=3), features()
    calls: list[tuple[Any, ...]] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _module, arguments: calls.append(arguments))
    decoder(pixels, multi_scale)
    for index, (_, _, level, _) in enumerate(calls):
        tokens = multi_scale[index].permute(0, 1, 3, 4, 2).flatten(1, 3)  # frames outermost, then rows, then columns
        key, value = keys_and_values(level)
        assert_close(value, (tokens + decoder.level_embed.weight[index]).detach())
        position = sine_3d(3, *SIZES[index], 16, dtype=torch.float64).flatten(0, 2)
        assert_close(key - value, position.expand(2, -1, -1))


def test_batched_equals_single() -> None:
    decoder, (pixels, multi_scale) = transformer_decoder(), features(batch=3)
    with torch.no_grad():
        batched = decoder(pixels, multi_scale)
        for index in range(3):
            single = decoder(pixels[index : index + 1], tuple(level[index : index + 1] for level in multi_scale))
            assert_close(single.class_queries_logits, batched.class_queries_logits[index : index + 1])
            assert_close(single.mask_embeddings, batched.mask_embeddings[index : index + 1])


def test_permuting_the_queries_permutes_the_predictions() -> None:
    decoder, inputs = transformer_decoder(), features()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        before = decoder(*inputs)
        for embedding in (decoder.query_features, decoder.query_positions):
            embedding.weight.copy_(embedding.weight[order])
        after = decoder(*inputs)
    assert_close(after.class_queries_logits, before.class_queries_logits[:, order])
    assert_close(after.mask_embeddings, before.mask_embeddings[:, order])


def test_the_order_of_frames_matters() -> None:
    decoder, (pixels, multi_scale) = transformer_decoder(), features()
    with torch.no_grad():
        before = decoder(pixels, multi_scale).class_queries_logits
        after = decoder(pixels.flip(1), tuple(level.flip(1) for level in multi_scale)).class_queries_logits
    assert (before - after).abs().max() > 1e-4


def test_attention_masks_carry_no_gradient() -> None:
    decoder, (pixels, multi_scale) = transformer_decoder(num_layers=1), features()
    for output_auxiliary in (False, True):
        pixels = pixels.detach().requires_grad_()
        output = decoder(pixels, multi_scale, output_auxiliary=output_auxiliary)
        assert torch.autograd.grad(output.class_queries_logits.sum(), pixels, allow_unused=True) == (None,)


@pytest.mark.parametrize("in_channels", [16, 10])
def test_levels_of_another_width_are_projected(in_channels: int) -> None:
    decoder = transformer_decoder(in_channels=in_channels)
    assert len(decoder.input_projections) == (0 if in_channels == 16 else 3)
    output = decoder(*features(channels=in_channels), output_auxiliary=True)
    assert output.class_queries_logits.shape == (2, 5, 4)
    loss = sum(p.class_queries_logits.square().sum() + p.masks_queries_logits.sum() for p in output.auxiliary)
    loss.backward()
    assert all(parameter.grad.ne(0).any() for parameter in decoder.parameters())

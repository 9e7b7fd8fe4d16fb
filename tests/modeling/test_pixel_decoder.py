import pytest
import torch
from torch import Tensor, nn

from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer, MSDeformAttnPixelDecoder
from m2f_video.modeling.position_encoding import pixel_centres, sine_2d
from tests.tolerances import assert_close

CHANNELS = (4, 6, 8, 10)


def pixel_decoder(*, num_layers: int = 2, num_levels: int = 3, dropout: float = 0.0) -> MSDeformAttnPixelDecoder:
    torch.manual_seed(0)
    decoder = MSDeformAttnPixelDecoder(
        in_channels=CHANNELS,
        hidden_dim=64,
        mask_dim=12,
        num_layers=num_layers,
        ffn_dim=16,
        num_heads=4,
        num_points=2,
        num_levels=num_levels,
        dropout=dropout,
    ).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder.eval()


def maps(batch: int = 2, height: int = 64, width: int = 96, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, c, -(-height // s), -(-width // s), generator=generator, dtype=torch.float64)
        for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    )


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(64, 96), (70, 90), (1, 1), (33, 200)])
def test_shapes(size: tuple[int, int], num_levels: int) -> None:
    inputs = maps(2, *size)
    output = pixel_decoder(num_levels=num_levels)(inputs, output_hidden=True)
    assert output.mask_features.shape == (2, 12, *inputs[0].shape[2:])
    assert [level.shape for level in output.multi_scale] == [(2, 64, *level.shape[2:]) for level in inputs[:0:-1]]
    tokens = sum(level[0, 0].numel() for level in inputs[-num_levels:])
    assert [layer.shape for layer in output.encoder_layers] == [(2, tokens, 64)] * 2


def test_multi_scale_is_the_last_encoder_layer_coarse_to_fine() -> None:
    output = pixel_decoder()(maps(), output_hidden=True)
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in output.multi_scale], dim=1)
    assert torch.equal(tokens, output.encoder_layers[-1])


def test_encoder_layers_are_kept_only_when_asked_for() -> None:
    assert pixel_decoder()(maps()).encoder_layers is None


def test_batched_equals_single() -> None:
    decoder, inputs = pixel_decoder(), maps(3)
    with torch.no_grad():
        batched = decoder(inputs)
        for index in range(3):
            single = decoder(tuple(level[index : index + 1] for level in inputs))
            assert_close(single.mask_features, batched.mask_features[index : index + 1])
            for ours, expected in zip(single.multi_scale, batched.multi_scale, strict=True):
                assert_close(ours, expected[index : index + 1])


def test_memory_layout_of_the_maps_does_not_matter() -> None:
    decoder, inputs = pixel_decoder(), maps()
    with torch.no_grad():
        expected = decoder(inputs).mask_features
        ours = decoder(tuple(level.contiguous(memory_format=torch.channels_last) for level in inputs)).mask_features
    assert_close(ours, expected)


def test_the_stride_4_map_reaches_the_mask_features_only() -> None:
    decoder, inputs = pixel_decoder(), maps()
    with torch.no_grad():
        before, after = decoder(inputs), decoder((inputs[0] * -1, *inputs[1:]))
    assert not torch.allclose(before.mask_features, after.mask_features)
    for ours, expected in zip(after.multi_scale, before.multi_scale, strict=True):
        assert torch.equal(ours, expected)


def test_every_level_reaches_every_level() -> None:
    decoder, inputs = pixel_decoder(), maps()
    with torch.no_grad():
        before = decoder(inputs).multi_scale
        for changed in (1, 2, 3):
            after = decoder(tuple(-m if index == changed else m for index, m in enumerate(inputs))).multi_scale
            assert not any(torch.allclose(ours, expected) for ours, expected in zip(after, before, strict=True))


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
def test_which_maps_reach_which_level(num_levels: int) -> None:
    decoder, inputs = pixel_decoder(num_levels=num_levels), maps()
    with torch.no_grad():
        before = decoder(inputs)
        for at, stride in enumerate((4, 8, 16, 32)):
            after = decoder(tuple(-m if index == at else m for index, m in enumerate(inputs)))
            pairs = zip(
                (*after.multi_scale, after.mask_features), (*before.multi_scale, before.mask_features), strict=True
            )
            reached = {of for (ours, others), of in zip(pairs, (32, 16, 8, 4), strict=True) if (ours != others).any()}
            encoded = {32, 16, 8, 4} if stride in (32, 16, 8, 4)[:num_levels] else set()
            assert reached == encoded | {of for of in (32, 16, 8, 4) if of <= stride}


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_levels_that_the_encoder_does_not_see_come_by_steps_of_a_pyramid(num_levels: int) -> None:
    decoder, inputs = pixel_decoder(num_levels=num_levels), maps()
    output = decoder(inputs, output_hidden=True)
    tokens = sum(level[0, 0].numel() for level in inputs[-num_levels:])
    assert output.encoder_layers is not None
    assert output.encoder_layers[-1].shape[1] == tokens
    levels = list(output.multi_scale[:num_levels])
    for name, fine in zip(("_16", "_8", "")[num_levels - 1 :], inputs[: 4 - num_levels][::-1], strict=True):
        coarse = nn.functional.interpolate(levels[-1], fine.shape[2:], mode="bilinear", align_corners=False)
        lateral = decoder.get_submodule(f"lateral_conv{name}")(fine)
        levels.append(decoder.get_submodule(f"output_conv{name}")(lateral + coarse))
    for ours, expected in zip(output.multi_scale, levels[:3], strict=True):
        assert_close(ours, expected.detach())
    assert_close(output.mask_features, decoder.mask_projection(levels[3]).detach())


def test_an_encoder_of_all_levels_gives_the_mask_features() -> None:
    decoder, inputs = pixel_decoder(num_levels=4), maps()
    output = decoder(inputs, output_hidden=True)
    assert output.encoder_layers is not None
    finest = output.encoder_layers[-1][:, -inputs[0][0, 0].numel() :].transpose(1, 2).unflatten(2, inputs[0].shape[2:])
    assert_close(output.mask_features, decoder.mask_projection(finest).detach())
    assert not any("lateral_conv" in name or "output_conv" in name for name in decoder.state_dict())


@pytest.mark.parametrize("num_levels", [1, 3, 4])
def test_without_layers_levels_are_the_projected_maps(num_levels: int) -> None:
    decoder, inputs = pixel_decoder(num_layers=0, num_levels=num_levels), maps()
    output = decoder(inputs, output_hidden=True)
    assert output.encoder_layers == ()
    for ours, projection, level in zip(output.multi_scale, decoder.input_projections, inputs[::-1], strict=False):
        assert_close(ours, projection(level).detach())


@pytest.mark.parametrize(("heads", "points"), [(1, 1), (8, 3)])
def test_heads_and_points(heads: int, points: int) -> None:
    sizes = {"hidden_dim": 64, "mask_dim": 12, "num_layers": 1, "ffn_dim": 16, "num_levels": 2}
    decoder = MSDeformAttnPixelDecoder(in_channels=CHANNELS, num_heads=heads, num_points=points, **sizes)
    assert decoder.layers[0].self_attn.attention_weights.out_features == heads * 2 * points
    assert decoder(tuple(level.float() for level in maps())).mask_features.shape == (2, 12, 16, 24)


def test_the_names_of_the_published_decoder() -> None:
    names = {name.split(".")[0] for name in pixel_decoder().state_dict()}
    published = {"input_projections", "level_embed", "layers", "lateral_conv", "output_conv", "mask_projection"}
    assert names == published


def test_positions_and_level_embedding_are_added_to_the_queries_only() -> None:
    decoder, inputs = pixel_decoder(), maps()
    calls = []
    layer = decoder.layers[0]
    layer.self_attn.register_forward_pre_hook(lambda _module, arguments: calls.append(arguments))
    decoder(inputs)
    query, value, references, shapes = calls[0]
    assert shapes == ((2, 3), (4, 6), (8, 12))
    expected = torch.cat(
        [
            sine_2d(height, width, 64, dtype=torch.float64).flatten(0, 1) + decoder.level_embed[index]
            for index, (height, width) in enumerate(shapes)
        ]
    )
    assert_close(query - value, expected.detach().expand(2, -1, -1))
    assert_close(references, torch.cat([pixel_centres(*shape, dtype=torch.float64) for shape in shapes]))


def test_dropout_acts_in_training_only() -> None:
    dropping, plain, inputs = pixel_decoder(dropout=0.5), pixel_decoder(), maps()
    with torch.no_grad():
        assert torch.equal(dropping(inputs).mask_features, plain(inputs).mask_features)
        assert not torch.equal(dropping.train()(inputs).mask_features, plain.train()(inputs).mask_features)


def test_an_encoder_layer_drops_after_the_attention_and_twice_in_the_ffn() -> None:
    layer = DeformableEncoderLayer(dim=8, ffn_dim=4, num_heads=2, num_points=1, dropout=0.5).train()
    calls = []
    layer.dropout.register_forward_hook(lambda _module, arguments, _output: calls.append(arguments[0].shape[-1]))
    shapes = ((1, 1), (1, 2), (2, 2))
    references = torch.cat([pixel_centres(*shape, dtype=torch.float32) for shape in shapes])
    layer(torch.randn(1, 7, 8), torch.zeros(7, 8), references, shapes)
    assert calls == [8, 4, 8]


def test_the_ffn_is_post_norm_with_relu() -> None:
    torch.manual_seed(0)
    layer = DeformableEncoderLayer(dim=8, ffn_dim=4, num_heads=2, num_points=1).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    shapes = ((1, 1), (1, 2), (2, 2))
    references = torch.cat([pixel_centres(*shape, dtype=torch.float64) for shape in shapes])
    position = torch.randn(7, 8, dtype=torch.float64)
    attended = layer.self_attn_norm(x + layer.self_attn(x + position, x, references, shapes))
    ffn = nn.Sequential(layer.linear1, nn.ReLU(), layer.linear2)
    expected = layer.ffn_norm(attended + ffn(attended))
    assert_close(layer(x, position, references, shapes), expected.detach())


@pytest.mark.parametrize(("num_layers", "num_levels"), [(1, 3), (0, 3), (1, 1), (1, 4)])
def test_gradcheck(num_layers: int, num_levels: int) -> None:
    decoder = pixel_decoder(num_layers=num_layers, num_levels=num_levels)
    inputs = tuple(level.requires_grad_() for level in maps(1, 20, 28))

    def decode(*levels: Tensor) -> tuple[Tensor, ...]:
        output = decoder(levels)
        return output.mask_features, *output.multi_scale

    assert torch.autograd.gradcheck(decode, inputs, fast_mode=True)


def test_pixel_centres() -> None:
    centres = pixel_centres(2, 4, dtype=torch.float64)
    assert centres.tolist() == [[x, y] for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)]


def test_another_attention_takes_the_place_of_the_first() -> None:
    class Doubled(nn.Module):
        def forward(self, query: Tensor, value: Tensor, *_: object) -> Tensor:
            return 2 * value

    layer = DeformableEncoderLayer(dim=16, ffn_dim=8, num_heads=2, num_points=1)
    layer.self_attn = Doubled()  # type: ignore[assignment]
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        expected = layer.self_attn_norm(3 * x)
        expected = layer.ffn_norm(expected + layer.linear2(layer.linear1(expected).relu()))
        shapes = ((1, 1),) * 3
        assert torch.allclose(layer(x, torch.zeros(3, 16), torch.full((3, 2), 0.5), shapes), expected, atol=1e-5)

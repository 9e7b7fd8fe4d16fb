"""The compiled kernels, against PyTorch's operators in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2f_video.acceleration import cpu_kernels, kernels, winograd
from m2f_video.acceleration.kernels import Activation, PackedLinear
from m2f_video.modeling.cross_attention import attention_mask
from m2f_video.modeling.swin import SwinBlock
from m2f_video.ops import ms_deform_attn_from_offsets
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs Linux and a C++ compiler")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROUNDED = {torch.float32: 5e-7, torch.bfloat16: 3e-3}
"""Error of a result that was rounded once."""

Shapes = tuple[tuple[int, int], ...]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def of_three_threads(compute: Callable[[], Tensor]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        return compute()
    finally:
        torch.set_num_threads(threads)


def drawn(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """With weights that are not those it starts with."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return module.to(dtype)


# --- linear layers


def packed(layer: nn.Linear) -> PackedLinear:
    return PackedLinear(kernels.pack_weight(layer.weight), layer.bias, layer.out_features)


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 2, 16), (5, 6, 32), (6, 96, 48), (7, 96, 288), (100, 256, 256), (97, 384, 80), (200, 10, 64), (13, 3072, 128)],
)
def test_products(rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(inputs, outputs, bias).to(dtype), torch.randn(rows, inputs).to(dtype)
    ours = kernels.linear(x, packed(layer))
    assert ours.dtype == dtype
    assert relative_error(ours, layer.double()(x.double())) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


@DTYPES
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_what_is_around_a_layer(
    activation: Activation | None, before: bool, after: bool, residual: bool, dtype: torch.dtype
) -> None:
    """Norms, a hidden layer and what is added, in one pass."""
    first, second, single = (drawn(nn.Linear(*sizes), dtype) for sizes in ((48, 80), (80, 96), (48, 96)))
    norms = drawn(nn.LayerNorm(48, eps=1e-3), dtype), drawn(nn.LayerNorm(96), dtype)
    x, added = torch.randn(3, 67, 48).to(dtype), torch.randn(3, 67, 96).to(dtype) if residual else None
    layers = [single] if activation is None else [first, second]
    around = {"before": norms[0] if before else None, "after": norms[1] if after else None, "residual": added}
    ours = kernels.linear(x, *map(packed, layers), activation=activation, **around)

    for module in (first, second, single, *norms):
        module.double()
    y = norms[0](x.double()) if before else x.double()
    y = single(y) if activation is None else second(getattr(F, activation)(first(y)))
    y = y if added is None else y + added
    y = norms[1](y) if after else y
    assert ours.dtype == dtype
    assert relative_error(ours, y) < {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]


def test_gelu_is_exact_to_rounding() -> None:
    identity = PackedLinear(kernels.pack_weight(torch.eye(16)), None, 16)
    x = torch.cat([torch.linspace(-12, 12, 160_001), torch.tensor([0.0, -0.0, 1e-30, 30.0, -30.0, 1e30, -1e30])])
    x = F.pad(x, (0, -len(x) % 16)).view(-1, 16)
    ours, expected = kernels.linear(x, identity, identity, activation="gelu"), F.gelu(x.double())
    assert (ours - expected).abs().div(1 + expected.abs()).max() < 3e-7
    spoilt = torch.tensor([[torch.nan] * 16, [torch.inf] * 16])
    assert kernels.linear(spoilt, identity, identity, activation="gelu").isnan().all()  # infinity times zeros


@DTYPES
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_row_that_is_not_finite_spoils_itself_alone(activation: Activation, dtype: torch.dtype) -> None:
    layers = [packed(drawn(nn.Linear(*sizes), dtype)) for sizes in ((32, 64), (64, 32))]
    norm, x = drawn(nn.LayerNorm(32), dtype), torch.randn(40, 32).to(dtype)
    expected = kernels.linear(x, *layers, activation=activation, residual=x, after=norm)
    x[17, 5] = torch.nan
    ours = kernels.linear(x, *layers, activation=activation, residual=x, after=norm)
    assert ours[17].isnan().all()
    rest = torch.arange(40) != 17
    assert torch.equal(ours[rest], expected[rest])


def test_linear_layers_do_not_depend_on_threads_or_order_in_memory() -> None:
    layers, norm = [packed(nn.Linear(32, 64)), packed(nn.Linear(64, 32))], drawn(nn.LayerNorm(32))
    x = torch.randn(43, 32, 7).transpose(1, 2)

    def compute(x: Tensor = x) -> Tensor:
        return kernels.linear(x, *layers, activation="gelu", before=norm, residual=x)

    alone = compute()
    assert torch.equal(of_three_threads(compute), alone)
    assert torch.equal(compute(x.contiguous()), alone)


@pytest.mark.parametrize(("rows", "activation"), [(1, None), (70, "relu"), (70, "gelu")])
def test_by_onednn_where_the_kernel_does_not_know_the_widths(rows: int, activation: Activation | None) -> None:
    first, second = nn.Linear(7, 9), nn.Linear(9, 5)
    norms, x = (drawn(nn.LayerNorm(7)), drawn(nn.LayerNorm(5))), torch.randn(rows, 7)
    layers = [PackedLinear.of(layer.weight, layer.bias) for layer in (first, second)]
    assert all(layer.weight.is_mkldnn for layer in layers)
    y = torch.randn(rows, 5)
    ours = kernels.linear(x, *layers, activation=activation, before=norms[0], residual=y, after=norms[1])
    for module in (first, second, *norms):
        module.double()
    hidden = first(norms[0](x.double()))
    hidden = hidden if activation is None else getattr(F, activation)(hidden)
    assert relative_error(ours, norms[1](y + second(hidden))) < 2e-6


# --- norms


@DTYPES
@pytest.mark.parametrize("shape", [(1, 96), (3, 1), (7, 5), (2, 3, 16), (5, 33), (2, 3, 5, 64), (3, 1536), (70, 1000)])
def test_layer_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = drawn(nn.LayerNorm(shape[-1], eps=1e-3), dtype)
    x, branch = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    ours = kernels.layer_norm(x, norm, branch)
    assert (ours.shape, ours.dtype) == (shape, dtype)
    assert torch.equal(kernels.layer_norm(x + branch, norm), ours)
    assert relative_error(ours, norm.double()((x + branch).double())) < ROUNDED[dtype]


@pytest.mark.parametrize("channels", [5, 96, 384])
def test_layer_norms_of_values_far_from_zero(channels: int) -> None:
    norm, x = drawn(nn.LayerNorm(channels)), 1e4 + 0.1 * torch.randn(50, channels)
    ours, pytorch = kernels.layer_norm(x, norm), norm(x)
    constant = kernels.layer_norm(torch.full((2, channels), 1e4), norm)
    assert relative_error(constant, norm.bias.expand(2, -1)) < 1e-6
    expected = norm.double()(x.double())
    assert relative_error(ours, expected) < 1e-4
    assert relative_error(ours, expected) <= 2 * relative_error(pytorch, expected)


@pytest.mark.parametrize("position", [0, 40, 70])
def test_layer_norms_of_one_large_value(position: int) -> None:
    norm, x = drawn(nn.LayerNorm(71)), torch.randn(3, 71)
    x[:, position] = 1e4
    assert relative_error(kernels.layer_norm(x, norm), norm.double()(x.double())) < 5e-7


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channels", [7, 64, 75])
def test_layer_norms_of_what_is_not_finite(channels: int, value: float, dtype: torch.dtype) -> None:
    norm, x, branch = drawn(nn.LayerNorm(channels), dtype), *torch.randn(2, channels, channels).to(dtype)
    expected = norm(x + branch)
    x[1:].fill_diagonal_(value)  # in every place of a row, but not in the first row
    ours = kernels.layer_norm(x, norm, branch)
    assert ours[1:].isnan().all()
    assert relative_error(ours[0], expected[0]) < 2 * ROUNDED[dtype]


def test_layer_norms_of_views() -> None:
    norm = drawn(nn.LayerNorm(32))
    x, branch = torch.randn(2, 32, 5, 6).permute(0, 2, 3, 1), torch.randn(2, 7, 8, 32)[:, 1:6, :6]
    assert relative_error(kernels.layer_norm(x, norm, branch), norm(x + branch)) < 1e-6
    expanded = torch.randn(32).expand(6, 32)
    ours = kernels.layer_norm(expanded, norm, branch[0, 0])
    assert relative_error(ours, norm(expanded + branch[0, 0])) < 1e-6


def group_norm(x: Tensor, norm: nn.GroupNorm, coarse: Tensor | None = None, relu: bool = False) -> Tensor:
    """Of maps (B, H, W, C), in float64."""
    weight, bias = norm.weight.double(), norm.bias.double()
    y = F.group_norm(x.double().permute(0, 3, 1, 2), norm.num_groups, weight, bias, norm.eps)
    if coarse is not None:
        coarse = coarse.double().permute(0, 3, 1, 2)
        y = y + F.interpolate(coarse, size=y.shape[-2:], mode="bilinear", align_corners=False)
    return (y.relu() if relu else y).permute(0, 2, 3, 1)


@DTYPES
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("coarse_size", [None, (1, 1), (6, 5), (7, 3), (12, 10), (31, 17)])
@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 2), (96, 32), (256, 32)])
def test_group_norms(
    channels: int, groups: int, coarse_size: tuple[int, int] | None, relu: bool, dtype: torch.dtype
) -> None:
    norm, x = drawn(nn.GroupNorm(groups, channels), dtype), torch.randn(2, 12, 11, channels).to(dtype)
    coarse = None if coarse_size is None else torch.randn(2, *coarse_size, channels).to(dtype)
    expected = group_norm(x, norm, coarse, relu)
    ours = kernels.group_norm_(x, norm, coarse, relu)
    assert ours is x
    assert relative_error(ours, expected) < ROUNDED[dtype]


def test_group_norms_add_a_level_of_tokens() -> None:
    norm, x, tokens = drawn(nn.GroupNorm(4, 32)), torch.randn(3, 4, 6, 32), torch.randn(3, 20, 32)
    coarse = tokens.split([14, 6], dim=1)[1].unflatten(1, (2, 3))
    expected = group_norm(x, norm, coarse)
    assert relative_error(kernels.group_norm_(x, norm, coarse), expected) < 5e-7


@DTYPES
def test_group_norms_of_values_far_from_zero(dtype: torch.dtype) -> None:
    norm, x = drawn(nn.GroupNorm(4, 32), dtype), (1e3 + torch.randn(1, 40, 30, 32)).to(dtype)
    assert relative_error(kernels.group_norm_(x.clone(), norm), group_norm(x, norm)) < ROUNDED[dtype]
    x[:, 0, 0] = 0  # a first pixel that is far from the rest
    assert relative_error(kernels.group_norm_(x.clone(), norm), group_norm(x, norm)) < max(1e-5, ROUNDED[dtype])
    constant = kernels.group_norm_(torch.full_like(x, 1e4), norm)
    assert relative_error(constant, norm.bias.expand_as(x)) < ROUNDED[dtype]


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_group_that_is_not_finite_spoils_itself_alone(value: float, dtype: torch.dtype) -> None:
    norm, x = drawn(nn.GroupNorm(4, 32), dtype), torch.randn(2, 9, 20, 32).to(dtype)
    x[1, 8, 3, 9] = value
    expected = group_norm(x, norm, relu=True)
    ours = kernels.group_norm_(x, norm, relu=True)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ours[1, ..., 8:16].isnan().all()
    assert relative_error(ours.nan_to_num(), expected.nan_to_num()) < 2 * ROUNDED[dtype]


def test_a_coarse_map_that_is_not_finite_spoils_its_surroundings() -> None:
    norm, x, coarse = drawn(nn.GroupNorm(4, 32)), torch.randn(1, 8, 8, 32), torch.randn(1, 4, 4, 32)
    coarse[0, 1, 2, 5] = torch.nan
    expected = group_norm(x, norm, coarse)
    assert torch.equal(kernels.group_norm_(x, norm, coarse).isnan(), expected.isnan())


@DTYPES
def test_norms_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    layer, group = drawn(nn.LayerNorm(48), dtype), drawn(nn.GroupNorm(8, 64), dtype)
    x = torch.randn(101, 48).to(dtype)
    maps, coarse = torch.randn(3, 13, 17, 64).to(dtype), torch.randn(3, 5, 8, 64).to(dtype)
    for compute in (
        lambda: kernels.layer_norm(x, layer, x),
        lambda: kernels.group_norm_(maps.clone(), group, coarse),
    ):
        assert torch.equal(of_three_threads(compute), compute())


# --- attention


def windows(dim: int, heads: int, window: int, shift: int, bias: bool = True) -> SwinBlock:
    """A block whose attention ends before its last projection."""
    block = drawn(SwinBlock(dim=heads * dim, num_heads=heads, window_size=window, shift=shift, qkv_bias=bias))
    nn.init.normal_(block.attn.relative_position_bias_table)
    block.attn.proj = nn.Identity()
    return block


def attend(block: SwinBlock, x: Tensor, dtype: torch.dtype) -> Tensor:
    qkv = block.attn.qkv
    padding = torch.zeros(qkv.out_features) if qkv.bias is None else qkv.bias
    bias = block.attn.relative_position_bias().permute(1, 2, 0).contiguous()
    return kernels.window_attention(qkv(x).to(dtype), padding.to(dtype), bias.to(dtype), block.window_size, block.shift)


@DTYPES
@pytest.mark.parametrize(
    ("window", "height", "width", "shift", "batch", "dim"),
    [
        (7, 14, 21, 0, 1, 32),
        (7, 14, 21, 3, 2, 16),
        (7, 9, 25, 3, 1, 48),
        (7, 3, 2, 3, 2, 32),
        (3, 1, 1, 1, 1, 64),
        (12, 20, 13, 6, 1, 32),
    ],
)
def test_windows(window: int, height: int, width: int, shift: int, batch: int, dim: int, dtype: torch.dtype) -> None:
    block, x = windows(dim, 2, window, shift, bias=dim != 16), torch.randn(batch, height, width, 2 * dim)
    ours = attend(block, x, dtype)
    expected = block.double()._attend(x.double())
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype] * float(expected.abs().max())
    assert (ours - expected).abs().max() < bound


def test_a_token_that_is_not_a_number_spoils_its_window_alone() -> None:
    block, x = windows(32, 2, 4, 0), torch.randn(1, 8, 8, 64)
    x[0, 1, 2] = torch.nan
    spoilt = attend(block, x, torch.float32).isnan().any(-1)[0]
    assert spoilt[:4, :4].all()
    assert spoilt.sum() == 16


def masked(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor, heads: int) -> Tensor:
    """By PyTorch, in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask(mask_logits)[:, None])
    return output.transpose(1, 2).flatten(2)


@DTYPES
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "dim"),
    [(1, 100, 405, 8, 32), (2, 7, 61, 3, 16), (1, 64, 60, 1, 48), (3, 1, 1, 2, 32), (1, 129, 200, 5, 64)],
)
def test_masked_attention(batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(batch, size, heads * dim).to(dtype) for size in (queries, keys, keys))
    mask_logits = torch.randn(batch, queries, keys).to(dtype)
    mask_logits[:, queries // 2] = -1.0  # sees no key, and so all
    mask_logits[0, 0, : keys - 1] = -1.0  # sees the last one
    ours, expected = (
        attention(3 * query, key, value, mask_logits, heads) for attention in (kernels.masked_attention, masked)
    )
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype] * float(expected.abs().max())
    assert (ours - expected).abs().max() < bound


def test_large_logits_neither_overflow_nor_vanish() -> None:
    arguments = 40 * torch.randn(1, 5, 32), 40 * torch.randn(1, 300, 32), torch.randn(1, 300, 32)
    mask_logits = torch.randn(1, 5, 300)
    ours, expected = (attention(*arguments, mask_logits, 1) for attention in (kernels.masked_attention, masked))
    assert (ours - expected).abs().max() < 2e-3  # logits of thousands have that error in float32


@DTYPES
def test_the_first_of_many_keys_weigh_as_much_as_the_last(dtype: torch.dtype) -> None:
    query, value = torch.full((1, 1, 32), 1.7, dtype=dtype), torch.ones(1, 6000, 32, dtype=dtype)
    value[:, :3000] = -1.0
    key = query.expand(1, 6000, 32).contiguous()
    assert kernels.masked_attention(query, key, value, torch.zeros(1, 1, 6000, dtype=dtype), 1).abs().max() < 2e-6


def test_zero_and_nan_in_mask_logits_do_not_block() -> None:
    query, key, value = torch.zeros(1, 1, 16), torch.zeros(1, 4, 16), torch.eye(4, 16)[None]
    mask_logits = torch.tensor([[[-1.0, 0.0, torch.nan, -0.0]]])
    ours = kernels.masked_attention(query, key, value, mask_logits, 1)
    torch.testing.assert_close(ours[0, 0, :4], torch.tensor([0.0, 1.0, 1.0, 1.0]) / 3)


def test_a_query_that_is_not_a_number_spoils_itself_alone() -> None:
    query, key, value = (torch.randn(1, size, 32) for size in (20, 70, 70))
    query[0, 3] = torch.nan
    spoilt = kernels.masked_attention(query, key, value, torch.randn(1, 20, 70), 2).isnan().any(-1)[0]
    assert spoilt.tolist() == [index == 3 for index in range(20)]


def test_attention_does_not_depend_on_threads() -> None:
    block, x = windows(32, 2, 5, 2), torch.randn(2, 21, 13, 64)
    query, key, value, mask_logits = (torch.randn(2, *size) for size in ((70, 64), (90, 64), (90, 64), (70, 90)))
    for compute in (
        lambda: attend(block, x, torch.float32),
        lambda: kernels.masked_attention(query, key, value, mask_logits, 2),
    ):
        assert torch.equal(of_three_threads(compute), compute())


# --- deformable attention

# levels; batch, queries, heads, channels of a head, points
SAMPLES: dict[str, tuple[Shapes, tuple[int, int, int, int, int]]] = {
    "model": (((15, 27), (30, 54), (60, 108)), (1, 300, 8, 32, 4)),
    "odd channels": (((3, 5), (4, 2)), (2, 7, 3, 7, 3)),
    "more than a vector of samples": (((3, 5), (4, 2), (1, 1), (9, 3)), (2, 6, 2, 16, 9)),
    "one level": (((6, 4),), (3, 5, 1, 48, 16)),
    "many channels": (((2, 9), (5, 5)), (1, 9, 2, 131, 2)),
    "one of all": (((1, 1),), (1, 1, 1, 1, 1)),
}
Samples = tuple[Tensor, Shapes, Tensor, Tensor, Tensor]


def samples(case: str = "odd channels", dtype: torch.dtype = torch.float32, spread: float = 2) -> Samples:
    """Value, levels, reference points, offsets and logits."""
    shapes, (B, Q, M, D, P) = SAMPLES[case]
    N, L = sum(height * width for height, width in shapes), len(shapes)
    offsets, logits = spread * torch.randn(B, Q, M, L, P, 2), 3 * torch.randn(B, Q, M, L, P)
    return torch.randn(B, N, M, D).to(dtype), shapes, torch.rand(Q, 2), offsets.to(dtype), logits.to(dtype)


def sample(value: Tensor, shapes: Shapes, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    heads, flat = value.shape[2], (tensor.flatten(2) for tensor in (value, offsets, logits))
    value, offsets, logits = flat
    return kernels.deformable_attention(value, shapes, points, offsets, logits, heads)


@DTYPES
@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("spread", [0.0, 2.0, 50.0])
def test_deformable_attention(case: str, spread: float, dtype: torch.dtype) -> None:
    value, shapes, points, offsets, logits = samples(case, dtype, spread)
    ours = sample(value, shapes, points, offsets, logits)
    wide = points.double(), offsets.double(), logits.double()
    expected = ms_deform_attn_from_offsets(value.double(), shapes, *wide, backend="reference")
    assert ours.dtype == dtype
    error = (ours - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
def test_an_offset_that_is_no_number_reads_zeros(bad: float, dtype: torch.dtype) -> None:
    value, shapes, points, offsets, logits = samples(dtype=dtype)
    far = offsets.clone()
    offsets[0, 1, 1, :, 1, 0], far[0, 1, 1, :, 1] = bad, 1e4
    offsets[1, 2], far[1, 2] = bad, 1e4
    ours = sample(value, shapes, points, offsets, logits)
    assert torch.equal(ours, sample(value, shapes, points, far, logits))
    assert ours[1, 2].eq(0).all()


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_logits_and_values_spread_as_in_pytorch(bad: float, dtype: torch.dtype) -> None:
    value, shapes, points, offsets, logits = samples(dtype=dtype)
    logits[0, 1, 2, 1, 1] = bad
    value[1, 3, 0] = bad
    expected = ms_deform_attn_from_offsets(value, shapes, points, offsets, logits, backend="embedding_bag")
    assert 0 < expected.isfinite().float().mean() < 1
    assert torch.equal(sample(value, shapes, points, offsets, logits).isfinite(), expected.isfinite())


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_are_weights_too(shift: float) -> None:
    *others, logits = samples()
    torch.testing.assert_close(sample(*others, logits + shift), sample(*others, logits), rtol=0, atol=5e-3)


def test_deformable_attention_does_not_depend_on_threads() -> None:
    inputs = samples("model")
    assert torch.equal(of_three_threads(lambda: sample(*inputs)), sample(*inputs))


# --- convolutions


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, I) -> (B, H, W, O)."""
    return kernels.winograd_convolution(x, winograd.pack_weight(weight), len(weight))


def weights(inputs: int, outputs: int) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(outputs, inputs, 3, 3), a=1)


def is_convolution(ours: Tensor, x: Tensor, weight: Tensor, bound: float = 2e-6) -> bool:
    expected = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1).permute(0, 2, 3, 1)
    return bool((ours - expected).abs().max() < bound * expected.abs().max())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2), (4, 4), (5, 8), (8, 5), (13, 31), (30, 54)])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 80), (80, 32)])
def test_convolutions(shape: tuple[int, int], inputs: int, outputs: int) -> None:
    x, weight = torch.randn(2, *shape, inputs), weights(inputs, outputs)
    assert is_convolution(convolve(x, weight), x, weight)


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_convolutions_of_any_size(batch: int, height: int, width: int, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(batch, height, width, 16 * inputs), weights(16 * inputs, 16 * outputs)
    assert is_convolution(convolve(x, weight), x, weight)


def test_the_error_at_many_channels_is_no_larger_than_pytorchs() -> None:
    x, weight = torch.randn(1, 24, 36, 256), weights(256, 256)
    ours = convolve(x, weight)
    assert is_convolution(ours, x, weight, 1.5e-6)
    expected = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1).permute(0, 2, 3, 1)
    assert relative_error(ours, expected) < 8e-7  # PyTorch's: 9e-7


def test_convolutions_do_not_depend_on_threads_or_other_frames() -> None:
    x, weight = torch.randn(3, 33, 35, 32), weights(32, 32)
    together = convolve(x, weight)
    assert torch.equal(of_three_threads(lambda: convolve(x, weight)), together)
    for frame, alone in zip(together, x, strict=True):
        assert torch.equal(frame, convolve(alone[None], weight)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_reaches_its_neighbours_only(value: float) -> None:
    x, weight = torch.randn(1, 16, 20, 32), weights(32, 32)
    clean = convolve(x, weight)
    x[0, 9, 4, 5] = value  # at the left edge of the tile of rows 8 to 11 and columns 4 to 7
    ours = convolve(x, weight)
    assert not ours[:, 8:11, 3:6].isfinite().any()
    reached = torch.zeros(16, 20, dtype=torch.bool)
    reached[8:12, 0:8] = True
    assert torch.equal(ours[:, ~reached], clean[:, ~reached])


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (8, 8)])
@pytest.mark.parametrize("start", [15, 16])
def test_what_lies_around_a_map_is_not_read(shape: tuple[int, int], start: int) -> None:
    number, weight = 32 * shape[0] * shape[1], weights(32, 32)
    memory = torch.full((number + 32,), torch.nan)
    memory[start : start + number] = torch.randn(number)
    x = memory[start : start + number].view(1, *shape, 32)
    assert is_convolution(convolve(x, weight), x, weight)


def test_maps_in_bfloat16_are_rounded_at_the_end_alone() -> None:
    x, weight = torch.randn(2, 9, 13, 32).bfloat16(), weights(32, 32)
    expected = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(convolve(x, weight).double(), expected, rtol=2**-8, atol=1e-4)

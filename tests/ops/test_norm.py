from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.ops import cpu_kernels
from m2f_video.ops.norm import group_norm_channels_last, layer_norm, layer_norm_of_sum
from tests.tolerances import assert_close, relative_error

needs_kernels = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
ERROR = {torch.float32: 5e-7, torch.bfloat16: 3e-3}
"""Of a result that was rounded once."""


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def affine(norm: Any, dtype: torch.dtype = torch.float32) -> Any:
    """With weights that are not those it starts with."""
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def layer_norm_in_double(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps)


def group_norm_in_double(x: Tensor, norm: nn.GroupNorm, coarse: Tensor | None = None, relu: bool = False) -> Tensor:
    y = F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    if coarse is not None:
        y = y + F.interpolate(coarse.double(), size=x.shape[-2:], mode="bilinear", align_corners=False)
    return y.relu() if relu else y


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (3, 1), (7, 5), (2, 3, 16), (5, 33), (2, 3, 5, 64), (3, 1536), (70, 1000)])
def test_layer_norms(shape: tuple[int, ...], dtype: torch.dtype, calls: list[str]) -> None:
    norm = affine(nn.LayerNorm(shape[-1], eps=1e-3), dtype)
    x, branch = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    normalised = layer_norm_of_sum(x, branch, norm, True)
    assert normalised.shape == shape
    assert normalised.dtype == dtype
    assert relative_error(normalised, layer_norm_in_double(x + branch, norm)) < ERROR[dtype]
    assert torch.equal(layer_norm(x + branch, norm, True), normalised)
    assert calls == ["layer_norm"] * 2


@needs_kernels
@pytest.mark.parametrize("channels", [5, 96, 384])
def test_layer_norms_of_values_far_from_zero(channels: int) -> None:
    norm = affine(nn.LayerNorm(channels))
    x = 1e4 + 0.1 * torch.randn(50, channels)
    ours, pytorch, expected = layer_norm(x, norm, True), norm(x), layer_norm_in_double(x, norm)
    assert relative_error(ours, expected) < 1e-4
    assert relative_error(ours, expected) <= 2 * relative_error(pytorch, expected)
    assert_close(layer_norm(torch.full((2, channels), 1e4), norm, True), norm.bias.expand(2, -1))


@needs_kernels
@pytest.mark.parametrize("position", [0, 40, 70])
def test_layer_norms_of_one_large_value(position: int) -> None:
    norm = affine(nn.LayerNorm(71))
    x = torch.randn(3, 71)
    x[:, position] = 1e4
    assert relative_error(layer_norm(x, norm, True), layer_norm_in_double(x, norm)) < 5e-7


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channels", [7, 64, 75])
def test_what_is_not_finite_stays_in_its_row(channels: int, value: float, dtype: torch.dtype) -> None:
    norm = affine(nn.LayerNorm(channels), dtype)
    x, branch = torch.randn(channels, channels, dtype=dtype), torch.randn(channels, channels, dtype=dtype)
    expected = norm(x + branch)
    x[1:].fill_diagonal_(value)  # in every place of a row, but not in the first row
    normalised = layer_norm_of_sum(x, branch, norm, True)
    assert normalised[1:].isnan().all()
    assert relative_error(normalised[0], expected[0]) < 2 * ERROR[dtype]


@needs_kernels
def test_layer_norms_of_tensors_that_are_not_contiguous(calls: list[str]) -> None:
    norm = affine(nn.LayerNorm(32))
    x, branch = torch.randn(2, 32, 5, 6).permute(0, 2, 3, 1), torch.randn(2, 7, 8, 32)[:, 1:6, :6]
    assert_close(layer_norm_of_sum(x, branch, norm, True), norm(x + branch))
    assert_close(layer_norm(x, norm, True), norm(x))
    expanded = torch.randn(32).expand(6, 32)
    assert_close(layer_norm_of_sum(expanded, branch[0, 0], norm, True), norm(expanded + branch[0, 0]))
    assert calls == ["layer_norm"] * 3


def rows(norm: nn.LayerNorm, x: Tensor, branch: Tensor) -> None:
    """Ours are the plain ones."""
    assert_close(layer_norm(x, norm, True), norm(x))
    assert_close(layer_norm_of_sum(x, branch, norm, True), norm(x + branch))


def test_layer_norms_that_no_kernel_knows(calls: list[str]) -> None:
    x = torch.randn(3, 4, 6)
    rows(nn.LayerNorm(6, elementwise_affine=False), x, x)
    rows(nn.LayerNorm(6, bias=False), x, x)
    rows(affine(nn.LayerNorm((4, 6))), x, x)
    rows(affine(nn.LayerNorm(6)), x[:0], x[:0])
    rows(affine(nn.LayerNorm(6), torch.float64), x.double(), x.double())
    hooked = affine(nn.LayerNorm(6))
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    rows(hooked, x, x)
    strided = affine(nn.LayerNorm(6))
    strided.weight = nn.Parameter(torch.randn(12)[::2])
    rows(strided, x, x)

    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    rows(affine(Doubled(6)), x, x)
    norm = affine(nn.LayerNorm(6))
    assert_close(layer_norm_of_sum(x, x[0], norm, True), norm(x + x[0]))
    assert_close(layer_norm_of_sum(x[0], x, norm, True), norm(x + x[0]))
    assert calls == []


def test_layer_norms_without_kernels(calls: list[str]) -> None:
    norm, x = affine(nn.LayerNorm(6)), torch.randn(3, 6)
    assert torch.equal(layer_norm(x, norm, False), norm(x))
    assert torch.equal(layer_norm_of_sum(x, x, norm, False), norm(x + x))
    assert calls == []


def test_weights_of_a_wrong_size_are_refused() -> None:
    norm, maps = nn.LayerNorm(64), nn.GroupNorm(2, 64)
    norm.weight, maps.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="weight"):
        layer_norm(torch.randn(2, 64), norm, True)
    with pytest.raises(RuntimeError, match="bias"):
        group_norm_channels_last(channels_last(1, 64, 2, 2), maps, True)


def gradients(function: Callable[[], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return torch.autograd.grad(function().square().sum(), inputs)


def test_gradients_are_the_plain_ones(calls: list[str]) -> None:
    norm, x, branch = affine(nn.LayerNorm(32)), torch.randn(4, 32, requires_grad=True), torch.randn(4, 32)
    inputs = x, norm.weight, norm.bias
    expected = gradients(lambda: norm(norm(x + branch)), *inputs)
    ours = gradients(lambda: layer_norm(layer_norm_of_sum(x, branch, norm, True), norm, True), *inputs)
    assert all(map(torch.equal, ours, expected))

    maps, y = affine(nn.GroupNorm(4, 32)), channels_last(1, 32, 4, 6).requires_grad_()
    coarse = channels_last(1, 32, 2, 3).requires_grad_()
    inputs = y, coarse, maps.weight, maps.bias
    expected = gradients(lambda: (maps(y) + F.interpolate(coarse, size=(4, 6), mode="bilinear")).relu(), *inputs)
    ours = gradients(lambda: group_norm_channels_last(y, maps, True, coarse=coarse, relu=True), *inputs)
    assert all(map(torch.equal, ours, expected))
    assert calls == []


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("coarse_size", [None, (1, 1), (6, 5), (7, 3), (12, 10), (31, 17)])
@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 2), (96, 32), (256, 32)])
def test_group_norms(
    channels: int, groups: int, coarse_size: tuple[int, int] | None, relu: bool, dtype: torch.dtype, calls: list[str]
) -> None:
    norm = affine(nn.GroupNorm(groups, channels), dtype)
    x = channels_last(2, channels, 12, 11, dtype=dtype)
    coarse = None if coarse_size is None else channels_last(2, channels, *coarse_size, dtype=dtype)
    expected = group_norm_in_double(x, norm, coarse, relu)
    ours = group_norm_channels_last(x, norm, True, coarse=coarse, relu=relu)
    assert ours is x
    assert relative_error(ours, expected) < ERROR[dtype]
    assert calls == ["group_norm"]


@needs_kernels
def test_group_norms_add_a_level_of_tokens(calls: list[str]) -> None:
    norm, x = affine(nn.GroupNorm(4, 32)), channels_last(3, 32, 4, 6)
    tokens = torch.randn(3, 20, 32)
    coarse = tokens.split([14, 6], dim=1)[1].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    expected = group_norm_in_double(x, norm, coarse)
    assert relative_error(group_norm_channels_last(x, norm, True, coarse=coarse), expected) < 5e-7
    assert calls == ["group_norm"]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norms_of_values_far_from_zero(dtype: torch.dtype) -> None:
    norm = affine(nn.GroupNorm(4, 32), dtype)
    x = (1e3 + channels_last(1, 32, 40, 30)).to(dtype)
    expected = group_norm_in_double(x, norm)
    assert relative_error(group_norm_channels_last(x.clone(), norm, True), expected) < ERROR[dtype]
    x[..., 0, 0] = 0  # a first pixel that is far from the rest
    expected = group_norm_in_double(x, norm)
    assert relative_error(group_norm_channels_last(x, norm, True), expected) < max(1e-5, ERROR[dtype])
    constant, bias = torch.full_like(x, 1e4), norm.bias[:, None, None].expand_as(x)
    assert relative_error(group_norm_channels_last(constant, norm, True), bias) < ERROR[dtype]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(value: float, dtype: torch.dtype) -> None:
    norm = affine(nn.GroupNorm(4, 32), dtype)
    x = channels_last(2, 32, 9, 20, dtype=dtype)
    x[1, 9, 8, 3] = value
    expected = norm(x).relu()
    ours = group_norm_channels_last(x, norm, True, relu=True)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ours[1, 8:16].isnan().all()
    assert relative_error(ours.nan_to_num(), expected.nan_to_num()) < 2 * ERROR[dtype]


@needs_kernels
def test_a_coarse_map_that_is_not_finite_spoils_its_surroundings() -> None:
    norm, x, coarse = affine(nn.GroupNorm(4, 32)), channels_last(1, 32, 8, 8), channels_last(1, 32, 4, 4)
    coarse[0, 5, 1, 2] = torch.nan
    expected = group_norm_in_double(x, norm, coarse)
    assert torch.equal(group_norm_channels_last(x, norm, True, coarse=coarse).isnan(), expected.isnan())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    norm, maps = affine(nn.LayerNorm(48), dtype), affine(nn.GroupNorm(8, 64), dtype)
    x, y, coarse = torch.randn(101, 48, dtype=dtype), channels_last(3, 64, 13, 17), channels_last(3, 64, 5, 8)
    y, coarse = y.to(dtype), coarse.to(dtype)
    alone = layer_norm_of_sum(x, x, norm, True), group_norm_channels_last(y.clone(), maps, True, coarse=coarse)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = layer_norm_of_sum(x, x, norm, True), group_norm_channels_last(y.clone(), maps, True, coarse=coarse)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, shared))


def maps(norm: nn.GroupNorm, x: Tensor, coarse: Tensor | None = None) -> None:
    """Ours are the plain ones, and leave their inputs alone."""
    before, expected = x.clone(), norm(x)
    if coarse is not None:
        expected = expected + F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
    assert_close(group_norm_channels_last(x, norm, True, coarse=coarse), expected)
    assert_close(group_norm_channels_last(x, norm, True, coarse=coarse, relu=True), expected.relu())
    assert torch.equal(x, before)


def test_group_norms_that_no_kernel_knows(calls: list[str]) -> None:
    x, coarse = channels_last(2, 32, 4, 6), channels_last(2, 32, 2, 3)
    norm = affine(nn.GroupNorm(4, 32))
    maps(norm, x.contiguous(), coarse)
    maps(norm, x, coarse.contiguous())
    maps(norm, x, coarse[:1])  # broadcasts
    maps(norm, x.flatten(2))
    maps(nn.GroupNorm(4, 32, affine=False), x)
    maps(affine(nn.GroupNorm(4, 16)), channels_last(1, 16, 4, 6))
    maps(affine(nn.GroupNorm(4, 32), torch.float64), x.double(), coarse.double())
    hooked = affine(nn.GroupNorm(4, 32))
    hooked.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    maps(hooked, x)
    assert_close(group_norm_channels_last(x, norm, False, relu=True), norm(x).relu())
    assert calls == []


def test_group_norms_by_pytorch_keep_their_digits() -> None:
    norm, x = affine(nn.GroupNorm(8, 64)), channels_last(2, 64, 96, 96) * torch.linspace(0.5, 2, 64)[:, None, None] + 1
    expected = group_norm_in_double(x, norm)
    assert relative_error(group_norm_channels_last(x, norm, False), expected) < 1e-7
    with torch.enable_grad():
        x.requires_grad_()
        assert torch.equal(group_norm_channels_last(x, norm, False), norm(x))

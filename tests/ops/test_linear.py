import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2f_video.ops import cpu_kernels
from m2f_video.ops import linear as module
from m2f_video.ops.linear import (
    PANEL,
    Activation,
    Linear,
    PackingLayer,
    PointwiseConv,
    feed_forward,
    linear,
    packed_for_kernel,
    project,
)
from tests.tolerances import assert_close, relative_error

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def layers(inputs: int, hidden: int, outputs: int, seed: int = 0) -> tuple[Linear, Linear]:
    torch.manual_seed(seed)
    return Linear(inputs, hidden), Linear(hidden, outputs)


@pytest.mark.parametrize("bias", [True, False])
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=30)
def test_linear_is_the_plain_one(shape: list[int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight, offset = torch.randn(*shape, 6), torch.randn(4, 6), torch.randn(4) if bias else None
    with torch.no_grad():
        ours = linear(x, weight, offset)
    assert_close(ours, F.linear(x, weight, offset))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), rows=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=30)
def test_feed_forward_in_parts_is_the_plain_one(shape: list[int], rows: int, activation: Activation, seed: int) -> None:
    first, second = layers(6, 8, 5, seed)
    x = torch.randn(*shape, 6)
    expected = second(ACTIVATIONS[activation](first(x)))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "HIDDEN_BYTES", rows * 8 * 4)
        assert_close(feed_forward(x, first, second, activation), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    first, second = (layer.double() for layer in layers(32, 64, 16))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    expected = feed_forward(x, first, second, "gelu").detach()
    with torch.no_grad():
        ours = feed_forward(x.to(dtype), first.to(dtype), second.to(dtype), "gelu")
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-15}[dtype]


def test_gradients_are_the_plain_ones() -> None:
    first, second = (layer.double() for layer in layers(3, 4, 2))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    feed_forward(x, first, second, "relu").square().sum().backward()
    ours = [x.grad, *(parameter.grad for layer in (first, second) for parameter in layer.parameters())]
    plain = second.weight, second.bias
    hidden = F.relu(F.linear(x, first.weight, first.bias))
    expected = torch.autograd.grad(
        F.linear(hidden, *plain).square().sum(), (x, *first.parameters(), *second.parameters())
    )
    for one, other in zip(ours, expected, strict=True):
        assert one is not None
        assert_close(one, other)


def test_a_frozen_layer_passes_gradients_on() -> None:
    layer = Linear(3, 2).requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, layer.weight.sum(0).expand(4, 3))


def test_autocast_decides_the_dtype() -> None:
    layer = Linear(8, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


def test_dropout_drops_hidden_units_without_gradients_too() -> None:
    first, second = layers(4, 64, 3)
    x, dropout = torch.randn(5, 4), nn.Dropout(0.5)
    with torch.no_grad():
        kept = feed_forward(x, first, second, "relu", dropout.eval())
        assert_close(kept, feed_forward(x, first, second, "relu"))
        assert not torch.allclose(kept, feed_forward(x, first, second, "relu", dropout.train()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_conv_is_a_convolution(memory_format: torch.memory_format, bias: bool) -> None:
    torch.manual_seed(0)
    ours = PointwiseConv(6, 4, bias=bias)
    expected = nn.Conv2d(6, 4, kernel_size=1, bias=bias)
    expected.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 3, 5).to(memory_format=memory_format)
    with torch.no_grad():
        output = ours(x)
    assert_close(output, expected(x).detach())
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_wrong_widths_are_refused() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="2x5 and 4x3"):
        Linear(4, 3)(torch.randn(2, 5))


def operators(function: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_onednn_runs_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = layers(6, 8, 5)
    x, name = torch.randn(3, 6), "mkldnn::_linear_pointwise"
    with torch.no_grad():
        assert name in operators(lambda: first(x))
        assert name in operators(lambda: feed_forward(x, first, second, "relu"))
    assert name not in operators(lambda: first(x))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.no_grad():
        assert name not in operators(lambda: first(x))
        assert name not in operators(lambda: first.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize("trained", ["first", "second", "x"])
def test_whatever_asks_for_a_gradient_gets_it(trained: str) -> None:
    first, second = (layer.requires_grad_(False) for layer in layers(6, 8, 5))
    x = torch.randn(3, 6)
    tensors = {"first": first.weight, "second": second.bias, "x": x}
    tensors[trained].requires_grad_()
    feed_forward(x, first, second, "gelu").sum().backward()
    assert tensors[trained].grad is not None


def test_hooks_and_other_layers_are_called() -> None:
    first, second = layers(6, 8, 5)
    calls: list[int] = []
    first.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        feed_forward(torch.randn(3, 6), first, second, "relu")
        assert calls == [1]
        doubled = nn.Sequential(layers(6, 8, 5)[0], nn.Linear(8, 8))
        feed_forward(torch.randn(3, 6), doubled, second, "relu")  # type: ignore[arg-type]


def test_forward_mode_derivatives() -> None:
    layer = Linear(4, 3).requires_grad_(False)
    x, direction = torch.randn(2, 4), torch.randn(2, 4)
    _, derivative = torch.func.jvp(layer, (x,), (direction,))
    assert_close(derivative, direction @ layer.weight.T)


def test_vectors_are_taken_too() -> None:
    first, second = layers(6, 8, 5)
    x = torch.randn(6)
    expected = feed_forward(x, first, second, "relu").detach()
    with torch.no_grad():
        assert_close(feed_forward(x, first, second, "relu"), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_packed_weight_is_used_until_it_changes() -> None:
    layer = Linear(6, 8).requires_grad_(False)
    x = torch.randn(3, 6)
    layer.pack()
    assert layer.weight_for_onednn().is_mkldnn
    assert_close(layer(x.requires_grad_()), F.linear(x, layer.weight, layer.bias))
    layer.weight.mul_(2)
    assert layer.weight_for_onednn() is layer.weight
    layer.pack()
    assert layer.weight_for_onednn().is_mkldnn
    layer.to(torch.bfloat16).to(torch.float32)  # into memory that the first weight may have left
    assert layer.weight_for_onednn() is layer.weight
    layer.double().pack()
    assert layer._packed is None


needs_kernels = pytest.mark.skipif(
    cpu_kernels.why_no_kernels() is not None or not cpu_kernels.has_fast_products(torch.float32),
    reason="needs a C++ compiler and AVX-512",
)
DTYPES = [torch.float32, torch.bfloat16]


def packed(*modules: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """For the kernel, with weights of norms that are not those they start with."""
    for one in modules:
        if isinstance(one, nn.LayerNorm):
            nn.init.normal_(one.weight)
            nn.init.normal_(one.bias)
        one.to(dtype).requires_grad_(False)
        if isinstance(one, PackingLayer):
            one.compiled = True
            one.pack()


def in_double(*modules: nn.Module) -> Any:
    return (copy.deepcopy(one).double() for one in modules)


def fast(dtype: torch.dtype) -> None:
    if not cpu_kernels.has_fast_products(dtype):
        pytest.skip(f"products of {dtype} are oneDNN's here")


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 2, 16), (5, 6, 32), (6, 96, 48), (7, 96, 288), (100, 256, 256), (97, 384, 80), (200, 10, 64), (13, 3072, 128)],
)
def test_the_kernel_multiplies(rows: int, inputs: int, outputs: int, dtype: torch.dtype, calls: list[str]) -> None:
    fast(dtype)
    torch.manual_seed(0)
    layer, bare = Linear(inputs, outputs), Linear(inputs, outputs, bias=False)
    packed(layer, bare, dtype=dtype)
    x = torch.randn(rows, inputs).to(dtype)
    for ours in (layer, bare):
        bias = None if ours.bias is None else ours.bias.double()
        expected = F.linear(x.double(), ours.weight.double(), bias)
        assert relative_error(ours(x), expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert calls == ["linear_layers"] * 2


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_the_kernel_does_what_is_around_a_layer(
    before: bool, after: bool, residual: bool, dtype: torch.dtype, calls: list[str]
) -> None:
    fast(dtype)
    torch.manual_seed(0)
    first, second, single = Linear(48, 80), Linear(80, 96), Linear(48, 96)
    norms = nn.LayerNorm(48), nn.LayerNorm(96)
    packed(first, second, single, *norms, dtype=dtype)
    x, added = torch.randn(3, 67, 48).to(dtype), torch.randn(3, 67, 96).to(dtype) if residual else None
    around = {"before": norms[0] if before else None, "after": norms[1] if after else None, "residual": added}
    ours = project(x, single, **around), feed_forward(x, first, second, "gelu", **around)  # type: ignore[arg-type]

    first, second, single, *doubles = in_double(first, second, single, *norms)
    y = doubles[0](x.double()) if before else x.double()
    for result, branch in zip(ours, (single(y), second(F.gelu(first(y)))), strict=True):
        expected = branch if added is None else branch + added.double()
        expected = doubles[1](expected) if after else expected
        assert result.dtype == dtype
        assert relative_error(result, expected) < (2e-6 if dtype == torch.float32 else 2e-2)
    assert calls == ["linear_layers"] * 2


@needs_kernels
def test_gelu_is_exact_to_rounding() -> None:
    first, second = Linear(16, 16), Linear(16, 16)
    for layer in (first, second):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    packed(first, second)
    x = torch.cat([torch.linspace(-12, 12, 160_001), torch.tensor([0.0, -0.0, 1e-30, 30.0, -30.0, 1e30, -1e30])])
    x = F.pad(x, (0, -len(x) % 16)).view(-1, 16)
    ours, expected = feed_forward(x, first, second, "gelu"), F.gelu(x.double())
    assert (ours - expected).abs().div(1 + expected.abs()).max() < 3e-7
    spoilt = feed_forward(torch.tensor([[torch.nan] * 16, [torch.inf] * 16]), first, second, "gelu")
    assert spoilt.isnan().all()  # infinity times the zeros of the weights


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_is_not_finite_stays_in_its_row(activation: Activation, dtype: torch.dtype) -> None:
    fast(dtype)
    first, second, norm = Linear(32, 64), Linear(64, 32), nn.LayerNorm(32)
    packed(first, second, norm, dtype=dtype)
    x = torch.randn(40, 32).to(dtype)
    expected = feed_forward(x, first, second, activation, residual=x, after=norm)
    x[17, 5] = torch.nan
    ours = feed_forward(x, first, second, activation, residual=x, after=norm)
    assert ours[17].isnan().all()
    rest = torch.arange(40) != 17
    assert torch.equal(ours[rest], expected[rest])


@needs_kernels
def test_threads_change_nothing() -> None:
    first, second, norm = Linear(32, 64), Linear(64, 32), nn.LayerNorm(32)
    packed(first, second, norm)
    x = torch.randn(301, 32)
    alone = feed_forward(x, first, second, "gelu", before=norm, residual=x)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(feed_forward(x, first, second, "gelu", before=norm, residual=x), alone)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_pointwise_convs_by_the_kernel(calls: list[str]) -> None:
    layer = PointwiseConv(32, 48)
    packed(layer)
    x = torch.randn(2, 32, 5, 7)
    expected = F.conv2d(x, layer.weight, layer.bias)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_close(layer(x.contiguous(memory_format=memory_format)), expected)
    assert calls == ["linear_layers"] * 2


@needs_kernels
def test_what_the_kernel_does_not_know(calls: list[str]) -> None:
    first, second, norm = Linear(32, 64), Linear(64, 32), nn.LayerNorm(32)
    packed(first, second, norm)
    x = torch.randn(4, 32)
    plain = second(F.relu(first(x)))
    calls.clear()

    odd = Linear(32, 41)  # not a multiple of 16
    packed(odd)
    assert_close(odd(x), F.linear(x, odd.weight, odd.bias))
    assert project(x, Linear(32, 32), residual=x).shape == (4, 32)  # not packed
    assert project(x[:0], first).shape == (0, 64)
    hooked = copy.deepcopy(norm)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    assert_close(
        feed_forward(x, first, second, "relu", residual=x, after=hooked),
        hooked(x + feed_forward(x, first, second, "relu")),
    )
    assert "linear_layers" in calls  # of the layers one by one
    calls.clear()
    assert_close(feed_forward(x, first, second, "relu", residual=x[:1]), x[:1] + plain)  # broadcasts
    drop = nn.Dropout(0.5).train()
    assert (feed_forward(x, first, second, "relu", residual=torch.zeros_like(x), drop=drop) == 0).any()
    first.weight.mul_(2)  # no longer what was packed
    assert first.weight_for_kernel() is None
    calls.clear()
    assert_close(first(x), F.linear(x, first.weight, first.bias))
    assert calls == []
    with torch.enable_grad():
        second.bias.requires_grad_()
        assert second(torch.randn(2, 64)).requires_grad
    assert calls == []


@needs_kernels
def test_wrong_widths_are_refused_by_pytorch() -> None:
    layer = Linear(32, 64)
    packed(layer)
    with pytest.raises(RuntimeError, match="2x30 and 32x64"):
        layer(torch.randn(2, 30))


@pytest.mark.parametrize("trained", ["before", "after", "residual"])
def test_whatever_is_around_and_asks_for_a_gradient_gets_it(trained: str) -> None:
    first, second = (layer.requires_grad_(False) for layer in layers(6, 8, 6))
    before, after, residual = (
        nn.LayerNorm(6).requires_grad_(False),
        nn.LayerNorm(6).requires_grad_(False),
        torch.ones(6),
    )
    asked = {"before": before.weight, "after": after.bias, "residual": residual}[trained].requires_grad_()
    x = torch.randn(3, 6)
    output = feed_forward(x, first, second, "gelu", before=before, residual=residual, after=after)
    expected = after(residual + second(F.gelu(first(before(x)))))
    assert_close(output, expected)
    gradients = [torch.autograd.grad(y.square().sum(), asked)[0] for y in (output, expected)]
    assert_close(*gradients)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@given(rows=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=20)
def test_what_is_around_in_parts(rows: int, activation: Activation, seed: int) -> None:
    first, second = layers(6, 8, 5, seed)
    before, after = nn.LayerNorm(6), nn.LayerNorm(5)
    x, residual = torch.randn(3, 9, 6), torch.randn(3, 9, 5)
    expected = after(residual + second(ACTIVATIONS[activation](first(before(x))))).detach()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "HIDDEN_BYTES", rows * 8 * 4)
        ours = feed_forward(x, first, second, activation, before=before, residual=residual, after=after)
    assert_close(ours, expected)


@needs_kernels
def test_linear_by_the_kernel_with_a_packed_part_of_a_weight(calls: list[str]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3 * PANEL, 32), torch.randn(5, 32)
    packed_weight = packed_for_kernel(weight)
    assert packed_weight is not None
    for part, packed_part in zip(weight.chunk(3), packed_weight.tensor.chunk(3), strict=True):
        assert_close(linear(x, part, None, packed_part), F.linear(x, part))
    assert calls == ["linear_layers"] * 3
    assert packed_for_kernel(weight.double()) is None

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2f_video.ops import linear as module
from m2f_video.ops.linear import Activation, Linear, PointwiseConv, feed_forward, linear
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
    assert layer.weight_in_order().is_mkldnn
    assert_close(layer(x.requires_grad_()), F.linear(x, layer.weight, layer.bias))
    layer.weight.mul_(2)
    assert layer.weight_in_order() is layer.weight
    layer.pack()
    assert layer.weight_in_order().is_mkldnn
    layer.to(torch.bfloat16).to(torch.float32)  # into memory that the first weight may have left
    assert layer.weight_in_order() is layer.weight
    layer.double().pack()
    assert layer._packed is None

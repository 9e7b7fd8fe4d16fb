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

ACTIVATIONS: dict[Activation | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
}


def layers(inputs: int, hidden: int, outputs: int, seed: int = 0) -> tuple[Linear, Linear]:
    torch.manual_seed(seed)
    return Linear(inputs, hidden), Linear(hidden, outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=30)
def test_linear_is_the_plain_one(shape: list[int], bias: bool, activation: Activation | None, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight, offset = torch.randn(*shape, 6), torch.randn(4, 6), torch.randn(4) if bias else None
    with torch.no_grad():
        ours = linear(x, weight, offset, activation)
    assert_close(ours, ACTIVATIONS[activation](F.linear(x, weight, offset)))


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
    with torch.no_grad(), pytest.raises(RuntimeError):
        Linear(4, 3)(torch.randn(2, 5))

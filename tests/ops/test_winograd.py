import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2f_video.ops import cpu_kernels
from m2f_video.ops.winograd import WinogradConv
from tests.tolerances import assert_close, relative_error

needs_kernels = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs a C++ compiler")
ERROR = 2e-6  # of the largest result: what the plain convolution has at 256 channels


def convolution(inputs: int = 32, outputs: int = 32, seed: int = 0) -> WinogradConv:
    torch.manual_seed(seed)
    layer = WinogradConv(inputs, outputs).requires_grad_(False)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    layer.compiled = True
    layer.pack()
    return layer


def image(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def error(ours: Tensor, x: Tensor, weight: Tensor) -> float:
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max() / expected.abs().max())


def uses_kernel(layer: WinogradConv, x: Tensor) -> bool:
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "call", lambda name, *_: called.append(name))
        layer(x)
    return called == ["winograd_convolution"]


@needs_kernels
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 9), (3, 2), (4, 4), (5, 8), (8, 5), (13, 31), (30, 54)],
)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 80), (80, 32)])
def test_kernel_is_a_convolution(shape: tuple[int, int], inputs: int, outputs: int) -> None:
    layer, x = convolution(inputs, outputs), image(2, inputs, *shape)
    assert uses_kernel(layer, x)
    ours = layer(x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert error(ours, x, layer.weight) < ERROR


@needs_kernels
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=30)
def test_any_size(batch: int, height: int, width: int, inputs: int, outputs: int, seed: int) -> None:
    layer = convolution(inputs * 16, outputs * 16, seed)
    x = image(batch, inputs * 16, height, width)
    assert error(layer(x), x, layer.weight) < ERROR


@needs_kernels
def test_error_at_many_channels_is_no_larger() -> None:
    layer, x = convolution(256, 256), image(1, 256, 24, 36)
    ours = layer(x)
    assert error(ours, x, layer.weight) < 1.5e-6
    assert relative_error(ours, F.conv2d(x.double(), layer.weight.double(), padding=1)) < 8e-7  # the plain one's: 9e-7


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    layer, x = convolution(), image(2, 32, 33, 35)
    expected, before = layer(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_frames_of_a_batch_do_not_touch_each_other() -> None:
    layer, x = convolution(), image(3, 32, 6, 7)
    together = layer(x)
    for frame, alone in zip(together, x, strict=True):
        assert torch.equal(frame, layer(alone[None])[0])


@needs_kernels
@pytest.mark.parametrize("order", ["channels first", "a view", "every other column"])
def test_other_orders_in_memory(order: str) -> None:
    layer = convolution()
    x = {
        "channels first": torch.randn(2, 32, 6, 7),
        "a view": image(2, 40, 6, 7)[:, 3:35],
        "every other column": image(2, 32, 6, 14)[..., ::2],
    }[order]
    assert uses_kernel(layer, x)
    assert error(layer(x), x, layer.weight) < ERROR


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_reaches_its_neighbours_only(value: float) -> None:
    layer, x = convolution(), image(1, 32, 16, 20)
    clean = layer(x)
    x[0, 5, 9, 4] = value  # at the left edge of the tile of rows 8 to 11 and columns 4 to 7
    ours = layer(x)
    assert not ours[:, :, 8:11, 3:6].isfinite().any()
    reached = torch.zeros(16, 20, dtype=torch.bool)
    reached[8:12, 0:8] = True
    assert torch.equal(ours[..., ~reached], clean[..., ~reached])


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (8, 8)])
@pytest.mark.parametrize("start", [15, 16])
def test_what_lies_around_the_map_is_not_read(shape: tuple[int, int], start: int) -> None:
    layer, number = convolution(), 32 * shape[0] * shape[1]
    memory = torch.full((number + 32,), float("nan"))
    memory[start : start + number] = torch.randn(number)
    x = memory[start : start + number].view(1, *shape, 32).permute(0, 3, 1, 2)
    assert uses_kernel(layer, x)
    assert error(layer(x), x, layer.weight) < ERROR


def test_gradients_are_the_plain_ones() -> None:
    layer = convolution(16, 16).requires_grad_()
    layer.pack()
    x = image(1, 16, 5, 6).requires_grad_()
    layer(x).square().sum().backward()
    expected = torch.autograd.grad(F.conv2d(x, layer.weight, padding=1).square().sum(), (x, layer.weight))
    for one, other in zip((x.grad, layer.weight.grad), expected, strict=True):
        assert one is not None
        assert_close(one, other)


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_whatever_asks_for_a_gradient_gets_it(trained: str) -> None:
    layer, x = convolution(16, 16), image(1, 16, 5, 6)
    tensor = {"x": x, "weight": layer.weight}[trained].requires_grad_()
    layer(x).sum().backward()
    assert tensor.grad is not None


def test_forward_mode_derivatives() -> None:
    layer, x, direction = convolution(), image(1, 32, 5, 6), image(1, 32, 5, 6)
    _, derivative = torch.func.jvp(layer, (x,), (direction,))
    assert_close(derivative, F.conv2d(direction, layer.weight, padding=1))


@needs_kernels
def test_maps_in_bfloat16_are_rounded_at_the_end_alone() -> None:
    layer, x = convolution().to(torch.bfloat16), image(2, 32, 9, 13).to(torch.bfloat16)
    layer.pack()
    assert uses_kernel(layer, x)
    expected = F.conv2d(x.double(), layer.weight.double(), padding=1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=1e-4)


def test_float64_runs_the_plain_way() -> None:
    dtype = torch.float64
    layer, x = convolution().to(dtype), image(1, 32, 5, 6).to(dtype)
    expected = F.conv2d(x, layer.weight, padding=1)
    assert torch.equal(layer(x), expected)
    layer.pack()
    assert layer._packed is None
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 16), (16, 24)])
def test_other_numbers_of_channels_run_the_plain_way(inputs: int, outputs: int) -> None:
    layer, x = convolution(inputs, outputs), image(1, inputs, 5, 6)
    assert layer._packed is None
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, padding=1))


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution()(image(1, 32, 5, 6)).dtype == torch.bfloat16


def test_nothing_runs_in_the_kernel_unasked() -> None:
    layer, x = convolution(), image(1, 32, 5, 6)
    assert uses_kernel(layer, x)
    layer.compiled = False
    assert not uses_kernel(layer, x)
    fresh = WinogradConv(32, 32).requires_grad_(False)
    fresh.compiled = True
    assert not uses_kernel(fresh, x)  # not packed


@needs_kernels
def test_a_changed_weight_is_not_used_stale() -> None:
    layer, x = convolution(), image(1, 32, 5, 6)
    layer.weight.mul_(2)
    assert not uses_kernel(layer, x)
    assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))
    layer.pack()
    assert uses_kernel(layer, x)
    assert error(layer(x), x, layer.weight) < ERROR
    layer.weight = nn.Parameter(torch.randn(32, 32, 3, 3), requires_grad=False)
    assert not uses_kernel(layer, x)


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_a_rounded_weight_is_not_taken_for_the_packed_one(channels: int) -> None:
    layer, x = convolution(channels, channels), image(1, channels, 5, 6)
    layer.to(torch.bfloat16).to(torch.float32)  # into memory that the first weight has left
    assert not uses_kernel(layer, x)


def test_weights_of_inference_mode_are_not_packed() -> None:
    with torch.inference_mode():
        layer = WinogradConv(16, 16)
    layer.pack()
    assert layer._packed is None


def test_state_dict_is_the_plain_one() -> None:
    layer, plain = convolution(16, 32), nn.Conv2d(16, 32, 3, padding=1, bias=False)
    plain.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["weight"]
    assert torch.equal(plain.weight, layer.weight)


def test_copies_lose_the_packed_weight() -> None:
    layer, x = convolution(), image(1, 32, 5, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._packed is None
        assert torch.equal(other(x), F.conv2d(x, layer.weight, padding=1))
        other.pack()
        assert uses_kernel(other, x)


@pytest.mark.parametrize("shape", [(1, 31, 5, 6), (1, 32, 5), (32,)])
def test_wrong_shapes_are_refused_as_ever(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="xpected"):
        convolution()(torch.randn(shape))


@pytest.mark.parametrize("shape", [(0, 32, 5, 6), (32, 5, 6)])
def test_empty_batches_and_single_images_run_the_plain_way(shape: tuple[int, ...]) -> None:
    layer, x = convolution(), torch.randn(shape)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, padding=1))

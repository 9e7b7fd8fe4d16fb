"""Deformable attention by Triton kernels, forward and backward: the path on CUDA devices.

A row is one (query, head) of one batch item, R = B Q M of them in the memory order of locations, weights and output. A
program takes a block of rows, so that it reads and writes these in one piece, and all D channels of a pixel at once.

The locations and weights of a row belong to one program, so their gradients are stored plainly. Gradients of the values
are added from everywhere by atomic operations, in an order that changes from run to run, and float sums with it. After
`torch.use_deterministic_algorithms(True)` they are added as integers, whose sum does not depend on the order.

The first call for a model, dtype and order of magnitude of R tries a few launch configurations (some seconds, mostly
of compiling). That cannot be recorded: before recording a CUDA graph, call once.

Importing this module imports triton. With TRITON_INTERPRET=1, set before that, the kernels run on CPU tensors, slowly.

B batch, N tokens of all levels, Q queries, M heads, D channels of a head, L levels, P points, R rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (kernels are written in Triton's language, whose types mypy does not know)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from m2f_video.ops.reference import Shapes

_UNSPECIALIZED = ["rows", "queries", "tokens", "size_class"]  # else a kernel is compiled anew where 16 divides them


@triton.jit
def _locate(location, row_ok, height, width):
    """Where to read the samples whose x is at the pointers `location`, and y behind it.

    Returns row and column, int32, of the upper left of the four pixels around each; how far below and beside it they
    are, in pixels; and whether any of the four is inside the level. Where none is (or NaN), the others are 0.
    """
    x = tl.load(location, mask=row_ok, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(location + 1, mask=row_ok, other=0.0).to(tl.float32) * height - 0.5
    inside = row_ok & (x > -1) & (x < width) & (y > -1) & (y < height)
    x = tl.where(inside, x, 0.0)  # what is outside may be too large for an integer
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, inside


@triton.jit
def _pixel(top, left, height, width, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """Number in its level, int32, of the pixel DOWN and RIGHT (0 or 1) of another, and whether there is one."""
    row = top + DOWN
    column = left + RIGHT
    return row * width.to(tl.int32) + column, (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward_kernel(
    value,  # (B, N, M, D)
    locations,  # (R, L, P, 2)
    weights,  # (R, L, P)
    output,  # (R, D)
    sizes,  # 2 L floats: height and width of each level
    rows,
    queries,
    tokens,
    size_class,  # read by the autotuner alone
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ok = row < rows
    channel = tl.arange(0, CHANNEL_BLOCK)[None, :]
    channel_ok = channel < CHANNELS
    first = row // HEADS // queries * tokens  # token of the row's batch item, then of the level
    total = tl.zeros((BLOCK, CHANNEL_BLOCK), tl.float32)
    for level in tl.static_range(LEVELS):
        height = sizes[2 * level]
        width = sizes[2 * level + 1]
        for point in range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            top, left, below, beside, inside = _locate(locations + 2 * sample, row_ok, height, width)
            weight = tl.load(weights + sample, mask=row_ok, other=0.0).to(tl.float32)
            for corner in tl.static_range(4):
                pixel, exists = _pixel(top, left, height, width, corner // 2, corner % 2)
                vector = (((first + pixel) * HEADS + row % HEADS) * CHANNELS)[:, None] + channel
                mask = (inside & exists)[:, None] & channel_ok
                read = tl.load(value + vector, mask=mask, other=0.0).to(tl.float32)
                # below and beside where DOWN and RIGHT are 1, what they leave of 1 where these are 0
                share = tl.abs(1 - corner // 2 - below) * tl.abs(1 - corner % 2 - beside)
                total += (share * weight)[:, None] * read
        first += height.to(tl.int32) * width.to(tl.int32)
    tl.store(output + row[:, None] * CHANNELS + channel, total, mask=row_ok[:, None] & channel_ok)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward_kernel(
    value,  # (B, N, M, D)
    locations,  # (R, L, P, 2)
    weights,  # (R, L, P)
    grad_output,  # (R, D)
    grad_value,  # (B, N, M, D), zeros: float32, or int64 with a scale
    grad_locations,  # (R, L, P, 2)
    grad_weights,  # (R, L, P)
    scale,  # (), float64: what counts as 1 in an integer grad_value is 1 / scale; None for a float32 one
    sizes,  # 2 L floats: height and width of each level
    rows,
    queries,
    tokens,
    size_class,  # read by the autotuner alone
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ok = row < rows
    channel = tl.arange(0, CHANNEL_BLOCK)[None, :]
    channel_ok = channel < CHANNELS
    first = row // HEADS // queries * tokens  # token of the row's batch item, then of the level
    cell = row[:, None] * CHANNELS + channel
    grad = tl.load(grad_output + cell, mask=row_ok[:, None] & channel_ok, other=0.0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale)
    for level in tl.static_range(LEVELS):
        height = sizes[2 * level]
        width = sizes[2 * level + 1]
        for point in range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            top, left, below, beside, inside = _locate(locations + 2 * sample, row_ok, height, width)
            weight = tl.load(weights + sample, mask=row_ok, other=0.0).to(tl.float32)
            sampled = tl.zeros((BLOCK,), tl.float32)  # the value there and its slopes, each times the output gradient
            slope_y = tl.zeros((BLOCK,), tl.float32)
            slope_x = tl.zeros((BLOCK,), tl.float32)
            for corner in tl.static_range(4):
                pixel, exists = _pixel(top, left, height, width, corner // 2, corner % 2)
                vector = (((first + pixel) * HEADS + row % HEADS) * CHANNELS)[:, None] + channel
                mask = (inside & exists)[:, None] & channel_ok
                read = tl.load(value + vector, mask=mask, other=0.0).to(tl.float32)
                product = tl.sum(grad * read, axis=1)
                share_y = tl.abs(1 - corner // 2 - below)
                share_x = tl.abs(1 - corner % 2 - beside)
                sampled += share_y * share_x * product
                slope_y += (corner // 2 * 2 - 1) * share_x * product
                slope_x += (corner % 2 * 2 - 1) * share_y * product
                contribution = (share_y * share_x * weight)[:, None] * grad
                if scale is not None:
                    contribution = (contribution.to(tl.float64) * factor).to(tl.int64)
                tl.atomic_add(grad_value + vector, contribution, mask=mask, sem="relaxed")
            tl.store(grad_locations + 2 * sample, slope_x * weight * width, mask=row_ok)
            tl.store(grad_locations + 2 * sample + 1, slope_y * weight * height, mask=row_ok)
            tl.store(grad_weights + sample, sampled, mask=row_ok)
        first += height.to(tl.int32) * width.to(tl.int32)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, which takes CPU tensors: TRITON_INTERPRET=1 was set."""

_DEFAULT = {"BLOCK": 32, "num_warps": 8}
_TUNING: dict[str, Any] = {
    "configs": [
        triton.Config({"BLOCK": block}, num_warps=warps)
        for block, warps in ((8, 1), (16, 2), (16, 4), (32, 4), (32, 8), (64, 8))
    ],
    "key": ["size_class", "HEADS", "LEVELS", "POINTS", "CHANNELS"],  # and the dtypes, always
}
_tuned_forward_kernel = triton.autotune(**_TUNING)(_forward_kernel)
_tuned_backward_kernel = triton.autotune(**_TUNING, reset_to_zero=["grad_value"])(_backward_kernel)


def ms_deform_attn_triton(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values; arguments and result as `m2f_video.ops.ms_deform_attn`.

    Every tensor is float32, bfloat16 or float16, each for itself, on one CUDA device. Computed in float32.
    """
    sizes = [size for shape in spatial_shapes for size in shape]
    return _forward_op(value, sizes, sampling_locations, attention_weights)


# Custom operators, opaque to torch.compile and torch.export: one node of the graph each.


@torch.library.custom_op("m2f_video::ms_deform_attn", mutates_args=())
def _forward_op(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    output = _empty_output(value, sizes, locations, weights)
    kernel = _forward_kernel if _fixed_config() else _tuned_forward_kernel
    _launch(kernel, sizes, value, locations, weights, output)
    return output


@_forward_op.register_fake
def _empty_output(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    B, Q, M = locations.shape[:3]
    return value.new_empty(B, Q, M * value.shape[-1])


@torch.library.custom_op("m2f_video::ms_deform_attn_backward", mutates_args=())
def _backward_op(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    grad_output = grad_output.contiguous()
    _, grad_locations, grad_weights = _empty_gradients(value, sizes, locations, weights, grad_output)
    inputs = (value, locations, weights, grad_output)
    if torch.are_deterministic_algorithms_enabled():
        unit = _fixed_point_unit(weights, grad_output)
        counts = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
        _launch(_backward_kernel, sizes, *inputs, counts, grad_locations, grad_weights, 1 / unit)
        return (counts * unit).to(value.dtype), grad_locations, grad_weights
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    kernel = _backward_kernel if _fixed_config() else _tuned_backward_kernel
    _launch(kernel, sizes, *inputs, grad_value, grad_locations, grad_weights, None)
    return grad_value.to(value.dtype), grad_locations, grad_weights


@_backward_op.register_fake
def _empty_gradients(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Sequence[int], Tensor, Tensor], output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _backward_op(value, ctx.sizes, locations, weights, grad_output)
    return grad_value, None, grad_locations, grad_weights


_forward_op.register_autograd(_gradients, setup_context=_save_inputs)


def _fixed_config() -> bool:
    """Whether to launch without the autotuner, whose choice may differ from run to run and round sums differently."""
    return INTERPRETED or torch.are_deterministic_algorithms_enabled()


def _fixed_point_unit(weights: Tensor, grad_output: Tensor) -> Tensor:
    """What one count of the integer gradient of the values stands for, float64 (), computed without a host sync.

    A point of a query adds to a pixel once at most, and no more than the largest weight times the largest output
    gradient. If all points of a level did, the sum would be 2^62 counts, so it never overflows. A count is then 2^-47
    of the largest addition possible in a frame of 480x864: rounding to counts is below float32's own, but for values
    whose gradients are millions of times smaller than the largest. If any output gradient or weight is infinite or
    NaN, every gradient of the values is.
    """
    Q, P = weights.shape[1], weights.shape[-1]
    if weights.numel() == 0 or grad_output.numel() == 0:
        return torch.ones((), dtype=torch.float64, device=weights.device)
    limit = weights.abs().amax().double() * grad_output.abs().amax().double() * (Q * P)
    return limit.clamp(min=1e-200) / 2**62  # not zero, if all of them are


def _launch(
    kernel: Any, sizes: Sequence[int], value: Tensor, locations: Tensor, weights: Tensor, *others: Tensor | None
) -> None:
    """Run a kernel, whose other tensors are `others`, on all rows."""
    B, Q, M, L, P = weights.shape
    _, N, _, D = value.shape
    rows = B * Q * M
    if rows == 0:
        return
    is_tuned = isinstance(kernel, Autotuner)

    def grid(config: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, config["BLOCK"]),)

    with torch.cuda.device_of(value):  # Triton launches on the current device
        kernel[grid](
            value,
            locations,
            weights,
            *others,
            tuple(float(size) for size in sizes),  # not integers, as for _UNSPECIALIZED, which ignores tuples
            rows,
            Q,
            N,
            rows.bit_length(),
            HEADS=M,
            LEVELS=L,
            POINTS=P,
            CHANNELS=D,
            CHANNEL_BLOCK=triton.next_power_of_2(D),
            **({} if is_tuned else _DEFAULT),
        )

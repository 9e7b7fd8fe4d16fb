"""Deformable attention by `embedding_bag`: the path on CPU, for inference and training.

Sampling bilinearly with zero padding and summing over levels and points is, for each query and head, a weighted sum of
rows of the value matrix: L P rows for each of the four corners. `embedding_bag` computes such sums in one pass,
without the (B M, D, Q, P) tensors of the grid_sample way; what remains is making row numbers and weights cheaply.
Autograd differentiates the making of the weights; the sums have a backward of their own (`weighted_row_sums`).

B batch, N tokens of all levels, Q queries, M heads, D channels of a head, L levels, P points.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f_video.ops.conditions import needs_gradient

CHUNK_BYTES = 2**19
"""Of a chunk's x or y: with no gradient to keep things for, queries are worked on in parts that stay in a cache."""

Corners = tuple[tuple[Tensor, Tensor], ...]
"""Rows and weights (B, Q, M L P) of the upper left, upper right, lower left and lower right corner of every sample.
Rows are int32: they count value vectors, of which no machine holds 2^31."""


def ms_deform_attn_embedding_bag(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values; arguments and result as `m2f_video.ops.ms_deform_attn`."""
    grid = _grid(spatial_shapes, sampling_locations, sampling_locations.dtype)
    locations, weights = sampling_locations.flatten(2), attention_weights.flatten(2)
    keeps = needs_gradient(value, locations, weights)
    return _sums(value, spatial_shapes, grid, _corners_at_locations, (locations, weights), None, in_parts=not keeps)


def ms_deform_attn_embedding_bag_from_offsets(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The same from what a module predicts; arguments and result as `m2f_video.ops.ms_deform_attn_from_offsets`."""
    grid = _grid(spatial_shapes, offsets, reference_points.dtype)
    keeps = needs_gradient(value, offsets, attention_logits)
    predicted = offsets.flatten(2), attention_logits.flatten(2)
    return _sums(value, spatial_shapes, grid, _corners_at_offsets, predicted, reference_points, in_parts=not keeps)


def _sums(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    grid: "_Grid",
    corners: Callable[..., Corners],
    samples: tuple[Tensor, Tensor],
    reference_points: Tensor | None,
    in_parts: bool,
) -> Tensor:
    """Sum the rows at the `corners` of the samples, (B, Q, ...) each: (B, Q, M * D)."""
    (B, Q, _), (M, D) = samples[0].shape, value.shape[2:]
    table = _pad_levels(value, spatial_shapes).view(-1, D)

    def attend(part: slice) -> Tensor:
        constants = (grid,) if reference_points is None else (reference_points[part], grid)
        upper_left, upper_right, lower_left, lower_right = (
            weighted_row_sums(table, rows.view(-1, grid.samples), weights.view(-1, grid.samples).to(value.dtype))
            for rows, weights in corners(*(tensor[:, part] for tensor in samples), *constants)
        )
        return upper_left.add_(upper_right).add_(lower_left).add_(lower_right).view(B, -1, M * D)

    if not in_parts or torch.compiler.is_compiling():
        return attend(slice(None))
    output = value.new_empty(B, Q, M * D)
    step = max(CHUNK_BYTES // (B * grid.width.nbytes), 1)
    for start in range(0, Q, step):
        part = slice(start, start + step)
        output[:, part] = attend(part)
    return output


class _Grid(NamedTuple):
    """Constants that turn positions into rows of the padded value table.

    The elementwise work runs on (B, Q, M L P) tensors with constants of the last axis: long contiguous rows, where
    broadcasting along (L, P) itself would leave inner loops of P elements and cost several times as much.
    """

    heads: int  # M
    samples: int  # L P
    width: Tensor  # (M L P,): of the sample's level
    height: Tensor  # (M L P,)
    before: Tensor  # (M L P,): -1
    down: Tensor  # (M L P,) int32: rows from a pixel to the one below it
    origin: Tensor  # (M L P,) int32: row of the level's first pixel
    batch: Tensor  # (B, 1, 1) int32: rows before those of a batch item


def _grid(spatial_shapes: tuple[tuple[int, int], ...], samples: Tensor, dtype: torch.dtype) -> _Grid:
    """Constants for samples (B, Q, M, L, P, 2), whose positions are of this dtype."""
    (B, _, M, L, P, _), device = samples.shape, samples.device

    def per_sample(level_values: Tensor) -> Tensor:  # (L,) -> (M L P,)
        return level_values[None, :, None].expand(M, L, P).reshape(-1)

    heights, widths = torch.tensor(spatial_shapes, device=device).unbind(1)
    padded_widths = widths + 2
    areas = padded_widths * (heights + 2)
    first_inner = areas.cumsum(0) - areas + padded_widths + 1  # pixel (0, 0) of each level in the padded tokens
    padded_length = sum((h + 2) * (w + 2) for h, w in spatial_shapes)
    head = torch.arange(M, device=device, dtype=torch.int32).repeat_interleave(L * P)
    width = per_sample(widths.to(dtype))
    return _Grid(
        heads=M,
        samples=L * P,
        width=width,
        height=per_sample(heights.to(dtype)),
        before=torch.full_like(width, -1),
        down=per_sample((padded_widths * M).int()),
        origin=per_sample((first_inner * M).int()) + head,
        batch=torch.arange(B, device=device, dtype=torch.int32)[:, None, None] * (padded_length * M),
    )


def _corners_at_locations(locations: Tensor, attention_weights: Tensor, grid: _Grid) -> Corners:
    """Of relative locations (B, Q, 2 M L P) and their weights (B, Q, M L P)."""
    x, y = locations[..., 0::2], locations[..., 1::2]
    return _corners(x * grid.width - 0.5, y * grid.height - 0.5, attention_weights, grid)


def _corners_at_offsets(offsets: Tensor, attention_logits: Tensor, reference_points: Tensor, grid: _Grid) -> Corners:
    """Of offsets (B, Q, 2 M L P), in pixels, from points (Q, 2), and logits (B, Q, M L P) of their weights."""
    dtype = reference_points.dtype
    weights = _softmax(attention_logits.to(dtype).unflatten(2, (grid.heads, grid.samples))).flatten(2)
    x = offsets[..., 0::2].to(dtype) + (reference_points[:, :1] * grid.width - 0.5)
    y = offsets[..., 1::2].to(dtype) + (reference_points[:, 1:] * grid.height - 0.5)
    return _corners(x, y, weights, grid)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last axis. For a dozen samples a head, PyTorch's own takes three times as long, forward."""
    if needs_gradient(logits) or torch.compiler.is_compiling():
        return logits.softmax(-1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


def _corners(x: Tensor, y: Tensor, attention_weights: Tensor, grid: _Grid) -> Corners:
    """Of positions (B, Q, M L P) in pixels, 0 being the centre of the level's first one."""
    left, x_fraction = _cell(x, grid.width, grid.before)
    upper, y_fraction = _cell(y, grid.height, grid.before)
    rows = upper * grid.down
    rows.add_(left, alpha=grid.heads).add_(grid.origin).add_(grid.batch)

    # (1-x)(1-y), x(1-y), (1-x)y and xy times the attention weight, by one product and one difference each
    weights = attention_weights.to(x.dtype)
    right_weights = x_fraction * weights
    left_weights = weights - right_weights
    lower_right, lower_left = right_weights * y_fraction, left_weights * y_fraction
    return (
        (rows, left_weights - lower_left),
        (rows + grid.heads, right_weights - lower_right),
        (rows + grid.down, lower_left),
        (rows + (grid.down + grid.heads), lower_right),
    )


def _cell(position: Tensor, size: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Last pixel at or before a position, int32, and the rest of the way to the next one, 0 to 1.

    A position beyond half a pixel outside moves to the zero border, where its contribution is zero as well, and so does
    NaN: no row number may be out of range.
    """
    position = torch.clamp(position, before, size).nan_to_num(nan=-1.0)
    pixel = torch.minimum(position.detach().floor(), size - 1)  # so that the pixel after it exists
    return pixel.int(), position - pixel


def _pad_levels(value: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Surround every level by one zero pixel, so that a corner outside needs no mask: its row is zero.

    (B, N, M, D) -> (B, sum of (H + 2)(W + 2), M, D)
    """
    B, _, M, D = value.shape
    padded = value.new_zeros(B, sum((h + 2) * (w + 2) for h, w in spatial_shapes), M, D)
    start = padded_start = 0
    for height, width in spatial_shapes:
        stop, padded_stop = start + height * width, padded_start + (height + 2) * (width + 2)
        inner = padded[:, padded_start:padded_stop].view(B, height + 2, width + 2, M, D)[:, 1:-1, 1:-1]
        inner.copy_(value[:, start:stop].view(B, height, width, M, D))
        start, padded_start = stop, padded_stop
    return padded


def weighted_row_sums(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums of rows of a table: `output[i] = sum over k of weights[i, k] * table[rows[i, k]]`.

    The gradient of the table is a product with a sparse matrix, which is an order of magnitude faster than
    `embedding_bag`'s own backward or `index_add_`, and reproducible. There are no second derivatives.

    Args:
        table: (R, D).
        rows: (S, k) int32 or int64, 0 to R - 1, k at least 1.
        weights: (S, k), in the dtype of `table`.

    Returns:
        (S, D).
    """
    if torch.is_grad_enabled() and (table.requires_grad or weights.requires_grad):
        return _WeightedRowSums.apply(table, rows, weights)
    return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")


class _WeightedRowSums(torch.autograd.Function):
    """`embedding_bag` with another backward."""

    @staticmethod
    def forward(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        table, rows, weights = ctx.saved_tensors
        dtype = torch.promote_types(table.dtype, torch.float32)
        grads = _weighted_row_sums_backward(table.to(dtype), rows, weights.to(dtype), grad.to(dtype))
        return grads[0].to(table.dtype), None, grads[1].to(weights.dtype)


@torch.library.custom_op("m2f_video::weighted_row_sums_backward", mutates_args=())
def _weighted_row_sums_backward(table: Tensor, rows: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of table and weights: `weights[i, k] * grad[i]` added to row `rows[i, k]`, and `grad[i] . that row`.

    Both are products of the sparse (S, R) matrix that has the weights at `rows`: transposed times `grad`, and
    `grad times table transposed` at its entries.
    """
    if grad.device.type != "cpu":
        products = weights[:, :, None] * grad[:, None, :]
        grad_table = torch.zeros_like(table).index_add_(0, rows.flatten(), products.flatten(0, 1))
        return grad_table, (table[rows] * grad[:, None, :]).sum(2)
    from scipy.sparse import csr_array

    (S, k), R = rows.shape, len(table)
    grad = grad.contiguous()
    index = torch.int64 if S * k >= 2**31 else rows.dtype
    starts, columns = torch.arange(S + 1, dtype=index) * k, rows.flatten().to(index)
    transposed = csr_array((weights.flatten().numpy(), columns.numpy(), starts.numpy()), shape=(S, R)).T
    with warnings.catch_warnings():  # that sparse tensors are in beta
        warnings.simplefilter("ignore", UserWarning)
        # unchecked, because a row's columns are neither sorted nor unique, which these products do not need
        zeros = torch.zeros_like(weights).flatten()
        pattern = torch.sparse_csr_tensor(starts, columns, zeros, (S, R), check_invariants=False)
        products = torch.sparse.sampled_addmm(pattern, grad, table.T, beta=0.0)
    return torch.from_numpy(transposed @ grad.numpy()), products.values().view(S, k)


@_weighted_row_sums_backward.register_fake
def _(table: Tensor, rows: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(weights)

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

from m2f_video.ops.reference import Shapes

CHUNK_BYTES = 2**19
"""Of a chunk's x or y: with no gradient to keep things for, queries are worked on in parts that stay in a cache."""

BORDER = 3
"""Rows, and columns, of zeros around a level: one before it, two behind, as a sample on one reads the next as well."""

Corners = tuple[tuple[Tensor, Tensor], ...]
"""Rows and weights (B, Q, M L P) of the upper left, upper right, lower left and lower right corner of every sample.
Rows are int32: they count value vectors, of which no machine holds 2^31."""


def ms_deform_attn_embedding_bag(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values; arguments and result as `m2f_video.ops.ms_deform_attn`."""
    grid = _grid(spatial_shapes, sampling_locations, torch.promote_types(sampling_locations.dtype, torch.float32))
    samples = *_axes(sampling_locations), attention_weights.flatten(2)
    return _sums(value, spatial_shapes, grid, _corners_at_locations, samples, None)


def ms_deform_attn_embedding_bag_from_offsets(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The same from what a module predicts; arguments and result as `m2f_video.ops.ms_deform_attn_from_offsets`."""
    grid = _grid(spatial_shapes, offsets, reference_points.dtype)
    samples = *_axes(offsets), attention_logits.flatten(2)
    return _sums(value, spatial_shapes, grid, _corners_at_offsets, samples, reference_points)


def _axes(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The x and the y (B, Q, M L P) of positions (B, Q, M, L, P, 2): views, even where all x come before all y."""
    return positions[..., 0].flatten(2), positions[..., 1].flatten(2)


def _sums(
    value: Tensor,
    spatial_shapes: Shapes,
    grid: "_Grid",
    corners: Callable[..., Corners],
    samples: tuple[Tensor, Tensor, Tensor],
    reference_points: Tensor | None,
) -> Tensor:
    """Sum the rows at the `corners` of the samples, x, y and what weighs them, (B, Q, M L P) each: (B, Q, M * D)."""
    (B, Q, _), (M, D) = samples[0].shape, value.shape[2:]
    table = _pad_levels(value, spatial_shapes).view(-1, D)
    starts = torch.arange(0, B * Q * M * grid.samples, grid.samples, dtype=torch.int32, device=value.device)

    def sums(rows: Tensor, weights: Tensor) -> Tensor:
        rows, weights = rows.view(-1, grid.samples), weights.to(value.dtype).view(-1, grid.samples)
        return weighted_row_sums(table, rows, weights, starts[: rows.shape[0]])

    def attend(part: slice) -> Tensor:
        constants = (grid,) if reference_points is None else (reference_points[part], grid)
        upper_left, upper_right, lower_left, lower_right = (
            sums(*corner) for corner in corners(*(tensor[:, part] for tensor in samples), *constants)
        )
        return upper_left.add_(upper_right).add_(lower_left).add_(lower_right).view(B, -1, M * D)

    learns = torch.is_grad_enabled() and (value.requires_grad or any(tensor.requires_grad for tensor in samples))
    if learns or torch.compiler.is_compiling():  # which keep what all parts need
        return attend(slice(None))
    output = value.new_empty(B, Q, M * D)
    step = max(CHUNK_BYTES // max(B * grid.width.nbytes, 1), 1)
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
    width: Tensor  # (M L P,): of the sample's level, without its border
    height: Tensor  # (M L P,)
    first: Tensor  # (): of a border's rows and columns, 0
    last_column: Tensor  # (M L P,): right of the level that a sample may lie on
    last_row: Tensor  # (M L P,)
    down: Tensor  # (M L P,) int32: rows from a pixel to the one below it
    origin: Tensor  # (B, 1, M L P) int32: row of the upper left corner of the level's border


def _grid(spatial_shapes: Shapes, samples: Tensor, dtype: torch.dtype) -> _Grid:
    """Constants for samples (B, Q, M, L, P, 2), whose positions are of this dtype."""
    (B, _, M, L, P, _), device = samples.shape, samples.device

    def per_sample(level_values: Tensor) -> Tensor:  # (L,) -> (M L P,)
        return level_values[None, :, None].expand(M, L, P).reshape(-1)

    heights, widths = torch.tensor(spatial_shapes, device=device).unbind(1)
    areas = (heights + BORDER) * (widths + BORDER)
    head = torch.arange(M, device=device, dtype=torch.int32).repeat_interleave(L * P)
    batch = torch.arange(B, device=device, dtype=torch.int32)[:, None, None] * (areas.sum() * M).int()
    width, height = per_sample(widths.to(dtype)), per_sample(heights.to(dtype))
    return _Grid(
        heads=M,
        samples=L * P,
        width=width,
        height=height,
        first=width.new_zeros(()),
        last_column=width + 1,
        last_row=height + 1,
        down=per_sample(((widths + BORDER) * M).int()),
        origin=per_sample(((areas.cumsum(0) - areas) * M).int()) + head + batch,
    )


def _corners_at_locations(x: Tensor, y: Tensor, attention_weights: Tensor, grid: _Grid) -> Corners:
    """Of relative locations, (B, Q, M L P) as all here."""
    return _corners(x * grid.width, y * grid.height, attention_weights, grid)


def _corners_at_offsets(
    x: Tensor, y: Tensor, attention_logits: Tensor, reference_points: Tensor, grid: _Grid
) -> Corners:
    """Of offsets from points (Q, 2), in pixels, and the logits of their weights."""
    dtype = reference_points.dtype
    weights = _softmax(attention_logits.to(dtype).unflatten(2, (grid.heads, grid.samples))).flatten(2)
    x = torch.addcmul(x.to(dtype), reference_points[:, :1], grid.width)
    y = torch.addcmul(y.to(dtype), reference_points[:, 1:], grid.height)
    return _corners(x, y, weights, grid)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last axis. For a dozen samples a head, PyTorch's own takes twice as long."""
    weights = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def _corners(x: Tensor, y: Tensor, attention_weights: Tensor, grid: _Grid) -> Corners:
    """Of positions in pixels, 0 being the outer edge of the level's first one."""
    left, x_fraction = _cell(x, grid.first, grid.last_column)
    upper, y_fraction = _cell(y, grid.first, grid.last_row)
    rows = (upper * grid.down).add_(left, alpha=grid.heads).add_(grid.origin)

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


def _cell(position: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Last pixel whose centre is at or before a position, int32, and the rest of the way to the next one, 0 to 1.

    Pixels are counted from the border's first one, whose centre is half a pixel before the level's edge. A position
    beyond it, or behind the last pixel's neighbour, moves onto the zero border, where its contribution is zero as well,
    and so does NaN: no row number may be out of range. `position` is written over.
    """
    position = torch.clamp(position.add_(0.5), first, last).nan_to_num_(nan=0.0)
    return position.detach().int(), position.frac()


def _pad_levels(value: Tensor, spatial_shapes: Shapes) -> Tensor:
    """Surround every level by zero pixels, so that a corner outside needs no mask: its row is zero.

    (B, N, M, D) -> (B, sum of (H + BORDER)(W + BORDER), M, D)
    """
    B, _, M, D = value.shape
    padded = value.new_zeros(B, sum((h + BORDER) * (w + BORDER) for h, w in spatial_shapes), M, D)
    start = padded_start = 0
    for height, width in spatial_shapes:
        padded_size = height + BORDER, width + BORDER
        stop, padded_stop = start + height * width, padded_start + padded_size[0] * padded_size[1]
        level = padded[:, padded_start:padded_stop].view(B, *padded_size, M, D)[:, 1 : height + 1, 1 : width + 1]
        level.copy_(value[:, start:stop].view(B, height, width, M, D))
        start, padded_start = stop, padded_stop
    return padded


def weighted_row_sums(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Sums of rows of a table: `output[i] = sum over k of weights[i, k] * table[rows[i, k]]`.

    The gradient of the table is a product with a sparse matrix, which is an order of magnitude faster than
    `embedding_bag`'s own backward or `index_add_`, and reproducible. There are no second derivatives.

    Args:
        table: (R, D).
        rows: (S, k) int32 or int64, 0 to R - 1, k at least 1.
        weights: (S, k), in the dtype of `table`.
        starts: (S,) of the dtype of `rows`: 0, k, 2k, ...

    Returns:
        (S, D).
    """
    if torch.is_grad_enabled() and (table.requires_grad or weights.requires_grad):
        return _WeightedRowSums.apply(table, rows, weights, starts)
    return _embedding_bag(table, rows, weights, starts)


def _embedding_bag(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    # in two dimensions it would make the starts in every call, and take a third longer
    return F.embedding_bag(rows.flatten(), table, starts, per_sample_weights=weights.flatten(), mode="sum")


class _WeightedRowSums(torch.autograd.Function):
    """`embedding_bag` with another backward."""

    @staticmethod
    def forward(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
        return _embedding_bag(table, rows, weights, starts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        table, rows, weights = ctx.saved_tensors
        dtype = torch.promote_types(table.dtype, torch.float32)
        grads = _weighted_row_sums_backward(table.to(dtype), rows, weights.to(dtype), grad.to(dtype))
        return grads[0].to(table.dtype), None, grads[1].to(weights.dtype), None


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

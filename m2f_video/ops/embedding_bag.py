"""Deformable attention by `embedding_bag`: the path on CPU, for inference and training.

Sampling bilinearly with zero padding and summing over levels and points is, for each query and head, a weighted sum of
rows of the value matrix: L P rows for each of the four corners. `embedding_bag` computes such sums in one pass,
without the (B M, D, Q, P) tensors of the grid_sample way; what remains is making row numbers and weights cheaply.
Autograd differentiates the making of the weights; the sums have a backward of their own (`weighted_row_sums`).

B batch, N tokens of all levels, Q queries, M heads, D channels of a head, L levels, P points.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 2**20
"""Of a chunk's positions: with no gradient to keep things for, queries are worked on in parts that stay in a cache."""


def ms_deform_attn_embedding_bag(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    positions: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values.

    Args:
        value: (B, N, M, D); the levels' pixels one after the other, each level row by row.
        spatial_shapes: (height, width) of each level.
        positions: (B, Q, M, L, P, 2) as (x, y), in pixels of the level: 0 is the centre of its first one.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D), in the dtype of `value`.
    """
    B, _, M, D = value.shape
    _, Q, _, L, P, _ = positions.shape
    padded = _pad_levels(value, spatial_shapes)
    table = padded.view(-1, D)
    grid = _Grid(spatial_shapes, padded.shape[1], (B, M, L, P), positions)

    def attend(positions: Tensor, attention_weights: Tensor) -> Tensor:
        corners = grid.corners(positions.flatten(2), attention_weights.flatten(2))
        upper_left, upper_right, lower_left, lower_right = (
            weighted_row_sums(table, rows.view(-1, L * P), weights.view(-1, L * P).to(value.dtype))
            for rows, weights in corners
        )
        return upper_left.add_(upper_right).add_(lower_left).add_(lower_right).view(B, -1, M * D)

    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (value, positions, attention_weights))
    if keeps or torch.compiler.is_compiling():
        return attend(positions, attention_weights)
    output = value.new_empty(B, Q, M * D)
    step = max(CHUNK_BYTES // (B * M * L * P * 2 * positions.element_size()), 1)
    for start in range(0, Q, step):
        part = slice(start, start + step)
        output[:, part] = attend(positions[:, part], attention_weights[:, part])
    return output


def positions_from_offsets(
    reference_points: Tensor, offsets: Tensor, spatial_shapes: tuple[tuple[int, int], ...]
) -> Tensor:
    """Positions in pixels of each level.

    Args:
        reference_points: (Q, 2) as (x, y) in [0, 1], shared by batch, heads and levels.
        offsets: (B, Q, M, L, P, 2) as (x, y), in pixels.
        spatial_shapes: (height, width) of each level.

    Returns:
        (B, Q, M, L, P, 2) as (x, y), 0 being the centre of the first pixel.
    """
    M, P = offsets.shape[2], offsets.shape[4]
    sizes = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=offsets.dtype, device=offsets.device)
    # as a product with a (2, M L P 2) matrix, for the sake of long rows again
    scale = torch.diag_embed(sizes)[None, :, None].expand(M, -1, P, -1, -1).permute(3, 0, 1, 2, 4).flatten(1)
    centres = torch.addmm(torch.full_like(scale[0], -0.5), reference_points.to(offsets.dtype), scale)
    return (offsets.flatten(2) + centres).view_as(offsets)


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
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows, weights)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

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
    grad, columns = grad.contiguous(), rows.flatten()
    starts = torch.arange(S + 1, dtype=rows.dtype) * k
    transposed = csr_array((weights.flatten().numpy(), columns.numpy(), starts.numpy()), shape=(S, R)).T
    with warnings.catch_warnings():  # that sparse tensors are in beta
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(starts, columns, torch.zeros_like(weights).flatten(), (S, R))
        products = torch.sparse.sampled_addmm(pattern, grad, table.T, beta=0.0)
    return torch.from_numpy(transposed @ grad.numpy()), products.values().view(S, k)


@_weighted_row_sums_backward.register_fake
def _(table: Tensor, rows: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(weights)


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


class _Grid:
    """Turns positions into rows of the padded value table and their weights.

    The elementwise work runs on (B, Q, M L P) tensors with constants of the last axis: long contiguous rows, where
    broadcasting along (L, P) itself would leave inner loops of P elements and cost several times as much.

    Args:
        spatial_shapes: (height, width) of each level.
        padded_length: tokens of all padded levels.
        sizes: B, M, L and P.
        like: of the positions' dtype and device.
    """

    def __init__(
        self,
        spatial_shapes: tuple[tuple[int, int], ...],
        padded_length: int,
        sizes: tuple[int, int, int, int],
        like: Tensor,
    ) -> None:
        B, M, L, P = sizes
        device = like.device

        def per_sample(level_values: Tensor) -> Tensor:  # (L, X) -> (M L P X)
            return level_values[None, :, None, :].expand(M, L, P, -1).reshape(-1)

        shapes = torch.tensor([(w, h) for h, w in spatial_shapes], device=device)  # (L, 2) as (x, y)
        padded_widths = shapes[:, :1] + 2
        areas = padded_widths * (shapes[:, 1:] + 2)
        first_inner = areas.cumsum(0) - areas + padded_widths + 1  # pixel (0, 0) of each level in the padded tokens
        self.heads = M
        self.size = per_sample(shapes.to(like.dtype))
        self.before_first = torch.full_like(self.size, -1)
        self.down = per_sample((padded_widths * M).int())  # rows from a pixel to the one below it
        head = torch.arange(M, device=device, dtype=torch.int32).repeat_interleave(L * P)
        self.origin = per_sample((first_inner * M).int()) + head
        self.batch = torch.arange(B, device=device, dtype=torch.int32)[:, None, None] * (padded_length * M)

    def corners(self, positions: Tensor, attention_weights: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Rows and weights of the upper left, upper right, lower left and lower right corner of every position.

        Args:
            positions: (B, Q, 2 M L P).
            attention_weights: (B, Q, M L P).

        Returns:
            Four pairs (rows, weights), each (B, Q, M L P). Rows are int32: they count value vectors, of which no
            machine holds 2^31.
        """
        # A position beyond half a pixel outside moves to the zero border, where its contribution is zero as well. fmax
        # (unlike clamp) sends NaN there too, so that no row number is out of range.
        positions = torch.minimum(torch.fmax(positions, self.before_first), self.size)
        corner = torch.minimum(positions.detach().floor(), self.size - 1)  # so that the corner after it exists
        fraction = (positions - corner).unflatten(2, (-1, 2))
        corner = corner.int().unflatten(2, (-1, 2))

        rows = corner[..., 1] * self.down
        rows.add_(corner[..., 0], alpha=self.heads).add_(self.origin).add_(self.batch)

        # (1-x)(1-y), x(1-y), (1-x)y and xy times the attention weight, by one product and one difference each
        weights = attention_weights.to(positions.dtype)
        right = fraction[..., 0] * weights
        left = weights - right
        lower_right, lower_left = right * fraction[..., 1], left * fraction[..., 1]
        return (
            (rows, left - lower_left),
            (rows + self.heads, right - lower_right),
            (rows + self.down, lower_left),
            (rows + (self.down + self.heads), lower_right),
        )

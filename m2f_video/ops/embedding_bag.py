"""Deformable attention by `embedding_bag`: the inference path on CPU.

Sampling bilinearly with zero padding and summing over levels and points is, for each query and head, a weighted sum of
rows of the value matrix: L P rows for each of the four corners. `embedding_bag` computes such sums in one pass,
without the (B M, D, Q, P) tensors of the grid_sample way; what remains is making row numbers and weights cheaply.

B batch, N tokens of all levels, Q queries, M heads, D channels of a head, L levels, P points.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_embedding_bag(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values; arguments and result as `m2f_video.ops.ms_deform_attn`."""
    B, _, M, D = value.shape
    _, Q, _, L, P, _ = sampling_locations.shape
    padded = _pad_levels(value, spatial_shapes)
    table = padded.view(-1, D)
    upper_left, upper_right, lower_left, lower_right = (
        F.embedding_bag(
            rows.view(B * Q * M, L * P),
            table,
            per_sample_weights=weights.view(B * Q * M, L * P).to(value.dtype),
            mode="sum",
        )
        for rows, weights in _corners(spatial_shapes, padded.shape[1], sampling_locations, attention_weights)
    )
    output = upper_left.add_(upper_right).add_(lower_left).add_(lower_right)
    return output.view(B, Q, M * D)


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


def _corners(
    spatial_shapes: tuple[tuple[int, int], ...],
    padded_length: int,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Rows and weights of the upper left, upper right, lower left and lower right corner of every point.

    The elementwise work runs on (B, Q, M L P) tensors with constants of the last axis: long contiguous rows, where
    broadcasting along (L, P) itself would leave inner loops of P elements and cost several times as much.

    Returns:
        Four pairs (rows, weights), each (B, Q, M L P). Rows are int32: they count value vectors, of which no machine
        holds 2^31.
    """
    B, Q, M, L, P, _ = sampling_locations.shape
    K = M * L * P
    device, dtype = sampling_locations.device, sampling_locations.dtype

    def per_sample(level_values: Tensor) -> Tensor:  # (L, X) -> (K X)
        return level_values[None, :, None, :].expand(M, L, P, -1).reshape(-1)

    sizes = torch.tensor([(w, h) for h, w in spatial_shapes], device=device)  # (L, 2) as (x, y)
    padded_widths = sizes[:, :1] + 2
    areas = padded_widths * (sizes[:, 1:] + 2)
    first_inner = areas.cumsum(0) - areas + padded_widths + 1  # pixel (0, 0) of each level in the padded tokens
    down = per_sample((padded_widths * M).int())  # rows from a pixel to the one below it
    origin = per_sample((first_inner * M).int()) + torch.arange(M, device=device).repeat_interleave(L * P).int()

    # A location beyond half a pixel outside moves to the zero border, where its contribution is zero as well. fmax
    # (unlike clamp) sends NaN there too, so that no row number is out of range.
    size = per_sample(sizes.to(dtype))
    position = sampling_locations.reshape(B, Q, 2 * K) * size
    position.sub_(0.5)
    torch.fmax(position, torch.full_like(size, -1), out=position)
    torch.minimum(position, size, out=position)
    corner = torch.floor(position)
    torch.minimum(corner, size - 1, out=corner)  # so that the corner after it exists
    fraction = position.sub_(corner).view(B, Q, K, 2)
    corner = corner.int().view(B, Q, K, 2)

    rows = corner[..., 1] * down
    rows.add_(corner[..., 0], alpha=M).add_(origin)
    rows.add_(torch.arange(B, device=device, dtype=torch.int32)[:, None, None], alpha=padded_length * M)

    # (1-x)(1-y), x(1-y), (1-x)y and xy times the attention weight, by one product and one difference each
    weights = attention_weights.reshape(B, Q, K).to(dtype)
    right = fraction[..., 0] * weights
    left = weights - right
    lower_right, lower_left = right * fraction[..., 1], left * fraction[..., 1]
    upper_right, upper_left = right.sub_(lower_right), left.sub_(lower_left)
    return (
        (rows, upper_left),
        (rows + M, upper_right),
        (rows + down, lower_left),
        (rows + (down + M), lower_right),
    )

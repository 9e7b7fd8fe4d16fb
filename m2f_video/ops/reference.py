"""Multi-scale deformable attention in plain PyTorch: differentiable in every input, any floating dtype, any device.

The definition the fast backends are tested against (arXiv 2010.04159, equation 3).

B batch, N tokens of all levels, Q queries, M heads, D channels of a head, L levels, P points.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]
"""(height, width) of each level, in the order of its tokens."""


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values; arguments and result as `m2f_video.ops.ms_deform_attn`."""
    B, _, M, D = value.shape
    _, Q, _, _, P, _ = sampling_locations.shape
    # At least float32: half precision cannot tell the pixels of a map apart, and its grid_sample on a CPU gives NaN.
    dtype = torch.promote_types(value.dtype, torch.float32)
    grid = 2 * sampling_locations.to(dtype) - 1  # grid_sample counts from -1 to 1
    output = value.new_zeros(B * M, D, Q, dtype=dtype)
    levels = value.to(dtype).split([height * width for height, width in spatial_shapes], dim=1)
    for level, ((height, width), level_value) in enumerate(zip(spatial_shapes, levels, strict=True)):
        image = level_value.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
        level_grid = grid[:, :, :, level].transpose(1, 2).reshape(B * M, Q, P, 2)
        sampled = F.grid_sample(image, level_grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = attention_weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P)
        output = output + (sampled * weights).sum(-1)  # (B*M, D, Q, P) -> (B*M, D, Q)
    return output.view(B, M * D, Q).transpose(1, 2).to(value.dtype)


def sampling_locations_from_offsets(reference_points: Tensor, offsets: Tensor, spatial_shapes: Shapes) -> Tensor:
    """Turn offsets in pixels of the level sampled into locations relative to it.

    Args:
        reference_points: (Q, 2) as (x, y) in [0, 1], shared by batch, heads and levels.
        offsets: (B, Q, M, L, P, 2) as (x, y), in pixels.
        spatial_shapes: (height, width) of each level.

    Returns:
        (B, Q, M, L, P, 2) as (x, y), 0 and 1 being the level's outer edges.
    """
    sides = (side for h, w in spatial_shapes for side in (w, h))  # each a scalar, so that an exporter can leave it open
    sizes = torch.stack([torch.scalar_tensor(side, dtype=offsets.dtype, device=offsets.device) for side in sides])
    return reference_points[:, None, None, None, :] + offsets / sizes.view(-1, 1, 2)


def samples_from_offsets(
    reference_points: Tensor, offsets: Tensor, attention_logits: Tensor, spatial_shapes: Shapes
) -> tuple[Tensor, Tensor]:
    """What `m2f_video.ops.ms_deform_attn_from_offsets` samples, and how it weighs it.

    Returns:
        Locations (B, Q, M, L, P, 2), in the dtype of the reference points, and weights (B, Q, M, L, P).
    """
    locations = sampling_locations_from_offsets(reference_points, offsets.to(reference_points.dtype), spatial_shapes)
    return locations, attention_logits.flatten(3).softmax(-1).view_as(attention_logits)

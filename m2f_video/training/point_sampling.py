"""Masks at a few points instead of at every pixel (arXiv 2112.01527, section 3.3; PointRend, arXiv 1912.08193).

Points are (x, y) in [0, 1] of a map's width and height, so one point means the same place in maps of any resolution.

R maps, C channels, P points, H W size of a map.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

UniformDraw = Callable[[tuple[int, ...]], Tensor]
"""Gives a tensor of the asked shape with values in [0, 1)."""
RandomSource = torch.Generator | UniformDraw | None
"""Where random points come from: a generator on any device, a function such as one that replays a recording, or
PyTorch's global generator."""


def random_points(rows: int, num_points: int, like: Tensor, random: RandomSource = None) -> Tensor:
    """Uniform points (R, P, 2), on the device and of the dtype of `like`.

    Args:
        rows: R.
        num_points: P.
        like: a float32 or float64 tensor; the draws themselves are float32 in either case.
        random: where the draws come from. A generator draws on its own device.

    Raises:
        ValueError: the function given as `random` returns another shape, or values outside [0, 1].
    """
    shape = (rows, num_points, 2)
    if random is None or isinstance(random, torch.Generator):
        device = like.device if random is None else random.device
        return torch.rand(shape, generator=random, device=device).to(like)
    points = random(shape)
    if points.shape != shape:
        raise ValueError(f"the function of random points gave {tuple(points.shape)}, asked for {shape}")
    if not ((points >= 0) & (points <= 1)).all():
        raise ValueError("the function of random points gave NaN or values outside [0, 1]")
    return points.to(like)


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values at points; half a pixel from the border and beyond, zeros are blended in.

    Args:
        maps: (R, C, H, W).
        points: (R, P, 2) as (x, y), of the dtype of `maps`; pixel centres are at
            ((column + 1/2) / W, (row + 1/2) / H).

    Returns:
        (R, C, P).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if maps.ndim != 4 or points.ndim != 3 or points.shape[::2] != (maps.shape[0], 2):
        raise ValueError(
            f"maps must be (R, C, H, W) and points (R, P, 2), got {tuple(maps.shape)} and {tuple(points.shape)}"
        )
    if maps.dtype != points.dtype or not maps.is_floating_point():
        raise ValueError(f"maps and points must have one floating-point dtype, got {maps.dtype} and {points.dtype}")
    grid = 2 * points[:, :, None] - 1  # (R, P, 1, 2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


@torch.no_grad()
def uncertain_points(
    logits: Tensor,
    num_points: int,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    random: RandomSource = None,
) -> Tensor:
    """Points where the sign of a mask logit is in doubt, and some anywhere (arXiv 1912.08193, section 3.2).

    Args:
        logits: (R, 1, H, W); the uncertainty at a point is -|logit|.
        num_points: P.
        oversample_ratio: uniform points drawn per point to keep, at least 1.
        importance_sample_ratio: share of the P points that are the most uncertain of those drawn; the others are
            drawn anew. Between 0 and 1.
        random: where the draws come from: first (R, int(oversample_ratio * P), 2), then the new ones, if any.

    Returns:
        (R, P, 2): the most uncertain ones first, then the others.

    Raises:
        ValueError: `logits` of another shape, or a ratio out of its range.
    """
    if logits.ndim != 4 or logits.shape[1] != 1:
        raise ValueError(f"logits must be (R, 1, H, W), got {tuple(logits.shape)}")
    if oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
        raise ValueError(
            f"oversample_ratio must be at least 1 and importance_sample_ratio in [0, 1], "
            f"got {oversample_ratio} and {importance_sample_ratio}"
        )
    R = logits.shape[0]
    candidates = random_points(R, int(oversample_ratio * num_points), logits, random)
    num_uncertain = int(importance_sample_ratio * num_points)
    uncertainty = -point_sample(logits, candidates).squeeze(1).abs()  # (R, candidates)
    chosen = uncertainty.topk(num_uncertain, dim=1).indices  # (R, num_uncertain)
    points = candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
    if num_uncertain == num_points:
        return points
    return torch.cat((points, random_points(R, num_points - num_uncertain, logits, random)), dim=1)

"""Positions of pixels; their sine encodings: 2D for the pixel decoder and image models, 3D for the video decoder.

T frames, H W height and width, C channels.
"""

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 10000.0
EPSILON = 1e-6


def sine_1d(length: int, dim: int, *, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Sine encoding (length, dim) of positions 1..length, scaled so that the last is 2 pi.

    Channels 2i and 2i+1 are the sine and cosine at frequency temperature^(-2i/dim).
    """
    position = torch.arange(1, length + 1, dtype=dtype, device=device)
    position = position / (length + EPSILON) * (2 * math.pi)
    pair = torch.arange(dim, dtype=dtype, device=device).div(2, rounding_mode="floor")
    angle = position[:, None] / TEMPERATURE ** (2 * pair / dim)
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)


def sine_2d(height: int, width: int, dim: int, *, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Sine encoding (H, W, C) of image positions: y in the first half of the channels, x in the second."""
    y = sine_1d(height, dim // 2, dtype=dtype, device=device)[:, None, :].expand(-1, width, -1)
    x = sine_1d(width, dim // 2, dtype=dtype, device=device)[None, :, :].expand(height, -1, -1)
    return torch.cat((y, x), dim=2)


def sine_3d(
    frames: int, height: int, width: int, dim: int, *, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Sine encoding (T, H, W, C) of clip positions: the 2D encoding plus one of the frame over all channels.

    The frame index is scaled by the clip's length, so a frame's encoding depends on how many follow it
    (arXiv 2112.10764, section 3.1).
    """
    time = sine_1d(frames, dim, dtype=dtype, device=device)
    return sine_2d(height, width, dim, dtype=dtype, device=device) + time[:, None, None, :]


def position_dtype(features: Tensor) -> torch.dtype:
    """The dtype positions are computed in: never below float32, whatever the features have."""
    return torch.promote_types(features.dtype, torch.float32)


def pixel_centres(height: int, width: int, *, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Centres of a map's pixels, row by row: (H*W, 2) as (x, y), 0 and 1 being the outer edges."""
    y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1).flatten(0, 1)


class SinePosition3D(nn.Module):
    """Positions of keys in space and time (arXiv 2112.10764, section 3.1).

    Args:
        dim: channels C.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, features: Tensor, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions in the dtype of these features: (H*W, C) of a pixel in its frame, and (T, C) of a frame."""
        dtype, device = position_dtype(features), features.device
        pixel = sine_2d(height, width, self.dim, dtype=dtype, device=device).flatten(0, 1)
        frame = sine_1d(frames, self.dim, dtype=dtype, device=device)
        return pixel.to(features), frame.to(features)


class SinePosition2D(SinePosition3D):
    """Positions in space alone: all frames look as if they were one."""

    def forward(self, features: Tensor, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """As `SinePosition3D`."""
        pixel, frame = super().forward(features, frames, height, width)
        return pixel, torch.zeros_like(frame)


class NoPosition(SinePosition3D):
    """Keys that are features alone."""

    def forward(self, features: Tensor, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """As `SinePosition3D`."""
        return features.new_zeros(height * width, self.dim), features.new_zeros(frames, self.dim)

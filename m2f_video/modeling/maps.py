"""What pixel decoders of every kind are built of: group norm, convolutions with it, and maps at another's size.

B frames, C channels, H W height and width of a map.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.config import GROUP_NORM_GROUPS


class GroupNorm(nn.GroupNorm):
    """PyTorch's, of maps whose channels come last in memory, with all of its digits.

    Of such maps PyTorch sums the squares one by one: in float32 with ten times the error of the other order.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), channels last."""
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias and group norm."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, GroupNorm(GROUP_NORM_GROUPS, out_channels))


def output_conv(channels: int) -> nn.Sequential:
    """What smooths a level of a feature pyramid: 3x3 convolution, group norm, ReLU."""
    return conv_norm(channels, channels, kernel_size=3).append(nn.ReLU(inplace=True))


def mask_projection(hidden_dim: int, mask_dim: int) -> nn.Conv2d:
    """1x1 convolution from the finest level to the mask features."""
    convolution = nn.Conv2d(hidden_dim, mask_dim, kernel_size=1)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    nn.init.zeros_(cast("Tensor", convolution.bias))
    return convolution


def resize(coarse: Tensor, like: Tensor) -> Tensor:
    """A level at the size of a finer one."""
    return F.interpolate(coarse, size=like.shape[-2:], mode="bilinear", align_corners=False)

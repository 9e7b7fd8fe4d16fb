"""Layer norms and group norms, with the sums before them and the sum and activation after them.

PyTorch makes a pass over memory for each operation, and its norms, one or two of these, are slower than memory is. The
kernels make one pass for a layer norm of a sum, and two for a group norm with all that follows it.

B maps, C channels, H W height and width, h w those of a coarser map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.ops import cpu_kernels
from m2f_video.ops.conditions import has_hooks, only_values

BLOCK = 32
"""Channels that the kernel for group norms takes at a time."""


def layer_norm(x: Tensor, norm: nn.LayerNorm, compiled: bool) -> Tensor:
    """`norm(x)`.

    Args:
        x: (..., C).
        norm: over the C channels.
        compiled: whether a kernel in C++ computes it, where it can.

    Returns:
        (..., C).
    """
    if compiled and _fits_rows(x, None, norm):
        return _normalised(x, None, norm)
    return norm(x)


def layer_norm_of_sum(x: Tensor, branch: Tensor, norm: nn.LayerNorm, compiled: bool) -> Tensor:
    """`norm(x + branch)`, as in post-norm layers.

    Args:
        x: (..., C).
        branch: (..., C).
        norm: over the C channels.
        compiled: whether a kernel in C++ computes it, where it can.

    Returns:
        (..., C).
    """
    if compiled and _fits_rows(x, branch, norm):
        return _normalised(x, branch, norm)
    return norm(x + branch)


def group_norm_channels_last(
    x: Tensor, norm: nn.GroupNorm, compiled: bool, *, coarse: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`norm(x)`, to which a coarser map may be added, before a ReLU that may follow.

    Args:
        x: (B, C, H, W). A kernel takes it where channels come last in memory, and writes the result over it: hand over
            what nothing else will read.
        norm: over the C channels.
        compiled: whether a kernel in C++ computes it, where it can.
        coarse: (B, C, h, w), resized bilinearly to H W and added; None adds nothing.
        relu: whether to end with a ReLU.

    Returns:
        (B, C, H, W).
    """
    if compiled and _fits_maps(x, coarse, norm):
        return _normalise_(x, coarse, norm, relu)
    normalised = _group_norm_by_channels(x, norm) if _loses_digits(x, norm) else norm(x)
    if coarse is not None:
        resized = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
        normalised = normalised + resized  # not in place: the norm's hooks may keep what it gives
    return F.relu(normalised) if relu else normalised


def is_plain_norm(norm: nn.Module, channels: int) -> bool:
    """Whether a call of the module is PyTorch's layer or group norm of so many channels, affine, and not hooked."""
    if type(norm) not in (nn.LayerNorm, nn.GroupNorm) or has_hooks(norm):
        return False
    weight, bias = norm.weight, norm.bias
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        return False
    return all(values.shape == (channels,) and values.is_contiguous() for values in (weight, bias))


def _normalised(x: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> Tensor:
    output, C = x.new_empty(x.shape), x.shape[-1]
    branch = None if branch is None else branch.contiguous()
    arguments = (x.contiguous(), branch, norm.weight, norm.bias, float(norm.eps), output)
    cpu_kernels.call("layer_norm", x, *arguments, x.numel() // C, C)
    return output


def _normalise_(x: Tensor, coarse: Tensor | None, norm: nn.GroupNorm, relu: bool) -> Tensor:
    B, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1)
    arguments = (pixels, norm.weight, norm.bias, float(norm.eps), pixels, B, H, W, C, norm.num_groups, int(relu))
    added = (None, 0, 0, 0) if coarse is None else (coarse[0].permute(1, 2, 0), coarse.stride(0), *coarse.shape[2:])
    cpu_kernels.call("group_norm", x, *arguments, *added)
    return x


def _loses_digits(x: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether PyTorch would sum the squares of whole maps one by one in float32: where channels come last."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.ndim != 4 or x.numel() == 0:
        return False
    if x.is_contiguous() or not x.permute(0, 2, 3, 1).is_contiguous() or not is_plain_norm(norm, x.shape[1]):
        return False
    return only_values(x, norm.weight, norm.bias)


def _group_norm_by_channels(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm(x)` from the mean and variance of each channel, with a tenth of the error that PyTorch's own has."""
    pixels = x.permute(0, 2, 3, 1)
    of_channel = pixels.mean((1, 2), keepdim=True)
    variances = (pixels - of_channel).square_().mean((1, 2)).double().unflatten(1, (norm.num_groups, -1))  # (B, G, C/G)
    means = of_channel.flatten(1).double().unflatten(1, (norm.num_groups, -1))
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    inverse = (variance + norm.eps).rsqrt().expand_as(means).flatten(1)
    scale = inverse * norm.weight.double()
    offset = norm.bias.double() - mean.expand_as(means).flatten(1) * scale
    scale, offset = (values.float()[:, None, None] for values in (scale, offset))  # (B, 1, 1, C)
    return torch.addcmul(offset, pixels, scale).permute(0, 3, 1, 2)


def _fits_rows(x: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> bool:
    if x.numel() == 0 or (branch is not None and branch.shape != x.shape):
        return False
    return is_plain_norm(norm, x.shape[-1]) and cpu_kernels.runs(x, branch, norm.weight, norm.bias)


def _fits_maps(x: Tensor, coarse: Tensor | None, norm: nn.GroupNorm) -> bool:
    if x.ndim != 4 or x.shape[1] % BLOCK:
        return False
    if x.numel() == 0 or not x.permute(0, 2, 3, 1).is_contiguous():
        return False
    if coarse is not None:
        if coarse.ndim != 4 or coarse.numel() == 0 or coarse.shape[:2] != x.shape[:2]:
            return False
        if not coarse[0].permute(1, 2, 0).is_contiguous():  # maps may lie apart, as levels of a token sequence do
            return False
    return is_plain_norm(norm, x.shape[1]) and cpu_kernels.runs(x, coarse, norm.weight, norm.bias)

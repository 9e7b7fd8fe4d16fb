"""Twins of PyTorch's layers, wherever a model has them; those of larger modules come before them.

B maps, C I O channels, H W height and width.
"""

import torch
from torch import Tensor, nn

from m2f_video.acceleration import cpu_kernels, kernels
from m2f_video.acceleration.kernels import LANES, PackedLinear
from m2f_video.acceleration.swap import Fused
from m2f_video.acceleration.winograd import pack_weight


class FusedLinear(Fused, nn.Linear):
    """By the compiled kernel."""

    plain = nn.Linear

    @classmethod
    def misfit(cls, module: nn.Linear) -> str | None:
        """The kernel's widths, where its products are the fastest."""
        if not cpu_kernels.has_fast_products(module.weight.dtype):
            return "the kernel's products are not made for this processor"
        return kernels.misfit(module.weight)

    def pack(self) -> PackedLinear:
        """In the kernel's order."""
        return PackedLinear.of(self.weight, self.bias)

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Any number of rows."""
        return super().takes(dtype, *args, **kwargs) and args[0].shape[-1:] == (self.in_features,)

    def fused(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return kernels.linear(x, packed)


class OneDnnLinear(Fused, nn.Linear):
    """By oneDNN, whose float32 products take half the time of PyTorch's own on some processors."""

    plain = nn.Linear
    needs_kernels = False
    state = "oneDNN"

    @classmethod
    def misfit(cls, module: nn.Linear) -> str | None:
        """What oneDNN's operator knows."""
        return _misfit_of_onednn(module.weight)

    def pack(self) -> PackedLinear:
        """In oneDNN's order."""
        return PackedLinear(kernels.order_for_onednn(self.weight.detach()), self.bias, self.out_features)

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Any number of rows."""
        return super().takes(dtype, *args, **kwargs) and args[0].shape[-1:] == (self.in_features,)

    def fused(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return kernels.onednn_linear(x, packed)


def _misfit_of_onednn(weight: Tensor) -> str | None:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN is not there, or switched off"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.numel():
        return f"oneDNN takes float32 and bfloat16, not {str(weight.dtype).removeprefix('torch.')}"
    return None


def _is_pointwise(conv: nn.Conv2d) -> bool:
    own = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return own == ((1, 1), (1, 1), (0, 0), (1, 1), 1)


class FusedPointwiseConv(Fused, nn.Conv2d):
    """A 1x1 convolution as a linear layer over pixels, by the compiled kernel."""

    plain = nn.Conv2d

    @classmethod
    def misfit(cls, module: nn.Conv2d) -> str | None:
        """1x1, and the kernel's widths."""
        if not _is_pointwise(module):
            return "it is no 1x1 convolution"
        if not cpu_kernels.has_fast_products(module.weight.dtype):
            return "the kernel's products are not made for this processor"
        return kernels.misfit(module.weight.flatten(1))

    def pack(self) -> PackedLinear:
        """In the kernel's order."""
        return PackedLinear.of(self.weight.flatten(1), self.bias)

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Maps."""
        return super().takes(dtype, *args, **kwargs) and _is_map(args[0], self.in_channels)

    def fused(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """(B, I, H, W), read without a copy where channels come last -> (B, O, H, W) of that kind."""
        return kernels.linear(x.permute(0, 2, 3, 1), packed).permute(0, 3, 1, 2)


class WinogradConv(Fused, nn.Conv2d):
    """A 3x3 convolution by fewer multiplications; NaN and infinity spread in it over tiles of 4x4 results."""

    plain = nn.Conv2d

    @classmethod
    def misfit(cls, module: nn.Conv2d) -> str | None:
        """3x3, and the kernel's widths."""
        own = module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
        if own != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") or module.bias is not None:
            return "it is no 3x3 convolution of stride 1 without bias"
        if module.in_channels % LANES or module.out_channels % LANES:
            return f"{module.in_channels} and {module.out_channels} channels; the kernel takes multiples of {LANES}"
        return None

    def pack(self) -> Tensor:
        """Transformed, four times its size."""
        return pack_weight(self.weight.detach())

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Maps."""
        return super().takes(dtype, *args, **kwargs) and _is_map(args[0], self.in_channels)

    def fused(self, packed: Tensor, x: Tensor) -> Tensor:
        """(B, I, H, W), read without a copy where channels come last -> (B, O, H, W) of that kind."""
        pixels = x.permute(0, 2, 3, 1).contiguous()
        return kernels.winograd_convolution(pixels, packed, self.out_channels).permute(0, 3, 1, 2)


class OneDnnPointwiseConv(Fused, nn.Conv2d):
    """A 1x1 convolution as a linear layer over pixels, by oneDNN."""

    plain = nn.Conv2d
    needs_kernels = False
    state = "oneDNN"

    @classmethod
    def misfit(cls, module: nn.Conv2d) -> str | None:
        """1x1, and what oneDNN's operator knows."""
        return _misfit_of_onednn(module.weight) if _is_pointwise(module) else "it is no 1x1 convolution"

    def pack(self) -> PackedLinear:
        """In oneDNN's order."""
        return PackedLinear(kernels.order_for_onednn(self.weight.detach().flatten(1)), self.bias, self.out_channels)

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Maps."""
        return super().takes(dtype, *args, **kwargs) and _is_map(args[0], self.in_channels)

    def fused(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """(B, I, H, W), read without a copy where channels come last -> (B, O, H, W) of that kind."""
        return kernels.onednn_linear(x.permute(0, 2, 3, 1), packed).permute(0, 3, 1, 2)


def _is_map(x: Tensor, channels: int) -> bool:
    return x.ndim == 4 and x.shape[1] == channels


class FusedLayerNorm(Fused, nn.LayerNorm):
    """A layer norm in one pass."""

    plain = nn.LayerNorm

    @classmethod
    def misfit(cls, module: nn.LayerNorm) -> str | None:
        """Affine, over the channels."""
        if len(module.normalized_shape) != 1 or module.weight is None or module.bias is None:
            return "it is no affine norm over one axis"
        return None

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Any number of rows."""
        return super().takes(dtype, *args, **kwargs) and args[0].shape[-1:] == self.normalized_shape

    def fused(self, packed: None, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return kernels.layer_norm(x, self)

"""Twins of the Swin backbone's modules."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from m2f_video.acceleration import kernels
from m2f_video.acceleration.kernels import LANES, PackedLinear
from m2f_video.acceleration.swap import Fused
from m2f_video.modeling.swin import DropPath, Mlp, PatchMerging, SwinBlock, WindowAttention


class _Block(NamedTuple):
    qkv: PackedLinear
    proj: PackedLinear
    fc1: PackedLinear
    fc2: PackedLinear
    padding: Tensor
    bias: Tensor


class FusedSwinBlock(Fused, SwinBlock):
    """Norm and projection; attention in windows that are never cut out; projection and sum; norm, MLP and sum."""

    plain = SwinBlock
    parts: ClassVar = {
        "norm1": nn.LayerNorm,
        "attn": WindowAttention,
        "attn.qkv": nn.Linear,
        "attn.proj": nn.Linear,
        "drop_path": DropPath,
        "norm2": nn.LayerNorm,
        "mlp": Mlp,
        "mlp.fc1": nn.Linear,
        "mlp.fc2": nn.Linear,
    }

    @classmethod
    def misfit(cls, module: SwinBlock) -> str | None:
        """The kernels' widths."""
        attn, mlp = module.attn, module.mlp
        if (dim := attn.proj.in_features // attn.num_heads) % LANES:
            return f"heads of {dim} channels; the kernel takes multiples of {LANES}"
        if not 0 <= module.shift < module.window_size == attn.window_size:
            return f"windows of {attn.window_size} and {module.window_size}, shifted by {module.shift}"
        if reason := _misfit_of_norms(module.norm1, module.norm2):
            return reason
        layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        return next((reason for layer in layers if (reason := kernels.misfit(layer.weight))), None)

    def pack(self) -> _Block:
        """Weights in the kernels' order, and the bias of positions as a table."""
        attn, mlp = self.attn, self.mlp
        layers = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
        qkv, proj, fc1, fc2 = (PackedLinear.of(layer.weight, layer.bias) for layer in layers)
        weight = attn.qkv.weight
        padding = weight.new_zeros(len(weight)) if attn.qkv.bias is None else attn.qkv.bias.detach()
        bias = attn.relative_position_bias().detach().permute(1, 2, 0).contiguous()
        return _Block(qkv, proj, fc1, fc2, padding, bias)

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Maps."""
        return super().takes(dtype, *args, **kwargs) and args[0].shape[3:] == self.norm1.normalized_shape

    def fused(self, packed: _Block, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        qkv = kernels.linear(x, packed.qkv, before=self.norm1)
        attended = kernels.window_attention(qkv, packed.padding, packed.bias, self.window_size, self.shift)
        x = kernels.linear(attended, packed.proj, residual=x)
        return kernels.linear(x, packed.fc1, packed.fc2, activation="gelu", before=self.norm2, residual=x)


def _misfit_of_norms(*norms: nn.LayerNorm) -> str | None:
    if any(norm.weight is None or norm.bias is None for norm in norms):
        return "a norm is not affine"
    return None


class FusedMlp(Fused, Mlp):
    """Both layers in one pass, where the block around them is another."""

    plain = Mlp
    parts: ClassVar = {"fc1": nn.Linear, "fc2": nn.Linear}

    @classmethod
    def misfit(cls, module: Mlp) -> str | None:
        """The kernel's widths."""
        return kernels.misfit(module.fc1.weight) or kernels.misfit(module.fc2.weight)

    def pack(self) -> tuple[PackedLinear, PackedLinear]:
        """Both weights."""
        fc1, fc2 = (PackedLinear.of(layer.weight, layer.bias) for layer in (self.fc1, self.fc2))
        return fc1, fc2

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Any number of rows."""
        return super().takes(dtype, *args, **kwargs) and args[0].shape[-1:] == (self.fc1.in_features,)

    def fused(self, packed: tuple[PackedLinear, PackedLinear], x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return kernels.linear(x, *packed, activation="gelu")


class FusedPatchMerging(Fused, PatchMerging):
    """Norm and projection in one pass."""

    plain = PatchMerging
    parts: ClassVar = {"norm": nn.LayerNorm, "reduction": nn.Linear}

    @classmethod
    def misfit(cls, module: PatchMerging) -> str | None:
        """The kernel's widths."""
        return _misfit_of_norms(module.norm) or kernels.misfit(module.reduction.weight)

    def pack(self) -> PackedLinear:
        """The projection's weight."""
        return PackedLinear.of(self.reduction.weight, self.reduction.bias)

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Maps."""
        return (
            super().takes(dtype, *args, **kwargs)
            and args[0].ndim == 4
            and 4 * args[0].shape[3] == self.norm.normalized_shape[0]
        )

    def fused(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""
        return kernels.linear(self.gather(x), packed, before=self.norm)

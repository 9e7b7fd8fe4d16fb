"""Twins of the pixel decoder and its parts."""

import os
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from m2f_video.acceleration import kernels
from m2f_video.acceleration.kernels import PackedLinear
from m2f_video.acceleration.layers import FusedPointwiseConv, WinogradConv
from m2f_video.acceleration.swap import Fused, are_values
from m2f_video.acceleration.winograd import pack_weight
from m2f_video.modeling.maps import GroupNorm
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer, MSDeformAttnPixelDecoder, PixelDecoderOutput
from m2f_video.ops import BACKEND_VARIABLE, Shapes

BLOCK = 32
"""Channels that the kernel for group norms takes at a time."""
NUM_LEVELS = 3
"""Of the encoder of the pixel decoder whose twin is here; of another, the parts have twins."""


_LINEARS = dict.fromkeys(("value_proj", "sampling_offsets", "attention_weights", "output_proj"), nn.Linear)


class _Attention(NamedTuple):
    value: PackedLinear
    offsets: PackedLinear
    weights: PackedLinear
    output: PackedLinear

    @classmethod
    def of(cls, attn: MSDeformAttn) -> "_Attention":
        layers = attn.value_proj, attn.sampling_offsets, attn.attention_weights, attn.output_proj
        return cls(*(PackedLinear.of(layer.weight, layer.bias) for layer in layers))

    def sample(
        self, query: Tensor, value: Tensor, reference_points: Tensor, spatial_shapes: Shapes, heads: int
    ) -> Tensor:
        """The heads' weighted sums of samples, (B, Q, C)."""
        offsets, logits = kernels.linear(query, self.offsets), kernels.linear(query, self.weights)
        values = kernels.linear(value, self.value)
        points = reference_points.contiguous()
        return kernels.deformable_attention(values, spatial_shapes, points, offsets, logits, heads)


def _backend() -> str:
    """What the environment asks for."""
    return os.environ.get(BACKEND_VARIABLE) or "auto"


def _misfit_of_attention(attn: MSDeformAttn) -> str | None:
    if attn.backend != "auto":
        return f"its backend is {attn.backend}"
    if (chosen := _backend()) != "auto":
        return f"{BACKEND_VARIABLE} is {chosen:.40}"
    for layer in (attn.value_proj, attn.sampling_offsets, attn.attention_weights, attn.output_proj):
        if reason := kernels.misfit(layer.weight):
            return reason
    if attn.sampling_offsets.out_features != 2 * attn.attention_weights.out_features:
        return "its offsets and weights do not fit together"
    return None


def _takes_samples(
    attn: MSDeformAttn,
    dtype: torch.dtype | None,
    query: Tensor,
    value: Tensor,
    reference_points: Tensor,
    spatial_shapes: Shapes,
) -> bool:
    """Whether these are what the kernel samples; anything else goes where errors are raised."""
    dim = attn.value_proj.in_features
    return (
        query.ndim == value.ndim == 3
        and query.shape[::2] == value.shape[::2]
        and value.shape[2] == dim
        and value.shape[1] == sum(height * width for height, width in spatial_shapes) < 2**30
        and all(isinstance(size, int) and size > 0 for shape in spatial_shapes for size in shape)
        and len(spatial_shapes) == attn.num_levels
        and reference_points.shape == (query.shape[1], 2)
        and are_values(dtype, query, value)
        and are_values(torch.float32, reference_points)
        and _backend() == "auto"
    )


class FusedMSDeformAttn(Fused, MSDeformAttn):
    """Three projections, sampling, and a projection, where the layer around them is another."""

    plain = MSDeformAttn
    parts: ClassVar = _LINEARS

    @classmethod
    def misfit(cls, module: MSDeformAttn) -> str | None:
        """The kernels' widths and the project's own choice of a backend."""
        return _misfit_of_attention(module)

    def pack(self) -> _Attention:
        """All projections."""
        return _Attention.of(self)

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """As the plain one's."""
        return not kwargs and len(args) == 4 and _takes_samples(self, dtype, *args)

    def fused(
        self, packed: _Attention, query: Tensor, value: Tensor, reference_points: Tensor, spatial_shapes: Shapes
    ) -> Tensor:
        """(B, Q, C)."""
        sampled = packed.sample(query, value, reference_points, spatial_shapes, self.num_heads)
        return kernels.linear(sampled, packed.output)


class _EncoderLayer(NamedTuple):
    attention: _Attention
    linear1: PackedLinear
    linear2: PackedLinear


class FusedDeformableEncoderLayer(Fused, DeformableEncoderLayer):
    """Three projections, sampling, projection with sum and norm, feed-forward network with sum and norm."""

    plain = DeformableEncoderLayer
    parts: ClassVar = {
        "self_attn": MSDeformAttn,
        **{f"self_attn.{name}": kind for name, kind in _LINEARS.items()},
        "self_attn_norm": nn.LayerNorm,
        "linear1": nn.Linear,
        "linear2": nn.Linear,
        "ffn_norm": nn.LayerNorm,
        "dropout": nn.Dropout,
    }

    @classmethod
    def misfit(cls, module: DeformableEncoderLayer) -> str | None:
        """The kernels' widths and the project's own choice of a backend."""
        layers = (module.linear1.weight, module.linear2.weight)
        return _misfit_of_attention(module.self_attn) or next((r for w in layers if (r := kernels.misfit(w))), None)

    def pack(self) -> _EncoderLayer:
        """All weights."""
        linear1, linear2 = (PackedLinear.of(layer.weight, layer.bias) for layer in (self.linear1, self.linear2))
        return _EncoderLayer(_Attention.of(self.self_attn), linear1, linear2)

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """As the plain one's."""
        if kwargs or len(args) != 4:
            return False
        x, position, reference_points, spatial_shapes = args
        fits = are_values(dtype, position) and position.shape == x.shape[1:]
        return fits and _takes_samples(self.self_attn, dtype, x, x, reference_points, spatial_shapes)

    def fused(
        self, packed: _EncoderLayer, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Shapes
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        heads = self.self_attn.num_heads
        sampled = packed.attention.sample(x + position, x, reference_points, spatial_shapes, heads)
        x = kernels.linear(sampled, packed.attention.output, residual=x, after=self.self_attn_norm)
        layers = packed.linear1, packed.linear2
        return kernels.linear(x, *layers, activation="relu", residual=x, after=self.ffn_norm)


def _pair(layers: nn.Module) -> tuple[nn.Conv2d, GroupNorm]:
    """The convolution and the norm at the start of a sequence."""
    conv, norm, *_ = layers.children()
    return cast("nn.Conv2d", conv), cast("GroupNorm", norm)


class FusedGroupNorm(Fused, GroupNorm):
    """A group norm of maps whose channels come last, in two passes."""

    plain = GroupNorm

    @classmethod
    def misfit(cls, module: GroupNorm) -> str | None:
        """Affine, and whole blocks of channels."""
        if module.weight is None or module.bias is None or module.num_channels % BLOCK:
            return f"it is not affine, or has no multiple of {BLOCK} channels"
        return None

    def takes(self, dtype: torch.dtype | None, *args: Tensor, **kwargs: Tensor) -> bool:
        """Maps whose channels come last in memory."""
        return (
            super().takes(dtype, *args, **kwargs)
            and args[0].ndim == 4
            and args[0].shape[1] == self.num_channels
            and args[0].stride(1) == 1
        )

    def fused(self, packed: None, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in a memory of its own."""
        pixels = x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        return kernels.group_norm_(pixels, self).permute(0, 3, 1, 2)


class _PixelDecoder(NamedTuple):
    projections: tuple[PackedLinear, ...]
    lateral: PackedLinear
    output: Tensor
    mask: PackedLinear


class FusedPixelDecoder(Fused, MSDeformAttnPixelDecoder):
    """Norms written over the maps they norm, with the pyramid's sum and ReLU; all maps have channels last.

    The encoder's layers are called as ever.
    """

    plain = MSDeformAttnPixelDecoder
    parts: ClassVar = {
        "input_projections": nn.ModuleList,
        **{f"input_projections.{level}": nn.Sequential for level in range(NUM_LEVELS)},
        **{f"input_projections.{level}.0": nn.Conv2d for level in range(NUM_LEVELS)},
        **{f"input_projections.{level}.1": GroupNorm for level in range(NUM_LEVELS)},
        "lateral_conv": nn.Sequential,
        "lateral_conv.0": nn.Conv2d,
        "lateral_conv.1": GroupNorm,
        "output_conv": nn.Sequential,
        "output_conv.0": nn.Conv2d,
        "output_conv.1": GroupNorm,
        "output_conv.2": nn.ReLU,
        "mask_projection": nn.Conv2d,
    }

    @classmethod
    def misfit(cls, module: MSDeformAttnPixelDecoder) -> str | None:
        """The kernels' widths, and one feature-pyramid step."""
        if module.pyramid != ("",):
            return f"it has feature-pyramid steps {module.pyramid!r:.60}"
        convs, norms = zip(
            *map(_pair, (*module.input_projections, module.lateral_conv, module.output_conv)), strict=True
        )
        for conv in (*convs[:-1], module.mask_projection):
            if reason := FusedPointwiseConv.misfit(conv):
                return reason
        if reason := next((reason for norm in norms if (reason := FusedGroupNorm.misfit(norm))), None):
            return reason
        return WinogradConv.misfit(convs[-1])

    def pack(self) -> _PixelDecoder:
        """All weights outside the encoder's layers."""

        def packed(conv: nn.Conv2d) -> PackedLinear:
            return PackedLinear.of(conv.weight.flatten(1), conv.bias)

        projections = tuple(packed(_pair(projection)[0]) for projection in self.input_projections)
        output = pack_weight(_pair(self.output_conv)[0].weight.detach())
        return _PixelDecoder(projections, packed(_pair(self.lateral_conv)[0]), output, packed(self.mask_projection))

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """Maps of all strides."""
        if kwargs or not 1 <= len(args) <= 2 or len(args[0]) != NUM_LEVELS + 1 or not are_values(dtype, *args[0]):
            return False
        channels = [_pair(conv)[0].in_channels for conv in (self.lateral_conv, *reversed(self.input_projections))]
        batches = {len(level) for level in args[0]}
        fits = len(batches) == 1 and all(level.ndim == 4 for level in args[0])
        return fits and [level.shape[1] for level in args[0]] == channels

    def fused(self, packed: _PixelDecoder, maps: tuple[Tensor, ...], output_hidden: bool = False) -> PixelDecoderOutput:
        """As the plain one's."""
        finest, *others = (level.permute(0, 2, 3, 1) for level in maps)  # (B, H, W, C)
        levels = [
            kernels.group_norm_(kernels.linear(level, weight), _pair(projection)[1])
            for level, weight, projection in zip(
                reversed(others), packed.projections, self.input_projections, strict=True
            )
        ]
        tokens = torch.cat([level.flatten(1, 2) for level in levels], dim=1)
        shapes = tuple((level.shape[1], level.shape[2]) for level in levels)
        multi_scale, encoder_layers = self.encode(tokens, shapes, output_hidden)

        coarse = multi_scale[-1].permute(0, 2, 3, 1)
        finest = kernels.group_norm_(kernels.linear(finest, packed.lateral), _pair(self.lateral_conv)[1], coarse)
        conv, norm = _pair(self.output_conv)
        finest = kernels.winograd_convolution(finest, packed.output, conv.out_channels)
        finest = kernels.group_norm_(finest, norm, relu=True)
        mask_features = kernels.linear(finest, packed.mask).permute(0, 3, 1, 2)
        return PixelDecoderOutput(mask_features, multi_scale, encoder_layers)

"""The table of all twins, each of which names the plain module that it stands for."""

from m2f_video.acceleration.layers import (
    FusedLayerNorm,
    FusedLinear,
    FusedPointwiseConv,
    OneDnnLinear,
    OneDnnPointwiseConv,
    WinogradConv,
)
from m2f_video.acceleration.model import FrameByFrame
from m2f_video.acceleration.pixel_decoder import (
    FusedDeformableEncoderLayer,
    FusedGroupNorm,
    FusedMSDeformAttn,
    FusedPixelDecoder,
)
from m2f_video.acceleration.streamed_decoder import Streamed
from m2f_video.acceleration.swap import Fused
from m2f_video.acceleration.swin import FusedMlp, FusedPatchMerging, FusedSwinBlock
from m2f_video.acceleration.transformer_decoder import FusedCrossAttention, FusedDecoderLayer, FusedMaskProduct

TWINS: tuple[type[Fused], ...] = (
    FrameByFrame,
    FusedSwinBlock,
    FusedMlp,
    FusedPatchMerging,
    FusedPixelDecoder,
    FusedDeformableEncoderLayer,
    FusedMSDeformAttn,
    FusedDecoderLayer,
    FusedCrossAttention,
    FusedMaskProduct,
    FusedLinear,
    OneDnnLinear,
    FusedPointwiseConv,
    WinogradConv,
    OneDnnPointwiseConv,
    FusedLayerNorm,
    FusedGroupNorm,
)
"""Of several for one type, the first that knows a module takes its place."""

WRITTEN: tuple[type[Fused], ...] = (*TWINS, Streamed)
"""All that stand for functions of ours as they were when `written_for` was written."""

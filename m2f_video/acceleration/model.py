"""Twin of the assembled model: on a CPU frames are encoded one by one, as what a cache holds is made faster."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m2f_video.acceleration.swap import Fused, are_values, plain_type
from m2f_video.acceleration.written_for import Function, functions_of
from m2f_video.modeling.feature_pyramids import (
    AlignedFeaturePyramid,
    BackboneProjections,
    BidirectionalFeaturePyramid,
    BidirectionalLayer,
    DeformableConv,
    FeatureAlignment,
    FeaturePyramid,
    FeatureSelection,
    SemanticFeaturePyramid,
    WeightedFusion,
)
from m2f_video.modeling.maps import GroupNorm
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer, MSDeformAttnPixelDecoder
from m2f_video.modeling.swin import (
    DropPath,
    Mlp,
    PatchEmbedding,
    PatchMerging,
    SwinBlock,
    SwinStage,
    SwinTransformer,
    WindowAttention,
)
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former, VideoMask2FormerOutput

APART = (
    SwinTransformer, PatchEmbedding, SwinStage, SwinBlock, WindowAttention, Mlp, PatchMerging,
    MSDeformAttnPixelDecoder, DeformableEncoderLayer, MSDeformAttn, GroupNorm,
    BackboneProjections, FeaturePyramid, SemanticFeaturePyramid, AlignedFeaturePyramid, FeatureSelection,
    FeatureAlignment, DeformableConv, BidirectionalFeaturePyramid, BidirectionalLayer, WeightedFusion,
    nn.Sequential, nn.ModuleList, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.ReLU, nn.SiLU, nn.Dropout, DropPath,
    nn.Identity,
)  # fmt: skip
"""What treats every frame by itself. Of anything else in backbone and pixel decoder nobody knows."""


class FrameByFrame(Fused, VideoMask2Former):
    """Encodes frames one by one, each to its final place, so that no feature is held twice."""

    plain = VideoMask2Former
    needs_kernels = False
    types = (FrameFeatures,)

    @classmethod
    def functions(cls) -> list[Function]:
        """With those of all that it calls frame by frame."""
        return functions_of((cls.plain, *APART), cls.types)

    @classmethod
    def called(cls, module: VideoMask2Former) -> Mapping[str, type[nn.Module]]:
        """All of backbone and pixel decoder."""
        return {
            f"{part}.{name}".rstrip("."): plain_type(inside)
            for part in ("backbone", "pixel_decoder")
            for name, inside in getattr(module, part).named_modules()
        }

    @classmethod
    def misfit(cls, module: VideoMask2Former) -> str | None:
        """What may look at several frames."""
        others = ((name, kind) for name, kind in cls.called(module).items() if kind not in APART)
        return next((f"{name} is a {kind.__name__}, which may mix frames" for name, kind in others), None)

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """Several frames, whose hidden states are not asked for, and from which nothing is to be learnt."""
        names = ("pixel_values", "output_auxiliary", "output_hidden", "frames_per_chunk")
        options = dict(zip(names, args, strict=False)) | kwargs
        pixel_values = options.get("pixel_values")
        if len(args) + len(kwargs) != len(options) or set(options) - set(names):
            return False
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 5:
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return False
        return are_values(None, pixel_values) and not (options.get("output_hidden") or options.get("frames_per_chunk"))

    def fused(
        self, packed: None, pixel_values: Tensor, output_auxiliary: bool = False, *_: Any, **__: Any
    ) -> VideoMask2FormerOutput:
        """As the plain one's."""
        frames = pixel_values.flatten(0, 1)
        places: list[Tensor] = []
        for index in range(len(frames)):
            features = self.encode_frames(frames[index : index + 1])
            parts = [features.mask_features, *features.multi_scale]
            if not places:
                places = [_room(part, len(frames)) for part in parts]
            for place, part in zip(places, parts, strict=True):
                place[index : index + 1] = part
        whole = FrameFeatures(places[0], tuple(places[1:]))
        return self.decode_clip(whole, pixel_values.shape[1], output_auxiliary)


def _room(part: Tensor, frames: int) -> Tensor:
    """For maps like (1, C, H, W) of all frames, channels last."""
    _, C, H, W = part.shape
    return part.new_empty(frames, H, W, C).permute(0, 3, 1, 2)

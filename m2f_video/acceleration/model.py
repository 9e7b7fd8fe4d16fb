"""Twin of the assembled model: on a CPU frames are encoded one by one, as what a cache holds is made faster."""

from typing import Any

import torch
from torch import Tensor

from m2f_video.acceleration.swap import Fused, are_values
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former, VideoMask2FormerOutput


class FrameByFrame(Fused, VideoMask2Former):
    """Encodes frames one by one, each to its final place, so that no feature is held twice."""

    plain = VideoMask2Former
    needs_kernels = False

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """Several frames, whose hidden states are not asked for."""
        names = ("output_auxiliary", "output_hidden", "frames_per_chunk")
        options = dict(zip(names, args[1:], strict=False)) | kwargs
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 5 or set(options) - set(names):
            return False
        return are_values(None, args[0]) and not (options.get("output_hidden") or options.get("frames_per_chunk"))

    def fused(
        self, packed: None, pixel_values: Tensor, output_auxiliary: bool = False, **_: Any
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

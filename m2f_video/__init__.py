"""Video Mask2Former in PyTorch: published weights in, segmented and tracked video out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2f_video.backbone_weights import load_backbone
    from m2f_video.config import VideoMask2FormerConfig
    from m2f_video.inference import VideoProcessor, segment_video, stream_video
    from m2f_video.modeling.video_mask2former import VideoMask2Former
    from m2f_video.partial_loading import load_partially
    from m2f_video.results import Track, VideoSegmentation
    from m2f_video.video import VideoWriter, open_video, read_video

__all__ = [
    "Track",
    "VideoMask2Former",
    "VideoMask2FormerConfig",
    "VideoProcessor",
    "VideoSegmentation",
    "VideoWriter",
    "load_backbone",
    "load_partially",
    "open_video",
    "read_video",
    "segment_video",
    "stream_video",
]

_MODULES = {
    "Track": "results",
    "VideoMask2Former": "modeling.video_mask2former",
    "VideoMask2FormerConfig": "config",
    "VideoProcessor": "inference",
    "VideoSegmentation": "results",
    "VideoWriter": "video",
    "load_backbone": "backbone_weights",
    "load_partially": "partial_loading",
    "open_video": "video",
    "read_video": "video",
    "segment_video": "inference",
    "stream_video": "inference",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: PyTorch takes seconds to load, and the command line starts without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

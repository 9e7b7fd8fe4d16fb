"""Video Mask2Former in PyTorch: published weights in, segmented and tracked video out."""

from m2f_video.config import VideoMask2FormerConfig
from m2f_video.inference import segment_video
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.processor import VideoProcessor
from m2f_video.results import Track, VideoSegmentation
from m2f_video.video_io import open_video, read_video

__all__ = [
    "Track",
    "VideoMask2Former",
    "VideoMask2FormerConfig",
    "VideoProcessor",
    "VideoSegmentation",
    "open_video",
    "read_video",
    "segment_video",
]

"""From pixels to tracks: preprocessing, the model over a video, post-processing."""

from m2f_video.inference.on_video import Progress
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import segment_video

__all__ = ["Progress", "VideoProcessor", "segment_video"]

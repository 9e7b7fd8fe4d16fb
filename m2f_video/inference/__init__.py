"""From pixels to tracks: preprocessing, the model over a video, post-processing."""

from m2f_video.inference.bulk import Outcome, segment_many
from m2f_video.inference.on_video import Progress
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import segment_video, stream_video
from m2f_video.inference.stream import FrameResult, TrackScore, VideoStream

__all__ = [
    "FrameResult",
    "Outcome",
    "Progress",
    "TrackScore",
    "VideoProcessor",
    "VideoStream",
    "segment_many",
    "segment_video",
    "stream_video",
]

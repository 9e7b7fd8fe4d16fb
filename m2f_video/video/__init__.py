"""Video in and out: files, folders of frames, arrays; what is broken is told from what is not."""

from m2f_video.video.decode import VideoError
from m2f_video.video.pictures import image_size, read_image
from m2f_video.video.reader import VideoReader, VideoSource, open_video, read_video
from m2f_video.video.writer import VideoWriter

__all__ = [
    "VideoError",
    "VideoReader",
    "VideoSource",
    "VideoWriter",
    "image_size",
    "open_video",
    "read_image",
    "read_video",
]

"""Writing the video of the segmented frames with their tracks drawn in.

Shape letters: N tracks, H height, W width.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import numpy as np

from m2f_video.results.drawing import draw_tracks
from m2f_video.video.decode import VideoError
from m2f_video.video.reader import VideoReader, VideoSource, open_video
from m2f_video.video.writer import VideoWriter, as_frame_rate


def write_overlay(
    path: str | os.PathLike[str],
    video: VideoReader | VideoSource,
    *,
    size: tuple[int, int],
    fps: float,
    frames: Sequence[int],
    masks: Callable[[int], Iterable[np.ndarray]],
    colors: np.ndarray,
    texts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write some frames of a video with tracks drawn in, the first track on top.

    Where frames are skipped the frame rate is divided accordingly, so that the overlay plays as long as the source
    does. There is no sound. The file appears when it is complete, and not at all when anything fails.

    Args:
        path: of the file to write; .mp4 plays everywhere.
        video: the video, which is read with one frame in memory at a time.
        size: (H, W) that it must have.
        fps: frame rate of the source, before frames are skipped.
        frames: numbers in the source, from 0, of the frames to draw; rising, at least one.
        masks: gives, by position in `frames`, the N masks in that frame, each bool (H, W).
        colors: uint8 RGB (N, 3).
        texts: what the N tags say.
        progress: called with (frames drawn, frames in all) after each frame.

    Raises:
        VideoError: the video is of another size, or ends before the last of the frames.
        OSError: the file cannot be written.
    """
    reader = video if isinstance(video, VideoReader) else open_video(video)
    if (reader.height, reader.width) != size:
        raise VideoError(
            f"{reader.source}: the video is {reader.width}x{reader.height} but the segmented one was "
            f"{size[1]}x{size[0]}; give the video that was segmented"
        )
    rate = as_frame_rate(fps)
    if len(frames) > 1:
        rate = rate * (len(frames) - 1) / (frames[-1] - frames[0])
    rate = max(rate, Fraction(1, 3600))  # the encoder takes none that are much slower
    position = 0
    with VideoWriter(path, rate, reader.width, reader.height) as writer:
        for read, frame in enumerate(reader):
            if reader.frame_index(read) != frames[position]:
                continue
            writer.write(draw_tracks(frame, masks(position), colors, texts))
            position += 1
            if progress is not None:
                progress(position, len(frames))
            if position == len(frames):
                return
        raise VideoError(
            f"{reader.source}: frame {frames[position]} was segmented but the video does not give it; "
            "give the video that was segmented, and the same frames of it"
        )

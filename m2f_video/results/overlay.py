"""Writing the video of the segmented frames with their tracks drawn in.

Shape letters: N tracks, H height, W width.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    rate = max(playing_rate(fps, frames), Fraction(1, 3600))  # the encoder takes none that are much slower
    with VideoWriter(path, rate, size[1], size[0]) as writer:
        for position, frame in enumerate(read_frames(video, size=size, frames=frames)):
            writer.write(draw_tracks(frame, masks(position), colors, texts))
            if progress is not None:
                progress(position + 1, len(frames))


def playing_rate(fps: float, frames: Sequence[int]) -> Fraction:
    """Frames per second at which some frames of a video play as long as the source does.

    Args:
        fps: of the source.
        frames: their numbers in the source; rising, at least one.

    Raises:
        VideoError: the rate is none that video files can state.
    """
    rate = as_frame_rate(fps)
    return rate * (len(frames) - 1) / (frames[-1] - frames[0]) if len(frames) > 1 else rate


def read_frames(
    video: VideoReader | VideoSource, *, size: tuple[int, int], frames: Sequence[int], exactly: bool = False
) -> Iterator[np.ndarray]:
    """Frames of the video that was segmented, with one in memory at a time.

    Args:
        video: to be read.
        size: (H, W) that it must have.
        frames: numbers in the source, from 0, of those to give; rising, at least one.
        exactly: whether it must give no further frame after them.

    Raises:
        VideoError: the video is of another size, or ends before the last of the frames, or after it.
    """
    reader = video if isinstance(video, VideoReader) else open_video(video)
    if (reader.height, reader.width) != size:
        raise VideoError(
            f"{reader.source}: the video is {reader.width}x{reader.height} but the segmented one was "
            f"{size[1]}x{size[0]}; give the video that was segmented"
        )
    position = 0
    for read, frame in enumerate(reader):
        if position == len(frames):
            raise VideoError(
                f"{reader.source}: the video has more frames than the {len(frames)} that were segmented; "
                "give the video that was segmented"
            )
        if reader.frame_index(read) != frames[position]:
            continue
        yield frame
        position += 1
        if position == len(frames) and not exactly:
            return
    if position < len(frames):
        raise VideoError(
            f"{reader.source}: frame {frames[position]} was segmented but the video does not give it; "
            "give the video that was segmented, and the same frames of it"
        )

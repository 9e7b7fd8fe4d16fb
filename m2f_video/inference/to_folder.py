"""A video's tracks and overlay, written to a folder."""

from pathlib import Path
from typing import Any

from m2f_video.files import made_directory
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.on_video import Progress
from m2f_video.inference.segment import Mode, choose_mode, collect, segment_video, stream_video
from m2f_video.inference.stream import FrameResult, VideoStream
from m2f_video.results.tracks import OVERLAY_FILE, VideoSegmentation
from m2f_video.video.reader import VideoReader
from m2f_video.video.writer import MAX_SIDE, VideoWriter


def segment_to_folder(
    model: ClipModel,
    reader: VideoReader,
    output: Path,
    *,
    overlay: bool = True,
    mode: Mode = "auto",
    score_threshold: float = 0.0,
    progress: Progress | None = None,
    **options: Any,
) -> VideoSegmentation:
    """Segment a video and write `tracks.json` and, with `overlay`, `overlay.mp4`.

    Of what is read once, such as a pipe, the overlay is drawn as frames come, by the scores of that moment.

    Args:
        model: see `segment_video`, as for all below that are not described here.
        reader: of the video.
        output: folder to write to; made where missing.
        overlay: draw the tracks.
        mode: how the video is segmented.
        score_threshold: tracks that score less are left out.
        progress: see `Progress`; the stages are those of `segment_video`, and "overlay".
        options: others of `segment_video`.

    Returns:
        What was written.

    Raises:
        VideoError, ValueError: as `segment_video`; and `check_overlay`'s.
        OSError: the files cannot be written.
    """
    chosen, _ = choose_mode(mode, reader.num_frames_hint)
    if overlay:
        check_overlay(reader, output, mode)
    if overlay and reader.read_once:
        return _drawn_as_it_comes(stream_video(model, reader, progress=progress, **options), output, score_threshold)
    segmentation = segment_video(
        model, reader, mode=chosen, score_threshold=score_threshold, progress=progress, **options
    )

    def drawn(done: int, total: int) -> None:
        if progress is not None:
            progress("overlay", done, total)

    segmentation.save(output, overlay, progress=drawn)
    return segmentation


def check_overlay(reader: VideoReader, output: Path, mode: Mode) -> None:
    """Fail before the work where an overlay of a video could not be written after it.

    Raises:
        ValueError: it is read once, and not in windows; it is too large; or it is the overlay itself.
    """
    if reader.read_once and choose_mode(mode, reader.num_frames_hint)[0] != "window":
        raise ValueError("a video that is piped in can be drawn on only in --mode window; give --no-overlay")
    if max(reader.width, reader.height) > MAX_SIDE:
        raise ValueError(
            f"{reader.source} is {reader.width}x{reader.height}, and an overlay has at most {MAX_SIDE} pixels on a "
            "side; give --no-overlay"
        )
    if not reader.read_once and Path(reader.source).resolve() == (output / OVERLAY_FILE).resolve():
        raise ValueError(f"{reader.source} is what --output would overwrite; give --output another folder")


def _drawn_as_it_comes(stream: VideoStream, output: Path, score_threshold: float) -> VideoSegmentation:
    """Segment a video that is read once, and write its tracks and, meanwhile, its overlay."""
    reader = stream.video.reader
    start, step = reader.frame_index(0), reader.frame_index(1) - reader.frame_index(0)

    def write(result: FrameResult) -> None:
        image = stream.draw(result, score_threshold)
        while start + writer.num_frames * step <= result.frame:  # in the place of frames that did not decode too
            writer.write(image)

    with (
        made_directory(output) as folder,
        VideoWriter(folder / OVERLAY_FILE, reader.fps / step, stream.width, stream.height) as writer,
    ):
        segmentation = collect(stream, score_threshold, write)
        segmentation.save(folder, overlay=False)
    return segmentation

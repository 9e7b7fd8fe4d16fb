"""From a video to tracks, as one clip, at once or frame by frame, or in windows.

T frames, Q queries, K classes, W frames of a window, S its stride.
"""

from typing import Literal, TypedDict, get_args

import torch

from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.linking import Linker, LinkerName, named_linker
from m2f_video.inference.on_video import ModelOnVideo, Progress
from m2f_video.inference.postprocess import select_top_k
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segments import check_count
from m2f_video.inference.stream import VideoStream, segment_windows
from m2f_video.inference.streamed import segment_streamed
from m2f_video.inference.whole import segment_whole
from m2f_video.inference.windows import MAX_OVERLAP, Windowing
from m2f_video.results.tracks import Track, VideoSegmentation
from m2f_video.video.reader import VideoReader, VideoSource, open_video

Mode = Literal["auto", "whole", "streamed", "window"]
WINDOW = 8
"""Frames of a window."""
MOST_WHOLE = 36
"""Frames of the longest video that `auto` takes as one clip: of the longest in YouTubeVIS 2019."""


class SegmentOptions(TypedDict, total=False):
    """Options of `segment_video` that choose another function of the video; see there."""

    mode: Mode
    window: int
    stride: int | None
    linker: LinkerName | Linker
    max_overlap: float | None


def choose_mode(mode: Mode, num_frames: int | None) -> tuple[Literal["whole", "streamed", "window"], str]:
    """How a video is segmented, and why, in words.

    Args:
        mode: as it was asked for.
        num_frames: of the video, as far as its source knows.

    Raises:
        ValueError: no such mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r:.60}")
    if mode != "auto":
        return mode, "as asked"
    if num_frames is None:
        return "window", "the source does not say how long it is"
    if num_frames > MOST_WHOLE:
        return "window", f"{num_frames} frames are more than {MOST_WHOLE}"
    return "whole", f"{num_frames} frames are at most {MOST_WHOLE}"


@torch.inference_mode()
def segment_video(
    model: ClipModel,
    source: VideoSource | VideoReader,
    *,
    processor: VideoProcessor | None = None,
    frames: slice | None = None,
    mode: Mode = "auto",
    window: int = WINDOW,
    stride: int | None = None,
    linker: LinkerName | Linker = "transfer",
    max_overlap: float | None = None,
    top_k: int = 10,
    score_threshold: float = 0.0,
    frames_per_chunk: int | None = None,
    strict: bool = False,
    plain: bool = False,
    progress: Progress | None = None,
) -> VideoSegmentation:
    """Segment and track the objects of a video.

    As a whole it is one clip: every query attends to all frames (arXiv 2112.10764, section 3), and features of all
    frames stay in memory until the end. Streamed it is the same clip, decoded with one frame at a time on the model's
    device, and what that needs of each in host memory or a file. In windows, clips of a few frames are decoded one
    after the other and their objects are linked, in memory that does not grow with the video but for the result;
    `stream_video` gives that frame by frame.

    Args:
        model: with `temporal="joint"`, on any device, in any dtype. It runs in evaluation mode and accelerated, see
            `m2f_video.acceleration.accelerated`, and is as it was afterwards; several threads may share it.
        source: what `open_video` takes (file, folder of frames, array, iterator of frames, open file), or an open
            reader. The result of what is read once has no `video` to draw on.
        processor: other preprocessing than the model's own.
        frames: which frames of the source, counted from 0; None takes all. Not for an open reader.
        mode: `whole`, as published; `streamed`, which gives what `whole` gives, to rounding; `window`; or `auto`, which
            takes `whole` for up to `MOST_WHOLE` frames, and `window` for more or where the source does not say how many
            it has. See `choose_mode`, and `m2f_video.inference.streamed` for what is kept of frames, and where. A
            transformer decoder that is not as it is written (a part replaced, patched, hooked, or looked at by
            `model.capture`), mask pooling and SMCA have no streamed form.
        window: frames W of a window.
        stride: frames S from the beginning of one window to that of the next, 1 to W; None is W. Frames that two
            windows share keep the masks of the first.
        linker: how objects of a window are linked to tracks: a name, see `m2f_video.inference.linking.LINKERS`, or a
            `Linker` of your own.
        max_overlap: an object of whose mask, in the whole video or a window, more certain ones cover a larger share is
            a duplicate and left out; 1 keeps all, as the published evaluation does. None is 0.5 for `window`, else 1.
        top_k: how many (object, class) pairs become tracks, as the published evaluation takes 10; take more for a
            video that shows more objects.
        score_threshold: pairs of less `certainty` are left out: in windows the probability of the class where the
            track is seen, else the score.
        frames_per_chunk: frames encoded at a time; None is 1 on a CPU and 8 elsewhere. `streamed` takes 1 on a CPU
            whatever this says, so that it changes no bit.
        strict: raise an error for a video that is damaged or changes its size, instead of warning and using
            what comes before.
        plain: run the model as it is written, without accelerated twins.
        progress: see `Progress`.

    Returns:
        Tracks by falling score; their masks have the source's size. `save` writes them and the overlay.

    Raises:
        VideoError: the source is no video, or none of its frames is selected.
        FileNotFoundError: there is no such file.
        TypeError: `model` is none.
        ValueError: a per-frame model, one that cannot be `streamed`, an option out of its range, or NaN in what the
            model gives.
        OSError: `streamed` has no room for its file.
    """
    video = _on_video(model, source, processor, frames, frames_per_chunk, strict, progress)
    _check_selection(model, top_k, score_threshold)
    chosen, _ = choose_mode(mode, video.reader.num_frames_hint)
    windowing = _windowing(window, stride, linker, max_overlap, top_k)  # a bad option is one in any mode
    if chosen == "window":
        return _segmentation(video, *segment_windows(VideoStream(video, windowing, plain), score_threshold))
    duplicates = 1.0 if max_overlap is None else max_overlap
    with video.accelerated(plain) as fast:
        segment = segment_whole if chosen == "whole" else segment_streamed
        tracks, count = segment(fast, top_k=top_k, score_threshold=score_threshold, max_overlap=duplicates)
    return _segmentation(video, tracks, count)


def stream_video(
    model: ClipModel,
    source: VideoSource | VideoReader,
    *,
    processor: VideoProcessor | None = None,
    frames: slice | None = None,
    window: int = WINDOW,
    stride: int | None = None,
    linker: LinkerName | Linker = "transfer",
    max_overlap: float | None = None,
    top_k: int = 10,
    frames_per_chunk: int | None = None,
    strict: bool = False,
    plain: bool = False,
    progress: Progress | None = None,
) -> VideoStream:
    """Segment and track the objects of a video frame by frame, as it comes: a file, a pipe, a camera.

    Iterating gives a `FrameResult` for every frame: its masks by the ids of their tracks, and its pixels. Both are
    final, and come when the first window that the frame is in has been read and decoded: of a window of W frames with
    a stride of S, the last S (of the first window all) come together. So a frame waits for at most W - 1 others, at
    30 frames a second and W = 8 for 0.23 s, and then for the model. `window=1` waits for none. What tracks are, and how
    sure the model is, grows with the video: `stream.scores()` at any time, final after the last frame; `stream.draw`
    draws by it. Memory grows with the number of tracks alone: a few kB each.

    An error of the source, such as one that a generator raises, comes out of the iteration; frames before its window
    have been given. The model stays accelerated while the iteration is open; closing it early puts it back::

        with contextlib.closing(iter(stream)) as results:
            ...

    Args:
        model: see `segment_video`, as for all below that are not described here.
        source: what `open_video` takes, or an open reader; see there for a camera.
        processor: other preprocessing than the model's own.
        frames: which frames of the source.
        window: frames W of a window.
        stride: frames S from the beginning of one window to that of the next.
        linker: how objects of a window are linked to tracks.
        max_overlap: of duplicates in a window; None is 0.5.
        top_k: how many (track, class) pairs `scores` gives.
        frames_per_chunk: frames encoded at a time.
        strict: raise an error for a video that is damaged.
        plain: run the model as it is written.
        progress: see `Progress`; the stage is "frames".

    Returns:
        What to iterate, once.

    Raises:
        VideoError, FileNotFoundError, TypeError, ValueError: as `segment_video`.
    """
    video = _on_video(model, source, processor, frames, frames_per_chunk, strict, progress)
    _check_selection(model, top_k, 0.0)
    return VideoStream(video, _windowing(window, stride, linker, max_overlap, top_k), plain)


def _segmentation(video: ModelOnVideo, tracks: list[Track], count: int) -> VideoSegmentation:
    reader = video.reader
    return VideoSegmentation(
        source=reader.source,
        width=reader.width,
        height=reader.height,
        fps=float(reader.fps),
        frames=reader.frame_indices(count),
        labels=video.model.config.labels,
        tracks=tuple(tracks),
        video=None if reader.read_once else reader,
    )


def _on_video(
    model: ClipModel,
    source: VideoSource | VideoReader,
    processor: VideoProcessor | None,
    frames: slice | None,
    frames_per_chunk: int | None,
    strict: bool,
    progress: Progress | None,
) -> ModelOnVideo:
    _check_model(model)
    if isinstance(source, VideoReader) and frames is not None:
        raise ValueError("frames cannot be chosen for an open reader; give them to open_video")
    reader = source if isinstance(source, VideoReader) else open_video(source, frames, strict=strict)
    chunk_size = _chunk_size(model, frames_per_chunk)
    processor = processor or VideoProcessor.from_config(model.config)
    if not isinstance(processor, VideoProcessor):
        raise TypeError(f"processor must be a VideoProcessor, got {type(processor).__name__}")
    return ModelOnVideo(model, reader, processor, chunk_size, progress)


def check_options(
    model: ClipModel,
    *,
    mode: Mode = "auto",
    window: int = WINDOW,
    stride: int | None = None,
    linker: LinkerName | Linker = "transfer",
    max_overlap: float | None = None,
    top_k: int = 10,
    score_threshold: float = 0.0,
    frames_per_chunk: int | None = None,
) -> None:
    """Fail as `segment_video` would with these, before there is a video.

    Raises:
        TypeError, ValueError: see there.
    """
    _check_model(model)
    _chunk_size(model, frames_per_chunk)
    _check_selection(model, top_k, score_threshold)
    choose_mode(mode, None)
    _windowing(window, stride, linker, max_overlap, top_k)


def _check_model(model: ClipModel) -> None:
    if not isinstance(model, ClipModel):
        raise TypeError(
            f"the model comes first, loaded by VideoMask2Former.from_pretrained; got {type(model).__name__}"
        )
    if model.config.temporal != "joint":
        raise ValueError(
            "segment_video needs a model with temporal='joint', whose identities hold across frames; "
            "load the checkpoint with temporal='joint' (--temporal joint), or segment its frames as images with "
            "processor.post_process_instance_segmentation"
        )


def _chunk_size(model: ClipModel, frames_per_chunk: int | None) -> int:
    chunk_size = (1 if model.device.type == "cpu" else 8) if frames_per_chunk is None else frames_per_chunk
    check_count("frames_per_chunk", chunk_size)
    return chunk_size


def _windowing(
    window: int, stride: int | None, linker: LinkerName | Linker, max_overlap: float | None, top_k: int
) -> Windowing:
    return Windowing(
        window=window,
        stride=window if stride is None else stride,
        linker=named_linker(linker),
        max_overlap=MAX_OVERLAP if max_overlap is None else max_overlap,
        top_k=top_k,
    )


def _check_selection(model: ClipModel, top_k: int, score_threshold: float) -> None:
    """Fail before the work rather than after it."""
    check_count("top_k", top_k)
    config = model.config
    blank = torch.zeros(config.transformer_decoder.num_queries, config.num_labels + 1)
    select_top_k(blank, top_k, score_threshold)

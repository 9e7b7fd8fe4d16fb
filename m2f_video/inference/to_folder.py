"""A video's tracks and overlay, written to a folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m2f_video.files import locked, made_directory
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.fingerprint import model_fingerprint, options_fingerprint, source_fingerprint
from m2f_video.inference.on_video import Progress
from m2f_video.inference.partial import PartialResult, complete_result, discard
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import Mode, choose_mode, segment_video, stream_video
from m2f_video.inference.stream import VideoStream
from m2f_video.results.report_page import (
    REPORT_FILE,
    REPORT_VIDEO_FILE,
    VideoPlace,
    check_shown,
    shown_from,
    write_report,
)
from m2f_video.results.tracks import OVERLAY_FILE, VideoSegmentation
from m2f_video.video.reader import VideoReader
from m2f_video.video.writer import MAX_SIDE

LOCK_FILE = ".lock"
"""That is there while a video is segmented to a folder, and after a run that was killed; it means nothing by itself."""


def segment_to_folder(
    model: ClipModel,
    reader: VideoReader,
    output: Path,
    *,
    overlay: bool = True,
    mode: Mode = "auto",
    page: VideoPlace | None = None,
    score_threshold: float = 0.0,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    fingerprint: str | None = None,
    **options: Any,
) -> VideoSegmentation:
    """Segment a video and write `tracks.jsonl`, `tracks.json` and, with `overlay`, `overlay.mp4`.

    With `page`, `report.html` is written when they are complete, of the result as it is then.

    In windows, `tracks.jsonl` is written as frames become final, in memory that does not grow with the video but for a
    few kB a track, and the overlay by what is known at that moment. What there was of an earlier result goes when the
    first frames are final. A run that is stopped leaves `tracks.jsonl`, which `VideoSegmentation.load` reads, and the
    folder `.unfinished`, from which `resume` goes on: the result is that of a run that was not stopped, byte by byte,
    but for what depends on the machine (another device is refused, another processor is not noticed).
    In other modes files appear when they are complete, and those of an earlier result stay until then.

    Args:
        model: see `segment_video`, as for all below that are not described here.
        reader: of the video.
        output: folder to write to; made where missing.
        overlay: draw the tracks.
        page: write a page, with the video inside it or beside it.
        mode: how the video is segmented.
        score_threshold: tracks of less certainty are left out.
        resume: go on with a run in windows that was stopped, and leave a result alone that is complete; where there is
            none of this video, or nothing to go on from, as in other modes, start anew.
        progress: see `Progress`; the stages are those of `segment_video`, "overlay" where it is drawn at the end, and
            "page".
        say: called with a line on what `resume` found.
        fingerprint: of the model, where `model_fingerprint` has been asked for it.
        options: others of `segment_video`.

    Returns:
        What was written. In windows the masks are in `tracks.jsonl`, which must stay while they are asked for.

    Raises:
        VideoError, ValueError: as `segment_video`; `check_source`'s, `check_overlay`'s, `check_page`'s and
            `check_resume`'s; or another run is at work in the folder.
        AnotherResultError: `resume` finds a result of another video, model or options, or one that is damaged.
        OSError: the files cannot be written. Where it has notes (`__notes__`), they say what is final and where.
    """
    chosen, _ = choose_mode(mode, reader.num_frames_hint)
    check_source(reader, output, overlay=overlay, mode=mode)
    if overlay:
        check_overlay(reader, mode)
    if page is not None:
        check_page(reader, output, page)
    if resume:
        check_resume(reader)
    if chosen == "window":
        stream = stream_video(model, reader, progress=progress, **options)
        how = _options_of(stream)
    else:
        how = {name: value for name, value in options.items() if name not in ("window", "stride", "linker")}
    how |= {"mode": chosen, "score_threshold": score_threshold, "overlay": overlay}
    made = _made_from(model, fingerprint, reader, how)

    def written(folder: Path) -> VideoSegmentation:
        if resume and (found := complete_result(folder, made, overlay)) is not None:
            _say(say, f"{output}: it is complete already, nothing is to be done")
            return replace(found, video=reader)
        if chosen == "window":
            return _in_windows(stream, folder, made, overlay, score_threshold, resume, say)
        if resume:
            _say(say, f"{output}: there is no run to go on with in mode {chosen}; start anew")
        segmentation = segment_video(
            model, reader, mode=chosen, score_threshold=score_threshold, progress=progress, **options
        )
        discard(folder)
        segmentation = replace(segmentation, made=made)
        segmentation.save(folder, overlay, progress=_stage(progress, "overlay"))
        return segmentation

    with _held(output) as folder:
        segmentation = written(folder)
        if page is not None:
            write_report(
                folder / REPORT_FILE,
                [segmentation],
                place=page,
                min_score=shown_from(segmentation),
                progress=_stage(progress, "page"),
            )
        return segmentation


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, stage)


def check_overlay(reader: VideoReader, mode: Mode) -> None:
    """Fail before the work where an overlay of a video could not be written after it.

    Raises:
        ValueError: it is read once, and not in windows; or it is too large.
    """
    if reader.read_once and choose_mode(mode, reader.num_frames_hint)[0] != "window":
        raise ValueError("a video that is piped in can be drawn on only in --mode window; give --no-overlay")
    if max(reader.width, reader.height) > MAX_SIDE:
        raise ValueError(
            f"{reader.source} is {reader.width}x{reader.height}, and an overlay has at most {MAX_SIDE} pixels on a "
            "side; give --no-overlay"
        )


def check_source(reader: VideoReader, output: Path, *, overlay: bool, mode: Mode) -> None:
    """Fail before a video goes with what a folder holds of an earlier result.

    Raises:
        ValueError: it is the overlay there, which is written, or in windows removed.
    """
    goes = overlay or choose_mode(mode, reader.num_frames_hint)[0] == "window"
    if goes and not reader.read_once and Path(reader.source).resolve() == (output / OVERLAY_FILE).resolve():
        raise ValueError(f"{reader.source} is what --output would overwrite; give --output another folder")


def check_page(reader: VideoReader, output: Path, page: VideoPlace) -> None:
    """Fail before the work where a page of a video could not be written after it.

    Raises:
        ValueError: it is read once, too large, too long, or what the page's video would overwrite.
    """
    if reader.read_once:
        raise ValueError("a video that is piped in cannot be shown on a page, which reads it again; leave out --report")
    check_shown(reader.width, reader.height, reader.num_frames_hint)
    beside = output / REPORT_VIDEO_FILE
    if page == "beside" and Path(reader.source).resolve() == beside.resolve():
        raise ValueError(f"{reader.source} is what the page's video would overwrite; give --output another folder")


def check_resume(reader: VideoReader) -> None:
    """Fail before the work where a run could not be told to be of the same video.

    Raises:
        ValueError: the video is no file or folder.
    """
    if reader.read_once or not os.path.exists(reader.source):
        raise ValueError(
            f"{reader.source} cannot be resumed: what comes through a pipe, or is in memory, cannot be read again; "
            "give a file, or leave out --resume"
        )


def _in_windows(
    stream: VideoStream,
    folder: Path,
    made: dict[str, Any],
    overlay: bool,
    score_threshold: float,
    resume: bool,
    say: Callable[[str], None] | None,
) -> VideoSegmentation:
    if resume and not stream.is_resumable:
        raise ValueError(
            f"a run with {type(stream.windowing.linker).__name__} cannot be resumed: a linker of your own is a frozen "
            "dataclass, or has state_dict and load_state_dict"
        )
    stream.scores(score_threshold)  # a bad threshold is told before the work
    reader = stream.video.reader
    with ExitStack() as stack:
        result: PartialResult | None = None
        if resume:
            result = PartialResult.go_on(stream, folder, overlay=overlay, score_threshold=score_threshold)
            began = "nothing to go on from; start anew" if result is None else f"go on after frame {result.kept}"
            _say(say, f"{folder}: {began}")
        if result is not None:
            stack.enter_context(result)
        try:
            for results in stack.enter_context(closing(stream.windows())):
                if result is None:  # only now: until here a video can turn out not to be one
                    begun = PartialResult.begin(stream, folder, made, overlay=overlay, score_threshold=score_threshold)
                    result = stack.enter_context(begun)
                result.add(results)
            assert result is not None  # noqa: S101  # a video has a frame
            return replace(result.finish(), video=None if reader.read_once else reader)
        except BaseException as error:
            if result is not None:
                error.add_note(result.note())
            raise


@contextmanager
def _held(output: Path) -> Iterator[Path]:
    """The folder of a result, made where missing, while no other run writes there."""
    with made_directory(output) as folder, locked(folder / LOCK_FILE) as is_mine:
        if not is_mine:
            raise ValueError(f"another run is at work in {output}; wait for its end, or write elsewhere")
        yield folder


def _options_of(stream: VideoStream) -> dict[str, Any]:
    windowing, linker = stream.windowing, stream.windowing.linker
    return {
        "window": windowing.window,
        "stride": windowing.stride,
        "linker": linker if is_dataclass(linker) else type(linker).__qualname__,
        "max_overlap": windowing.max_overlap,
        "top_k": windowing.top_k,
        "frames_per_chunk": stream.video.frames_per_chunk,
        "plain": stream.plain,
        "processor": stream.video.processor,
    }


def _made_from(model: ClipModel, checkpoint: str | None, reader: VideoReader, how: dict[str, Any]) -> dict[str, Any]:
    """All that a result depends on, in what JSON takes."""
    processor = how.pop("processor", None) or VideoProcessor.from_config(model.config)
    how["device"] = model.device.type
    is_known = isinstance(model, torch.nn.Module) or hasattr(model, "fingerprint")
    if checkpoint is None and is_known:  # else a stand-in, whose weights nobody sees
        checkpoint = model_fingerprint(model)
    return {
        "source": source_fingerprint(reader.source) if os.path.exists(reader.source) else None,
        "frames": reader.selected,
        "fps": float(reader.fps),
        "checkpoint": checkpoint,
        "preprocessing": options_fingerprint({"config": processor.config})["config"],
        **options_fingerprint(how),
    }


def _say(say: Callable[[str], None] | None, line: str) -> None:
    if say is not None:
        say(line)

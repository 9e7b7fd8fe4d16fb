"""A result that is written while a video is segmented in windows, and what a run that was stopped needs to go on.

`tracks.jsonl` grows by the frames that are final. Every `KEPT_EVERY` frames, at the end of a window, the overlay's part
that is open is closed, all is brought to the disk, and then the state of the stream: the tracks, how long
`tracks.jsonl` is, and how many parts there are. From there a run goes on as if it had not been stopped, since where
that happens depends on the frames alone. State and parts are in `.unfinished`, which goes when the result is complete;
`tracks.json` and `overlay.mp4` come only then, and those of an earlier result go before the first line is written.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from m2f_video.files import atomic_path, check_regular, sync
from m2f_video.inference.fingerprint import differences
from m2f_video.inference.stream import FrameResult, VideoStream, best_tracks, other_tracks
from m2f_video.results.report_page import REPORT_FILE, REPORT_VIDEO_FILE
from m2f_video.results.tracks import MOST_JSON_FRAMES, OVERLAY_FILE, TRACKS_FILE, VideoSegmentation, track_row
from m2f_video.results.tracks_file import TRACKS_LINES_FILE, Row, TracksLines, TracksWriter, header_of, read_header
from m2f_video.video.decode import VideoError
from m2f_video.video.parts import VideoParts

UNFINISHED_FOLDER = ".unfinished"
KEPT_EVERY = 200
"""Frames, at least, from one state to the next: what a run that is stopped has to do again."""
TRACKS_EVERY = 25
"""Frames, at least, from one line of tracks to the next."""
_SLOWEST = Fraction(1, 3600)  # frames per second; encoders take none that are much slower
_LARGEST_DENOMINATOR = 10**6  # averages of a file with frames of any length have larger ones than files can state
_STATE_FILE, _PARTS_FOLDER = "state.safetensors", "overlay"


class AnotherResultError(ValueError):
    """What is there is damaged, or a result of another video, model or options: it cannot be gone on with."""


class PartialResult:
    """The files of a result that grows; made by `begin` or `go_on`, and a context manager that closes them.

    Args:
        stream: of the video.
        folder: of the result.
        lines: its `tracks.jsonl`.
        parts: of its overlay; None without one.
        score_threshold: tracks of less certainty are neither drawn nor said.
        drawn: frames of the overlay so far.

    Attributes:
        kept: frames up to the last state.
    """

    def __init__(
        self,
        stream: VideoStream,
        folder: Path,
        lines: TracksWriter,
        parts: VideoParts | None,
        score_threshold: float,
        drawn: int = 0,
    ) -> None:
        self._stream, self._folder, self._threshold = stream, folder, score_threshold
        self._lines, self._parts, self._drawn = lines, parts, drawn
        self._boundary = self.kept = lines.num_frames
        reader = stream.video.reader
        self._start, self._step = reader.start, reader.step

    @classmethod
    def begin(
        cls, stream: VideoStream, folder: Path, made: Mapping[str, Any], *, overlay: bool, score_threshold: float
    ) -> "PartialResult":
        """Start anew, and remove what is there of an earlier result.

        Raises:
            OSError: files cannot be written.
        """
        discard(folder)
        for name in (TRACKS_LINES_FILE, TRACKS_FILE, OVERLAY_FILE, REPORT_FILE, REPORT_VIDEO_FILE):
            (folder / name).unlink(missing_ok=True)
        lines = TracksWriter.begin(folder / TRACKS_LINES_FILE, _header(stream, made))
        return cls(stream, folder, lines, _parts(stream, folder) if overlay else None, score_threshold)

    @classmethod
    def go_on(
        cls, stream: VideoStream, folder: Path, *, overlay: bool, score_threshold: float
    ) -> "PartialResult | None":
        """Go on where the last state was kept; None where there is none.

        Raises:
            AnotherResultError: files of it are missing or damaged.
            OSError: files cannot be read or written.
        """
        file = folder / UNFINISHED_FOLDER / _STATE_FILE
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt", device=str(stream.video.model.device)) as state:
                kept = json.loads(state.metadata()["kept"])
                stream.load_state_dict({name: state.get_tensor(name) for name in state.keys()})  # noqa: SIM118
            length, closed, drawn = (int(kept[name]) for name in ("bytes", "parts", "drawn"))
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise AnotherResultError(f"{file} is damaged: {error}; start anew, without --resume") from error
        with ExitStack() as stack:
            try:
                lines = stack.enter_context(TracksWriter.go_on(folder / TRACKS_LINES_FILE, length))
                if lines.num_frames != stream.num_frames:
                    raise ValueError(f"{lines.path} and {file} are of two runs")
                parts = _parts(stream, folder, closed) if overlay else None
            except FileNotFoundError as error:
                raise AnotherResultError(f"{error.filename} is missing; start anew, without --resume") from error
            except ValueError as error:
                raise AnotherResultError(f"{error}; start anew, without --resume") from error
            stack.pop_all()
        return cls(stream, folder, lines, parts, score_threshold, drawn)

    def __enter__(self) -> "PartialResult":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            stack.callback(self._lines.close)
            if self._parts is not None:
                self._parts.__exit__(kind, error, traceback)

    def add(self, results: list[FrameResult]) -> None:
        """Write what a window has made final.

        Raises:
            VideoError: a frame cannot be drawn on.
            OSError: files cannot be written; what was final before stays.
        """
        for result in results:
            self._lines.frame(result.frame, result.masks)
            if self._parts is not None:
                image = self._stream.draw(result, self._threshold)
                while self._start + self._drawn * self._step <= result.frame:  # for frames that did not decode too
                    self._parts.write(image)
                    self._drawn += 1
        is_due = self._stream.num_frames - self._boundary >= KEPT_EVERY
        if is_due or self._lines.frames_since >= TRACKS_EVERY or self._lines.num_frames == len(results):
            self._lines.tracks(track_row(**fields) for fields in best_tracks(self._stream, self._threshold))
        if is_due:
            self._keep()

    def finish(self) -> VideoSegmentation:
        """Write what a complete result has, and give it, its masks in its file.

        Raises:
            AnotherResultError: a part of the overlay is damaged.
            OSError: files cannot be written.
        """
        best = best_tracks(self._stream, self._threshold)
        others = other_tracks(self._stream, best)
        self._lines.end([track_row(**fields) for fields in best], [track_row(**fields) for fields in others])
        result, written = VideoSegmentation.load(self._lines.path), [self._lines.path]
        if (text := result.to_json()) is not None:
            written.append(self._folder / TRACKS_FILE)
            with atomic_path(written[-1]) as file:
                file.write_text(text, encoding="utf-8")
        if self._parts is not None:
            written.append(self._folder / OVERLAY_FILE)
            try:
                self._parts.join(written[-1])
            except VideoError as error:
                raise AnotherResultError(str(error)) from error
        for path in written:  # before what they could be made from again goes
            sync(path)
        discard(self._folder)
        return result

    def note(self) -> str:
        """What is there when a run is stopped, and how to go on."""
        then = f"goes on after {self.kept} of them" if self.kept else "starts anew"
        return f"{self._lines.num_frames} frames are final and in {self._lines.path}; --resume {then}"

    def _keep(self) -> None:
        if self._parts is not None:
            self._parts.close()
        self._boundary = self._stream.num_frames
        if not self._stream.is_resumable:
            return
        (self._folder / UNFINISHED_FOLDER).mkdir(exist_ok=True)
        sync(self._lines.path)
        kept = {
            "bytes": self._lines.length,
            "parts": 0 if self._parts is None else self._parts.closed,
            "drawn": self._drawn,
        }
        file = self._folder / UNFINISHED_FOLDER / _STATE_FILE
        state = {name: tensor.contiguous() for name, tensor in self._stream.state_dict().items()}
        with atomic_path(file) as temporary:
            temporary.write_bytes(save(state, {"kept": json.dumps(kept)}))
            sync(temporary)
        sync(file)
        self.kept = self._boundary


def complete_result(folder: Path, made: Mapping[str, Any], overlay: bool) -> VideoSegmentation | None:
    """The result in a folder, of the same video, model and options; None where there is none, or it is not complete.

    Args:
        folder: of the result.
        made: what it is made from.
        overlay: whether an overlay belongs to it.

    Raises:
        AnotherResultError: what is there is damaged, or made from something else; the message says what differs.
    """
    file, goes_on = folder / TRACKS_LINES_FILE, (folder / UNFINISHED_FOLDER / _STATE_FILE).exists()
    if not file.exists() or not (_has_begun(file) or goes_on):
        return None
    lines: TracksLines | None = None
    try:
        try:
            lines = TracksLines(file)
            header = lines.header
        except ValueError:
            if not goes_on:
                raise
            header = read_header(file)  # what came after the state may be anything, and is written again
    except ValueError as error:
        raise AnotherResultError(f"{file}: {error}; start anew, without --resume") from error
    found = header.get("made")
    if differing := differences(_content(found if isinstance(found, Mapping) else {}), _content(made)):
        raise AnotherResultError(
            f"{folder} holds a result of another {', '.join(differing[:5])}; give what it began with, write elsewhere, "
            "or start anew, without --resume"
        )
    if lines is None or not lines.complete:
        return None
    others = [TRACKS_FILE] * (len(lines.frames) <= MOST_JSON_FRAMES) + [OVERLAY_FILE] * overlay
    if not all((folder / name).exists() for name in others):
        return None
    discard(folder)
    return VideoSegmentation.load(file)


def _has_begun(file: Path) -> bool:
    """Whether a file of tracks has a line: a run that was stopped at once, or had no room, leaves one that has none."""
    check_regular(file)
    with file.open("rb") as content:
        return any(b"\n" in part for part in iter(lambda: content.read(1 << 20), b""))


def discard(folder: Path) -> None:
    """Remove what a run that was stopped has kept to go on; its state first, which needs the rest."""
    unfinished = folder / UNFINISHED_FOLDER
    (unfinished / _STATE_FILE).unlink(missing_ok=True)
    if unfinished.is_dir():
        shutil.rmtree(unfinished)


def _parts(stream: VideoStream, folder: Path, closed: int = 0) -> VideoParts:
    reader = stream.video.reader
    rate = max((reader.fps / reader.step).limit_denominator(_LARGEST_DENOMINATOR), _SLOWEST)
    return VideoParts(folder / UNFINISHED_FOLDER / _PARTS_FOLDER, rate, stream.width, stream.height, closed)


def _content(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a result is made from, wherever the video is."""
    source = made.get("source")
    return {**made, "source": {**source, "path": None} if isinstance(source, Mapping) else source}


def _header(stream: VideoStream, made: Mapping[str, Any]) -> Row:
    video = {"source": stream.source, "width": stream.width, "height": stream.height, "fps": stream.fps}
    return header_of(video, stream.labels, made)

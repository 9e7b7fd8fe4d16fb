"""Many videos, by one process or several that share them through the folder that they write to."""

import errno
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import node
from typing import Any, Literal

import torch

from m2f_video.acceleration import accelerated
from m2f_video.files import locked, made_directory
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.fingerprint import model_fingerprint, options_fingerprint, source_fingerprint
from m2f_video.inference.linking import Linker, LinkerName, is_resumable, named_linker
from m2f_video.inference.listing import ListedVideo, Sources, list_videos
from m2f_video.inference.manifest import Entry, Manifest
from m2f_video.inference.on_video import Progress, is_out_of_memory
from m2f_video.inference.partial import AnotherResultError
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import WINDOW, Mode, check_options, choose_mode
from m2f_video.inference.to_folder import segment_to_folder
from m2f_video.results.report_page import VideoPlace
from m2f_video.video.reader import open_video

POLL_SECONDS = 1.0
"""Between two looks at videos that other processes have taken."""
_STOPPING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that the next video would meet too."""
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a video.

    Attributes:
        name: of its folder in the output folder.
        path: of the video.
        state: `done` by this process or another one meanwhile; `skipped`, as it had been done before; or `failed`.
        error: why it failed, else empty.
        frames: of the result.
        tracks: of the result.
        seconds: that it took.
        here: whether it was this process.
    """

    name: str
    path: Path
    state: Literal["done", "skipped", "failed"]
    error: str = ""
    frames: int = 0
    tracks: int = 0
    seconds: float = 0.0
    here: bool = False


def segment_many(
    model: ClipModel,
    sources: Sources,
    output: str | os.PathLike[str],
    *,
    checkpoint: str = "",
    processor: VideoProcessor | None = None,
    frames: slice | None = None,
    strict: bool = False,
    overlay: bool = True,
    page: VideoPlace | None = None,
    mode: Mode = "auto",
    window: int = WINDOW,
    stride: int | None = None,
    linker: LinkerName | Linker = "transfer",
    max_overlap: float | None = None,
    top_k: int = 10,
    score_threshold: float = 0.0,
    frames_per_chunk: int | None = None,
    plain: bool = False,
    progress: Progress | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Segment many videos, each into a folder of its own, and say in `manifest.jsonl` there what was done.

    A video that cannot be segmented does not stop the others. What the manifest says is done, of a source that has not
    changed since, is not done again; what failed is.

    Any number of processes may be given the same, on one machine or several that share the output folder, at any time:
    `torchrun`, a Slurm array, two terminals. Each takes a video that no other one has, by a lock that ends with the
    process, see `m2f_video.files.locked`; they do not talk to each other otherwise. Each returns when all videos are
    settled, so that one whose process died is taken over by another, in windows where that one was. A video that failed
    while a process was at work is not tried again by it.

    Args:
        model: see `segment_video`, as for all that is not described here.
        sources: see `list_videos`.
        output: folder, made where missing, in which each video gets one of its name.
        checkpoint: name of the model, for the manifest.
        processor: other preprocessing than the model's own.
        frames: which frames of each video.
        strict: take a video that is damaged for one that cannot be segmented.
        overlay: see `segment_to_folder`.
        page: see `segment_to_folder`; a video that is done already gets none.
        mode: of each video.
        window: frames W of a window.
        stride: frames S from the beginning of one window to that of the next.
        linker: how objects of a window are linked to tracks; of each video a copy does it.
        max_overlap: of duplicates.
        top_k: how many (object, class) pairs become tracks.
        score_threshold: tracks of less certainty are left out.
        frames_per_chunk: frames encoded at a time.
        plain: run the model as it is written.
        progress: see `Progress`; "videos" is a stage beside those of `segment_to_folder`, which begin anew with each.
        report: called with each outcome as it is known.

    Returns:
        What became of each video, in their order.

    Raises:
        ValueError: an option out of its range; results in the folder are made from something else, or from other videos
            of the same names; or see `list_videos`.
        TypeError: the model has no weights, or see `segment_video`.
        OSError: the output cannot be written, or the disk is full; what was finished stays.
    """
    options: dict[str, Any] = {
        "mode": mode,
        "window": window,
        "stride": stride,
        "linker": linker,
        "max_overlap": max_overlap,
        "top_k": top_k,
        "score_threshold": score_threshold,
    }
    check_options(model, frames_per_chunk=frames_per_chunk, **options)
    videos, folder = list_videos(sources), Path(output)
    processor = processor or VideoProcessor.from_config(model.config)
    about: dict[str, Any] = {"frames": frames, "strict": strict, "overlay": overlay, "linker": named_linker(linker)}
    fingerprint = model_fingerprint(model)
    made_from = {
        "checkpoint": checkpoint,
        "model": fingerprint,
        "options": options_fingerprint(options | about),
        "preprocessing": options_fingerprint(asdict(processor.config)),
    }

    def segment(video: ListedVideo) -> Entry:
        reader = open_video(video.path, frames, strict=strict)
        write = partial(
            segment_to_folder,
            fast,
            reader,
            folder / video.name,
            overlay=overlay,
            page=page,
            processor=processor,
            frames_per_chunk=frames_per_chunk,
            plain=plain,
            progress=progress,
            fingerprint=fingerprint,
        )
        try:
            segmentation = write(resume=is_resumable(about["linker"]), **_of_one_video(options))
        except AnotherResultError:  # of what the video was before, or damaged
            segmentation = write(**_of_one_video(options))
        chosen, _ = choose_mode(mode, reader.num_frames_hint)
        return {"mode": chosen, "frames": len(segmentation.frames), "tracks": len(segmentation.tracks)}

    if progress is not None:
        progress("videos", 0, len(videos))
    kept = accelerated(model, plain) if isinstance(model, torch.nn.Module) else nullcontext(model)
    with _manifest(folder, made_from) as manifest, kept as fast:
        work = _Work(videos, folder, manifest, segment)
        for done, outcome in enumerate(work.outcomes()):
            if report is not None:
                report(outcome)
            if progress is not None:
                progress("videos", done + 1, len(videos))
        return [work.settled[video.name] for video in videos]


@contextmanager
def _manifest(folder: Path, made_from: Mapping[str, Any]) -> Iterator[Manifest]:
    with made_directory(folder):
        manifest = Manifest(folder, made_from)
        try:
            yield manifest
        finally:
            manifest.remove_unused()


def _of_one_video(options: Mapping[str, Any]) -> dict[str, Any]:
    """With a linker that keeps nothing of other videos."""
    return {**options, "linker": deepcopy(options["linker"])}


class _Work:
    """The videos of a list, as one of the processes that share it sees them."""

    def __init__(
        self, videos: list[ListedVideo], folder: Path, manifest: Manifest, segment: Callable[[ListedVideo], Entry]
    ) -> None:
        self._videos, self._folder, self._manifest, self._segment = videos, folder, manifest, segment
        self.settled: dict[str, Outcome] = {}
        for video in videos:
            if error := self._another(video, manifest.entries.get(video.name)):
                raise ValueError(error)

    def outcomes(self) -> Iterator[Outcome]:
        """Take videos until each is settled, by this process or another one."""
        pending = list(self._videos)
        while pending:
            before = len(pending)
            for video in pending:
                if outcome := self._known(video) or self._taken(video):
                    self.settled[video.name] = outcome
                    yield outcome
            pending = [video for video in pending if video.name not in self.settled]
            if len(pending) == before:
                _LOGGER.info("%d videos are being segmented by other processes", before)
                time.sleep(POLL_SECONDS)

    def _known(self, video: ListedVideo) -> Outcome | None:
        """What the manifest says, where that settles it for this process."""
        self._manifest.refresh()
        entry = self._manifest.entries.get(video.name)
        is_fresh = video.name in self._manifest.fresh
        if entry is None or (entry["state"] == "failed" and not is_fresh):
            return None
        if error := entry.get("error") if entry["state"] == "failed" else self._another(video, entry):
            return Outcome(name=video.name, path=video.path, state="failed", error=error)
        if is_fresh:  # and what another machine has written may not be seen here yet
            return _done(video, entry, "done")
        return _done(video, entry, "skipped") if self._is_current(video, entry) else None

    def _taken(self, video: ListedVideo) -> Outcome | None:
        """Segment a video, unless another process is at it."""
        with locked(self._folder / f".{video.name}.lock") as is_mine:
            if not is_mine:
                return None
            if outcome := self._known(video):  # it was finished since
                return outcome
            began, entry = time.monotonic(), self._entry(video)
            about = {"version": _version(), "process": f"{node()}:{os.getpid()}"}
            times = {
                "seconds": round(time.monotonic() - began, 3),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._manifest.add(video.name, entry | times | about)
        if entry["state"] == "failed":
            return Outcome(name=video.name, path=video.path, state="failed", error=entry["error"], here=True)
        return _done(video, entry | times, "done", here=True)

    def _entry(self, video: ListedVideo) -> Entry:
        folder = self._folder / video.name
        try:
            source, before = source_fingerprint(video.path), _files(folder)
            if folder.resolve() == video.path.resolve():
                raise ValueError(f"{video.path} is where its result would go; give --output another folder")
            with _noted_warnings() as noted:
                found = self._segment(video)
            if source_fingerprint(video.path) != source:
                raise ValueError(f"{video.path} has changed while it was read; segment it again when it is finished")
        except OSError as error:
            if error.errno in _STOPPING:
                raise
            return _failed(video, str(error))
        except (ValueError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            return _failed(video, str(error) or "out of memory; take smaller frames (--shortest-edge) or fewer")
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # videos differ in size
        files = sorted({name for name, *_ in _files(folder) - before})
        return {"state": "done", "source": source, "files": files, "warnings": noted} | found

    def _another(self, video: ListedVideo, entry: Entry | None) -> str | None:
        """What is wrong where the result that would be replaced is of another video."""
        was = {} if entry is None or entry["state"] != "done" else entry.get("source", {})
        if not was or was.get("path") == str(video.path.absolute()) or _content(was) == self._now(video):
            return None
        return (
            f"{self._folder / video.name} holds the result of {was.get('path')}, which that of {video.path} would "
            "replace; give --output another folder"
        )

    def _is_current(self, video: ListedVideo, entry: Entry) -> bool:
        """Whether a result is there, and its source as it was."""
        folder = self._folder / video.name
        is_there = all((folder / str(name)).exists() for name in entry.get("files", ()))
        return is_there and _content(entry.get("source", {})) == self._now(video)

    def _now(self, video: ListedVideo) -> dict[str, Any] | None:
        try:
            return _content(source_fingerprint(video.path))
        except (OSError, ValueError):
            return None


def _content(source: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one content from another, wherever it is."""
    return {name: value for name, value in source.items() if name != "path"}


def _done(video: ListedVideo, entry: Entry, state: Literal["done", "skipped"], here: bool = False) -> Outcome:
    numbers = {name: entry.get(name, 0) for name in ("frames", "tracks", "seconds")}
    return Outcome(name=video.name, path=video.path, state=state, here=here, **numbers)


def _failed(video: ListedVideo, error: str) -> Entry:
    return {"state": "failed", "error": error, "source": {"path": str(video.path.absolute())}}


def _files(folder: Path) -> set[tuple[str, int, int]]:
    """What is in the folder of a result, by name and version."""
    if not folder.is_dir():
        return set()
    files = ((file.name, file.stat()) for file in folder.iterdir() if file.name[0] != ".")
    return {(name, status.st_ino, status.st_mtime_ns) for name, status in files}


@contextmanager
def _noted_warnings() -> Iterator[list[str]]:
    """Texts of the warnings that are shown meanwhile."""
    noted: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *others: Any, **more: Any) -> None:
            noted.append(str(message))
            show(message, *others, **more)

        warnings.showwarning = note
        yield noted


def _version() -> str:
    try:
        return version("m2f-video")
    except PackageNotFoundError:  # not installed, but on the path
        return "unknown"

"""A result as one HTML page that needs nothing else: the video, and over it the masks, which the browser draws.

Nothing that comes from a file, its name or a label is part of the markup: it is JSON in an element that no browser
runs, of which the page's script makes text. The policy in the page's head lets no other script run, and nothing be
fetched.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal, TextIO
from urllib.parse import quote

import numpy as np

from m2f_video.files import atomic_path, temporary_folder
from m2f_video.results.overlay import playing_rate, read_frames
from m2f_video.results.report_rows import CHUNK, MaskScan, paired_rows, single_rows
from m2f_video.video.decode import VideoError
from m2f_video.video.writer import MAX_SIDE, VideoWriter

if TYPE_CHECKING:
    from m2f_video.results.tracks import VideoSegmentation

REPORT_FILE = "report.html"
REPORT_VIDEO_FILE = "report.mp4"
MIN_SCORE = 0.3
"""Certainty from which a page shows tracks at first."""
MOST_FRAMES = 20_000
"""Of the longest video that a page shows."""
LARGEST_INSIDE = 300 << 20
"""Bytes of the largest video inside a page; of a longer text browsers make no string."""

VideoPlace = Literal["inside", "beside"]
"""Where the video of a page is."""

_SCRIPTS = ("masks.js", "lanes.js", "state.js", "panes.js", "player.js", "rows.js", "page.js")
_SLOWEST = Fraction(1)  # frames a second; a browser plays pictures that were taken once an hour, too
_LARGEST_DENOMINATOR = 1001
_CRF, _KEYFRAMES = 23, 24
_SHOWN_OF_MADE = ("mode", "window", "stride", "top_k", "score_threshold", "device")


def write_report(
    path: str | os.PathLike[str],
    results: "Sequence[VideoSegmentation]",
    names: Sequence[str] = ("",),
    *,
    place: VideoPlace = "inside",
    min_score: float = MIN_SCORE,
    exactly: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a page of one result, or of two results of one video side by side with their differences marked.

    The video is encoded anew as H.264 at a constant rate with one frame for each of the result, so that a browser
    finds frame f at (f + 0.5) / rate exactly. There is no sound.

    Args:
        path: of the page. It appears when it is complete, and not at all when anything fails.
        results: one or two; the first one that has its `video` gives it.
        names: of the results, where there are two.
        place: `inside` the page, or `beside` it in a file with the page's name and the ending .mp4.
        min_score: certainty from which tracks are shown at first; the others are in the page, too.
        exactly: whether the video must give the frames of the result and no more.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: the results are of different videos, or of a longer one than a page shows; there is no video; it is
            too large to be inside the page; or min_score is not from 0 to 1.
        VideoError: the video is not the one that was segmented.
        OSError: the files cannot be written.
    """
    page, first = Path(path), results[0]
    video = next((result.video for result in results if result.video is not None), None)
    if video is None:
        raise ValueError("there is no video to show: give it with dataclasses.replace(segmentation, video=...)")
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score must be from 0 to 1, got {min_score}")
    check_shown(first.width, first.height, len(first.frames))
    _check_same_video(results, names)
    beside = page.with_suffix(".mp4")
    if place == "beside" and beside.exists() and _is_file(video, beside):
        raise ValueError(f"{beside} is what the video of the page would overwrite; name the page otherwise")
    rate = _page_rate(first)
    total = 2 * len(first.frames)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    with ExitStack() as stack:
        file = stack.enter_context(atomic_path(page))
        if place == "beside":
            movie = stack.enter_context(atomic_path(beside))
        else:
            movie = stack.enter_context(temporary_folder(beside)) / "video.mp4"
        with VideoWriter(movie, rate, first.width, first.height, crf=_CRF, keyframes=_KEYFRAMES) as writer:
            frames = read_frames(video, size=(first.height, first.width), frames=first.frames, exactly=exactly)
            for done, frame in enumerate(frames, 1):
                writer.write(frame)
                report(done)
        if place == "inside" and movie.stat().st_size > LARGEST_INSIDE:
            raise ValueError(
                f"{page}: the video has {movie.stat().st_size >> 20} MB, too many to be inside a page; let it be "
                "beside it (--report-link, or --link of m2f-video report)"
            )
        with file.open("w", encoding="utf-8", newline="\n") as text:
            head, tail = _frame_of_page(place)
            text.write(head)
            about = {
                "source": first.source,
                "title": os.path.basename(os.path.normpath(first.source)),
                "width": first.width,
                "height": first.height,
                "fps": first.fps,
                "rate": [rate.numerator, rate.denominator],
                "frames": first.frames,
                "chunk": CHUNK,
                "minScore": min_score,
                "link": quote(os.fsencode(beside.name), safe="") if place == "beside" else None,
            }
            scan = MaskScan(results)
            for chunk, (done, parts) in enumerate(scan.chunks()):
                for number, part in enumerate(parts):
                    _write_bytes(text, f"masks-{number}-{chunk}", part)
                report(len(first.frames) + done)
            about |= _rows(text, results, names, scan)
            _write_element(text, "about", "application/json", [_as_text_of_script(about)])
            if place == "inside":
                _write_element(text, "video-data", "text/plain", _base64_of(movie))
            text.write(tail)


def shown_from(result: "VideoSegmentation") -> float:
    """Certainty from which to show tracks at first: that from which they were kept, where somebody chose one."""
    threshold = result.made.get("score_threshold")
    return threshold if isinstance(threshold, int | float) and 0 < threshold <= 1 else MIN_SCORE


def check_shown(width: int, height: int, frames: int | None) -> None:
    """Fail before the work where a page could not show a video after it.

    Args:
        width: of the video, in pixels.
        height: of the video, in pixels.
        frames: how many are shown; None where nobody knows yet.

    Raises:
        ValueError: it is too large, or too long.
    """
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"a page shows no video of {width}x{height}: a side has at most {MAX_SIDE} pixels")
    if frames is not None and frames > MOST_FRAMES:
        raise ValueError(f"a page shows at most {MOST_FRAMES} frames, not {frames}; choose some with --frames")


def _check_same_video(results: "Sequence[VideoSegmentation]", names: Sequence[str]) -> None:
    if not 1 <= len(results) <= 2 or len(names) != len(results):
        raise ValueError(f"a page shows one result or two, each with a name, got {len(results)} and {len(names)}")
    if len(results) == 1:
        return
    ours, theirs = results
    for what, a, b in (
        ("size", f"{ours.width}x{ours.height}", f"{theirs.width}x{theirs.height}"),
        ("number of frames", len(ours.frames), len(theirs.frames)),
    ):
        if a != b:
            raise ValueError(f"{names[0]} and {names[1]} are of different videos: their {what} is {a} and {b}")
    if ours.frames != theirs.frames:
        raise ValueError(f"{names[0]} and {names[1]} are of different frames of a video")


def _is_file(video: Any, path: Path) -> bool:
    source = getattr(video, "source", video)
    is_path = isinstance(source, str | os.PathLike) and os.path.exists(source)
    return is_path and os.path.samefile(source, path)


def _page_rate(result: "VideoSegmentation") -> Fraction:
    try:
        rate = playing_rate(result.fps, result.frames)
    except VideoError as error:
        raise VideoError(f"{result.source}: {error}") from error
    return max(rate.limit_denominator(_LARGEST_DENOMINATOR), _SLOWEST)


def _frame_of_page(place: VideoPlace) -> tuple[str, str]:
    """What comes before the data of a page, and after it."""
    folder = files("m2f_video.results") / "report"
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    # What is beside a page that is opened from a disk has no origin to be named by.
    media = "blob:" if place == "inside" else "'self' file:"
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:; "
        f"media-src {media}; base-uri 'none'; form-action 'none'"
    )
    text = Template((folder / "page.html").read_text(encoding="utf-8"))
    head, tail = text.substitute(policy=policy, style=style, script=script, data="\0").split("\0")
    return head, tail


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _rows(text: TextIO, results: "Sequence[VideoSegmentation]", names: Sequence[str], scan: MaskScan) -> dict[str, Any]:
    """The rows of the page, as a part of what it is about, and the numbers of each frame in elements of their own."""
    if len(results) == 2:
        rows, shared = paired_rows(results[0], results[1], scan)
        _write_bytes(text, "shared", _deflated(shared))
    else:
        rows = single_rows(results[0], scan)
    for number, areas in enumerate(scan.areas):
        _write_bytes(text, f"areas-{number}", _deflated(areas))
    about = [
        {
            "name": name,
            "keys": len(keys),
            "made": [[key, str(result.made[key])] for key in _SHOWN_OF_MADE if result.made.get(key) is not None],
        }
        for result, name, keys in zip(results, names, scan.keys, strict=True)
    ]
    return {"results": about, "rows": rows}


def _deflated(numbers: np.ndarray) -> bytes:
    return zlib.compress(numbers.astype("<u4").tobytes(), 9)


def _as_text_of_script(value: Any) -> str:
    """JSON in which no character can end the element that it is in, all of it ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _base64_of(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        while part := file.read(3 << 20):
            yield base64.b64encode(part).decode("ascii")


def _write_bytes(text: TextIO, name: str, content: bytes) -> None:
    _write_element(text, name, "text/plain", [base64.b64encode(content).decode("ascii")])


def _write_element(text: TextIO, name: str, kind: str, parts: Iterator[str] | Sequence[str]) -> None:
    text.write(f'<script type="{kind}" id="{name}">')
    text.writelines(parts)
    text.write("</script>\n")

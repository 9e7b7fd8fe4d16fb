"""`m2f-video report`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from m2f_video.cli.console import one_line, progress_bars
from m2f_video.results.report_page import REPORT_FILE, shown_from, write_report
from m2f_video.results.tracks import VideoSegmentation
from m2f_video.results.tracks_file import TRACKS_LINES_FILE, read_header

COMPARISON_FILE = "comparison.html"
_PAGES = (".html", ".htm")

Results = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULT [RESULT]")]


def report(
    results: Results,
    /,
    output: Path | None = None,
    video: str | None = None,
    link: bool = False,
    min_score: float | None = None,
) -> int:
    """Write a page that shows a result in a browser, or two results of one video side by side.

    The page holds the video, encoded anew, and the masks, and needs nothing else. Two results are those of two models,
    dtypes or modes: tracks that cover the same pixels stand in one row, in one colour, and what differs is marked, in
    the picture and through time.

    Examples: m2f-video report out/

    m2f-video report float32/ bfloat16/ --output comparison.html

    Args:
        results: a folder that m2f-video segment has written, or a tracks.json or tracks.jsonl; or two.
        output: the page, .html; by default report.html in the folder of the result, or comparison.html in that of the
            first of two.
        video: the video that was segmented, where it is not at the place that the result names.
        link: write the video beside the page, with its name and the ending .mp4, instead of inside it.
        min_score: certainty from which tracks are shown at first, for which the page has a control; by default the
            --score-threshold of the result, or 0.3 where it had none.
    """
    from m2f_video.evaluation.report import check_writable

    if not 1 <= len(results) <= 2:
        raise ValueError(f"a page shows one result, or two of one video; got {len(results)}")
    folders = [path if path.is_dir() else path.parent for path in results]
    page = output or folders[0] / (REPORT_FILE if len(results) == 1 else COMPARISON_FILE)
    if page.suffix.lower() not in _PAGES:
        raise ValueError(f"{page}: give --output a page, {' or '.join(_PAGES)}")
    check_writable(page)
    loaded = [VideoSegmentation.load(path) for path in results]
    is_whole = not loaded[0].made  # while a tracks.jsonl may be of a run that was stopped: of fewer frames
    loaded = [_with_made(result, folder) for result, folder in zip(loaded, folders, strict=True)]
    selected = _selected(loaded[0])
    reader = _open(loaded[0], folders[0], video, selected)
    with progress_bars() as update:
        write_report(
            page,
            [replace(result, video=reader) for result in loaded],
            [str(path) for path in results],
            place="beside" if link else "inside",
            min_score=min(map(shown_from, loaded)) if min_score is None else min_score,
            exactly=selected is not None and is_whole,
            progress=lambda done, total: update("page", done, total),
        )
    others = f", {page.with_suffix('.mp4').name}" if link else ""
    print(one_line(f"written to {page}{others}"))
    return 0


def _with_made(result: VideoSegmentation, folder: Path) -> VideoSegmentation:
    """With how it was made, which a `tracks.json` leaves to the file beside it to say."""
    lines = folder / TRACKS_LINES_FILE
    made = read_header(lines).get("made") if not result.made and lines.is_file() else None
    return replace(result, made=made) if isinstance(made, dict) else result


def _selected(result: VideoSegmentation) -> slice | None:
    """Which frames of the video were asked for; None where nothing says so."""
    from m2f_video.video.reader import parse_frames

    text = result.made.get("frames")
    # Numbers that count from the end, which Python can ask for, are taken as those they turned out to be.
    return parse_frames(text) if isinstance(text, str) and "-" not in text else None


def _open(result: VideoSegmentation, folder: Path, video: str | None, selected: slice | None) -> Any:
    from m2f_video.video.reader import VideoNotFoundError, open_video

    places = [video] if video is not None else [result.source, str(folder / os.path.basename(result.source))]
    path = next((place for place in places if os.path.exists(place)), None)
    if path is None:
        raise VideoNotFoundError(f"{places[0]}: the video that was segmented is not there; name it with --video")
    return open_video(path, selected or slice(result.frames[0], result.frames[-1] + 1))

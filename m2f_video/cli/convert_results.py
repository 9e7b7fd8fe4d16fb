"""`m2f-video convert-results`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from m2f_video.cli.console import one_line, progress_bars
from m2f_video.evaluation.report import check_writable
from m2f_video.results.formats.coco import write_coco
from m2f_video.results.formats.youtube_vis import write_youtube_vis
from m2f_video.results.tracks import TRACKS_FILE, VideoSegmentation
from m2f_video.results.tracks_file import TRACKS_LINES_FILE

FormatName = Literal["coco", "png", "mots", "csv", "youtube-vis"]

_FORMATS: dict[FormatName, tuple[str, Callable[..., Any]]] = {
    "coco": ("coco.json", write_coco),
    "png": ("png", VideoSegmentation.to_png),
    "mots": ("mots.txt", VideoSegmentation.to_mots),
    "csv": ("tracks.csv", VideoSegmentation.to_csv),
    "youtube-vis": ("youtube_vis.json", write_youtube_vis),
}


def convert_results(
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    /,
    to: FormatName,
    output: Path | None = None,
    score_threshold: float = 0.0,
    every_track: bool = False,
) -> int:
    """Write the result of a video in the format of another program.

    coco: images are frames, annotations tracks in them, with track_id and score added, as labelling tools read it. png:
    a folder with a map of ids for each frame, in DAVIS's palette. mots: the text format of MOTS. csv: a row for each
    track in each frame, with its box and area. youtube-vis: rows of a submission. In png and mots a pixel belongs to
    the track of the best score alone. A result of any length passes frame by frame.

    Example: m2f-video convert-results out --to coco --score-threshold 0.3

    Args:
        directory: what `m2f-video segment` wrote, or its tracks.json or tracks.jsonl.
        to: the format.
        output: file to write, or folder for png, new or empty; by default coco.json, png, mots.txt, tracks.csv or
            youtube_vis.json beside the result.
        score_threshold: leave out tracks of less certainty.
        every_track: with the tracks that were left out as too uncertain or not among the best, which the tracks.jsonl
            of a video in windows names.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"--score-threshold must be between 0 and 1, got {score_threshold}")
    name, write = _FORMATS[to]
    output = output or (directory if directory.is_dir() else directory.parent) / name
    _check_output(output, directory, is_folder=to == "png")
    result = VideoSegmentation.load(directory, every_track)
    result = replace(result, tracks=tuple(track for track in result.tracks if track.certainty >= score_threshold))
    with progress_bars(unit="frame") as update:
        write(result, output, progress=partial(update, to))
    print(one_line(f"written to {output}: {len(result.frames)} frames, {len(result.tracks)} tracks"))
    return 0


def _check_output(output: Path, directory: Path, *, is_folder: bool) -> None:
    """Fail before the work where the output could not be written, or would take the place of the result itself."""
    if is_folder:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise FileExistsError(f"{output}: it exists already; remove it, or give --output a new folder")
        return
    check_writable(output)
    folder = directory if directory.is_dir() else directory.parent
    for file in (folder / TRACKS_FILE, folder / TRACKS_LINES_FILE, directory):
        if output.resolve() == file.resolve():
            raise ValueError(f"{output} is the result itself; give --output another name")

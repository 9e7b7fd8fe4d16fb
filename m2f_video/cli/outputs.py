"""What commands that segment share: types of their options, checks of input and output, preprocessing, the table."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import tyro
from rich.table import Table

from m2f_video.cli.console import one_line, print_table
from m2f_video.files import check_replaceable
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.processor import VideoProcessor
from m2f_video.results.tracks import MOST_JSON_FRAMES, TRACKS_FILE, VideoSegmentation
from m2f_video.results.tracks_file import TRACKS_LINES_FILE

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
DtypeName = Literal["float32", "float64", "bfloat16", "float16"]


def standard_input() -> BinaryIO:
    """What is piped in.

    Raises:
        ValueError: it is closed, or somebody's keyboard.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input is closed; pipe a video in, as in: cat clip.mkv | m2f-video segment - ...")
    if sys.stdin.isatty():
        raise ValueError("standard input is a terminal; pipe a video in, as in: cat clip.mkv | m2f-video segment - ...")
    return sys.stdin.buffer


def check_output(folder: Path, *files: str) -> None:
    """Fail before the work where these files could not be written to the folder after it."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; give --output a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} is not writable; give --output another folder")
    for name in files:
        check_replaceable(folder / name)


def processor_of(model: ClipModel, shortest_edge: int | None) -> VideoProcessor:
    """A model's own, or one that resizes frames to another shorter side, in pixels."""
    preprocessing = model.config.preprocessing
    if shortest_edge is not None:
        longest_edge = max(preprocessing.longest_edge, shortest_edge)
        preprocessing = replace(preprocessing, shortest_edge=shortest_edge, longest_edge=longest_edge, fixed_size=None)
    return VideoProcessor(preprocessing, model.config.labels)


def print_written(folder: Path, num_frames: int, *others: str) -> None:
    """Say which files of a result are where."""
    names = [TRACKS_LINES_FILE, *([TRACKS_FILE] if num_frames <= MOST_JSON_FRAMES else []), *others]
    print(one_line(f"written to {folder}: {', '.join(names)}"))
    if num_frames > MOST_JSON_FRAMES:
        print(f"{TRACKS_FILE} is for up to {MOST_JSON_FRAMES} frames; {TRACKS_LINES_FILE} holds all")


def print_tracks(segmentation: VideoSegmentation, min_score: float = 0.0) -> None:
    """Print a table of the tracks that score enough."""
    count = len(segmentation.frames)
    tracks = [track for track in segmentation.tracks if track.certainty >= min_score]
    if not tracks:
        print(f"{segmentation.source}: {count} frames, no track is as certain as the --score-threshold")
        return
    print(f"{segmentation.source}: {count} frames, {len(tracks)} track{'s' if len(tracks) > 1 else ''}")
    areas = [0] * len(tracks)
    for frame in range(count):  # frame by frame, as they are read
        areas = [area + track.area(frame) for area, track in zip(areas, tracks, strict=True)]
    table = Table("id", "label", "score", "certainty", "frames", "mean area, px")
    for track, area in zip(tracks, areas, strict=True):
        visible = track.num_frames_visible
        numbers = f"{track.score:.3f}", f"{track.certainty:.3f}", f"{visible}/{count}", f"{area / max(visible, 1):.0f}"
        table.add_row(str(track.id), track.label, *numbers)
    print_table(table)

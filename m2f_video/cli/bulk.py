"""`m2f-video segment` of many videos."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from m2f_video.cli.console import one_line, print_line, print_table, progress_bars
from m2f_video.cli.outputs import check_output, processor_of
from m2f_video.distributed import own_device
from m2f_video.inference.bulk import Outcome, segment_many
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.listing import list_videos
from m2f_video.inference.manifest import MANIFEST_FILE


def segment_videos(
    source: str,
    output: Path,
    load: Callable[[torch.device], ClipModel],
    *,
    device: str | None,
    shortest_edge: int | None,
    **options: Any,
) -> int:
    """Segment the videos of a folder or list, as one of the processes that share it.

    Gives the exit code, 1 where any of them failed.

    Args:
        source: see `list_videos`.
        output: folder of all results.
        load: gives the model.
        device: of the model; None is a GPU of this process's own, where there is one.
        shortest_edge: see `processor_of`.
        options: of `segment_many`.
    """
    check_output(output, MANIFEST_FILE)
    videos = list_videos(source)
    model = load(own_device(device))
    print_line(f"{source}: {len(videos)} videos")
    with progress_bars(unit="video") as of_videos, progress_bars(unit="frame") as of_frames:

        def update(stage: str, done: int, total: int | None) -> None:
            (of_videos if stage == "videos" else of_frames)(stage, done, total)

        outcomes = segment_many(
            model,
            source,
            output,
            processor=processor_of(model, shortest_edge),
            progress=update,
            report=_say,
            **options,
        )
    if os.environ.get("RANK", "0") != "0":
        return 0  # the first one of torchrun speaks for all; it ends them all when one of them fails
    _summarize(outcomes, output)
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


def _say(outcome: Outcome) -> None:
    """A line on what this process has done."""
    if outcome.here and outcome.state == "done":
        print_line(
            f"{outcome.path}: {outcome.frames} frames, {outcome.tracks} tracks, {outcome.seconds:.1f} s, written to "
            f"{outcome.name}"
        )
    elif outcome.here:
        print_line(f"{outcome.path}: failed")


def _summarize(outcomes: list[Outcome], output: Path) -> None:
    """What became of the videos, by whatever process."""
    counts = Counter[str](outcome.state for outcome in outcomes)
    if counts["failed"]:
        table = Table()
        for column in ("video", "why it failed"):
            table.add_column(column, overflow="fold")
        for outcome in outcomes:
            if outcome.state == "failed":
                reason = outcome.error.removeprefix(f"{outcome.path}: ")
                table.add_row(one_line(outcome.path), one_line(reason))
        print_table(table)
    said = {"done": "done", "skipped": "done before", "failed": "failed"}
    numbers = ", ".join(f"{counts[state]} {text}" for state, text in said.items() if counts[state])
    print(one_line(f"{numbers}; written to {output}, what was done to {MANIFEST_FILE}"))

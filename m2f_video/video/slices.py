"""Which frames of a video are wanted, as a slice of their numbers."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from m2f_video.video.decode import VideoError


def check_slice(frames: slice) -> slice:
    """The slice, that selects something in some video.

    Raises:
        VideoError: it selects nothing, runs backwards, or its parts are no whole numbers.
    """
    if not isinstance(frames, slice):
        raise VideoError(f"frames must be a slice, such as slice(0, 100, 2), got {frames!r}")
    parts = (frames.start, frames.stop, frames.step)
    if any(part is not None and (isinstance(part, bool) or not isinstance(part, int | np.integer)) for part in parts):
        raise VideoError(f"frames {show_slice(frames)}: frame numbers must be whole numbers")
    start, stop, step = parts
    if step is not None and step < 1:
        raise VideoError(f"frames {show_slice(frames)}: the step must be at least 1")
    if stop is not None and (stop < 0) == ((start or 0) < 0) and stop <= (start or 0):
        raise VideoError(f"frames {show_slice(frames)} select nothing: the stop must be larger than the start")
    return frames


def within(frames: slice, count: int, source: str) -> slice:
    """The slice with every part stated and inside a video of known length.

    Raises:
        VideoError: it selects nothing.
    """
    start, stop, step = frames.indices(count)
    if not len(range(start, stop, step)):
        raise nothing_selected(source, frames, count)
    return slice(start, stop, step)


def check_from_the_start(frames: slice, source: str, what: str) -> None:
    """Refuse numbers that count from the end of what has to be read to know it.

    Raises:
        VideoError: there are some.
    """
    if min(frames.start or 0, frames.stop or 0) < 0:
        raise VideoError(
            f"{source}: negative frame numbers need a length that is known before decoding, which {what} does not "
            "have; give frame numbers counted from the start"
        )


def selection(numbered: Iterable[tuple[Any, ...]], frames: slice) -> Iterator[tuple[Any, ...]]:
    """Of tuples that begin with a number, rising from 0, those that are selected; what follows them is not read."""
    start, stop, step = frames.start or 0, frames.stop, frames.step or 1
    for entry in numbered:
        index = entry[0]
        if stop is not None and index >= stop:
            return
        if index >= start and (index - start) % step == 0:
            yield entry
        if index + 1 == stop:
            return


def nothing_selected(source: str, frames: slice, count: int) -> VideoError:
    """An error that says so."""
    return VideoError(f"{source}: frames {show_slice(frames)} select nothing, the video has only {count} frames")


def show_slice(frames: slice) -> str:
    """As `START:STOP` or `START:STOP:STEP`."""
    parts = [frames.start, frames.stop] + ([frames.step] if frames.step is not None else [])
    return ":".join("" if part is None else str(part) for part in parts)

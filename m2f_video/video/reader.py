"""Reading videos: files, folders of frames and arrays, one frame in memory at a time.

Shape letters: T frames, H height, W width. Frames are RGB, uint8, (H, W, 3).
"""

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2f_video.video.arrays import ArrayVideo, one_size
from m2f_video.video.decode import MAX_PIXELS, VideoError, open_decoder, upright_rgb
from m2f_video.video.pictures import (
    OTHER_SUFFIXES,
    PICTURE_SUFFIXES,
    image_size,
    is_sequence,
    read_image,
    read_sequence,
    sequence_shape,
)
from m2f_video.video.writer import as_frame_rate

VideoSource = str | os.PathLike[str] | np.ndarray | torch.Tensor | Sequence[Any]
"""A video file, a folder of frames, a uint8 array (T, H, W, 3), or a sequence of uint8 frames (H, W, 3)."""

DEFAULT_FPS = Fraction(25)
"""Frame rate of a source that states none: a folder of frames, an array."""

ARRAY_SOURCE = "<array>"
"""`VideoReader.source` of a video that came as an array."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """The path of a video does not exist."""


class TruncatedVideoWarning(UserWarning):
    """A video file is cut off or damaged, or its frames change their size; those until there were used."""


class VideoReader(ABC):
    """A video that can be iterated any number of times, each time from its start; made by `open_video`.

    Iterating decodes lazily and yields the selected frames, uint8 RGB (H, W, 3). Frames of an array are views of
    it: do not write into them.

    Attributes:
        source: path as it was given, `"<array>"` for arrays and sequences of frames.
        width: of the upright frames, pixels.
        height: of the upright frames, pixels.
        fps: average frame rate of the source, before a step skips frames.
        num_frames_hint: how many frames iterating should yield, None where a video file does not say; what a file
            says may be off by a few, and by more when it is cut off.
    """

    def __init__(
        self,
        source: str,
        size: tuple[int, int],
        fps: Fraction,
        count: int | None,
        frames: slice,
        strict: bool = False,
    ) -> None:
        self.source = source
        self.height, self.width = size
        self.fps = fps
        self.num_frames_hint = None if count is None else len(range(*frames.indices(count)))
        self._frames, self._strict = frames, strict

    @abstractmethod
    def __iter__(self) -> Iterator[np.ndarray]: ...

    def frame_index(self, position: int) -> int:
        """Source index of the frame yielded at this position, both counted from 0."""
        return (self._frames.start or 0) + position * (self._frames.step or 1)

    def frame_indices(self, count: int) -> tuple[int, ...]:
        """Source indices (0 is the first frame of the source) of the first `count` frames yielded."""
        return tuple(map(self.frame_index, range(count)))


class _ArrayReader(VideoReader):
    def __init__(self, video: ArrayVideo, fps: Fraction, frames: slice) -> None:
        self._video = video
        super().__init__(ARRAY_SOURCE, video.size, fps, len(video), _within(frames, len(video), "the video"))

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in self.frame_indices(self.num_frames_hint or 0):
            yield self._video[index]


class _FolderReader(VideoReader):
    def __init__(self, folder: str, fps: Fraction, frames: slice) -> None:
        files = _frame_files(Path(folder))
        frames = _within(frames, len(files), folder)
        self._files = files[frames]
        size = one_size((str(file), image_size(file)) for file in self._files)
        super().__init__(folder, size, fps, len(files), frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(read_image, self._files)


class _PartialReader(VideoReader):
    """A file: what is wrong with it is found on the way, when its first frames may have been worked on for long."""

    def __iter__(self) -> Iterator[np.ndarray]:
        for position, image in enumerate(self._images()):
            if image.shape[:2] != (self.height, self.width):
                index = self.frame_index(position)
                self._report(
                    f"frame {index} is {image.shape[1]}x{image.shape[0]} but those before it are "
                    f"{self.width}x{self.height}; the video ends there, what follows is a video of its own: "
                    f"--frames {index}:",
                    stacklevel=3,
                )
                return
            yield image

    @abstractmethod
    def _images(self) -> Iterator[np.ndarray]:
        """The selected frames, of any size."""

    def _report(self, reason: str, stacklevel: int = 4) -> None:
        if self._strict:
            raise VideoError(f"{self.source}: {reason}")
        warnings.warn(f"{self.source}: {reason}", TruncatedVideoWarning, stacklevel=stacklevel)


class _SequenceReader(_PartialReader):
    def __init__(self, path: str, fps: Fraction | None, frames: slice, strict: bool) -> None:
        count, size, rate = sequence_shape(path, frames)
        super().__init__(path, size, fps or rate or DEFAULT_FPS, count, _within(frames, count, path), strict)

    def _images(self) -> Iterator[np.ndarray]:
        count = 0
        try:
            for image in read_sequence(self.source, self.frame_indices(self.num_frames_hint or 0)):
                yield image
                count += 1
        except VideoError as error:
            if not count:
                raise
            reason = str(error).removeprefix(f"{self.source}: ")
            self._report(f"the file is cut off or damaged, {count} frames were decoded: {reason}")


class _FileReader(_PartialReader):
    def __init__(self, path: str, fps: Fraction | None, frames: slice, strict: bool) -> None:
        if min(frames.start or 0, frames.stop or 0) < 0:
            raise VideoError(
                f"{path}: negative frame numbers need a length that is known before decoding, which a video file "
                "does not have; give frame numbers counted from the start"
            )
        with open_decoder(path) as decoder:
            stream = decoder.stream
            # The size may change before the first frame selected.
            first = deque(islice(decoder, (frames.start or 0) + 1), maxlen=1)
            if not first:
                raise VideoError(
                    f"{path}: no frame could be decoded ({stream.codec_context.name}): the file is empty, cut off "
                    f"or damaged, or its frames have more than {MAX_PIXELS:,} pixels"
                )
            try:
                size = upright_rgb(*first[0]).shape[:2]
            except VideoError as error:
                raise VideoError(f"{path}: {error}") from error
            rate = fps or _sound_rate(stream.average_rate, stream.guessed_rate)
            super().__init__(path, size, rate, decoder.stated_num_frames(), frames, strict)

    def _images(self) -> Iterator[np.ndarray]:
        start, stop, step = self._frames.start or 0, self._frames.stop, self._frames.step or 1
        with open_decoder(self.source) as decoder:
            for index, (frame, matrix) in enumerate(decoder):
                if index >= start and (index - start) % step == 0:
                    try:
                        image = upright_rgb(frame, matrix)
                    except VideoError as error:
                        self._report(f"the video ends before frame {index}, whose {error}")
                        return
                    yield image
                if index + 1 == stop:
                    return
            if damage := decoder.damage():
                self._report(damage)
            if decoder.num_frames <= start:
                raise _nothing_selected(self.source, self._frames, decoder.num_frames)


def open_video(
    source: VideoSource, frames: slice | None = None, fps: float | None = None, strict: bool = False
) -> VideoReader:
    """Open a video for streaming, whatever it comes as.

    Accepted are

    - a file FFmpeg reads (mp4, mov, mkv, webm, avi, gif, ...; h264, hevc, vp9, av1, ...). Frames come upright
      (rotation and mirroring in the metadata are applied), 8 bits deep, in the colours that the file's matrix
      (BT.601, BT.709, BT.2020) and range tags ask for; BT.601 and limited range where there are none. Alpha is
      dropped, a non-square pixel aspect ignored, and frames of a variable rate are taken as they are stored;
    - an animated WebP or a TIFF of several pages;
    - a folder of frames (jpg, png, webp, bmp, tif, ppm, gif, avif, jp2, ...), one picture to a file, in natural order
      of their names; alpha is dropped;
    - a uint8 array or tensor (T, H, W, 3), or a sequence of uint8 frames (H, W, 3).

    A file that turns out cut off or damaged yields all frames that decode, then a `TruncatedVideoWarning`; so does one
    whose frames change their size, which ends there.

    Args:
        source: the video.
        frames: which frames, counted from 0. A stop past the end means the end. Negative numbers count from the
            end and are possible for all but video files. The step must be positive.
        fps: frames per second, instead of what the source states; 25 where it states none.
        strict: raise a `VideoError` instead of the warning.

    Raises:
        VideoError: what is given is no video, holds no frames, or the slice selects none of them. That the slice
            starts past the end of a video file is found only when iterating.
        FileNotFoundError: there is no such path (it is a `VideoError` too).
    """
    selected = _check_slice(frames if frames is not None else slice(None))
    rate = None if fps is None else as_frame_rate(fps)
    if not isinstance(source, str | os.PathLike):
        return _ArrayReader(ArrayVideo(source), rate or DEFAULT_FPS, selected)
    path = os.fspath(source)
    if not os.path.exists(path):
        raise VideoNotFoundError(f"{path}: there is no such video file or folder of frames")
    if os.path.isdir(path):
        return _FolderReader(path, rate or DEFAULT_FPS, selected)
    if is_sequence(path):
        return _SequenceReader(path, rate, selected, strict)
    return _FileReader(path, rate, selected, strict)


def read_video(source: VideoSource, frames: slice | None = None, strict: bool = False) -> np.ndarray:
    """Read a whole video into memory; see `open_video`, which streams, for what is accepted.

    Returns:
        uint8 (T, H, W, 3), RGB.

    Raises:
        VideoError: see `open_video`.
        FileNotFoundError: there is no such path.
    """
    return np.stack(list(open_video(source, frames, strict=strict)))


def parse_frames(text: str) -> slice:
    """Read frame numbers `START:STOP` or `START:STOP:STEP`, each part optional, into a slice.

    Raises:
        VideoError: the text is no such range, or selects nothing.
    """
    if not re.fullmatch(r"\s*\d{0,18}\s*:\s*\d{0,18}\s*(:\s*\d{0,18}\s*)?", text, flags=re.ASCII):
        raise VideoError(
            f"frames {text!r:.60}: expected START:STOP or START:STOP:STEP in frame numbers counted from 0, such as "
            "10:50:2, 100: or ::5"
        )
    return _check_slice(slice(*(int(part) if part.strip() else None for part in text.split(":"))))


def _sound_rate(*stated: Fraction | None) -> Fraction:
    """The first of the rates a file states that a video file can have."""
    return next((rate for rate in stated if rate and Fraction(1, 10**6) <= rate < 2**30), DEFAULT_FPS)


def _frame_files(folder: Path) -> list[Path]:
    """The frames in a folder, in natural order."""
    files: list[Path] = []
    other: list[Path] = []
    stems: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (_natural_order(path.name), path.name)):
        suffix = path.suffix.lower()
        if path.name[0] == "." or suffix not in (*PICTURE_SUFFIXES, *OTHER_SUFFIXES):
            continue
        (files if suffix in PICTURE_SUFFIXES else other).append(path)
        if (twin := stems.setdefault(path.stem, path)) is not path:
            raise VideoError(
                f"{folder}: {twin.name} and {path.name} cannot be told to be one frame (a mask beside its image?) or "
                "two; leave one picture a frame in the folder"
            )
    if other:
        raise VideoError(
            f"{folder}: {other[0].name} is a picture of a kind that is not read ({len(other)} such files); convert "
            "it to png or jpg, or take it out of the folder"
        )
    if not files:
        raise VideoError(f"{folder}: the folder holds no frames ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return files


def _natural_order(name: str) -> list[str | int]:
    """Sort key that puts frame 9 before frame 10."""
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"([0-9]+)", name))]


def _check_slice(frames: slice) -> slice:
    if not isinstance(frames, slice):
        raise VideoError(f"frames must be a slice, such as slice(0, 100, 2), got {frames!r}")
    parts = (frames.start, frames.stop, frames.step)
    if any(part is not None and (isinstance(part, bool) or not isinstance(part, int | np.integer)) for part in parts):
        raise VideoError(f"frames {_show(frames)}: frame numbers must be whole numbers")
    start, stop, step = parts
    if step is not None and step < 1:
        raise VideoError(f"frames {_show(frames)}: the step must be at least 1")
    if stop is not None and (stop < 0) == ((start or 0) < 0) and stop <= (start or 0):
        raise VideoError(f"frames {_show(frames)} select nothing: the stop must be larger than the start")
    return frames


def _within(frames: slice, count: int, source: str) -> slice:
    """The slice with every part stated and inside a video of known length."""
    start, stop, step = frames.indices(count)
    if not len(range(start, stop, step)):
        raise _nothing_selected(source, frames, count)
    return slice(start, stop, step)


def _nothing_selected(source: str, frames: slice, count: int) -> VideoError:
    return VideoError(f"{source}: frames {_show(frames)} select nothing, the video has only {count} frames")


def _show(frames: slice) -> str:
    parts = [frames.start, frames.stop] + ([frames.step] if frames.step is not None else [])
    return ":".join("" if part is None else str(part) for part in parts)

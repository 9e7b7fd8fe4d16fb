"""Reading videos: files, folders of frames, arrays and what comes as it is made, one frame in memory at a time.

Shape letters: T frames, H height, W width. Frames are RGB, uint8, (H, W, 3).
"""

import os
import re
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2f_video.video.arrays import ArrayVideo, as_image, one_size
from m2f_video.video.decode import MAX_PIXELS, Decoder, VideoError, open_decoder, upright_rgb
from m2f_video.video.pictures import (
    frame_files,
    image_size,
    is_sequence,
    read_image,
    read_sequence,
    sequence_shape,
)
from m2f_video.video.pipes import BinaryFile, OpenFile
from m2f_video.video.slices import check_from_the_start, check_slice, nothing_selected, selection, show_slice, within
from m2f_video.video.writer import as_frame_rate

VideoSource = str | os.PathLike[str] | np.ndarray | torch.Tensor | Sequence[Any] | Iterator[Any] | BinaryFile
"""A video file, a folder of frames, a uint8 array (T, H, W, 3), a sequence or iterator of uint8 frames (H, W, 3), or an
open binary file."""

DEFAULT_FPS = Fraction(25)
"""Frame rate of a source that states none: a folder of frames, an array, an iterator."""

ARRAY_SOURCE = "<array>"
"""`VideoReader.source` of a video that came as an array."""

ITERATOR_SOURCE = "<frames>"
"""`VideoReader.source` of a video whose frames came one by one."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """The path of a video does not exist."""


class TruncatedVideoWarning(UserWarning):
    """A video file is cut off or damaged, or its frames change their size; those until there were used."""


class VideoReader(ABC):
    """A video that can be iterated any number of times, each time from its start, or once; made by `open_video`.

    Iterating decodes lazily and yields the selected frames, uint8 RGB (H, W, 3). Frames of an array are views of
    it: do not write into them.

    Attributes:
        source: path as it was given, `"<array>"` for arrays and sequences of frames, `"<frames>"` for iterators; of an
            open file its name, such as `"<stdin>"`.
        width: of the upright frames, pixels.
        height: of the upright frames, pixels.
        fps: average frame rate of the source, before a step skips frames.
        num_frames_hint: how many frames iterating should yield, None where a video file does not say; what a file
            says may be off by a few, and by more when it is cut off.
        start: number in the source, from 0, of the first frame selected.
        step: from one frame selected to the next.
        read_once: whether it can be iterated once only: an open file, a pipe, an iterator.
    """

    read_once = False

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
        self.start, self.step = frames.start or 0, frames.step or 1
        self._left_out: list[int] = []  # of each selected frame that did not decode, the position of the next

    @abstractmethod
    def __iter__(self) -> Iterator[np.ndarray]: ...

    @property
    def selected(self) -> str:
        """Which frames of the source it gives, as START:STOP or START:STOP:STEP."""
        return show_slice(self._frames)

    def frame_index(self, position: int) -> int:
        """Source index of the frame yielded at this position, both counted from 0.

        Of a damaged file it is known once the frame has been yielded: frames that do not decode are counted.
        """
        ordinal = position + bisect_right(self._left_out, position)
        return self.start + ordinal * self.step

    def frame_indices(self, count: int) -> tuple[int, ...]:
        """Source indices (0 is the first frame of the source) of the first `count` frames yielded."""
        return tuple(map(self.frame_index, range(count)))


class _ArrayReader(VideoReader):
    def __init__(self, video: ArrayVideo, fps: Fraction, frames: slice) -> None:
        self._video = video
        super().__init__(ARRAY_SOURCE, video.size, fps, len(video), within(frames, len(video), "the video"))

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in self.frame_indices(self.num_frames_hint or 0):
            yield self._video[index]


class _FolderReader(VideoReader):
    def __init__(self, folder: str, fps: Fraction, frames: slice) -> None:
        files = frame_files(Path(folder))
        frames = within(frames, len(files), folder)
        self._files = files[frames]
        size = one_size((str(file), image_size(file)) for file in self._files)
        super().__init__(folder, size, fps, len(files), frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(read_image, self._files)


class _PartialReader(VideoReader):
    """A file: what is wrong with it is found on the way, when its first frames may have been worked on for long."""

    def __iter__(self) -> Iterator[np.ndarray]:
        for position, (index, image) in enumerate(self._images()):
            while self.frame_index(position) < index:
                self._left_out.append(position)
            if image.shape[:2] != (self.height, self.width):
                self._report(
                    f"frame {index} is {image.shape[1]}x{image.shape[0]} but those before it are "
                    f"{self.width}x{self.height}; the video ends there, what follows is a video of its own: "
                    f"--frames {index}:",
                    stacklevel=3,
                )
                return
            yield image

    @abstractmethod
    def _images(self) -> Iterator[tuple[int, np.ndarray]]:
        """The selected frames, of any size, each with its source index."""

    def _report(self, reason: str, stacklevel: int = 4) -> None:
        if self._strict:
            raise VideoError(f"{self.source}: {reason}")
        warnings.warn(f"{self.source}: {reason}", TruncatedVideoWarning, stacklevel=stacklevel)


class _SequenceReader(_PartialReader):
    def __init__(self, path: str, fps: Fraction | None, frames: slice, strict: bool) -> None:
        count, size, rate = sequence_shape(path, frames)
        super().__init__(path, size, fps or rate or DEFAULT_FPS, count, within(frames, count, path), strict)

    def _images(self) -> Iterator[tuple[int, np.ndarray]]:
        count, indices = 0, self.frame_indices(self.num_frames_hint or 0)
        try:
            for image in read_sequence(self.source, indices):
                yield indices[count], image
                count += 1
        except VideoError as error:
            if not count:
                raise
            reason = str(error).removeprefix(f"{self.source}: ")
            self._report(f"the file is cut off or damaged, {count} frames were decoded: {reason}")


class _DecodingReader(_PartialReader):
    """What FFmpeg decodes; opened for the size, which may change before the first frame selected."""

    def __init__(self, decoder: Decoder, first: Any, fps: Fraction | None, frames: slice, strict: bool) -> None:
        name, stream = decoder.name, decoder.stream
        if not decoder.num_frames:
            raise VideoError(
                f"{name}: no frame could be decoded ({stream.codec_context.name}): the file is empty, cut off or "
                f"damaged, or its frames have more than {MAX_PIXELS:,} pixels{decoder.remedy}"
            )
        if first is None:
            raise nothing_selected(name, frames, decoder.num_frames)
        try:
            size = upright_rgb(*first[1:]).shape[:2]
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from error
        rate = fps or _sound_rate(stream.average_rate, stream.guessed_rate)
        super().__init__(name, size, rate, decoder.stated_num_frames(), frames, strict)

    def _decoded(self, decoder: Decoder, selected: Iterator[Any]) -> Iterator[tuple[int, np.ndarray]]:
        for index, frame, matrix in selected:
            try:
                image = upright_rgb(frame, matrix)
            except VideoError as error:
                self._report(f"the video ends before frame {index}, whose {error}", stacklevel=5)
                return
            yield index, image
        if decoder.at_end and (damage := decoder.damage()):
            self._report(damage, stacklevel=5)


class _FileReader(_DecodingReader):
    def __init__(self, path: str, fps: Fraction | None, frames: slice, strict: bool) -> None:
        check_from_the_start(frames, path, "a video file")
        with open_decoder(path) as decoder:
            super().__init__(decoder, next(selection(decoder, frames), None), fps, frames, strict)

    def _images(self) -> Iterator[tuple[int, np.ndarray]]:
        with open_decoder(self.source) as decoder:
            yield from self._decoded(decoder, selection(decoder, self._frames))


class _OnceReader(_PartialReader):
    """What is gone when it has been read; its length is not known."""

    read_once = True
    _begun = False

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._begun:
            raise VideoError(
                f"{self.source}: it is read once, as it comes, and has been; give a file, or keep its frames in a list"
            )
        self._begun = True
        return super().__iter__()


class _PipeReader(_OnceReader, _DecodingReader):
    """An open file, decoded as it comes."""

    def __init__(self, file: BinaryFile, fps: Fraction | None, frames: slice, strict: bool) -> None:
        source = OpenFile(file)
        check_from_the_start(frames, source.name, "an open file")
        with ExitStack() as stack:
            self._decoder = stack.enter_context(open_decoder(source))
            selected = selection(self._decoder, frames)
            first = next(selected, None)
            super().__init__(self._decoder, first, fps, frames, strict)
            self.num_frames_hint = None
            self._selected, self._closing = chain([first], selected), stack.pop_all()

    def _images(self) -> Iterator[tuple[int, np.ndarray]]:
        with self._closing:
            yield from self._decoded(self._decoder, self._selected)


class _IteratorReader(_OnceReader):
    """Frames that something gives one by one."""

    def __init__(self, video: Iterator[Any], fps: Fraction, frames: slice, strict: bool) -> None:
        check_from_the_start(frames, ITERATOR_SOURCE, "an iterator")
        selected = selection(enumerate(video), frames)
        if (first := next(selected, None)) is None:
            raise VideoError(f"{ITERATOR_SOURCE}: the video holds no frames, or ends before the first that is selected")
        index, image = first[0], as_image(first[1], f"frame {first[0]}").copy()
        super().__init__(ITERATOR_SOURCE, image.shape[:2], fps, None, frames, strict)
        self._selected = chain([(index, image)], selected)

    def _images(self) -> Iterator[tuple[int, np.ndarray]]:
        for index, frame in self._selected:
            try:
                image = as_image(frame, f"frame {index}")
            except VideoError as error:
                self._report(f"{error}; the video ends there")
                return
            yield index, image.copy()  # a camera may write the next frame into the same memory


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
    - a uint8 array or tensor (T, H, W, 3), or a sequence of uint8 frames (H, W, 3);
    - an iterator of such frames, or an open binary file, such as the end of a pipe: `sys.stdin.buffer`. Both are read
      once, as they come, and their length is not known. Where the file cannot seek, its format must be readable from
      front to back: mkv, webm, mpegts, fragmented mp4 and mp4 with its index in front are. A camera is an iterator::

        camera = av.open("/dev/video0", format="v4l2")
        open_video((frame.to_ndarray(format="rgb24") for frame in camera.decode(video=0)), fps=30)

    A file that turns out cut off or damaged yields all frames that decode, then a `TruncatedVideoWarning`; those that
    do not are left out, and counted in the numbers of the others where the file tells their times. One whose frames
    change their size, or an iterator whose next frame is none, ends there, with the same warning.

    Args:
        source: the video.
        frames: which frames, counted from 0. A stop past the end means the end. Negative numbers count from the
            end and are possible where the length is known: of folders and arrays. The step must be positive.
        fps: frames per second, instead of what the source states; 25 where it states none.
        strict: raise a `VideoError` instead of the warning.

    Raises:
        VideoError: what is given is no video, holds no frames, or the slice selects none of them.
        FileNotFoundError: there is no such path (it is a `VideoError` too).
    """
    selected = check_slice(frames if frames is not None else slice(None))
    rate = None if fps is None else as_frame_rate(fps)
    if isinstance(source, BinaryFile):
        return _PipeReader(source, rate, selected, strict)
    if isinstance(source, Iterator):
        return _IteratorReader(source, rate or DEFAULT_FPS, selected, strict)
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
    return check_slice(slice(*(int(part) if part.strip() else None for part in text.split(":"))))


def _sound_rate(*stated: Fraction | None) -> Fraction:
    """The first of the rates a file states that a video file can have."""
    return next((rate for rate in stated if rate and Fraction(1, 10**6) <= rate < 2**30), DEFAULT_FPS)

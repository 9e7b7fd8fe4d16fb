"""Writing a video file: complete under its name, or not at all."""

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from m2f_video.files import atomic_path
from m2f_video.video.decode import VideoError

_BT709 = 1  # in FFmpeg's lists of colour spaces, of primaries and of transfer curves alike
_LIMITED_RANGE = 1
_PIXEL_FORMAT = "yuv420p"
_MOST_PIXELS_LOOKED_AHEAD = 2**25  # an 8K frame; of larger ones the encoder would keep gigabytes
_THREADS = 4  # what x264 writes depends on their number, which would be that of the machine's cores

MAX_SIDE = 16384
"""Pixels along a side of the largest frame that the encoders take."""


def as_frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as an exact fraction; a float becomes the nearest one containers use, such as 30000/1001.

    Raises:
        VideoError: the rate is not a positive finite number.
    """
    if not 0 < fps < float("inf"):
        raise VideoError(f"fps must be a positive number, got {fps}")
    # Pictures taken once an hour or a day have rates that would become 0.
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001 if fps > 0.01 else 10**6)
    if not rate or max(rate.numerator, rate.denominator) >= 2**31:
        raise VideoError(f"fps {fps} is out of the range that video files can state")
    return rate


def open_output(path: Path, fps: Fraction) -> Any:
    """A container to write to, PyAV's; its suffix chooses which.

    Raises:
        ValueError: FFmpeg knows none of this suffix.
    """
    import av

    options = {}
    if path.suffix.lower() in {".mp4", ".mov", ".m4v"}:
        # The index goes to the front of the file, so that browsers start before they have all of it. It states the
        # length in units, thousandths of a second by default, and players leave out frames past that length.
        options = {"movflags": "+faststart", "movie_timescale": str(max(1000, fps.numerator))}
    # By its protocol: FFmpeg takes a name with a colon for an address.
    return av.open(f"file:{path}", "w", options=options)


class VideoWriter:
    """Writes frames to a video file, exactly as many and as fast as given.

    A context manager: the file appears under its name when the block ends well, and nothing of it stays when the
    block ends with an exception. Frames are stored as yuv420p, the one format that every browser and QuickTime play;
    it has even sizes only, so that an odd width or height grows by one: the last column or row is there twice.
    Colours are BT.709, limited range, and tagged so. The same frames give the same file, whatever the number of cores
    (with libx264).

    Args:
        path: of the file; its suffix chooses the container.
        fps: frames per second; a `Fraction` is kept exactly.
        width: pixels.
        height: pixels.
        codec: an FFmpeg encoder that takes `crf` and x264's presets: libx264, libx265.
        crf: constant rate factor, lower is better and larger.
        keyframes: at least every so many frames there is one that decodes by itself; players seek faster where they
            are close. None leaves it to the encoder, x264 takes 250.

    Raises:
        VideoError: bad size (a side has 1 to `MAX_SIDE` pixels) or rate, an unknown encoder, a wrong frame, or a block
            that wrote no frame.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | Fraction,
        width: int,
        height: int,
        codec: str = "libx264",
        crf: int = 18,
        keyframes: int | None = None,
    ) -> None:
        if width < 1 or height < 1:
            raise VideoError(f"{path}: width and height must be positive, got {width}x{height}")
        if max(width, height) > MAX_SIDE:
            raise VideoError(f"{path}: cannot encode {width}x{height} frames, a side has at most {MAX_SIDE} pixels")
        self.path = Path(path)
        self.fps = as_frame_rate(fps)
        self.width, self.height, self.codec, self.crf = width, height, codec, crf
        self.keyframes = keyframes
        self.num_frames = 0
        self._block: contextlib.AbstractContextManager[None] | None = None

    def __enter__(self) -> "VideoWriter":
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: the folder {self.path.parent} does not exist, create it first")
        block = self._writing()
        block.__enter__()
        self._block = block
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(kind, error, traceback)

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 RGB (H, W, 3)."""
        import av

        if self._block is None:
            raise VideoError(f"{self.path}: write inside `with VideoWriter(...) as writer:`")
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise VideoError(
                f"{self.path}: frame {self.num_frames} has shape {frame.shape} and type {frame.dtype}; this video "
                f"takes uint8 RGB ({self.height}, {self.width}, 3)"
            )
        if self.height % 2 or self.width % 2:
            frame = np.pad(frame, ((0, self.height % 2), (0, self.width % 2), (0, 0)), mode="edge")
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        image = image.reformat(format=_PIXEL_FORMAT, dst_colorspace="ITU709", dst_color_range="MPEG")
        image.pts, image.time_base = self.num_frames, 1 / self.fps
        self._encode(image)
        self.num_frames += 1

    def _encode(self, image: Any) -> None:
        """Encode a frame, or with None what the encoder still holds, into the file."""
        import av

        try:
            self._container.mux(self._stream.encode(image))
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):  # a full disk and its like
                raise
            raise VideoError(
                f"{self.path}: {self.codec} cannot encode {self.width}x{self.height} frames at {self.fps} fps: "
                f"{error.strerror}"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        import av

        with atomic_path(self.path) as temporary:
            self._container = self._open(temporary)
            try:
                self._stream = self._add_stream()
                yield
                if not self.num_frames:
                    raise VideoError(f"{self.path}: no frame was written, a video needs at least one")
                self._encode(None)
            except BaseException:
                # Closing often fails for the same reason then (a full disk); the first error is the one to see.
                with contextlib.suppress(av.error.FFmpegError):
                    self._container.close()
                raise
            self._container.close()

    def _open(self, temporary: Path) -> Any:
        try:
            return open_output(temporary, self.fps)
        except ValueError as error:
            raise VideoError(f"{self.path}: FFmpeg knows no container {self.path.suffix!r}; use .mp4") from error

    def _add_stream(self) -> Any:
        options = {"crf": str(self.crf), "preset": "veryfast"}
        if self.keyframes is not None:
            options["g"] = str(self.keyframes)
        if self.codec == "libx264":
            options["mbtree"] = "0"  # reads memory that nobody has written: the same frames become different files
        if self.width * self.height > _MOST_PIXELS_LOOKED_AHEAD:
            options |= {"preset": "ultrafast", "tune": "zerolatency"}
        try:
            stream = self._container.add_stream(self.codec, rate=self.fps, options=options)
        except ValueError as error:
            raise VideoError(f"{self.path}: cannot encode with {self.codec!r}: {error}") from error
        stream.width, stream.height = self.width + self.width % 2, self.height + self.height % 2
        stream.pix_fmt = _PIXEL_FORMAT
        context = stream.codec_context
        context.thread_count = _THREADS
        context.time_base = 1 / self.fps
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        return stream

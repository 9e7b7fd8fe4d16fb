"""Decoding a video file with PyAV: its frames upright and in RGB, and whether the file is whole.

`reader` is the public face of this; here is all that knows FFmpeg's ways of reading.
"""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from m2f_video.files import check_regular

MAX_PIXELS = 2**27
"""Of one frame: 16384 x 8192, four times an 8K frame and 384 MiB in RGB. Larger ones are refused, stated or real."""

# FFmpeg "plays" text as pictures, and follows playlists to other files; neither is a video file.
_REFUSED_FORMATS = {"tty", "bin", "xbin", "adf", "idf", "concat", "hls", "dash", "sdp"}
# A file may name others (playlists, references): none is opened, neither here nor in the network.
_OPTIONS = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
# The container's options do not reach the decoder, whose frames can be larger than the container says.
_DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}
# FFmpeg's converter ends the process when it is given one of these.
_CRASHING_FORMATS = {"yaf32le", "yaf32be"}


class VideoError(ValueError):
    """A video that cannot be read or written as asked; the message names it and the remedy."""


def check_file(path: str) -> None:
    """Refuse what may block for ever.

    Raises:
        VideoError: the path is a pipe, a socket or a device.
    """
    try:
        check_regular(path)
    except ValueError as error:
        raise VideoError(str(error)) from error


def check_pixels(name: str, height: int, width: int, most: int = MAX_PIXELS) -> None:
    """Refuse frames that would take all memory.

    Raises:
        VideoError: a frame has more pixels than `most`.
    """
    if height * width > most:
        raise VideoError(
            f"{name} is {width}x{height}; frames of more than {most:,} pixels are not read, scale it down first"
        )


@contextlib.contextmanager
def open_decoder(path: str) -> Iterator["Decoder"]:
    """Open a video file, whatever its name looks like to FFmpeg; closed when the block ends.

    Raises:
        VideoError: FFmpeg does not recognise the file; it is a text, a playlist, a pipe or a device; it has no video
            stream (a cover picture is none) or none that can be decoded; or its frames are too large.
    """
    import av

    check_file(path)
    with contextlib.ExitStack() as stack:
        try:
            # FFmpeg would take a name with a colon for an address, and one with a percent sign for a pattern.
            file = stack.enter_context(open(path, "rb"))
            container = av.open(file, options=_OPTIONS, metadata_errors="replace")
        except PermissionError as error:
            raise VideoError(f"{path}: no permission to read the file") from error
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(
                f"{path}: not a video FFmpeg can read, or its beginning or index is missing: {error.strerror}"
            ) from error
        stack.enter_context(container)
        if container.format.name in _REFUSED_FORMATS:
            raise VideoError(f"{path}: not a video file, but {container.format.long_name} ({container.format.name})")
        yield Decoder(container, path)


class Decoder:
    """Decodes the video of a file to its end, once and past errors, and judges by what the file states what is missing.

    Iterating yields PyAV frames, each with its display matrix (3, 3). That of the first holds for those that have none:
    an animated PNG states it once.

    Attributes:
        stream: the main video stream, PyAV's.
        num_frames: frames decoded so far.
    """

    def __init__(self, container: Any, path: str) -> None:
        import av

        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError(f"{path}: the file has no video stream (it reads as {container.format.long_name})")
        if stream.codec_context is None:
            raise VideoError(f"{path}: there is no decoder for its video stream; re-encode it, for example to h264")
        check_pixels(f"{path}: its picture", stream.codec_context.height, stream.codec_context.width)
        stream.codec_context.options = _DECODER_OPTIONS
        stream.thread_type = "SLICE"  # frame threads are faster, but hide errors and drop frames beside them
        self.stream = stream
        self.num_frames = 0
        self._container = container
        self._num_broken = 0  # packets that did not decode and frames that decoded with errors
        self._demux_error: str | None = None
        self._end = _start(container)
        self._last_time: Fraction | None = None
        self._longest_frame = Fraction(0)

    def __iter__(self) -> Iterator[tuple[Any, np.ndarray | None]]:
        import av

        seen_keyframe, first_matrix = False, None
        for packet in self._packets():
            if packet.stream.index != self.stream.index:
                continue
            seen_keyframe |= packet.is_keyframe
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                # A recording that starts between keyframes is sound: what precedes the first one cannot be decoded.
                self._num_broken += seen_keyframe
                continue
            for frame in frames:
                matrix = _display_matrix(frame)
                if self.num_frames == 0:
                    first_matrix = matrix
                self.num_frames += 1
                self._num_broken += frame.is_corrupt
                if frame.pts is not None and frame.time_base is not None:
                    time = frame.pts * frame.time_base
                    if self._last_time is not None:
                        self._longest_frame = max(self._longest_frame, time - self._last_time)
                    self._last_time = time
                yield frame, first_matrix if matrix is None else matrix

    def _packets(self) -> Iterator[Any]:
        """Packets of all streams, since the file ends where the last of them ends."""
        import av

        try:
            for packet in self._container.demux():
                # A time code track (data) claims the full length in one packet.
                if packet.pts is not None and packet.stream.type != "data":
                    self._end = max(self._end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                yield packet
        except (av.error.FFmpegError, OSError) as error:
            self._demux_error = error.strerror

    def stated_num_frames(self) -> int | None:
        """Number of frames by what the file states, None where it states nothing; a hint only."""
        if self.stream.frames:
            return int(self.stream.frames)
        end = _stated_end(self._container)
        if end is None or not self.stream.average_rate:
            return None
        return round((end - _start(self._container)) * self.stream.average_rate)

    def damage(self) -> str | None:
        """Why the file is damaged, None when it is sound; to be asked when decoding has ended."""
        reasons = []
        if self._demux_error:
            reasons.append(f"reading stopped at an error ({self._demux_error})")
        if self._num_broken:
            reasons.append(f"{self._num_broken} of its packets or frames are broken")
        if (missing := self._missing_seconds()) is not None:
            reasons.append(f"the last {float(missing):.2f} s of the length it states are missing")
        if _gif_without_end(self._container):
            reasons.append("the end of the GIF is missing")
        if not reasons:
            return None
        return f"the file is cut off or damaged, {self.num_frames} frames were decoded: {'; '.join(reasons)}"

    def _missing_seconds(self) -> Fraction | None:
        """Stated length without data, None when it is within what sound files show.

        Lengths are compared as times, not as frame counts, because edit lists leave frames out. Three frames of
        slack, and at a variable rate the longest frame seen, cover rounding and a last frame without duration.
        """
        stated = _stated_end(self._container)
        rate = self.stream.average_rate
        if stated is None or not rate:
            return None
        missing = stated - self._end
        return missing if missing > max(3 / Fraction(rate), self._longest_frame) else None


def upright_rgb(frame: Any, matrix: np.ndarray | None) -> np.ndarray:
    """A PyAV frame as uint8 RGB (H, W, 3), turned and mirrored as the display matrix says (nearest quarter turn).

    Raises:
        VideoError: FFmpeg cannot convert pixels of this format.
    """
    import av

    try:
        if frame.format.name in _CRASHING_FORMATS:
            raise ValueError("no conversion")
        image = frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(f"pixels of format {frame.format.name} cannot be converted to RGB") from error
    if matrix is None:
        return image
    # A point (x, y) of the stored frame is shown at (a x + c y, b x + d y).
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _display_matrix(frame: Any) -> np.ndarray | None:
    """The display matrix (3, 3) of a frame, None where it has none.

    `frame.side_data` would do, but it keeps what it returns, which refers to the frame: a cycle, by which decoded
    frames stay in memory until the garbage collector comes. And it knows not all of FFmpeg's types of side data. What
    FFmpeg lists before a type that is not known is there in spite of the error; the matrix comes before EXIF, the
    camera's own data, from which it is made.
    """
    from av.sidedata import sidedata

    container: Any = sidedata.SideDataContainer
    side_data = container.__new__(container)
    with contextlib.suppress(ValueError):
        container.__init__(side_data, frame)
    matrix = side_data.get("DISPLAYMATRIX")
    return None if matrix is None else np.frombuffer(matrix, np.int32).reshape(3, 3)


def _start(container: Any) -> Fraction:
    return Fraction(container.start_time or 0, 1_000_000)


def _stated_end(container: Any) -> Fraction | None:
    """Time in seconds at which the container says its pictures and sound end."""
    streams = (*container.streams.video, *container.streams.audio)
    if all(s.duration for s in streams):
        return max(((s.start_time or 0) + s.duration) * s.time_base for s in streams)
    return None if container.duration is None else _start(container) + Fraction(container.duration, 1_000_000)


def _gif_without_end(container: Any) -> bool:
    """A GIF states no length, but ends with a semicolon (GIF89a specification, section 27), padding aside."""
    if container.format.name != "gif":
        return False
    with open(container.name, "rb") as file:
        file.seek(max(0, container.size - 4096))
        return not file.read().rstrip(b"\0\r\n").endswith(b";")

"""Decoding a video file with PyAV: its frames upright and in RGB, and whether the file is whole.

`reader` is the public face of this; here is all that knows FFmpeg's ways of reading.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from m2f_video.files import check_regular

if TYPE_CHECKING:
    from m2f_video.video.pipes import OpenFile

MAX_PIXELS = 2**27
"""Of one frame: 16384 x 8192, four times an 8K frame and 384 MiB in RGB. Larger ones are refused, stated or real."""

# FFmpeg "plays" text as pictures, and follows playlists to other files; neither is a video file.
_REFUSED_FORMATS = {"tty", "bin", "xbin", "adf", "idf", "concat", "hls", "dash", "sdp"}
# A file may name others (playlists, references): none is opened, neither here nor in the network.
_OPTIONS = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
# The container's options do not reach the decoder, whose frames can be larger than the container says.
_DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}
_LONGEST_LOSS = 10
"""Seconds; over a larger hole the clock of the recording has changed."""

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
def open_decoder(source: "str | OpenFile") -> Iterator["Decoder"]:
    """Open a video file, whatever its name looks like to FFmpeg, or one that is open; closed when the block ends.

    Raises:
        VideoError: FFmpeg does not recognise the file; it is a text, a playlist, a pipe or a device that is not open
            yet; it has no video stream (a cover picture is none) or none that can be decoded; or its frames are too
            large.
    """
    import av

    if isinstance(source, str):
        check_file(source)
    name, pipe = (source, None) if isinstance(source, str) else (source.name, source)
    with contextlib.ExitStack() as stack:
        try:
            # FFmpeg would take a name with a colon for an address, and one with a percent sign for a pattern.
            file: Any = stack.enter_context(open(source, "rb")) if isinstance(source, str) else source
            container = av.open(file, options=_OPTIONS, metadata_errors="replace")
        except PermissionError as error:
            raise VideoError(f"{name}: no permission to read the file") from error
        except (av.error.FFmpegError, OSError) as error:
            if pipe is not None:
                pipe.check()
            raise VideoError(
                f"{name}: not a video FFmpeg can read, or its beginning or index is missing: {error.strerror}"
                f"{pipe.remedy() if pipe is not None else ''}"
            ) from error
        stack.enter_context(container)
        if container.format.name in _REFUSED_FORMATS:
            raise VideoError(f"{name}: not a video file, but {container.format.long_name} ({container.format.name})")
        yield Decoder(container, name, pipe)


class LostFrames:
    """Counts the frames that a decoder was given and did not show.

    A packet that it took and never showed is a frame that is lost, where there is a hole in time too: in some formats
    there are packets that show nothing, or half a frame. So is what is missing beside a packet that the file's own
    counters say is broken (MPEG-TS). An AVI states times that are wrong where frames are reordered: there every packet
    that fails is a frame.

    Args:
        stream: PyAV's, of the packets.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._sent = deque[Fraction](maxlen=1000)  # times of packets after the last frame
        self._is_reordered = False
        self._last: Fraction | None = None
        self._broken: Fraction | None = None  # time of the last packet that says so
        self._failed = 0

    def sent(self, packet: Any) -> None:
        """A packet goes to the decoder."""
        if packet.pts is None or packet.is_discard:
            return
        time = packet.pts * packet.time_base
        self._is_reordered |= bool(self._sent) and time < self._sent[-1]
        self._sent.append(time)
        if packet.is_corrupt:
            self._broken = time

    def failed(self) -> None:
        """The packet sent last did not decode."""
        self._failed += 1

    def before(self, time: Fraction | None) -> int:
        """How many frames are lost between the last frame and the next, of this time."""
        failed, self._failed = self._failed, 0
        if time is None or (self._stream.codec_context.has_b_frames and not self._is_reordered):
            return failed
        last, self._last = self._last, time
        lost, rate = 0, self._stream.average_rate
        if last is not None and rate and time > last:
            lost = round((time - last) * rate) - 1
            if self._broken is None or not last - 1 < self._broken < time or time - last > _LONGEST_LOSS:
                lost = max(0, min(lost, sum(last < sent < time for sent in self._sent)))
        self._sent = deque((sent for sent in self._sent if sent > time), maxlen=self._sent.maxlen)
        return lost


class Decoder:
    """Decodes the video of a file to its end, once and past errors, and judges by what the file states what is missing.

    Iterating yields PyAV frames, each with its number, which counts those that did not decode too, and its display
    matrix (3, 3). That of the first holds for those that have none: an animated PNG states it once.

    Attributes:
        name: of the file, to be told.
        remedy: what to do where there is nothing to decode, to be put after what is wrong.
        stream: the main video stream, PyAV's.
        num_frames: frames decoded so far.
        at_end: whether all has been decoded.
    """

    def __init__(self, container: Any, name: str, pipe: "OpenFile | None" = None) -> None:
        import av

        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError(f"{name}: the file has no video stream (it reads as {container.format.long_name})")
        if stream.codec_context is None:
            raise VideoError(f"{name}: there is no decoder for its video stream; re-encode it, for example to h264")
        check_pixels(f"{name}: its picture", stream.codec_context.height, stream.codec_context.width)
        stream.codec_context.options = _DECODER_OPTIONS
        stream.thread_type = "SLICE"  # frame threads are faster, but hide errors and drop frames beside them
        self.name, self.stream = name, stream
        self.remedy = pipe.remedy() if pipe is not None else ""
        self.num_frames = 0
        self.at_end = False
        self._container, self._pipe = container, pipe
        self._num_lost = 0
        self._num_broken = 0  # packets that did not decode and frames that decoded with errors
        self._demux_error: str | None = None
        self._end = _start(container)
        self._last_time: Fraction | None = None
        self._longest_frame = Fraction(0)

    def __iter__(self) -> Iterator[tuple[int, Any, np.ndarray | None]]:
        import av

        seen_keyframe, first_matrix = False, None
        lost = LostFrames(self.stream)
        for packet in self._packets():
            if packet.stream.index != self.stream.index:
                continue
            # A recording that starts between keyframes is sound: what precedes the first one cannot be decoded.
            seen_keyframe |= packet.is_keyframe
            if seen_keyframe:
                lost.sent(packet)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                if seen_keyframe:
                    self._num_broken += 1
                    lost.failed()
                continue
            for frame in frames:
                matrix = _display_matrix(frame)
                if self.num_frames == 0:
                    first_matrix = matrix
                time = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
                self._num_lost += lost.before(time)
                self.num_frames += 1
                self._num_broken += frame.is_corrupt
                if time is not None:
                    if self._last_time is not None:
                        self._longest_frame = max(self._longest_frame, time - self._last_time)
                    self._last_time = time
                yield self.num_frames + self._num_lost - 1, frame, first_matrix if matrix is None else matrix
        self.at_end = True

    def _packets(self) -> Iterator[Any]:
        """Packets of all streams, since the file ends where the last of them ends."""
        import av

        try:
            for packet in self._container.demux():
                # A time code track (data) claims the full length in one packet.
                if packet.pts is not None and packet.stream.type != "data":
                    self._end = max(self._end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if self._pipe is not None:
                    self._pipe.check(at_end=False)
                yield packet
        except (av.error.FFmpegError, OSError) as error:
            self._demux_error = error.strerror
        if self._pipe is not None:
            self._pipe.check()

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
        if self._num_lost:
            reasons.append(f"frames in the middle that did not decode and are left out: {self._num_lost}")
        if (missing := self._missing_seconds()) is not None:
            reasons.append(f"the last {float(missing):.2f} s of the length it states are missing")
        if self._pipe is None and _gif_without_end(self._container):
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

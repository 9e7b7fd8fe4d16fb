"""A long video, written in parts: what is closed survives whatever happens then, and all become one file at the end."""

import contextlib
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from m2f_video.files import atomic_path, naming, sync
from m2f_video.video.decode import VideoError
from m2f_video.video.writer import VideoWriter, open_output

_MOST_REORDERED = 2  # frames by which x264 may show one later than it is decoded


class VideoParts:
    """Writes frames to video files of a folder, as `VideoWriter` does, the next file after each `close`.

    A context manager: of the part that is open when the block ends nothing stays.

    Args:
        folder: of the parts; made where missing.
        fps: frames per second.
        width: pixels.
        height: pixels.
        closed: how many parts of an earlier run to go on after; later ones are removed.

    Raises:
        VideoError: see `VideoWriter`; or a part to go on after is missing.
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path, fps: Fraction, width: int, height: int, closed: int = 0) -> None:
        self.folder, self.fps, self.width, self.height = folder, fps, width, height
        self.closed = closed
        self._open: VideoWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for part in self._parts():
            if not part.is_file():
                raise VideoError(f"{part} is missing, a part of the video to go on with")
        for other in set(folder.iterdir()) - set(self._parts()):
            other.unlink()

    def __enter__(self) -> "VideoParts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        writer, self._open = self._open, None
        if writer is not None:
            abandoned = error or VideoError(f"{writer.path} was not closed")
            with contextlib.suppress(type(abandoned)):
                writer.__exit__(type(abandoned), abandoned, traceback)

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 RGB (H, W, 3)."""
        if self._open is None:
            writer = VideoWriter(self._part(self.closed), self.fps, self.width, self.height)
            self._open = writer.__enter__()
        self._open.write(frame)

    def close(self) -> None:
        """Close the part that is open, if one is: it is on the disk then, and no crash takes it away."""
        writer, self._open = self._open, None
        if writer is not None:
            writer.__exit__(None, None, None)
            sync(writer.path)
            self.closed += 1

    def join(self, path: Path) -> None:
        """Write all parts to one file, frame after frame as they were encoded; they stay.

        Raises:
            VideoError: there is no part, or one is damaged.
            OSError: the file cannot be written.
        """
        import av

        self.close()
        if not self.closed:
            raise VideoError(f"{path}: no frame was written, a video needs at least one")
        try:
            with atomic_path(path) as temporary, naming(path), open_output(temporary, self.fps) as container:
                self._copy(container)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise VideoError(f"{path}: a part in {self.folder} is damaged: {error.strerror}; start anew") from error

    def _copy(self, container: Any) -> None:
        import av

        stream, count = None, 0
        for part in self._parts():
            with av.open(f"file:{part}") as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = container.add_stream_from_template(video)
                    stream.time_base = 1 / self.fps
                before, frame = count, 1 / self.fps / video.time_base
                for packet in source.demux(video):
                    if packet.pts is None:  # the end
                        continue
                    packet.pts = round(packet.pts / frame) + before
                    packet.dts, packet.duration = count - _MOST_REORDERED, 1
                    packet.time_base, packet.stream = 1 / self.fps, stream
                    container.mux(packet)
                    count += 1

    def _parts(self) -> list[Path]:
        return [self._part(number) for number in range(self.closed)]

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06}.mp4"

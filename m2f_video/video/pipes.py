"""Videos that come through a pipe, a socket or any other open file, as FFmpeg is to see them."""

import io
from typing import Any, Protocol, runtime_checkable

from m2f_video.video.decode import VideoError


@runtime_checkable
class BinaryFile(Protocol):
    """An open binary file: a pipe such as `sys.stdin.buffer`, a `BytesIO`, what `open(path, "rb")` gives."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes, none at the end."""


class OpenFile:
    """An open file for PyAV, which can seek where the file can and is at its beginning.

    PyAV copies whatever `read` returns, however long, and drops what `read` raises that is no `Exception`: an
    interrupt. Here it is kept, the file ends there, and `check` raises it.

    Attributes:
        name: of the file, to be told.

    Raises:
        VideoError: it is open as text.
    """

    def __init__(self, file: BinaryFile) -> None:
        name = getattr(file, "name", None)
        self.name = name if isinstance(name, str) else "<stream>"
        if isinstance(file, io.TextIOBase):
            raise VideoError(f'{self.name} is open as text; open it as binary, with open(path, "rb") or its .buffer')
        # What is there at once, rather than what fills the buffer later.
        self._read = getattr(file, "read1", file.read)
        self._num_read = 0
        self._error: BaseException | None = None
        self.is_seekable = _is_seekable(file)
        if self.is_seekable:
            other: Any = file
            self.seek, self.tell = other.seek, other.tell

    def read(self, size: int) -> bytes:
        """The next bytes, at most so many; none at the end, or where reading has failed."""
        if self._error is not None:
            return b""
        try:
            data = self._read(size)
            if not isinstance(data, bytes) or len(data) > size:
                raise VideoError(
                    f"{self.name}: read({size}) must give up to {size} bytes, and wait until there are some"
                )
        except BaseException as error:  # noqa: BLE001  # `check` raises it, interrupts too
            self._error = error
            return b""
        self._num_read += len(data)
        return data

    def check(self, at_end: bool = True) -> None:
        """Raise what reading has raised; before all has been used that came until then, interrupts only."""
        if self._error is not None and (at_end or not isinstance(self._error, Exception)):
            raise self._error

    def remedy(self) -> str:
        """What to do where there is no video in the file, to be put after what is wrong."""
        if not self._num_read:
            return "; nothing came through it: look at what was to write to it"
        if self.is_seekable:
            return ""
        return (
            "; what comes through a pipe is read from front to back, which mkv, webm, mpegts, fragmented mp4 and mp4 "
            "with its index in front (-movflags +faststart) allow; give other files by their path"
        )


def _is_seekable(file: Any) -> bool:
    """FFmpeg counts positions from where it began."""
    try:
        return bool(file.seekable()) and file.tell() == 0 and hasattr(file, "seek")
    except (AttributeError, OSError, ValueError):
        return False

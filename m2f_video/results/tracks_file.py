"""The file of a result that is written as it comes: a line of JSON for every frame, whatever the length of the video.

The first line is a header, `{"format": "m2f-video tracks", "version": 1, "video": {source, width, height, fps},
"categories": [{id, name}], "made": {...}}`; `made` says how. Of a frame there is `{"frame": its number in the source,
"masks": {key: run lengths}}`. Between frames, about every second of video, and at the end are the tracks so far, by
falling score: `{"tracks": [{id, masks, category_id, category, score, certainty, frames}], "complete": false}`, where
`masks` is the key of their masks, which two tracks share where one object has two likely classes, and `frames` how many
have one. The last line is the one that is `complete`. Of a video in windows it has such rows of all `others` too, the
tracks that were left out as too uncertain or not among the best, each as its likeliest class. A file without that line
is what a run has left that was stopped, or is at work, and good as far as it goes; a line without its end is none.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

from m2f_video.files import check_regular, naming, parse_json
from m2f_video.results.masks import Rle, check_rle

TRACKS_LINES_FILE = "tracks.jsonl"
FORMAT, VERSION = "m2f-video tracks", 1
_LONGEST_LINE = 2**28  # bytes

Row = dict[str, Any]


class TracksWriter:
    """Appends to a file of tracks; made by `begin` or `go_on`, and a context manager that closes it.

    What does not fit on the disk leaves no part of a line.

    Attributes:
        length: bytes written.
        num_frames: in the file.
        frames_since: since the last line of tracks.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.length, self.num_frames, self.frames_since = path, 0, 0, 0
        self._file = path.open("r+b", buffering=0)
        self._seen = Counter[int]()

    @classmethod
    def begin(cls, path: Path, header: Row) -> "TracksWriter":
        """Start a file anew.

        Raises:
            OSError: it cannot be written.
        """
        path.write_bytes(b"")
        writer = cls(path)
        try:
            writer._append(header)
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def go_on(cls, path: Path, length: int) -> "TracksWriter":
        """Go on with a file after so many bytes of it, at the end of a line; what comes after them goes.

        Raises:
            ValueError: the file is shorter, or damaged.
            OSError: it cannot be read or written.
        """
        if path.stat().st_size < length:
            raise ValueError(f"{path} is shorter than it was")
        os.truncate(path, length)
        lines = TracksLines(path)
        if lines.length != length:
            raise ValueError(f"{path} is damaged: it does not end with a line")
        writer = cls(path)
        writer._file.seek(length)
        writer.length = length
        writer._seen, writer.num_frames = lines.seen, len(lines.frames)
        writer.frames_since = lines.frames_since
        return writer

    def __enter__(self) -> "TracksWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def frame(self, number: int, masks: Mapping[int, Rle]) -> None:
        """Append a frame.

        Args:
            number: of the frame in the source.
            masks: by key, of what is seen in it.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        self._append({"frame": number, "masks": {str(key): rle for key, rle in masks.items()}})
        self._seen.update(masks.keys())
        self.num_frames += 1
        self.frames_since += 1

    def tracks(self, rows: Iterable[Row]) -> None:
        """Append the tracks so far.

        Args:
            rows: as in the file, without `frames`.

        Raises:
            OSError: see `frame`.
        """
        self._append({"tracks": self._counted(rows), "complete": False})
        self.frames_since = 0

    def end(self, rows: Iterable[Row], others: Iterable[Row] | None = None) -> None:
        """Append the line after which nothing comes.

        Args:
            rows: of the tracks; see `tracks`.
            others: of those that were left out; None where nobody knows.

        Raises:
            OSError: see `frame`.
        """
        left_out = {} if others is None else {"others": self._counted(others)}
        self._append({"tracks": self._counted(rows), **left_out, "complete": True})
        self.frames_since = 0

    def _counted(self, rows: Iterable[Row]) -> list[Row]:
        return [{**row, "frames": self._seen[row["masks"]]} for row in rows]

    def _append(self, row: Row) -> None:
        left = memoryview((json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n").encode())
        length = self.length + len(left)
        try:
            with naming(self.path):
                while left:
                    left = left[self._file.write(left) :]
        except BaseException:
            with suppress(OSError):
                self._file.truncate(self.length)
                self._file.seek(self.length)
            raise
        self.length = length


class TracksLines:
    """A file of tracks, of which the places of its lines are in memory.

    Attributes:
        path: of the file.
        header: its first line.
        frames: numbers of the frames in the source.
        tracks: rows of the last line of tracks; empty before the first.
        others: rows of the tracks that were left out; None where the file does not say.
        complete: whether it is the last of all.
        seen: in how many frames each key has a mask.
        frames_since: how many frames come after the last line of tracks.
        length: bytes up to the end of the last whole line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or a line is damaged; the message names the line.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path, self.length, self.frames_since = path, 0, 0
        self._file = path.absolute()  # where masks are read from, whatever the working directory is then
        self.header: Row = {}
        self.tracks: list[Row] = []
        self.others: list[Row] | None = None
        self.complete = False
        self.seen = Counter[int]()
        self._places, self._lines, numbers = array("q"), array("q"), array("q")
        self._sums = array("Q")
        self._last: tuple[int, dict[int, Rle]] = (-1, {})
        with path.open("rb") as file:
            for line, (place, content, row) in enumerate(_rows(file), 1):
                try:
                    if line == 1:
                        self.header = _check_header(row)
                    elif self.complete:
                        raise ValueError("it comes after the end")
                    elif "frame" in row:
                        numbers.append(_frame_number(row, numbers[-1] if numbers else -1))
                        self.seen.update(_masks(row).keys())
                        self._places.append(place)
                        self._lines.append(line)
                        self._sums.append(crc32(content))
                        self.frames_since += 1
                    else:
                        self.tracks, self.complete, self.frames_since = _get_list(row, "tracks"), _complete(row), 0
                        self.others = _get_list(row, "others") if "others" in row else None
                except ValueError as error:
                    raise ValueError(f"line {line}: {error}") from error
                self.length = file.tell()
        if not self.header:
            raise ValueError("line 1: the header is missing or cut off")
        self.frames = tuple(numbers)

    def masks(self, position: int) -> dict[int, Rle]:
        """What is seen in a frame, by key; run lengths are not looked at, `mask` does.

        Args:
            position: among the file's frames, from 0.

        Raises:
            ValueError: the file has changed meanwhile.
        """
        last, masks = self._last
        if last != position:
            with self._file.open("rb") as file:
                file.seek(self._places[position])
                line = file.readline(_LONGEST_LINE)
            if crc32(line) != self._sums[position]:  # another file may be the same one to the system, an inode later
                raise ValueError(f"{self.path} has changed since it was loaded; load it again")
            masks = _masks(_parse(line))
            self._last = position, masks
        return masks

    def mask(self, key: int, position: int) -> Rle | None:
        """One of them, checked; None where it is not seen.

        Raises:
            ValueError: it is damaged, the message names the line; or as `masks`.
        """
        if (rle := self.masks(position).get(key)) is None:
            return None
        video = self.header["video"]
        try:
            return check_rle(rle, video["height"], video["width"])
        except ValueError as error:
            raise ValueError(f"{self.path}, line {self._lines[position]}: mask {key}: {error}") from error


class FrameMasks(Sequence[Rle | None]):
    """The masks of a track, one a frame, read from a file of tracks when they are asked for.

    Args:
        lines: the file.
        key: of the masks in it.
    """

    def __init__(self, lines: TracksLines, key: int) -> None:
        self._of, self._key = lines, key

    @property
    def num_visible(self) -> int:
        """In how many frames there is one."""
        return self._of.seen[self._key]

    def __len__(self) -> int:
        return len(self._of.frames)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[position] for position in range(*index.indices(len(self))))
        return self._of.mask(self._key, range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of lists

    def __repr__(self) -> str:
        return f"<masks {self._key} of {len(self)} frames in {self._of.path}>"


def read_header(path: Path) -> Row:
    """The first line of a file of tracks, whatever the others are.

    Raises:
        ValueError: it is none.
    """
    with path.open("rb") as file:
        for _, _, row in _rows(file):
            return _check_header(row)
    raise ValueError("line 1: the header is missing or cut off")


def header_of(video: Row, labels: Sequence[str], made: Mapping[str, Any]) -> Row:
    """The first line of a file of tracks."""
    categories = categories_of(labels)
    return {"format": FORMAT, "version": VERSION, "video": video, "categories": categories, "made": dict(made)}


def categories_of(labels: Sequence[str]) -> list[Row]:
    """Classes as files name them, counted from 1."""
    return [{"id": index + 1, "name": name} for index, name in enumerate(labels)]


def _rows(file: Any) -> Iterator[tuple[int, bytes, Row]]:
    """The whole lines of a file, each with its place and what it says; a last one without its end is none."""
    place, number = 0, 1
    while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
        try:
            row = _parse(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield place, line, row
        place, number = place + len(line), number + 1
    if len(line) == _LONGEST_LINE:
        raise ValueError(f"line {number}: it is longer than any")


def _parse(line: bytes) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"no JSON, or damaged: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"it is no object, {row!s:.40}")
    return row


def _check_header(row: Row) -> Row:
    if row.get("format") != FORMAT:
        raise ValueError(f"the header does not say that the format is {FORMAT!r}")
    if row.get("version") != VERSION:
        raise ValueError(f"version {row.get('version')!s:.20} of the format is not known, only {VERSION}")
    return row


def _frame_number(row: Row, last: int) -> int:
    number = row["frame"]
    if type(number) is not int or number <= last:
        raise ValueError(f"frames must be rising numbers from 0, got {number!r:.40} after {last}")
    return number


def _masks(row: Row) -> dict[int, Rle]:
    masks = row.get("masks")
    if not isinstance(masks, dict) or not all(key.removeprefix("-").isdecimal() and len(key) < 19 for key in masks):
        raise ValueError("a frame has 'masks', run lengths by number")
    return {int(key): rle for key, rle in masks.items()}


def _get_list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise ValueError("it is neither a frame nor tracks")
    return value


def _complete(row: Row) -> bool:
    return row.get("complete") is True

"""Predictions of finished videos on disk, so that a run that was stopped goes on where it was.

A journal is a file of JSON lines. The first says what the predictions are made from; each of the others holds the rows
of one video.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2f_video.files import check_regular, naming, parse_json

Row = dict[str, Any]
"""A row of a YouTubeVIS submission."""


class Journal:
    """The finished videos of a prediction.

    A last line that is cut off, as when the program is killed while it writes, does not count. The file is made with
    the first video.

    Args:
        path: of the file; it need not exist.
        made_from: what the predictions depend on, by name, as JSON takes it.

    Attributes:
        path: of the file.
        rows: rows of each finished video by its index in the dataset; those from the file are not checked.

    Raises:
        ValueError: the file is no journal, is damaged, or its predictions are made from something else; or it is a
            pipe or device.
    """

    def __init__(self, path: str | os.PathLike[str], made_from: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.rows: dict[int, list[Row]] = {}
        self._header = _line({"made_from": made_from})
        check_regular(self.path)
        content = self.path.read_bytes() if self.path.exists() else b""
        self._end = content.rfind(b"\n") + 1  # of the last whole line
        if not self._end and not self._header.startswith(content):
            raise self._foreign()
        for number, line in enumerate(content[: self._end].splitlines()):
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            fields = entry if isinstance(entry, dict) else {}
            if number == 0:
                self._check_header(fields)
            elif type(fields.get("video")) is not int or not isinstance(fields.get("rows"), list):
                raise ValueError(f"{self.path}: line {number + 1} is damaged; delete the file to start anew")
            else:
                self.rows[fields["video"]] = fields["rows"]

    def add(self, index: int, rows: Sequence[Row]) -> None:
        """Write the rows of a video; when this returns they are on the disk.

        Raises:
            OSError: the file cannot be written.
        """
        with naming(self.path), self.path.open("ab") as file:
            file.truncate(self._end)
            if not self._end:
                file.write(self._header)
            file.write(_line({"video": index, "rows": rows}))
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()
        self.rows[index] = list(rows)

    def _check_header(self, header: Mapping[str, Any]) -> None:
        found, made_from = header.get("made_from"), json.loads(self._header)["made_from"]
        if not isinstance(found, dict) or found.keys() != made_from.keys():
            raise self._foreign()
        if different := [name for name in made_from if found[name] != made_from[name]]:
            raise ValueError(
                f"{self.path}: it holds predictions that were made with another {' and '.join(different)}; delete it "
                "to start anew, or write to another place"
            )

    def _foreign(self) -> ValueError:
        return ValueError(f"{self.path}: it is no journal of predictions; delete it, or write to another place")


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode("ascii") + b"\n"

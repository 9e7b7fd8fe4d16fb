"""A file beside the results of many videos that says what was done, by which checkpoint and options.

Lines of JSON: the first says what all results are made from, each other one what became of a video. Several processes
write it, each a line at a time and under a lock; of a video that has several lines the last counts.
"""

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from m2f_video.files import check_regular, locked, naming, parse_json
from m2f_video.inference.fingerprint import differences

MANIFEST_FILE = "manifest.jsonl"
Entry = dict[str, Any]
"""What became of a video."""


class Manifest:
    """What was done to the videos whose results are in a folder.

    Args:
        folder: that is there.
        made_from: `checkpoint`, by its name, and all that results depend on, as JSON takes it.

    Attributes:
        path: of the file; it is made where missing.
        entries: of each video by its name, as of the last `refresh`.
        fresh: names of those whose entry was written after this was made.

    Raises:
        ValueError: the file is no manifest, is damaged, or results there are made from something else.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        self.path = folder / MANIFEST_FILE
        self.entries: dict[str, Entry] = {}
        self.fresh: set[str] = set()
        self._header = _line({"made_from": made_from})
        self._end = 0  # of the last line read
        with self._held():
            self.refresh()
            self.fresh.clear()
            self._append(b"")

    def refresh(self) -> None:
        """Read what others have written meanwhile.

        Raises:
            ValueError: see above.
            OSError: the file cannot be read.
        """
        check_regular(self.path)
        if not self.path.exists() or self.path.stat().st_size < self._end:  # somebody began anew
            self._end = 0
            self.entries.clear()
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._end)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a process that was killed left the rest, or is at it
        if not self._end and not whole and not self._header.startswith(content) and not content.startswith(_BEGINNING):
            raise self._foreign()
        for line in whole.splitlines(keepends=True):
            self._read(line)
            self._end += len(line)

    def add(self, name: str, entry: Entry) -> None:
        """Write what became of a video; when this returns it is on the disk.

        Raises:
            ValueError: see above.
            OSError: the file cannot be written.
        """
        with self._held():
            self.refresh()
            self._append(_line({"video": name} | entry))
            self.refresh()

    def remove_unused(self) -> None:
        """Remove the file where it holds nothing yet, as before it was made."""
        with self._held():
            self.refresh()
            if not self.entries:
                self.path.unlink(missing_ok=True)

    def _held(self) -> AbstractContextManager[bool]:
        return locked(self.path.with_name(f".{MANIFEST_FILE}.lock"), wait=True)

    def _append(self, line: bytes) -> None:
        with naming(self.path), self.path.open("ab") as file:
            file.truncate(self._end)
            file.write(line if self._end else self._header + line)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, line: bytes) -> None:
        try:
            entry = parse_json(line)
        except ValueError:
            entry = None
        fields = entry if isinstance(entry, dict) else {}
        if not self._end:
            self._check_header(fields)
        elif not _is_sound(fields):
            raise ValueError(
                f"{self.path}: a line of it is damaged, {line[:40]!r}; take the line out to have its video done again"
            )
        else:
            self.entries[fields["video"]] = fields
            self.fresh.add(fields["video"])

    def _check_header(self, header: Mapping[str, Any]) -> None:
        found, made_from = header.get("made_from"), json.loads(self._header)["made_from"]
        if not isinstance(found, dict):
            raise self._foreign()
        theirs, mine = ({key: each[key] for key in each if key != "checkpoint"} for each in (found, made_from))
        if mine == theirs:  # whatever name the checkpoint goes by
            return
        texts = []
        if mine.pop("model", None) != theirs.pop("model", None):
            texts.append(f"checkpoint ({_shown(found)} and not {_shown(made_from)})")
        texts += differences(theirs, mine)
        raise ValueError(
            f"{self.path}: the results there are made with another {', '.join(texts)}; give --output another folder"
        )

    def _foreign(self) -> ValueError:
        return ValueError(f"{self.path}: it is no manifest of results; give --output another folder")


_BEGINNING = b'{"made_from": '


def _is_sound(entry: Entry) -> bool:
    """Whether an entry says what became of a video, and all that is read of it is of its type."""
    source, files = entry.get("source", {}), entry.get("files", [])
    return (
        isinstance(entry.get("video"), str)
        and entry.get("state") in ("done", "failed")
        and isinstance(entry.get("error", ""), str)
        and isinstance(source, dict)
        and isinstance(files, list)
        and all(type(entry.get(name, 0)) in (int, float) for name in ("frames", "tracks", "seconds"))
    )


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode("ascii") + b"\n"


def _shown(made_from: Mapping[str, Any]) -> str:
    """A checkpoint's name, or the end of its path, and of its digest as much as tells it from another of that name."""
    return f"{str(made_from.get('checkpoint'))[-24:]} [{made_from.get('model')!s:.8}]"

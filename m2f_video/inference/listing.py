"""Many videos named by one path: a folder that holds them, or a text file with a line for each."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from m2f_video.files import check_regular
from m2f_video.inference.manifest import MANIFEST_FILE
from m2f_video.results.report_page import REPORT_VIDEO_FILE
from m2f_video.results.tracks import OVERLAY_FILE, TRACKS_FILE
from m2f_video.video.pictures import OTHER_SUFFIXES, PICTURE_SUFFIXES

VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".avi", ".dv", ".f4v", ".flv", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg",
    ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".rm", ".rmvb", ".ts",
    ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip
"""Of files that are videos where they lie in a folder; in a list any is."""
LIST_SUFFIX = ".txt"
_LONGEST_NAME = 200  # bytes; file systems take 255, and what is written there adds to it

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class ListedVideo:
    """A video among many.

    Attributes:
        name: no other one of the list has it, and a folder can.
        path: of the file or folder of frames; it need not be there.
    """

    name: str
    path: Path


def is_list(source: str | os.PathLike[str]) -> bool:
    """Whether a path names many videos: a text file, or a folder that holds videos or folders of frames.

    A folder that holds frames is one video, whatever its sub-folders hold.

    Raises:
        ValueError: it is a folder of both frames and video files.
        OSError: the folder cannot be read.
    """
    path = Path(source)
    if not os.path.isdir(path):  # False too for what can be no path
        return path.suffix.lower() == LIST_SUFFIX and os.path.exists(path)
    videos, has_frames = _videos_in(path), _has_frames(path)
    if has_frames and (files := [video.name for video in videos if not os.path.isdir(video)]):
        raise ValueError(
            f"{path}: it holds pictures and videos ({files[0]}), so that it is either a folder of frames or one of "
            "videos; move the ones or the others away, or name what is to be segmented in a list.txt, one path a line"
        )
    return bool(videos) and not has_frames


def list_videos(sources: Sources) -> list[ListedVideo]:
    """The videos that a path stands for, or several paths, each once.

    Of a folder those are its video files, by suffix, and its folders of frames; hidden ones, and the overlay of an
    earlier result, are left out, and what is deeper is not looked for. Of a text file (.txt, UTF-8) it is a path on
    each line, relative to the file's folder; empty lines and those that begin with # do not count.

    A video's name is its file's without the suffix. Where several share one, or it could not be a folder's, the names
    end in a digest of the path as it is written in the list, so that they do not depend on what else is there.

    Args:
        sources: a folder, a text file, or paths.

    Raises:
        FileNotFoundError: there is no such folder or text file.
        ValueError: it is neither, is no text, or names no videos; or - (a pipe) is among them.
        OSError: it cannot be read.
    """
    if isinstance(sources, str | os.PathLike):
        written = _written(Path(sources))
    else:
        written = [(os.fspath(path), Path(path)) for path in sources]
    if not written:
        raise ValueError(f"{_shown(sources)}: it names no videos")
    once: dict[str, tuple[str, Path]] = {}
    for text, path in written:
        once.setdefault(os.path.realpath(path), (text, path))
    return _named(once.values())


def _written(source: Path) -> list[tuple[str, Path]]:
    """Of each video its path as it is written there, and where that is."""
    if os.path.isdir(source):
        return [(path.name, path) for path in _videos_in(source)]
    check_regular(source)
    if source.suffix.lower() != LIST_SUFFIX:
        raise ValueError(f"{source}: many videos are named by a folder or a text file, {LIST_SUFFIX}, a path a line")
    content = source.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{source}: it is no text; a list of videos has one path on each line, in UTF-8")
    lines = (line.strip() for line in content.decode("utf-8-sig", "surrogateescape").split("\n"))
    paths = [line for line in lines if line and not line.startswith("#")]
    if "-" in paths:
        raise ValueError(f"{source}: - stands for what is piped in, which is no video of a list; give it alone")
    return [(path, source.parent / path) for path in paths]


def _videos_in(folder: Path) -> list[Path]:
    """Video files and folders of frames that are directly in a folder, by name."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and _is_video(path)]


def _is_video(path: Path) -> bool:
    if os.path.isdir(path):  # False for links that go in circles
        return os.access(path, os.R_OK) and _has_frames(path)
    is_ours = path.name in (OVERLAY_FILE, REPORT_VIDEO_FILE) and path.with_name(TRACKS_FILE).exists()
    return path.suffix.lower() in VIDEO_SUFFIXES and not is_ours


def _has_frames(folder: Path) -> bool:
    suffixes = (*PICTURE_SUFFIXES, *OTHER_SUFFIXES)
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(suffixes) and not entry.name.startswith(".") for entry in entries)


def _named(written: Iterable[tuple[str, Path]]) -> list[ListedVideo]:
    videos = [(text, path, _stem(path)) for text, path in written]
    shared = Counter(stem.casefold() for _, _, stem in videos)  # some file systems do not tell A from a
    named = [
        ListedVideo(stem if shared[stem.casefold()] == 1 and _can_be_a_folder(stem) else _with_digest(stem, text), path)
        for text, path, stem in videos
    ]
    if len({video.name.casefold() for video in named}) < len(named):
        raise ValueError("two videos of the list would be written to one folder; give their files other names")
    return named


def _stem(path: Path) -> str:
    absolute = Path(os.path.abspath(path))  # without "..", so that it ends in a name
    return absolute.name if os.path.isdir(absolute) else absolute.stem


def _can_be_a_folder(name: str) -> bool:
    """Whether it is neither hidden, nor too long, nor that of the file beside it that says what was done."""
    return bool(name) and name[0] != "." and len(os.fsencode(name)) <= _LONGEST_NAME and name != MANIFEST_FILE


def _with_digest(stem: str, text: str) -> str:
    digest = sha256(os.fsencode(text)).hexdigest()[:8]
    while len(os.fsencode(stem)) > _LONGEST_NAME:
        stem = stem[:-1]
    return f"{stem.lstrip('.') or 'video'}-{digest}"


def _shown(sources: Sources) -> str:
    return str(sources) if isinstance(sources, str | os.PathLike) else "the list"

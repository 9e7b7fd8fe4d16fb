"""What segmenting a video gives: tracks with their masks, saved as files a person and an evaluator can read.

Shape letters: T frames of the result, N tracks, H height, W width.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from m2f_video.files import atomic_path, check_regular, made_directory, read_json
from m2f_video.results.drawing import track_colors
from m2f_video.results.masks import Rle, check_picture_size, check_rle, decode_mask, mask_area, plain_rle
from m2f_video.results.overlay import write_overlay
from m2f_video.results.tracks_file import TRACKS_LINES_FILE, FrameMasks, Row, TracksLines, TracksWriter, header_of
from m2f_video.video.reader import VideoReader, VideoSource

TRACKS_FILE = "tracks.json"
OVERLAY_FILE = "overlay.mp4"
MOST_JSON_FRAMES = 5000
"""Of the longest video of which there is a `tracks.json`, which is read as a whole."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """One object through a video.

    Attributes:
        id: number of the track, from 1, unique in its result.
        label: name of its class.
        label_id: class of the model, from 0.
        score: confidence in [0, 1], by which tracks are ranked; in windows averaged over all windows of the video, also
            where the object is not seen.
        certainty: how sure the model is of the class where it sees the object, in [0, 1], by which tracks are left out
            and drawn; by default the score.
        query_id: the model's query whose masks these are; a query with two likely classes gives two tracks.
        segmentations: one COCO run-length encoded mask per frame of the result, None where the object is absent. Of a
            result that was read from a `tracks.jsonl` they are read from it when they are asked for.

    Raises:
        ValueError: the score is no finite number, or a segmentation is not what is described above.
    """

    id: int
    label: str
    label_id: int
    score: float
    certainty: float = math.nan
    query_id: int
    segmentations: Sequence[Rle | None]

    def __post_init__(self) -> None:
        if math.isnan(self.certainty):
            object.__setattr__(self, "certainty", self.score)
        for name in ("score", "certainty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"track {self.id}: the {name} must be a finite number, got {getattr(self, name)}")
        if isinstance(self.segmentations, FrameMasks):  # which looks at each when it is asked for
            return
        segmentations = []
        for position, rle in enumerate(self.segmentations):
            if rle is not None and (rle := plain_rle(rle)) is None:
                raise ValueError(
                    f"track {self.id}, frame {position}: a segmentation is None or a compressed COCO encoding, "
                    '{"size": [H, W], "counts": str}'
                )
            segmentations.append(rle)
        object.__setattr__(self, "segmentations", tuple(segmentations))

    @property
    def num_frames_visible(self) -> int:
        """Number of frames with a mask."""
        if isinstance(self.segmentations, FrameMasks):
            return self.segmentations.num_visible
        return sum(rle is not None for rle in self.segmentations)

    def mask(self, frame: int) -> np.ndarray:
        """Mask in a frame, bool (H, W); all False where the object is absent.

        Args:
            frame: position in the result, from 0; not the frame's number in the source.

        Raises:
            IndexError: there is no such frame.
            ValueError: no frame has a mask, so that its size is unknown here (`VideoSegmentation.masks` knows it).
        """
        if (rle := self._at(frame)) is not None:
            return decode_mask(rle)
        size = next((other["size"] for other in self.segmentations if other is not None), None)
        if size is None:
            raise ValueError(f"track {self.id} has no mask in any frame; use VideoSegmentation.masks({frame})")
        return np.zeros(size, bool)

    def area(self, frame: int) -> int:
        """Number of pixels of the mask in a frame; `frame` as in `mask`."""
        rle = self._at(frame)
        return 0 if rle is None else mask_area(rle)

    def _at(self, frame: int) -> Rle | None:
        return self.segmentations[_check_position(frame, len(self.segmentations))]


@dataclass(frozen=True, kw_only=True)
class VideoSegmentation:
    """The tracks found in a video.

    Attributes:
        source: path of the video as it was given, `"<array>"` for arrays.
        width: pixels.
        height: pixels.
        fps: average frame rate of the source, before a step skipped frames.
        frames: number in the source, from 0, of each frame of the result; rising.
        labels: names of all classes of the model, in the order of its class numbers.
        tracks: by falling score, whatever order they were given in.
        video: the video itself, to draw on; neither compared nor saved.
        made: how it was made, in what JSON can hold, as `tracks.jsonl` says; not compared.

    Raises:
        ValueError: the fields contradict each other; the message names the one.
    """

    source: str
    width: int
    height: int
    fps: float
    frames: tuple[int, ...]
    labels: tuple[str, ...]
    tracks: tuple[Track, ...]
    video: VideoReader | VideoSource | None = field(default=None, repr=False, compare=False)
    made: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", float(self.fps))
        object.__setattr__(self, "frames", tuple(self.frames))
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "tracks", tuple(sorted(self.tracks, key=lambda track: -track.score)))
        if self.width < 1 or self.height < 1 or not 0 < self.fps < math.inf:
            raise ValueError(
                f"width, height and fps must be positive, got {self.width}x{self.height} at {self.fps} fps"
            )
        if not self.frames or self.frames[0] < 0 or any(b <= a for a, b in pairwise(self.frames)):
            raise ValueError(f"frames must be rising numbers from 0, at least one, got {_shorten(self.frames)}")
        if len({track.id for track in self.tracks}) != len(self.tracks):
            raise ValueError(f"track ids must differ, got {_shorten(sorted(track.id for track in self.tracks))}")
        for track in self.tracks:
            self._check(track)

    def masks(self, frame: int) -> np.ndarray:
        """Masks of all tracks in a frame, bool (N, H, W), in the order of `tracks`.

        Args:
            frame: position in the result, from 0; not the frame's number in the source.

        Raises:
            IndexError: there is no such frame.
        """
        _check_position(frame, len(self.frames))
        masks = np.zeros((len(self.tracks), self.height, self.width), bool)
        for mask, decoded in zip(masks, self._each_mask(frame), strict=True):
            mask[:] = decoded
        return masks

    def _each_mask(self, frame: int) -> Iterator[np.ndarray]:
        for track in self.tracks:
            rle = track.segmentations[frame]
            yield np.zeros((self.height, self.width), bool) if rle is None else decode_mask(rle)

    def save(
        self,
        directory: str | os.PathLike[str],
        overlay: bool = True,
        min_score: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write `tracks.jsonl`, `tracks.json` and, with `overlay`, the video with its tracks drawn in, `overlay.mp4`.

        There is no `tracks.json` of more than `MOST_JSON_FRAMES` frames.
        Higher scores are drawn on top. Of tracks with one query's masks only the best label is drawn.
        The directory is made if it is missing. When anything fails nothing half-written remains: files of an
        earlier run stay as they were, and a directory that was made is removed.

        Args:
            directory: where to write.
            overlay: write `overlay.mp4` too; needs `video`.
            min_score: draw only tracks of at least this certainty; the other files hold them all.
            progress: called with (frames drawn, frames in all) after each frame of the overlay.

        Raises:
            ValueError: there is no video to draw on, or it is not the one that was segmented; or two tracks of one
                query have other masks.
            OSError: the files cannot be written.
        """
        if overlay and self.video is None:
            raise ValueError(
                "there is no video to draw on: pass overlay=False, or give it with "
                "dataclasses.replace(segmentation, video=...)"
            )
        text = self.to_json()
        with made_directory(Path(directory)) as folder, ExitStack() as stack:
            lines = stack.enter_context(atomic_path(folder / TRACKS_LINES_FILE))
            if text is not None:
                stack.enter_context(atomic_path(folder / TRACKS_FILE)).write_text(text, encoding="utf-8")
            self._write_lines(lines)
            if overlay and self.video is not None:
                drawn = replace(self, tracks=self._tracks_to_draw(min_score))
                write_overlay(
                    folder / OVERLAY_FILE,
                    self.video,
                    size=(self.height, self.width),
                    fps=self.fps,
                    frames=self.frames,
                    masks=drawn._each_mask,
                    colors=track_colors(track.id for track in drawn.tracks),
                    texts=[f"{track.label} {track.certainty:.2f}" for track in drawn.tracks],
                    progress=progress,
                )
            if text is None:  # of an earlier result
                (folder / TRACKS_FILE).unlink(missing_ok=True)

    def to_json(self) -> str | None:
        """What `tracks.json` holds, as a text; None where there are more frames than it takes."""
        return json.dumps(self.to_dict(), allow_nan=False) if len(self.frames) <= MOST_JSON_FRAMES else None

    def to_dict(self) -> dict[str, Any]:
        """What `tracks.json` holds; `results` are rows of a YouTubeVIS submission with `id` and `category` added."""
        masks: list[list[Rle | None]] = [[] for _ in self.tracks]
        for position in range(len(self.frames)):  # frame by frame, as they are read
            for column, track in zip(masks, self.tracks, strict=True):
                column.append(track.segmentations[position])
        return {
            "video": {**self._video(), "frames": list(self.frames)},
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate(self.labels)],
            "results": [
                {
                    "video_id": 1,
                    "id": track.id,
                    "category_id": track.label_id + 1,
                    "category": track.label,
                    "score": track.score,
                    "certainty": track.certainty,
                    "segmentations": segmentations,
                }
                for track, segmentations in zip(self.tracks, masks, strict=True)
            ],
        }

    def _video(self) -> Row:
        return {"source": self.source, "width": self.width, "height": self.height, "fps": self.fps}

    def _write_lines(self, file: Path) -> None:
        """Write a `tracks.jsonl`; masks have the numbers of their queries there."""
        with TracksWriter.begin(file, header_of(self._video(), self.labels, self.made)) as lines:
            for position, frame in enumerate(self.frames):
                masks = dict[int, Rle | None]()
                for track in self.tracks:
                    rle = track.segmentations[position]
                    if masks.setdefault(track.query_id, rle) != rle:
                        raise ValueError(f"track {track.id} has query {track.query_id}, but not the masks of another")
                lines.frame(frame, {key: rle for key, rle in masks.items() if rle is not None})
            rows = (
                track_row(
                    id=track.id,
                    label=track.label,
                    label_id=track.label_id,
                    score=track.score,
                    certainty=track.certainty,
                    query_id=track.query_id,
                )
                for track in self.tracks
            )
            lines.end(rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str], every_track: bool = False) -> "VideoSegmentation":
        """Read a `tracks.json`, or a `tracks.jsonl` in memory that does not grow with it; of a directory that there is.

        A `tracks.json` is checked in every part. It does not hold the numbers of queries: tracks with equal masks count
        as one query's; where it is older, and does not hold ids, tracks are numbered from 1 in the order of the file.

        Of a `tracks.jsonl` masks are read when they are asked for, and checked then; the file must stay. One that a run
        has left that was stopped holds the frames until there, and the tracks as they were at most a second of video
        before: a warning says so.

        Args:
            path: of the file, or of the directory.
            every_track: with the tracks that were left out, as too uncertain or not among the best, each as its
                likeliest class; the `tracks.jsonl` of a video in windows has them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no such result, or of no frame yet; the message names the part that is wrong. Or
                every track is asked for, and the file does not say all.
        """
        file = Path(path)
        if file.is_dir():
            names = (TRACKS_LINES_FILE,) if every_track else (TRACKS_FILE, TRACKS_LINES_FILE)
            file = next((file / name for name in names if (file / name).exists()), file / names[0])
        check_regular(file)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: there is no such result file")
        try:
            if file.suffix != ".jsonl":
                if every_track:
                    raise ValueError(f"the tracks that were left out are in {TRACKS_LINES_FILE} alone")
                return cls._from_dict(read_json(file))
            return cls._from_lines(TracksLines(file), every_track)
        except ValueError as error:
            raise ValueError(f"{file}: not a result of this program: {str(error).removeprefix(f'{file}: ')}") from error

    @classmethod
    def _from_dict(cls, data: Any) -> "VideoSegmentation":
        fields = _fields(data)
        tracks: list[Track] = []
        query_of: dict[tuple[str | None, ...], int] = {}  # by the masks' run lengths
        for index, row in enumerate(_get(data, "results", list, "the file")):
            where = f"result {index}"
            segmentations: list[Rle | None] = []
            for position, rle in enumerate(_get(row, "segmentations", list, where)):
                try:
                    segmentations.append(None if rle is None else check_rle(rle, fields["height"], fields["width"]))
                except ValueError as error:
                    raise ValueError(f"{where}, frame {position}: {error}") from error
            counts = tuple(None if rle is None else rle["counts"] for rle in segmentations)
            id_ = _get(row, "id", int, where) if "id" in row else index + 1
            tracks.append(_track(row, where, id_, query_of.setdefault(counts, index), tuple(segmentations)))
        frames = _get(data["video"], "frames", list, "video")
        if any(type(frame) is not int for frame in frames):
            raise ValueError(f"video: frames must be whole numbers, got {_shorten(frames)}")
        return cls(**fields, frames=tuple(frames), tracks=tuple(tracks))

    @classmethod
    def _from_lines(cls, lines: TracksLines, every_track: bool) -> "VideoSegmentation":
        if not lines.frames:
            raise ValueError("there is no frame in it yet")
        if every_track and lines.others is None:
            raise ValueError("it does not say which tracks were left out: a complete one in windows does")
        fields, tracks = _fields(lines.header), []
        for index, row in enumerate(lines.tracks + (lines.others or []) if every_track else lines.tracks):
            where = f"track {index} of the last line of tracks"
            key = _get(row, "masks", int, where)
            tracks.append(_track(row, where, _get(row, "id", int, where), key, FrameMasks(lines, key)))
        made = _get(lines.header, "made", dict, "the header")
        result = cls(**fields, frames=lines.frames, tracks=tuple(tracks), made=made)
        if not lines.complete:
            warnings.warn(
                f"{lines.path} is of a run that was stopped or is at work: {len(lines.frames)} frames, and the tracks "
                f"as they were {lines.frames_since} frames before",
                stacklevel=3,
            )
        return result

    def _tracks_to_draw(self, min_score: float) -> tuple[Track, ...]:
        """Tracks of at least `min_score`, best first, one per query."""
        best: dict[int, Track] = {}
        for track in self.tracks:
            if track.certainty >= min_score:
                best.setdefault(track.query_id, track)
        return tuple(best.values())

    def _check(self, track: Track) -> None:
        if not 0 <= track.label_id < len(self.labels) or self.labels[track.label_id] != track.label:
            raise ValueError(
                f"track {track.id}: label {track.label!r:.60} is not number {track.label_id} of the "
                f"{len(self.labels)} labels"
            )
        if len(track.segmentations) != len(self.frames):
            raise ValueError(
                f"track {track.id}: {len(track.segmentations)} segmentations for {len(self.frames)} frames"
            )
        if isinstance(track.segmentations, FrameMasks):  # which does what follows
            return
        for position, rle in enumerate(track.segmentations):
            if rle is not None and list(rle["size"]) != [self.height, self.width]:
                raise ValueError(
                    f"track {track.id}, frame {position}: the mask is {rle['size']} but the video is "
                    f"[{self.height}, {self.width}] (height, width)"
                )


def track_row(*, id: int, label: str, label_id: int, score: float, certainty: float, query_id: int) -> Row:
    """A track in a `tracks.jsonl`, by the fields of a `Track`."""
    return {
        "id": id,
        "masks": query_id,
        "category_id": label_id + 1,
        "category": label,
        "score": score,
        "certainty": certainty,
    }


def _fields(data: Any) -> dict[str, Any]:
    """Of a result, what both kinds of file say of the video and of the classes."""
    video = _get(data, "video", dict, "the file")
    height, width = _get(video, "height", int, "video"), _get(video, "width", int, "video")
    check_picture_size(height, width)
    labels = []
    for index, category in enumerate(_get(data, "categories", list, "the file")):
        if _get(category, "id", int, f"category {index}") != index + 1:
            raise ValueError(f"category {index}: ids must count from 1, got {category['id']}")
        labels.append(_get(category, "name", str, f"category {index}"))
    return {
        "source": _get(video, "source", str, "video"),
        "width": width,
        "height": height,
        "fps": _get(video, "fps", (int, float), "video"),
        "labels": tuple(labels),
    }


def _track(row: Any, where: str, id_: int, query_id: int, segmentations: Sequence[Rle | None]) -> Track:
    return Track(
        id=id_,
        label=_get(row, "category", str, where),
        label_id=_get(row, "category_id", int, where) - 1,
        score=_get(row, "score", (int, float), where),
        certainty=_get({"certainty": math.nan} | row, "certainty", (int, float), where),  # older files have none
        query_id=query_id,
        segmentations=segmentations,
    )


def _get(data: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of parsed JSON, or an error that says where it is missing or of the wrong type."""
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"{where} has no {key!r}")
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {key!r} has the wrong type, {type(value).__name__}")
    return value


def _check_position(frame: int, count: int) -> int:
    if not 0 <= frame < count:
        raise IndexError(f"frame {frame}: the result has {count} frames, counted from 0 whatever their source numbers")
    return frame


def _shorten(values: Sequence[Any]) -> str:
    shown = ", ".join(f"{value!s:.20}" for value in values[:8])
    return f"({shown}{', ...' if len(values) > 8 else ''})"

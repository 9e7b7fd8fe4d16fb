"""What segmenting a video gives: tracks with their masks, saved as files a person and an evaluator can read.

Shape letters: T frames of the result, N tracks, H height, W width.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from m2f_video.files import atomic_path, made_directory
from m2f_video.results.drawing import track_colors
from m2f_video.results.masks import Rle, decode_mask
from m2f_video.results.overlay import write_overlay
from m2f_video.results.reading import TRACKS_FILE as TRACKS_FILE
from m2f_video.results.reading import read_result
from m2f_video.results.track import Track as Track
from m2f_video.results.track import check_position, show_few
from m2f_video.results.tracks_file import TRACKS_LINES_FILE, FrameMasks, Row, TracksWriter, categories_of, header_of
from m2f_video.video.reader import VideoReader, VideoSource

OVERLAY_FILE = "overlay.mp4"
MOST_JSON_FRAMES = 5000
"""Of the longest video of which there is a `tracks.json`, which is read as a whole."""


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
            raise ValueError(f"frames must be rising numbers from 0, at least one, got {show_few(self.frames)}")
        if len({track.id for track in self.tracks}) != len(self.tracks):
            raise ValueError(f"track ids must differ, got {show_few(sorted(track.id for track in self.tracks))}")
        for track in self.tracks:
            self._check(track)

    def __repr__(self) -> str:
        best = ", ".join(f"{track.label:.40} {track.score:.2f}" for track in self.tracks[:5])
        more = ", ..." if len(self.tracks) > 5 else ""
        count = f"{len(self.frames)} frames of {self.width}x{self.height}, {len(self.tracks)} tracks"
        return f"<VideoSegmentation of {self.source!r:.200}: {count}{f' ({best}{more})' if best else ''}>"

    def _repr_html_(self) -> str:
        """For notebooks: some frames with the tracks drawn in, and a table."""
        from m2f_video.results.notebook import notebook_html

        return notebook_html(self)

    def masks(self, frame: int) -> np.ndarray:
        """Masks of all tracks in a frame, bool (N, H, W), in the order of `tracks`.

        Args:
            frame: position in the result, from 0; not the frame's number in the source.

        Raises:
            IndexError: there is no such frame.
        """
        check_position(frame, len(self.frames))
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
            "categories": categories_of(self.labels),
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
        return read_result(cls, path, every_track)

    def instance_map(self, frame: int) -> np.ndarray:
        """Whose each pixel of a frame is: int64 (H, W), ids of tracks, 0 for nobody's.

        Where masks overlap the best score wins; of tracks with one query's masks, so, the best label.

        Args:
            frame: as in `masks`; so in all that follow.

        Raises:
            IndexError: there is no such frame.
        """
        from m2f_video.results.formats.one_id import instance_map

        return instance_map(self, frame)

    def semantic_map(self, frame: int) -> np.ndarray:
        """Class of each pixel of a frame: int32 (H, W), `label_id + 1`, 0 for nobody's; else as `instance_map`."""
        from m2f_video.results.formats.one_id import semantic_map

        return semantic_map(self, frame)

    def to_supervision(self) -> Sequence[Any]:
        """A `supervision.Detections` for each frame, made when it is asked for: `result.to_supervision()[3]`.

        Of the tracks that are seen in the frame: boxes (right and lower edges outside), masks, scores, classes, ids of
        tracks as `tracker_id`, labels as `data["class_name"]`.

        Raises:
            ImportError: supervision is not installed.
        """
        from m2f_video.results.formats.detections import FrameDetections

        return FrameDetections(self)

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for every track in every frame where it is seen, frame by frame.

        Columns: `m2f_video.results.formats.table.COLUMNS`.

        Raises:
            ImportError: pandas is not installed.
        """
        from m2f_video.results.formats.table import data_frame

        return data_frame(self)

    def to_csv(self, path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Write the table of `to_dataframe` to a file, with one frame in memory at a time.

        Args:
            path: of the file. It appears when it is complete, and not at all when anything fails.
            progress: called with (frames done, frames in all) after each frame.

        Raises:
            OSError: the file cannot be written.
        """
        from m2f_video.results.formats.table import write_csv

        write_csv(self, path, progress)

    def to_coco(self, frame: int | None = None) -> dict[str, Any]:
        """COCO's format: images are frames, annotations tracks in them, with `track_id` and `score` added.

        Image 1 is the first frame, its `frame_index` and file name (`00000.jpg`) have the number in the source. The
        lists `videos` and `tracks` are added as TAO has them. Nothing is lost but the numbers of queries.

        Args:
            frame: only this one; None takes all. `m2f_video.results.formats.coco.write_coco` writes them to a file
                without having them in memory.

        Raises:
            IndexError: there is no such frame.
        """
        from m2f_video.results.formats.coco import coco_dict

        return coco_dict(self, frame)

    @classmethod
    def from_coco(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> "VideoSegmentation":
        """Read what `to_coco` gives, or any annotations in COCO's format that are of one video.

        Images follow each other by `frame_index`, or as in the file; annotations name their `track_id` where there are
        several images. A track has the largest score of its annotations, 1 where there is none.

        Args:
            source: a JSON file, or what it holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or does not say what is needed; the message names the part.
        """
        from m2f_video.results.formats.coco import read_coco

        return read_coco(cls, source)

    def to_youtube_vis(self, video_id: int = 1) -> list[dict[str, Any]]:
        """Rows of a YouTubeVIS submission: `video_id`, `category_id`, `score`, `segmentations`; others are added.

        They are those of `tracks.json`, whose category ids count from 1 in the order of the labels.
        `m2f_video.results.formats.youtube_vis.write_youtube_vis` writes them to a file, and has none in memory.

        Args:
            video_id: of the video in the dataset.
        """
        return [row | {"video_id": video_id} for row in self.to_dict()["results"]]

    @classmethod
    def from_youtube_vis(
        cls,
        source: str | os.PathLike[str] | Sequence[Any],
        labels: Sequence[str],
        *,
        video_id: int | None = None,
        size: tuple[int, int] | None = None,
        fps: float = 25.0,
        frames: Iterable[int] | None = None,
    ) -> "VideoSegmentation":
        """Read the results of a video from a YouTubeVIS submission.

        Args:
            source: a JSON file, or what it holds.
            labels: names of the classes; category ids count them from 1.
            video_id: which video; None where there is only one.
            size: (H, W); None takes that of the first mask.
            fps: frame rate, which the format does not say.
            frames: numbers of the frames in the source; None counts from 0.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or does not say what is needed; the message names the row.
        """
        from m2f_video.results.formats.youtube_vis import read_youtube_vis

        return read_youtube_vis(cls, source, labels, video_id, size, fps, frames)

    def to_png(self, folder: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Write a map for each frame, as DAVIS has them: PNG with a palette, `00000.png` by its number in the source.

        Pixels are as in `instance_map`; where an id is over 255, places in `tracks`, from 1, stand for ids. `ids.json`
        says which, and all else that `from_png` reads.

        Args:
            folder: made, or empty. It appears when it is complete, and not at all when anything fails.
            progress: as in `to_csv`.

        Raises:
            FileExistsError: there is something in the folder.
            OSError: it cannot be written.
            ValueError: there are more than 255 tracks.
        """
        from m2f_video.results.formats.png import write_png

        write_png(self, folder, progress)

    @classmethod
    def from_png(cls, folder: str | os.PathLike[str], *, fps: float = 25.0) -> "VideoSegmentation":
        """Read what `to_png` wrote, or any folder of such maps, as of DAVIS.

        Where there is no `ids.json`, each number is a track of its own, an "object" of score 1, and 255 is nobody's.

        Args:
            folder: of the PNG files, named by the frames' numbers in the source, or in their order.
            fps: frame rate, where there is no `ids.json`.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no maps, or a damaged one, or maps of several sizes; the message names the file.
        """
        from m2f_video.results.formats.png import read_png

        return read_png(cls, folder, fps)

    def to_mots(self, path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Write a text file in the format of MOTS: `frame id class height width counts`.

        Frames have their numbers in the source, ids are those of the tracks, classes count from 1; masks do not
        overlap, as in `instance_map`. The format has neither scores nor labels.

        Args:
            path: of the file. It appears when it is complete, and not at all when anything fails.
            progress: as in `to_csv`.

        Raises:
            OSError: the file cannot be written.
        """
        from m2f_video.results.formats.mots import write_mots

        write_mots(self, path, progress)

    @classmethod
    def from_mots(
        cls,
        path: str | os.PathLike[str],
        labels: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        fps: float = 25.0,
        frames: Iterable[int] | None = None,
    ) -> "VideoSegmentation":
        """Read a text file in the format of MOTS; all scores are 1, what a dataset leaves out (id 10000) is left out.

        Args:
            path: of the file.
            labels: names of the classes; the file counts them from 1.
            size: (H, W); None takes that of the first mask.
            fps: frame rate, which the format does not say.
            frames: numbers of the frames in the source; None counts from 0 to the last that has a mask.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or does not say what is needed; the message names the line.
        """
        from m2f_video.results.formats.mots import read_mots

        return read_mots(cls, path, labels, size, fps, frames)

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

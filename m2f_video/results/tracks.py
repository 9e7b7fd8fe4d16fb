"""What segmenting a video gives: tracks with their masks, saved as files a person and an evaluator can read.

Shape letters: T frames of the result, N tracks, H height, W width.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from m2f_video.files import atomic_path, made_directory
from m2f_video.results.drawing import track_colors
from m2f_video.results.formats.methods import Formats
from m2f_video.results.masks import Rle, decode_mask
from m2f_video.results.overlay import write_overlay
from m2f_video.results.reading import TRACKS_FILE as TRACKS_FILE
from m2f_video.results.reading import read_result
from m2f_video.results.report_page import MIN_SCORE, VideoPlace, write_report
from m2f_video.results.track import Track as Track
from m2f_video.results.track import check_position, show_few
from m2f_video.results.tracks_file import TRACKS_LINES_FILE, FrameMasks, Row, TracksWriter, categories_of, header_of
from m2f_video.video.reader import VideoReader, VideoSource

OVERLAY_FILE = "overlay.mp4"
MOST_JSON_FRAMES = 5000
"""Of the longest video of which there is a `tracks.json`, which is read as a whole."""


@dataclass(frozen=True, kw_only=True)
class VideoSegmentation(Formats):
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

    def report(
        self,
        path: str | os.PathLike[str],
        link: bool = False,
        min_score: float = MIN_SCORE,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write a page that shows the video and its tracks in a browser, and needs nothing else.

        The masks are in the page, and a browser draws them over the video, which is encoded anew.

        Args:
            path: of the page, such as `report.html`. It appears when it is complete.
            link: have the video beside the page, in a file of its name that ends in .mp4, instead of inside it.
            min_score: certainty from which tracks are shown at first; all are in the page.
            progress: called with (steps done, steps in all).

        Raises:
            ValueError: as `write_report`, which sets two results side by side as well.
            OSError: the files cannot be written.
        """
        place: VideoPlace = "beside" if link else "inside"
        write_report(path, [self], place=place, min_score=min_score, progress=progress)

    def to_json(self) -> str | None:
        """What `tracks.json` holds, as a text; None where there are more frames than it takes."""
        return json.dumps(self.to_dict(), allow_nan=False) if len(self.frames) <= MOST_JSON_FRAMES else None

    def to_dict(self) -> dict[str, Any]:
        """What `tracks.json` holds; `results` are rows of a YouTubeVIS submission with `id` and `category` added."""
        return {
            "video": {**self._video(), "frames": list(self.frames)},
            "categories": categories_of(self.labels),
            "results": self.to_youtube_vis(),
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

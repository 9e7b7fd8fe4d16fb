"""What a result has methods for: the formats of other programs.

Shape letters: H height, W width.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from m2f_video.results.track import Track

Progress = Callable[[int, int], None]
"""Called with (frames done, frames in all) after each frame."""


class Formats:
    """Base of `VideoSegmentation`, whose fields these are."""

    source: str
    width: int
    height: int
    fps: float
    frames: tuple[int, ...]
    labels: tuple[str, ...]
    tracks: tuple[Track, ...]

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

    def to_csv(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        """Write the table of `to_dataframe` to a file, with one frame in memory at a time.

        Args:
            path: of the file. It appears when it is complete, and not at all when anything fails.
            progress: see `Progress`.

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
    def from_coco(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Self:
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
        from m2f_video.results.formats.youtube_vis import youtube_vis_rows

        return youtube_vis_rows(self, video_id)

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
    ) -> Self:
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

    def to_png(self, folder: str | os.PathLike[str], progress: Progress | None = None) -> None:
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
    def from_png(cls, folder: str | os.PathLike[str], *, fps: float = 25.0) -> Self:
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

    def to_mots(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
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
    ) -> Self:
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

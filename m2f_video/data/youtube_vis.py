"""Datasets in the YouTubeVIS format: YouTubeVIS 2019, 2021 and 2022, OVIS, LV-VIS, and what we write ourselves.

A dataset is an annotation file and a folder with a folder of frames per video. The file is JSON with `videos` (`id`,
`width`, `height`, `length`, `file_names`), `categories` (`id`, `name`) and `annotations` (`id`, `video_id`,
`category_id`, `iscrowd`, and `segmentations` with an entry per frame: run lengths, polygons, or null where absent).

Shape letters: N instances, T frames of a clip, H height, W width.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

import numpy as np
import torch

from m2f_video.data.annotations import (
    Annotation,
    AnnotationFile,
    DatasetError,
    find_annotations,
    find_frames,
    read_annotations,
)
from m2f_video.data.clip import Clip, check_frame_indices
from m2f_video.files import check_regular
from m2f_video.results.masks import decode_segmentation
from m2f_video.video import read_image


@dataclass(frozen=True, kw_only=True, eq=False)
class YouTubeVisVideo:
    """One video of a dataset; made by `YouTubeVis`.

    Attributes:
        video_id: its id in the annotation file.
        name: of its folder of frames.
        height: pixels.
        width: pixels.
        files: one per frame.
        instances: its objects without crowds.
        labels: class index of each of them.
    """

    video_id: int
    name: str
    height: int
    width: int
    files: tuple[Path, ...]
    instances: tuple[Annotation, ...]
    labels: tuple[int, ...]

    @property
    def num_frames(self) -> int:
        """Length of the whole video."""
        return len(self.files)

    def clip(self, frame_indices: Sequence[int]) -> Clip:
        """Read these frames and their masks, in this order.

        Raises:
            DatasetError: a frame cannot be read or has another size than the file says, or a segmentation is damaged.
            ValueError: no frames are named, or the video has no such frame.
        """
        indices = check_frame_indices(frame_indices, self.num_frames, self.name)
        unique, places = np.unique(indices, return_inverse=True)
        frames = np.stack([self._frame(index) for index in unique])[places]
        masks = np.zeros((len(self.instances), len(unique), self.height, self.width), bool)
        present = np.zeros((len(self.instances), len(unique)), bool)
        for n, instance in enumerate(self.instances):
            for t, index in enumerate(unique):
                mask = self._mask(instance, index)
                if mask is not None:
                    masks[n, t], present[n, t] = mask, True
        return Clip(
            frames=torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),  # (T, H, W, 3) -> (T, 3, H, W)
            masks=torch.from_numpy(masks[:, places]),
            labels=torch.tensor(self.labels, dtype=torch.int64),
            present=torch.from_numpy(present[:, places]),
            instance_ids=torch.tensor([instance.id for instance in self.instances], dtype=torch.int64),
            frame_indices=indices,
            video_id=self.video_id,
        ).without_absent()

    def _frame(self, index: int) -> np.ndarray:
        check_regular(self.files[index])
        image = read_image(self.files[index])
        if image.shape[:2] != (self.height, self.width):
            raise DatasetError(
                f"{self.files[index]}: the frame is {image.shape[0]} x {image.shape[1]} (height x width), but its "
                f"annotations are of {self.height} x {self.width}"
            )
        return image

    def _mask(self, instance: Annotation, index: int) -> np.ndarray | None:
        try:
            return decode_segmentation(instance.segmentations[index], self.height, self.width)
        except ValueError as error:
            raise DatasetError(
                f"{self.files[index]}: annotation {instance.id}: {error} (m2f-video data check lists all in a "
                "dataset of videos)"
            ) from error


V_co = TypeVar("V_co", covariant=True)


class FileVideos(Generic[V_co]):
    """A dataset of the videos that an annotation file lists, in its order; whoever inherits sets the attributes.

    Attributes:
        file: the annotation file.
    """

    file: Path
    _videos: tuple[V_co, ...]
    _options: tuple[object, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the annotation file and the options; it does not read the frames."""
        digest = hashlib.sha256(self.file.read_bytes())
        digest.update(repr(self._options).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int, /) -> V_co:
        """Video `index` in the order of the file.

        Raises:
            IndexError: there is no such video.
        """
        if not 0 <= index < len(self._videos):
            raise IndexError(f"there is no video {index}, the dataset has {len(self._videos)}")
        return self._videos[index]


class YouTubeVis(FileVideos[YouTubeVisVideo]):
    """A dataset in the YouTubeVIS format: a sequence of `YouTubeVisVideo`, whose frames are read when asked for.

    Args:
        path: the annotation file, or a folder with one of `ANNOTATION_FILES`, such as `train.json`.
        frames: folder of the videos' folders of frames; None looks where published datasets have it (see
            `find_frames`).
        labels: class names of the model to train or test; categories are matched to them by name. None takes the
            file's categories by rising id, as the original does.
        num_videos: only the first so many videos; None takes all.

    Attributes:
        file: the annotation file.
        category_ids: ids of the file's categories by name, rising.

    Raises:
        FileNotFoundError: there is no such dataset.
        DatasetError: the file is not in the format; or a category is not among `labels`.
        ValueError: `num_videos` is not positive.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        frames: str | os.PathLike[str] | None = None,
        labels: Sequence[str] | None = None,
        num_videos: int | None = None,
    ) -> None:
        if num_videos is not None and num_videos < 1:
            raise ValueError(f"num_videos must be positive, got {num_videos}")
        self.file = find_annotations(path)
        parsed = read_annotations(self.file)
        folder = find_frames(self.file, frames, parsed.videos.values())
        names = parsed.categories
        self.category_ids = {name: id_ for id_, name in names.items()}
        self.labels = tuple(names.values()) if labels is None else tuple(labels)
        index_of = {name: index for index, name in enumerate(self.labels)}
        unknown = [name for name in names.values() if name not in index_of]
        if unknown:
            raise DatasetError(
                f"{self.file}: {len(unknown)} categories are not among the labels: {', '.join(unknown[:8]):.120}"
            )
        label_of = {id_: index_of[name] for id_, name in names.items()}
        self._videos = tuple(islice(build_videos(parsed, label_of, folder), num_videos))
        self._options = (self.labels, len(self._videos))


def build_videos(parsed: AnnotationFile, label_of: Mapping[int, int], folder: Path) -> Iterator[YouTubeVisVideo]:
    """The videos of an annotation file in its order, with the objects of some of its categories.

    Args:
        parsed: the file.
        label_of: class indices by category id.
        folder: of the frames.
    """
    of_video = parsed.instances()
    for id_, video in parsed.videos.items():
        instances = tuple(instance for instance in of_video[id_] if instance.category_id in label_of)
        own = PurePosixPath(video.file_names[0]).parent.as_posix()
        yield YouTubeVisVideo(
            video_id=id_,
            name=str(id_) if own == "." else own,  # of frames that lie in no folder of their own
            height=video.height,
            width=video.width,
            files=tuple(folder / name for name in video.file_names),
            instances=instances,
            labels=tuple(label_of[instance.category_id] for instance in instances),
        )

"""Datasets in the YouTubeVIS format: YouTubeVIS 2019, 2021 and 2022, OVIS, LV-VIS, and what we write ourselves.

A dataset is an annotation file and a folder with a folder of frames per video. The file is JSON with `videos` (`id`,
`width`, `height`, `length`, `file_names`), `categories` (`id`, `name`) and `annotations` (`id`, `video_id`,
`category_id`, `iscrowd`, and `segmentations` with an entry per frame: run lengths, polygons, or null where absent).

Shape letters: N instances, T frames of a clip, H height, W width.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from m2f_video.data.annotations import (
    DatasetError,
    category_names,
    check_length,
    find_annotations,
    find_frames,
    get_field,
    get_picture_size,
    is_inner_path,
    read_annotations,
)
from m2f_video.data.clip import Clip, check_frame_indices
from m2f_video.files import check_regular
from m2f_video.results.masks import decode_segmentation
from m2f_video.video import read_image


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One annotated object of a video.

    Attributes:
        id: of the annotation.
        label: class index.
        segmentations: one per frame of the video, as the file holds them.
    """

    id: int
    label: int
    segmentations: Sequence[Any]


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
    """

    video_id: int
    name: str
    height: int
    width: int
    files: tuple[Path, ...]
    instances: tuple[Instance, ...]

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
        unique = sorted(set(indices))
        place_of = {index: place for place, index in enumerate(unique)}
        places = [place_of[index] for index in indices]
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
            labels=torch.tensor([instance.label for instance in self.instances], dtype=torch.int64),
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

    def _mask(self, instance: Instance, index: int) -> np.ndarray | None:
        try:
            return decode_segmentation(instance.segmentations[index], self.height, self.width)
        except ValueError as error:
            raise DatasetError(
                f"video {self.name}, annotation {instance.id}, frame {index}: {error} (m2f-video data check lists all)"
            ) from error


class YouTubeVis:
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
        data = read_annotations(self.file)
        folder = find_frames(self.file, frames, data["videos"])
        names = category_names(data["categories"], self.file)
        self.category_ids = {name: id_ for id_, name in names.items()}
        self.labels = tuple(names.values()) if labels is None else tuple(labels)
        index_of = {name: index for index, name in enumerate(self.labels)}
        unknown = [name for name in names.values() if name not in index_of]
        if unknown:
            raise DatasetError(
                f"{self.file}: {len(unknown)} categories are not among the labels: {', '.join(unknown[:8]):.120}"
            )
        label_of = {id_: index_of[name] for id_, name in names.items()}
        self._videos = _build_videos(data, label_of, folder, self.file)[:num_videos]

    @property
    def fingerprint(self) -> str:
        """Hash of the annotation file, the labels and the number of videos; it does not read the frames."""
        digest = hashlib.sha256(self.file.read_bytes())
        digest.update(repr((self.labels, len(self))).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int, /) -> YouTubeVisVideo:
        """Video `index` in the order of the file.

        Raises:
            IndexError: there is no such video.
        """
        if not 0 <= index < len(self._videos):
            raise IndexError(f"there is no video {index}, the dataset has {len(self._videos)}")
        return self._videos[index]


def _build_videos(
    data: dict[str, Any], label_of: dict[int, int], folder: Path, file: Path
) -> tuple[YouTubeVisVideo, ...]:
    if not data["videos"]:
        raise DatasetError(f"{file}: there are no videos")
    lengths = {get_field(row, "id", int, f"{file}: a video"): _get_length(row, file) for row in data["videos"]}
    if len(lengths) != len(data["videos"]):
        raise DatasetError(f"{file}: two videos have the same id")
    instances: dict[int, list[Instance]] = {id_: [] for id_ in lengths}
    seen: set[int] = set()
    for row in data["annotations"]:
        where = f"{file}: annotation {row.get('id')!s:.60}"
        id_, video_id = get_field(row, "id", int, where), get_field(row, "video_id", int, where)
        category, segmentations = (
            get_field(row, "category_id", int, where),
            get_field(row, "segmentations", list, where),
        )
        if id_ in seen:
            raise DatasetError(f"{where}: another annotation has the same id")
        seen.add(id_)
        if video_id not in instances:
            raise DatasetError(f"{where}: there is no video {video_id}")
        if category not in label_of:
            raise DatasetError(f"{where}: there is no category {category}")
        if len(segmentations) != lengths[video_id]:
            raise DatasetError(
                f"{where}: {len(segmentations)} segmentations for the {lengths[video_id]} frames of video {video_id}"
            )
        if row.get("iscrowd", 0) not in (0, 1):
            raise DatasetError(f"{where}: 'iscrowd' must be 0 or 1, got {row['iscrowd']!r:.60}")
        if not row.get("iscrowd"):
            instances[video_id].append(Instance(id=id_, label=label_of[category], segmentations=segmentations))
    return tuple(
        YouTubeVisVideo(
            video_id=row["id"],
            name=_folder_name(row),
            height=row["height"],
            width=row["width"],
            files=tuple(folder / name for name in row["file_names"]),
            instances=tuple(instances[row["id"]]),
        )
        for row in data["videos"]
    )


def _get_length(video: dict[str, Any], file: Path) -> int:
    """Number of frames of a video, whose size and file names are checked: these must stay inside the folder."""
    where = f"{file}: video {video['id']}"
    names = get_field(video, "file_names", list, where)
    if not names:
        raise DatasetError(f"{where} has no frames")
    for name in names:
        if not is_inner_path(name):
            raise DatasetError(f"{where}: {name!r:.60} is no name of a frame inside the folder of frames")
    check_length(video, len(names), where)
    get_picture_size(video, where)
    return len(names)


def _folder_name(video: dict[str, Any]) -> str:
    """The folder of a video's frames, or its id where they lie in no folder of their own."""
    folder = PurePosixPath(video["file_names"][0]).parent.as_posix()
    return str(video["id"]) if folder == "." else folder

"""Writing annotated videos in the YouTubeVIS format.

Shape letters: N instances, T frames, H height, W width.
"""

import os
from collections.abc import Callable, Mapping
from json import dumps
from pathlib import Path
from typing import Any

from m2f_video.data.annotations import ANNOTATION_FILES, FRAMES_FOLDER
from m2f_video.data.clip import AnnotatedVideo, AnnotatedVideos, Clip
from m2f_video.files import new_folder
from m2f_video.results.masks import encode_mask

_JPEG_QUALITY, _JPEG_SUBSAMPLING = 95, 0  # colour at full resolution: edges keep their colour

Progress = Callable[[int, int], None]
"""Called with (videos done, videos in all)."""


def youtube_vis_annotations(
    videos: AnnotatedVideos,
    info: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    frames: Path | None = None,
) -> dict[str, Any]:
    """The annotation file of a dataset, as parsed JSON: the truth an evaluator needs.

    Category ids count from 1 in the order of the labels.

    Args:
        videos: the dataset; all of its frames are read or rendered.
        info: what the file says about itself.
        progress: see `Progress`.
        frames: folder to write the frames to, `<video>/00000.jpg`, ...; None writes none.
    """
    data: dict[str, Any] = {
        "info": dict(info or {}),
        "videos": [],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(videos.labels)],
        "annotations": [],
    }
    for index in range(len(videos)):
        video = videos[index]
        clip = video.clip(range(video.num_frames))
        _add_video(data, video, clip)
        if frames is not None:
            _write_frames(clip, [frames / name for name in data["videos"][-1]["file_names"]])
        if progress is not None:
            progress(index + 1, len(videos))
    return data


def write_youtube_vis(
    videos: AnnotatedVideos,
    out: str | os.PathLike[str],
    info: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a dataset as `OUT/train.json` and `OUT/JPEGImages/<video>/00000.jpg`, ...

    The folder appears under its name when everything is written; if anything fails there is no trace of it.

    Args:
        videos: the dataset.
        out: folder to make; it must not exist, or be empty.
        info: what the annotation file says about itself.
        progress: see `Progress`.

    Raises:
        FileExistsError: `out` is a file, or a folder with something in it.
        OSError: it cannot be written.
    """
    with new_folder(Path(out)) as folder:
        (folder / FRAMES_FOLDER).mkdir()
        data = youtube_vis_annotations(videos, info, progress, folder / FRAMES_FOLDER)
        (folder / ANNOTATION_FILES[0]).write_text(dumps(data), encoding="utf-8")


def _write_frames(clip: Clip, files: list[Path]) -> None:
    from PIL import Image

    files[0].parent.mkdir(parents=True)
    for file, frame in zip(files, clip.frames.permute(0, 2, 3, 1).numpy(), strict=True):  # (T, H, W, 3)
        Image.fromarray(frame).save(file, quality=_JPEG_QUALITY, subsampling=_JPEG_SUBSAMPLING)


def _add_video(data: dict[str, Any], video: AnnotatedVideo, clip: Clip) -> None:
    """Append the rows of one whole video."""
    from pycocotools import mask as coco

    size = {"width": video.width, "height": video.height, "length": video.num_frames}
    names = [f"{video.name}/{index:05d}.jpg" for index in range(video.num_frames)]
    data["videos"].append({"id": video.video_id, **size, "file_names": names})
    for label, masks in zip(clip.labels.tolist(), clip.masks.numpy(), strict=True):
        segmentations = [encode_mask(mask) for mask in masks]  # None where empty
        data["annotations"].append(
            {
                "id": len(data["annotations"]) + 1,
                "video_id": video.video_id,
                "category_id": label + 1,
                "iscrowd": 0,
                **size,
                "segmentations": segmentations,
                "areas": [None if rle is None else int(coco.area(rle)) for rle in segmentations],
                "bboxes": [None if rle is None else coco.toBbox(rle).tolist() for rle in segmentations],
            }
        )

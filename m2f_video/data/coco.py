"""COCO images as pseudo-videos, for training on images and videos together.

Each image becomes a video that a moving camera would take of it: it turns, shifts and zooms slowly, and its masks
with it. Annotations are in COCO's format for instances; only categories that a video label set knows are kept.

Shape letters: N instances, T frames of a clip, H height, W width.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2f_video.categories import COCO_TO_VIS, LABEL_SETS
from m2f_video.checked_config import CheckedConfig, check_fields
from m2f_video.data.annotations import DatasetError, read_annotations
from m2f_video.data.clip import Clip, check_frame_indices
from m2f_video.data.youtube_vis import FileVideos, YouTubeVisVideo, build_videos


@dataclass(frozen=True, kw_only=True)
class CameraMotion(CheckedConfig):
    """How a pseudo-video's camera moves: each quantity swings between its limits.

    Raises:
        ConfigError: a field is out of its range.
    """

    rotation: float = 15.0
    """Largest rotation, either way, in degrees."""
    translation: float = 0.1
    """Largest shift, either way, as a share of the image's width and height."""
    zoom: float = 1.3
    """Largest magnification; the smallest is 1."""
    period: float = 40.0
    """Frames of the fastest swing; the slowest takes three times as long."""

    def _check(self) -> None:
        check_fields(self, "must be in [0, 180]", lambda value: 0 <= value <= 180, "rotation")
        check_fields(self, "must be in [0, 1]", lambda value: 0 <= value <= 1, "translation")
        check_fields(self, "must be at least 1", lambda value: 1 <= value < math.inf, "zoom", "period")


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoVideo:
    """An image as a video; made by `CocoVideos`.

    Attributes:
        still: the image and its objects, as a video of a single frame.
        num_frames: length of the video.
        motion: of the camera.
        seed: of the motion.
    """

    still: YouTubeVisVideo
    num_frames: int
    motion: CameraMotion
    seed: int

    @property
    def video_id(self) -> int:
        """Id of the image."""
        return self.still.video_id

    @property
    def name(self) -> str:
        """The image's file name without suffix."""
        return self.still.files[0].stem

    @property
    def height(self) -> int:
        """Pixels."""
        return self.still.height

    @property
    def width(self) -> int:
        """Pixels."""
        return self.still.width

    def clip(self, frame_indices: Sequence[int]) -> Clip:
        """The image as the camera sees it in these frames. What lies outside the image is black.

        Raises:
            DatasetError: the image cannot be read or has another size than the file says, or a segmentation is damaged.
            ValueError: no frames are named, or the video has no such frame.
        """
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        indices = check_frame_indices(frame_indices, self.num_frames, self.name)
        still = self.still.clip([0])
        image, masks = tv_tensors.Image(still.frames[0]), tv_tensors.Mask(still.masks[:, 0])  # (3, H, W), (N, H, W)
        frames, moved = [], []
        for index in indices:
            view = self._view(index)
            frames.append(v2.functional.affine(image, interpolation=v2.InterpolationMode.BILINEAR, **view))
            moved.append(v2.functional.affine(masks, **view))
        clip_masks = torch.stack([mask.as_subclass(torch.Tensor) for mask in moved], 1)  # (N, T, H, W)
        return replace(
            still,
            frames=torch.stack([frame.as_subclass(torch.Tensor) for frame in frames]),
            masks=clip_masks,
            present=clip_masks.flatten(2).any(2),
            frame_indices=indices,
        ).without_absent()

    def _view(self, index: int) -> dict[str, Any]:
        """Rotation, shift and zoom of a frame, as torchvision's `affine` takes them."""
        random = np.random.default_rng((self.seed, self.video_id))
        periods, phases = self.motion.period * random.uniform(1, 3, 4), random.uniform(0, 1, 4)
        turn, right, down, near = np.sin(2 * np.pi * (index / periods + phases))
        return {
            "angle": self.motion.rotation * float(turn),
            "translate": [
                self.motion.translation * self.width * float(right),
                self.motion.translation * self.height * float(down),
            ],
            "scale": 1 + (self.motion.zoom - 1) * float(1 + near) / 2,
            "shear": [0.0, 0.0],
        }


class CocoVideos(FileVideos[CocoVideo]):
    """COCO images with objects of a video label set, each as a pseudo-video: a sequence of `CocoVideo`.

    Images without such objects are left out.

    Args:
        annotations: COCO's `instances_*.json`.
        images: folder of the images.
        label_set: `youtubevis_2019`, `youtubevis_2021` or `ovis`; COCO's categories become its classes by
            `COCO_TO_VIS`, the others are left out.
        num_frames: length of each pseudo-video. The longer, the more views of an image training sees.
        motion: of the camera.
        seed: of the motions.

    Raises:
        FileNotFoundError: a path does not exist.
        DatasetError: the file is not in COCO's format.
        ValueError: an unknown label set, no frames, or a negative seed.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
        label_set: str = "youtubevis_2019",
        num_frames: int = 1000,
        motion: CameraMotion | None = None,
        seed: int = 0,
    ) -> None:
        if label_set not in COCO_TO_VIS:
            raise ValueError(f"unknown label set {label_set!r}; label sets: {', '.join(COCO_TO_VIS)}")
        if num_frames < 1 or seed < 0:
            raise ValueError(f"num_frames must be positive and seed not negative, got {num_frames} and {seed}")
        file, folder = Path(annotations), Path(images)
        for path in (file, folder):
            if not path.exists():
                raise FileNotFoundError(f"{path}: there is no such file or folder")
        self.labels = LABEL_SETS[label_set]
        motion = motion or CameraMotion()
        self.file = file
        self._options = (label_set, num_frames, motion, seed)
        parsed = read_annotations(file, "image")
        classes = COCO_TO_VIS[label_set]
        label_of = {id_: self.labels.index(classes[name]) for id_, name in parsed.categories.items() if name in classes}
        if not label_of:
            raise DatasetError(f"{file}: none of its categories is one of COCO's: {', '.join(classes):.180}")
        if min(parsed.videos) < 0:
            raise DatasetError(f"{file}: image {min(parsed.videos)}: ids must not be negative")
        self._videos = tuple(
            CocoVideo(still=still, num_frames=num_frames, motion=motion, seed=seed)
            for still in build_videos(parsed, label_of, folder)
            if still.instances
        )

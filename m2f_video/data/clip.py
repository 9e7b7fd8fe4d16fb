"""Annotated videos and the clips that training draws from them.

Every dataset here is a sequence of annotated videos; a video gives any of its frames with the instances in them; and
`ClipDataset` draws clips from it as the original does (arXiv 2112.10764, section 4.1).

Shape letters: N instances, T frames of a clip, H height, W width.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from m2f_video.checked_config import CheckedConfig, check_fields


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """Some frames of a video and the instances in them.

    An instance in none of the frames is not listed. One that is in some of them has an empty mask in the others and
    remains one instance over the whole clip.

    Attributes:
        frames: uint8 RGB (T, 3, H, W).
        masks: bool (N, T, H, W).
        labels: class indices from 0, int64 (N,).
        present: bool (N, T), in which frames an instance is annotated. What augmentation crops away stays so: the
            original takes labels by this and not by the mask.
        instance_ids: the instance's id in its dataset, int64 (N,).
        frame_indices: T numbers of the frames in their video, from 0.
        video_id: the video's id in its dataset.

    Raises:
        ValueError: shapes, types or lengths are not as above.
    """

    frames: Tensor
    masks: Tensor
    labels: Tensor
    present: Tensor
    instance_ids: Tensor
    frame_indices: tuple[int, ...]
    video_id: int

    def __post_init__(self) -> None:
        N, T = len(self.labels), len(self.frames)
        expected = {
            "frames": ((T, 3, *self.frames.shape[-2:]), torch.uint8),
            "masks": ((N, T, *self.frames.shape[-2:]), torch.bool),
            "labels": ((N,), torch.int64),
            "present": ((N, T), torch.bool),
            "instance_ids": ((N,), torch.int64),
        }
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"Clip.{name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if len(self.frame_indices) != T:
            raise ValueError(f"Clip.frame_indices must be of the {T} frames, got {self.frame_indices}")

    def without_absent(self) -> "Clip":
        """The clip without the instances whose masks are empty in all of its frames."""
        kept = self.masks.flatten(1).any(1)  # (N,)
        if kept.all():
            return self
        return replace(
            self,
            masks=self.masks[kept],
            labels=self.labels[kept],
            present=self.present[kept],
            instance_ids=self.instance_ids[kept],
        )


class AnnotatedVideo(Protocol):
    """A video whose instances are known; frames are read or made when asked for."""

    @property
    def video_id(self) -> int:
        """Unique in the dataset."""

    @property
    def name(self) -> str:
        """Unique in the dataset, fit to be the path of a folder."""

    @property
    def num_frames(self) -> int:
        """Length of the whole video."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def width(self) -> int:
        """Pixels."""

    def clip(self, frame_indices: Sequence[int]) -> Clip:
        """These frames, in this order and as often as they are named.

        Raises:
            ValueError: none are named, or the video has no such frame.
        """


class AnnotatedVideos(Protocol):
    """A dataset: annotated videos, and the class names their labels index."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by class index."""

    @property
    def fingerprint(self) -> str:
        """Another one if videos, labels or annotations are others."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> AnnotatedVideo: ...


def check_frame_indices(frame_indices: Sequence[int], num_frames: int, name: str) -> tuple[int, ...]:
    """The frame numbers asked of a video, once they are known to be in it.

    Raises:
        ValueError: none are named, or the video has no such frame.
    """
    if not len(frame_indices):
        raise ValueError(f"video {name}: a clip needs at least one frame")
    for index in frame_indices:
        if not 0 <= index < num_frames:
            raise ValueError(f"video {name}: there is no frame {index}, it has {num_frames} counted from 0")
    return tuple(int(index) for index in frame_indices)


@dataclass(frozen=True, kw_only=True)
class ClipSampling(CheckedConfig):
    """Which frames of a video make a clip.

    Raises:
        ConfigError: a field is out of its range.
    """

    num_frames: int = 2
    """Frames of a clip, T."""
    frame_range: int = 20
    """Farthest that a frame may be from the reference frame."""

    def _check(self) -> None:
        check_fields(self, "must be positive", lambda value: value > 0, "num_frames")
        check_fields(self, "must not be negative", lambda value: value >= 0, "frame_range")


def sample_frames(video_length: int, sampling: ClipSampling, random: np.random.Generator) -> tuple[int, ...]:
    """Draw the frames of a clip: one uniformly, the others from its neighbourhood with replacement, then sorted.

    The reference frame is not drawn again, except where the video or the range leaves no other.

    Raises:
        ValueError: the video has no frames.
    """
    if video_length < 1:
        raise ValueError(f"a video needs at least one frame, got {video_length}")
    reference = int(random.integers(video_length))
    first = max(reference - sampling.frame_range, 0)
    stop = min(reference + sampling.frame_range + 1, video_length)
    others = [index for index in range(first, stop) if index != reference] or [reference]
    drawn = [others[i] for i in random.integers(len(others), size=sampling.num_frames - 1)]
    return tuple(sorted([reference, *drawn]))


class ClipDataset(torch.utils.data.Dataset[Clip]):
    """Random, augmented clips of annotated videos, as a map-style dataset.

    `dataset[index, draw]` is the `draw`-th clip of video `index`, which depends on seed, index and draw only: not on
    workers, order, or what was drawn before. A sampler that yields pairs of video and epoch sees new clips in each
    epoch, and the same ones in a run that is resumed; see `m2f_video.training.batches.ClipOrder`.

    `dataset[index]` is another clip each time: its draw is a random number of PyTorch's global generator, which a
    `DataLoader` seeds anew for each epoch and worker. `torch.manual_seed` before the loop makes it repeatable.

    Args:
        videos: the dataset to draw from.
        sampling: which frames make a clip.
        augment: called with a clip and a seed; see `m2f_video.data.augment.Augmentation`.
        seed: of all draws.

    Raises:
        ValueError: the seed is negative.
    """

    def __init__(
        self,
        videos: AnnotatedVideos,
        sampling: ClipSampling | None = None,
        augment: Callable[[Clip, int], Clip] | None = None,
        seed: int = 0,
    ) -> None:
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        self.videos = videos
        self.sampling = sampling or ClipSampling()
        self.augment = augment
        self.seed = seed

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by class index."""
        return self.videos.labels

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: int | tuple[int, int]) -> Clip:
        pair: tuple[Any, ...] = key if isinstance(key, tuple) else (key, torch.randint(2**62, ()))
        try:
            index, draw = map(operator.index, pair)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"a clip is asked for by the number of its video, or by (video, draw), got {key!r:.60}"
            ) from error
        if not 0 <= index < len(self):
            raise IndexError(f"there is no video {index}, the dataset has {len(self)}")
        if draw < 0:
            raise IndexError(f"there is no draw {draw} of video {index}, they are counted from 0")
        random = np.random.default_rng((self.seed, draw, index))
        video = self.videos[index]
        clip = video.clip(sample_frames(video.num_frames, self.sampling, random))
        if self.augment is not None:
            clip = self.augment(clip, int(random.integers(2**63)))
        return clip

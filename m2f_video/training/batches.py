"""Which clips make a batch, and how they become one.

B clips, T frames, N instances, H W height and width, padded to what the model takes.
"""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2f_video.config import PreprocessingConfig
from m2f_video.data.clip import Clip, ClipDataset
from m2f_video.training.targets import ClipTarget, LabelSource, prepare_target

Batch = tuple[Tensor, list[ClipTarget]]
"""Frames (B, T, 3, H, W), normalised and padded, and the target of each clip."""


@dataclass
class ClipOrder:
    """The clips of every step, as the keys of a `ClipDataset`: an iterable of one worker's lists, step by step.

    All videos are gone through in a random order, then again in another. The clips of a step are a function of seed
    and step, and the workers divide them among themselves, so that neither the number of workers nor that of the parts
    of a step changes which clips are learned from.

    Args:
        num_videos: of the dataset.
        batch_size: clips of a step, of all workers together.
        steps: (first, one after the last) to give.
        seed: of the order.
        rank: number of this worker.
        world_size: number of workers.
        parts: lists that a worker gets for each step.

    Raises:
        ValueError: there are no videos, or a batch cannot be divided evenly.
    """

    num_videos: int
    _: KW_ONLY
    batch_size: int
    steps: tuple[int, int]
    seed: int
    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.num_videos < 1:
            raise ValueError("there are no videos to train on")
        divisor = self.world_size * self.parts
        if self.batch_size % divisor:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided among {self.world_size} workers and {self.parts} "
                f"parts; make it a multiple of {divisor}"
            )

    def __len__(self) -> int:
        return (self.steps[1] - self.steps[0]) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // (self.world_size * self.parts)
        for step in range(*self.steps):
            for part in range(self.parts):
                first = step * self.batch_size + (part * self.world_size + self.rank) * size
                yield [self._key(number) for number in range(first, first + size)]

    def _key(self, number: int) -> tuple[int, int]:
        """Video and draw of the clip that has this number in the whole run."""
        epoch, position = divmod(number, self.num_videos)
        return int(_shuffled(self.num_videos, self.seed, epoch)[position]), epoch


@lru_cache(maxsize=1)
def _shuffled(num_videos: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_videos)


@dataclass(frozen=True)
class Collate:
    """Makes a batch of clips: frames are normalised and padded as `VideoProcessor` does, instances become targets.

    Args:
        preprocessing: of the model; frames keep their size, which augmentation has chosen.
        num_labels: classes K.
        label_source: see `prepare_target`.
    """

    preprocessing: PreprocessingConfig
    num_labels: int
    label_source: LabelSource

    def __call__(self, clips: Sequence[Clip]) -> Batch:
        """Clips of as many frames each, of any sizes, to frames of one size and targets."""
        divisor = self.preprocessing.size_divisor
        height, width = (max(-(-clip.frames.shape[axis] // divisor) * divisor for clip in clips) for axis in (-2, -1))
        targets = [
            prepare_target(
                clip.labels,
                clip.masks,
                num_labels=self.num_labels,
                label_source=self.label_source,
                present=clip.present,
            )
            for clip in clips
        ]
        return torch.stack([self._frames(clip.frames, height, width) for clip in clips]), targets

    def _frames(self, frames: Tensor, height: int, width: int) -> Tensor:
        """uint8 (T, 3, h, w) -> float32 (T, 3, height, width)."""
        mean = torch.tensor(self.preprocessing.image_mean).view(3, 1, 1)
        std = torch.tensor(self.preprocessing.image_std).view(3, 1, 1)
        normalised = (frames.float() / 255 - mean) / std
        return F.pad(normalised, (0, width - frames.shape[-1], 0, height - frames.shape[-2]))


@dataclass(frozen=True)
class ClipBatches(Dataset[Batch | Exception]):
    """Batches by the lists of a `ClipOrder`, for a `DataLoader` without batching of its own.

    A clip that cannot be read gives its error instead of a batch: raised in a worker process, it would reach the
    training process wrapped in that process's traceback.

    Args:
        clips: to draw from.
        collate: makes them a batch.
    """

    clips: ClipDataset
    collate: Collate

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | Exception:
        try:
            return self.collate([self.clips[key] for key in keys])
        except (ValueError, OSError, MemoryError) as error:
            return error


def load_batches(
    batches: ClipBatches, order: ClipOrder, num_workers: int, pin_memory: bool = False
) -> Generator[Batch]:
    """Batches in order, prepared ahead by other processes.

    Args:
        batches: by key.
        order: of the keys.
        num_workers: processes; 0 prepares each batch when it is asked for.
        pin_memory: for faster copies to a GPU.

    Raises:
        ValueError: a clip is damaged or does not fit the model.
        OSError: a clip cannot be read, or a process was killed.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_leave_when_asked,
    )
    prepared: Iterator[Batch | Exception] = iter(loader)
    while True:
        try:
            batch = next(prepared, None)
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # what clips raise comes as a batch
            raise lost_process(error) from error
        if batch is None:
            return
        if isinstance(batch, Exception):
            raise batch
        yield batch


def lost_process(error: Exception) -> ChildProcessError:
    """What to say where a process that prepares clips has ended, of which PyTorch tells in many ways."""
    reason = str(error).split(". ")[0] or type(error).__name__
    return ChildProcessError(
        f"a process that prepares clips has ended ({reason:.100}); give it more memory, shared memory included, or set "
        "num_workers=0"
    )


def _leave_when_asked(_: int) -> None:
    """Let a process that prepares clips end in silence when it is interrupted, as it is with all others of its group.

    The training process gets that signal too. It would take one that is killed for a failure.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            signal.signal(number, lambda *_: os._exit(0))


def _unchanged(batch: Any) -> Any:
    return batch

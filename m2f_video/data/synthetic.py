"""A procedural benchmark for video instance segmentation: textured shapes that move, turn, grow and hide each other.

A video is made from numbers alone, so the benchmark has no download, no licence to ask for and exact truth. Pixels and
masks are equal to the last bit on every machine: randomness comes from NumPy's PCG64, and nothing is computed by
functions whose last bit is up to the platform (see `synthetic_shapes`). `VERSION` changes when any video changes.

**What varies.** Each video has a repeating textured background that drifts and turns, and some objects. An object has a
class, a texture (pattern, two colours, random detail) that moves with it, a path (a line with a wave on it, reflected
at the border, or crossing it so that the object enters, leaves and may come back), a rotation and a growth. Objects
have a fixed depth order, and nearer ones hide farther ones. Look-alikes share class, texture and size with another
object of the same video, so that only place and motion tell them apart. Scenery in front (unlabelled strips), changing
light and noise come with difficulty. Every object is placed so that it can be seen in a given share of the frames:
there its centre lies in the frame, and not within 0.7 radii of a nearer object's centre. Where that fails twenty
times in a row the object is left out.

**Classes.** `SHAPES`: disc, square, triangle, star, ring, cross, crescent, heart, arrow, bar; category ids are 1 to 10
in this order. Rotation and size are free, so that classes differ by silhouette alone.

**Truth.** A pixel belongs to the nearest thing that covers its centre. Masks are the visible parts: they never overlap,
and an object that is wholly hidden or out of the frame is absent there (null in YouTubeVIS files).

**Difficulty.** `DIFFICULTIES` holds `easy`, `medium` and `hard`: the table in `synthetic_difficulty` compares them, and
`Difficulty` documents its fields. Where there are no look-alikes, two of a class may still meet by chance.

**Standard splits.** 320 x 192 pixels, 16 frames, at each difficulty: train = 20000 videos of seed 0, val = 100 of seed
1000, test = 100 of seed 2000, such as ``SyntheticVideos(100, seed=1000, difficulty="medium")`` or
``m2f-video data synthesize val --videos 100 --seed 1000 --difficulty medium``. With the other arguments equal, video i
depends on seed and i alone, so a smaller set is the beginning of a larger one. Results should name version,
difficulty, split and resolution, for example "m2f-video synthetic v1, medium, val". Files hold JPEG frames, which cost
a little detail; results on the frames in memory and on files should not be mixed in one table.

Shape letters: T frames, N objects, H height, W width.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from m2f_video.data.clip import Clip, check_frame_indices
from m2f_video.data.synthetic_difficulty import DIFFICULTIES, Difficulty
from m2f_video.data.synthetic_render import Renderer
from m2f_video.data.synthetic_scene import Scene, sample_scene
from m2f_video.data.synthetic_shapes import SHAPES

__all__ = ["DIFFICULTIES", "SHAPES", "STANDARD_SPLITS", "VERSION", "Difficulty", "SyntheticVideo", "SyntheticVideos"]

VERSION = 1
"""Of the benchmark: it changes when any video changes."""


class StandardSplit(TypedDict):
    """Arguments of `SyntheticVideos` that make a standard split."""

    num_videos: int
    seed: int


STANDARD_SPLITS: dict[str, StandardSplit] = {
    "train": {"num_videos": 20000, "seed": 0},
    "val": {"num_videos": 100, "seed": 1000},
    "test": {"num_videos": 100, "seed": 2000},
}
"""What results are reported on, at each difficulty, such as `SyntheticVideos(**STANDARD_SPLITS["test"])`."""


class SyntheticVideos:
    """Videos of the synthetic benchmark, rendered when their frames are asked for.

    A sequence: `videos[i]` is a `SyntheticVideo`, which depends on the seed, on i and on the fields below, and not on
    `num_videos`.

    Args:
        num_videos: how many.
        seed: of all of them.
        difficulty: `easy`, `medium`, `hard`, or fields of your own.
        num_frames: T of each video.
        height: of the frames, in pixels.
        width: of the frames, in pixels.

    Raises:
        ValueError: an unknown difficulty, a negative seed or number, no frames, or frames under 16 pixels.
    """

    labels = SHAPES

    def __init__(
        self,
        num_videos: int,
        seed: int = 0,
        difficulty: str | Difficulty = "medium",
        num_frames: int = 16,
        height: int = 192,
        width: int = 320,
    ) -> None:
        if num_videos < 0 or seed < 0:
            raise ValueError(f"num_videos and seed must not be negative, got {num_videos} and {seed}")
        if num_videos >= 2**31:
            raise ValueError(f"num_videos must be below {2**31}, got {num_videos!s:.30}")
        if num_frames < 1:
            raise ValueError(f"num_frames must be positive, got {num_frames}")
        if min(height, width) < 16:
            raise ValueError(f"frames must be at least 16 pixels high and wide, got {height} x {width}")
        level = DIFFICULTIES.get(difficulty) if isinstance(difficulty, str) else difficulty
        if not isinstance(level, Difficulty):
            raise ValueError(f"unknown difficulty {difficulty!r:.60}; difficulties: {', '.join(DIFFICULTIES)}")
        self.num_videos = num_videos
        self.seed = seed
        self.difficulty = level
        self.num_frames = num_frames
        self.height = height
        self.width = width

    @property
    def info(self) -> dict[str, Any]:
        """What it takes to make these videos again, as YouTubeVIS files carry it in `info`."""
        names = [name for name, preset in DIFFICULTIES.items() if preset == self.difficulty]
        return {
            "description": "m2f-video synthetic benchmark",
            "version": VERSION,
            "seed": self.seed,
            "difficulty": names[0] if names else repr(self.difficulty),
        }

    @property
    def fingerprint(self) -> str:
        """What it takes to make these videos again, in words."""
        size = (self.num_videos, self.num_frames, self.height, self.width)
        return repr((VERSION, self.seed, self.difficulty, size))

    def __len__(self) -> int:
        return self.num_videos

    def __getitem__(self, index: int, /) -> "SyntheticVideo":
        """Video `index`; it is rendered only when frames are asked for.

        Raises:
            IndexError: there is no such video.
        """
        if not 0 <= index < self.num_videos:
            raise IndexError(f"there is no video {index}, the dataset has {self.num_videos}")
        return SyntheticVideo(self.seed, index, self.difficulty, self.num_frames, self.height, self.width)


class SyntheticVideo:
    """One video of the synthetic benchmark; made by `SyntheticVideos`.

    Attributes:
        index: its place in the dataset, from 0.
        scene: everything it shows.
        num_frames: T.
        height: pixels.
        width: pixels.
    """

    def __init__(self, seed: int, index: int, difficulty: Difficulty, num_frames: int, height: int, width: int) -> None:
        self.index = index
        self.num_frames = num_frames
        self.height = height
        self.width = width
        self._seed = seed
        self.scene: Scene = sample_scene(_generator(seed, index), difficulty, num_frames, width / height)
        self._renderer: Renderer | None = None

    @property
    def video_id(self) -> int:
        """From 1, as in YouTubeVIS files."""
        return self.index + 1

    @property
    def name(self) -> str:
        """Of its folder of frames."""
        return f"{self.index:06d}"

    def clip(self, frame_indices: Sequence[int]) -> Clip:
        """Render these frames, in this order; each is rendered alone and the same in any clip.

        Raises:
            ValueError: none are named, or the video has no such frame.
        """
        indices = check_frame_indices(frame_indices, self.num_frames, self.name)
        if self._renderer is None:
            self._renderer = Renderer(self.scene, self.height, self.width)
        frames = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        masks = np.empty((len(self.scene.objects), len(indices), self.height, self.width), bool)
        for position, index in enumerate(indices):
            noise = _generator(self._seed, self.index, index + 1)
            frames[position], masks[:, position] = self._renderer.frame(index, noise)
        objects = self.scene.objects
        return Clip(
            frames=torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),  # (T, H, W, 3) -> (T, 3, H, W)
            masks=torch.from_numpy(masks),
            labels=torch.tensor([thing.shape for thing in objects], dtype=torch.int64),
            present=torch.from_numpy(masks.any((2, 3))),
            instance_ids=torch.arange(1, len(objects) + 1),
            frame_indices=indices,
            video_id=self.video_id,
        ).without_absent()


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

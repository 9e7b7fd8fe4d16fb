"""Augmentation that treats all frames and masks of a clip alike, made of torchvision's transforms.

The defaults are the original's recipe for video (arXiv 2112.10764, section 4.1): a random size and a random flip.

Shape letters: N instances, T frames, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from m2f_video.checked_config import CheckedConfig, ConfigError, check_fields
from m2f_video.config import PreprocessingConfig
from m2f_video.data.clip import Clip


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(CheckedConfig):
    """What is drawn once per clip, in this order: colour, rotation, crop, flip, size.

    Raises:
        ConfigError: a field is out of its range.
    """

    brightness: float = 0.0
    """Brightness is multiplied by a factor within this of 1."""
    contrast: float = 0.0
    """Contrast is multiplied by a factor within this of 1."""
    saturation: float = 0.0
    """Saturation is multiplied by a factor within this of 1."""
    hue: float = 0.0
    """Hue is turned by up to this share of the colour circle, either way; at most 0.5."""
    rotation: float = 0.0
    """Largest rotation about the middle, either way, in degrees; what it uncovers is black."""
    crop: tuple[float, float] = (1.0, 1.0)
    """Range of a crop's height and width, each drawn as a share of the frame's."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    shortest_edges: tuple[int, ...] = (360, 480)
    """Shorter sides to choose from, in pixels. Empty keeps the size."""
    longest_edge: int = 1333
    """Upper bound of the longer side, in pixels."""

    def _check(self) -> None:
        shares = ("brightness", "contrast", "saturation", "flip")
        check_fields(self, "must be in [0, 1]", lambda value: 0 <= value <= 1, *shares)
        check_fields(self, "must be in [0, 0.5]", lambda value: 0 <= value <= 0.5, "hue")
        check_fields(self, "must be in [0, 180]", lambda value: 0 <= value <= 180, "rotation")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ConfigError(f"AugmentConfig.crop must be (least, most) in (0, 1], got {self.crop}")
        edges = f"must be from 1 to longest_edge={self.longest_edge}"
        check_fields(self, edges, lambda edge: 1 <= edge <= self.longest_edge, "shortest_edges")


class Augmentation:
    """Augments clips; the same clip and seed give the same result.

    Args:
        config: what to draw from.
    """

    def __init__(self, config: AugmentConfig | None = None) -> None:
        self.config = config or AugmentConfig()

    def __call__(self, clip: Clip, seed: int) -> Clip:
        """An augmented copy, without the instances that are no longer in any of its frames.

        Args:
            clip: the clip; it is not changed.
            seed: of the random choices, a non-negative integer below 2^63. The generators of the process are left as
                they were.
        """
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        config = self.config
        frames = tv_tensors.Video(clip.frames)
        masks = tv_tensors.Mask(clip.masks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if config.brightness or config.contrast or config.saturation or config.hue:
                jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
                frames = jitter(frames)
            if config.rotation:
                rotate = v2.RandomRotation(config.rotation, v2.InterpolationMode.BILINEAR)
                frames, masks = rotate(frames, masks)
            if config.crop != (1.0, 1.0):
                size = [max(round(side * _between(*config.crop)), 1) for side in frames.shape[-2:]]
                frames, masks = v2.RandomCrop(size)(frames, masks)
            frames, masks = v2.RandomHorizontalFlip(config.flip)(frames, masks)
            if config.shortest_edges:
                edge = config.shortest_edges[int(torch.randint(len(config.shortest_edges), ()))]
                frames, masks = self._resize(frames, masks, edge)
        return replace(
            clip, frames=frames.as_subclass(torch.Tensor), masks=masks.as_subclass(torch.Tensor)
        ).without_absent()

    def _resize(self, frames: torch.Tensor, masks: torch.Tensor, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
        """To the size that the video processor gives a frame with this shorter side."""
        from torchvision.transforms import v2

        from m2f_video.inference.processor import VideoProcessor

        preprocessing = PreprocessingConfig(shortest_edge=edge, longest_edge=self.config.longest_edge)
        height, width = frames.shape[-2:]
        size: Sequence[int] = VideoProcessor(preprocessing, ("any",)).resized_size(height, width)
        frames = v2.functional.resize(frames, list(size), v2.InterpolationMode.BILINEAR, antialias=True)
        # as a plain tensor: torchvision resizes what it knows to be masks by a "nearest" that is half a pixel off
        plain = masks.as_subclass(torch.Tensor).to(torch.uint8)
        plain = v2.functional.resize(plain, list(size), v2.InterpolationMode.NEAREST_EXACT)
        return frames, plain.bool()


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))

"""How hard the synthetic benchmark's videos are: the published levels, and the fields to make others.

Lengths are in units of the frame's shorter side and times in frames.
"""

from dataclasses import dataclass
from typing import Any

from m2f_video.checked_config import CheckedConfig, ConfigError, check_fields


@dataclass(frozen=True, kw_only=True)
class Difficulty(CheckedConfig):
    """What makes a video of the benchmark easy or hard.

    Raises:
        ConfigError: a field has a value no video can be made with; the message names it.
    """

    num_objects: tuple[int, int] = (1, 1)
    """Least and most objects in a video; fewer where there is no room for another one to be seen."""
    radius: tuple[float, float] = (0.2, 0.3)
    """Range of the objects' radii (of the circle around the shape), in shorter sides of the frame."""
    speed: tuple[float, float] = (0.0, 0.0)
    """Range of the objects' speeds along a line, in shorter sides per frame; they weave about it a little."""
    spin: float = 0.0
    """Fastest rotation, either way, in turns per frame."""
    zoom: float = 1.0
    """Largest ratio between an object's sizes at the two ends of the video, either way; `radius` is between the two."""
    crossing: float = 0.0
    """Probability that an object crosses the border of the frame: it enters or leaves, and may come back. Its
    speed is in the upper half of the range."""
    seen: float = 0.5
    """Share of the frames in which an object must be well visible: its centre in the frame, and no nearer object's
    centre within 0.7 of that one's radius."""
    lookalike: float = 0.0
    """Probability that an object copies class, size and texture of another one in the video."""
    camouflage: float = 0.0
    """How far objects' colours are drawn towards the background's, from 0 (as unlike as can be) to 1 (the same)."""
    clutter: float = 0.0
    """Contrast of the background's texture, from 0 (one colour) to 1."""
    background_speed: float = 0.0
    """Fastest motion of the background, in shorter sides per frame."""
    background_spin: float = 0.0
    """Fastest rotation of the background, either way, in turns per frame."""
    occluders: int = 0
    """Unlabelled textured strips that lie across the frame and in front of all objects."""
    lighting: float = 0.0
    """Largest relative change of brightness over the video."""
    noise: float = 0.0
    """Largest change of a pixel by noise, uniform and new in each frame, in levels of 255."""

    def _check(self) -> None:
        ranges = ("num_objects", "radius", "speed")
        for name in ranges:
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(f"Difficulty.{name} must be (least, most), got ({low}, {high})")
        rates = ("spin", "background_speed", "background_spin", "occluders", "noise")
        check_fields(self, "must not be negative", lambda value: value >= 0, *ranges, *rates)
        check_fields(self, "must be positive", lambda value: value > 0, "radius")
        shares = ("crossing", "seen", "lookalike", "camouflage", "clutter", "lighting")
        check_fields(self, "must be in [0, 1]", lambda value: 0 <= value <= 1, *shares)
        check_fields(self, "must be at least 1", lambda value: value >= 1, "zoom")


_TABLE: dict[str, tuple[Any, Any, Any]] = {
    #                    easy          medium         hard
    "num_objects":      ((1, 3),       (2, 5),        (4, 9)),
    "radius":           ((0.16, 0.28), (0.12, 0.26),  (0.08, 0.24)),
    "speed":            ((0.0, 0.025), (0.005, 0.05), (0.01, 0.09)),
    "spin":             (0.01,         0.025,         0.05),
    "zoom":             (1.15,         1.4,           1.8),
    "crossing":         (0.0,          0.35,          0.5),
    "seen":             (1.0,          0.5,           0.25),
    "lookalike":        (0.0,          0.3,           0.6),
    "camouflage":       (0.0,          0.2,           0.5),
    "clutter":          (0.3,          0.6,           1.0),
    "background_speed": (0.01,         0.03,          0.05),
    "background_spin":  (0.0,          0.002,         0.004),
    "occluders":        (0,            0,             1),
    "lighting":         (0.0,          0.1,           0.35),
    "noise":            (2.0,          6.0,           14.0),
}  # fmt: skip

DIFFICULTIES: dict[str, Difficulty] = {
    level: Difficulty(**{name: values[column] for name, values in _TABLE.items()})
    for column, level in enumerate(("easy", "medium", "hard"))
}
"""The published levels of the benchmark."""

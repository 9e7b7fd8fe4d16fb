"""What a synthetic video shows: the random choice of objects, paths and looks.

Lengths are in units of the frame's shorter side and times in frames, so that a scene does not depend on resolution.
All randomness comes from `Generator.random`, and all arithmetic is exactly defined (see `synthetic_shapes`).

Shape letters: T frames.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from m2f_video.data.synthetic_difficulty import Difficulty
from m2f_video.data.synthetic_shapes import SHAPES, cosine, sine

Color = tuple[float, float, float]
"""RGB in [0, 1]."""

Pattern = Literal["plain", "blotches", "stripes", "checks", "dots", "rings"]
PATTERNS: tuple[Pattern, ...] = ("plain", "blotches", "stripes", "checks", "dots", "rings")
_GROUNDS: tuple[Pattern, ...] = ("blotches", "stripes", "checks")  # no dots or rings: they look like classes

_ATTEMPTS = 20  # at a path on which an object is seen often enough
_WELL_INSIDE = 0.7  # of a nearer object's radius: a centre closer to its centre than this counts as hidden


@dataclass(frozen=True, kw_only=True)
class Look:
    """A texture: which pattern, in which colours.

    Attributes:
        pattern: name of the pattern.
        colors: the two the pattern alternates between.
        periods: of the pattern across the texture.
        seed: of the pattern's random parts.
    """

    pattern: Pattern
    colors: tuple[Color, Color]
    periods: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneObject:
    """One object, as it would be seen with nothing in front of it.

    Attributes:
        shape: index of its class in `SHAPES`.
        look: its texture, which moves with it.
        x: of the centre, float64 (T,), in shorter sides from the frame's left.
        y: of the centre, float64 (T,), in shorter sides from the frame's top.
        base_radius: the geometric mean of the first and the last radius, in shorter sides.
        radius: float64 (T,), in shorter sides.
        turns: orientation, float64 (T,), clockwise in full turns.
    """

    shape: int
    look: Look
    x: np.ndarray
    y: np.ndarray
    base_radius: float
    radius: np.ndarray
    turns: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Strip:
    """An unlabelled strip of scenery in front of all objects.

    Attributes:
        look: its texture.
        turns: direction of its normal, in full turns.
        offset: of its middle line from the frame's centre along the normal, float64 (T,), in shorter sides.
        half_width: in shorter sides.
    """

    look: Look
    turns: float
    offset: np.ndarray
    half_width: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """Everything a video shows.

    Attributes:
        objects: nearest first.
        strips: in front of the objects.
        background: its texture.
        background_x: how far the background has moved to the right, float64 (T,), in shorter sides.
        background_y: how far it has moved down, float64 (T,), in shorter sides.
        background_turns: its rotation about the frame's centre, float64 (T,), in full turns.
        light: brightness of each frame, float64 (T,), around 1.
        noise: as `Difficulty.noise`.
    """

    objects: tuple[SceneObject, ...]
    strips: tuple[Strip, ...]
    background: Look
    background_x: np.ndarray
    background_y: np.ndarray
    background_turns: np.ndarray
    light: np.ndarray
    noise: float


def sample_scene(random: np.random.Generator, difficulty: Difficulty, num_frames: int, aspect: float) -> Scene:
    """Draw a scene.

    Args:
        random: the only source of randomness.
        difficulty: what to draw from.
        num_frames: T.
        aspect: width of the frame over its height.
    """
    size = (max(aspect, 1.0), max(1 / aspect, 1.0))
    times = np.arange(num_frames, dtype=np.float64)
    background = _background(random, difficulty)
    direction, speed = random.random(), random.random() * difficulty.background_speed
    start = random.random(2) * 8
    spin = _between(random, -difficulty.background_spin, difficulty.background_spin)
    background_turns = random.random() + spin * times
    light = _light(random, difficulty, times)
    strips = tuple(_strip(random, difficulty, times, size) for _ in range(difficulty.occluders))
    objects: list[SceneObject] = []
    low, high = difficulty.num_objects
    for _ in range(low + _index(random, high - low + 1)):
        candidate = _object(random, difficulty, times, size, objects, background)
        if candidate is not None:
            objects.append(candidate)
    return Scene(
        objects=tuple(objects),
        strips=strips,
        background=background,
        background_x=start[0] + cosine(direction) * speed * times,
        background_y=start[1] + sine(direction) * speed * times,
        background_turns=background_turns,
        light=light,
        noise=difficulty.noise,
    )


def _object(
    random: np.random.Generator,
    difficulty: Difficulty,
    times: np.ndarray,
    size: tuple[float, float],
    nearer: list[SceneObject],
    background: Look,
) -> SceneObject | None:
    """An object behind the nearer ones that is seen often enough, None where no attempt gave one."""
    model = nearer[_index(random, len(nearer))] if nearer and random.random() < difficulty.lookalike else None
    if model is None:
        shape, look = _index(random, len(SHAPES)), _object_look(random, difficulty, background)
        radius = _between(random, *difficulty.radius)
    else:
        shape, look = model.shape, model.look
        radius = model.base_radius * _between(random, 0.9, 1.1)
    crosses = random.random() < difficulty.crossing
    for _ in range(_ATTEMPTS):
        x, y = _path(random, difficulty, times, size, radius, crosses)
        candidate = SceneObject(
            shape=shape,
            look=look,
            x=x,
            y=y,
            base_radius=radius,
            radius=_growth(random, difficulty, times, radius),
            turns=random.random() + _between(random, -difficulty.spin, difficulty.spin) * times,
        )
        if _num_frames_seen(candidate, nearer, size) >= max(difficulty.seen * len(times), 1):
            return candidate
    return None


def _growth(random: np.random.Generator, difficulty: Difficulty, times: np.ndarray, radius: float) -> np.ndarray:
    """Radii that grow or shrink steadily; the given one is the geometric mean of the first and the last."""
    ratio = _between(random, 1.0, difficulty.zoom)
    first, last = radius / sqrt(ratio), radius * sqrt(ratio)
    if random.random() < 0.5:
        first, last = last, first
    return first + (last - first) * times / max(len(times) - 1, 1)


def _path(
    random: np.random.Generator,
    difficulty: Difficulty,
    times: np.ndarray,
    size: tuple[float, float],
    radius: float,
    crosses: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Centres over time: a line with a wave on it, reflected inside the frame, or outside it where it crosses."""
    slowest, fastest = difficulty.speed
    starts = [_between(random, 0.15, 0.85) * side for side in size]
    if crosses:  # straight through a border in the middle of the video, fast enough to get to the other side
        axis = _index(random, 2)
        starts[axis] = size[axis] * _index(random, 2)
        heading = axis / 4 + _index(random, 2) / 2 + _between(random, -0.12, 0.12)
        speed = _between(random, (slowest + fastest) / 2, fastest)
    else:
        heading = random.random()
        speed = _between(random, slowest, fastest)
    wave, phase = random.random() * 2 * speed, random.random()
    along = speed * (times - _between(random, 0.25, 0.75) * (len(times) - 1))
    across = wave * sine(times / 16 + phase)
    # a stay wholly outside takes an object's radius and then some; one that stays in may lose a part of its rim
    margin = 1.2 * radius * difficulty.zoom if crosses else -0.8 * radius
    x = starts[0] + cosine(heading) * along - sine(heading) * across
    y = starts[1] + sine(heading) * along + cosine(heading) * across
    return _reflect(x, -margin, size[0] + margin), _reflect(y, -margin, size[1] + margin)


def _reflect(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """Positions on a line that bounces off both ends of [low, high]; the middle of it where that is empty."""
    if high <= low:
        return np.full_like(position, (low + high) / 2)
    length = high - low
    phase = (position - low) / (2 * length)
    phase = phase - np.floor(phase)
    return low + 2 * length * np.minimum(phase, 1 - phase)


def _num_frames_seen(candidate: SceneObject, nearer: list[SceneObject], size: tuple[float, float]) -> int:
    """Frames in which the centre is in the frame and not well inside the circle around a nearer object."""
    x, y = candidate.x, candidate.y
    seen = (x > 0) & (x < size[0]) & (y > 0) & (y < size[1])
    for other in nearer:
        dx, dy, reach = x - other.x, y - other.y, _WELL_INSIDE * other.radius
        seen &= dx * dx + dy * dy > reach * reach
    return int(seen.sum())


def _strip(random: np.random.Generator, difficulty: Difficulty, times: np.ndarray, size: tuple[float, float]) -> Strip:
    speed = _between(random, -difficulty.background_speed, difficulty.background_speed)
    reach = 0.35 * min(size)
    middle = _between(random, -reach, reach) + speed * (times - (len(times) - 1) / 2)
    return Strip(
        look=_background(random, difficulty),
        turns=_between(random, -0.1, 0.1),  # of the normal: strips are roughly upright
        offset=middle,
        half_width=_between(random, 0.05, 0.09),
    )


def _light(random: np.random.Generator, difficulty: Difficulty, times: np.ndarray) -> np.ndarray:
    """Brightness that swells and fades, at most once in 24 frames."""
    depth, phase, rate = random.random() * difficulty.lighting, random.random(), random.random() / 24
    return 1 + depth * sine(phase + rate * times)


def _background(random: np.random.Generator, difficulty: Difficulty) -> Look:
    """Two dull colours that lie apart by the clutter."""
    base = _hsv(random.random(), 0.5 * random.random(), _between(random, 0.25, 0.8))
    other = _hsv(random.random(), 0.6 * random.random(), _between(random, 0.15, 0.95))
    return Look(
        pattern=_GROUNDS[_index(random, len(_GROUNDS))],
        colors=(base, _mix(base, other, difficulty.clutter)),
        periods=4 + _index(random, 8),
        seed=_index(random, 1 << 32),
    )


def _object_look(random: np.random.Generator, difficulty: Difficulty, background: Look) -> Look:
    """A vivid colour far from the background's and a second one, both drawn towards it by the camouflage."""
    average = _mix(*background.colors, 0.5)
    vivid = [_hsv(random.random(), _between(random, 0.55, 1), _between(random, 0.4, 1)) for _ in range(4)]
    base = max(vivid, key=lambda color: _distance(color, average))
    accent = _hsv(random.random(), _between(random, 0.1, 1), _between(random, 0.15, 1))
    hidden = background.colors[_index(random, 2)]
    return Look(
        pattern=PATTERNS[_index(random, len(PATTERNS))],
        colors=(
            _mix(base, hidden, difficulty.camouflage),
            _mix(_mix(base, accent, 0.7), hidden, difficulty.camouflage),
        ),
        periods=2 + _index(random, 4),
        seed=_index(random, 1 << 32),
    )


def _between(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(random.random())


def _index(random: np.random.Generator, count: int) -> int:
    """One of 0 ... count - 1, by way of `random`, whose numbers NumPy has not changed, unlike those of `integers`."""
    return min(int(random.random() * count), count - 1)


def _mix(a: Color, b: Color, share: float) -> Color:
    """Colour a with this share of b in it."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def _distance(a: Color, b: Color) -> float:
    return abs(a[0] - b[0]) + abs(a[1] - b[1]) + abs(a[2] - b[2])


def _hsv(hue: float, saturation: float, value: float) -> Color:
    """RGB of a hue in [0, 1), a saturation and a value."""

    def channel(n: int) -> float:
        k = (n + hue * 6) % 6
        return value - value * saturation * max(0.0, min(k, 4 - k, 1.0))

    return channel(5), channel(3), channel(1)

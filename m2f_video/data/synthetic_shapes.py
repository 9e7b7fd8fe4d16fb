"""The shape classes of the synthetic benchmark, as signed distances to polygons.

Every shape is drawn in its own coordinates: x to the right, y down, its farthest point at distance 1 from the origin.
Only additions, multiplications, divisions, square roots and comparisons are used, which IEEE 754 defines to the last
bit: the sine and cosine of the C library and of SIMD units differ from machine to machine.

Shape letters: G side of a table, V vertices.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

TABLE_EXTENT = 1.25
"""Distance tables cover [-TABLE_EXTENT, TABLE_EXTENT] on both axes."""

_TABLE_SIDE = 161
_PI = 3.141592653589793
_ROUND = 64  # corners of the polygon that stands for a circle

Loop = np.ndarray
"""A closed polygon, float64 (V, 2) of x and y."""


def sine(turns: float | np.ndarray) -> np.ndarray:
    """sin(2 pi turns) to within 1e-12, the same bits on every machine.

    Args:
        turns: angle in full turns; an array of any shape, or a number.

    Returns:
        float64 of the same shape.
    """
    turns = np.asarray(turns, np.float64)
    turns = turns - np.floor(turns + 0.5)  # in [-1/2, 1/2)
    turns = np.where(turns > 0.25, 0.5 - turns, np.where(turns < -0.25, -0.5 - turns, turns))
    x = 2 * _PI * turns
    square = x * x
    series = np.ones_like(x)
    for n in range(17, 1, -2):  # Taylor's series in Horner's form: 1 - x^2/(2*3) (1 - x^2/(4*5) (...))
        series = 1 - square / (n * (n - 1)) * series
    return x * series


def cosine(turns: float | np.ndarray) -> np.ndarray:
    """cos(2 pi turns); see `sine`."""
    return sine(np.asarray(turns, np.float64) + 0.25)


@cache
def distance_table(shape: str) -> np.ndarray:
    """Signed distances to the outline of a shape on a regular grid: negative inside. Shared: do not write into it.

    Args:
        shape: one of `SHAPES`.

    Returns:
        float32 (G, G), rows along y, covering `TABLE_EXTENT`.

    Raises:
        ValueError: no such shape.
    """
    if shape not in _OUTLINES:
        raise ValueError(f"unknown shape {shape!r}; shapes: {', '.join(SHAPES)}")
    ticks = (np.arange(_TABLE_SIDE) / (_TABLE_SIDE - 1) * 2 - 1) * TABLE_EXTENT
    table = _signed_distance(_OUTLINES[shape](), ticks[None, :], ticks[:, None]).astype(np.float32)
    table.flags.writeable = False
    return table


def _loop(*corners: tuple[float, float]) -> Loop:
    """A polygon scaled so that its farthest corner lies at distance 1."""
    points = np.array(corners, np.float64)
    return points / np.sqrt((points[:, 0] ** 2 + points[:, 1] ** 2).max())


def _circle(radius: float, corners: int = _ROUND, start: float = 0.0) -> Loop:
    """A regular polygon, clockwise; its first corner is up, or `start` turns on from there."""
    turns = np.arange(corners) / corners + start
    return np.stack((radius * sine(turns), -radius * cosine(turns)), 1)


def _bar(half_height: float) -> Loop:
    return _loop((-1, -half_height), (1, -half_height), (1, half_height), (-1, half_height))


def _star() -> Loop:
    tips, notches = _circle(1.0, corners=5), _circle(0.42, corners=5, start=0.1)
    return np.stack((tips, notches), 1).reshape(-1, 2)  # (5, 2, 2) -> (10, 2)


def _cross() -> Loop:
    a = 0.36
    quarter = [(a, -1), (a, -a), (1, -a)]  # then turned about the origin, three times
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return _loop(*corners)


def _arrow() -> Loop:
    half = [(0.0, -1.0), (0.75, -0.1), (0.28, -0.1), (0.28, 1.0)]
    return _loop(*half, *((-x, y) for x, y in reversed(half[1:])))


def _crescent() -> Loop:
    """A disc less another one that covers its right side, moved to the middle of its bounding box."""
    shift, radius = 0.55, 0.8  # of the disc that is taken away
    x = (1 - radius * radius + shift * shift) / (2 * shift)  # where the circles meet
    disc = _circle(1.0, 2 * _ROUND, 0.25)
    hole = _circle(radius, 2 * _ROUND, 0.25) + np.array([shift, 0])
    outer = disc[disc[:, 0] < x]  # from the bottom over the left to the top
    inner = hole[hole[:, 0] < x][::-1]  # and back
    y = np.sqrt(1 - x * x)
    points = np.concatenate(([[x, y]], outer, [[x, -y]], inner))
    points = points - ((points[:, 0].max() + points[:, 0].min()) / 2, 0)
    return _loop(*points)


def _heart() -> Loop:
    """Two half circles on a wedge."""
    lobe = 0.5
    turns = np.arange(_ROUND // 2 + 1) / _ROUND - 0.25  # over the top, from left to right
    right = np.stack((lobe + lobe * sine(turns), -lobe * cosine(turns)), 1)
    bulge = [(0.98, 0.2), (0.85, 0.45)]
    half = [*map(tuple, right), *bulge, (0.0, 1.3)]
    points = np.array([*half, *((-x, y) for x, y in reversed(half[1:-1]))])
    points = points - (0, (points[:, 1].max() + points[:, 1].min()) / 2)
    return _loop(*points)


def _signed_distance(loops: list[Loop], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of every point to the nearest edge of the loops, negated inside; x (1, G) and y (G, 1) give (G, G)."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf)
    inside = np.zeros(nearest.shape, bool)
    for loop in loops:
        for (ax, ay), (bx, by) in zip(loop, np.concatenate((loop[1:], loop[:1])), strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            dx, dy = x - ax - along * ex, y - ay - along * ey
            nearest = np.minimum(nearest, dx * dx + dy * dy)
            if ay != by:  # a ray to the right crosses this edge
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / (by - ay) * ex)
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


_OUTLINES: dict[str, Callable[[], list[Loop]]] = {
    "disc": lambda: [_circle(1.0)],
    "square": lambda: [_bar(1.0)],
    "triangle": lambda: [_circle(1.0, corners=3)],
    "star": lambda: [_star()],
    "ring": lambda: [_circle(1.0), _circle(0.52)],
    "cross": lambda: [_cross()],
    "crescent": lambda: [_crescent()],
    "heart": lambda: [_heart()],
    "arrow": lambda: [_arrow()],
    "bar": lambda: [_bar(0.26)],
}
"""The loops of each shape; its inside is where an odd number of them wind around."""

SHAPES: tuple[str, ...] = tuple(_OUTLINES)
"""Class names of the benchmark, in the order of their class indices."""

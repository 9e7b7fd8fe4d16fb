"""Pixels of a synthetic scene: textures, anti-aliased objects in depth order, and the exact masks of what is seen.

A pixel belongs to the nearest thing that covers its centre, so masks do not overlap and hold visible parts only.
Colours are blended over one pixel across outlines, half of it inside. See `synthetic_shapes` on which arithmetic is
allowed here.

Shape letters: H height, W width, S side of a texture, N objects.
"""

import numpy as np

from m2f_video.data.synthetic_scene import Look, Scene, SceneObject, Strip
from m2f_video.data.synthetic_shapes import SHAPES, TABLE_EXTENT, cosine, distance_table, sine

_BACKGROUND_SIDE, _BACKGROUND_SPAN = 384, 2.4  # pixels, and shorter sides of the frame, of one tile
_OBJECT_SIDE = 96
_RIM, _RIM_SHADE = 0.16, 0.35  # width in radii and depth of the darker rim
_SLOPE_SHADE = 0.15  # brighter at the upper left, darker at the lower right


class Renderer:
    """Renders the frames of one scene, each alone.

    Args:
        scene: what to show.
        height: of the frames, in pixels.
        width: of the frames, in pixels.
    """

    def __init__(self, scene: Scene, height: int, width: int) -> None:
        self._scene = scene
        self._side = min(height, width)  # pixels in the unit of length
        self._x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(self._side)
        self._y = ((np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(self._side))[:, None]
        half = np.float32(0.5 / self._side)
        self._from_center = self._x - width * half, self._y - height * half  # (W,) and (H, 1)
        self._background = _repeating(texture(scene.background, _BACKGROUND_SIDE))
        self._strips = [_repeating(texture(strip.look, _BACKGROUND_SIDE)) for strip in scene.strips]
        self._objects = [texture(thing.look, _OBJECT_SIDE) for thing in scene.objects]

    def frame(self, index: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One frame and the masks of what is seen of its objects.

        Args:
            index: number of the frame.
            random: of the noise of this frame.

        Returns:
            uint8 RGB (H, W, 3), and bool (N, H, W) in the order of the scene's objects.
        """
        scene = self._scene
        image = self._paint_background(index)
        owner = np.full(image.shape[:2], -1, np.int16)
        for number in reversed(range(len(scene.objects))):  # the nearest is painted last
            self._paint_object(image, owner, number, index)
        for strip, pattern in zip(scene.strips, self._strips, strict=True):
            self._paint_strip(image, owner, strip, pattern, index)
        image *= np.float32(255 * scene.light[index])
        if scene.noise:
            image += (random.random(image.shape, np.float32) * np.float32(2) - np.float32(1)) * np.float32(scene.noise)
        masks = owner == np.arange(len(scene.objects), dtype=np.int16)[:, None, None]
        return np.clip(np.rint(image), 0, 255).astype(np.uint8), masks

    def _paint_background(self, index: int) -> np.ndarray:
        """The texture, repeated without seams, turned about the frame's centre and moved; float32 (H, W, 3)."""
        scene = self._scene
        cos, sin = _rotation(scene.background_turns[index])
        x, y = self._from_center
        u = (cos * x + sin * y - np.float32(scene.background_x[index])) / np.float32(_BACKGROUND_SPAN)
        v = (cos * y - sin * x - np.float32(scene.background_y[index])) / np.float32(_BACKGROUND_SPAN)
        return _sample_repeated(self._background, u, v)

    def _paint_object(self, image: np.ndarray, owner: np.ndarray, number: int, index: int) -> None:
        """Blend an object into the image and take over the pixels it covers."""
        thing = self._scene.objects[number]
        window = self._window(thing, index)
        if window is None:
            return
        radius = np.float32(thing.radius[index])
        x = (self._x[window[1]] - np.float32(thing.x[index])) / radius
        y = (self._y[window[0]] - np.float32(thing.y[index])) / radius
        cos, sin = _rotation(thing.turns[index])
        u, v = cos * x + sin * y, cos * y - sin * x  # in the shape's own coordinates
        distance = _sample_table(distance_table(SHAPES[thing.shape])[..., None], u, v)[..., 0]
        alpha = _coverage(distance * radius * np.float32(self._side))
        rim = np.clip(1 + distance / np.float32(_RIM), 0, 1)
        shade = (1 - np.float32(_RIM_SHADE) * rim * rim) * (1 - np.float32(_SLOPE_SHADE) * (x + y))
        colors = _sample_table(self._objects[number], u, v) * shade[..., None]
        image[window] += (colors - image[window]) * alpha[..., None]
        owner[window][distance <= 0] = number

    def _paint_strip(self, image: np.ndarray, owner: np.ndarray, strip: Strip, pattern: np.ndarray, index: int) -> None:
        cos, sin = _rotation(strip.turns)
        x, y = self._from_center
        across = cos * x + sin * y - np.float32(strip.offset[index])
        distance = np.abs(across) - np.float32(strip.half_width)
        inside = distance * self._side < 1
        rows = np.broadcast_to(cos * y - sin * x, distance.shape)[inside]
        colors = _sample_repeated(pattern, across[inside], rows)
        shade = 1 - np.float32(0.3) * np.abs(across[inside]) / np.float32(strip.half_width)  # round, like a trunk
        alpha = _coverage(distance[inside] * np.float32(self._side))
        image[inside] += (colors * shade[..., None] - image[inside]) * alpha[..., None]
        owner[distance <= 0] = -1

    def _window(self, thing: SceneObject, index: int) -> tuple[slice, slice] | None:
        """Rows and columns that an object and its blended outline may touch, None where it is out of the frame."""
        reach = thing.radius[index] + 2 / self._side
        ranges = []
        for center, count in ((thing.y[index], len(self._y)), (thing.x[index], len(self._x))):
            start = max(int(np.floor((center - reach) * self._side)), 0)
            stop = min(int(np.ceil((center + reach) * self._side)), count)
            if start >= stop:
                return None
            ranges.append(slice(start, stop))
        return ranges[0], ranges[1]


def texture(look: Look, side: int) -> np.ndarray:
    """A square texture that repeats without seams.

    Args:
        look: pattern and colours.
        side: S, in pixels.

    Returns:
        float32 RGB (S, S, 3) in [0, 1].
    """
    random = np.random.Generator(np.random.PCG64(look.seed))
    fine = _noise(random, side, 4 * look.periods) * 0.6 + _noise(random, side, 16 * look.periods) * 0.4
    share = _pattern(look, random, side)
    share = np.clip(share * 0.8 + fine * 0.3 - 0.05, 0, 1)[..., None]
    a, b = np.array(look.colors)
    return ((a + (b - a) * share) * (0.85 + 0.3 * fine[..., None])).clip(0, 1).astype(np.float32, order="C")


def _pattern(look: Look, random: np.random.Generator, side: int) -> np.ndarray:
    """How much of the second colour there is, (S, S) in [0, 1]."""
    ticks = (np.arange(side) + 0.5) / side * look.periods
    x, y = ticks[None, :], ticks[:, None]
    if look.pattern == "plain":
        return np.zeros((side, side))
    if look.pattern == "blotches":
        return _step(_noise(random, side, look.periods) * 0.7 + _noise(random, side, 2 * look.periods) * 0.3 - 0.5, 0.1)
    warp = 0.35 * (_noise(random, side, look.periods) - 0.5)
    if look.pattern == "stripes":
        return _step(_triangle(x + warp + 0 * y), 0.12)
    if look.pattern == "checks":
        return _step(_triangle(x + warp) * _triangle(y + warp) * 4, 0.12)
    dx, dy = (x - np.floor(x)) - 0.5, (y - np.floor(y)) - 0.5
    if look.pattern == "dots":
        return _step(0.3 - np.sqrt(dx * dx + dy * dy), 0.08)
    cx, cy = x - look.periods / 2, y - look.periods / 2
    return _step(_triangle(2 * np.sqrt(cx * cx + cy * cy)), 0.12)  # rings


def _triangle(phase: np.ndarray) -> np.ndarray:
    """A wave of period 1 between -1/2 and 1/2 made of straight lines."""
    return 2 * np.abs(phase - np.floor(phase) - 0.5) - 0.5


def _step(value: np.ndarray, width: float) -> np.ndarray:
    """0 below -width, 1 above width, smooth between."""
    t = np.clip(value / (2 * width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _noise(random: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Value noise (S, S) in [0, 1]: random numbers on a grid of cells that wraps around, smoothly interpolated."""
    grid = random.random((cells, cells))
    position = np.arange(side) / side * cells
    first = np.floor(position).astype(np.int64)
    t = position - first
    t = t * t * (3 - 2 * t)
    second = (first + 1) % cells
    rows = grid[first] + (grid[second] - grid[first]) * t[:, None]  # (S, cells)
    return rows[:, first] + (rows[:, second] - rows[:, first]) * t


def _rotation(turns: float) -> tuple[np.float32, np.float32]:
    return np.float32(cosine(np.float64(turns))), np.float32(sine(np.float64(turns)))


def _coverage(pixels: np.ndarray) -> np.ndarray:
    """How much of a pixel is covered by something whose outline is this many pixels from its centre."""
    return np.clip(np.float32(0.5) - pixels, 0, 1)


def _repeating(tile: np.ndarray) -> np.ndarray:
    """A tile with its first two rows and columns at its end once more: whatever is sampled has a neighbour there."""
    return np.pad(tile, ((0, 2), (0, 2), (0, 0)), "wrap")


def _sample_table(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bilinear samples of a table (S, S, C) over [-TABLE_EXTENT, TABLE_EXTENT], clamped; (..., C)."""
    last = table.shape[0] - 1
    scale = np.float32(last / (2 * TABLE_EXTENT))
    x, y = (np.clip((place + np.float32(TABLE_EXTENT)) * scale, 0, last) for place in (u, v))
    return _bilinear(table, x, y)


def _sample_repeated(tile: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bilinear samples of a tile that covers [0, 1) and repeats, as `_repeating` gives it; (..., C)."""
    side = np.float32(tile.shape[0] - 2)
    return _bilinear(tile, (u - np.floor(u)) * side, (v - np.floor(v)) * side)


def _bilinear(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Samples of a table (S, S, C) at x and y in [0, S - 1]; (..., C)."""
    side = table.shape[0]
    x0, y0 = (np.minimum(place.astype(np.int32), side - 2) for place in (x, y))
    x_part, y_part = ((place - first.astype(np.float32))[..., None] for place, first in ((x, x0), (y, y0)))
    flat = table.reshape(-1, table.shape[2])  # (S * S, C)
    corner = y0 * side + x0
    top, bottom = flat.take(corner, 0), flat.take(corner + side, 0)
    top += (flat.take(corner + 1, 0) - top) * x_part
    bottom += (flat.take(corner + side + 1, 0) - bottom) * x_part
    top += (bottom - top) * y_part
    return top

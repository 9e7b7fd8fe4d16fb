"""Colours that stay apart, also for eyes without one kind of cones: any 30 tracks that follow each other.

Distances are those of OKLab (Ottosson, "A perceptual color space for image processing", 2020), times 100: about 2 is
what an eye just tells apart. What eyes without long or medium cones see is simulated as by Vienot, Brettel and Mollon
("Digital video colourmaps for checking the legibility of displays by dichromats", 1999): the response that is missing
is told from the other two, so that white and blue look as they are.

Shape letters: N colours.
"""

import numpy as np

PALETTE = bytes.fromhex(
    "3cb4ff960000f0ff002d00e1ff7800b400c3ffe1ff00696900e196a578966969fff069d2b46900ff0f4b7800a5"
    "e1c30fffa5d2d2f0b4b4a5697800ffa5d2ff0f965a1e69c3b4006978ff69a569d2874b3cffa578874b9669a5b4"
    "87a5ffb40f00f0ff0f1e0fe1ff6900b400d25affff0f69694bd2a5c378875a69ffff5ad2b4690ff02d5a690fa5"
    "e1c300f0a5d2e1f0b4b4a578780fff96d2ff3c965a0f69c33c4b7869ff5ab469f0784b4bffa569785a9678a5b4"
)
"""sRGB: what `derive_palette` gives for 60, written down so that it is the same on every machine."""

_APART = 30  # tracks in a row
_FIRST = 10  # colours that stay as far apart as they begin
_LIGHTNESS, _LEAST_CHROMA = (42, 96), 5  # neither black, white nor grey, which videos are full of
_START = (60, 180, 255)
_NORMAL = 2.0  # how much further apart than for the other eyes, which tell fewer colours apart
_LEVELS, _SWEEPS = 18, 2

_RGB_TO_CONES = np.array(  # OKLab's
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_CONES_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_XYZ_TO_LMS = np.array([[0.4002, 0.7076, -0.0808], [-0.2263, 1.1653, 0.0457], [0, 0, 0.9182]])  # Hunt, Pointer, Estevez


def palette() -> np.ndarray:
    """uint8 RGB (N, 3)."""
    return np.frombuffer(PALETTE, np.uint8).reshape(-1, 3)


def seen_colors(rgb: np.ndarray) -> dict[str, np.ndarray]:
    """OKLab, times 100, of sRGB colours (N, 3) from 0 to 255, as three kinds of eyes see them, by their name."""
    share = np.asarray(rgb, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    views = {"normal": np.eye(3), "protanopia": _without_cones(0), "deuteranopia": _without_cones(1)}
    return {name: _lab(np.clip(linear @ view.T, 0, 1)) for name, view in views.items()}


def derive_palette(count: int) -> np.ndarray:
    """Choose colours from a grid: each as far as can be from those around it, then each moved away from its neighbours.

    Neighbours are at most 29 places before or behind, the last colour being before the first.

    Returns:
        uint8 RGB (count, 3).
    """
    levels = np.linspace(0, 255, _LEVELS).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    light, a, b = seen_colors(grid)["normal"].T
    grid = grid[(light >= _LIGHTNESS[0]) & (light <= _LIGHTNESS[1]) & (np.hypot(a, b) >= _LEAST_CHROMA)]
    chosen = [int(np.abs(grid - _START).sum(1).argmin())]
    space = [lab / (_NORMAL if name == "normal" else 1) for name, lab in seen_colors(grid).items()]
    far = [_distances(space, chosen[0])]  # of each colour of the grid, by place
    for place in range(1, count):
        chosen.append(_farthest(far, chosen, place, count))
        far.append(_distances(space, chosen[-1]))
    for place in list(range(_FIRST, count)) * _SWEEPS:
        chosen[place] = _farthest(far, chosen, place, count)
        far[place] = _distances(space, chosen[place])
    return grid[chosen].astype(np.uint8)


def _farthest(far: list[np.ndarray], chosen: list[int], place: int, count: int) -> int:
    """The colour of the grid, not yet taken by another place, that is farthest from the neighbours of this one."""
    others = [other for other in range(len(chosen)) if other != place]
    near = [other for other in others if min(abs(other - place), count - abs(other - place)) < _APART]
    distance = np.min([far[other] for other in near], 0)
    distance[[chosen[other] for other in others]] = -1
    return int(distance.round(4).argmax())  # rounded, so that the last bits of a machine decide nothing


def _distances(space: list[np.ndarray], index: int) -> np.ndarray:
    """From one colour to all, for the eyes that tell them apart the least."""
    return np.min([np.linalg.norm(lab - lab[index], axis=1) for lab in space], 0)


def _lab(linear: np.ndarray) -> np.ndarray:
    return 100 * np.cbrt(linear @ _RGB_TO_CONES.T) @ _CONES_TO_LAB.T


def _without_cones(missing: int) -> np.ndarray:
    """What turns linear RGB into that which eyes without long (0) or medium (1) cones see."""
    to_lms = _XYZ_TO_LMS @ _RGB_TO_XYZ
    others = [cone for cone in range(3) if cone != missing]
    white, blue = to_lms.sum(1), to_lms[:, 2]
    told = np.eye(3)
    told[missing] = 0
    told[missing, others] = np.linalg.solve(np.array([white[others], blue[others]]), [white[missing], blue[missing]])
    return np.linalg.inv(to_lms) @ told @ to_lms

"""What a model looked at to segment a frame, and drawings of it.

Maps come at the size of the model's levels; they cover the model's input, of which the frame is the upper left part.

H W height and width of the frame, h w those of a map, N points.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LARGEST_SIDE = 640
"""Of a drawing, in pixels."""

Size = tuple[int, int]
_RAMP = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)  # dark to light
_LEVEL_COLORS = np.array([(255, 90, 90), (90, 220, 120), (100, 170, 255), (255, 210, 80)], np.uint8)


@dataclass(frozen=True)
class LayerLook:
    """What one query saw in one layer of the transformer decoder, in the frame.

    Attributes:
        layer: its number.
        mask_logits: (h, w), of the query before the layer; None where there were none.
        attended: (h, w) bool, where the query might attend; None where no mask said so.
        weights: (h, w), what the cross-attention weighed the frame's pixels with, the mean of its heads; None where it
            is not to be had.
        share: of all its weight in the clip, what fell on this frame; None as well.
    """

    layer: int
    mask_logits: np.ndarray | None
    attended: np.ndarray | None
    weights: np.ndarray | None
    share: float | None


@dataclass(frozen=True)
class QueryLook:
    """A query: what it found, and how it got there.

    Attributes:
        query: its number.
        label: the likeliest class.
        score: of this class.
        mask_logits: (h, w), the final ones.
        layers: those looked at.
    """

    query: int
    label: str
    score: float
    mask_logits: np.ndarray
    layers: tuple[LayerLook, ...]


@dataclass(frozen=True)
class SamplingLook:
    """Where one layer of the pixel decoder sampled the levels for one pixel.

    Attributes:
        layer: its number.
        locations: (N, 2) as (x, y), 0 and 1 being the outer edges of the model's input.
        weights: (N,).
        levels: (N,), numbers of the levels, the coarsest first.
    """

    layer: int
    locations: np.ndarray
    weights: np.ndarray
    levels: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """Of one frame.

    Attributes:
        frame: uint8 RGB (H, W, 3).
        number: of the frame in the source.
        clip: numbers of the frames that were decoded with it, itself included.
        covered: share of the model's input that the frame covers, of its height and of its width.
        point: (x, y), the pixel whose sampling is shown.
        strides: of the levels that were sampled, the coarsest first.
        sampling: by layer; empty where the pixel decoder does not sample.
        queries: those looked at.
    """

    frame: np.ndarray
    number: int
    clip: tuple[int, ...]
    covered: tuple[float, float]
    point: tuple[int, int]
    strides: tuple[int, ...]
    sampling: tuple[SamplingLook, ...]
    queries: tuple[QueryLook, ...]


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
        name: of a file, without its ending.
        group: what it belongs to, such as a query.
        title: what it shows.
        image: uint8 RGB.
    """

    name: str
    group: str
    title: str
    image: np.ndarray


def count_pictures(inspection: Inspection) -> int:
    """How many `draw_inspection` gives."""
    looks = [look for query in inspection.queries for look in query.layers]
    shown = [part for look in looks for part in (look.mask_logits, look.attended, look.weights) if part is not None]
    return len(inspection.sampling) + len(inspection.queries) + len(shown)


def draw_inspection(inspection: Inspection) -> Iterator[Picture]:
    """All drawings of a frame: sampling layer by layer, then query by query and layer by layer."""
    frame, covered = _small(inspection.frame), inspection.covered
    scale = frame.shape[0] / inspection.frame.shape[0]
    for look in inspection.sampling:
        image = draw_samples(frame, look, covered, (inspection.point[0] * scale, inspection.point[1] * scale))
        yield Picture(f"sampling_layer_{look.layer}", "Sampling", f"pixel decoder, layer {look.layer}", image)
    for query in inspection.queries:
        group, name = f"Query {query.query}: {query.label}, {query.score:.3f}", f"query_{query.query}"
        yield Picture(f"{name}_mask", group, "final mask", draw_mask(frame, query.mask_logits, covered))
        for seen in query.layers:
            which, title = f"{name}_layer_{seen.layer}", f"layer {seen.layer}: "
            if seen.mask_logits is not None:
                image = draw_mask(frame, seen.mask_logits, covered)
                yield Picture(f"{which}_mask_logits", group, f"{title}mask before it", image)
            if seen.attended is not None:
                image = draw_attended(frame, seen.attended, covered)
                yield Picture(f"{which}_attention_mask", group, f"{title}may attend here", image)
            if seen.weights is not None:
                image = draw_weights(frame, seen.weights, covered)
                told = "" if seen.share is None else f", {100 * seen.share:.0f} % in this frame"
                yield Picture(f"{which}_attention_weights", group, f"{title}attends here{told}", image)


def draw_mask(frame: np.ndarray, logits: np.ndarray, covered: tuple[float, float]) -> np.ndarray:
    """The frame, dark where mask logits (h, w) say it is not covered, with their zero drawn as a line."""
    logits = _on_frame(logits, covered, frame.shape[:2])
    with np.errstate(over="ignore"):
        probability = 1 / (1 + np.exp(-logits))
    return _outlined(frame * (0.25 + 0.75 * probability[..., None]), logits > 0)


def draw_attended(frame: np.ndarray, attended: np.ndarray, covered: tuple[float, float]) -> np.ndarray:
    """The frame where attention was allowed, (h, w) bool; the rest is dark. The level's pixels stay seen as squares."""
    allowed = _on_frame(attended, covered, frame.shape[:2], smooth=False) > 0.5
    return _outlined(np.where(allowed[..., None], frame, frame * 0.2), allowed)


def draw_weights(frame: np.ndarray, weights: np.ndarray, covered: tuple[float, float]) -> np.ndarray:
    """The frame in grey under the heat of weights (h, w): light yellow is the largest, black nothing."""
    weights = np.sqrt(np.maximum(_on_frame(weights, covered, frame.shape[:2]), 0) / max(float(weights.max()), 1e-30))
    position = weights.clip(0, 1) * (len(_RAMP) - 1)
    low = np.minimum(position.astype(int), len(_RAMP) - 2)
    part = (position - low)[..., None]
    heat = _RAMP[low] * (1 - part) + _RAMP[low + 1] * part
    grey = frame.mean(-1, keepdims=True)
    return _pixels(0.45 * grey + 0.8 * heat)


def draw_samples(
    frame: np.ndarray, look: SamplingLook, covered: tuple[float, float], point: tuple[float, float]
) -> np.ndarray:
    """The frame with a cross at a point (x, y), and a dot at each sample: its colour the level, its area the weight."""
    from PIL import Image, ImageDraw

    height, width = frame.shape[:2]
    canvas = Image.fromarray(_pixels(frame * 0.6))
    draw = ImageDraw.Draw(canvas)
    largest = max(float(look.weights.max()), 1e-30)
    for index in np.argsort(-look.weights):  # small ones on top
        x, y = (float(at) / part for at, part in zip(look.locations[index], covered[::-1], strict=True))
        radius = 1 + 0.012 * max(height, width) * float(look.weights[index] / largest) ** 0.5
        color = tuple(_LEVEL_COLORS[look.levels[index] % len(_LEVEL_COLORS)].tolist())
        draw.circle((x * width, y * height), radius, fill=color, outline=(0, 0, 0))
    x, y = point
    arm = 0.02 * max(height, width)
    for ink, thickness in (((0, 0, 0), 4), ((255, 255, 255), 2)):
        draw.line((x - arm, y, x + arm, y), fill=ink, width=thickness)
        draw.line((x, y - arm, x, y + arm), fill=ink, width=thickness)
    return np.array(canvas)


def level_color(level: int) -> str:
    """Of the dots of a level, as CSS has it."""
    return "#{:02x}{:02x}{:02x}".format(*_LEVEL_COLORS[level % len(_LEVEL_COLORS)].tolist())


def _small(frame: np.ndarray) -> np.ndarray:
    """The frame, no side of it larger than `LARGEST_SIDE`."""
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return np.array(image)


def _on_frame(
    values: np.ndarray, covered: tuple[float, float], size: tuple[int, ...], smooth: bool = True
) -> np.ndarray:
    """A map (h, w) of the model's input, at the size of the frame that covers a part of it."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    part = (0.0, 0.0, image.width * covered[1], image.height * covered[0])
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.array(image.resize((size[1], size[0]), how, box=part))


def _outlined(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The image with a bright line along the inner edge of an area."""
    edge = np.zeros(inside.shape, bool)
    edge[:, 1:] |= inside[:, 1:] & ~inside[:, :-1]
    edge[:, :-1] |= inside[:, :-1] & ~inside[:, 1:]
    edge[1:] |= inside[1:] & ~inside[:-1]
    edge[:-1] |= inside[:-1] & ~inside[1:]
    return _pixels(np.where(edge[..., None], np.array((255, 230, 60)), image))


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.asarray(image).clip(0, 255).astype(np.uint8)

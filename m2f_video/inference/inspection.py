"""Look at how a model segments a frame: what was sampled, where queries might attend and where they did.

T frames of a clip, Q queries, S keys, N tokens, M heads, L levels, P points, h w height and width of a map.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2f_video.acceleration import accelerated
from m2f_video.inference.postprocess import select_top_k
from m2f_video.inference.processor import VideoProcessor
from m2f_video.modeling.taps import Taps, tap_names
from m2f_video.modeling.transformer_decoder import SCALES
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former, VideoMask2FormerOutput
from m2f_video.results.inspection import Inspection, LayerLook, QueryLook, SamplingLook

DECODER, LAYERS = "transformer_decoder.layers.", "pixel_decoder.layers."
_OF_CROSS_ATTENTION = ("mask_logits", "cross_attn.attention_mask", "cross_attn.attention_weights")
_OF_SAMPLING = ("self_attn.sampling_locations", "self_attn.sampling_weights")


@torch.inference_mode()
def inspect_frame(
    model: VideoMask2Former,
    frames: Any,
    position: int = 0,
    *,
    first: int = 0,
    queries: Sequence[int] = (),
    top_k: int = 3,
    layers: Sequence[int] = (),
    point: tuple[int, int] | None = None,
    processor: VideoProcessor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Decode a clip, and see what the model does to segment one of its frames.

    Args:
        model: on any device, in any mode; it is as it was afterwards.
        frames: the clip, uint8 RGB (T, H, W, 3). The weights of cross-attention take most of the memory: 4 M Q S bytes
            a layer, for 480x864 21 MB a frame at stride 8.
        position: of the frame in the clip.
        first: number of the clip's first frame in its source.
        queries: which; the `top_k` of the highest score where there are none.
        top_k: how many.
        layers: of the transformer decoder; all where there are none.
        point: (x, y) of the pixel whose sampling is shown; None takes one that the first query's mask covers.
        processor: other preprocessing than the model's own.
        progress: called with (frames encoded, frames in all).

    Raises:
        ValueError: frames that are no video, or a position, query, layer or point that there is not.
    """
    processor = processor or VideoProcessor.from_config(model.config)
    count, decoder = len(frames), model.config.transformer_decoder
    _check_choice("position", [position], count)
    _check_choice("query", queries, decoder.num_queries)
    _check_choice("layer", layers, decoder.num_layers)
    if not 1 <= top_k <= decoder.num_queries:
        raise ValueError(f"top_k must be from 1 to {decoder.num_queries}, the number of queries, got {top_k}")
    if model.config.temporal == "per_frame":
        frames, first, position, count = frames[position : position + 1], first + position, 0, 1
    frame = np.asarray(frames[position])
    height, width = frame.shape[:2]
    if point is not None:
        _check_choice("x of the point", point[:1], width)
        _check_choice("y of the point", point[1:], height)
    layers = sorted(set(layers)) or range(decoder.num_layers)
    with model.capture(*_names(model, layers), device="cpu") as taps, accelerated(model) as running:
        parts: list[FrameFeatures] = []
        for index in range(count):
            pixels = processor.process_frames(frames[index : index + 1]).to(running.device)
            parts.append(running.encode_frames(pixels))
            if progress is not None:
                progress(index + 1, count)
        features = FrameFeatures.concatenate(parts)
        output = running.decode_clip(features, output_masks=False)
        found = _ranked(output)
        chosen = (
            [found[query] for query in dict.fromkeys(queries)]
            if queries
            else sorted(found, key=lambda row: -row[1])[:top_k]
        )
        embeddings = output.mask_embeddings[:, [query for query, _, _ in chosen]]
        masks = running.mask_product(embeddings, features.mask_features[None, position : position + 1])[0, :, 0]
        final = masks.float().cpu().numpy()

    padded, resized = processor.padded_size(height, width), processor.resized_size(height, width)
    covered = (resized[0] / padded[0], resized[1] / padded[1])
    place = _place(final[0], covered, (height, width)) if point is None else point
    sizes = [(level.shape[-2], level.shape[-1]) for level in features.multi_scale]

    def seen(query: int) -> tuple[LayerLook, ...]:
        used = (_used_sizes(model, sizes, layer) for layer in layers)
        return tuple(_layer(taps, *where, query, position, count) for where in zip(layers, used, strict=True))

    return Inspection(
        frame=frame,
        number=first + position,
        clip=tuple(range(first, first + count)),
        covered=covered,
        point=place,
        strides=tuple(round(padded[0] / size[0]) for size in sizes),
        sampling=_sampling(taps, position, _token(place, (height, width), covered, sizes)),
        queries=tuple(
            QueryLook(query, model.config.labels[label], score, logits, seen(query))
            for logits, (query, score, label) in zip(final, chosen, strict=True)
        ),
    )


def _check_choice(what: str, numbers: Sequence[int], count: int) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"there is no {what} {number}; there are 0 to {count - 1}")


def _names(model: VideoMask2Former, layers: Sequence[int]) -> list[str]:
    """What there is to capture of what is drawn; other parts of a model have less of it."""
    wanted = [f"{DECODER}{layer}.{name}" for layer in layers for name in _OF_CROSS_ATTENTION]
    known = tap_names(model)
    sampled = [name for name in known if name.startswith(LAYERS) and name.endswith(_OF_SAMPLING)]
    return [name for name in wanted if name in known] + sampled or ["transformer_decoder"]


def _ranked(output: VideoMask2FormerOutput) -> list[tuple[int, float, int]]:
    """Of each query its number, its best class's score, and this class."""
    logits = output.class_queries_logits[0]
    pairs = zip(*(part.tolist() for part in select_top_k(logits, logits[:, 1:].numel())), strict=True)
    best: dict[int, tuple[int, float, int]] = {}
    for score, label, query in pairs:
        best.setdefault(query, (query, score, label))
    return [best[query] for query in range(len(logits))]


def _used_sizes(model: VideoMask2Former, sizes: Sequence[tuple[int, int]], layer: int) -> list[tuple[int, int]]:
    """Sizes of the levels that a layer attends to."""
    decoder = model.transformer_decoder
    used = [size for size, scale in zip(sizes, SCALES, strict=True) if scale in decoder.scales]
    return used if decoder.concatenates else [used[layer % len(used)]]


def _layer(
    taps: Taps, layer: int, sizes: Sequence[tuple[int, int]], query: int, position: int, count: int
) -> LayerLook:
    def keys(name: str) -> np.ndarray | None:
        """Of a query, what it has of all keys, (T, N); the mean of heads."""
        found = [call for call in _calls(taps, f"{DECODER}{layer}.{name}") if call is not None]
        if not found or found[-1].shape[-1] != count * sum(h * w for h, w in sizes):
            return None
        rows = found[-1][0, ..., query, :]
        row = rows if rows.ndim == 1 else rows.any(0) if rows.dtype == torch.bool else rows.mean(0)
        return (row if row.dtype == torch.bool else row.float()).view(count, -1).numpy()

    def of_frame(values: np.ndarray | None) -> np.ndarray | None:
        """In the frame, at the finest of the levels, which comes last."""
        height, width = sizes[-1]
        return None if values is None else values[position, -height * width :].reshape(height, width)

    logits, mask, weights = (keys(name) for name in _OF_CROSS_ATTENTION)
    share = None if weights is None else float(weights[position].sum() / weights.sum())
    attended = None if mask is None or mask.dtype != np.bool_ else mask  # others are added to products
    return LayerLook(layer, of_frame(logits), of_frame(attended), of_frame(weights), share)


def _calls(taps: Taps, name: str) -> tuple[Any, ...]:
    return taps.calls(name) if name in taps else ()


def _sampling(taps: Taps, position: int, token: int) -> tuple[SamplingLook, ...]:
    looks = []
    for name in taps:
        if not name.endswith(_OF_SAMPLING[0]):
            continue
        weights_name = name.replace("sampling_locations", "sampling_weights")
        for locations, weights in zip(taps.calls(name), _calls(taps, weights_name), strict=True):
            where: Tensor = locations[position, token].float()  # (M, L, P, 2)
            levels = torch.arange(where.shape[1])[:, None].expand(where.shape[:3])
            shown = where.flatten(0, 2), weights[position, token].float().flatten(), levels.flatten()
            number = int(name.removeprefix(LAYERS).split(".")[0])
            looks.append(SamplingLook(number, *(part.numpy() for part in shown)))
    return tuple(looks)


def _place(logits: np.ndarray, covered: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """The pixel (x, y) of a frame where mask logits (h, w) are largest."""
    inside = logits[: ceil(logits.shape[0] * covered[0]), : ceil(logits.shape[1] * covered[1])]
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    y = (row + 0.5) / logits.shape[0] / covered[0] * size[0]
    x = (column + 0.5) / logits.shape[1] / covered[1] * size[1]
    return min(int(x), size[1] - 1), min(int(y), size[0] - 1)


def _token(
    point: tuple[int, int], size: tuple[int, int], covered: tuple[float, float], sizes: Sequence[tuple[int, int]]
) -> int:
    """The token of the finest level, which comes last, at a pixel (x, y) of a frame."""
    height, width = sizes[-1]
    column = int((point[0] + 0.5) / size[1] * covered[1] * width)
    row = int((point[1] + 0.5) / size[0] * covered[0] * height)
    return sum(h * w for h, w in sizes[:-1]) + row * width + column

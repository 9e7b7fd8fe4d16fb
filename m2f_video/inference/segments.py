"""What video and image post-processing share: checked outputs, class probabilities, panoptic segments.

Shape letters: B batch, Q queries, K classes, N selected queries, T frames, h w size of the mask logits.
"""

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # (height, width) in pixels
Sizes = Sequence[Size] | Tensor | np.ndarray

MASK_STRIDE = 4  # pixels of the model's input per mask logit
CHUNK_PIXELS = 2**24
"""Of resized maps alive at a time, where a single one has no more: 64 MiB in float32."""


class Geometry(NamedTuple):
    """The sizes that masks pass through: the model's input, the frames in it before padding, the result."""

    padded: Size
    resized: Size
    target: Size


class SegmentationOutputs(Protocol):
    """What post-processing reads from a model's outputs."""

    @property
    def class_queries_logits(self) -> Tensor:
        """(B, Q, K+1); the last class is no-object."""

    @property
    def masks_queries_logits(self) -> Tensor:
        """(B, Q, T, h, w) for clips; (B, Q, h, w) or T=1 for images."""


def check_outputs(outputs: SegmentationOutputs) -> tuple[Tensor, Tensor]:
    """Class logits (B, Q, K+1) and mask logits (B, Q, ...) of a model's outputs, detached.

    Raises:
        ValueError: one of them is missing, empty or of a wrong shape.
    """
    for name in ("class_queries_logits", "masks_queries_logits"):
        if not isinstance(getattr(outputs, name, None), Tensor):
            raise ValueError(
                f"the outputs ({type(outputs).__name__}) have no tensor {name}; pass what the model returned"
            )
    class_logits, mask_logits = outputs.class_queries_logits, outputs.masks_queries_logits
    shapes = f"class_queries_logits {tuple(class_logits.shape)}, masks_queries_logits {tuple(mask_logits.shape)}"
    if class_logits.ndim != 3 or class_logits.shape[2] < 2 or mask_logits.ndim not in (4, 5):
        raise ValueError(
            f"expected logits (B, Q, K+1) with K >= 1 and masks (B, Q, T, h, w) or (B, Q, h, w), got {shapes}"
        )
    if class_logits.shape[:2] != mask_logits.shape[:2]:
        raise ValueError(f"class and mask logits differ in batch or queries: {shapes}; pass one model call's outputs")
    if 0 in class_logits.shape or 0 in mask_logits.shape:
        raise ValueError(f"the outputs are empty: {shapes}")
    return class_logits.detach(), mask_logits.detach()


def check_sizes(name: str, sizes: Sizes, count: int) -> list[Size]:
    """One (height, width) of positive integers per item.

    Raises:
        ValueError: another shape or value; the message names the argument.
    """
    try:
        array = np.asarray([list(size) for size in sizes], dtype=np.float64)
    except (TypeError, ValueError):  # a size that is a number, sizes of different lengths, or text
        array = np.empty(0)
    if array.shape != (count, 2) or not np.all((array > 0) & (array < np.inf) & (array == np.floor(array))):
        raise ValueError(
            f"{name} must hold one (height, width) of positive integers for each of {count} item(s), "
            f"such as [(720, 1280)] for one; got {sizes!r}"
        )
    return [(int(height), int(width)) for height, width in array]


def check_geometry(padded: Size, resized: Size, target: Size) -> Geometry:
    """The three sizes; ValueError where the resized one is larger than the model's input that should hold it."""
    if resized[0] > padded[0] or resized[1] > padded[1]:
        raise ValueError(
            f"resized size {resized} does not fit the padded size {padded} of the model's input; "
            "pass as resized_sizes the (height, width) the frames had before padding"
        )
    return Geometry(padded, resized, target)


def geometries(
    mask_logits: Tensor, target_sizes: Sizes | None, resized_sizes: Sizes | None, default: Size | None = None
) -> list[Geometry]:
    """The sizes of each item of mask logits (B, ..., h, w).

    Args:
        mask_logits: of a batch.
        target_sizes: (H, W) of each result; None takes `default`, or the resized size where that is None.
        resized_sizes: (height, width) of each item in the model's input, without its padding; None: no padding.
        default: (H, W) of a result without a target size.

    Raises:
        ValueError: there is not one size per item, or it does not fit.
    """
    B, (h, w) = len(mask_logits), mask_logits.shape[-2:]
    padded = (MASK_STRIDE * h, MASK_STRIDE * w)
    resized = [padded] * B if resized_sizes is None else check_sizes("resized_sizes", resized_sizes, B)
    targets = resized if default is None else [default] * B
    if target_sizes is not None:
        targets = check_sizes("target_sizes", target_sizes, B)
    return [check_geometry(padded, *sizes) for sizes in zip(resized, targets, strict=True)]


def check_thresholds(**thresholds: float) -> None:
    """Raise ValueError unless each is in [0, 1]; the message has its keyword."""
    for name, value in thresholds.items():
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r:.30}")


def check_count(name: str, value: int, most: int = 2**31 - 1) -> None:
    """Raise ValueError unless it is a whole number from 1 to `most`; the message has the name."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r:.30}")


def check_finite(mask_logits: Tensor) -> None:
    """Raise ValueError where a mask logit is NaN or infinite: interpolation would spread it."""
    if not mask_logits.isfinite().all():
        raise ValueError("mask logits hold NaN or infinite values; check the model's weights and input")


def bilinear(maps: Tensor, size: Size) -> Tensor:
    """Resize (C, h, w) or (B, C, h, w) to float32 of that size, pixel centres aligned, without antialiasing."""
    batch = maps.float() if maps.ndim == 4 else maps.float()[None]
    resized = F.interpolate(batch, size=size, mode="bilinear", align_corners=False)
    return resized if maps.ndim == 4 else resized[0]


def chunks(count: int, pixels: int) -> Iterator[slice]:
    """Slices that cover `count` maps of so many pixels, each of at most `CHUNK_PIXELS` or of a single map."""
    step = max(1, CHUNK_PIXELS // pixels)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def keep_largest(best: Tensor, owner: Tensor, maps: Tensor, first: int) -> None:
    """Where one of the maps (N, ...) exceeds `best` (...), put its value there and its index into `owner` (...).

    Chunk by chunk this gives the argmax of all maps, the first of equals, if both begin as zeros and no map is
    negative. `first` is the index of this chunk's first map.
    """
    largest, index = maps.max(0)
    better = largest > best
    owner.copy_(torch.where(better, index + first, owner))
    best.copy_(torch.where(better, largest, best))


def class_probabilities(class_logits: Tensor) -> Tensor:
    """Softmax over (Q, K+1) in float32, no-object among the classes.

    Raises:
        ValueError: the probabilities are NaN because the logits hold NaN or +inf.
    """
    probabilities = class_logits.float().softmax(-1)
    if probabilities.isnan().any():
        raise ValueError("class logits hold NaN or infinite values; check the model's weights and input")
    return probabilities


def confident_queries(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of (Q, K+1) whose best class is an object above the threshold: scores, labels, indices, each (N,)."""
    scores, labels = class_probabilities(class_logits).max(-1)
    queries = ((labels < class_logits.shape[1] - 1) & (scores > threshold)).nonzero().flatten()
    return scores[queries], labels[queries], queries


def panoptic_segments(
    maps: Iterable[tuple[tuple[slice, slice], Tensor]],
    scores: Tensor,
    labels: Tensor,
    *,
    shape: tuple[int, ...],
    num_classes: int,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    label_ids_to_fuse: AbstractSet[int] | None,
    distinct_ids: bool,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Give each pixel to the query with the largest score times mask probability, and number the queries from 1.

    Args:
        maps: slices of the queries and frames with their mask probabilities (n, t, H, W), which are overwritten; those
            of all queries follow each other for each slice of frames.
        scores: (N,).
        labels: (N,) class indices.
        shape: (T, H, W).
        num_classes: K.
        mask_threshold: a query's own mask is where score times probability reaches this.
        overlap_mask_area_threshold: a query stays if it owns a larger part of its mask than this.
        label_ids_to_fuse: classes whose queries share one id, none by default.
        distinct_ids: a new segment's id follows the largest so far; otherwise the last used one, which may be taken.

    Returns:
        Ids (T, H, W), int32, 0 for pixels of dropped queries; and a row per query that stays.

    Raises:
        ValueError: a class to fuse is none.
    """
    fuse = frozenset(label_ids_to_fuse or ())
    if unknown := sorted(fuse - set(range(num_classes))):
        raise ValueError(f"label_ids_to_fuse has {unknown[0]}; the classes are 0 to {num_classes - 1}")
    owner = torch.zeros(shape, dtype=torch.int64, device=scores.device)  # stays zeros where N = 0
    mask_areas = torch.zeros_like(labels)  # of each query's own mask
    for (queries, frames), probs in maps:
        weighted = probs.mul_(scores[queries].view(-1, 1, 1, 1))
        if queries.start == 0:
            best = weighted.new_zeros(weighted.shape[1:])
        keep_largest(best, owner[frames], weighted, queries.start)
        mask_areas[queries] += (weighted >= mask_threshold).flatten(1).sum(1)
    owned_areas = owner.flatten().bincount(minlength=len(scores))[: len(scores)]  # (N,)
    # a float32 quotient held against a double, as transformers does: 4/5 counts as above 0.8
    owned_part = (owned_areas.float() / mask_areas.float()).double()
    stays = (owned_areas > 0) & (mask_areas > 0) & (owned_part > overlap_mask_area_threshold)
    ids = torch.zeros(len(scores) + 1, dtype=torch.int32)  # one more, so that N = 0 maps every pixel to 0
    segments: list[dict[str, Any]] = []
    fused_ids: dict[int, int] = {}
    last_id = 0
    for index in stays.nonzero().flatten().tolist():
        label = int(labels[index])
        segment_id = fused_ids.get(label, last_id + 1)
        last_id = max(last_id, segment_id) if distinct_ids else segment_id
        if label in fuse:
            fused_ids[label] = segment_id
        ids[index] = segment_id
        segments.append(segment_row(segment_id, label, label in fuse, float(scores[index])))
    return ids.to(owner.device)[owner], segments


def segment_row(segment_id: int, label: int, was_fused: bool, score: float) -> dict[str, Any]:
    """An entry of `segments_info` as transformers has it, the score rounded to 6 digits."""
    return {"id": segment_id, "label_id": label, "was_fused": was_fused, "score": round(score, 6)}

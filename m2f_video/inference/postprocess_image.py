"""Image post-processing with the results of transformers' `Mask2FormerImageProcessor` (5.23) on the same logits.

For checkpoints of the image model, and for users who come from there: same arguments, same defaults, same maps. Its
quirks are kept, each where it is, but for one: padding, of `fit="pad"` and of the smaller images of a batch, is cropped
where `resized_sizes` tells of it. The arithmetic is float32 whatever the logits' type.

Shape letters: B batch, Q queries, K classes, N selected queries, h w size of the mask logits, H W size of the result.
"""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_video.inference.segments import (
    MASK_STRIDE,
    SegmentationOutputs,
    Size,
    Sizes,
    bilinear,
    check_finite,
    check_fuse,
    check_outputs,
    check_sizes,
    check_thresholds,
    check_within,
    chunks,
    class_probabilities,
    confident_queries,
    keep_largest,
    panoptic_map,
    segment_row,
)

__all__ = [
    "SemanticSegmentation",
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
    "post_process_semantic_segmentation",
]

_MASK_SIZE = (384, 384)  # transformers resizes every image's masks to this first, whatever its aspect


class SemanticSegmentation(NamedTuple):
    """A label map with the scores it was chosen from."""

    segmentation: Tensor
    """(H, W) int64 class indices."""
    segmentation_scores: Tensor
    """(K, H, W) float32."""


def post_process_semantic_segmentation(
    outputs: SegmentationOutputs,
    target_sizes: Sizes | None = None,
    return_segmentation_scores: bool = False,
    resized_sizes: Sizes | None = None,
) -> list[Tensor] | list[SemanticSegmentation]:
    """The class of every pixel of each image, as transformers computes it.

    Args:
        outputs: the model's outputs for B images.
        target_sizes: (H, W) of each result; None leaves 384 x 384.
        return_segmentation_scores: also return the scores the classes were chosen from.
        resized_sizes: (height, width) of each image in the model's input, before padding, which is cropped; None for
            images that fill it. transformers takes every image for one that does.

    Returns:
        Per image (H, W) int64 class indices, or a `SemanticSegmentation` with the scores.

    Raises:
        ValueError: outputs or sizes of the wrong shape, or NaN.
    """
    results: list[Any] = []
    for class_logits, mask_logits, target in _images(outputs, target_sizes, resized_sizes):
        class_probs = class_probabilities(class_logits)[:, :-1]
        scores = torch.einsum("qk,qhw->khw", class_probs, mask_logits.sigmoid())
        size = target or _MASK_SIZE
        resized = scores.new_empty((len(scores), *size)) if return_segmentation_scores else None
        segmentation, best = torch.zeros(size, dtype=torch.int64, device=scores.device), scores.new_zeros(size)
        for classes in chunks(len(scores), size[0] * size[1]):
            part = scores[classes] if target is None else bilinear(scores[classes], target)
            keep_largest(best, segmentation, part, classes.start)
            if resized is not None:
                resized[classes] = part
        results.append(segmentation if resized is None else SemanticSegmentation(segmentation, resized))
    return results


def post_process_instance_segmentation(
    outputs: SegmentationOutputs,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Sizes | None = None,
    return_coco_annotation: bool = False,
    return_binary_maps: bool = False,
    resized_sizes: Sizes | None = None,
) -> list[dict[str, Any]]:
    """Object instances of each image, as transformers computes them: score times the mean probability of the mask.

    Args:
        outputs: the model's outputs for B images.
        threshold: instances that score less are left out.
        mask_threshold: taken for the sake of callers of transformers, where it has no effect either.
        overlap_mask_area_threshold: likewise without effect.
        target_sizes: (H, W) of each result; None leaves 384 x 384.
        return_coco_annotation: run lengths instead of a map: one list for each value in it, -1 first where it occurs.
        return_binary_maps: one mask per instance instead of a map; only these can show overlaps.
        resized_sizes: (height, width) of each image in the model's input, before padding, which is cropped; None for
            images that fill it. transformers takes every image for one that does.

    Returns:
        Per image a dict: `segmentation`, (H, W) float32 segment ids from 0 and -1 where there is none (or run lengths
        `[start, length, ...]` over the flattened map, starts from 1; or (N, H, W) float32 masks, the map if N = 0);
        `segments_info`, a list of dicts with `id`, `label_id`, `was_fused` and `score`.

    Raises:
        ValueError: outputs or sizes of the wrong shape, NaN, or both return options.
    """
    check_thresholds(threshold=threshold)
    if return_coco_annotation and return_binary_maps:
        raise ValueError("return_coco_annotation and return_binary_maps exclude each other; set one of them")
    results = []
    for class_logits, mask_logits, target in _images(outputs, target_sizes, resized_sizes):
        Q, K = class_logits.shape[0], class_logits.shape[1] - 1
        # unsorted as in transformers: the order decides the ids and which instance a shared pixel gets
        scores, indices = class_probabilities(class_logits)[:, :-1].flatten().topk(Q, sorted=False)
        selected = mask_logits[indices // K]  # (Q, 384, 384)
        masks = (selected > 0).float()
        inside = (selected.sigmoid().flatten(1) * masks.flatten(1)).sum(1)
        scores = scores * (inside / (masks.flatten(1).sum(1) + 1e-6))
        segmentation = mask_logits.new_full(target or _MASK_SIZE, -1)
        segments: list[dict[str, Any]] = []
        instance_masks = []
        for score, label_id, mask in zip(scores.tolist(), (indices % K).tolist(), masks, strict=True):
            if score < threshold:
                continue
            # One by one: at the size of a large picture all of them take more memory than there is.
            resized = mask if target is None else F.interpolate(mask[None, None], size=target, mode="nearest")[0, 0]
            if resized.any():
                segmentation[resized == 1] = len(segments)
                segments.append(segment_row(len(segments), label_id, False, score))
                if return_binary_maps:
                    instance_masks.append(resized)
        result: Tensor | list[list[int]] = segmentation
        if return_coco_annotation:
            result = [_run_lengths(segmentation == value) for value in segmentation.unique()]
        elif instance_masks:
            result = torch.stack(instance_masks)
        results.append({"segmentation": result, "segments_info": segments})
    return results


def post_process_panoptic_segmentation(
    outputs: SegmentationOutputs,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: AbstractSet[int] | None = None,
    target_sizes: Sizes | None = None,
    resized_sizes: Sizes | None = None,
) -> list[dict[str, Any]]:
    """Segments of each image that do not overlap, as transformers computes them.

    Its numbering is kept too: after a segment joined an earlier one of its class, the next new segment gets the id
    after that earlier one, which another segment may have. The video function numbers without such doubles.

    Args:
        outputs: the model's outputs for B images.
        threshold: queries take part whose best class is an object with a score above this.
        mask_threshold: a query's mask is where score times mask probability reaches this.
        overlap_mask_area_threshold: the part of its mask that a query must own.
        label_ids_to_fuse: classes ("stuff") whose queries become one segment each.
        target_sizes: (H, W) of each result; None leaves 384 x 384.
        resized_sizes: (height, width) of each image in the model's input, before padding, which is cropped; None for
            images that fill it. transformers takes every image for one that does.

    Returns:
        Per image a dict: `segmentation`, (H, W) int32 segment ids from 1, 0 where there is none (float32, all -1, where
        no query takes part); `segments_info`, a list of dicts with `id`, `label_id`, `was_fused` and `score`.

    Raises:
        ValueError: outputs or sizes of the wrong shape, or NaN.
    """
    check_thresholds(
        threshold=threshold,
        mask_threshold=mask_threshold,
        overlap_mask_area_threshold=overlap_mask_area_threshold,
    )
    results: list[dict[str, Any]] = []
    for class_logits, mask_logits, target in _images(outputs, target_sizes, resized_sizes):
        scores, label_ids, queries = confident_queries(class_logits, threshold)
        if not len(queries):
            empty = mask_logits.new_full(target or _MASK_SIZE, -1)
            results.append({"segmentation": empty, "segments_info": []})
            continue
        probs = mask_logits[queries].sigmoid()  # (N, 384, 384)
        size = target or _MASK_SIZE
        owner, best = torch.zeros(size, dtype=torch.int64, device=probs.device), probs.new_zeros(size)
        mask_areas = torch.zeros_like(label_ids)
        for part in chunks(len(probs), size[0] * size[1]):
            resized = probs[part] if target is None else bilinear(probs[part], target)
            weighted = resized * scores[part].view(-1, 1, 1)
            keep_largest(best, owner, weighted, part.start)
            mask_areas[part] = (weighted >= mask_threshold).flatten(1).sum(1)
        segmentation, segments = panoptic_map(
            owner=owner,
            mask_areas=mask_areas,
            scores=scores,
            labels=label_ids,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            label_ids_to_fuse=check_fuse(label_ids_to_fuse, class_logits.shape[1] - 1),
            distinct_ids=False,
        )
        results.append({"segmentation": segmentation, "segments_info": segments})
    return results


def _images(
    outputs: SegmentationOutputs, target_sizes: Sizes | None, resized_sizes: Sizes | None
) -> Iterator[tuple[Tensor, Tensor, Size | None]]:
    """Of each image: class logits (Q, K+1), mask logits (Q, 384, 384) without padding and the target size."""
    class_logits, mask_logits = check_outputs(outputs)
    if mask_logits.ndim == 5:
        if mask_logits.shape[2] != 1:
            raise ValueError(
                f"masks_queries_logits {tuple(mask_logits.shape)} are of clips of {mask_logits.shape[2]} frames; "
                "use the post_process_video_* functions"
            )
        mask_logits = mask_logits[:, :, 0]
    B, (h, w) = len(class_logits), mask_logits.shape[2:]
    padded = (MASK_STRIDE * h, MASK_STRIDE * w)
    resized = [padded] * B if resized_sizes is None else check_sizes("resized_sizes", resized_sizes, B)
    targets = [None] * B if target_sizes is None else check_sizes("target_sizes", target_sizes, B)
    for index, target in enumerate(targets):
        check_within(resized[index], padded)
        check_finite(mask_logits[index])
        yield class_logits[index], _without_padding(mask_logits[index], padded, resized[index]), target


def _without_padding(mask_logits: Tensor, padded: Size, resized: Size) -> Tensor:
    """(Q, h, w) as (Q, 384, 384) of the part that the image fills: all of it in one resize, as transformers does."""
    if resized == padded:
        return bilinear(mask_logits, _MASK_SIZE)
    height, width = resized
    # one query at a time: they are large here
    masks = [bilinear(bilinear(mask[None], padded)[:, :height, :width], _MASK_SIZE) for mask in mask_logits]
    return torch.cat(masks)


def _run_lengths(mask: Tensor) -> list[int]:
    """Start (from 1) and length of each run of true pixels, row by row."""
    pixels = mask.flatten().cpu().numpy().astype(np.int8)
    starts, stops = np.flatnonzero(np.diff(pixels, prepend=0, append=0)).reshape(-1, 2).T
    return np.stack((starts + 1, stops - starts), axis=1).flatten().tolist()

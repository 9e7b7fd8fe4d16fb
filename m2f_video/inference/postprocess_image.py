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

from m2f_video.inference.postprocess import resize_masks
from m2f_video.inference.segments import (
    SegmentationOutputs,
    Size,
    Sizes,
    bilinear,
    check_finite,
    check_outputs,
    check_thresholds,
    chunks,
    class_probabilities,
    confident_queries,
    geometries,
    keep_largest,
    panoptic_segments,
    segment_row,
)

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
            images that fill it, as transformers takes all to do, but `VideoProcessor` computes them from target_sizes.

    Returns:
        Per image (H, W) int64 class indices, or a `SemanticSegmentation` with the scores.

    Raises:
        ValueError: outputs or sizes of the wrong shape, or NaN.
    """
    results: list[Any] = []
    for class_logits, mask_logits, target in _images(outputs, target_sizes, resized_sizes):
        class_probs = class_probabilities(class_logits)[:, :-1]
        scores = torch.einsum("qk,qhw->khw", class_probs, mask_logits.sigmoid())
        resized = scores.new_empty((len(scores), *target)) if return_segmentation_scores else None
        segmentation, best = torch.zeros(target, dtype=torch.int64, device=scores.device), scores.new_zeros(target)
        for classes in chunks(len(scores), target[0] * target[1]):
            part = bilinear(scores[classes], target)
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
            images that fill it, as transformers takes all to do, but `VideoProcessor` computes them from target_sizes.

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
        segmentation = mask_logits.new_full(target, -1)
        segments: list[dict[str, Any]] = []
        instance_masks = []
        for score, label_id, mask in zip(scores.tolist(), (indices % K).tolist(), masks, strict=True):
            if score < threshold:
                continue
            # One by one: at the size of a large picture all of them take more memory than there is.
            resized = F.interpolate(mask[None, None], size=target, mode="nearest")[0, 0]
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
            images that fill it, as transformers takes all to do, but `VideoProcessor` computes them from target_sizes.

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
            results.append({"segmentation": mask_logits.new_full(target, -1), "segments_info": []})
            continue
        probs = mask_logits[queries].sigmoid()  # (N, 384, 384)
        parts = chunks(len(probs), target[0] * target[1])
        maps = (((part, slice(1)), bilinear(probs[part], target)[:, None]) for part in parts)
        segmentation, segments = panoptic_segments(
            maps,
            scores,
            label_ids,
            shape=(1, *target),
            num_classes=class_logits.shape[1] - 1,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            label_ids_to_fuse=label_ids_to_fuse,
            distinct_ids=False,
        )
        results.append({"segmentation": segmentation[0], "segments_info": segments})
    return results


def _images(
    outputs: SegmentationOutputs, target_sizes: Sizes | None, resized_sizes: Sizes | None
) -> Iterator[tuple[Tensor, Tensor, Size]]:
    """Of each image: class logits (Q, K+1), mask logits (Q, 384, 384) without padding and the size of the result."""
    class_logits, mask_logits = check_outputs(outputs)
    if mask_logits.ndim == 5:
        if mask_logits.shape[2] != 1:
            raise ValueError(
                f"masks_queries_logits {tuple(mask_logits.shape)} are of clips of {mask_logits.shape[2]} frames; "
                "use the post_process_video_* functions"
            )
        mask_logits = mask_logits[:, :, 0]
    sizes = geometries(mask_logits, target_sizes, resized_sizes, default=_MASK_SIZE)
    for classes, masks, (padded, resized, target) in zip(class_logits, mask_logits, sizes, strict=True):
        check_finite(masks)
        if resized == padded:
            logits = bilinear(masks, _MASK_SIZE)  # in one resize, as transformers does
        else:
            logits = resize_masks(masks[:, None], padded, resized, _MASK_SIZE)[:, 0]
        yield classes, logits, target


def _run_lengths(mask: Tensor) -> list[int]:
    """Start (from 1) and length of each run of true pixels, row by row."""
    pixels = mask.flatten().cpu().numpy().astype(np.int8)
    starts, stops = np.flatnonzero(np.diff(pixels, prepend=0, append=0)).reshape(-1, 2).T
    return np.stack((starts + 1, stops - starts), axis=1).flatten().tolist()

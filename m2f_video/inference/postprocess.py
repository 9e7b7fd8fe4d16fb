"""From the model's logits to object instances, label maps and panoptic segments of videos.

Mask logits are resized as the original Video Mask2Former does (arXiv 2112.10764, section 3: one query is one object in
all frames). The functions for images are in `postprocess_image`.

Shape letters: B batch, Q queries, K classes, N selected queries, T frames, h w size of the mask logits (1/4 of the
model's input), H W size of the result.
"""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from m2f_video.inference.segments import (
    Geometry,
    SegmentationOutputs,
    Size,
    Sizes,
    bilinear,
    check_finite,
    check_geometry,
    check_outputs,
    check_sizes,
    check_thresholds,
    chunks,
    class_probabilities,
    confident_queries,
    geometries,
    panoptic_segments,
)


def select_top_k(class_logits: Tensor, top_k: int, score_threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The best (query, class) pairs of one video; a query appears once per class that is among the best.

    The score is the softmax probability with no-object among the classes; mask quality does not enter it.

    Args:
        class_logits: (Q, K+1), the last column no-object.
        top_k: how many pairs to keep, at most Q * K.
        score_threshold: pairs that score less are left out.

    Returns:
        Scores (N,) in descending order, labels (N,) in [0, K) and query indices (N,) in [0, Q), N <= top_k.

    Raises:
        ValueError: wrong shape, NaN, or an argument out of its range.
    """
    if class_logits.ndim != 2 or class_logits.shape[0] == 0 or class_logits.shape[1] < 2:
        raise ValueError(f"class logits must be (Q, K+1) with Q, K >= 1, got {tuple(class_logits.shape)}")
    check_thresholds(score_threshold=score_threshold)
    num_queries, num_classes = class_logits.shape[0], class_logits.shape[1] - 1
    if not 1 <= top_k <= num_queries * num_classes:
        raise ValueError(
            f"top_k={top_k} cannot be taken from {num_queries} queries x {num_classes} classes; "
            f"pass a top_k from 1 to {num_queries * num_classes}"
        )
    probabilities = class_probabilities(class_logits)[:, :-1].flatten()  # (Q * K,)
    scores, indices = probabilities.topk(top_k)
    keep = scores >= score_threshold
    scores, indices = scores[keep], indices[keep]
    return scores, indices % num_classes, indices // num_classes


def resize_masks(mask_logits: Tensor, padded_size: Size, resized_size: Size, target_size: Size) -> Tensor:
    """Mask logits at the size of the result: up to the model's input, its padding cropped, then to the target.

    Both resizes are bilinear with align_corners=False and without antialiasing. They are two because that is how the
    published numbers were made; one resize gives other masks. A mask is where the result is > 0.

    Args:
        mask_logits: (N, T, h, w).
        padded_size: (height, width) of the model's input.
        resized_size: (height, width) of the frames in it, before padding.
        target_size: (H, W) of the result.

    Returns:
        (N, T, H, W) float32.

    Raises:
        ValueError: wrong shape, NaN or infinite logits, or a resized_size larger than the padded one.
    """
    if mask_logits.ndim != 4 or 0 in mask_logits.shape[1:]:
        raise ValueError(f"mask logits must be (N, T, h, w) with T, h, w >= 1, got {tuple(mask_logits.shape)}")
    named = {"padded_size": padded_size, "resized_size": resized_size, "target_size": target_size}
    geometry = check_geometry(*(check_sizes(name, [size], 1)[0] for name, size in named.items()))
    resized = mask_logits.new_empty((*mask_logits.shape[:2], *geometry.target), dtype=torch.float32)
    for part, logits in _resized_chunks(mask_logits, geometry):
        resized[part] = logits
    return resized


def post_process_video_instance_segmentation(
    outputs: SegmentationOutputs,
    target_sizes: Sizes | None = None,
    resized_sizes: Sizes | None = None,
    top_k: int = 10,
    score_threshold: float = 0.0,
    labels: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Object instances of each video: the top (query, class) pairs with their masks in every frame.

    Args:
        outputs: the model's outputs for B clips.
        target_sizes: (H, W) of each result; None leaves the resized size.
        resized_sizes: (height, width) of each video in the model's input, without its padding; None: no padding, but
            `VideoProcessor` computes them from target_sizes.
        top_k: (query, class) pairs per video; the original takes 10.
        score_threshold: pairs that score less are left out.
        labels: class names by index; without them a `label` is the class index as text.

    Returns:
        Per video a dict: `masks` (N, T, H, W) bool, where instances may overlap; `scores`, `labels`, `query_indices`
        (N,), best first; `segmentation` (T, H, W) int32, per pixel the index of its best instance or -1; and
        `segments_info`, a list of N dicts with `id` (that index), `label_id`, `label`, `score` and `query_id`.

    Raises:
        ValueError: outputs or an argument of the wrong shape or range, or NaN.
    """
    results = []
    for class_logits, mask_logits, geometry in _videos(outputs, target_sizes, resized_sizes):
        names = _label_names(labels, class_logits.shape[1] - 1)
        scores, label_ids, queries = select_top_k(class_logits, top_k, score_threshold)
        selected = mask_logits[queries]  # (N, T, h, w)
        masks = selected.new_empty((*selected.shape[:2], *geometry.target), dtype=torch.bool)
        for part, logits in _resized_chunks(selected, geometry):
            masks[part] = logits > 0
        segmentation = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)  # (T, H, W)
        for index in reversed(range(len(masks))):
            segmentation[masks[index]] = index
        rows = zip(scores.tolist(), label_ids.tolist(), queries.tolist(), strict=True)
        segments = [
            {"id": index, "label_id": label_id, "label": names[label_id], "score": score, "query_id": query}
            for index, (score, label_id, query) in enumerate(rows)
        ]
        results.append(
            {
                "segmentation": segmentation,
                "segments_info": segments,
                "masks": masks,
                "scores": scores,
                "labels": label_ids,
                "query_indices": queries,
            }
        )
    return results


def post_process_video_semantic_segmentation(
    outputs: SegmentationOutputs,
    target_sizes: Sizes | None = None,
    resized_sizes: Sizes | None = None,
) -> list[Tensor]:
    """The class of every pixel: class probabilities times mask probabilities summed over queries, the largest wins.

    Args:
        outputs: the model's outputs for B clips.
        target_sizes: (H, W) of each result; None leaves the resized size.
        resized_sizes: (height, width) of each video in the model's input, without its padding; None: no padding, but
            `VideoProcessor` computes them from target_sizes.

    Returns:
        Per video (T, H, W) int64 class indices; no-object is not among them.

    Raises:
        ValueError: outputs or an argument of the wrong shape or range, or NaN.
    """
    results = []
    for class_logits, mask_logits, geometry in _videos(outputs, target_sizes, resized_sizes):
        class_probs = class_probabilities(class_logits)[:, :-1]  # (Q, K)
        K, T, (H, W) = class_probs.shape[1], mask_logits.shape[1], geometry.target
        label_map = torch.empty((T, H, W), dtype=torch.int64, device=mask_logits.device)
        for t in range(T):
            scores = class_probs.new_zeros((K, H * W))
            for (queries, _), logits in _resized_chunks(mask_logits[:, t : t + 1], geometry):
                scores.addmm_(class_probs[queries].T, logits.sigmoid_().flatten(1))  # (K, q) x (q, HW)
            label_map[t] = scores.argmax(0).view(H, W)
        results.append(label_map)
    return results


def post_process_video_panoptic_segmentation(
    outputs: SegmentationOutputs,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: AbstractSet[int] | None = None,
    target_sizes: Sizes | None = None,
    resized_sizes: Sizes | None = None,
    labels: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Segments that do not overlap, one id through all frames: the image rule with areas summed over the clip.

    A pixel belongs to the query with the largest score times mask probability. A query whose pixels are too small a
    part of its own mask is dropped, and its pixels belong to nothing.

    Args:
        outputs: the model's outputs for B clips.
        threshold: queries take part whose best class is an object with a score above this.
        mask_threshold: a query's mask is where score times mask probability reaches this.
        overlap_mask_area_threshold: the part of its mask that a query must own, over all frames.
        label_ids_to_fuse: classes ("stuff") whose queries become one segment each.
        target_sizes: (H, W) of each result; None leaves the resized size.
        resized_sizes: (height, width) of each video in the model's input, without its padding; None: no padding, but
            `VideoProcessor` computes them from target_sizes.
        labels: class names by index; without them a `label` is the class index as text.

    Returns:
        Per video a dict: `segmentation` (T, H, W) int32 segment ids from 1, 0 where there is none; `segments_info`, a
        list of dicts with `id`, `label_id`, `label`, `was_fused` and `score`.

    Raises:
        ValueError: outputs or an argument of the wrong shape or range, or NaN.
    """
    check_thresholds(
        threshold=threshold,
        mask_threshold=mask_threshold,
        overlap_mask_area_threshold=overlap_mask_area_threshold,
    )
    results = []
    for class_logits, mask_logits, geometry in _videos(outputs, target_sizes, resized_sizes):
        names = _label_names(labels, class_logits.shape[1] - 1)
        scores, label_ids, queries = confident_queries(class_logits, threshold)
        maps = ((part, logits.sigmoid_()) for part, logits in _resized_chunks(mask_logits[queries], geometry))
        segmentation, segments = panoptic_segments(
            maps,
            scores,
            label_ids,
            shape=(mask_logits.shape[1], *geometry.target),
            num_classes=class_logits.shape[1] - 1,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            label_ids_to_fuse=label_ids_to_fuse,
            distinct_ids=True,
        )
        for segment in segments:
            segment["label"] = names[segment["label_id"]]
        results.append({"segmentation": segmentation, "segments_info": segments})
    return results


def _videos(
    outputs: SegmentationOutputs, target_sizes: Sizes | None, resized_sizes: Sizes | None
) -> Iterator[tuple[Tensor, Tensor, Geometry]]:
    """Of each video: class logits (Q, K+1), mask logits (Q, T, h, w) and its sizes."""
    class_logits, mask_logits = check_outputs(outputs)
    if mask_logits.ndim != 5:
        raise ValueError(
            f"masks_queries_logits must be (B, Q, T, h, w) for clips, got {tuple(mask_logits.shape)}; "
            "for images use post_process_instance_segmentation and its siblings"
        )
    sizes = geometries(mask_logits, target_sizes, resized_sizes)
    yield from zip(class_logits, mask_logits, sizes, strict=True)


def _resized_chunks(mask_logits: Tensor, geometry: Geometry) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Slices of the queries and frames of (N, T, h, w) with their logits (n, t, H, W) at the target size.

    Those of all queries follow each other for each slice of frames; there are none where N = 0.
    """
    N, T = mask_logits.shape[:2]
    if N == 0:
        return
    check_finite(mask_logits)
    pixels = max(height * width for height, width in geometry)
    for frames in chunks(T, N * pixels):
        for queries in chunks(N, (frames.stop - frames.start) * pixels):
            padded = bilinear(mask_logits[queries, frames], geometry.padded)
            cropped = padded[..., : geometry.resized[0], : geometry.resized[1]]
            yield (queries, frames), bilinear(cropped, geometry.target)


def _label_names(labels: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    if labels is None:
        return [str(index) for index in range(num_classes)]
    if len(labels) != num_classes:
        raise ValueError(f"{len(labels)} labels for logits of {num_classes} classes; pass the labels of this model")
    return labels

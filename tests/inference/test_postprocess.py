import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from m2f_video.inference import segments
from m2f_video.inference.postprocess import (
    post_process_video_instance_segmentation,
    post_process_video_panoptic_segmentation,
    post_process_video_semantic_segmentation,
    resize_masks,
    select_top_k,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
VIDEO_FUNCTIONS = (
    post_process_video_instance_segmentation,
    post_process_video_semantic_segmentation,
    post_process_video_panoptic_segmentation,
)


def make_outputs(
    *,
    batch: int = 1,
    queries: int = 6,
    classes: int = 4,
    frames: int = 2,
    size: tuple[int, int] = (8, 12),
    seed: int = 0,
) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        class_queries_logits=torch.randn(batch, queries, classes + 1, generator=generator) * 3,
        masks_queries_logits=torch.randn(batch, queries, frames, *size, generator=generator) * 4,
    )


def assert_same(left: Any, right: Any) -> None:
    """Equal containers of equal tensors, types included."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


# --- golden: the last stage of the original


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_instances_are_those_of_the_original(case: str) -> None:
    golden = load_file(GOLDEN / f"case_{case}.safetensors")
    shapes = json.loads((GOLDEN / "info.json").read_text())["cases"][case]
    raw, padded, target = (tuple(shapes[name]) for name in ("raw_size", "padded_size", "output_size"))
    outputs = SimpleNamespace(
        class_queries_logits=golden["decoder.3.pred_logits"], masks_queries_logits=golden["decoder.3.pred_masks"]
    )
    result = post_process_video_instance_segmentation(outputs, target_sizes=[target], resized_sizes=[raw])[0]

    num_classes = golden["decoder.3.pred_logits"].shape[2] - 1
    flat = result["query_indices"] * num_classes + result["labels"]
    order = golden["final.topk_flat_index"].argsort()
    ours = flat.argsort()
    assert torch.equal(flat[ours], golden["final.topk_flat_index"][order])
    assert torch.equal(result["labels"][ours], golden["final.labels"][order])
    assert torch.equal(result["scores"][ours], golden["final.scores"][order])

    mask_shape = shapes["bool_shapes"]["final.masks"]
    bits = np.unpackbits(golden["final.masks.packed"].numpy(), count=int(np.prod(mask_shape)))
    masks = torch.from_numpy(bits.reshape(mask_shape)).bool()[order]
    logits = resize_masks(outputs.masks_queries_logits[0][result["query_indices"][ours]], padded, raw, target)
    assert torch.equal(logits > 0, result["masks"][ours])
    different = masks != result["masks"][ours]
    assert logits[different].abs().lt(1e-4).all()
    assert different.sum() <= 3

    at_padded = golden["final.mask_logits_at_padded_size"]
    queries = golden["final.query_index"][: len(at_padded)]
    first_resize = resize_masks(outputs.masks_queries_logits[0][queries], padded, padded, padded)
    torch.testing.assert_close(first_resize, at_padded, rtol=0, atol=1e-5)


# --- select_top_k


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000), st.floats(0, 1), st.data())
@settings(deadline=None)
def test_top_k_is_the_best_of_all_pairs(queries: int, classes: int, seed: int, threshold: float, data: Any) -> None:
    top_k = data.draw(st.integers(1, queries * classes))
    logits = torch.randn(queries, classes + 1, generator=torch.Generator().manual_seed(seed))
    scores, labels, indices = select_top_k(logits, top_k, threshold)
    probabilities = logits.softmax(-1)
    pairs = sorted(((probabilities[q, k].item(), k, q) for q in range(queries) for k in range(classes)), reverse=True)
    expected = [pair for pair in pairs[:top_k] if pair[0] >= threshold]
    assert list(zip(scores.tolist(), labels.tolist(), indices.tolist(), strict=True)) == expected


def test_a_query_may_have_several_classes_and_no_object_counts_in_the_score() -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0, 3.0], [0.0, 0.0, 0.0, 9.0]])
    scores, labels, queries = select_top_k(logits, 2)
    assert queries.tolist() == [0, 0]
    assert labels.tolist() == [0, 1]
    assert torch.equal(scores, logits[0].softmax(0)[:2])


def test_score_threshold_is_inclusive() -> None:
    scores = select_top_k(torch.zeros(3, 4), 3, score_threshold=0.25)[0]
    assert scores.tolist() == [0.25] * 3
    assert len(select_top_k(torch.zeros(3, 4), 3, score_threshold=0.2501)[0]) == 0


# --- resize_masks


@pytest.mark.parametrize("chunk_pixels", [1, 10_000, 2**24])
def test_resize_is_two_bilinear_steps_whatever_the_chunks(chunk_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(segments, "CHUNK_PIXELS", chunk_pixels)
    resized = resize_masks(logits, (32, 48), (30, 41), (60, 77))
    exact = F.interpolate(logits.double(), (32, 48), mode="bilinear", align_corners=False)[..., :30, :41]
    exact = F.interpolate(exact, (60, 77), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized.double(), exact, rtol=0, atol=1e-5)
    monkeypatch.undo()
    assert torch.equal(resized, resize_masks(logits, (32, 48), (30, 41), (60, 77)))


@given(
    st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)
)
@settings(max_examples=30, deadline=None)
def test_resize_of_any_shape_treats_every_frame_alone(n: int, frames: int, h: int, w: int, H: int, W: int) -> None:
    logits = torch.randn(n, frames, h, w, generator=torch.Generator().manual_seed(0))
    sizes = ((4 * h, 4 * w), (4 * h - 1, 4 * w - 3), (H, W))
    resized = resize_masks(logits, *sizes)
    assert resized.shape == (n, frames, H, W)
    for t in range(frames):
        torch.testing.assert_close(resize_masks(logits[:, t : t + 1], *sizes), resized[:, t : t + 1])


def test_a_logit_of_zero_is_outside_the_mask() -> None:
    outputs = make_outputs()
    outputs.masks_queries_logits.zero_()
    assert not post_process_video_instance_segmentation(outputs)[0]["masks"].any()


def test_half_precision_logits_are_resized_in_float32() -> None:
    logits = torch.randn(2, 1, 8, 12).bfloat16()
    sizes = ((32, 48), (32, 48), (50, 50))
    assert torch.equal(resize_masks(logits, *sizes), resize_masks(logits.float(), *sizes))


# --- video instances


def test_instance_map_shows_the_best_on_top() -> None:
    outputs = make_outputs(frames=3)
    result = post_process_video_instance_segmentation(outputs, target_sizes=[(20, 31)], top_k=7)[0]
    masks, segmentation = result["masks"], result["segmentation"]
    assert masks.shape == (7, 3, 20, 31)
    assert segmentation.dtype == torch.int32
    assert (result["scores"].diff() <= 0).all()
    first = torch.where(masks.any(0), masks.int().argmax(0).int(), -1)  # argmax gives the first true one
    assert torch.equal(segmentation, first)
    assert [segment["id"] for segment in result["segments_info"]] == list(range(7))
    for segment, score, label, query in zip(
        result["segments_info"], result["scores"], result["labels"], result["query_indices"], strict=True
    ):
        assert (segment["score"], segment["label_id"], segment["query_id"]) == (score, label, query)
        assert segment["label"] == str(segment["label_id"])
    names = ("cat", "dog", "bus", "cow")
    named = post_process_video_instance_segmentation(outputs, top_k=7, labels=names)[0]["segments_info"]
    assert [segment["label"] for segment in named] == [names[label] for label in result["labels"]]


def test_no_instance_above_the_threshold() -> None:
    outputs = make_outputs(frames=3)
    outputs.class_queries_logits[..., :-1] = -20
    result = post_process_video_instance_segmentation(outputs, target_sizes=[(20, 31)], score_threshold=0.5)[0]
    assert result["segments_info"] == []
    assert result["masks"].shape == (0, 3, 20, 31)
    assert torch.equal(result["segmentation"], torch.full((3, 20, 31), -1, dtype=torch.int32))


# --- video semantic and panoptic


@pytest.mark.parametrize("queries", [5, 40])
def test_semantic_map_is_the_argmax_of_the_summed_products(queries: int) -> None:
    outputs = make_outputs(frames=2, queries=queries)
    label_map = post_process_video_semantic_segmentation(outputs, [(21, 33)], [(30, 41)])[0]
    logits = resize_masks(outputs.masks_queries_logits[0], (32, 48), (30, 41), (21, 33)).double()
    class_probs = outputs.class_queries_logits[0].double().softmax(-1)[:, :-1]
    scores = torch.einsum("qk,qthw->kthw", class_probs, logits.sigmoid())
    chosen = scores.gather(0, label_map[None])[0]
    assert label_map.dtype == torch.int64
    assert (scores.max(0).values - chosen).max() < 1e-5  # up to ties


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
def test_panoptic_video_follows_the_image_rule_over_all_frames(seed: int, threshold: float) -> None:
    pytest.importorskip("transformers")
    from transformers.models.mask2former.image_processing_mask2former import compute_segments

    outputs = make_outputs(frames=3, queries=9, size=(2, 3), seed=seed)
    blobs = F.interpolate(outputs.masks_queries_logits[0] * 2, (8, 12), mode="bilinear")
    outputs.masks_queries_logits = blobs[None]
    overlap = (0.1, 0.3, 0.5)[seed % 3]
    result = post_process_video_panoptic_segmentation(
        outputs, threshold, 0.4, overlap, target_sizes=[(20, 31)], resized_sizes=[(30, 41)]
    )[0]
    scores, labels = outputs.class_queries_logits[0].softmax(-1).max(-1)
    keep = (labels != 4) & (scores > threshold)
    logits = resize_masks(outputs.masks_queries_logits[0][keep], (32, 48), (30, 41), (20, 31))
    stacked = logits.sigmoid().flatten(1, 2)  # frames under each other: (N, T * H, W)
    segmentation, segments = compute_segments(stacked, scores[keep], labels[keep], 0.4, overlap, set())
    assert torch.equal(result["segmentation"].flatten(0, 1), segmentation)
    assert [{**segment, "label": str(segment["label_id"])} for segment in segments] == result["segments_info"]
    assert len(segments) > 0


def one_hot_outputs(labels: list[int], num_classes: int = 3) -> SimpleNamespace:
    """Query i has class labels[i] and fills column i of every frame."""
    class_logits = torch.full((1, len(labels), num_classes + 1), -10.0)
    masks = torch.full((1, len(labels), 2, 4, len(labels)), -10.0)
    for query, label in enumerate(labels):
        class_logits[0, query, label] = 10
        masks[0, query, :, :, query] = 10
    return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=masks)


def test_fused_classes_share_an_id_and_no_other_segment_has_it() -> None:
    outputs = one_hot_outputs([0, 1, 0, 2, 1])
    result = post_process_video_panoptic_segmentation(outputs, label_ids_to_fuse={0})[0]
    assert [segment["id"] for segment in result["segments_info"]] == [1, 2, 1, 3, 4]
    assert [segment["was_fused"] for segment in result["segments_info"]] == [True, False, True, False, False]
    centres = result["segmentation"][0, 8, 2::4]
    assert centres.tolist() == [1, 2, 1, 3, 4]


def test_a_query_must_score_above_the_panoptic_threshold() -> None:
    outputs = SimpleNamespace(
        class_queries_logits=torch.tensor([[[0.0, 0.0, -torch.inf]]]),  # score exactly 0.5
        masks_queries_logits=torch.full((1, 1, 1, 4, 4), 10.0),
    )
    options = {"mask_threshold": 0.4}
    assert post_process_video_panoptic_segmentation(outputs, 0.5, **options)[0]["segments_info"] == []
    assert len(post_process_video_panoptic_segmentation(outputs, 0.499, **options)[0]["segments_info"]) == 1


def test_panoptic_video_without_objects_is_all_zero() -> None:
    outputs = one_hot_outputs([3, 3])
    result = post_process_video_panoptic_segmentation(outputs, target_sizes=[(5, 6)])[0]
    assert result["segments_info"] == []
    assert torch.equal(result["segmentation"], torch.zeros(2, 5, 6, dtype=torch.int32))


# --- properties of all video functions


@pytest.mark.parametrize("function", VIDEO_FUNCTIONS)
def test_batch_equals_singles(function: Any) -> None:
    outputs = make_outputs(batch=3)
    targets, resized = [(20, 31), (9, 9), (64, 40)], [(30, 41), (32, 48), (32, 20)]
    batched = function(outputs, target_sizes=targets, resized_sizes=resized)
    for index in range(3):
        alone = SimpleNamespace(**{name: value[index : index + 1] for name, value in vars(outputs).items()})
        single = function(alone, target_sizes=targets[index:][:1], resized_sizes=resized[index:][:1])
        assert_same(batched[index], single[0])


@pytest.mark.parametrize("function", VIDEO_FUNCTIONS)
def test_chunked_equals_whole(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = make_outputs(frames=5)
    whole = function(outputs, target_sizes=[(20, 31)])
    monkeypatch.setattr(segments, "CHUNK_PIXELS", 1)
    assert_same(function(outputs, target_sizes=[(20, 31)]), whole)


@pytest.mark.parametrize("function", VIDEO_FUNCTIONS)
def test_outputs_are_left_as_they_were_and_may_require_grad(function: Any) -> None:
    outputs = make_outputs()
    before = outputs.masks_queries_logits.clone()
    result = function(outputs, target_sizes=torch.tensor([[20, 31]]))
    assert torch.equal(outputs.masks_queries_logits, before)
    outputs.masks_queries_logits.requires_grad_()
    outputs.class_queries_logits.requires_grad_()
    assert_same(function(outputs, target_sizes=np.array([[20, 31]])), result)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4), 10), "top_k from 1 to 9"),
        ((torch.zeros(3, 4), 0), "top_k"),
        ((torch.zeros(1, 3, 4), 1), r"\(Q, K\+1\)"),
        ((torch.zeros(0, 4), 1), r"\(Q, K\+1\)"),
        ((torch.zeros(3, 1), 1), r"\(Q, K\+1\)"),
        ((torch.full((3, 4), torch.nan), 1), "NaN"),
        ((torch.full((3, 4), torch.inf), 1), "NaN"),
        ((torch.zeros(3, 4), 1, 1.5), "score_threshold"),
        ((torch.zeros(3, 4), 1, float("nan")), "score_threshold"),
    ],
)
def test_select_top_k_errors(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_top_k(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8, 8), (32, 32), (32, 32), (9, 9)), r"\(N, T, h, w\)"),
        ((torch.zeros(2, 0, 8, 8), (32, 32), (32, 32), (9, 9)), r"\(N, T, h, w\)"),
        ((torch.zeros(2, 1, 8, 8), (32, 32), (33, 32), (9, 9)), "resized_sizes"),
        ((torch.zeros(2, 1, 8, 8), (32, 32), (32, 32), (0, 9)), "target_size"),
        ((torch.zeros(2, 1, 8, 8), (32,), (32, 32), (9, 9)), "padded_size"),
        ((torch.full((2, 1, 8, 8), torch.nan), (32, 32), (32, 32), (9, 9)), "NaN"),
    ],
)
def test_resize_masks_errors(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_masks(*arguments)


def changed(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(make_outputs()), **changes})


COMMON_ERRORS = [
    ({}, {}, "class_queries_logits"),
    (changed(masks_queries_logits=None), {}, "masks_queries_logits"),
    (changed(class_queries_logits=torch.zeros(6, 5)), {}, r"\(B, Q, K\+1\)"),
    (changed(class_queries_logits=torch.zeros(1, 5, 5)), {}, "batch or queries"),
    (changed(class_queries_logits=torch.full((1, 6, 5), torch.nan)), {}, "class logits hold NaN"),
    (changed(masks_queries_logits=torch.zeros(1, 6, 1, 0, 4)), {}, "empty"),
    (make_outputs(frames=1), {"target_sizes": [(5, 5), (6, 6)]}, "target_sizes"),
]


@pytest.mark.parametrize(("outputs", "arguments", "message"), COMMON_ERRORS)
@pytest.mark.parametrize("function", VIDEO_FUNCTIONS)
def test_errors_of_every_function(function: Any, outputs: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(outputs, **arguments)


@pytest.mark.parametrize("function", VIDEO_FUNCTIONS)
def test_nan_masks(function: Any) -> None:
    outputs = make_outputs(frames=1)
    outputs.class_queries_logits[..., 0] = 20  # every query takes part
    outputs.masks_queries_logits[:, :, :, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="mask logits hold NaN"):
        function(outputs)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (post_process_video_instance_segmentation, {"resized_sizes": [(33, 48)]}, "resized_sizes"),
        (post_process_video_instance_segmentation, {"top_k": 25}, "top_k"),
        (post_process_video_instance_segmentation, {"labels": ("cat",)}, "1 labels"),
        (post_process_video_semantic_segmentation, {"resized_sizes": [(30, 49)]}, "resized_sizes"),
        (post_process_video_panoptic_segmentation, {"resized_sizes": []}, "resized_sizes"),
        (post_process_video_panoptic_segmentation, {"threshold": -1}, "threshold"),
        (post_process_video_panoptic_segmentation, {"mask_threshold": 2}, "mask_threshold"),
        (post_process_video_panoptic_segmentation, {"label_ids_to_fuse": {4}}, "label_ids_to_fuse"),
        (post_process_video_panoptic_segmentation, {"labels": ("cat",)}, "1 labels"),
    ],
)
def test_errors_of_single_arguments(function: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(make_outputs(frames=1), **arguments)


@pytest.mark.parametrize("function", VIDEO_FUNCTIONS)
def test_image_outputs_are_sent_to_the_image_functions(function: Any) -> None:
    outputs = make_outputs(frames=1)
    outputs.masks_queries_logits = outputs.masks_queries_logits[:, :, 0]
    with pytest.raises(ValueError, match="for images use post_process_instance"):
        function(outputs)

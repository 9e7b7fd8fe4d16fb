from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_video.inference import segments
from m2f_video.inference.postprocess_image import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)

IMAGE_FUNCTIONS = (
    post_process_instance_segmentation,
    post_process_semantic_segmentation,
    post_process_panoptic_segmentation,
)


def image_outputs(seed: int, batch: int, size: tuple[int, int], *, sure: bool) -> SimpleNamespace:
    """Blobs rather than noise; `sure` makes confident queries with large masks, otherwise some images stay empty."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.randn(batch, 10, 3, 4, generator=generator) * (8 if sure else 3)
    masks = F.interpolate(blobs, size, mode="bilinear")
    return SimpleNamespace(
        class_queries_logits=torch.randn(batch, 10, 6, generator=generator) * (5 if sure else 1.5),
        masks_queries_logits=masks,
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


IMAGE_CASES = [
    (0, 1, (24, 24), None),
    (1, 2, (24, 36), None),
    (2, 1, (16, 8), [(100, 51)]),
    (3, 3, (24, 40), [(90, 120), (33, 500), (384, 384)]),
    (4, 2, (96, 96), [(700, 300), (64, 64)]),
    (5, 1, (30, 20), [(401, 397)]),
]
IN_TURN = [pytest.param(*case, marks=() if case[0] in (1, 3) else pytest.mark.slow) for case in IMAGE_CASES]
"""For functions with many options; the others take all."""


@pytest.fixture(scope="module")
def reference() -> Any:
    return pytest.importorskip("transformers").Mask2FormerImageProcessor()


@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize(("seed", "batch", "size", "targets"), IN_TURN)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.0},
        {"threshold": 0.9},
        {"threshold": 0.3, "return_coco_annotation": True},
        {"threshold": 0.999, "return_coco_annotation": True},
        {"threshold": 0.3, "return_binary_maps": True},
        {"threshold": 0.999, "return_binary_maps": True},
    ],
)
def test_image_instances_equal_transformers(
    reference: Any, seed: int, batch: int, size: Any, targets: Any, sure: bool, options: Any
) -> None:
    outputs = image_outputs(seed, batch, size, sure=sure)
    expected = reference.post_process_instance_segmentation(outputs, target_sizes=targets, **options)
    assert_same(post_process_instance_segmentation(outputs, target_sizes=targets, **options), expected)


@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize(("seed", "batch", "size", "targets"), IN_TURN)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.0, "overlap_mask_area_threshold": 0.2},
        {"threshold": 0.2, "mask_threshold": 0.1, "overlap_mask_area_threshold": 0.4},
        {"threshold": 0.2, "overlap_mask_area_threshold": 0.3, "label_ids_to_fuse": {0, 1, 2}},
        {"threshold": 0.999, "label_ids_to_fuse": set()},
    ],
)
def test_image_panoptic_segments_equal_transformers(
    reference: Any, seed: int, batch: int, size: Any, targets: Any, sure: bool, options: Any
) -> None:
    outputs = image_outputs(seed, batch, size, sure=sure)
    expected = reference.post_process_panoptic_segmentation(outputs, target_sizes=targets, **options)
    assert_same(post_process_panoptic_segmentation(outputs, target_sizes=targets, **options), expected)


@pytest.mark.parametrize(("seed", "batch", "size", "targets"), IMAGE_CASES)
def test_image_label_maps_equal_transformers(reference: Any, seed: int, batch: int, size: Any, targets: Any) -> None:
    outputs = image_outputs(seed, batch, size, sure=True)
    expected = reference.post_process_semantic_segmentation(outputs, targets, return_segmentation_scores=True)
    ours = post_process_semantic_segmentation(outputs, targets, return_segmentation_scores=True)
    plain = post_process_semantic_segmentation(outputs, targets)
    for one, other, label_map in zip(ours, expected, plain, strict=True):
        torch.testing.assert_close(one.segmentation_scores, other.segmentation_scores, rtol=0, atol=1e-5)
        best, second = other.segmentation_scores.topk(2, dim=0).values
        clear = best - second > 1e-5
        assert clear.float().mean() > 0.99
        assert torch.equal(one.segmentation[clear], other.segmentation[clear])
        assert torch.equal(label_map, one.segmentation)
        assert label_map.dtype == other.segmentation.dtype


def test_the_image_cases_hold_full_empty_and_fused_results(reference: Any) -> None:
    """The comparisons above would prove little if every result were empty."""
    counts, fused, doubled = {0.5: [], 0.999: []}, 0, 0
    for seed, batch, size, targets in IMAGE_CASES:
        for sure in (True, False):
            outputs = image_outputs(seed, batch, size, sure=sure)
            for threshold, lengths in counts.items():
                results = reference.post_process_instance_segmentation(outputs, threshold, target_sizes=targets)
                lengths.extend(len(result["segments_info"]) for result in results)
            arguments = {"threshold": 0.2, "overlap_mask_area_threshold": 0.3, "label_ids_to_fuse": {0, 1, 2}}
            for result in reference.post_process_panoptic_segmentation(outputs, target_sizes=targets, **arguments):
                segments = result["segments_info"]
                ids = {segment["id"] for segment in segments}
                fused += len(segments) > len(ids)
                doubled += len({(segment["id"], segment["label_id"]) for segment in segments}) > len(ids)
    assert max(counts[0.5]) > 2
    assert 0 in counts[0.999]
    assert fused
    assert doubled  # one id for two classes: the numbering of transformers that the video function does not have


@pytest.mark.parametrize("function", IMAGE_FUNCTIONS)
def test_a_clip_of_one_frame_is_an_image(function: Any) -> None:
    outputs = image_outputs(0, 2, (24, 24), sure=True)
    clip = SimpleNamespace(
        class_queries_logits=outputs.class_queries_logits, masks_queries_logits=outputs.masks_queries_logits[:, :, None]
    )
    assert_same(function(clip), function(outputs))


def test_an_image_instance_may_score_exactly_the_threshold() -> None:
    outputs = SimpleNamespace(
        class_queries_logits=torch.tensor([[[0.0, 0.0, -torch.inf]]]),  # score exactly 0.5
        masks_queries_logits=torch.full((1, 1, 4, 4), 100.0),  # mask probability exactly 1
    )
    assert len(post_process_instance_segmentation(outputs, threshold=0.5)[0]["segments_info"]) == 1
    assert post_process_instance_segmentation(outputs, threshold=0.5001)[0]["segments_info"] == []


def test_an_image_query_must_score_above_the_panoptic_threshold() -> None:
    outputs = SimpleNamespace(
        class_queries_logits=torch.tensor([[[0.0, 0.0, -torch.inf]]]),  # score exactly 0.5
        masks_queries_logits=torch.full((1, 1, 4, 4), 10.0),
    )
    options = {"mask_threshold": 0.4}
    assert post_process_panoptic_segmentation(outputs, threshold=0.5, **options)[0]["segments_info"] == []
    assert len(post_process_panoptic_segmentation(outputs, threshold=0.499, **options)[0]["segments_info"]) == 1


@pytest.mark.parametrize("function", IMAGE_FUNCTIONS)
@pytest.mark.parametrize("targets", [None, [(20, 31), (500, 300)]])
def test_chunked_equals_whole(function: Any, targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = image_outputs(0, 2, (24, 24), sure=True)
    whole = function(outputs, target_sizes=targets)
    monkeypatch.setattr(segments, "CHUNK_PIXELS", 1)
    assert_same(function(outputs, target_sizes=targets), whole)


@pytest.mark.parametrize("function", IMAGE_FUNCTIONS)
def test_batch_equals_singles(function: Any) -> None:
    outputs = image_outputs(0, 3, (24, 36), sure=True)
    targets = [(20, 31), (9, 9), (64, 40)]
    batched = function(outputs, target_sizes=targets)
    for index in range(3):
        single = SimpleNamespace(**{name: value[index : index + 1] for name, value in vars(outputs).items()})
        assert_same(batched[index], function(single, target_sizes=targets[index : index + 1])[0])


# --- errors


def changed(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(image_outputs(0, 1, (8, 12), sure=True)), **changes})


COMMON_ERRORS = [
    ({}, {}, "class_queries_logits"),
    (changed(masks_queries_logits=None), {}, "masks_queries_logits"),
    (changed(class_queries_logits=torch.zeros(10, 6)), {}, r"\(B, Q, K\+1\)"),
    (changed(class_queries_logits=torch.zeros(1, 5, 6)), {}, "batch or queries"),
    (changed(class_queries_logits=torch.full((1, 10, 6), torch.nan)), {}, "class logits hold NaN"),
    (changed(masks_queries_logits=torch.zeros(1, 10, 0, 4)), {}, "empty"),
    (changed(), {"target_sizes": [(5, 5), (6, 6)]}, "target_sizes"),
]


@pytest.mark.parametrize(("outputs", "arguments", "message"), COMMON_ERRORS)
@pytest.mark.parametrize("function", IMAGE_FUNCTIONS)
def test_errors_of_every_function(function: Any, outputs: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(outputs, **arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (post_process_panoptic_segmentation, {"overlap_mask_area_threshold": 80}, "overlap_mask_area_threshold"),
        (post_process_panoptic_segmentation, {"label_ids_to_fuse": {-1}}, "label_ids_to_fuse"),
        (post_process_instance_segmentation, {"threshold": 50}, "threshold"),
        (
            post_process_instance_segmentation,
            {"return_coco_annotation": True, "return_binary_maps": True},
            "exclude each other",
        ),
    ],
)
def test_errors_of_single_arguments(function: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(changed(), **arguments)


@pytest.mark.parametrize("function", IMAGE_FUNCTIONS)
def test_nan_masks(function: Any) -> None:
    outputs = changed()
    outputs.masks_queries_logits[:, :, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="mask logits hold NaN"):
        function(outputs)


@pytest.mark.parametrize("function", IMAGE_FUNCTIONS)
def test_clips_are_sent_to_the_video_functions(function: Any) -> None:
    masks = torch.zeros(1, 10, 2, 8, 12)
    with pytest.raises(ValueError, match="post_process_video"):
        function(changed(masks_queries_logits=masks))

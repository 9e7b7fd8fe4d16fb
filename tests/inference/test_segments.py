from typing import Any

import numpy as np
import pytest
import torch

from m2f_video.inference.segments import check_sizes, panoptic_segments


@pytest.mark.parametrize(
    "sizes", [[(5, 6), (7, 8)], [[5, 6], [7.0, 8]], torch.tensor([[5, 6], [7, 8]]), np.array([[5, 6], [7, 8]])]
)
def test_sizes_come_in_any_container(sizes: Any) -> None:
    assert check_sizes("target_sizes", sizes, 2) == [(5, 6), (7, 8)]


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [(5, 5), (6, 6)],
        (5, 5),
        5,
        [(5,)],
        [(5, 5, 3)],
        [(5, -5)],
        [(0, 5)],
        [(5, 5.5)],
        [(5, float("nan"))],
        [(5, float("inf"))],
        [("a", "b")],
        [None],
    ],
)
def test_bad_sizes_name_the_argument(sizes: Any) -> None:
    with pytest.raises(ValueError, match="target_sizes must hold one"):
        check_sizes("target_sizes", sizes, 1)


@pytest.mark.parametrize(
    ("owned", "area", "threshold", "stays"), [(4, 5, 0.8, True), (1, 2, 0.5, False), (3, 5, 0.6, True)]
)
def test_the_owned_part_is_a_float32_that_must_exceed_the_threshold(
    owned: int, area: int, threshold: float, stays: bool
) -> None:
    # 4/5 and 3/5 in float32 are a little more than 0.8 and 0.6
    maps = torch.zeros(2, 1, 1, area + 3)
    maps[0, ..., :area] = 0.9
    maps[1, ..., owned:] = 1
    ids, segments = panoptic_segments(
        [((slice(0, 2), slice(0, 1)), maps)],
        scores=torch.tensor([0.9, 0.9]),
        labels=torch.tensor([1, 2]),
        shape=(1, 1, area + 3),
        num_classes=3,
        mask_threshold=0.5,
        overlap_mask_area_threshold=threshold,
        label_ids_to_fuse=None,
        distinct_ids=True,
    )
    second = 2 if stays else 1
    assert ids.flatten().tolist() == [1 if stays else 0] * owned + [second] * (area + 3 - owned)
    assert [segment["label_id"] for segment in segments] == ([1, 2] if stays else [2])

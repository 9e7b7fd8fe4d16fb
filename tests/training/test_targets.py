"""Targets of clips: what is valid, which instances stay, and where their labels come from."""

import pytest
import torch
from torch import Tensor

from m2f_video.training import ClipTarget, prepare_target


def masks(presence: list[list[int]]) -> Tensor:
    """(n, T, 5, 6) masks with some pixels where `presence` is 1."""
    result = torch.zeros(len(presence), len(presence[0]), 5, 6, dtype=torch.bool)
    for instance, frames in enumerate(presence):
        for frame, present in enumerate(frames):
            result[instance, frame, instance, :present] = True
    return result


PRESENCE = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
LABELS = torch.tensor([3, 1, 0, 2, 4])


def test_labels_come_from_any_frame_by_default() -> None:
    target = prepare_target(LABELS, masks(PRESENCE), num_labels=5)
    assert target.labels.tolist() == [3, 0, 2, 4]
    assert torch.equal(target.masks, masks(PRESENCE)[[0, 2, 3, 4]])


def test_last_frame_makes_instances_absent_there_no_object() -> None:
    target = prepare_target(LABELS, masks(PRESENCE), num_labels=5, label_source="last_frame")
    assert target.labels.tolist() == [3, 5, 2, 5]
    assert torch.equal(target.masks, masks(PRESENCE)[[0, 2, 3, 4]])


@pytest.mark.parametrize("label_source", ["any_frame", "last_frame"])
def test_a_clip_without_instances(label_source: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    target = prepare_target(none, torch.zeros(0, 3, 4, 6), num_labels=5, label_source=label_source)
    assert target.labels.shape == (0,)
    assert target.masks.shape == (0, 3, 4, 6)
    invisible = prepare_target(LABELS[:1], torch.zeros(1, 3, 4, 6), num_labels=5, label_source=label_source)
    assert invisible.labels.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_of_every_dtype(dtype: torch.dtype) -> None:
    target = prepare_target(LABELS, masks(PRESENCE).to(dtype), num_labels=5)
    assert target.masks.dtype == dtype
    assert target.labels.tolist() == [3, 0, 2, 4]


def test_the_last_frame_goes_by_annotations_where_they_are_known() -> None:
    target_masks = masks(PRESENCE)
    annotated = target_masks.flatten(2).any(-1)
    annotated[:, -1] = True  # what augmentation has cropped away is annotated still
    options = {"num_labels": 5, "present": annotated}
    assert prepare_target(LABELS, target_masks, label_source="last_frame", **options).labels.tolist() == [3, 0, 2, 4]
    assert prepare_target(LABELS, target_masks, label_source="any_frame", **options).labels.tolist() == [3, 0, 2, 4]
    with pytest.raises(ValueError, match=r"present must be bool \(5, 3\)"):
        prepare_target(LABELS, target_masks, num_labels=5, present=annotated[:, 0])


def test_unknown_label_source_is_named() -> None:
    with pytest.raises(ValueError, match="'first_frame'"):
        prepare_target(LABELS, masks(PRESENCE), num_labels=5, label_source="first_frame")


def test_a_label_beyond_the_classes_is_named() -> None:
    with pytest.raises(ValueError, match="below num_labels=4, got 4"):
        prepare_target(LABELS, masks(PRESENCE), num_labels=4)


@pytest.mark.parametrize(
    ("labels", "target_masks", "message"),
    [
        (LABELS.int(), masks(PRESENCE), "int64"),
        (LABELS[:, None], masks(PRESENCE), r"labels must be \(n,\)"),
        (LABELS[:2], masks(PRESENCE), "n = 2"),
        (LABELS, masks(PRESENCE)[:, 0], r"got \(5, 5, 6\)"),
        (LABELS, masks(PRESENCE)[:, :0], "masks must be"),
        (LABELS, masks(PRESENCE).long(), "torch.int64"),
        (LABELS - 1, masks(PRESENCE), "must not be negative, got -1"),
        (LABELS, masks(PRESENCE).byte() * 255, "255 for foreground must become 1"),
        (LABELS, masks(PRESENCE).float().log(), "NaN or values outside"),
        (LABELS, masks(PRESENCE) * torch.nan, "NaN or values outside"),
    ],
)
def test_bad_targets_are_named(labels: Tensor, target_masks: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipTarget(labels, target_masks)

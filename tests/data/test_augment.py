"""Every field of the augmentation has an effect, and it is the same on all frames and masks of a clip."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f_video.data import Augmentation, AugmentConfig, Clip, SyntheticVideos

OFF = AugmentConfig(flip=0, shortest_edges=())


@pytest.fixture(scope="module")
def clip() -> Clip:
    return SyntheticVideos(1, 2, "medium", num_frames=4, height=48, width=64)[0].clip([0, 1, 3])


def tagged_clip() -> Clip:
    """The mask of the one instance is where the frames are white, in every frame."""
    masks = torch.zeros(1, 2, 40, 60, dtype=torch.bool)
    masks[0, :, 5:25, 8:30] = True
    return Clip(
        frames=(masks[0][:, None].expand(-1, 3, -1, -1) * 255).to(torch.uint8).contiguous(),
        masks=masks,
        labels=torch.tensor([3]),
        present=torch.ones(1, 2, dtype=torch.bool),
        instance_ids=torch.tensor([7]),
        frame_indices=(0, 4),
        video_id=1,
    )


def test_nothing_on_changes_nothing(clip):
    same = Augmentation(OFF)(clip, 0)
    assert torch.equal(same.frames, clip.frames)
    assert torch.equal(same.masks, clip.masks)


FIELDS = {
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.5,
    "hue": 0.3,
    "rotation": 20.0,
    "crop": (0.6, 0.8),
    "flip": 1.0,
    "shortest_edges": (30,),
}


def test_all_fields_are_tested():
    assert {*FIELDS, "longest_edge"} == set(AugmentConfig.__dataclass_fields__)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_an_effect(field, clip):
    changed = Augmentation(replace(OFF, **{field: FIELDS[field]}))(clip, 1)
    assert changed.frames.shape != clip.frames.shape or not torch.equal(changed.frames, clip.frames)
    if field in ("brightness", "contrast", "saturation", "hue"):
        assert torch.equal(changed.masks, clip.masks)
    assert changed.frames.shape[-2:] == changed.masks.shape[-2:]
    assert type(changed.frames) is type(changed.masks) is torch.Tensor


def test_the_size_is_that_of_the_processor(clip):
    sizes = {tuple(Augmentation(replace(OFF, shortest_edges=(24, 36)))(clip, s).frames.shape[-2:]) for s in range(12)}
    assert sizes == {(24, 32), (36, 48)}
    limited = Augmentation(replace(OFF, shortest_edges=(36,), longest_edge=40))(clip, 0)
    assert tuple(limited.frames.shape[-2:]) == (30, 40)


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=20, deadline=None)
def test_frames_and_masks_move_together(seed):
    config = AugmentConfig(rotation=30, crop=(0.5, 1), shortest_edges=(30, 50), longest_edge=100)
    moved = Augmentation(config)(tagged_clip(), seed)
    if len(moved.labels):
        inside = moved.frames[:, 0] > 127
        assert (inside ^ moved.masks[0]).float().mean() < 0.04  # along the edge, which one blends and the other cuts
        assert torch.equal(moved.frames[0], moved.frames[1])  # frames alike before are alike after
    again = Augmentation(config)(tagged_clip(), seed)
    assert torch.equal(again.frames, moved.frames)
    assert torch.equal(again.masks, moved.masks)


def test_a_flip_twice_is_no_flip(clip):
    flip = Augmentation(replace(OFF, flip=1.0))
    once = flip(clip, 0)
    assert torch.equal(once.frames, clip.frames.flip(-1))
    assert torch.equal(once.masks, clip.masks.flip(-1))
    twice = flip(once, 1)
    assert torch.equal(twice.frames, clip.frames)
    assert torch.equal(twice.masks, clip.masks)


def test_masks_stay_in_place_when_they_grow():
    """Twice the size is every pixel twice, also for masks."""
    tagged = tagged_clip()
    grown = Augmentation(replace(OFF, shortest_edges=(80,)))(tagged, 0)
    assert torch.equal(grown.masks, tagged.masks.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert torch.equal(grown.frames[:, 0] > 127, grown.masks[0])


def test_instances_that_are_cropped_away_are_dropped():
    counts = {len(Augmentation(replace(OFF, crop=(0.2, 0.2)))(tagged_clip(), seed).labels) for seed in range(30)}
    assert counts == {0, 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", 1.5),
        ("hue", 0.6),
        ("brightness", -0.1),
        ("rotation", float("nan")),
        ("crop", (0, 1)),
        ("crop", (0.9, 0.5)),
        ("shortest_edges", (0,)),
        ("shortest_edges", (2000,)),
    ],
)
def test_impossible_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"AugmentConfig.{field}"):
        AugmentConfig(**{field: value})

"""Which frames make a clip, and that clips depend on seed, video and draw alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2f_video.data import Augmentation, AugmentConfig, Clip, ClipDataset, ClipSampling, sample_frames
from tests.training.tiny_run import KeptVideos

lengths, counts, ranges = st.integers(1, 60), st.integers(1, 8), st.integers(0, 30)


def make_clip(instances: int = 2, frames: int = 3, height: int = 8, width: int = 10) -> Clip:
    masks = torch.zeros(instances, frames, height, width, dtype=torch.bool)
    masks[:, 0, 2:4, 2:5] = True
    return Clip(
        frames=torch.arange(frames * 3 * height * width).view(frames, 3, height, width).to(torch.uint8),
        masks=masks,
        labels=torch.arange(instances),
        present=masks.flatten(2).any(2),
        instance_ids=torch.arange(instances) + 1,
        frame_indices=tuple(range(frames)),
        video_id=1,
    )


@given(lengths, counts, ranges, st.integers(0, 2**32))
def test_sampled_frames_are_in_the_video_sorted_and_near_a_reference(length, count, frame_range, seed):
    sampling = ClipSampling(num_frames=count, frame_range=frame_range)
    frames = sample_frames(length, sampling, np.random.default_rng(seed))
    assert len(frames) == count
    assert list(frames) == sorted(frames)
    assert frames[0] >= 0
    assert frames[-1] < length
    assert any(all(abs(frame - reference) <= frame_range for frame in frames) for reference in frames)
    if length > 1 and frame_range > 0:  # the reference is drawn once only
        assert count == 1 or len(set(frames)) > 1
    else:
        assert len(set(frames)) == 1


def test_frames_are_drawn_with_replacement_and_reach_the_whole_range():
    random = np.random.default_rng(0)
    drawn = [sample_frames(50, ClipSampling(num_frames=3, frame_range=5), random) for _ in range(3000)]
    assert any(len(set(frames)) == 2 for frames in drawn)
    assert {frames[-1] - frames[0] for frames in drawn} == set(range(1, 11))
    assert {frame for frames in drawn for frame in frames} == set(range(50))


def test_bad_sampling():
    with pytest.raises(ValueError, match="num_frames"):
        ClipSampling(num_frames=0)
    with pytest.raises(ValueError, match="frame_range"):
        ClipSampling(frame_range=-1)
    with pytest.raises(ValueError, match="at least one frame"):
        sample_frames(0, ClipSampling(), np.random.default_rng(0))


VIDEOS = KeptVideos(3, 1, "easy", num_frames=9, height=32, width=48)


def dataset(seed: int = 0) -> ClipDataset:
    augment = Augmentation(AugmentConfig(shortest_edges=(24, 32), longest_edge=64))
    return ClipDataset(VIDEOS, ClipSampling(num_frames=2, frame_range=4), augment, seed)


def test_clips_depend_on_seed_video_and_draw_alone():
    first, second = dataset(), dataset()
    wanted = second[1, 5]
    for key in ((0, 0), (2, 1), (1, 0)):  # other work before must not matter, nor the process's generators
        first[key]
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    clip = first[1, 5]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert clip.frame_indices == wanted.frame_indices
    assert torch.equal(clip.frames, wanted.frames)
    assert torch.equal(clip.masks, wanted.masks)
    others = [first[1, draw] for draw in range(8)]
    assert len({(other.frame_indices, tuple(other.frames.shape)) for other in others}) > 3
    assert [dataset(1)[1, draw].frame_indices for draw in range(8)] != [other.frame_indices for other in others]


def test_a_data_loader_takes_pairs_of_video_and_draw():
    keys = [(2, 0), (0, 1), (1, 7)]
    loader = torch.utils.data.DataLoader(dataset(), batch_size=None, sampler=keys)
    assert [clip.video_id for clip in loader] == [3, 1, 2]
    assert dataset().labels[0] == "disc"
    assert len(dataset()) == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["no workers", "workers", "persistent workers"],
)
def test_a_plain_data_loader_sees_new_clips_in_each_epoch(options):
    def epochs(seed):
        """The three clips of three epochs: their frames, by video."""
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(dataset(), batch_size=None, shuffle=True, **options)
        return [{clip.video_id: clip.frames for clip in loader} for _ in range(3)]

    def alike(one, other):
        return one.shape == other.shape and torch.equal(one, other)

    found, again, others = epochs(0), epochs(0), epochs(1)
    for video in (1, 2, 3):
        drawn = [clips[video] for clips in found]
        assert not any(alike(one, other) for one, other in itertools.combinations(drawn, 2))
        assert all(alike(one, other[video]) for one, other in zip(drawn, again, strict=True))
        assert not all(alike(one, other[video]) for one, other in zip(drawn, others, strict=True))


def test_clips_that_do_not_exist():
    with pytest.raises(IndexError, match="no video 3"):
        dataset()[3]
    with pytest.raises(IndexError, match="no video -1"):
        dataset()[-1, 0]
    with pytest.raises(IndexError, match="no draw -1 of video 0"):
        dataset()[0, -1]
    with pytest.raises(ValueError, match="seed"):
        ClipDataset(dataset().videos, seed=-1)


@pytest.mark.parametrize("key", ["one", 1.5, None, slice(2), (0,), (0, 1, 2), (0, "one")], ids=repr)
def test_a_key_that_is_no_number_is_named(key):
    with pytest.raises(TypeError, match=r"by the number of its video, or by \(video, draw\), got .") as raised:
        dataset()[key]
    assert repr(key) in str(raised.value)


def test_any_kind_of_integer_is_a_key():
    clip = dataset()[1, 2]
    for key in ((np.int64(1), np.int32(2)), (torch.tensor(1), 2)):
        assert torch.equal(dataset()[key].frames, clip.frames)


def test_instances_in_no_frame_are_left_out_and_others_keep_their_place():
    clip = make_clip()
    masks = clip.masks.clone()
    masks[0] = False
    kept = replace(clip, masks=masks).without_absent()
    assert kept.labels.tolist() == [1]
    assert kept.instance_ids.tolist() == [2]
    assert kept.present.tolist() == [[True, False, False]]
    assert torch.equal(kept.masks, masks[1:])
    assert clip.without_absent() is clip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", torch.zeros(3, 8, 10, 3, dtype=torch.uint8)),
        ("frames", torch.zeros(3, 3, 8, 10)),
        ("masks", torch.zeros(2, 3, 8, 9, dtype=torch.bool)),
        ("masks", torch.zeros(2, 3, 8, 10)),
        ("labels", torch.zeros(2)),
        ("present", torch.zeros(2, 2, dtype=torch.bool)),
        ("instance_ids", torch.zeros(3, dtype=torch.int64)),
        ("frame_indices", (0, 1)),
    ],
)
def test_contradicting_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"Clip.{field}"):
        replace(make_clip(), **{field: value})

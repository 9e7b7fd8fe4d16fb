"""Which clips make a batch, in which order, and how they become one."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2f_video import VideoProcessor
from m2f_video.config import PreprocessingConfig
from m2f_video.data import (
    Augmentation,
    AugmentConfig,
    ClipDataset,
    ClipSampling,
    SyntheticVideos,
    YouTubeVis,
    write_youtube_vis,
)
from m2f_video.training import ClipTarget, batches
from m2f_video.training.batches import Batch, ClipBatches, ClipOrder, Collate, load_batches

VIDEOS = SyntheticVideos(5, seed=1, difficulty="hard", num_frames=6, height=32, width=48)
LABELS = len(VIDEOS.labels)
sizes, seeds = st.integers(1, 9), st.integers(0, 2**40)


def order(num_videos: int, batch_size: int, steps: tuple[int, int], seed: int = 0, **division: int) -> ClipOrder:
    return ClipOrder(num_videos, batch_size=batch_size, steps=steps, seed=seed, **division)


@given(sizes, sizes, seeds)
def test_each_epoch_has_every_video_once(num_videos: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * num_videos // batch_size)
    keys = list(chain.from_iterable(order(num_videos, batch_size, (0, steps), seed)))
    for epoch in range(3):
        videos, draws = zip(*keys[epoch * num_videos : (epoch + 1) * num_videos], strict=True)
        assert sorted(videos) == list(range(num_videos))
        assert set(draws) == {epoch}


@given(sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), seeds)
def test_workers_and_parts_divide_the_same_steps(
    num_videos: int, share: int, world_size: int, parts: int, seed: int
) -> None:
    batch_size = share * world_size * parts
    whole = list(order(num_videos, batch_size, (2, 7), seed))
    workers = [
        order(num_videos, batch_size, (2, 7), seed, rank=rank, world_size=world_size, parts=parts)
        for rank in range(world_size)
    ]
    assert [len(worker) for worker in workers] == [5 * parts] * world_size
    lists = [list(worker) for worker in workers]
    assert {len(keys) for mine in lists for keys in mine} == {share}
    for step, keys in enumerate(whole):
        mine = [lists[rank][step * parts + part] for part in range(parts) for rank in range(world_size)]
        assert list(chain.from_iterable(mine)) == keys


@given(sizes, sizes, st.integers(0, 20), seeds)
def test_a_start_in_the_middle_gives_the_rest(num_videos: int, batch_size: int, start: int, seed: int) -> None:
    whole = list(order(num_videos, batch_size, (0, 20), seed))
    assert list(order(num_videos, batch_size, (start, 20), seed)) == whole[start:]


def test_orders_differ_by_epoch_and_seed() -> None:
    def epochs(seed: int) -> list[list[int]]:
        return [[video for video, _ in keys] for keys in order(20, 20, (0, 5), seed)]

    found = epochs(0) + epochs(1)
    assert len({tuple(epoch) for epoch in found}) == 10
    again = order(20, 20, (0, 5), 0)
    assert list(again) == list(again)


def test_batches_that_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=r"batch_size=6 cannot be divided among 2 workers and 2 parts.*multiple of 4"):
        order(3, 6, (0, 1), world_size=2, parts=2)
    with pytest.raises(ValueError, match="no videos to train on"):
        order(0, 6, (0, 1))


@pytest.mark.parametrize(("divisor", "size"), [(32, (32, 64)), (8, (32, 48)), (64, (64, 64))])
def test_frames_become_what_the_processor_makes_of_them(divisor: int, size: tuple[int, int]) -> None:
    preprocessing = PreprocessingConfig(
        shortest_edge=32, size_divisor=divisor, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)
    )
    clips = [VIDEOS[0].clip([0, 3]), VIDEOS[1].clip([1, 2])]
    frames, targets = Collate(preprocessing, LABELS, "any_frame")(clips)
    assert frames.shape == (2, 2, 3, *size)
    processor = VideoProcessor(preprocessing, VIDEOS.labels)
    for mine, clip in zip(frames, clips, strict=True):
        torch.testing.assert_close(mine, processor(clip.frames.permute(0, 2, 3, 1).numpy())["pixel_values"][0])
    assert [target.labels.tolist() for target in targets] == [clip.labels.tolist() for clip in clips]
    assert all(torch.equal(target.masks, clip.masks) for target, clip in zip(targets, clips, strict=True))


def test_clips_of_several_sizes_share_a_batch() -> None:
    small = VIDEOS[0].clip([0, 1])
    wide = SyntheticVideos(1, num_frames=2, height=40, width=70)[0].clip([0, 1])
    frames, targets = Collate(PreprocessingConfig(), LABELS, "any_frame")([small, wide])
    assert frames.shape == (2, 2, 3, 64, 96)
    assert not frames[0, ..., 32:, :].any()
    assert not frames[0, ..., 48:].any()
    assert frames[1, ..., :40, :70].ne(0).any(1).all()
    assert [tuple(target.masks.shape[-2:]) for target in targets] == [(32, 48), (40, 70)]


def test_the_label_source_reaches_the_targets() -> None:
    clip = VIDEOS[0].clip([0, 1])
    masks, present = clip.masks.clone(), clip.present.clone()
    masks[:, 1] = False  # the first is not annotated there, the others are cropped away
    present[0, 1] = False
    clip = replace(clip, masks=masks, present=present)
    for source, first in (("any_frame", int(clip.labels[0])), ("last_frame", LABELS)):
        _, (target,) = Collate(PreprocessingConfig(), LABELS, source)([clip])
        assert target.labels.tolist() == [first, *clip.labels[1:].tolist()]


def batches_of(videos: Any, num_workers: int, steps: int = 3) -> list[Batch]:
    clips = ClipDataset(videos, ClipSampling(frame_range=3), Augmentation(AugmentConfig(shortest_edges=(24, 32))), 7)
    collate = Collate(PreprocessingConfig(), LABELS, "any_frame")
    return list(load_batches(ClipBatches(clips, collate), order(len(videos), 2, (0, steps)), num_workers))


def same(ours: ClipTarget, theirs: ClipTarget) -> bool:
    return torch.equal(ours.labels, theirs.labels) and torch.equal(ours.masks, theirs.masks)


def test_processes_prepare_the_same_batches() -> None:
    here, elsewhere = batches_of(VIDEOS, 0), batches_of(VIDEOS, 2)
    assert len(here) == len(elsewhere) == 3
    for (frames, targets), (others, other_targets) in zip(here, elsewhere, strict=True):
        assert torch.equal(frames, others)
        assert all(map(same, targets, other_targets))
    assert not torch.equal(here[0][0][..., :24, :32], here[1][0][..., :24, :32])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_interrupted_leaves_in_silence(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    clips, collate = ClipDataset(VIDEOS), Collate(PreprocessingConfig(), LABELS, "any_frame")
    made = load_batches(ClipBatches(clips, collate), order(5, 2, (0, 9)), num_workers=2)
    next(made)
    processes = multiprocessing.active_children()
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, number)
    for process in processes:
        process.join(10)
    assert [process.exitcode for process in processes] == [0, 0]
    made.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_process_that_is_gone_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Iterator[Batch]:
        raise error
        yield

    monkeypatch.setattr(batches, "DataLoader", broken)
    with pytest.raises(ChildProcessError, match=r"^a process that prepares clips has ended \(.+\); .* num_workers=0$"):
        batches_of(VIDEOS, 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_frame_that_is_gone_is_named_and_nothing_else(num_workers: int, tmp_path: Path) -> None:
    write_youtube_vis(VIDEOS, tmp_path / "data")
    frame = tmp_path / "data" / "JPEGImages" / "000003"
    for file in frame.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="cannot read the frame") as raised:
        batches_of(YouTubeVis(tmp_path / "data"), num_workers)
    assert str(raised.value).startswith(f"{frame}/0000")
    assert "Traceback" not in str(raised.value)

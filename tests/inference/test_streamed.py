"""Videos decoded as one clip, one frame at a time on the device: what `whole` gives, wherever frames are kept."""

import copy
import errno
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2f_video import VideoMask2Former, open_video, segment_video
from m2f_video.benchmark import peak_bytes
from m2f_video.inference import streamed
from m2f_video.inference.frame_store import FrameStore
from m2f_video.inference.segment import choose_mode
from m2f_video.video import VideoError
from tests.conftest import synthetic_frames


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return synthetic_frames(7, 61, 90)


@pytest.fixture(scope="module")
def exact_model(tiny_model) -> VideoMask2Former:
    return copy.deepcopy(tiny_model).double()


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In a folder of their own, in which nothing may be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []


def same(ours, expected) -> None:
    assert [(t.id, t.label_id, t.query_id) for t in ours.tracks] == [
        (t.id, t.label_id, t.query_id) for t in expected.tracks
    ]
    np.testing.assert_allclose([t.score for t in ours.tracks], [t.score for t in expected.tracks], rtol=1e-10)
    assert [t.segmentations for t in ours.tracks] == [t.segmentations for t in expected.tracks]
    assert ours.frames == expected.frames


@pytest.mark.parametrize("count", [1, 2, 7])
def test_streamed_is_whole(exact_model, video, count):
    same(*(segment_video(exact_model, video[:count], mode=mode) for mode in ("streamed", "whole")))


@pytest.mark.parametrize("options", [
    {"top_k": 3}, {"score_threshold": 0.2}, {"max_overlap": 0.0}, {"max_overlap": 0.4, "top_k": 4},
    {"frames": slice(1, None, 2)},
], ids=str)  # fmt: skip
def test_what_is_chosen_is_chosen_as_of_a_whole(exact_model, video, options):
    ours, expected = (segment_video(exact_model, video, mode=mode, **options) for mode in ("streamed", "whole"))
    assert expected.tracks
    same(ours, expected)


def test_accelerated_and_of_the_demo(video):
    model = VideoMask2Former.from_pretrained("demo")
    ours, expected = (segment_video(model, video[:3], mode=mode) for mode in ("streamed", "whole"))
    assert [t.label_id for t in ours.tracks] == [t.label_id for t in expected.tracks]
    np.testing.assert_allclose([t.score for t in ours.tracks], [t.score for t in expected.tracks], rtol=1e-3)
    masks = [np.stack([result.masks(frame) for frame in range(3)]) for result in (ours, expected)]
    assert (masks[0] != masks[1]).mean() < 1e-4


def test_where_frames_are_kept_and_chunks_change_no_bit(tiny_model, video, monkeypatch):
    video = video[:3]
    one = segment_video(tiny_model, video, mode="streamed", frames_per_chunk=1)
    assert segment_video(tiny_model, video, mode="streamed", frames_per_chunk=2) == one
    for levels, masks in ((0, 1 << 30), (1 << 30, 0), (250_000, 200_000)):
        monkeypatch.setattr(streamed, "LEVEL_MEMORY", levels)
        monkeypatch.setattr(streamed, "MASK_MEMORY", masks)
        assert segment_video(tiny_model, video, mode="streamed") == one
        assert segment_video(tiny_model, iter(video), mode="streamed").tracks == one.tracks  # which is read once


def test_every_frame_is_reported(tiny_model, video, monkeypatch):
    monkeypatch.setattr(streamed, "MASK_MEMORY", 0)
    calls = []
    segment_video(tiny_model, video[:2], mode="streamed", progress=lambda *call: calls.append(call))
    layers = tiny_model.config.transformer_decoder.num_layers
    totals = {"frames": 2, "attention": 2 * layers, "masks": 2}
    assert calls == [(stage, done, total) for stage, total in totals.items() for done in range(1, total + 1)]


@pytest.mark.slow
def test_memory_on_the_device_does_not_grow(tiny_model, video, monkeypatch):
    """What is kept is in a file here, so that tensors on the CPU are those that a device would have."""
    monkeypatch.setattr(streamed, "LEVEL_MEMORY", 0)
    monkeypatch.setattr(streamed, "MASK_MEMORY", 0)

    def peak(count: int, mode: Any) -> int:
        return peak_bytes(lambda: segment_video(tiny_model, np.resize(video, (count, 61, 90, 3)), mode=mode))

    assert peak(40, "streamed") < 1.01 * peak(2, "streamed") < 0.5 * peak(40, "whole")


# --- what cannot be


def refused(model: Any, video: np.ndarray, named: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        segment_video(model, video, mode="streamed", **options)
    assert "mode='whole'" in str(caught.value)


def test_a_decoder_that_was_touched_is_an_error_before_the_work(tiny_model, video):
    model, name = copy.deepcopy(tiny_model), "transformer_decoder.layers.2.cross_attn"
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    refused(model, video, f"{name} is hooked or patched", progress=lambda *_: pytest.fail("it has begun"))
    with tiny_model.capture("*.cross_attn.attention_weights"):
        refused(tiny_model, video, r"cross_attn is hooked or patched.*model\.capture")
    with tiny_model.capture("*.mask_logits"):
        refused(tiny_model, video, r"layers.0 is hooked or patched.*model\.capture")


def test_a_decoder_that_is_touched_meanwhile_is_an_error(tiny_model, video):
    model = copy.deepcopy(tiny_model)

    def touch(stage: str, done: int, total: int | None) -> None:
        if done == 3:
            model.transformer_decoder.norm.register_forward_hook(lambda *_: None)

    refused(model, video, r"transformer_decoder\.norm is hooked", progress=touch)


def test_another_kind_of_model_is_an_error(tiny_model, video):
    class Halves:
        config, device, dtype = tiny_model.config, tiny_model.device, tiny_model.dtype
        encode_frames, decode_clip = tiny_model.encode_frames, tiny_model.decode_clip

    assert segment_video(Halves(), video[:1], mode="whole").tracks
    refused(Halves(), video, "it is a Halves")


def test_a_model_in_training_mode_is_streamed_without_dropout(tiny_config, tiny_model, video):
    dropping = replace(tiny_config.transformer_decoder, dropout=0.5)
    model = VideoMask2Former(tiny_config.replace(transformer_decoder=dropping))
    model.load_state_dict(tiny_model.state_dict())
    expected = segment_video(tiny_model, video, mode="streamed", plain=True)
    assert segment_video(model.train(), video, mode="streamed", plain=True) == expected


@pytest.mark.parametrize("second", [5, 8])
def test_a_video_that_changes_its_length_is_told(tiny_model, video, second, monkeypatch):
    monkeypatch.setattr(streamed, "MASK_MEMORY", 0)
    lengths = iter((7, second))

    class Changing(type(open_video(video))):
        def __iter__(self):
            return iter(np.resize(video, (next(lengths), 61, 90, 3)))

    reader = open_video(video)
    reader.__class__ = Changing
    with pytest.raises(VideoError, match=f"it had 7 frames, and {second} when it was read again"):
        segment_video(tiny_model, reader, mode="streamed")


def test_a_full_disk_is_one_clear_error(tiny_model, video, monkeypatch):
    monkeypatch.setattr(streamed, "LEVEL_MEMORY", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    with pytest.raises(OSError, match=r"TMPDIR.*mode='window'") as caught:
        segment_video(tiny_model, video, mode="streamed")
    assert caught.value.errno == errno.ENOSPC


def test_auto_never_takes_streamed():
    assert {choose_mode("auto", count)[0] for count in (1, 10**6, None)} == {"whole", "window"}
    assert choose_mode("streamed", 1)[0] == "streamed"


# --- the store


def test_a_store_gives_back_what_it_was_given():
    torch.manual_seed(0)
    frames = [[torch.randn(3, 5).T, torch.randn(7).bfloat16(), torch.arange(4)] for _ in range(5)]
    size = 60 + 14 + 32
    for memory, in_memory in ((0, 0), (2 * size, 2), (2 * size + size // 2, 2), (10 * size, 5)):
        with FrameStore(memory) as store:
            assert all(store.append(parts) for parts in frames)
            assert (len(store), store.frame_bytes, len(store._in_memory)) == (5, size, in_memory)
            for number in (4, 0, 2, 1, 3):
                for part, expected in enumerate(frames[number]):
                    assert torch.equal(store.read(number, part), expected)
                    assert store.read(number, part).dtype == expected.dtype


def test_a_store_that_does_not_spill_keeps_the_first_frames():
    with FrameStore(100, spills=False) as store:
        assert [store.append([torch.full((10,), float(number))]) for number in range(4)] == [True, True, False, False]
        assert len(store) == 2
        assert store.read(1, 0).tolist() == [1.0] * 10


def test_frames_of_another_size_are_told():
    with FrameStore(0) as store:
        store.append([torch.zeros(3)])
        with pytest.raises(ValueError, match="one size"):
            store.append([torch.zeros(4)])
        with pytest.raises(ValueError, match="one size"):
            store.append([torch.zeros(3).double()])


def test_a_store_copies_what_it_keeps():
    kept = torch.zeros(3)
    with FrameStore(100) as store:
        store.append([kept])
        kept += 1
        assert store.read(0, 0).sum() == 0

"""Where memory does not suffice: smaller chunks with the same result, or one clear error."""

import logging

import numpy as np
import pytest
import torch

from m2f_video import segment_video
from m2f_video.inference.on_video import OutOfMemoryError, is_out_of_memory

ON_A_CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


class Limited:
    """A model whose memory suffices for so many frames at a time, and clips of so many."""

    def __init__(self, model, error: Exception, frames: int, clip: int = 99) -> None:
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self._model, self._error, self._frames, self._clip = model, error, frames, clip
        self.tried: list[int] = []

    def encode_frames(self, frames):
        self.tried.append(len(frames))
        if len(frames) > self._frames:
            raise self._error
        parts = [self._model.encode_frames(frame[None]) for frame in frames]  # no rounding by how many there are
        return type(parts[0]).concatenate(parts)

    def decode_clip(self, features, *, output_masks):
        if len(features.mask_features) > self._clip:
            raise self._error
        return self._model.decode_clip(features, output_masks=output_masks)


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(ON_A_CPU)]
)
@pytest.mark.parametrize("how", [{"mode": "whole"}, {"mode": "window", "window": 5}], ids=["whole", "window"])
def test_chunks_are_halved_and_the_result_is_the_same(tiny_model, video, caplog, error, how):
    expected = segment_video(Limited(tiny_model, error, 99), video, frames_per_chunk=1, **how)
    limited = Limited(tiny_model, error, 2)
    with caplog.at_level(logging.WARNING):
        result = segment_video(limited, video, frames_per_chunk=5, **how)
    assert result.tracks == expected.tracks
    assert limited.tried[:2] == [5, 2]  # 5 // 2
    assert max(limited.tried[1:]) == 2  # and what is too much is not tried again
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 5 frames at a time; going on with 2"
    ]


@pytest.mark.parametrize("stride", [6, 4])
def test_a_window_of_many_chunks_has_all_of_its_frames(tiny_model, video, stride):
    how = {"mode": "window", "window": 6, "stride": stride}
    expected = segment_video(Limited(tiny_model, MemoryError(), 99), video, frames_per_chunk=1, **how)
    limited = Limited(tiny_model, MemoryError(), 2)
    assert segment_video(limited, video, frames_per_chunk=3, **how).tracks == expected.tracks
    assert limited.tried[:5] == [3, 1, 1, 1, 1]


def test_one_frame_that_does_not_fit_is_one_clear_error(tiny_model, video, caplog):
    with pytest.raises(OutOfMemoryError, match=r"<array>: out of memory with one frame at a time; .*--shortest-edge"):
        segment_video(Limited(tiny_model, RuntimeError(ON_A_CPU), 0), video, frames_per_chunk=4)
    assert [record.args for record in caplog.records] == [(4, 2), (2, 1)]


def test_a_clip_that_does_not_fit_names_the_window(tiny_model, video):
    with pytest.raises(OutOfMemoryError, match=r"a clip of 4 frames .*--window"):
        segment_video(Limited(tiny_model, MemoryError(), 99, clip=3), video, mode="window", window=4)


def test_other_errors_are_not_taken_for_it(tiny_model, video):
    with pytest.raises(RuntimeError, match="a defect"):
        segment_video(Limited(tiny_model, RuntimeError("a defect"), 0), video, frames_per_chunk=4)
    assert not is_out_of_memory(ValueError("out of memory"))

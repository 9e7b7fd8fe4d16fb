"""Videos written in parts, and the same bytes for the same frames."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from m2f_video.video import VideoError, VideoWriter, open_video, read_video
from m2f_video.video.parts import VideoParts
from tests.conftest import synthetic_frames

H, W, T = 64, 96, 12


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return synthetic_frames(T, H, W)


def write_parts(folder: Path, frames: np.ndarray, cuts: list[int], fps: Fraction = Fraction(25)) -> VideoParts:
    with VideoParts(folder, fps, W, H) as parts:
        for number, frame in enumerate(frames, 1):
            parts.write(frame)
            if number in cuts:
                parts.close()
        parts.close()
    return parts


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken away here")
def test_the_same_frames_are_the_same_file_on_any_number_of_cores(tmp_path: Path) -> None:
    frames = synthetic_frames(16, 192, 320)  # on which x264 is not deterministic by default

    def written() -> bytes:
        with VideoWriter(tmp_path / "a.mp4", 8, 320, 192) as writer:
            for frame in frames:
                writer.write(frame)
        return (tmp_path / "a.mp4").read_bytes()

    cores = os.sched_getaffinity(0)
    files = {written() for _ in range(4)}
    try:
        os.sched_setaffinity(0, {min(cores)})
        files.add(written())
    finally:
        os.sched_setaffinity(0, cores)
    assert len(files) == 1


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001), Fraction(1, 3600)])
@pytest.mark.parametrize("cuts", [[], [1, 3], [1, 2, 3, 4], [5, 9]])
def test_parts_are_joined_frame_by_frame(tmp_path: Path, frames: np.ndarray, fps: Fraction, cuts: list[int]) -> None:
    parts = write_parts(tmp_path / "parts", frames, cuts, fps)
    parts.join(tmp_path / "all.mp4")
    files = sorted((tmp_path / "parts").iterdir())
    assert len(files) == len(cuts) + 1
    reader = open_video(tmp_path / "all.mp4", strict=True)
    assert (reader.fps, reader.num_frames_hint) == (fps, T)
    np.testing.assert_array_equal(list(reader), np.concatenate([read_video(file) for file in files]))
    assert np.abs(read_video(tmp_path / "all.mp4").astype(int) - frames).mean() < 4
    with av.open(str(tmp_path / "all.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base * fps == T


def test_parts_are_gone_on_with(tmp_path: Path, frames: np.ndarray) -> None:
    write_parts(tmp_path / "whole", frames, [4, 8]).join(tmp_path / "whole.mp4")
    with pytest.raises(KeyboardInterrupt), VideoParts(tmp_path / "parts", Fraction(25), W, H) as parts:  # noqa: PT012
        for number, frame in enumerate(frames[:10]):
            parts.write(frame)
            if number in (3, 7):
                parts.close()
        raise KeyboardInterrupt
    assert parts.closed == len(list((tmp_path / "parts").iterdir())) == 2  # the open one has left nothing
    with VideoParts(tmp_path / "parts", Fraction(25), W, H, closed=1) as parts:
        assert len(list((tmp_path / "parts").iterdir())) == 1
        for number, frame in enumerate(frames[4:], 4):
            parts.write(frame)
            if number == 7:
                parts.close()
        parts.join(tmp_path / "resumed.mp4")
    assert (tmp_path / "resumed.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_parts_that_cannot_be_joined(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(VideoError, match="no frame was written"):
        VideoParts(tmp_path / "none", Fraction(25), W, H).join(tmp_path / "all.mp4")
    write_parts(tmp_path / "parts", frames, [4])
    with pytest.raises(VideoError, match=r"000002\.mp4 is missing"):
        VideoParts(tmp_path / "parts", Fraction(25), W, H, closed=3)
    parts = VideoParts(tmp_path / "parts", Fraction(25), W, H, closed=2)
    (tmp_path / "parts" / "000001.mp4").write_bytes(b"damaged")
    with pytest.raises(VideoError, match=r"a part in .*parts is damaged"):
        parts.join(tmp_path / "all.mp4")
    assert not (tmp_path / "all.mp4").exists()

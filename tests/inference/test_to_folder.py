"""Results that grow in their folder, and runs that go on after they were stopped."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f_video import VideoMask2Former, VideoSegmentation, open_video, read_video, segment_video
from m2f_video.inference import partial
from m2f_video.inference.linking import TransferLinker, is_resumable
from m2f_video.inference.stream import VideoStream
from m2f_video.inference.to_folder import LOCK_FILE, segment_to_folder
from m2f_video.results import tracks as tracks_module
from m2f_video.results import tracks_file
from m2f_video.video import VideoWriter
from m2f_video.video.parts import VideoParts
from tests.conftest import synthetic_frames

T, H, W = 23, 40, 60
FILES = ["overlay.mp4", "tracks.json", "tracks.jsonl"]


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "KEPT_EVERY", 6)
    monkeypatch.setattr(partial, "TRACKS_EVERY", 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "video.mp4"
    with VideoWriter(path, 12, W, H) as writer:
        for frame in synthetic_frames(T, H, W):
            writer.write(frame)
    return path


def segment(model, source: Path, output: Path, **options) -> VideoSegmentation:
    options = {"mode": "window", "window": 4, "top_k": 4} | options
    return segment_to_folder(model, open_video(source), output, **options)


class StopError(BaseException):
    """Stands for KeyboardInterrupt."""


def stop_after(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run end while it draws the frame after so many."""
    drawn = []
    write = VideoParts.write

    def stopping(self: VideoParts, frame: np.ndarray) -> None:
        drawn.append(0)
        if len(drawn) > frames:
            raise StopError
        write(self, frame)

    monkeypatch.setattr(VideoParts, "write", stopping)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module", params=[4, 2, 3], ids="stride {}".format)
def whole(request, tiny_model, source, tmp_path_factory) -> tuple[int, Path]:
    """A run that was not stopped, with its stride."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _often.__wrapped__(monkeypatch) if hasattr(_often, "__wrapped__") else None
        monkeypatch.setattr(partial, "KEPT_EVERY", 6)
        monkeypatch.setattr(partial, "TRACKS_EVERY", 3)
        segment(tiny_model, source, output, stride=request.param)
    return request.param, output


def test_what_is_written_is_what_is_found(tiny_model, source, tmp_path):
    expected = segment_video(tiny_model, source, mode="window", window=4, top_k=4)
    result = segment(tiny_model, source, tmp_path)
    assert names(tmp_path) == FILES
    lines, whole = VideoSegmentation.load(tmp_path / "tracks.jsonl"), VideoSegmentation.load(tmp_path / "tracks.json")
    for one in (result, lines):
        assert one.tracks == expected.tracks
        assert (one.frames, one.labels, one.fps) == (expected.frames, expected.labels, expected.fps)
        np.testing.assert_array_equal(one.masks(7), expected.masks(7))
    assert [(t.id, t.score, t.segmentations) for t in whole.tracks] == [
        (t.id, t.score, t.segmentations) for t in expected.tracks
    ]
    reader = open_video(tmp_path / "overlay.mp4", strict=True)
    assert (len(list(reader)), reader.fps) == (T, 12)


@pytest.mark.parametrize("frames", [0, 1, 7, 11, 20, T - 1])
def test_a_run_that_was_stopped_goes_on(tiny_model, source, whole, tmp_path, monkeypatch, frames):
    stride, expected = whole
    said: list[str] = []
    with monkeypatch.context() as stopping, pytest.raises(StopError) as stopped:
        stop_after(frames, stopping)
        segment(tiny_model, source, tmp_path, stride=stride)
    assert "are final and in" in stopped.value.__notes__[0]
    assert set(names(tmp_path)) <= {".unfinished", "tracks.jsonl"}
    with pytest.warns(UserWarning, match="stopped or is at work"):
        partly = VideoSegmentation.load(tmp_path)
    assert partly.frames == tuple(range(len(partly.frames)))
    assert len(partly.frames) in (frames, frames + 1)
    segment(tiny_model, source, tmp_path, stride=stride, resume=True, say=said.append)
    assert ("go on after frame" in said[0]) == (frames > 7)
    assert names(tmp_path) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()

"""Results that grow in their folder, and runs that go on after they were stopped."""

import errno
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f_video import VideoMask2Former, VideoSegmentation, open_video, segment_video
from m2f_video.files import locked
from m2f_video.inference import partial
from m2f_video.inference.linking import TransferLinker, is_resumable
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.to_folder import LOCK_FILE, segment_to_folder
from m2f_video.results import tracks as tracks_module
from m2f_video.results.tracks_file import TracksWriter
from m2f_video.video import VideoWriter
from m2f_video.video.parts import VideoParts
from m2f_video.video.reader import TruncatedVideoWarning
from tests.conftest import synthetic_frames
from tests.video.test_read_once import damage_packet
from tests.video.test_video_io import make_video

T, H, W = 23, 40, 60
FILES = ["overlay.mp4", "tracks.json", "tracks.jsonl"]


@pytest.fixture(autouse=True, scope="module")
def _often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(partial, "KEPT_EVERY", 6)
        monkeypatch.setattr(partial, "TRACKS_EVERY", 3)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "video.mp4"
    with VideoWriter(path, 12, W, H) as writer:
        for frame in synthetic_frames(T, H, W):
            writer.write(frame)
    return path


def segment(model, source: Path, output: Path, **options) -> VideoSegmentation:
    options = {"mode": "window", "window": 4, "top_k": 4, "plain": True} | options
    return segment_to_folder(model, open_video(source), output, **options)


class StopError(BaseException):
    """Stands for KeyboardInterrupt."""


@contextmanager
def stopping(after: int, error: type[BaseException] | BaseException = StopError) -> Iterator[None]:
    """Let a run end while it draws the frame after so many."""
    drawn, write = [], VideoParts.write

    def write_some(self: VideoParts, frame: np.ndarray) -> None:
        drawn.append(0)
        if len(drawn) > after:
            raise error
        write(self, frame)

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(BaseException) as stopped:  # noqa: PT012
        monkeypatch.setattr(VideoParts, "write", write_some)
        yield
    assert isinstance(stopped.value, error if isinstance(error, type) else type(error))


def stop(*_: object) -> None:
    raise StopError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module", params=[4, 2], ids="stride {}".format)
def whole(request, tiny_model, source, tmp_path_factory) -> tuple[int, Path]:
    """A run that was not stopped, with its stride."""
    output = tmp_path_factory.mktemp("whole")
    segment(tiny_model, source, output, stride=request.param)
    return request.param, output


@pytest.fixture(scope="module")
def stopped(tiny_model, source, tmp_path_factory) -> Path:
    """What a run has left that was stopped in the middle, its last state being of frame 8."""
    output = tmp_path_factory.mktemp("stopped")
    with stopping(10):
        segment(tiny_model, source, output)
    return output


def test_what_is_written_is_what_is_found(tiny_model, source, tmp_path):
    expected = segment_video(tiny_model, source, mode="window", window=4, top_k=4, plain=True)
    result = segment(tiny_model, source, tmp_path)
    assert names(tmp_path) == FILES
    lines, whole = VideoSegmentation.load(tmp_path / "tracks.jsonl"), VideoSegmentation.load(tmp_path)
    for one in (result, lines):
        assert one.tracks == expected.tracks
        assert (one.frames, one.labels, one.fps) == (expected.frames, expected.labels, expected.fps)
        np.testing.assert_array_equal(one.masks(7), expected.masks(7))
    for ours, theirs in zip(whole.tracks, expected.tracks, strict=True):
        assert (ours.id, ours.score, ours.segmentations) == (theirs.id, theirs.score, theirs.segmentations)
    assert (lines.made["mode"], lines.made["window"], lines.made["linker"]["type"]) == ("window", 4, "TransferLinker")
    overlay = open_video(tmp_path / "overlay.mp4", strict=True)
    assert (len(list(overlay)), overlay.fps) == (T, 12)


@pytest.mark.parametrize("frames", [1, pytest.param(11, marks=pytest.mark.slow), T - 1])
def test_a_run_that_was_stopped_goes_on(tiny_model, source, whole, tmp_path, frames):
    stride, expected = whole
    said: list[str] = []
    with stopping(frames):
        segment(tiny_model, source, tmp_path, stride=stride)
    with pytest.warns(UserWarning, match="stopped or is at work"):
        partly = VideoSegmentation.load(tmp_path)
    assert partly.frames == tuple(range(frames + 1))
    assert (len(partly.tracks) > 0) == (frames > 1)
    segment(tiny_model, source, tmp_path, stride=stride, resume=True, say=said.append)
    assert ("go on after frame" in said[0]) == (frames > 8)
    assert names(tmp_path) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()


def test_a_run_that_is_stopped_again_and_again_goes_on(tiny_model, source, stopped, tmp_path, monkeypatch):
    output = shutil.copytree(stopped, tmp_path / "out")
    for frames in (9, 6):  # after frame 8, then 16; the last time before the overlay is joined
        with stopping(frames):
            segment(tiny_model, source, output, resume=True)
    with monkeypatch.context() as patched:
        patched.setattr(VideoParts, "join", stop)
        with pytest.raises(StopError):
            segment(tiny_model, source, output, resume=True)
    assert "overlay.mp4" not in names(output)
    segment(tiny_model, source, output, resume=True)
    segment(tiny_model, source, tmp_path / "whole")
    assert names(output) == FILES
    for name in FILES:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_complete_result_is_left_alone(tiny_model, source, tmp_path):
    segment(tiny_model, source, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    said: list[str] = []
    moved = shutil.copy2(source, tmp_path.parent / "moved.mp4")  # the same video, elsewhere
    result = segment(tiny_model, Path(moved), tmp_path, resume=True, say=said.append)
    assert result.tracks
    assert said == [f"{tmp_path}: it is complete already, nothing is to be done"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "overlay.mp4").unlink()
    segment(tiny_model, source, tmp_path, resume=True, say=said.append)
    assert "nothing to go on from; start anew" in said[1]
    assert names(tmp_path) == FILES


def test_without_resume_a_run_starts_anew(tiny_model, source, stopped, tmp_path):
    output = shutil.copytree(stopped, tmp_path / "out")
    (output / "overlay.mp4").write_bytes(b"of an earlier run")
    (output / "tracks.json").write_bytes(b"of an earlier run")
    with stopping(2):
        segment(tiny_model, source, output, stride=2)
    assert names(output) == [".unfinished", "tracks.jsonl"]
    with pytest.warns(UserWarning, match="3 frames"):
        assert len(VideoSegmentation.load(output).frames) == 3
    result = segment(tiny_model, source, output, overlay=False)
    assert names(output) == ["tracks.json", "tracks.jsonl"]
    assert len(result.frames) == T


def test_what_fails_before_a_frame_is_final_leaves_earlier_results(tiny_model, source, tmp_path, monkeypatch):
    segment(tiny_model, source, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(ModelOnVideo, "encode_masks", stop)
    with pytest.raises(StopError):
        segment(tiny_model, source, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"window": 6}, "window (4 and not 6)"),
        ({"score_threshold": 0.5}, "score_threshold"),
        ({"linker": TransferLinker(threshold=0.3)}, "threshold (0.4 and not 0.3)"),
        ({"mode": "whole"}, "mode (window and not whole)"),
        ({"overlay": False}, "overlay"),
    ],
)
def test_another_run_is_not_gone_on_with(tiny_model, source, stopped, options, named):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    with pytest.raises(ValueError, match=re.escape(f"{stopped} holds a result of another ")) as error:
        segment(tiny_model, source, stopped, resume=True, **options)
    assert named in str(error.value)
    assert str(error.value).endswith("start anew, without --resume")
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_another_checkpoint_or_video_is_not_gone_on_with(tiny_model, source, stopped, tmp_path):
    other = VideoMask2Former(tiny_model.config).eval()
    with pytest.raises(ValueError, match="another checkpoint; give what it began with"):
        segment(other, source, stopped, resume=True)
    changed = Path(shutil.copy2(source, tmp_path / source.name))
    changed.write_bytes(source.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"another .*bytes"):
        segment(tiny_model, changed, stopped, resume=True)
    options = {"mode": "window", "window": 4, "top_k": 4, "plain": True, "resume": True}
    with pytest.raises(ValueError, match="another frames"):
        segment_to_folder(tiny_model, open_video(source, slice(0, 20)), stopped, **options)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "tracks.jsonl").write_bytes(b""), "tracks.jsonl: line 1: the header is missing"),
        (
            lambda folder: cut(folder / "tracks.jsonl", 3000),
            "is shorter than it was; start anew, without --resume",
        ),
        (lambda folder: (folder / "tracks.jsonl").unlink(), "tracks.jsonl is missing; start anew, without --resume"),
        (lambda folder: cut(folder / ".unfinished" / "state.safetensors", 1000), "state.safetensors is damaged"),
        (lambda folder: (folder / ".unfinished" / "overlay" / "000000.mp4").unlink(), "000000.mp4 is missing"),
        (lambda folder: cut(folder / ".unfinished" / "overlay" / "000000.mp4", 500), "is damaged: "),
    ],
)
def test_damaged_files_are_not_gone_on_with(tiny_model, source, stopped, tmp_path, damage, named):
    output = shutil.copytree(stopped, tmp_path / "out")
    damage(output)
    with pytest.raises(partial.AnotherResultError, match=re.escape(named)):
        segment(tiny_model, source, output, resume=True)
    assert len(segment(tiny_model, source, output).frames) == T


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


class Counting:
    """A linker of one's own that keeps something."""

    threshold, memory, every_query = 0.4, 20, False

    def __init__(self) -> None:
        self.calls = torch.zeros(1, dtype=torch.int64)

    def similarity(self, tracks, window, missed):
        self.calls += 1
        return TransferLinker().similarity(tracks, window, missed) - 0.01 * self.calls


class CountingKept(Counting):
    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"].clone()


def test_what_came_after_the_state_may_be_damaged(tiny_model, source, whole, tmp_path):
    stride, expected = whole
    with stopping(10):
        segment(tiny_model, source, tmp_path, stride=stride)
    with (tmp_path / "tracks.jsonl").open("ab") as file:
        file.write(bytes(100) + b'"}}}\n')  # blocks that were not on the disk when the power went
    segment(tiny_model, source, tmp_path, stride=stride, resume=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize("left", [b"", b'{"format": "m2f-'])
def test_a_run_that_was_stopped_at_once_left_nothing_to_go_on_from(tiny_model, source, tmp_path, left):
    (tmp_path / "tracks.jsonl").write_bytes(left)
    said = []
    result = segment(tiny_model, source, tmp_path, window=12, overlay=False, resume=True, say=said.append)
    assert len(result.frames) == T
    assert said == [f"{tmp_path}: nothing to go on from; start anew"]


@pytest.mark.parametrize(("lost", "frames"), [(1, slice(0, None)), (2, slice(0, None, 2)), (4, slice(4, None))])
def test_a_frame_that_is_lost_at_the_beginning_keeps_the_time(tiny_model, tmp_path, lost, frames):
    path = make_video(tmp_path / "a.avi", "mjpeg", "yuvj420p")
    damage_packet(path, lost)
    with pytest.warns(TruncatedVideoWarning):
        segment_to_folder(tiny_model, open_video(path, frames), tmp_path / "out", mode="window", window=4, plain=True)
    overlay = open_video(tmp_path / "out" / "overlay.mp4")
    assert overlay.fps == Fraction(25, frames.step or 1)
    assert len(list(overlay)) == len(range(*frames.indices(12)))


@pytest.mark.parametrize("overlay", [True, False])
def test_a_video_is_not_removed_with_an_earlier_result(tiny_model, source, tmp_path, overlay):
    video = Path(shutil.copy(source, tmp_path / "overlay.mp4"))
    with pytest.raises(ValueError, match="is what --output would overwrite"):
        segment(tiny_model, video, tmp_path, overlay=overlay)
    assert video.read_bytes() == source.read_bytes()
    assert names(tmp_path) == ["overlay.mp4"]


def test_a_rate_that_no_file_can_state_is_rounded(tiny_model, source, tmp_path):
    reader = open_video(source, slice(0, None, 7))
    reader.fps = Fraction(3599 * 90000, 324_000_001)  # of a telephone's hour
    segment_to_folder(tiny_model, reader, tmp_path / "out", mode="window", plain=True)
    assert float(open_video(tmp_path / "out" / "overlay.mp4").fps) == pytest.approx(float(reader.fps / 7), rel=1e-6)


def test_linkers_of_ones_own(tiny_model, source, tmp_path):
    assert is_resumable(TransferLinker())
    assert not is_resumable(Counting())
    with pytest.raises(ValueError, match=r"Counting cannot be resumed: .*state_dict and load_state_dict"):
        segment(tiny_model, source, tmp_path / "none", linker=Counting(), resume=True)
    assert not (tmp_path / "none").exists()
    with stopping(10):
        segment(tiny_model, source, tmp_path / "none", linker=Counting())
    assert not list((tmp_path / "none").glob(".unfinished/*.safetensors"))
    with stopping(10):
        segment(tiny_model, source, tmp_path / "kept", linker=CountingKept())
    linker = CountingKept()
    segment(tiny_model, source, tmp_path / "kept", linker=linker, resume=True)
    assert linker.calls == 5  # of six windows
    segment(tiny_model, source, tmp_path / "whole", linker=CountingKept())
    assert (tmp_path / "kept" / "tracks.jsonl").read_bytes() == (tmp_path / "whole" / "tracks.jsonl").read_bytes()


def test_what_cannot_be_read_again_is_not_resumed(tiny_model, tmp_path):
    frames = synthetic_frames(3, H, W)
    for video in (frames, iter(frames)):
        with pytest.raises(ValueError, match="cannot be resumed"):
            segment_to_folder(tiny_model, open_video(video), tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_other_modes_start_anew(tiny_model, source, tmp_path):
    said: list[str] = []
    for _ in range(2):
        segment(tiny_model, source, tmp_path, mode="whole", resume=True, say=said.append)
    assert said == [
        f"{tmp_path}: there is no run to go on with in mode whole; start anew",
        f"{tmp_path}: it is complete already, nothing is to be done",
    ]
    assert names(tmp_path) == FILES


def test_a_folder_is_for_one_run(tiny_model, source, tmp_path):
    with locked(tmp_path / LOCK_FILE), pytest.raises(ValueError, match=f"another run is at work in {tmp_path}"):
        segment(tiny_model, source, tmp_path)
    segment(tiny_model, source, tmp_path, overlay=False)
    assert names(tmp_path) == FILES[1:]


def test_a_full_disk_leaves_what_is_final(tiny_model, source, tmp_path, monkeypatch):
    with stopping(10, OSError(errno.ENOSPC, "No space left on device")):
        segment(tiny_model, source, tmp_path / "a")
    append = TracksWriter._append

    def full(self: TracksWriter, row: dict) -> None:
        if row.get("frame") == 9:
            raw, self._file = self._file, Full(self._file)
            try:
                append(self, row)
            finally:
                self._file = raw
        append(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(TracksWriter, "_append", full)
        with pytest.raises(OSError, match="No space left") as error:
            segment(tiny_model, source, tmp_path / "b")
    assert error.value.__notes__ == [
        f"9 frames are final and in {tmp_path / 'b' / 'tracks.jsonl'}; --resume goes on after 8 of them"
    ]
    assert (tmp_path / "b" / "tracks.jsonl").read_bytes().endswith(b"}\n")
    for name in ("a", "b"):
        segment(tiny_model, source, tmp_path / name, resume=True)
    assert (tmp_path / "a" / "tracks.jsonl").read_bytes() == (tmp_path / "b" / "tracks.jsonl").read_bytes()


class Full:
    """A file on a disk with room for ten bytes."""

    def __init__(self, file) -> None:
        self.file, self.room = file, 10

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written, self.room = self.file.write(data[: self.room]), 0
        return written

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_of_a_long_video_there_are_lines_alone(tiny_model, source, tmp_path, monkeypatch):
    (tmp_path / "tracks.json").write_text("of an earlier run")
    for module in (tracks_module, partial):
        monkeypatch.setattr(module, "MOST_JSON_FRAMES", T - 1)
    result = segment(tiny_model, source, tmp_path, overlay=False)
    assert names(tmp_path) == ["tracks.jsonl"]
    assert VideoSegmentation.load(tmp_path).tracks == result.tracks
    assert segment(tiny_model, source, tmp_path, overlay=False, resume=True).tracks == result.tracks


def test_masks_of_all_frames_are_not_in_memory(tiny_model, source, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Watched(dict):
        __hash__ = object.__hash__

    encode = ModelOnVideo.encode_masks

    def watched(self, logits):
        masks = [tuple(None if m is None else Watched(m) for m in track) for track in encode(self, logits)]
        alive.update(mask for track in masks for mask in track if mask is not None)
        most.append(len(alive))
        return masks

    monkeypatch.setattr(ModelOnVideo, "encode_masks", watched)
    segment(tiny_model, source, tmp_path, overlay=False)
    assert len(most) == 6
    assert max(most[2:]) <= 2 * max(most[:2])  # of two windows, however many there are


def test_the_last_line_names_every_track(tiny_model, source, tmp_path):
    everything = segment(tiny_model, source, tmp_path / "all", top_k=50)
    best = segment(tiny_model, source, tmp_path / "best", top_k=1)
    loaded = VideoSegmentation.load(tmp_path / "best", every_track=True)
    likeliest = {}
    for track in everything.tracks:  # of one with several classes the best is first
        likeliest.setdefault(track.query_id, track)
    others = [likeliest[id_] for id_ in likeliest if id_ not in {track.query_id for track in best.tracks}]
    assert others  # or this would test nothing
    assert {track.query_id for track in loaded.tracks} == set(likeliest)
    assert list(loaded.tracks) == [*best.tracks, *others]
    assert VideoSegmentation.load(tmp_path / "best" / "tracks.jsonl").tracks == best.tracks
    with pytest.raises(ValueError, match=r"left out are in tracks\.jsonl alone"):
        VideoSegmentation.load(tmp_path / "best" / "tracks.json", every_track=True)
    lines = (tmp_path / "best" / "tracks.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="does not say which tracks were left out"):
        VideoSegmentation.load(tmp_path / "cut.jsonl", every_track=True)

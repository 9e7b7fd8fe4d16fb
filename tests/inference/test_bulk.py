"""Many videos into one folder, by one process or several."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_video import VideoSegmentation, read_video
from m2f_video.files import locked
from m2f_video.inference import bulk
from m2f_video.inference import partial as growing
from m2f_video.inference.bulk import Outcome, segment_many
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.processor import VideoProcessor
from m2f_video.video import VideoWriter
from tests.video.test_read_once import damage_packet
from tests.video.test_video_io import make_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of three videos, one a folder of frames."""
    folder = tmp_path_factory.mktemp("videos")
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 48, 3), dtype=np.uint8)
    for name, pixels in zip(("a", "b"), frames, strict=False):
        with VideoWriter(folder / f"{name}.mp4", 12, 48, 32) as writer:
            for frame in pixels:
                writer.write(frame)
    (folder / "c").mkdir()
    for index, frame in enumerate(frames[2]):
        Image.fromarray(frame).save(folder / "c" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def single(tiny_model, videos, tmp_path_factory) -> Path:
    """What one process makes of them."""
    output = tmp_path_factory.mktemp("single") / "out"
    assert states(segment_many(tiny_model, videos, output)) == dict.fromkeys("abc", "done")
    return output


def states(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


def entries(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


def assert_whole(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert names >= {"overlay.mp4", "tracks.json"}
    assert not [name for name in names if name[0] == "."]  # what is not finished


def assert_equal_results(output: Path, expected: Path) -> None:
    assert sorted(file.name for file in output.iterdir()) == ["a", "b", "c", "manifest.jsonl"]
    for name in "abc":
        assert_whole(output / name)
        ours, theirs = (VideoSegmentation.load(folder / name) for folder in (output, expected))
        assert ours == theirs
        np.testing.assert_array_equal(*(read_video(folder / name / "overlay.mp4") for folder in (output, expected)))


def test_each_video_has_a_folder_and_a_line(tiny_model, videos, single):
    header, *rows = entries(single)
    assert header["made_from"]["options"]["overlay"] is True
    assert [(row["video"], row["state"], row["frames"], row["tracks"]) for row in rows] == [
        (name, "done", 3, 10) for name in "abc"
    ]
    assert rows[0]["files"] == sorted(file.name for file in (single / "a").iterdir())
    assert rows[0]["source"]["path"] == str(videos / "a.mp4")
    assert rows[0]["seconds"] > 0
    assert_equal_results(single, single)


def test_what_is_done_is_skipped_and_what_changed_is_not(tiny_model, videos, tmp_path):
    shutil.copytree(videos, tmp_path / "in")
    assert segment_many(tiny_model, tmp_path / "in", tmp_path / "out", overlay=False)[0].state == "done"
    os.utime(tmp_path / "in" / "a.mp4", ns=(1, 1))
    (tmp_path / "out" / "b" / "tracks.json").unlink()
    calls, said = [], []
    outcomes = segment_many(
        tiny_model,
        tmp_path / "in",
        tmp_path / "out",
        overlay=False,
        progress=lambda *call: calls.append(call),
        report=said.append,
    )
    assert states(outcomes) == {"a": "done", "b": "done", "c": "skipped"}
    assert said == outcomes
    assert [call for call in calls if call[0] == "videos"] == [("videos", done, 3) for done in range(4)]
    assert ("frames", 3, 3) in calls
    assert (outcomes[2].frames, outcomes[2].tracks) == (3, 10)


def test_results_go_into_the_folder_of_the_videos_too(tiny_model, videos, tmp_path):
    for output in (Path(), Path("out")):
        shutil.copytree(videos, tmp_path / "in", dirs_exist_ok=True)
        outcomes = segment_many(tiny_model, tmp_path / "in", tmp_path / "in" / output, overlay=False)
        if output == Path():  # where the result of c has the place of its frames
            assert states(outcomes) == {"a": "done", "b": "done", "c": "failed"}
            assert "c is where its result would go; give --output another folder" in outcomes[2].error
            continue
        again = segment_many(tiny_model, tmp_path / "in", tmp_path / "in" / output, overlay=False)
        assert states(again) == dict.fromkeys("abc", "skipped")


def test_a_bad_video_does_not_stop_the_others(tiny_model, videos, tmp_path, recwarn):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes((videos / "a.mp4").read_bytes()[:-100])
    damage_packet(make_video(tmp_path / "damaged.avi", "mjpeg", "yuvj420p"), 4)
    paths = [tmp_path / "text.mp4", tmp_path / "nowhere.mp4", tmp_path / "damaged.avi", videos / "b.mp4"]
    outcomes = segment_many(tiny_model, paths, tmp_path / "out", overlay=False, frames=slice(0, 9))
    assert states(outcomes) == {"text": "failed", "nowhere": "failed", "damaged": "done", "b": "done"}
    assert "text.mp4" in outcomes[0].error
    assert "nowhere.mp4" in outcomes[1].error
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["b", "damaged", "manifest.jsonl"]
    assert VideoSegmentation.load(tmp_path / "out" / "damaged").frames == (0, 1, 2, 3, 5, 6, 7, 8)
    assert not recwarn.list  # all of those nine frames have come

    (tmp_path / "text.mp4").write_bytes((videos / "a.mp4").read_bytes())
    again = segment_many(tiny_model, paths, tmp_path / "out", overlay=False, frames=slice(0, 9))
    assert states(again) == {"text": "done", "nowhere": "failed", "damaged": "skipped", "b": "skipped"}


def test_warnings_are_shown_and_noted(tiny_model, videos, tmp_path):
    both = tmp_path / "both.ts"  # a size, and then another one
    for height, width in ((32, 48), (48, 32)):
        with VideoWriter(tmp_path / "part.ts", 12, width, height) as writer:
            for frame in np.zeros((3, height, width, 3), np.uint8):
                writer.write(frame)
        with both.open("ab") as file:
            file.write((tmp_path / "part.ts").read_bytes())
    with pytest.warns(UserWarning, match="--frames 3:"):
        (outcome,) = segment_many(tiny_model, [both], tmp_path / "out", overlay=False)
    assert (outcome.state, outcome.frames) == ("done", 3)
    (warning,) = entries(tmp_path / "out")[1]["warnings"]
    assert warning.startswith(f"{both}: frame 3 is 32x48")
    (outcome,) = segment_many(tiny_model, [both], tmp_path / "strict", overlay=False, strict=True)
    assert (outcome.state, "frame 3 is 32x48" in outcome.error) == ("failed", True)


def test_a_source_that_changes_while_it_is_read_is_no_result(tiny_model, videos, tmp_path, monkeypatch):
    source = tmp_path / "growing.mp4"
    shutil.copy(videos / "a.mp4", source)

    def grow(*_: Any) -> None:
        with source.open("ab") as file:
            file.write(b"\0")

    (outcome,) = segment_many(tiny_model, [source], tmp_path / "out", overlay=False, progress=grow)
    assert (outcome.state, "has changed while it was read" in outcome.error) == ("failed", True)


def test_results_of_other_options_or_another_model_stop_at_once(tiny_model, videos, single):
    before = (single / "manifest.jsonl").read_bytes()
    for options, named in (
        ({"top_k": 3}, "top_k"),
        ({"overlay": False}, "overlay"),
        ({"frames": slice(0, 2)}, "frames"),
        ({"strict": True}, "strict"),
        ({"linker": "embedding"}, "linker.type"),
    ):
        with pytest.raises(ValueError, match=f"made with another {named} .*--output"):
            segment_many(tiny_model, videos, single, **options)
    with pytest.raises(ValueError, match=r"another checkpoint \(.* and not other"):
        segment_many(type(tiny_model)(tiny_model.config), videos, single, checkpoint="other")
    smaller = VideoProcessor(replace(tiny_model.config.preprocessing, shortest_edge=32), tiny_model.config.labels)
    with pytest.raises(ValueError, match=r"another shortest_edge \(64 and not 32\)"):
        segment_many(tiny_model, videos, single, processor=smaller)
    assert (single / "manifest.jsonl").read_bytes() == before


def test_another_video_of_the_same_name_is_not_replaced(tiny_model, videos, tmp_path):
    for place, source in (("one", "a"), ("moved", "a"), ("other", "b")):
        (tmp_path / place).mkdir()
        shutil.copy2(videos / f"{source}.mp4", tmp_path / place / "clip.mp4")
    one, moved, other = ([tmp_path / place / "clip.mp4"] for place in ("one", "moved", "other"))
    assert states(segment_many(tiny_model, one, tmp_path / "out", overlay=False)) == {"clip": "done"}
    assert states(segment_many(tiny_model, moved, tmp_path / "out", overlay=False)) == {"clip": "skipped"}
    with pytest.raises(ValueError, match=r"clip holds the result of .*/one/clip.mp4, .* --output another folder"):
        segment_many(tiny_model, other, tmp_path / "out", overlay=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"window": 0}, "window"),
        ({"mode": "fast"}, "mode"),
        ({"top_k": 0}, "top_k"),
        ({"frames_per_chunk": 0}, "chunk"),
    ],
)
def test_a_bad_option_stops_before_the_work(tiny_model, videos, tmp_path, options, named, monkeypatch):
    monkeypatch.setattr(bulk, "segment_to_folder", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=named):
        segment_many(tiny_model, videos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), RuntimeError("a defect")]
)
def test_what_the_next_video_would_meet_too_stops_everything(tiny_model, videos, tmp_path, monkeypatch, error):
    segmented = bulk.segment_to_folder
    begun = []

    def stop(model, reader, output, **options):
        begun.append(output.name)
        if output.name == "b":
            raise error
        return segmented(model, reader, output, **options)

    monkeypatch.setattr(bulk, "segment_to_folder", stop)
    with pytest.raises(type(error)):
        segment_many(tiny_model, videos, tmp_path / "out", overlay=False)
    assert begun == ["a", "b"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a", "manifest.jsonl"]
    monkeypatch.undo()
    again = segment_many(tiny_model, videos, tmp_path / "out", overlay=False)
    assert states(again) == {"a": "skipped", "b": "done", "c": "done"}


def test_stopping_before_anything_is_done_leaves_nothing(tiny_model, videos, tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bulk, "segment_to_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        segment_many(tiny_model, videos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_video_that_memory_does_not_suffice_for_is_one_that_failed(tiny_model, videos, tmp_path, monkeypatch, error):
    def exhausted(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(bulk, "segment_to_folder", exhausted)
    outcomes = segment_many(tiny_model, videos, tmp_path / "out")
    assert {(outcome.state, "out of memory" in outcome.error) for outcome in outcomes} == {("failed", True)}


# -- several processes


def held_in_the_middle(model, videos: Path, output: Path, begun: Any) -> None:
    """A process that never gets past the middle of the second video."""
    segmented = bulk.segment_to_folder

    def stop(model, reader, folder, **options):
        if folder.name != "b":
            return segmented(model, reader, folder, **options)
        for name in ("tracks.json", ".overlay.0123abcd.mp4"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text("half")
        begun.set()
        time.sleep(600)
        raise AssertionError("nobody killed it")

    bulk.segment_to_folder = stop
    segment_many(model, videos, output)


def test_the_videos_of_a_process_that_is_killed_are_taken_over(tiny_model, videos, single, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    arguments = (tiny_model, videos, tmp_path / "out", begun)
    process = context.Process(target=held_in_the_middle, args=arguments, daemon=True)
    process.start()
    assert begun.wait(60)
    waited = []

    def kill(seconds: float) -> None:
        waited.append(seconds)
        process.kill()
        process.join()

    monkeypatch.setattr(bulk.time, "sleep", kill)
    outcomes = segment_many(tiny_model, videos, tmp_path / "out")
    assert waited[:1] == [bulk.POLL_SECONDS]  # when nothing else was left
    assert {outcome.name: (outcome.state, outcome.here) for outcome in outcomes} == {
        "a": ("skipped", False),  # before this one began
        "b": ("done", True),
        "c": ("done", True),
    }
    assert_equal_results(tmp_path / "out", single)


@pytest.mark.parametrize("changed", [False, True])
def test_a_video_that_was_stopped_goes_on_unless_it_has_changed(tiny_model, videos, tmp_path, monkeypatch, changed):
    source = Path(shutil.copy2(videos / "a.mp4", tmp_path / "a.mp4"))
    monkeypatch.setattr(growing, "KEPT_EVERY", 2)
    encoded, encode = [], ModelOnVideo.encode_masks

    def stop(self, logits):
        encoded.append(logits)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode(self, logits)

    monkeypatch.setattr(ModelOnVideo, "encode_masks", stop)
    with pytest.raises(KeyboardInterrupt):
        segment_many(tiny_model, [source], tmp_path / "out", mode="window", window=1)
    assert (tmp_path / "out" / "a" / ".unfinished" / "state.safetensors").exists()
    if changed:
        os.utime(source, ns=(5, 5))
    outcomes = segment_many(tiny_model, [source], tmp_path / "out", mode="window", window=1)
    assert [(outcome.state, outcome.frames) for outcome in outcomes] == [("done", 3)]
    assert len(encoded) - 3 == (3 if changed else 1)


class Counting:
    """A linker that keeps something: how often it was asked."""

    threshold, memory, every_query = 0.4, 0, False
    calls = 0

    def similarity(self, tracks, window, missed):
        self.calls += 1
        return torch.full((len(tracks), len(window.queries)), float(self.calls == 1))

    def state_dict(self):
        return {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state):
        self.calls = int(state["calls"])


def test_a_linker_keeps_nothing_of_other_videos(tiny_model, videos, tmp_path):
    for name in "ab":
        shutil.copy(videos / "a.mp4", tmp_path / f"{name}.mp4")
    segment_many(
        tiny_model,
        tmp_path,
        tmp_path / "out",
        mode="window",
        window=1,
        linker=Counting(),
        overlay=False,
        max_overlap=1.0,
    )
    ours, theirs = (VideoSegmentation.load(tmp_path / "out" / name) for name in "ab")
    assert ours.tracks == theirs.tracks
    assert any(track.num_frames_visible == 2 for track in ours.tracks)


def test_processes_share_the_videos(tiny_model, videos, single, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=segment_many, args=(tiny_model, videos, tmp_path / "out")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(row["video"] for row in entries(tmp_path / "out")[1:]) == ["a", "b", "c"]  # each once
    assert_equal_results(tmp_path / "out", single)


def test_what_failed_elsewhere_meanwhile_is_not_tried_again(tiny_model, videos, tmp_path, monkeypatch):
    (tmp_path / "text.mp4").write_text("no video")
    paths = [videos / "b.mp4", tmp_path / "text.mp4"]
    tried, segmented = [], bulk.open_video

    def another_first(path, *args, **options):
        tried.append(path.name)
        if tried == ["b.mp4"]:  # another process, while this one is at the first
            segment_many(tiny_model, paths[1:], tmp_path / "out", overlay=False)
        return segmented(path, *args, **options)

    monkeypatch.setattr(bulk, "open_video", another_first)
    outcomes = segment_many(tiny_model, paths, tmp_path / "out", overlay=False)
    assert tried == ["b.mp4", "text.mp4"]
    assert [(outcome.state, outcome.here) for outcome in outcomes] == [("done", True), ("failed", False)]
    assert segment_many(tiny_model, paths, tmp_path / "out", overlay=False)[1].here  # in another run it is


def test_a_lock_is_one_processes_at_a_time(tmp_path):
    with locked(tmp_path / "lock") as first, locked(tmp_path / "lock") as second:
        assert (first, second) == (True, False)
    with locked(tmp_path / "lock") as again:
        assert again
    assert list(tmp_path.iterdir()) == []

"""The folder of a run: what may be there, who may write there, and what a run goes on from."""

import errno
import fcntl
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f_video.data import SyntheticVideos, YouTubeVis, write_youtube_vis
from m2f_video.training import OptimConfig, TrainConfig, Trainer, Worker
from m2f_video.training.batches import ClipOrder
from m2f_video.training.checkpoint import list_checkpoints
from tests.training.tiny_run import (
    CONFIG,
    VIDEOS,
    assert_same_end,
    copy_stopped_run,
    train,
    train_until,
)


def test_a_folder_with_other_things_in_it_keeps_them(tmp_path: Path) -> None:
    others = (".train.yaml", ".log.old.csv", ".evaluation.1.csv", "notes.txt", "checkpoints/mine.pt")
    (tmp_path / "checkpoints").mkdir()
    for name in others:
        (tmp_path / name).write_text("mine")
    train(tmp_path, CONFIG.replace(steps=1, optim=OptimConfig()))
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


@pytest.mark.parametrize("name", ["", "checkpoints", "final", "best", "tensorboard"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_place_of_a_folder_is_refused_before_the_work(name: str, resume: bool, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    with pytest.raises(NotADirectoryError, match=f"^{output / name} is a file, where a training run needs a folder"):
        Trainer(CONFIG, VIDEOS, output, resume=resume)
    assert (output / name).read_text() == "mine"
    assert [file.name for file in tmp_path.rglob("*")] == ["run", name][: 1 + bool(name)]


@pytest.mark.parametrize("name", ["log.csv", "evaluation.csv", "train.json", ".lock"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path / name} is a folder, where a training run needs a file"):
        Trainer(CONFIG, VIDEOS, tmp_path, resume=True)
    assert [file.name for file in tmp_path.rglob("*")] == [name]


BUSY = "another training run is at work in {}; wait for its end, or write elsewhere"


def test_a_run_has_its_folder_for_itself(tmp_path: Path) -> None:
    made = Trainer(CONFIG, VIDEOS, tmp_path)
    for resume in (False, True):
        with pytest.raises(ValueError, match=BUSY.format(tmp_path)):
            train(tmp_path, resume=resume)
    other = Trainer(CONFIG, VIDEOS, tmp_path, worker=Worker(1, 2, torch.device("cpu")))  # who shares in the same run
    other.close()
    made.train()
    assert not (tmp_path / ".lock").exists()
    train(tmp_path, resume=True)


def fail(tmp_path: Path) -> None:
    train_until(1, tmp_path)


def refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another seed"):
        Trainer(CONFIG.replace(seed=9), VIDEOS, tmp_path, resume=True)


def close(tmp_path: Path) -> None:
    made = Trainer(CONFIG, VIDEOS, tmp_path, resume=True)
    made.close()
    made.close()


def forget(tmp_path: Path) -> None:
    Trainer(CONFIG, VIDEOS, tmp_path, resume=True)


def test_a_run_that_ends_somehow_lets_others_in(whole: Path, tmp_path: Path) -> None:
    for end in (fail, refuse, close, forget):
        end(tmp_path)
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


def wait_for_ever(output: Path, begun: Any) -> None:
    made = Trainer(CONFIG.replace(num_workers=2), VIDEOS, output)
    made._begin()
    next(made._batches)  # by processes that outlive this one for some seconds
    begun.set()
    time.sleep(60)


def test_a_run_that_was_killed_can_be_resumed_at_once(whole: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=wait_for_ever, args=(tmp_path, begun))
    process.start()
    assert begun.wait(30)
    with pytest.raises(ValueError, match=BUSY.format(tmp_path)):
        train(tmp_path, resume=True)
    process.kill()
    process.join()
    assert (tmp_path / ".lock").exists()
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=f"{tmp_path} cannot be locked: let no second run write there"):
        train(tmp_path, CONFIG.replace(steps=1, optim=OptimConfig()))


def test_a_folder_that_holds_a_run_is_left_alone(whole: Path, tmp_path: Path) -> None:
    copy_stopped_run(1, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    for output in (tmp_path / "run", whole):
        with pytest.raises(ValueError, match=f"^{output} holds a training run already; go on with it by resume"):
            train(output)
    with pytest.raises(ValueError, match="holds a training run already"):
        train(tmp_path / "run", CONFIG.replace(seed=1))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_another_config_is_named(tmp_path: Path) -> None:
    copy_stopped_run(1, tmp_path)
    with pytest.raises(ValueError, match=r"has another steps, seed; resume it with the config .*train\.json"):
        train(tmp_path, CONFIG.replace(steps=9, seed=1), resume=True)
    deeper = CONFIG.to_dict()
    deeper["model"]["transformer_decoder"]["num_layers"] = 3
    with pytest.raises(ValueError, match=r"has another model\.transformer_decoder\.num_layers;"):
        train(tmp_path, TrainConfig.from_dict(deeper), resume=True)
    assert TrainConfig.from_file(tmp_path / "train.json") == CONFIG


def test_other_data_are_refused(tmp_path: Path) -> None:
    copy_stopped_run(1, tmp_path)
    for videos in (SyntheticVideos(3, num_frames=4, height=32, width=64), SyntheticVideos(4, seed=1, num_frames=4)):
        with pytest.raises(ValueError, match=r"the training videos are not those that the run in .* began with"):
            train(tmp_path, videos=videos, resume=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_youtube_vis(VIDEOS, tmp_path / "data")
    return tmp_path / "data"


def test_annotations_that_were_edited_are_refused(data: Path, tmp_path: Path) -> None:
    train_until(1, tmp_path / "run", videos=YouTubeVis(data))
    file = data / "train.json"
    original = file.read_text()
    content = json.loads(original)
    content["annotations"][0]["category_id"] = 1 + content["annotations"][0]["category_id"] % 10
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotations, labels or videos have changed"):
        train(tmp_path / "run", videos=YouTubeVis(data), resume=True)
    file.write_text(original)
    Trainer(CONFIG, YouTubeVis(data), tmp_path / "run", resume=True)


def test_a_frame_that_was_deleted_is_named(data: Path, tmp_path: Path) -> None:
    train_until(1, tmp_path / "run", videos=YouTubeVis(data))
    step_2 = next(iter(ClipOrder(4, batch_size=2, steps=(1, 2), seed=0)))
    name = f"{step_2[0][0]:06d}"
    for file in (data / "JPEGImages" / name).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f"^{data / 'JPEGImages' / name}/0000.\\.jpg: cannot read the frame"):
        train(tmp_path / "run", videos=YouTubeVis(data), resume=True)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [0, 1]


def test_a_batch_that_cannot_be_divided_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=2 cannot be divided among 3 workers"):
        Trainer(CONFIG, VIDEOS, tmp_path / "run", worker=Worker(0, 3, torch.device("cpu")))
    assert not (tmp_path / "run").exists()

"""A run that was stopped, however, ends with the weights of one that was not, to the bit."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f_video.data import SyntheticVideos, YouTubeVis, write_youtube_vis
from m2f_video.training import TrainConfig, Trainer, Worker
from m2f_video.training.batches import ClipOrder
from m2f_video.training.checkpoint import CheckpointWarning, list_checkpoints, load_latest_checkpoint
from tests.training.tiny_run import CONFIG, VIDEOS, final_weights, rows, train, train_until


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    output = tmp_path_factory.mktemp("whole")
    train(output)
    return output


def assert_same_end(output: Path, whole: Path) -> None:
    assert final_weights(output) == final_weights(whole)
    assert rows(output) == rows(whole)
    ours, theirs = load_latest_checkpoint(output), load_latest_checkpoint(whole)
    assert flat(ours) == flat(theirs)


def flat(state: Any) -> Any:
    """A checkpoint's content, in a form that compares bit by bit; the config may differ in what is free to change."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.flatten().contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items() if key != "config"}
    return [flat(value) for value in state] if isinstance(state, list) else state


def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_until(2, tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    capsys.readouterr()
    train(tmp_path, resume=True)
    assert f"{tmp_path}: resume after step 2\n" in capsys.readouterr().out
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(
    "config",
    [CONFIG.replace(precision="float16"), CONFIG.replace(accumulation=2, activation_checkpointing=True)],
    ids=["float16", "accumulation"],
)
def test_every_state_is_resumed(config: TrainConfig, tmp_path: Path) -> None:
    train(tmp_path / "whole", config)
    train_until(2, tmp_path / "stopped", config)
    train(tmp_path / "stopped", config, resume=True)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    scaler = (load_latest_checkpoint(tmp_path / "whole") or {})["scaler"]
    assert (scaler["scale"] < 65536) if config.precision == "float16" else scaler == {}


def test_a_batch_norms_statistics_are_resumed(tmp_path: Path) -> None:
    config = CONFIG.replace(model=CONFIG.model.replace(backbone="timm:test_resnet"))
    train(tmp_path / "whole", config)
    train_until(1, tmp_path / "stopped", config)
    train(tmp_path / "stopped", config, resume=True)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_what_the_weights_do_not_depend_on_may_change(whole: Path, tmp_path: Path) -> None:
    train_until(2, tmp_path, CONFIG.replace(num_workers=1))
    other = CONFIG.replace(num_workers=0, log_every=1, checkpoint_every=2, keep_checkpoints=1)
    train(tmp_path, other, resume=True)
    assert_same_end(tmp_path, whole)
    assert TrainConfig.from_file(tmp_path / "train.json") == other


def test_other_validation_videos_are_refused(tmp_path: Path) -> None:
    train_until(2, tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"the validation videos are not those that the run in .* began with"):
        train(tmp_path, CONFIG, validation=VIDEOS, resume=True)


def test_evaluating_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluate_every=2, but there are no validation videos"):
        train(tmp_path / "run", CONFIG.replace(evaluate_every=2))
    assert not (tmp_path / "run").exists()


def test_a_kill_between_a_checkpoint_and_its_best_weights(tmp_path: Path) -> None:
    config = CONFIG.replace(evaluate_every=1)
    train(tmp_path / "whole", config, validation=VIDEOS)
    train_until(1, tmp_path / "killed", config, validation=VIDEOS)  # whose best/ is not written yet
    assert not (tmp_path / "killed" / "best").exists()
    (tmp_path / "killed" / ".train.01234567.json").touch()
    made = Trainer(config, VIDEOS, tmp_path / "killed", validation=VIDEOS, resume=True)
    made._begin()
    assert (tmp_path / "killed" / "best" / "model.safetensors").exists()
    assert not list((tmp_path / "killed").glob(".*"))
    made.train()
    best = ["whole", "killed"]
    assert len({(tmp_path / name / "best" / "model.safetensors").read_bytes() for name in best}) == 1


def test_stopping_at_every_step(whole: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        train_until(step, tmp_path, resume=True)
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


def test_a_kill_while_a_checkpoint_is_written(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """Ends the process where it stands: not even the temporary file is removed."""

    replace = os.replace

    def kill(temporary: Path, final: Path) -> None:
        if final.name == "step-00000003.pt":
            shutil.copy(temporary, temporary.with_name(".step-00000003.killed.pt"))
            raise Killed
        replace(temporary, final)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            train(tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    assert len(rows(tmp_path)) == 3  # a step that the resumed run does again
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)
    assert [file.name for file in (tmp_path / "checkpoints").glob(".*")] == []


def test_a_kill_before_the_model_is_left(whole: Path, tmp_path: Path) -> None:
    train_until(3, tmp_path)
    assert not (tmp_path / "final").exists()
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)
    train(tmp_path, resume=True)  # of a run that has ended: nothing is left to do
    assert_same_end(tmp_path, whole)


def test_a_log_that_a_kill_cut_short(whole: Path, tmp_path: Path) -> None:
    train_until(2, tmp_path)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("3,4.2")
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("content", ["", "step,lo"])
def test_a_log_that_is_cut_within_its_header(content: str, tmp_path: Path) -> None:
    train_until(1, tmp_path)
    (tmp_path / "log.csv").write_text(content)
    train(tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "3"]


@pytest.mark.parametrize("size", [0, 0.5], ids=["empty", "half"])
def test_a_damaged_checkpoint_is_passed_over(size: float, whole: Path, tmp_path: Path) -> None:
    train_until(2, tmp_path)
    file = tmp_path / "checkpoints" / "step-00000002.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(size * len(content))])
    with pytest.warns(CheckpointWarning, match=f"{file} is damaged"):
        train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


def test_without_a_readable_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    train_until(2, tmp_path)
    for _, file in list_checkpoints(tmp_path):
        file.write_bytes(b"")
    log = (tmp_path / "log.csv").read_text()
    with pytest.warns(CheckpointWarning), pytest.raises(ValueError, match="none of the 2 checkpoints"):
        train(tmp_path, resume=True)
    assert (tmp_path / "log.csv").read_text() == log


def test_nothing_to_resume_begins(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", resume=True)
    assert f"{tmp_path / 'run'}: there is no checkpoint yet; begin\n" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", whole)


def test_a_folder_that_holds_a_run_is_left_alone(whole: Path, tmp_path: Path) -> None:
    train_until(1, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    for output in (tmp_path / "run", whole):
        with pytest.raises(ValueError, match=f"^{output} holds a training run already; go on with it by resume"):
            train(output)
    with pytest.raises(ValueError, match="holds a training run already"):
        train(tmp_path / "run", CONFIG.replace(seed=1))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_another_config_is_named(tmp_path: Path) -> None:
    train_until(1, tmp_path)
    with pytest.raises(ValueError, match=r"has another steps, seed; resume it with the config .*train\.json"):
        train(tmp_path, CONFIG.replace(steps=9, seed=1), resume=True)
    deeper = CONFIG.to_dict()
    deeper["model"]["transformer_decoder"]["num_layers"] = 3
    with pytest.raises(ValueError, match=r"has another model\.transformer_decoder\.num_layers;"):
        train(tmp_path, TrainConfig.from_dict(deeper), resume=True)
    assert TrainConfig.from_file(tmp_path / "train.json") == CONFIG


def test_other_data_are_refused(tmp_path: Path) -> None:
    train_until(1, tmp_path)
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

"""A run that was stopped, however, ends with the weights of one that was not, to the bit."""

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f_video.training import TrainConfig, Trainer
from m2f_video.training.checkpoint import CheckpointWarning, list_checkpoints, load_latest_checkpoint
from tests.training.tiny_run import CONFIG, VIDEOS, assert_same_end, copy_stopped_run, rows, train, train_until


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
    copy_stopped_run(2, tmp_path)
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
    assert not list((tmp_path / "killed").glob(".train.*"))
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


# What is in the latest checkpoint, and what is said of it

FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no config": (lambda state: state.pop("config"), r"\(it has no config"),
    "config": (lambda state: state.update(config=5), r"\(its config is a int"),
    "config's text": (lambda state: state.update(config="{"), r"\(its config is not JSON"),
    "config's fields": (lambda state: state.update(config='{"steps": "x"}'), "steps"),
    "no data": (lambda state: state.pop("data"), r"\(it has no data"),
    "no workers": (lambda state: state.pop("workers"), r"\(it has no workers"),
    "data": (lambda state: state.update(data=[1]), r"\(its data is a list"),
    "no model": (lambda state: state.pop("model"), r"\(it has no model"),
    "model": (lambda state: state.update(model=[1]), r"\(its model is a list"),
    "a weight less": (lambda state: state["model"].popitem(), "model is not"),
    "a weight more": (lambda state: state["model"].update(more=torch.zeros(1)), "model is not"),
    "a weight's name": (lambda state: state["model"].update({5: torch.zeros(1)}), "has no weights at"),
    "a weight's type": (lambda state: first(state["model"], lambda weight: weight.tolist()), "has no weights at"),
    "a weight's shape": (lambda state: first(state["model"], lambda weight: weight[None]), "model is not"),
    "a weight's dtype": (lambda state: first(state["model"], lambda weight: weight.long()), "model is not"),
    "a weight's layout": (lambda state: first(state["model"], torch.Tensor.to_sparse), "has no weights at"),
    "a weight's device": (lambda state: first(state["model"], lambda weight: weight.to("meta")), "has no weights at"),
    "average": (lambda state: state.update(average=None), "average is not"),
    "scaler": (lambda state: state.update(scaler={"scale": "1"}), r"\(its scaler is not"),
    "best": (lambda state: state.update(best={"step": "one"}), r"\(its best evaluation"),
    "no optimizer": (lambda state: state.pop("optimizer"), r"\(it has no optimizer"),
    "optimizer": (lambda state: state.update(optimizer=None), r"\(its optimizer is a"),
    "moments": (lambda state: state["optimizer"].update(state=[1]), r"\(its optimizer is not"),
    "moments of nothing": (lambda state: state["optimizer"]["state"].update({999: {}}), "optimizer is not"),
    "a moment less": (lambda state: state["optimizer"]["state"][0].pop("exp_avg"), "optimizer is not"),
    "a moment's shape": (
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)), "optimizer is not"
    ),
}  # fmt: skip


def first(weights: dict[str, torch.Tensor], change: Callable[[torch.Tensor], object]) -> None:
    name = next(iter(weights))
    weights.update({name: change(weights[name])})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stopped")
    copy_stopped_run(1, output)
    return output


OF_A_KIND = ("no config", "config's fields", "a weight less", "a weight's type", "average", "best", "moments")
"""The others are told where one of these is."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in OF_A_KIND else pytest.mark.slow) for kind in FOREIGN]
)
def test_a_checkpoint_of_another_form_is_named(kind: str, stopped: Path, tmp_path: Path) -> None:
    spoil, message = FOREIGN[kind]
    file = stopped / "checkpoints" / "step-00000001.pt"
    state = torch.load(file)
    spoil(state)
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / file.name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        with pytest.raises(ValueError) as raised:
            Trainer(CONFIG, VIDEOS, tmp_path, resume=True)
    said = [*(str(warning.message) for warning in caught), str(raised.value)]
    assert re.search(message, said[0])
    assert len(said) == 1 or "none of the 1 checkpoints" in said[1]
    assert all(len(line) < 300 + len(str(tmp_path)) for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_groups_of_the_optimiser_are_those_of_the_config(whole: Path, tmp_path: Path) -> None:
    copy_stopped_run(2, tmp_path)
    file = tmp_path / "checkpoints" / "step-00000002.pt"
    state = torch.load(file)
    for group in state["optimizer"]["param_groups"]:
        group |= {"weight_decay": 9.0, "betas": "none", "lr_factor": 0.0}
    torch.save(state, file)
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("size", [0, 0.5], ids=["empty", "half"])
def test_a_damaged_checkpoint_is_passed_over(size: float, whole: Path, tmp_path: Path) -> None:
    copy_stopped_run(2, tmp_path)
    file = tmp_path / "checkpoints" / "step-00000002.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(size * len(content))])
    with pytest.warns(CheckpointWarning, match=f"{file} is damaged"):
        train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


def test_without_a_readable_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    copy_stopped_run(2, tmp_path)
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

"""`m2f-video train`, end to end."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from m2f_video import VideoMask2Former
from m2f_video.cli.main import main
from m2f_video.config import TimmBackboneConfig
from m2f_video.data import SyntheticVideos, write_youtube_vis
from m2f_video.training import TRAIN_PRESETS, TrainConfig, Trainer, trainer
from m2f_video.training.checkpoint import load_latest_checkpoint
from tests.tolerances import identical
from tests.training.tiny_run import CONFIG, VIDEOS, final_weights, rows
from weights_convert import to_native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a config, and the run of both."""
    folder = tmp_path_factory.mktemp("train")
    write_youtube_vis(VIDEOS, folder / "data")
    (folder / "config.json").write_text(CONFIG.to_json())
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run(*arguments: object) -> int:
    try:
        return main(["train", *map(str, arguments)])
    except SystemExit as exit_:  # the parser's own way out
        return int(exit_.code or 0)


def run_tiny(folder: Path, output: Path, *options: object) -> int:
    return run(
        "--config", folder / "config.json", "--data", folder / "data", "--output", output, "--device", "cpu", *options
    )


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    save = Trainer._save

    def stopping(made: Trainer) -> None:
        save(made)
        if made.steps_done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", stopping)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("m2f-video: error: ")
    assert error.count("\n") == 1
    return error


def test_a_run_and_its_resumption(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    validation = ("--validation", folder / "data", "--validation-videos", 2, "--evaluate-every", 2)
    assert run_tiny(folder, whole, *validation) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    assert "0.4 million parameters, 4 videos, on cpu\n" in printed
    assert f"written to {whole / 'final'}; the best, of step 2, is {whole / 'best'}\n" in printed
    assert [line.split()[:2] for line in printed.splitlines()][1:5:2] == [["step", "2/3"], ["step", "3/3"]]
    assert "evaluation after step 3:  AP " in printed
    model = VideoMask2Former.from_pretrained(whole / "final")
    assert model.config == CONFIG.model
    assert identical(VideoMask2Former.from_pretrained(whole / "best"), model) is False

    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run_tiny(folder, stopped, *validation) == 130
    assert capsys.readouterr().err == "m2f-video: interrupted\n"
    resume = ("--data", folder / "data", "--output", stopped, "--device", "cpu", "--resume")
    assert run(*resume, *validation[:4]) == 0  # the config comes from the run
    assert f"{stopped}: resume after step 2\n" in capsys.readouterr().out
    assert final_weights(stopped) == final_weights(whole)
    for name in ("log.csv", "evaluation.csv"):
        assert rows(stopped, name) == rows(whole, name)
    for name in ("train.json", "final/config.json", "best/model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()

    resume = (*resume, *validation[:4])
    assert run(*resume, "--seed", 3) == 2
    assert f"the run in {stopped} has another seed; resume it with the config it began with" in error_of(capsys)
    assert run(*resume, "--preset", "demo", "--evaluate-every", 2) == 2
    assert "has another model." in error_of(capsys)
    assert run_tiny(folder, stopped) == 2
    assert f"{stopped} holds a training run already; go on with it by resume, or write elsewhere" in error_of(capsys)


def test_an_interrupt_leaves_no_process_and_nothing_half_written(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 1)
    assert run_tiny(folder, tmp_path / "run", "--num-workers", 2) == 130
    assert capfd.readouterr().err == "m2f-video: interrupted\n"
    assert multiprocessing.active_children() == []
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_killed_process_that_prepares_clips_is_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(made: Trainer) -> None:
        for process in multiprocessing.active_children():
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(Trainer, "_save", kill)
    assert run_tiny(folder, tmp_path / "run", "--num-workers", 1, "--steps", 99) == 2
    assert "a process that prepares clips has ended (" in error_of(capfd)
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_second_run_in_a_folder_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Trainer(CONFIG, VIDEOS, tmp_path)
    assert run_tiny(folder, tmp_path, "--resume") == 2
    assert f"another training run is at work in {tmp_path}; " in error_of(capsys)
    made.close()


def test_a_run_from_the_weights_of_a_backbone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swin = SwinTransformer(
        img_size=128, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, num_classes=3
    )
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    begin = ("--init-backbone", tmp_path / "swin.pth")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        assert run_tiny(folder, tmp_path / "run", *begin) == 130
    printed = capsys.readouterr().out
    assert f"backbone of {tmp_path / 'swin.pth'}\n" in printed
    assert ["backbone.stages", "61", "0", "0", "0"] in [line.split() for line in printed.splitlines()]
    assert ["backbone.out_norms", "0", "0", "8", "0"] in [line.split() for line in printed.splitlines()]
    state = load_latest_checkpoint(tmp_path / "run")
    assert state is not None
    weights = to_native(swin.state_dict())
    assert all(torch.equal(state["model"][key], tensor) for key, tensor in weights.items())

    (tmp_path / "swin.pth").unlink()
    assert run_tiny(folder, tmp_path / "run", *begin, "--resume") == 0  # it has what it began with
    assert "backbone of" not in capsys.readouterr().out

    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    assert run_tiny(folder, tmp_path / "other", *begin, "--model.backbone.window-size", 3) == 2
    assert "relative_position_bias_table is (49, 1), the config makes it (25, 1)" in error_of(capsys)
    assert not (tmp_path / "other").exists()


def test_a_run_from_what_fits_of_the_demo(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["backbone"] = {"type": "timm", "name": "regnetx_002"}
    config["model"]["pixel_decoder"] |= {"hidden_dim": 64, "mask_dim": 64, "ffn_dim": 256}
    config["model"]["transformer_decoder"] |= {"hidden_dim": 128, "ffn_dim": 512}
    (tmp_path / "config.json").write_text(json.dumps(config | {"steps": 1}))
    options = ("--data", folder / "data", "--output", tmp_path / "run", "--device", "cpu", "--init", "demo")
    assert run("--config", tmp_path / "config.json", *options) == 2
    assert "--init-partial" in error_of(capsys)
    assert not (tmp_path / "run").exists()
    assert run("--config", tmp_path / "config.json", *options, "--init-partial") == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert lines[:2] == [["weights", "of", "demo"], ["loaded", "resized", "new", "ignored"]]
    assert ["transformer_decoder.query_features", "0", "1", "0", "0"] in lines
    assert (
        "resized: transformer_decoder.query_features.weight, the first 5 of 20 queries, here 5 (and 1 more)\n"
        in printed
    )
    assert "new: pixel_decoder.layers.0.self_attn.sampling_offsets.weight, of another layout: " in printed
    assert "loaded, but computes something else: pixel_decoder.num_layers 2 -> 1; " in printed
    VideoMask2Former.from_pretrained(tmp_path / "run/final")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What trainers are made from, in place of training."""
    calls: list[tuple[Any, ...]] = []

    def stand_in(*arguments: Any, **options: Any) -> Any:
        calls.append((*arguments, options))
        return SimpleNamespace(
            model=nn.Linear(1, 1), log=SimpleNamespace(say=print), train=lambda: None, best={"step": 3, "AP": 0.5}
        )

    monkeypatch.setattr(trainer, "Trainer", stand_in)
    return calls


def test_flags_change_the_config(folder: Path, tmp_path: Path, made: list[tuple[Any, ...]]) -> None:
    options = (
        "--steps", 7, "--optim.learning-rate", "2e-4", "--optim.milestones", 3, 5, "--precision", "bfloat16",
        "--activation-checkpointing", "--loss.num-points", 9, "--sampling.num-frames", 3, "--augment.flip", 0,
        "--augment.shortest-edges", 24, 32, "--model.transformer-decoder.num-queries", 6, "--label-source",
        "last_frame", "--model.backbone.window-size", 3,
    )  # fmt: skip
    assert run_tiny(folder, tmp_path / "run", *options) == 0
    expected = CONFIG.to_dict() | {
        "steps": 7, "precision": "bfloat16", "activation_checkpointing": True, "label_source": "last_frame"
    }  # fmt: skip
    expected["optim"] |= {"learning_rate": 2e-4, "milestones": [3, 5]}
    expected["loss"]["num_points"] = 9
    expected["sampling"]["num_frames"] = 3
    expected["augment"] |= {"flip": 0.0, "shortest_edges": [24, 32]}
    expected["model"]["transformer_decoder"]["num_queries"] = 6
    expected["model"]["backbone"]["window_size"] = 3
    ((settings, videos, output, rest),) = made
    assert settings == TrainConfig.from_dict(expected)
    assert (len(videos), output, rest["validation"]) == (4, tmp_path / "run", None)
    assert (rest["resume"], rest["init"], rest["tensorboard"]) == (False, None, False)


@pytest.mark.parametrize("preset", TRAIN_PRESETS)
def test_presets_are_the_defaults_of_the_flags(preset: str, folder: Path, made: list[tuple[Any, ...]]) -> None:
    options = ("--data", folder / "data", "--output", "run", "--device", "cpu")
    assert run("--preset", preset, *options, "--init", "somewhere", "--tensorboard", "--resume") == 0
    ((settings, _, _, rest),) = made
    assert settings == TrainConfig.preset(preset)
    assert (rest["init"], rest["tensorboard"], rest["resume"]) == ("somewhere", True, True)


def test_synthetic_videos_are_validated_on_others(
    made: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--preset", "demo", "--data", "synthetic:easy", "--output", "run", "--device", "cpu")
    assert run(*options, "--validation-videos", 3) == 0
    ((settings, videos, _, rest),) = made
    assert isinstance(settings.model.backbone, TimmBackboneConfig)
    assert (videos.info["difficulty"], videos.seed) == ("easy", 0)
    held_out = rest["validation"]
    assert isinstance(held_out, SyntheticVideos)
    assert (held_out.info["difficulty"], held_out.seed, len(held_out)) == ("easy", 1000, 3)
    assert "written to run/final; the best, of step 3, is run/best" in capsys.readouterr().out


def test_no_validation(made: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--preset", "demo", "--data", "synthetic", "--output", "run", "--device", "cpu", "--validation", "none")
    assert run(*options) == 0
    assert made[0][-1]["validation"] is None
    assert run(*options, "--validation-videos", 3) == 2
    assert "--validation-videos needs --validation" in error_of(capsys)


def test_a_recipe_has_to_be_chosen(
    tmp_path: Path, made: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", "synthetic", "--output", tmp_path, "--device", "cpu")
    assert run(*options) == 2
    assert "error: give --config or --preset (demo; swin_tiny, swin_small, " in error_of(capsys)
    assert run(*options, "--resume") == 2
    assert f"there is no run to resume in {tmp_path}; give --config or --preset" in error_of(capsys)
    (tmp_path / "train.json").write_text(CONFIG.to_json())
    assert run(*options, "--resume", "--steps", 5) == 0
    assert [call[0] for call in made] == [CONFIG.replace(steps=5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "nowhere.json"), "nowhere.json"),
        (("--preset", "demo"), "give --preset or --config, not both"),
        (("--steps", "0"), "steps must be positive"),
        (("--batch-size", "3", "--accumulation", "2"), "batch_size=3 is not divisible by accumulation=2"),
        (("--data", "nowhere"), "nowhere: there is no such dataset"),
        (("--data", "synthetic:extreme"), "unknown difficulty 'extreme'"),
        (("--validation", "nowhere"), "nowhere: there is no such dataset"),
        (("--validation", "synthetic", "--validation-videos", "0"), "num_videos must be positive"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--init", "nowhere"), "nowhere does not exist"),
        (("--init-backbone", "nowhere"), "nowhere does not exist"),
        (("--init-backbone", "{folder}/config.json"), "config.json: it is not a checkpoint"),
        (("--init-backbone", "timm"), "the backbone is not timm's; name weights, such as timm:swin_tiny"),
        (("--init", "demo", "--init-backbone", "demo"), "give init or init_backbone, not both"),
        (("--init", "demo"), "or load what fits by --init-partial"),
        (("--init-partial",), "init_partial loads what fits of weights; give them by init or init_backbone"),
        (("--init-partial", "--init", "nowhere"), "nowhere does not exist"),
        (("--init-partial", "--init", "{folder}/config.json"), "config.json: it is not a checkpoint"),
        (("--model.temporal", "per_frame"), "an image model has no clips to learn from"),
        (("--output", "{folder}/config.json"), "config.json is a file, where a training run needs a folder"),
        (("--output", "{folder}/config.json/run"), "config.json/run"),
        (("--output", "/proc/run"), "/proc/run"),
    ],
)
def test_bad_input_is_one_line(
    options: tuple[str, ...], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tiny(folder, tmp_path / "run", *(option.format(folder=folder) for option in options)) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "tiny"), "--preset"),
        (("--preset",), "--preset"),
        (("--init-backbone",), "--init-backbone"),
        (("--learning-rate", "1"), "--learning-rate"),
        (("--precision", "float64"), "float64"),
        (("--data", "d", "--output", "o", "--steps", "many"), "many"),
        ((), "--data"),
    ],
)
def test_flags_that_do_not_parse(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*options) == 2
    assert message in capsys.readouterr().err


def test_a_config_of_something_else_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    for content, message in (
        ("{", "not a JSON file"),
        (json.dumps({"augment": {"flip": 3}}), "AugmentConfig.flip"),
        (CONFIG.model.to_json(), "this is the config of a model"),
    ):
        file.write_text(content)
        assert run("--config", file, "--data", folder / "data", "--output", tmp_path / "run") == 2
        error = error_of(capsys)
        assert str(file) in error
        assert message in error
    yaml = tmp_path / "video_maskformer2_R50_bs16_8ep.yaml"
    yaml.write_text("MODEL:\n  MASK_ON: True\n")
    assert run("--config", yaml, "--data", folder / "data", "--output", tmp_path / "run") == 2
    assert f"{yaml} is YAML, as configs of detectron2 are" in error_of(capsys)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_frame_is_one_line(
    num_workers: int, tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_youtube_vis(VIDEOS, tmp_path / "data")
    for frame in (tmp_path / "data" / "JPEGImages" / "000002").iterdir():
        frame.write_bytes(frame.read_bytes()[:100])
    options = ("--data", tmp_path / "data", "--num-workers", num_workers)
    assert run_tiny(folder, tmp_path / "run", *options) == 2
    error = error_of(capfd)
    assert f"{tmp_path}/data/JPEGImages/000002/0000" in error
    assert "cannot read the frame" in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "m2f-video train --preset demo --data synthetic --output run" in printed
    for flag in ("--optim.learning-rate", "--model.backbone.name", "--checkpoint-every", "--resume"):
        assert flag in printed


@pytest.mark.slow  # starts the command several times
def test_a_run_killed_at_any_moment_ends_the_same(folder: Path, tmp_path: Path) -> None:
    config = CONFIG.replace(steps=30, num_workers=1)
    (tmp_path / "config.json").write_text(config.to_json())
    options = ["--config", str(tmp_path / "config.json"), "--data", str(folder / "data"), "--device", "cpu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "m2f_video", "train", *options, "--output", str(killed), "--resume"]
    delays = np.random.default_rng(0).uniform(0, 0.5, size=5)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: another number rounds otherwise

    def steps_done() -> int:
        return max((int(file.stem[5:]) for file in (killed / "checkpoints").glob("step-*.pt")), default=0)

    for delay in delays:
        before = steps_done()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=one_thread)  # noqa: S603
        while steps_done() < before + 2 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None
        process.kill()
        process.wait()
    assert 0 < steps_done() < config.steps
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=one_thread, check=False)  # noqa: S603
    assert done.returncode == 0
    assert run(*options, "--output", whole) == 0
    assert final_weights(killed) == final_weights(whole)
    assert rows(killed) == rows(whole)
    assert [file.name for file in (killed / "checkpoints").iterdir() if file.name.startswith(".")] == []

"""`m2f-video eval --data --checkpoint`, end to end."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f_video import VideoMask2Former, VideoMask2FormerConfig
from m2f_video.cli import evaluate as command
from m2f_video.cli.main import main
from m2f_video.config import PreprocessingConfig
from m2f_video.data import SHAPES, SyntheticVideos, write_youtube_vis
from m2f_video.evaluation import predict
from m2f_video.evaluation.journal import Journal

VIDEOS = SyntheticVideos(3, seed=5, num_frames=4, height=32, width=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: VideoMask2FormerConfig) -> Path:
    """A dataset, and models with its labels and with others."""
    folder = tmp_path_factory.mktemp("eval")
    write_youtube_vis(VIDEOS, folder / "data")
    torch.manual_seed(0)
    config = tiny_config.replace(preprocessing=PreprocessingConfig(shortest_edge=32))
    VideoMask2Former(config.replace(labels=SHAPES)).save_pretrained(folder / "model")
    VideoMask2Former(config.replace(labels=SHAPES, temporal="per_frame")).save_pretrained(folder / "image")
    VideoMask2Former(config).save_pretrained(folder / "other")
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run(*arguments: object) -> int:
    try:
        return main(["eval", *map(str, arguments)])
    except SystemExit as exit_:  # the parser's own way out
        return int(exit_.code or 0)


def run_model(folder: Path, output: Path, *options: object, data: object = None, checkpoint: str = "model") -> int:
    return run(
        "--data", data or folder / "data", "--checkpoint", folder / checkpoint, "--output", output, "--no-tracking",
        *options,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    add = Journal.add

    def stopping(self: Journal, index: int, rows: Any) -> None:
        add(self, index, rows)
        if len(self.rows) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stopping)


def test_a_model_is_run_and_measured(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_model(folder, tmp_path / "out", "--json", tmp_path / "out" / "report.json", "--tracking") == 0
    printed, error = capsys.readouterr()
    assert error == ""
    expected = ("train.json: 3 videos", "AP75", "HOTA", "crescent", f"written to {tmp_path / 'out'}: results.json")
    assert all(text in printed for text in expected)
    assert names(tmp_path / "out") == ["report.json", "results.json", "results.zip"]
    results = (tmp_path / "out" / "results.json").read_text()
    assert len(json.loads(results)) == 30
    with zipfile.ZipFile(tmp_path / "out" / "results.zip") as archive:
        assert archive.namelist() == ["results.json"]
        assert archive.read("results.json").decode() == results
    # The results measured on their own give the same numbers, packed or not.
    for file in ("results.json", "results.zip"):
        files = ("--annotations", folder / "data" / "train.json", "--results", tmp_path / "out" / file)
        assert run(*files, "--json", tmp_path / "again.json") == 0
        assert (tmp_path / "again.json").read_text() == (tmp_path / "out" / "report.json").read_text()


def test_a_stopped_run_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_model(folder, tmp_path / "whole") == 0
    assert "going on" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run_model(folder, tmp_path / "out") == 130
    assert names(tmp_path / "out") == ["journal-0.jsonl"]
    assert run_model(folder, tmp_path / "out", "--top-k", 3) == 2
    assert "another top_k; delete it to start anew" in capsys.readouterr().err
    (tmp_path / "out" / "journal-1.jsonl").write_text("left by a rank that is no more")
    assert run_model(folder, tmp_path / "out") == 0
    journal = tmp_path / "out" / "journal-0.jsonl"
    assert f"going on from {journal}: 2 of 3 videos are done already" in capsys.readouterr().out
    assert names(tmp_path / "out") == ["results.json", "results.zip"]
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("whole", "out")]
    assert results[0] == results[1]


def test_without_annotations_the_results_are_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((folder / "data" / "train.json").read_text())
    del data["annotations"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "valid.json").write_text(json.dumps(data))
    (tmp_path / "data" / "JPEGImages").symlink_to(folder / "data" / "JPEGImages")
    report = tmp_path / "report.json"
    assert run_model(folder, tmp_path / "out", "--json", report, data=tmp_path / "data") == 0
    printed = capsys.readouterr().out
    assert "valid.json: 3 videos" in printed
    assert f"no truth to measure by, and {report} is not written" in printed
    assert "AP" not in printed
    assert names(tmp_path / "out") == ["results.json", "results.zip"]
    assert not report.exists()
    assert run_model(folder, tmp_path / "whole") == 0
    assert (tmp_path / "whole" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()


def test_the_synthetic_benchmark(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SyntheticVideos] = []

    def one_row_each(model: Any, videos: Any, **options: Any) -> list[dict[str, Any]]:
        seen.append(videos)
        row = {"category_id": 1, "score": 0.5, "segmentations": [None] * 16}
        return [row | {"video_id": videos[index].video_id} for index in range(len(videos))]

    monkeypatch.setattr(command, "predict_on_all_ranks", one_row_each)
    assert run_model(folder, tmp_path / "out", "--videos", 1, data="synthetic:easy") == 0
    assert "m2f-video synthetic benchmark v1, easy, test: 1 videos" in capsys.readouterr().out
    assert run_model(folder, tmp_path / "out", "--videos", 1, "--split", "val", data="synthetic") == 0
    assert "v1, medium, val" in capsys.readouterr().out
    assert [videos.seed for videos in seen] == [2000, 1000]


def test_options_reach_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.dtype, torch.device, Any]] = []
    predict_videos = predict.predict_videos

    def watched(model: VideoMask2Former, videos: Any, **options: Any) -> Any:
        calls.append((model.dtype, model.device, options["frames_per_chunk"]))
        return predict_videos(model, videos, **options)

    monkeypatch.setattr(predict, "predict_videos", watched)
    options = ("--videos", 2, "--top-k", 4, "--device", "cpu", "--dtype", "bfloat16", "--frames-per-chunk", 3)
    options += ("--split", "train", "--temporal", "joint")
    assert run_model(folder, tmp_path / "out", *options, checkpoint="image") == 0
    assert calls == [(torch.bfloat16, torch.device("cpu"), 3)]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["video_id"] for row in rows] == [1] * 4 + [2] * 4
    weights = folder / "image" / "model.safetensors"
    (tmp_path / "bare.safetensors").write_bytes(weights.read_bytes())
    config = ("--config", folder / "model" / "config.json", "--videos", 1)
    assert run_model(folder, tmp_path / "bare", *config, checkpoint=tmp_path / "bare.safetensors") == 0


def test_plain_gives_the_same_to_rounding(folder: Path, tmp_path: Path) -> None:
    for name, options in {"plain": ("--plain",), "fast": ()}.items():
        assert run_model(folder, tmp_path / name, "--videos", 1, *options) == 0
    plain, fast = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "fast"))
    scores = [row["score"] for row in plain]
    assert [row["score"] for row in fast] == pytest.approx(scores, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "got none of them"),
        (("--annotations", "a.json"), "give --annotations and --results .* got --annotations"),
        (("--data", "synthetic"), "got --data"),
        (("--annotations", "a", "--checkpoint", "c"), "got --annotations and --checkpoint"),
        (("--annotations", "a", "--results", "r", "--data", "d", "--checkpoint", "c"), "got --annotations and --res"),
        (("--annotations", "a", "--results", "r", "--videos", "3"), "leave out the options for --data"),
    ],
)
def test_one_of_the_two_pairs(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("m2f-video: error: ")
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (("--videos", 0), {}, "--videos must be positive"),
        (("--top-k", 0), {}, "top_k"),
        (("--frames-per-chunk", 0), {}, "frames_per_chunk must be a whole number"),
        (("--device", "abacus"), {}, "unknown device 'abacus'"),
        ((), {"checkpoint": "other"}, "'person' is no category of the dataset"),
        ((), {"checkpoint": "image"}, "is an image model; --temporal joint reads it as a video model"),
        ((), {"checkpoint": "nothing"}, "nothing"),
        ((), {"data": "nowhere"}, "nowhere: there is no such dataset"),
        ((), {"data": "synthetic:extreme"}, "unknown difficulty 'extreme'"),
        (("--json", "{output}/results.json"), {}, "give --json another name"),
        (("--json", "{output}/missing/report.json"), {}, "make it first"),
    ],
)
def test_bad_input_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    options: tuple[object, ...],
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert run_model(folder, output, *(str(option).format(output=output) for option in options), **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not output.exists()


def test_an_output_that_is_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert run_model(folder, tmp_path / "out") == 2
    assert "is a file; give --output a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.slow  # three fresh interpreters
def test_ranks_of_torchrun_share_the_work(folder: Path, tmp_path: Path) -> None:
    assert run_model(folder, tmp_path / "one") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "m2f_video"]
    arguments = ["eval", "--data", folder / "data", "--checkpoint", folder / "model", "--output", tmp_path / "two"]
    done = subprocess.run(  # noqa: S603
        [*launch, *map(str, arguments), "--no-tracking", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 videos") == 1
    assert names(tmp_path / "two") == ["results.json", "results.zip"]
    assert (tmp_path / "two" / "results.json").read_bytes() == (tmp_path / "one" / "results.json").read_bytes()

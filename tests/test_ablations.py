"""The ablation workbench: its table, its intervals, and runs that are stopped, shared and divided."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from m2f_video.checked_config import ConfigError
from m2f_video.data.synthetic import SyntheticVideos
from m2f_video.evaluation import average_precision, pair_tracks, prepare_ground_truth
from m2f_video.modeling.video_mask2former import VideoMask2Former

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = ["--quick", "--nice", "0", "--repeats", "0", "--draws", "20", "--device", "cpu", "--seeds", "0"]
VIDEOS = 24


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations

    return ablations


@pytest.fixture
def report(ablations: ModuleType) -> ModuleType:
    return sys.modules["ablation_report"]


@pytest.fixture
def run_main(ablations: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command, in tmp_path/runs, of a model with one layer of each kind."""
    small = {"model.pixel_decoder.num_layers": 1, "model.transformer_decoder.num_layers": 1, "loss.num_points": 16}
    monkeypatch.setattr(ablations, "BASE", ablations.apply(ablations.BASE, small))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield lambda *flags: ablations.tyro.cli(ablations.main, args=["--output", str(tmp_path / "runs"), *QUICK, *flags])
    torch.set_num_threads(threads)


def test_rows_change_what_they_say_and_can_be_built(ablations: ModuleType) -> None:
    names = [ablations.Run(variant, 0).name for variant in ablations.VARIANTS]
    assert len(set(names)) == len(names) >= 30
    assert [variant.name for variant in ablations.VARIANTS if not variant.changes] == ["base"]
    for variant in ablations.VARIANTS:
        config = ablations.apply(ablations.BASE, variant.changes)
        assert config.differences(ablations.BASE).keys() == variant.changes.keys(), variant.name
        with torch.device("meta"):
            VideoMask2Former(config.model)
        quick = ablations.apply(ablations.apply(ablations.BASE, ablations.QUICK), variant.changes)
        assert quick.differences(ablations.BASE).keys() >= variant.changes.keys(), variant.name


def test_a_field_that_is_not_there_is_named_with_its_row(ablations: ModuleType) -> None:
    study = ablations.Study(folder=Path(), base=ablations.BASE, train=None, test=None, device=torch.device("cpu"))
    for path in ("model.pixel_decoder.sort", "model.nothing.sort", "nothing.sort"):
        with pytest.raises(ConfigError, match=r"row 'odd': .*(sort|nothing)"):
            study.config(ablations.Run(ablations.Variant("odd", changes={path: 1}), 0))


def finished(report: ModuleType, name: str, seed: int, right: float, luck: int = 0) -> Any:
    """A run that finds this share of the 4 objects of each video, and so many more as luck has it."""
    random = np.random.default_rng(seed)
    category = np.tile([0, 0, 1, 1], VIDEOS)
    hits = np.arange(len(category)) % 8 < 8 * right
    hits[random.permutation(len(hits))[:luck]] = True
    true = np.tile(hits, (10, 1))
    matches = report.TrackMatches(
        video=np.repeat(np.arange(VIDEOS), 4),
        category=category,
        scores=random.random(len(category)),
        true_positive=true,
        false_positive=~true,
        num_annotations=np.full((VIDEOS, 2), 2),
    )
    ap = float(matches.average_precision(np.ones((1, VIDEOS), int))[0])
    result = {
        "stats": {"AP": ap},
        "parameters": 10,
        "gflop_per_frame": 1.0,
        "train_peak_mb": 5.0,
        "seconds_per_step": 0.5,
    }
    return report.Finished(variant=report.Variant(name), seed=seed, result=result, matches=matches)


def test_intervals(report: ModuleType) -> None:
    runs = [finished(report, "base", seed, 0.5) for seed in (0, 1)]
    runs += [replace(run, variant=report.Variant("same")) for run in runs]
    runs += [finished(report, "better", seed, 0.9) for seed in (0, 1)]
    runs += [finished(report, "worse", seed, 0.2) for seed in (0, 1)]
    runs += [finished(report, "alike", seed, 0.5, luck=3 * seed) for seed in (0, 1)]
    runs += [finished(report, "new seed", 2, 0.9)]
    found = report.compare(runs, "base", draws=200)
    assert found["same"]["interval"] == [0, 0]
    assert found["same"]["reading"] == report.NOT_SHOWN
    assert found["better"]["reading"] == "better"
    assert found["better"]["interval"][0] > 0
    assert found["better"]["interval"][0] < found["better"]["difference"] < found["better"]["interval"][1]
    assert found["worse"]["reading"] == "worse"
    low, high = found["alike"]["interval"]
    assert low <= 0 < high
    assert found["alike"]["reading"] == report.NOT_SHOWN
    assert found["base"].keys() == found["new seed"].keys() == {"ap", "mean", "spread"}
    assert found["new seed"]["spread"] is None


def test_what_seeds_change_claims_nothing(report: ModuleType) -> None:
    row = {"interval": [1.0, 3.0], "difference": 2.0, "differences": {0: 1.0, 1: 3.0}}
    assert report.reading(row, None) == report.reading(row, 1.0) == "better"
    assert report.reading(row, 2.0) == report.NOT_SHOWN
    assert report.seed_noise({"row": row, "one seed": {"differences": {0: 5.0}}, "base": {}}) == pytest.approx(2**0.5)


def copied(tracks: Sequence[Any], copies: dict[int, list[int]]) -> list[Any]:
    """Tracks of videos, for each of their copies."""
    return [replace(track, video_id=number) for track in tracks for number in copies[track.video_id]]


def test_ap_of_drawn_videos_is_that_of_a_data_set_of_them(report: ModuleType, tmp_path: Path) -> None:
    truth = prepare_ground_truth(SyntheticVideos(6, 3, num_frames=2, height=32, width=48))
    assert truth is not None
    random = np.random.default_rng(0)
    tracks = [
        replace(track, score=float(random.random()), category_id=track.category_id if random.random() < 0.7 else 1)
        for track in (*truth.tracks, *truth.tracks)
    ]
    moved = {1: 2, 2: 1}
    tracks = [replace(t, video_id=moved.get(t.video_id, t.video_id)) for t in tracks]
    videos, categories = list(truth.sizes), list(truth.categories)
    matches = report.TrackMatches.of(pair_tracks(truth, tracks), videos, categories)
    matches.save(tmp_path)
    matches = report.TrackMatches.load(tmp_path)
    counts = np.vstack([np.ones((1, 6), int), random.multinomial(6, np.full(6, 1 / 6), size=30)])
    for drawn, ap in zip(counts, matches.average_precision(counts), strict=True):
        # a video that is drawn twice is another one, with an id of its own
        places = [(video, copy) for video, count in zip(videos, drawn, strict=True) for copy in range(count)]
        copies = {video: [number for number, (v, _) in enumerate(places) if v == video] for video in videos}
        sizes = {number: truth.sizes[video] for video in videos for number in copies[video]}
        resampled = replace(truth, sizes=sizes, tracks=tuple(copied(truth.tracks, copies)))
        results = copied(tracks, copies)
        expected = average_precision(resampled, pair_tracks(resampled, results)).stats["AP"]
        assert ap == pytest.approx(expected, abs=1e-12)
    assert 0.05 < ap < 0.95


@pytest.mark.slow  # trains and measures two models
def test_runs_that_were_killed_go_on_and_done_ones_stay(
    ablations: ModuleType, run_main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    measured: dict[str, float] = {}
    measure, costs = ablations.Study._measure, ablations.costs

    def killed(study: Any, run: Any) -> Any:
        trained.append(run.name)
        if len(trained) == 2:  # in the midst of the second
            videos = ablations.Stopping(study.train, 6)
            study._train(run, videos)
        return measure(study, run)

    def costs_once(*arguments: Any) -> dict[str, float]:
        return measured or measured.update(costs(*arguments)) or measured

    monkeypatch.setattr(ablations.Study, "_measure", killed)
    monkeypatch.setattr(ablations, "costs", costs_once)
    monkeypatch.setattr(sys.modules["ablation_report"], "draw", lambda *_: None)
    rows = ["--rows", "dropout 0.1"]
    with pytest.raises(ablations.StoppedError):
        run_main(*rows)
    assert not (tmp_path / "runs" / "ablations.json").exists()
    first = tmp_path / "runs" / "base-seed0" / "result.json"
    before = first.stat().st_mtime_ns
    assert run_main(*rows) == 0
    assert trained == ["base-seed0", "dropout_0.1-seed0", "dropout_0.1-seed0"]
    assert first.stat().st_mtime_ns == before
    steps = (tmp_path / "runs" / "dropout_0.1-seed0" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in steps] == ["step", "1", "2", "3", "4"]

    report = json.loads((tmp_path / "runs" / "ablations.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["base", "dropout 0.1"]
    assert report["rows"][1]["changes"] == {"model.transformer_decoder.dropout": 0.1}
    assert {row["reading"] for row in report["rows"]} == {"claims nothing"}
    assert report["rows"][0]["parameters"] > 1e5
    assert report["rows"][0]["train_peak_mb"] > 4 * report["rows"][0]["parameters"] * 4 / 1e6
    assert "the numbers mean nothing" in (tmp_path / "runs" / "ablations.md").read_text()

    with pytest.raises(ValueError, match="no run is done"):  # on other videos
        run_main(*rows, "--report-only", "--videos", "3")
    with pytest.raises(ValueError, match="was trained with another steps"):
        run_main(*rows, "--report-only", "--steps", "5")


def test_a_run_is_one_process_s(
    ablations: ModuleType, run_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / "base-seed0.lock"):
        assert run_main("--rows", "base") == 0
    assert "another process is at it" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "base-seed0").exists()


def test_a_run_that_fails_stops_no_other(
    ablations: ModuleType, run_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def perform(study: Any, run: Any) -> Any:
        if run.seed == 1:
            raise ValueError("the loss is gone")
        return {"stats": {"AP": 0.5}}

    monkeypatch.setattr(ablations.Study, "perform", perform)
    assert run_main("--rows", "base", "--seeds", "1", "0") == 1
    printed = capsys.readouterr()
    assert "AP 50.0" in printed.out
    assert "failed: base-seed1: the loss is gone" in printed.err
    monkeypatch.setenv("WORLD_SIZE", "1")  # an error would end the others
    assert run_main("--rows", "base", "--seeds", "1", "0") == 0


@pytest.mark.parametrize("by", ["flag", "torchrun"])
def test_shares_cover_every_run_once(
    ablations: ModuleType, run_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    done: list[str] = []

    def perform(study: Any, run: Any) -> Any:
        done.append(run.name)
        return {"stats": {"AP": 0.5}}

    monkeypatch.setattr(ablations.Study, "perform", perform)
    for number in range(3):
        if by == "torchrun":
            monkeypatch.setenv("RANK", str(number))
            monkeypatch.setenv("WORLD_SIZE", "3")
        before = len(done)
        run_main("--seeds", "0", "1", *(["--shard", f"{number}/3"] if by == "flag" else []))
        assert len(done) - before in (22, 23)
    variants = [variant.name.replace(" ", "_") for variant in ablations.VARIANTS]
    assert sorted(done) == sorted(f"{name}-seed{seed}" for name in variants for seed in (0, 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "nothing"], "no row 'nothing'; rows: base, "),
        (["--shard", "2/2"], "--shard must be"),
        (["--shard", "x"], "--shard must be"),
        (["--steps", "0"], "--steps must be positive"),
        (["--seeds", "-1"], "--seeds must"),
    ],
)
def test_bad_flags_are_named(run_main: Callable[..., int], tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_main(*flags)
    assert not (tmp_path / "runs").exists()


def test_the_report_is_whole_or_not_there(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [finished(report, name, seed, right) for name, right in (("base", 0.5), ("better", 0.9)) for seed in (0, 1)]
    about = {"title": "t", "videos": VIDEOS, "missing": ["later-seed0"], "machine": {"processor": "p"}, "command": "c"}
    text = report.write_report(tmp_path, runs, "base", {"base": 1.5}, about, draws=50, claims=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written["ablations.md"].decode() == text
    assert "| better |" in text
    assert "Not done: later-seed0." in text
    found = json.loads(written["ablations.json"])
    assert found["rows"][0]["ms_per_frame"] == 1.5
    monkeypatch.setattr(report.json, "dumps", lambda *_, **__: "\ud800")  # that cannot be written
    with pytest.raises(UnicodeEncodeError):
        report.write_report(tmp_path, runs, "base", {}, about, draws=50, claims=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


@pytest.mark.slow
def test_a_rehearsal_of_every_row_passes(ablations: ModuleType, tmp_path: Path) -> None:
    """In the time that it is meant to take, with both processors of a small machine to itself."""
    assert ablations.tyro.cli(ablations.main, args=["--output", str(tmp_path), *QUICK]) == 0
    report = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["name"] for row in report["rows"]] == [variant.name for variant in ablations.VARIANTS]

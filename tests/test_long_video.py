"""The benchmark of long videos: what it measures by, its methods, and runs that are stopped and go on."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from m2f_video import segment_video
from m2f_video.data.synthetic import SHAPES, SyntheticVideos
from m2f_video.evaluation import average_precision, load_results, pair_tracks, prepare_ground_truth, tracking_metrics
from m2f_video.inference.linking import EmbeddingLinker, MaskIouLinker, Window
from m2f_video.modeling.transformer_decoder import MaskProduct
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import random_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def long_video(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import long_video

    return long_video


@pytest.fixture
def methods(long_video: ModuleType) -> ModuleType:
    import long_methods

    return long_methods


@pytest.fixture
def report(long_video: ModuleType) -> ModuleType:
    import long_report

    return long_report


@pytest.fixture(scope="module")
def model(tiny_config) -> VideoMask2Former:
    return random_model(replace(tiny_config, labels=SHAPES), 0)


@pytest.fixture
def checkpoint(model, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def window(start: int, mask_logits: torch.Tensor, probabilities: list[list[float]], embeddings=None) -> Window:
    """Objects (N, W, h, w) of a window."""
    count, frames = mask_logits.shape[:2]
    embeddings = torch.eye(count) if embeddings is None else embeddings
    features = torch.zeros(frames, embeddings.shape[1], *mask_logits.shape[-2:])
    return Window(
        start, torch.arange(count), torch.tensor(probabilities), embeddings, mask_logits, features, MaskProduct()
    )


def moved(rows: list[dict[str, Any]], random: np.random.Generator) -> list[dict[str, Any]]:
    """Annotations as results: some lost, some twice, some torn into two tracks, some of two objects."""
    results = []
    for row in rows:
        masks, other = row["segmentations"], rows[random.integers(len(rows))]["segmentations"]
        half = len(masks) // 2
        torn = [masks[:half] + [None] * half, [None] * half + masks[half:]]
        tracks = [[masks], [masks, masks], torn, [masks[:half] + other[half:]], []][random.integers(5)]
        named = {name: row[name] for name in ("video_id", "category_id")}
        results += [{**named, "score": float(random.uniform(0.2, 1)), "segmentations": of} for of in tracks if any(of)]
    return results


def test_metrics_are_those_of_the_evaluation(long_video, report) -> None:
    from ablation_report import TrackMatches

    from m2f_video.data.write import youtube_vis_annotations

    random, parts = np.random.default_rng(0), []
    videos = SyntheticVideos(4, 5, "medium", num_frames=6, height=48, width=80)
    truth = prepare_ground_truth(videos)
    rows = moved(youtube_vis_annotations(videos)["annotations"], random)
    for index in range(4):
        one = long_video.OneVideo(SyntheticVideos(index + 1, 5, "medium", num_frames=6, height=48, width=80))
        of_one = prepare_ground_truth(one)
        pairings = pair_tracks(of_one, load_results([row for row in rows if row["video_id"] == index + 1], of_one))
        matches = TrackMatches.of(pairings, [index + 1], list(truth.categories))
        numbers = report.Numbers.of(matches, pairings)
        parts.append(report.Numbers.from_dict(json.loads(json.dumps(numbers.to_dict()))))
    pairings = pair_tracks(truth, load_results(rows, truth))
    stats, tracking = average_precision(truth, pairings).stats, tracking_metrics(truth, pairings).combined
    joined = report.Numbers.joined(parts)
    found = joined.metrics()
    expected = (stats["AP"], stats["AP50"], tracking.HOTA, tracking.IDF1, tracking.id_switches)
    assert [found[name][0] for name in report.METRICS] == pytest.approx(expected, abs=1e-9)
    assert 0.1 < stats["AP"] < 0.9
    assert tracking.id_switches
    twice = joined.metrics(np.array([[2, 0, 1, 1], [0, 0, 1, 0]]))
    drawn = report.Numbers.joined([parts[0], parts[0], parts[2], parts[3]]).metrics()
    for name in report.METRICS:
        assert twice[name][0] == pytest.approx(drawn[name][0], abs=1e-9)
        assert twice[name][1] == pytest.approx(parts[2].metrics()[name][0], abs=1e-9)


def test_differences_have_intervals(report) -> None:
    from ablation_report import TrackMatches

    def numbers(right: float, seed: int = 0) -> Any:
        hits = np.random.default_rng(seed).random(20) < right
        true = np.tile(hits, (10, 1))
        matches = TrackMatches(
            video=np.arange(20),
            category=np.zeros(20, int),
            scores=np.linspace(0, 1, 20),
            true_positive=true,
            false_positive=~true,
            num_annotations=np.ones((20, 1), int),
        )
        counts = np.stack([hits, ~hits, ~hits, hits], 1)[:, :, None].repeat(19, 2).astype(float)
        return report.Numbers(matches=matches, hota=counts, identity=counts[:, :3, 0], switches=~hits * 1.0)

    found = report.compare({"window": numbers(0.9), "same": numbers(0.9), "worse": numbers(0.3)}, draws=200)
    assert "differences" not in found["window"]
    assert set(found["same"]["differences"]) == {"AP", "HOTA", "IDF1"}
    assert all(row == [0, 0, 0] for row in found["same"]["differences"].values())
    for value, low, high in found["worse"]["differences"].values():
        assert 0 < low < value < high
    assert report.difference(found["worse"], "AP").startswith("**+")
    assert not report.difference(found["same"], "AP").startswith("**")


def test_a_model_that_remembers_changes_nothing(methods, model) -> None:
    frames = SyntheticVideos(1, 3, num_frames=7, height=32, width=48)[0].clip(range(7)).frames
    video = frames.permute(0, 2, 3, 1).contiguous().numpy()
    seen: list[int] = []
    counted = type("Counted", (), {"__getattr__": lambda _, name: getattr(model, name)})()
    counted.encode_frames = lambda pixels: seen.append(len(pixels)) or model.encode_frames(pixels)
    remembering = methods.RememberingModel(counted)
    for options in (
        {"mode": "whole"},
        {"mode": "window", "window": 4, "stride": 2},
        {"mode": "window", "window": 4, "linker": "embedding"},
    ):
        expected = segment_video(model, video, plain=True, **options)
        for _ in range(2):
            segmentation = segment_video(remembering, video, processor=remembering.processor, **options)
            assert segmentation.tracks == expected.tracks
    assert sum(seen) == 7


def test_the_oracle_follows_the_truth_and_not_the_likeness(methods) -> None:
    masks = torch.zeros(2, 8, 4, 8)
    masks[0, :, :, :4] = masks[1, :, :, 4:] = 1
    objects, nothing = 20 * masks - 10, torch.full((1, 2, 4, 8), -10.0)
    tracker = methods.Tracker(methods.OracleLinker(masks))
    sure = [0.9, 0.0, 0.1]
    assert tracker.link(window(0, objects[:, :2], [sure, sure])) == [1, 2]
    assert tracker.link(window(2, objects[[1, 0], 2:4], [sure, sure])) == [2, 1]  # embeddings say otherwise
    assert tracker.link(window(4, torch.cat((nothing, objects[1:, 4:6])), [sure, sure])) == [3, 2]
    assert tracker.link(window(6, objects[[0, 1], 6:8], [sure, sure])) == [1, 2]  # the first comes back


def test_published_scores(methods) -> None:
    logits = torch.tensor([[[2.0, -1.0, 0.0]], [[0.0, 3.0, 1.0]]])  # of one object in two windows
    probabilities = logits.softmax(-1)
    tracker = methods.MeanLogitsTracker(EmbeddingLinker())
    for number, of_window in enumerate(probabilities):
        tracker.link(window(number, torch.ones(1, 1, 2, 2), of_window.tolist()))
    torch.testing.assert_close(tracker.scores(), logits.mean(0).softmax(-1)[:, :2])
    seen = methods.MeanSeenTracker(MaskIouLinker())
    for number, of_window in enumerate((*probabilities, None)):
        mask = torch.full((1, 2, 2, 2), 9.0) if of_window is not None else torch.empty(0, 2, 2, 2)
        rows = of_window.tolist() if of_window is not None else torch.empty(0, 3).tolist()
        rows = rows or torch.empty(0, 3)
        seen.link(replace(window(number, mask, [[0.0] * 3]), probabilities=torch.as_tensor(rows)))
    torch.testing.assert_close(seen.scores(), probabilities.mean(0)[:, :2])  # the window without it does not count


def test_a_run_that_was_stopped_goes_on(long_video, report, checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: None)  # takes longer than all else
    names, output = ("main", "oracle"), tmp_path / "runs"
    options = {"methods": names, "lengths": (3,), "seeds": (0,), "videos": 2, "nice": 0, "checkpoint": checkpoint}
    done: list[str] = []
    measure = long_video.measure

    def stopping(method: Any, *rest: Any) -> Any:
        done.append(method.name)
        if len(done) == 7:
            raise KeyboardInterrupt
        return measure(method, *rest)

    monkeypatch.setattr(long_video, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        long_video.main(output, draws=10, **options)
    long_video.main(output, draws=10, **options)
    assert done[:7] == ["window", "whole", "MinVIS", "IFC-like", "oracle", "window", "whole"]
    assert done[7:] == ["whole", "MinVIS", "IFC-like", "oracle"]
    found = json.loads((output / "long_video.json").read_text())
    assert list(found["lengths"]["3"]["methods"]) == ["window", "whole", "MinVIS", "IFC-like", "oracle"]
    assert "| MinVIS |" in (output / "long_video.md").read_text()
    monkeypatch.setitem(long_video.main.__globals__, "weights_digest", lambda _: "another")
    with pytest.raises(ValueError, match="another checkpoint"):
        long_video.main(output, report_only=True, draws=10, **options)


def test_bad_input_is_named(long_video, methods, checkpoint, tmp_path) -> None:
    with pytest.raises(ValueError, match="no method 'both'; methods: window, whole"):
        methods.choose(["both"])
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        long_video.main(tmp_path / "runs", checkpoint=tmp_path)
    with pytest.raises(ValueError, match="--lengths must be positive, got 0"):
        long_video.main(tmp_path / "runs", lengths=(0,), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="no method was measured"):
        long_video.main(tmp_path / "runs", report_only=True, checkpoint=checkpoint)


@pytest.mark.slow
def test_plot(report, tmp_path) -> None:
    metrics = dict.fromkeys(report.METRICS, 0.5)
    lengths = {length: {"methods": {"window": {"metrics": metrics}}} for length in ("16", "64")}
    notes = {"window": {"group": "main"}, "both 8/4": {"group": "linkers"}}
    report.draw({"title": "any", "claims": True, "methods": notes, "lengths": lengths}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_costs(long_video, checkpoint, tmp_path) -> None:
    import long_costs

    sizes = replace(long_costs.Sizes.quick(), lengths=(1, 2), windows=1, resident=(8, 16))
    found = long_costs.measure_costs(checkpoint, sizes, tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(long_costs, "VideoMask2Former", None)  # nothing is measured again
        assert long_costs.measure_costs(checkpoint, sizes, tmp_path) == found
    assert list(found["by_length"]) == [*long_costs.MODES, "original"]
    for rows in found["by_length"].values():
        assert rows["1"]["peak_mb"] > 0
        assert len(rows["2"]["seconds_per_frame"]) == sizes.repeats
    assert 0 < found["association"]["share"] < 1
    assert next(iter(found["resident"]["by_frame"])) == "8"
    about = {"machine": {"processor": "any"}, "command": "python", "claims": False}
    text = long_costs.write_costs(tmp_path, "costs", found, about)
    assert "A rehearsal" in text
    assert "frame 16 over 8" in text
    assert json.loads((tmp_path / "costs.json").read_text())["throughput"]["ratio"] > 0

"""Running a model over a dataset: rows, shares, journals, and what is measured."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m2f_video import VideoMask2Former, VideoMask2FormerConfig, VideoProcessor, segment_video
from m2f_video.config import PreprocessingConfig
from m2f_video.data import SHAPES, SyntheticVideos, YouTubeVis, write_youtube_vis, youtube_vis_annotations
from m2f_video.evaluation import (
    evaluate,
    evaluate_model,
    load_ground_truth,
    predict,
    predict_on_all_ranks,
    predict_videos,
    prepare_ground_truth,
)
from m2f_video.evaluation.journal import Journal
from tests.training.tiny_run import KeptVideos

VIDEOS = KeptVideos(3, seed=5, num_frames=4, height=32, width=64)


@pytest.fixture(scope="module")
def model(tiny_config: VideoMask2FormerConfig) -> VideoMask2Former:
    return build(tiny_config.replace(labels=SHAPES, preprocessing=PreprocessingConfig(shortest_edge=32)))


def build(config: VideoMask2FormerConfig, seed: int = 0) -> VideoMask2Former:
    torch.manual_seed(seed)
    return VideoMask2Former(config).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def rows(model: VideoMask2Former) -> list[dict[str, Any]]:
    return predict_videos(model, VIDEOS, top_k=3)


@pytest.fixture(scope="module")
def kept(model: VideoMask2Former, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of the rows."""
    journal = tmp_path_factory.mktemp("kept") / "journal.jsonl"
    predict_videos(model, VIDEOS, top_k=3, journal=journal)
    return journal.read_bytes()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The videos in files, with categories that count neither from 1 nor in steps of 1."""
    write_youtube_vis(VIDEOS, tmp_path / "data")
    change_file(tmp_path / "data" / "train.json", spread_ids)
    return tmp_path / "data"


def change_file(file: Path, change: Any) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def spread_ids(data: dict[str, Any]) -> None:
    for row in data["categories"]:
        row["id"] = 7 * row["id"] + 1
    for row in data["annotations"]:
        row["category_id"] = 7 * row["category_id"] + 1


def count_segmented(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that are segmented from here on."""
    names: list[str] = []

    def counted(model: Any, source: Any, **options: Any) -> Any:
        names.append(source.source)
        return segment_video(model, source, **options)

    monkeypatch.setattr(predict, "segment_video", counted)
    return names


# --- rows


def test_rows_are_those_of_the_frames_in_memory(model: VideoMask2Former, rows: list[dict[str, Any]]) -> None:
    assert [row["video_id"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert any(mask is not None for row in rows for mask in row["segmentations"])
    frames = VIDEOS[1].clip(range(4)).frames.permute(0, 2, 3, 1).numpy()
    expected = segment_video(model, frames, top_k=3)
    assert rows[3:6] == [
        {
            "video_id": 2,
            "category_id": track.label_id + 1,
            "score": track.score,
            "segmentations": list(track.segmentations),
        }
        for track in expected.tracks
    ]


def test_one_frame_is_read_at_a_time(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    video = VIDEOS[0]
    clip = video.clip
    monkeypatch.setattr(video, "clip", lambda indices: asked.append(len(indices)) or clip(indices))
    monkeypatch.setattr(SyntheticVideos, "__getitem__", lambda self, index: video)
    predict_videos(model, SyntheticVideos(1, seed=5, num_frames=4, height=32, width=64), frames_per_chunk=2)
    assert asked == [1] * 4


def test_options_reach_the_segmentation(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    one = SyntheticVideos(1, seed=5, num_frames=4, height=32, width=64)
    assert len(predict_videos(model, one, top_k=1)) == 1
    larger = VideoProcessor(replace(model.config.preprocessing, shortest_edge=64), SHAPES)
    assert predict_videos(model, one, processor=larger) != predict_videos(model, one)
    with pytest.raises(ValueError, match="frames_per_chunk must be a whole number"):
        predict_videos(model, one, frames_per_chunk=0)
    asked: list[bool] = []
    monkeypatch.setattr(
        predict, "segment_video", lambda *_, plain, **options: asked.append(plain) or segment_video(*_, **options)
    )
    predict_videos(model, one, plain=True)
    predict_on_all_ranks(model, one, plain=True)
    evaluate_model(model, one, plain=True)
    predict_videos(model, one)
    assert asked == [True, True, True, False]


def test_categories_are_those_of_the_file(
    model: VideoMask2Former, tiny_config: VideoMask2FormerConfig, written: Path
) -> None:
    ids = {name: 7 * (index + 1) + 1 for index, name in enumerate(SHAPES)}
    rows = predict_videos(model, YouTubeVis(written))
    assert {row["category_id"] for row in rows} <= set(ids.values())
    # A model that orders the same labels otherwise, by the same weights, means other categories.
    turned = build(model.config.replace(labels=SHAPES[::-1]))
    name_of = {id_: name for name, id_ in ids.items()}
    opposite = dict(zip(SHAPES, SHAPES[::-1], strict=True))
    expected = [row | {"category_id": ids[opposite[name_of[row["category_id"]]]]} for row in rows]
    assert predict_videos(turned, YouTubeVis(written)) == expected
    # The order that the dataset gives its own labels in changes nothing.
    assert predict_videos(model, YouTubeVis(written, labels=SHAPES[::-1])) == rows


def test_labels_must_be_the_categories(tiny_model: VideoMask2Former, model: VideoMask2Former) -> None:
    with pytest.raises(ValueError, match=r"5 labels are not the dataset's 10 .*'person' is no category.*'disc' is no"):
        predict_videos(tiny_model, VIDEOS)
    fewer = build(model.config.replace(labels=SHAPES[:-1]))
    with pytest.raises(ValueError, match=r"9 labels are not the dataset's 10 categories: 'bar' is no label"):
        predict_videos(fewer, VIDEOS)


def test_bad_shares_and_empty_datasets(model: VideoMask2Former) -> None:
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank must be from 0"):
            predict_videos(model, VIDEOS, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match="no videos"):
        predict_videos(model, SyntheticVideos(0))


# --- shares


def test_shares_make_the_whole(model: VideoMask2Former, rows: list[dict[str, Any]]) -> None:
    first, second = (predict_videos(model, VIDEOS, top_k=3, rank=rank, world_size=2) for rank in range(2))
    assert [row["video_id"] for row in first] == [1, 1, 1, 3, 3, 3]
    assert first[:3] + second + first[3:] == rows
    assert predict_videos(model, VIDEOS, rank=4, world_size=5) == []


def test_ranks_gather_in_the_order_of_the_dataset(
    model: VideoMask2Former, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = predict_videos(model, VIDEOS, top_k=3, rank=0, world_size=2)

    def gather(shares: list[Any], own: Any) -> None:
        shares[:] = [other, own]

    monkeypatch.setattr(predict, "_ranks", lambda: (1, 2))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert predict_on_all_ranks(model, VIDEOS, top_k=3) == rows


def worker(rank: int, config: VideoMask2FormerConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stats = evaluate_model(build(config), VIDEOS, top_k=3).stats
    (folder / f"{rank}").write_text(json.dumps(stats))
    dist.destroy_process_group()


@pytest.mark.slow  # two fresh interpreters
@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_real_ranks_measure_the_same(model: VideoMask2Former, tmp_path: Path) -> None:
    mp.spawn(worker, args=(model.config, tmp_path), nprocs=2)
    expected = evaluate_model(model, VIDEOS, top_k=3).stats
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == expected


# --- journals


def test_a_stopped_run_goes_on(
    model: VideoMask2Former, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict_videos(model, VIDEOS, top_k=3, journal=journal, progress=stop)
    assert len(journal.read_bytes().splitlines()) == 3  # what it is made from, and two videos
    segmented, calls = count_segmented(monkeypatch), []
    again = predict_videos(model, VIDEOS, top_k=3, journal=journal, progress=lambda *call: calls.append(call))
    assert segmented == ["000002"]
    assert calls == [("videos", 2, 3), ("videos", 3, 3)]
    assert json.dumps(again) == json.dumps(rows)
    assert predict_videos(model, VIDEOS, top_k=3, journal=journal, frames_per_chunk=4) == rows
    assert segmented == ["000002"]


def test_a_line_that_is_cut_off_is_done_again(
    model: VideoMask2Former, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal.jsonl"
    predict_videos(model, VIDEOS, top_k=3, journal=journal)
    whole = journal.read_bytes()
    header, _, *_ = whole.splitlines()
    segmented = count_segmented(monkeypatch)
    # within the last video, all but its line's end, behind the first line, within it, and nothing
    for length, left in (
        (len(whole) - 20, 1),
        (len(whole) - 1, 1),
        (len(header) + 1, 3),
        (len(header), 3),
        (9, 3),
        (0, 3),
    ):
        journal.write_bytes(whole[:length])
        segmented.clear()
        assert predict_videos(model, VIDEOS, top_k=3, journal=journal) == rows
        assert len(segmented) == left
        assert journal.read_bytes() == whole


def test_another_share_takes_what_is_there(
    model: VideoMask2Former, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal.jsonl"
    predict_videos(model, VIDEOS, top_k=3, journal=journal, rank=0, world_size=2)
    segmented = count_segmented(monkeypatch)
    assert predict_videos(model, VIDEOS, top_k=3, journal=journal) == rows
    assert segmented == ["000001"]


def test_a_journal_of_something_else_is_refused(model: VideoMask2Former, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    predict_videos(model, VIDEOS, top_k=3, journal=journal)
    before = journal.read_bytes()
    size: dict[str, Any] = {"num_frames": 4, "height": 32, "width": 64}
    larger = VideoProcessor(replace(model.config.preprocessing, shortest_edge=64), SHAPES)
    changes: list[tuple[str, Any]] = [
        ("model", lambda **to: predict_videos(build(model.config, seed=1), VIDEOS, top_k=3, **to)),
        ("dataset", lambda **to: predict_videos(model, SyntheticVideos(2, 5, **size), top_k=3, **to)),
        ("dataset", lambda **to: predict_videos(model, SyntheticVideos(3, 6, **size), top_k=3, **to)),
        ("preprocessing", lambda **to: predict_videos(model, VIDEOS, top_k=3, processor=larger, **to)),
        ("top_k", lambda **to: predict_videos(model, VIDEOS, **to)),
    ]
    for what, run in changes:
        with pytest.raises(ValueError, match=rf"journal\.jsonl: .* another {what}; delete it to start anew"):
            run(journal=journal)
    assert journal.read_bytes() == before


def test_a_run_that_does_not_begin_leaves_no_journal(model: VideoMask2Former, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k"):
        predict_videos(model, VIDEOS, top_k=0, journal=tmp_path / "journal.jsonl")
    assert not any(tmp_path.iterdir())


ROW: dict[str, Any] = {"video_id": 1, "category_id": 1, "score": 0.5, "segmentations": [None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes", "no journal of predictions"),
        (b"my notes\n", "no journal of predictions"),
        (b"[1]\n", "no journal of predictions"),
        (b'{"made_from": {"model": "a", "top_k": 1}}\n', "no journal of predictions"),
        (b'{"made_from": {"model": "a"}}\n{"vid\n{"video": 0, "rows": []}\n', "line 2 is damaged"),
        (b'{"made_from": {"model": "a"}}\n{"video": "0", "rows": []}\n', "line 2 is damaged"),
        (b'{"made_from": {"model": "a"}}\n[]\n', "line 2 is damaged"),
        (b'{"made_from": {"model": "a"}}\n' + b"[" * 100_000 + b"\n", "line 2 is damaged"),
        (b'{"made_from": {"model": "a"}}\n{"video": 0}\n', "line 2 is damaged"),
        (b"[" * 100_000 + b"\n", "no journal of predictions"),
    ],
)
def test_files_that_are_no_journal_stay(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"journal\.jsonl: .*{message}"):
        Journal(tmp_path / "journal.jsonl", {"model": "a"})
    assert (tmp_path / "journal.jsonl").read_bytes() == content


def test_a_write_that_fails_leaves_the_journal_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.jsonl", {"model": "a"})
    journal.add(0, [ROW])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device; .*journal\.jsonl"):
            journal.add(1, [ROW | {"video_id": 2}])
    journal.add(2, [ROW | {"video_id": 3}])
    assert Journal(tmp_path / "journal.jsonl", {"model": "a"}).rows == {0: [ROW], 2: [ROW | {"video_id": 3}]}


def test_a_journal_that_would_block_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match=r"journal\.jsonl is a named pipe"):
        Journal(tmp_path / "journal.jsonl", {"model": "a"})


@pytest.mark.parametrize(
    "change",
    [
        {"video_id": 77},
        {"category_id": 77},
        {"segmentations": [None]},
        {"segmentations": [{"size": [64, 32], "counts": "0"}] * 4},
        {"segmentations": [{"size": [32, 64], "counts": "0"}] * 4},
        None,
        {"video_id": "1"},
        {"video_id": 2**63 - 1},
        {"category_id": 1.5},
        {"score": None},
        {"score": float("nan")},
        {"score": True},
        {"segmentations": None},
        {"segmentations": [[]] * 4},
        {"segmentations": [{"size": [32, 64]}] * 4},
        {"segmentations": [{"size": [32, 64], "counts": [2048]}] * 4},
    ],
)
def test_rows_of_a_journal_that_are_not_the_videos_are_refused(
    model: VideoMask2Former, kept: bytes, tmp_path: Path, change: dict[str, Any] | None
) -> None:
    journal = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in kept.splitlines()]
    assert lines[1]["rows"]
    lines[1]["rows"][0] = None if change is None else lines[1]["rows"][0] | change
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"journal\.jsonl: .*video 0.* damaged; delete the file to start anew"):
        predict_videos(model, VIDEOS, top_k=3, journal=journal)


# --- measuring


def test_a_model_is_measured_as_its_results_are(model: VideoMask2Former, rows: list[dict[str, Any]]) -> None:
    expected = evaluate(youtube_vis_annotations(VIDEOS), rows)
    result = evaluate_model(model, VIDEOS, top_k=3)
    assert result.stats == expected.stats
    np.testing.assert_array_equal(result.recall, expected.recall)


def test_a_prepared_truth_is_taken(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = prepare_ground_truth(VIDEOS)
    rendered = []
    monkeypatch.setattr(predict, "youtube_vis_annotations", lambda *_, **__: rendered.append(1))
    perfect = [
        {
            "video_id": row["video_id"],
            "category_id": row["category_id"],
            "score": 1.0,
            "segmentations": row["segmentations"],
        }
        for row in youtube_vis_annotations(VIDEOS)["annotations"]
    ]
    monkeypatch.setattr(predict, "predict_on_all_ranks", lambda *_, **__: perfect)
    assert evaluate_model(model, VIDEOS, ground_truth=truth).stats["AP"] == 1
    assert not rendered


def test_the_truth_of_files_is_the_files(written: Path) -> None:
    change_file(written / "train.json", lambda data: data["annotations"][0].update(iscrowd=1))
    whole = load_ground_truth(written / "train.json")
    truth = prepare_ground_truth(YouTubeVis(written))
    assert truth is not None
    assert [(track.id, track.crowd) for track in truth.tracks] == [(track.id, track.crowd) for track in whole.tracks]
    assert truth.tracks[0].crowd
    first = prepare_ground_truth(YouTubeVis(written, num_videos=2))
    assert first is not None
    assert list(first.sizes) == [1, 2]
    assert [track.id for track in first.tracks] == [track.id for track in whole.tracks if track.video_id < 3]
    assert first.categories == whole.categories


def test_without_annotations_there_is_no_truth(model: VideoMask2Former, written: Path) -> None:
    change_file(written / "train.json", lambda data: data.pop("annotations"))
    assert prepare_ground_truth(YouTubeVis(written)) is None
    with pytest.raises(ValueError, match="no truth to measure by"):
        evaluate_model(model, YouTubeVis(written))

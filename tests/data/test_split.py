"""Splitting a dataset by video."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f_video.data import DatasetError, SyntheticVideos, YouTubeVis, check_dataset, split_dataset, write_youtube_vis
from m2f_video.data.split import _choose


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("split") / "data"
    write_youtube_vis(SyntheticVideos(8, 3, "medium", num_frames=1, height=16, width=16), out)
    return out


def ids(file: Path) -> list[int]:
    return [video["id"] for video in json.loads(file.read_text())["videos"]]


def test_every_video_is_in_one_part_with_its_annotations(source, tmp_path):
    out = tmp_path / "out"
    assert split_dataset(source, out, 0.25, seed=1) == (6, 2)
    train, val = ids(out / "train.json"), ids(out / "val.json")
    assert sorted(train + val) == list(range(1, 9))
    assert len(val) == 2
    for file in ("train.json", "val.json"):
        assert check_dataset(out / file).faults == ()
    whole, part = YouTubeVis(source), YouTubeVis(out / "val.json")
    assert part.labels == whole.labels
    assert len(part[0].instances) == len(whole[val[0] - 1].instances)
    assert part[0].clip([0]).frames.equal(whole[val[0] - 1].clip([0]).frames)


def test_the_seed_decides(source, tmp_path):
    parts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", 3), ("e", 4)):
        split_dataset(source, tmp_path / name, 0.5, seed)
        parts.append(ids(tmp_path / name / "val.json"))
    assert parts[0] == parts[1]
    assert len({tuple(part) for part in parts}) > 1


@given(st.lists(st.sets(st.integers(0, 4)), min_size=2, max_size=12), st.integers(0, 100))
@settings(deadline=None)
def test_categories_stay_in_both_parts_as_far_as_one_video_at_a_time_can(rows, seed):
    categories = dict(enumerate(rows))
    chosen = _choose(categories, len(rows) // 2, np.random.default_rng(seed))
    assert len(chosen) == len(rows) // 2
    # with two videos for each category and room for all, none is missing anywhere
    twice = dict(enumerate([{c} for c in range(5)] * 2))
    chosen = _choose(twice, 5, np.random.default_rng(seed))
    assert set().union(*(twice[video] for video in chosen)) == set(range(5))
    assert set().union(*(twice[video] for video in twice.keys() - chosen)) == set(range(5))


@given(st.lists(st.sets(st.integers(0, 4)), min_size=2, max_size=12), st.data())
@settings(deadline=None)
def test_each_video_is_the_best_of_all_that_are_left(rows, data):
    categories = dict(enumerate(rows))
    count, seed = data.draw(st.integers(1, len(rows) - 1)), data.draw(st.integers(0, 100))
    left = np.random.default_rng(seed).permutation(len(rows)).tolist()
    expected: set[int] = set()
    for _ in range(count):
        covered = set().union(*(categories[video] for video in expected))
        last = {c for c in range(5) if sum(c in categories[video] for video in left) == 1}
        best = min(left, key=lambda video: (len(categories[video] & last), -len(categories[video] - covered)))
        left.remove(best)
        expected.add(best)
    assert _choose(categories, count, np.random.default_rng(seed)) == expected


def test_many_videos_are_no_matter():
    random = np.random.default_rng(0)
    categories = {video: set(random.integers(0, 40, 3).tolist()) for video in range(20_000)}
    start = time.process_time()
    assert len(_choose(categories, 10_000, random)) == 10_000
    assert time.process_time() - start < 5  # comparing each with each takes minutes


def test_a_category_of_one_video_stays_in_train():
    categories = {0: {1}, 1: {2}, 2: {2}, 3: {2}}
    for seed in range(20):
        assert 0 not in _choose(categories, 2, np.random.default_rng(seed))


def test_bad_arguments_and_files(source, tmp_path):
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            split_dataset(source, tmp_path / "out", fraction)
    with pytest.raises(ValueError, match="seed"):
        split_dataset(source, tmp_path / "out", 0.5, -1)
    with pytest.raises(FileExistsError, match="exists already"):
        split_dataset(source, source, 0.5)
    with pytest.raises(FileNotFoundError, match="no such dataset"):
        split_dataset(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder of frames"):
        split_dataset(source, tmp_path / "out", frames=tmp_path / "nowhere")
    video = {"id": 1, "height": 16, "width": 16, "file_names": ["000000/00000.jpg"]}
    for changes, message in (
        ({"videos": [video], "annotations": []}, "takes two videos"),
        ({"videos": [video, video | {"id": "x"}]}, "'id' must be int"),
        ({"annotations": [{"id": 4, "video_id": 99, "category_id": 1}]}, "annotation 4: there is no video 99"),
    ):
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(json.loads((source / "train.json").read_text()) | changes))
        with pytest.raises(DatasetError, match=message):
            split_dataset(bad, tmp_path / "out", frames=source / "JPEGImages")
    assert not (tmp_path / "out").exists()


def test_at_least_one_video_goes_and_one_stays(source, tmp_path):
    assert split_dataset(source, tmp_path / "few", 0.001) == (7, 1)
    assert split_dataset(source, tmp_path / "many", 0.999) == (1, 7)

"""Checking, training and measuring take the same datasets, whatever is wrong with a file."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2f_video.data import SyntheticVideos, YouTubeVis, check_dataset, write_youtube_vis
from m2f_video.evaluation import load_ground_truth

Path_ = tuple[str | int, ...]
DELETE, TWICE = object(), object()
RUBBISH = (
    DELETE, TWICE, None, True, False, 0, 1, -1, 2, 1.0, 16.0, 0.5, -0.0, 2**31, 2**63, 10**30, 1e300, float("nan"),
    float("inf"), "", "1", "x", "../x", "a\0b", "\ud800", "x" * 5000, [], [[]], {}, [None], [None, None], [1, 2],
    [16, 16], [16.0, 16.0], [0, 256], [100, 56, 100], [256, 0, 0], [-1, 257], [[0, 0, 9, 0, 9, 9]], [[0, 0, 9, 0]],
    [[0, 0, 9, 0, 9, float("nan")]], [[0, 0, 9, 0, 9, 1e9]], [[0.5, 0, 9, 0, 9, 9], [1, 1, 5, 1, 5, 5]],
    [[0, 0, 9, 9] * 10_000], {"size": [16, 16], "counts": [0, 256]}, {"size": [16, 16], "counts": "0P8", "more": 1},
    {"size": [16.0, 16.0], "counts": [100, 100, 56]},
)  # fmt: skip
# What is not right although nothing stumbles over it.
ONLY_CHECKED = ("the segmentation is empty", "it has no segmentation in any frame", "bboxes")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("agree") / "data"
    write_youtube_vis(SyntheticVideos(2, 3, "medium", num_frames=2, height=16, width=16), out)
    data = json.loads((out / "train.json").read_text())
    data["annotations"][0]["segmentations"][0] = [[1, 1, 9, 1, 9, 9]]
    data["annotations"][1]["segmentations"][1] = {"size": [16, 16], "counts": [100, 56, 100]}
    data["annotations"] = data["annotations"][:2] + data["annotations"][-1:]
    data["categories"] = data["categories"][:10]
    (out / "train.json").write_text(json.dumps(data))
    return out / "train.json"


def places(data: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place in parsed JSON, lists up to their second entry."""
    keys = list(data) if isinstance(data, dict) else range(min(len(data), 2)) if isinstance(data, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(data[key], (*path, key))


def mutated(data: Any, path: Path_, value: Any) -> Any:
    data = copy.deepcopy(data)
    part = data
    for key in path[:-1]:
        part = part[key]
    if value is DELETE:
        del part[path[-1]]
    elif value is TWICE and isinstance(part, list):
        part.append(copy.deepcopy(part[path[-1]]))
    elif value is not TWICE:
        part[path[-1]] = value
    return data


def refusal(file: Path) -> str | None:
    """What training, or measuring what it is annotated with, says of a dataset; None where both take it."""
    try:
        videos = YouTubeVis(file)
        for index in range(len(videos)):
            videos[index].clip(range(videos[index].num_frames))
        if json.loads(file.read_bytes()).get("annotations"):
            load_ground_truth(file)
    except ValueError as error:
        return str(error)
    return None


def disagreements(file: Path, cases: list[tuple[Path_, Any]]) -> list[str]:
    data = json.loads(file.read_text())
    found = []
    for path, value in cases:
        changed = file.with_name("changed.json")
        changed.write_text(json.dumps(mutated(data, path, value)))
        refused = refusal(changed)
        faults = [str(fault) for fault in check_dataset(changed).faults]
        broken = [fault for fault in faults if not any(text in fault for text in ONLY_CHECKED)]
        if (refused is None) != (not broken):
            found.append(f"{path} = {value!r:.60}: {refused} but {broken}")
        found += [f"too long: {text:.200}" for text in [*faults, refused or ""] if len(text) > 300 + len(str(file))]
    return found


def cases_of(file: Path) -> list[tuple[Path_, Any]]:
    return [(path, value) for path in places(json.loads(file.read_text())) for value in RUBBISH]


def test_the_dataset_is_sound(file: Path) -> None:
    assert refusal(file) is None
    assert check_dataset(file).faults == ()


def test_some_faults_are_seen_by_all_or_none(file: Path) -> None:
    cases = cases_of(file)
    chosen = np.random.default_rng(0).choice(len(cases), 150, replace=False)
    assert disagreements(file, [cases[index] for index in chosen]) == []


@pytest.mark.slow
def test_all_faults_are_seen_by_all_or_none(file: Path) -> None:
    assert disagreements(file, cases_of(file)) == []

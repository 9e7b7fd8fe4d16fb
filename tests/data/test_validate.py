"""The checker names every kind of fault, and finds none where there is none."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2f_video.data import DatasetError, SyntheticVideos, YouTubeVis, check_dataset, write_youtube_vis


@pytest.fixture
def dataset(tmp_path):
    """A sound dataset, and a function that spoils its annotations."""
    out = tmp_path / "data"
    write_youtube_vis(SyntheticVideos(2, 3, "medium", num_frames=3, height=32, width=48), out)

    def spoil(change) -> None:
        data = json.loads((out / "train.json").read_text())
        change(data)
        (out / "train.json").write_text(json.dumps(data))

    return out, spoil


def faults(out, **arguments: Any) -> list[tuple[int | None, str]]:
    return [(fault.annotation_id, str(fault)) for fault in check_dataset(out, **arguments).faults]


def test_a_sound_dataset_has_no_faults(dataset):
    out, spoil = dataset
    spoil(lambda data: data["annotations"][0].update(iscrowd=1))
    calls: list[tuple[int, int]] = []
    report = check_dataset(out, progress=lambda *numbers: calls.append(numbers))
    assert report.faults == ()
    assert report.file == str(out / "train.json")
    assert (report.num_videos, report.num_frames, report.num_crowds) == (2, 6, 1)
    total = 2 + report.num_annotations
    assert calls == [(done, total) for done in range(1, total + 1)]


FAULTS = {
    "unknown category": (lambda d: d["annotations"][1].update(category_id=77), 2, "there is no category 77"),
    "unknown video": (lambda d: d["annotations"][1].update(video_id=77), 2, "there is no video 77"),
    "too short": (lambda d: d["annotations"][1]["segmentations"].pop(), 2, "2 segmentations for the 3 frames"),
    "too few areas": (lambda d: d["annotations"][1]["areas"].pop(), 2, "2 areas for the 3 frames"),
    "too few boxes": (lambda d: d["annotations"][1]["bboxes"].pop(), 2, "2 bboxes for the 3 frames"),
    "same id": (lambda d: d["annotations"][1].update(id=1), 1, "annotation 1: another annotation has the same id"),
    "no id": (lambda d: d["annotations"][1].pop("id"), None, "'id' must be int, got None"),
    "never there": (lambda d: d["annotations"][1].update(segmentations=[None] * 3), 2, "no segmentation in any frame"),
    "no list": (lambda d: d["annotations"][1].pop("segmentations"), 2, "'segmentations' must be list, got None"),
    "areas no list": (lambda d: d["annotations"][1].update(areas=3), 2, "'areas' must be list, got 3"),
    "odd crowd": (lambda d: d["annotations"][1].update(iscrowd="no"), 2, "'iscrowd' must be 0 or 1"),
    "empty": (
        lambda d: d["annotations"][1]["segmentations"].__setitem__(0, {"size": [32, 48], "counts": [32 * 48]}),
        2,
        "frame 0: the segmentation is empty",
    ),
    "other size": (
        lambda d: d["annotations"][1]["segmentations"].__setitem__(1, {"size": [48, 32], "counts": "0"}),
        2,
        "frame 1: the mask is [48, 32]",
    ),
    "bad polygon": (
        lambda d: d["annotations"][1]["segmentations"].__setitem__(2, [[1, 2]]),
        2,
        "frame 2: a polygon must be",
    ),
    "wrong length": (lambda d: d["videos"][0].update(length=4), None, "video 1: length is 4, but there are 3"),
    "video twice": (lambda d: d["videos"].append(d["videos"][0]), None, "video 1: another video has the same id"),
    "no height": (lambda d: d["videos"][0].pop("height"), None, "video 1: 'height' must be int"),
    "no frames": (lambda d: d["videos"][0].update(file_names=[], length=0), None, "video 1: it has no frames"),
    "missing frame": (
        lambda d: d["videos"][0]["file_names"].__setitem__(0, "x.jpg"),
        None,
        "x.jpg: the frame of video 1",
    ),
    "outside": (lambda d: d["videos"][0]["file_names"].__setitem__(0, "../x"), None, "inside the folder"),
    "category twice": (
        lambda d: d["categories"].append({"id": 1, "name": "z"}),
        None,
        "category 1: another category has the same id",
    ),
    "name twice": (
        lambda d: d["categories"].append({"id": 99, "name": "disc"}),
        None,
        "category has the name 'disc'",
    ),
    "no name": (lambda d: d["categories"].append({"id": 99}), None, "category 99: 'name' must be str"),
    "other frame size": (
        lambda d: d["videos"][0].update(width=50),
        None,
        "32 x 48 (height x width), but video 1 is 32 x 50",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(dataset, name):
    out, spoil = dataset
    change, annotation_id, message = FAULTS[name]
    spoil(change)
    found = faults(out)
    assert [row for row in found if row[0] == annotation_id and message in row[1]], found


def test_all_faults_of_a_row_are_named(dataset):
    out, spoil = dataset
    spoil(lambda data: data["annotations"][1].update(video_id=77, category_id="x", iscrowd=2, areas=3, bboxes={}))
    spoil(lambda data: data["videos"][1].update(height=-1, length=7, file_names=["/x", "../x"]))
    texts = [text.partition("train.json: ")[2] for _, text in faults(out)]
    assert texts == [
        "video 2: height must be positive, got -1",
        "video 2: length is 7, but there are 2 file names",
        "video 2: '/x' is no file name inside the folder of frames",
        "video 2: '../x' is no file name inside the folder of frames",
        "annotation 2: 'category_id' must be int, got 'x'",
        "annotation 2: there is no video 77",
        "annotation 2: 'iscrowd' must be 0 or 1, got 2",
        "annotation 2: 'areas' must be list, got 3",
        "annotation 2: 'bboxes' must be list, got {}",
    ]


def test_damaged_frames_are_named(dataset):
    out, _ = dataset
    first, second, third = sorted((out / "JPEGImages" / "000000").iterdir())
    first.write_bytes(b"no picture")
    second.unlink()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(third)
    found = check_dataset(out).faults
    assert [fault.file for fault in found] == [str(first), str(second), str(third)]
    for fault, message in zip(found, ("cannot read", "missing", "is 8 x 8"), strict=True):
        assert message in fault.message
        assert fault.annotation_id is None


def test_files_and_folders_that_are_missing_or_no_dataset(dataset, tmp_path):
    out, _ = dataset
    with pytest.raises(FileNotFoundError, match="no such dataset"):
        check_dataset(tmp_path / "nowhere")
    (out / "JPEGImages").rename(tmp_path / "frames")
    assert [message for _, message in faults(out) if "no folder of frames" in message]
    assert faults(out, frames=tmp_path / "frames") == []
    with pytest.raises(FileNotFoundError, match="no such folder of frames"):
        check_dataset(out, frames=tmp_path / "nothing")
    (out / "train.json").write_text("{")
    ((_, message),) = faults(out)
    assert "train.json: not an annotation file" in message
    assert message.count("train.json") == 1


def loads(out) -> bool:
    try:
        for video in YouTubeVis(out):
            video.clip(range(video.num_frames))
    except DatasetError:
        return False
    return True


def test_whatever_does_not_load_is_reported(dataset):
    out, spoil = dataset
    good = json.loads((out / "train.json").read_text())
    assert loads(out)
    for table in ("videos", "categories", "annotations"):
        for key in good[table][0]:
            for rubbish in (None, -1, 10**30, "x", [], {}, [None], True):
                spoil(lambda data, t=table, k=key, r=rubbish: data[t][0].__setitem__(k, r))
                assert loads(out) or check_dataset(out).faults, (table, key, rubbish)
                (out / "train.json").write_text(json.dumps(good))

"""Which dataset a text opens."""

import json
import os
import shutil
from pathlib import Path

import pytest

from m2f_video.data import (
    DIFFICULTIES,
    STANDARD_SPLITS,
    SyntheticVideos,
    YouTubeVis,
    check_dataset,
    open_dataset,
    split_dataset,
    write_youtube_vis,
)
from m2f_video.data.source import is_synthetic


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_youtube_vis(SyntheticVideos(2, num_frames=1, height=16, width=16), tmp_path / "data")
    return tmp_path / "data"


def opened(source: str | Path, split) -> str:
    videos = open_dataset(source, split)
    assert isinstance(videos, YouTubeVis)
    return videos.file.name


@pytest.mark.parametrize("split", STANDARD_SPLITS)
def test_the_standard_splits(split):
    for difficulty in DIFFICULTIES:
        videos = open_dataset(f"synthetic:{difficulty}", split)
        assert isinstance(videos, SyntheticVideos)
        assert (videos.num_videos, videos.seed) == tuple(STANDARD_SPLITS[split].values())
        assert videos.difficulty == DIFFICULTIES[difficulty]
        assert (videos.num_frames, videos.height, videos.width) == (16, 192, 320)
    plain = open_dataset("synthetic", split, num_videos=5)
    assert plain.difficulty == DIFFICULTIES["medium"]
    assert len(plain) == 5
    assert len(open_dataset("synthetic", split, num_videos=10**6)) == STANDARD_SPLITS[split]["num_videos"]


def test_splits_share_no_seed():
    assert STANDARD_SPLITS == {
        "train": {"num_videos": 20000, "seed": 0},
        "val": {"num_videos": 100, "seed": 1000},
        "test": {"num_videos": 100, "seed": 2000},
    }


def test_a_folder_gives_the_file_of_the_split(folder):
    assert {opened(folder, split) for split in STANDARD_SPLITS} == {"train.json"}  # it holds no other
    (folder / "val.json").write_bytes((folder / "train.json").read_bytes())
    assert [opened(folder, split) for split in ("train", "val")] == ["train.json", "val.json"]
    with pytest.raises(FileNotFoundError, match=r"holds val\.json but no test\.json for the split 'test'"):
        open_dataset(folder, "test")
    (folder / "val.json").rename(folder / "test.json")
    assert opened(folder, "test") == "test.json"
    (folder / "test.json").rename(folder / "valid.json")
    assert opened(str(folder), "val") == "valid.json"
    assert opened(folder / "valid.json", "test") == "valid.json"  # a file is taken as it is


LAYOUTS = {
    # where an annotation file and its frames are: train, val, and which of them a folder is asked for
    "YouTubeVIS 2019": ("train.json", "train/JPEGImages", "valid.json", "valid/JPEGImages"),
    "YouTubeVIS 2021": ("train/instances.json", "train/JPEGImages", "valid/instances.json", "valid/JPEGImages"),
    "OVIS": ("annotations_train.json", "train", "annotations_valid.json", "valid"),
    "LV-VIS": ("train_instances.json", "JPEGImages/train", "val_instances.json", "JPEGImages/val"),
    "LV-VIS, unpacked in one place": (
        "train_instances_.json", "train/JPEGImages", "val_instances_.json", "val/JPEGImages"
    ),
    "LV-VIS, one folder each": (
        "train/train_instances_.json", "train/JPEGImages", "val/val_instances_.json", "val/JPEGImages"
    ),
    "ours": ("train.json", "JPEGImages", "val.json", "JPEGImages"),
}  # fmt: skip


def lay_out(folder: Path, out: Path, annotations: str, frames: str) -> None:
    """A dataset whose annotations and frames lie at these places of a folder."""
    for place in (annotations, frames):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / annotations).write_bytes((folder / "train.json").read_bytes())
    shutil.copytree(folder / "JPEGImages", out / frames, dirs_exist_ok=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_datasets_are_found_as_they_are_published(layout, folder, tmp_path):
    train, train_frames, val, val_frames = LAYOUTS[layout]
    out = tmp_path / "out"
    lay_out(folder, out, train, train_frames)
    lay_out(folder, out, val, val_frames)
    for split, file, frames in (("train", train, train_frames), ("val", val, val_frames)):
        source = (out / file).parent
        found = open_dataset(source, split)
        assert isinstance(found, YouTubeVis)
        assert found.file == out / file
        assert found[0].files[0] == out / frames / "000000" / "00000.jpg"
        assert len(found[0].clip([0]).frames) == 1
        assert check_dataset(out / file).faults == ()
    assert check_dataset((out / train).parent).file == str(out / train)
    assert split_dataset((out / train).parent, tmp_path / "parts", 0.5) == (1, 1)
    assert check_dataset(tmp_path / "parts" / "val.json").faults == ()


def test_the_folder_that_holds_the_frames_is_taken(folder, tmp_path):
    lay_out(folder, tmp_path / "out", "annotations_train.json", "train")
    (tmp_path / "out" / "JPEGImages").mkdir()
    assert open_dataset(tmp_path / "out", "train")[0].clip([0]).frames.any()


def test_frames_elsewhere_are_named(folder, tmp_path):
    (folder / "JPEGImages").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no folder of frames, none of JPEGImages, .*; name it \(--frames"):
        open_dataset(folder, "train")
    assert open_dataset(folder, "train", frames=tmp_path / "elsewhere")[0].clip([0]).frames.any()
    with pytest.raises(ValueError, match="synthetic:easy is rendered, it has no folder of frames"):
        open_dataset("synthetic:easy", "train", frames=tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "train.json")
    with pytest.raises(ValueError, match=r"train\.json is a named pipe"):
        open_dataset(tmp_path / "train.json", "train")


def test_the_first_videos_of_a_folder(folder):
    videos = open_dataset(folder, "train", num_videos=1)
    assert [len(videos), videos[0].video_id] == [1, 1]
    with pytest.raises(IndexError):
        videos[1]
    assert len(open_dataset(folder, "train", num_videos=9)) == 2
    for count in (0, -1):
        with pytest.raises(ValueError, match="num_videos must be positive"):
            open_dataset(folder, "train", num_videos=count)
        with pytest.raises(ValueError, match="num_videos must be positive"):
            YouTubeVis(folder, num_videos=count)


def test_category_ids_are_the_files(folder):
    data = json.loads((folder / "train.json").read_text())
    data["categories"] = [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}]
    data["annotations"] = []
    (folder / "train.json").write_text(json.dumps(data))
    assert list(YouTubeVis(folder, labels=("cat", "dog")).category_ids.items()) == [("dog", 4), ("cat", 9)]


def test_only_a_text_means_the_benchmark(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("synthetic")
    assert isinstance(open_dataset("synthetic", "train"), SyntheticVideos)
    assert opened("./synthetic", "train") == opened(Path("synthetic"), "train") == "train.json"
    assert not is_synthetic("synthetics")


@pytest.mark.parametrize(
    ("source", "split", "error", "message"),
    [
        ("synthetic:extreme", "val", ValueError, "unknown difficulty 'extreme'; difficulties: easy, medium, hard"),
        ("synthetic:", "val", ValueError, "unknown difficulty ''"),
        ("nowhere", "val", FileNotFoundError, r"nowhere: there is no such dataset; .*synthetic:\{easy,medium,hard\}"),
        ("synthetic", "dev", ValueError, "unknown split 'dev'; splits: train, val, test"),
        (".", "val", FileNotFoundError, "holds no train.json or instances.json"),
    ],
)
def test_faults(source, split, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        open_dataset(source, split)

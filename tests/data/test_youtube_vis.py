"""Reading and writing the YouTubeVIS format: masks come back exactly, bad files give one clear error."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco

from m2f_video.data import (
    ClipDataset,
    DatasetError,
    SyntheticVideos,
    YouTubeVis,
    check_dataset,
    write_youtube_vis,
    youtube_vis_annotations,
)
from m2f_video.results.masks import decode_segmentation, encode_mask

H, W, T = 20, 30, 4


def mask_at(left: int) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[5:12, left : left + 6] = True
    return mask


def rle(left: int) -> dict[str, Any]:
    encoded = encode_mask(mask_at(left))
    assert encoded is not None
    return encoded


def annotation(id_: int, segmentations: list[Any], **fields: Any) -> dict[str, Any]:
    return {"id": id_, "video_id": 4, "category_id": 20, "iscrowd": 0, "segmentations": segmentations} | fields


def write_dataset(folder: Path, **changes: Any) -> Path:
    """One video of 4 frames with three instances and a crowd, and one of a single frame without any."""
    data: dict[str, Any] = {
        "videos": [
            {"id": 4, "height": H, "width": W, "length": T, "file_names": [f"a/{t}.jpg" for t in range(T)]},
            {"id": 2, "height": H, "width": W, "length": 1, "file_names": ["b/0.jpg"]},
        ],
        "categories": [{"id": 20, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "owl"}],
        "annotations": [
            annotation(11, [rle(0), None, rle(4), rle(8)]),
            annotation(12, [None, None, rle(9), None], category_id=3),
            annotation(13, [rle(1)] * T, iscrowd=1),
            annotation(14, [None, [[2, 3, 10, 3, 10, 9, 2, 9]], None, []], category_id=7),
        ],
    }
    for name in ("a/0", "a/1", "a/2", "a/3", "b/0"):
        file = folder / "JPEGImages" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((H, W, 3), 40 * int(name[-1]), np.uint8)).save(file)
    (folder / "train.json").write_text(json.dumps(data | changes))
    return folder


def test_categories_are_numbered_by_rising_id_and_crowds_skipped(tmp_path):
    dataset = YouTubeVis(write_dataset(tmp_path))
    assert dataset.labels == ("cat", "owl", "dog")
    assert len(dataset) == 2
    clip = dataset[0].clip(range(T))
    assert clip.instance_ids.tolist() == [11, 12, 14]
    assert clip.labels.tolist() == [2, 0, 1]
    assert clip.video_id == 4
    assert clip.present.tolist() == [
        [True, False, True, True],
        [False, False, True, False],
        [False, True, False, False],
    ]
    assert np.array_equal(clip.masks[0, 3].numpy(), mask_at(8))
    assert clip.masks[2, 1].sum() == 8 * 6
    assert clip.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([0, 40, 80, 120], abs=1)


def test_categories_by_name(tmp_path):
    dataset = YouTubeVis(write_dataset(tmp_path), labels=("owl", "dog", "hen", "cat"))
    assert dataset[0].clip([0, 1, 2]).labels.tolist() == [1, 3, 0]
    with pytest.raises(DatasetError, match="not among the labels: owl"):
        YouTubeVis(tmp_path, labels=("dog", "cat"))


def test_instances_in_no_sampled_frame_are_dropped_and_frames_may_repeat(tmp_path):
    video = YouTubeVis(write_dataset(tmp_path))[0]
    clip = video.clip([0, 2, 2])
    assert clip.instance_ids.tolist() == [11, 12]
    assert clip.present.tolist() == [[True, True, True], [False, True, True]]
    assert not clip.masks[1, 0].any()
    assert torch.equal(clip.frames[1], clip.frames[2])
    assert video.clip([1]).instance_ids.tolist() == [14]


def test_an_encoded_empty_mask_counts_as_annotated_but_not_as_seen(tmp_path):
    empty = {"size": [H, W], "counts": [H * W]}
    write_dataset(tmp_path, annotations=[annotation(1, [rle(0), empty, None, empty]), annotation(2, [empty] * T)])
    clip = YouTubeVis(tmp_path)[0].clip(range(T))
    assert clip.instance_ids.tolist() == [1]
    assert clip.present.tolist() == [[True, True, False, True]]


def test_single_frame_videos_and_videos_without_instances_make_clips(tmp_path):
    clip = ClipDataset(YouTubeVis(write_dataset(tmp_path)))[1]
    assert clip.frame_indices == (0, 0)
    assert clip.masks.shape == (0, 2, H, W)


def test_where_files_are_looked_for(tmp_path):
    write_dataset(tmp_path / "x")
    assert len(YouTubeVis(tmp_path / "x" / "train.json")) == 2
    (tmp_path / "x" / "train.json").rename(tmp_path / "x" / "instances.json")
    assert len(YouTubeVis(tmp_path / "x")) == 2
    (tmp_path / "x" / "instances.json").rename(tmp_path / "x.json")  # as YouTubeVIS 2019 is packed
    assert len(YouTubeVis(tmp_path / "x.json")) == 2
    (tmp_path / "x.json").rename(tmp_path / "y.json")
    assert len(YouTubeVis(tmp_path / "y.json", frames=tmp_path / "x" / "JPEGImages")) == 2
    for arguments in ({"path": tmp_path / "y.json"}, {"path": tmp_path / "x"}, {"path": tmp_path / "nothing"}):
        with pytest.raises(FileNotFoundError, match=str(arguments["path"])):
            YouTubeVis(**arguments)
    with pytest.raises(FileNotFoundError, match="no such folder of frames"):
        YouTubeVis(tmp_path / "y.json", frames=tmp_path / "z")


def test_names_are_those_of_the_folders_of_frames(tmp_path):
    dataset = YouTubeVis(write_dataset(tmp_path))
    assert [video.name for video in dataset] == ["a", "b"]
    write_youtube_vis(dataset, tmp_path / "copy")
    assert [video.name for video in YouTubeVis(tmp_path / "copy")] == ["a", "b"]
    flat = [{"id": 4, "height": H, "width": W, "file_names": ["0.jpg"]}]
    assert YouTubeVis(write_dataset(tmp_path, videos=flat, annotations=[]))[0].name == "4"


def test_a_test_set_has_no_annotations(tmp_path):
    assert len(YouTubeVis(write_dataset(tmp_path, annotations=None))[0].clip([0]).labels) == 0


VIDEO = {"id": 4, "height": H, "width": W, "file_names": ["a/0.jpg"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": 3}, "'videos' must be a list"),
        ({"categories": []}, "no categories"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            "category 1: another .* same id",
        ),
        ({"categories": [{"id": 1}]}, "'name' must be str"),
        ({"videos": [VIDEO, VIDEO]}, "video 4: another video has the same id"),
        ({"videos": [VIDEO | {"height": 0}], "annotations": []}, "video 4: height must be positive"),
        ({"videos": [VIDEO | {"file_names": []}]}, "video 4: it has no frames"),
        ({"videos": [VIDEO | {"file_names": ["../a.jpg"]}]}, "inside the folder"),
        ({"videos": [VIDEO | {"file_names": ["/etc/a.jpg"]}]}, "inside the folder"),
        ({"annotations": [annotation(5, [None] * 3)]}, "annotation 5: 3 segmentations for the 4 frames of video 4"),
        ({"annotations": [annotation(5, [None] * T, video_id=9)]}, "annotation 5: there is no video 9"),
        ({"annotations": [annotation(5, [None] * T, category_id=1)]}, "annotation 5: there is no category 1"),
        ({"annotations": [annotation(5, [None] * T)] * 2}, "annotation 5: another annotation has the same id"),
        ({"annotations": [{"id": 5, "video_id": 4, "category_id": 3}]}, "annotation 5: 'segmentations' must be list"),
        ({"annotations": [{"id": True}]}, "'id' must be int, got True"),
    ],
)
def test_bad_annotations_are_named(tmp_path, changes, message):
    write_dataset(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message) as error:
        YouTubeVis(tmp_path)
    assert str(tmp_path / "train.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"videos": [1], "categories": []}', "[" * 100000])
def test_files_that_are_no_annotations(tmp_path, text):
    write_dataset(tmp_path)
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DatasetError, match="not an annotation file"):
        YouTubeVis(tmp_path)


def test_bad_frames_and_masks_are_named_when_they_are_read(tmp_path):
    wrong = {"size": [W, H], "counts": rle(0)["counts"]}
    write_dataset(tmp_path, annotations=[annotation(8, [None, None, None, wrong])])
    video = YouTubeVis(tmp_path)[0]
    with pytest.raises(DatasetError, match=r"a/3\.jpg: annotation 8: .*\[30, 20\]"):
        video.clip([3])
    frames = tmp_path / "JPEGImages" / "a"
    Image.fromarray(np.zeros((H, W + 1, 3), np.uint8)).save(frames / "0.jpg")
    with pytest.raises(DatasetError, match=r"a/0.jpg: the frame is 20 x 31"):
        video.clip([0])
    (frames / "1.jpg").write_bytes((frames / "1.jpg").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a/1.jpg: cannot read the frame"):
        video.clip([1])
    (frames / "2.jpg").unlink()
    with pytest.raises(ValueError, match=r"a/2.jpg: cannot read the frame"):
        video.clip([2])
    with pytest.raises(ValueError, match="no frame 4"):
        video.clip([4])
    with pytest.raises(IndexError, match="no video 2"):
        YouTubeVis(tmp_path)[2]


# --- segmentations


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_both_run_length_encodings_give_the_mask_back(mask):
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    uncompressed = {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}
    decoded = decode_segmentation(uncompressed, *mask.shape)
    assert decoded is not None
    assert np.array_equal(decoded, mask)
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    decoded = decode_segmentation({"size": list(mask.shape), "counts": counts}, *mask.shape)
    assert decoded is not None
    assert np.array_equal(decoded, mask)


def test_polygons_of_one_instance_are_joined():
    mask = decode_segmentation([[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]], H, W)
    assert mask is not None
    assert mask.sum() == 32
    assert mask[2, 2]
    assert mask[12, 12]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 4, 0]], "at least three points"),
        ([[0, 0, 4, 0, 4, 4, 1]], "at least three points"),
        ([3], "must be a list"),
        ([[0, 0, 4, 0, 4, "a"]], "no coordinate"),
        ([[0, 0, 4, 0, 4, 1e9]], "far outside"),
        ([[0, 0, 4, 0, 4, float("nan")]], "no coordinate"),
        ([[0, 0, 4, 0, 4, 10**400]], "no coordinate"),
        ([[0, 0, 4, 0, 4, True]], "no coordinate"),
        ({"size": [H, W], "counts": [H * W - 1]}, "do not cover 20 x 30"),
        ({"size": [H, W], "counts": [H * W + 1, -1]}, "do not cover"),
        ({"size": [W, H], "counts": [H * W]}, r"\[30, 20\]"),
        ({"counts": [H * W]}, "the mask is None"),
        ({"size": [H, W], "counts": "0"}, "damaged"),
        ({"size": [H, W]}, "segmentation is null or"),
        ("abc", "segmentation is null or"),
        (5, "segmentation is null or"),
    ],
)
def test_damaged_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, H, W)


@pytest.mark.parametrize(("height", "width"), [(10**9, 10**9), (2**27, 1), (1, 2**28), (2**15, 2**14)])
@pytest.mark.parametrize(
    "segmentation",
    [
        [[0, 0, 4, 0, 4, 4]],
        {"counts": []},
        {"counts": "0"},
    ],
)
def test_a_wild_size_takes_no_memory(segmentation, height, width):
    if isinstance(segmentation, dict):
        segmentation = {"size": [height, width], **segmentation}
    with pytest.raises(ValueError, match="too large for a mask"):
        decode_segmentation(segmentation, height, width)


@pytest.mark.parametrize(
    ("polygons", "height", "width"),
    [
        ([[0, 0, 4000, 3000] * 2000], 3000, 4000),  # there and back again, 32 million steps of 16 bytes
        ([[-4000, 0, 8000, 0, 0, 3000]] * 500, 3000, 4000),
        ([[0, 0] * 20_000], H, W),
        ([[1.5, 1.5, 1.5, 1.5, 1.6, 1.6]] * 10_000, H, W),
        ([[0, 0, 2**16 - 1, 0, 0, 2**12 - 1] * 40], 2**12, 2**16),
    ],
)
def test_outlines_that_no_picture_has_take_no_memory(polygons, height, width):
    start = time.process_time()
    with pytest.raises(ValueError, match="outlines are longer than any in a frame"):
        decode_segmentation(polygons, height, width)
    assert time.process_time() - start < 1


def test_outlines_of_all_that_a_picture_can_show_are_drawn():
    angles = np.linspace(0, 2 * np.pi, 20_000)
    star = np.stack([1920 + np.cos(angles) * (900 + 100 * np.sin(500 * angles)), 1080 + 900 * np.sin(angles)], 1)
    mask = decode_segmentation([star.ravel().tolist()], 2160, 3840)
    assert mask is not None
    assert 2e6 < mask.sum() < 3e6
    leaves = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1] for x in range(0, 200, 2) for y in range(0, 400, 2)]
    start = time.process_time()
    mask = decode_segmentation(leaves, 400, 200)
    assert mask is not None
    assert mask.sum() == len(leaves) == 20_000
    assert time.process_time() - start < 5


def test_many_categories_and_labels_are_no_matter(tmp_path):
    categories = [{"id": number, "name": f"class {number}"} for number in range(5001)]
    write_dataset(tmp_path, categories=categories[:5000], annotations=[])
    start = time.process_time()
    assert YouTubeVis(tmp_path).labels[-1] == "class 4999"
    assert time.process_time() - start < 2
    write_dataset(tmp_path, categories=categories, annotations=[])
    with pytest.raises(DatasetError, match="5001 categories are too many"):
        YouTubeVis(tmp_path)


def test_a_frame_that_would_block_is_refused(tmp_path):
    frame = write_dataset(tmp_path) / "JPEGImages" / "a" / "0.jpg"
    frame.unlink()
    os.mkfifo(frame)
    with pytest.raises(ValueError, match=r"a/0\.jpg is a named pipe"):
        YouTubeVis(tmp_path)[0].clip([0])
    (fault,) = [fault for fault in check_dataset(tmp_path).faults if fault.file == str(frame)]
    assert "is a named pipe" in fault.message


# --- writing


@pytest.fixture(scope="module")
def videos() -> SyntheticVideos:
    return SyntheticVideos(2, 5, "hard", num_frames=5, height=40, width=60)


def test_what_is_written_is_read_back(tmp_path, videos):
    calls: list[tuple[int, int]] = []
    write_youtube_vis(videos, tmp_path / "new" / "out", videos.info, lambda *numbers: calls.append(numbers))
    assert calls == [(1, 2), (2, 2)]
    read = YouTubeVis(tmp_path / "new" / "out")
    assert read.labels == videos.labels
    for index in range(2):
        ours, theirs = videos[index].clip(range(5)), read[index].clip(range(5))
        assert torch.equal(ours.masks, theirs.masks)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.present, theirs.present)
        assert (ours.frames.float() - theirs.frames.float()).abs().mean() < 4  # JPEG, of noisy frames
    data = json.loads((tmp_path / "new" / "out" / "train.json").read_text())
    assert data["info"]["difficulty"] == "hard"
    assert data["info"]["seed"] == 5
    assert data == json.loads(json.dumps(youtube_vis_annotations(videos, videos.info)))
    assert data["videos"][1]["file_names"][2] == "000001/00002.jpg"


def test_areas_and_boxes_are_those_of_the_masks(videos):
    rows = youtube_vis_annotations(videos)["annotations"]
    masks = torch.cat([videos[index].clip(range(5)).masks for index in range(2)]).numpy()
    assert [row["id"] for row in rows] == list(range(1, len(masks) + 1))
    for row, frames in zip(rows, masks, strict=True):
        for area, box, rle_, mask in zip(row["areas"], row["bboxes"], row["segmentations"], frames, strict=True):
            assert (rle_ is None) == (area is None) == (box is None) == (not mask.any())
            if mask.any():
                y, x = np.nonzero(mask)
                assert area == mask.sum()
                assert box == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]


def test_existing_folders_are_left_alone_and_failures_leave_nothing(tmp_path, videos):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(FileExistsError, match="exists already"):
            write_youtube_vis(videos, out)
    (tmp_path / "empty").mkdir()
    write_youtube_vis(videos, tmp_path / "empty")
    assert (tmp_path / "empty" / "train.json").exists()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_youtube_vis(videos, tmp_path / "a" / "b", progress=stop)
    assert {file.name for file in tmp_path.iterdir()} == {"full", "empty"}

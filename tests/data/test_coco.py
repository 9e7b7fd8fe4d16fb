"""COCO images as pseudo-videos."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_video.categories import COCO_TO_VIS, LABEL_SETS
from m2f_video.data import CameraMotion, CocoVideos, DatasetError

H, W = 40, 60
STILL = CameraMotion(rotation=0, translation=0, zoom=1)

# COCO category id -> dataset id, as published mappers have them
COCO_IDS = {
    "person": 1,
    "bicycle": 2,
    "car": 3,
    "motorcycle": 4,
    "airplane": 5,
    "bus": 6,
    "train": 7,
    "truck": 8,
    "boat": 9,
    "bird": 16,
    "cat": 17,
    "dog": 18,
    "horse": 19,
    "sheep": 20,
    "cow": 21,
    "elephant": 22,
    "bear": 23,
    "zebra": 24,
    "giraffe": 25,
    "frisbee": 34,
    "skis": 35,
    "snowboard": 36,
    "skateboard": 41,
    "surfboard": 42,
    "tennis racket": 43,
}
PUBLISHED = {
    "youtubevis_2019": "1:1 2:21 3:6 4:21 5:28 7:17 8:29 9:34 17:14 18:8 19:18 21:15 22:32 23:20 24:30 25:22 35:33"
    " 36:33 41:5 42:27 43:40",
    "youtubevis_2021": "1:26 2:23 3:5 4:23 5:1 7:36 8:37 9:4 16:3 17:6 18:9 19:19 21:7 22:12 23:2 24:40 25:18 34:14"
    " 35:31 36:31 41:29 42:33 43:34",
    "ovis": "1:1 2:21 3:25 4:22 5:23 6:25 8:25 9:24 17:3 18:4 19:5 20:6 21:7 22:8 23:9 24:10 25:11",
}


@pytest.mark.parametrize("label_set", LABEL_SETS)
def test_the_category_map_is_the_published_one(label_set):
    ours = {COCO_IDS[a]: LABEL_SETS[label_set].index(b) + 1 for a, b in COCO_TO_VIS[label_set].items()}
    assert " ".join(f"{a}:{b}" for a, b in ours.items()) == PUBLISHED[label_set]


def annotation(id_: int, category: int = 3, **fields: Any) -> dict[str, Any]:
    box = [[10, 8, 40, 8, 40, 30, 10, 30]]
    return {"id": id_, "image_id": 9, "category_id": category, "iscrowd": 0, "segmentation": box} | fields


def write_coco(folder: Path, **changes: Any) -> tuple[Path, Path]:
    data: dict[str, Any] = {
        "images": [
            {"id": 5, "height": H, "width": W, "file_name": "none.jpg"},
            {"id": 9, "height": H, "width": W, "file_name": "one.png"},
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 6, "name": "bus"}, {"id": 44, "name": "bottle"}],
        "annotations": [annotation(1), annotation(2, 44), annotation(3, iscrowd=1), annotation(4, 44, image_id=5)],
    }
    image = np.zeros((H, W, 3), np.uint8)
    image[8:30, 10:40] = 255
    Image.fromarray(image).save(folder / "one.png")
    (folder / "instances.json").write_text(json.dumps(data | changes))
    return folder / "instances.json", folder


def test_only_known_categories_and_images_with_them_are_kept(tmp_path):
    videos = CocoVideos(*write_coco(tmp_path), "youtubevis_2019")
    assert len(videos) == 1
    assert videos[0].name == "one"
    clip = videos[0].clip([0, 999])
    assert [videos.labels[label] for label in clip.labels] == ["sedan"]
    assert clip.instance_ids.tolist() == [1]
    assert clip.video_id == 9
    assert CocoVideos(*write_coco(tmp_path), "ovis")[0].clip([0]).labels.tolist() == [24]


def test_annotations_of_images_that_a_subset_leaves_out_are_no_fault(tmp_path):
    assert len(CocoVideos(*write_coco(tmp_path, annotations=[annotation(1), annotation(2, image_id=77)]))) == 1


def test_objects_without_a_pixel_make_an_empty_clip(tmp_path):
    videos = CocoVideos(*write_coco(tmp_path, annotations=[annotation(1, segmentation=None)]))
    assert videos[0].clip([0, 5]).masks.shape == (0, 2, H, W)


def test_a_still_camera_shows_the_image(tmp_path):
    clip = CocoVideos(*write_coco(tmp_path), motion=STILL)[0].clip([0, 3])
    assert torch.equal(clip.frames[:, 0] > 0, clip.masks[0])
    assert clip.masks[0, 1].sum() == 22 * 30


@pytest.mark.parametrize("field", CameraMotion.__dataclass_fields__)
def test_every_field_moves_frames_and_masks_together(tmp_path, field):
    paths = write_coco(tmp_path)
    motion = {"rotation": 0.0, "translation": 0.0, "zoom": 1.0, "period": 10.0}
    if field == "period":
        motion["rotation"] = 20.0
        still = CocoVideos(*paths, motion=CameraMotion(**motion))[0].clip(range(6))
        motion["period"] = 25.0
    else:
        still = CocoVideos(*paths, motion=CameraMotion(**motion))[0].clip(range(6))
        motion[field] = {"rotation": 20.0, "translation": 0.2, "zoom": 1.5}[field]
    clip = CocoVideos(*paths, motion=CameraMotion(**motion))[0].clip(range(6))
    assert not torch.equal(clip.masks, still.masks)
    assert ((clip.frames[:, 0] > 127) ^ clip.masks[0]).float().mean() < 0.03
    assert len({frame.numpy().tobytes() for frame in clip.frames}) == 6


def test_views_depend_on_seed_and_frame_alone(tmp_path):
    paths = write_coco(tmp_path)
    first = CocoVideos(*paths, seed=1)[0].clip([7, 2, 7])
    assert torch.equal(first.frames[0], first.frames[2])
    assert torch.equal(first.frames[1], CocoVideos(*paths, seed=1)[0].clip([2]).frames[0])
    assert not torch.equal(first.frames, CocoVideos(*paths, seed=2)[0].clip([7, 2, 7]).frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [annotation(7, 99)]}, "annotation 7: there is no category 99"),
        ({"annotations": [annotation(7, image_id="x")]}, "annotation 7: 'image_id' must be int"),
        ({"categories": [{"id": 44, "name": "bottle"}], "annotations": []}, "none of its categories"),
        ({"images": None}, "'images' must be a list"),
        ({"images": [{"id": 9, "height": H, "width": W, "file_name": "../x"}]}, "inside the folder"),
        ({"images": [{"id": 9, "width": W, "file_name": "one.png"}]}, "image 9: 'height' must be int"),
    ],
)
def test_bad_annotations_are_named(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        CocoVideos(*write_coco(tmp_path, **changes))


def test_bad_images_masks_and_arguments(tmp_path):
    paths = write_coco(tmp_path, annotations=[annotation(7, segmentation=[[1, 2]])])
    with pytest.raises(DatasetError, match=r"one.png: annotation 7: .* three points"):
        CocoVideos(*paths)[0].clip([0])
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(tmp_path / "one.png")
    with pytest.raises(DatasetError, match=r"one.png: the frame is 3 x 3"):
        CocoVideos(*paths)[0].clip([0])
    with pytest.raises(ValueError, match="unknown label set 'coco'"):
        CocoVideos(*paths, "coco")
    with pytest.raises(ValueError, match="num_frames"):
        CocoVideos(*paths, num_frames=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoVideos(paths[0], tmp_path / "nowhere")
    with pytest.raises(IndexError, match="no video 1"):
        CocoVideos(*paths)[1]


@pytest.mark.parametrize(
    ("field", "value"), [("rotation", -1), ("translation", 2), ("zoom", 0.5), ("period", float("nan"))]
)
def test_impossible_motions_are_named(field, value):
    with pytest.raises(ValueError, match=f"CameraMotion.{field}"):
        CameraMotion(**{field: value})


IMAGE = {"id": 9, "height": H, "width": W, "file_name": "one.png"}


def test_images_that_would_take_all_memory_or_block_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="image 9: another image has the same id"):
        CocoVideos(*write_coco(tmp_path, images=[IMAGE, IMAGE]))
    for height, width in ((10**9, 10**9), (1, 2**27)):
        with pytest.raises(DatasetError, match=r"image 9: a picture of .* is too large"):
            CocoVideos(*write_coco(tmp_path, images=[IMAGE | {"height": height, "width": width}]))
    for polygon in ([0, 0, W, H] * 5000, [0, 0] * 100_000, [float("inf")] * 6, [0, 0, 1, 1, 1, 2**62]):
        videos = CocoVideos(*write_coco(tmp_path, annotations=[annotation(1, segmentation=[polygon])]))
        with pytest.raises(DatasetError, match=r"one\.png: annotation 1: "):
            videos[0].clip([0])
    paths = write_coco(tmp_path)
    (tmp_path / "one.png").unlink()
    os.mkfifo(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"one\.png is a named pipe"):
        CocoVideos(*paths)[0].clip([0])

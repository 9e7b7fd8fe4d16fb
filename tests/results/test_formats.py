"""Results in the formats of other programs: what they hold, and that they come back."""

import csv
import dataclasses
import importlib
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.coco import COCO

from m2f_video.evaluation.annotations import GroundTruth, load_results
from m2f_video.results.formats.coco import write_coco
from m2f_video.results.formats.png import davis_palette
from m2f_video.results.formats.table import COLUMNS
from m2f_video.results.formats.youtube_vis import write_youtube_vis
from m2f_video.results.masks import decode_mask, encode_mask
from m2f_video.results.tracks import Track, VideoSegmentation
from m2f_video.results.tracks_file import TracksLines
from m2f_video.video.reader import VideoReader
from tests.results.test_results import LABELS, H, T, W, box_mask, make_segmentation, make_track

FRAMES = (3, 6, 9, 12)


@pytest.fixture
def apart() -> VideoSegmentation:
    """Two tracks that do not overlap, the second of which is not seen in one frame; a third is never seen."""
    upper = tuple(encode_mask(box_mask(2, 5 * n)) if n != 2 else None for n in range(T))
    lower = tuple(encode_mask(box_mask(20, 3 * n + 1)) for n in range(T))
    tracks = (
        make_track(segmentations=upper, certainty=0.97, query_id=1),
        make_track(id=1, label="train", label_id=2, score=0.95, query_id=0, segmentations=lower),
        make_track(id=5, label="person", label_id=0, score=0.1, query_id=2, segmentations=(None,) * T),
    )
    return make_segmentation(frames=FRAMES, fps=30000 / 1001, tracks=tracks, video=None)


@pytest.fixture
def overlapping() -> VideoSegmentation:
    best = (encode_mask(box_mask(4, 4)),) * T
    other = (encode_mask(box_mask(8, 8)),) * T
    tracks = (
        make_track(id=7, label="person", label_id=0, score=0.4, query_id=1, segmentations=other),
        make_track(id=3, label="dog", label_id=1, score=0.8, query_id=0, segmentations=best),
        make_track(id=4, label="train", label_id=2, score=0.2, query_id=0, segmentations=best),
    )
    return make_segmentation(tracks=tracks)


def as_lines(result: VideoSegmentation, folder: Path) -> VideoSegmentation:
    """The same, with masks read from a `tracks.jsonl` when they are asked for."""
    result.save(folder, overlay=False)
    return VideoSegmentation.load(folder / "tracks.jsonl")


def saved_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


# --- boxes and shows


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_a_box_is_the_smallest_around_a_mask(mask: np.ndarray) -> None:
    box = make_track(segmentations=(encode_mask(mask),)).box(0)
    if not mask.any():
        assert box is None
        return
    rows, columns = np.nonzero(mask)
    x, y, width, height = box  # type: ignore[misc]
    assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert all(type(value) is int for value in (x, y, width, height))


def test_boxes_of_all_frames() -> None:
    assert make_track().boxes == ((0, 4, 10, 10), (5, 4, 10, 10), None, (15, 4, 10, 10))
    with pytest.raises(IndexError, match="frame 4"):
        make_track().box(T)
    empty = {"size": [H, W], "counts": encode_mask(~np.zeros((H, W), bool))["counts"]}  # type: ignore[index]
    assert make_track(segmentations=(empty,)).box(0) == (0, 0, W, H)


def test_a_mask_without_a_pixel_has_no_box() -> None:
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(np.zeros((H, W), np.uint8)))
    assert make_track(segmentations=(rle,)).box(0) is None


def test_reprs_are_short() -> None:
    result = make_segmentation()
    assert repr(result.tracks[1]) == "<Track 2: 'dog', score 0.900, 3 of 4 frames>"
    assert repr(result) == ("<VideoSegmentation of 'cars.mp4': 4 frames of 48x32, 2 tracks (train 0.95, dog 0.90)>")
    many = [make_track(id=n, label="x" * 500, label_id=0) for n in range(1, 20)]
    assert len(repr(make_segmentation(labels=["x" * 500], tracks=many, source="y" * 10**5))) < 700
    assert len(repr(many[0])) < 120


HOSTILE = '<script>alert("1")</script>\'"&'


def test_a_notebook_shows_frames_and_tracks() -> None:
    html = make_segmentation()._repr_html_()
    assert html.count("<img ") == T
    assert html.count("<tr>") == 3
    assert "data:image/jpeg;base64," in html
    assert "masks alone" not in html
    assert "http" not in html


def test_nothing_from_a_file_is_markup_in_a_notebook() -> None:
    track = make_track(label=HOSTILE, label_id=0)
    for video in (None, np.full((T, H, W, 3), 90, np.uint8), f"/{HOSTILE}.mp4"):
        html = make_segmentation(source=HOSTILE, labels=[HOSTILE], tracks=[track], video=video)._repr_html_()
        assert "<script" not in html
        assert html.count("&lt;script&gt;") >= 2


def test_a_notebook_shows_masks_where_the_video_is_not_at_hand() -> None:
    for video, reason in (
        (None, "not at hand"),
        ("/nowhere.mp4", "no such video"),
        (iter([np.zeros((H, W, 3), np.uint8)]), "read once"),
        (np.zeros((T, H, W + 1, 3), np.uint8), "but the segmented one was"),
        (np.zeros((T - 1, H, W, 3), np.uint8), "frame 3 was segmented but the video does not give it"),
    ):
        html = make_segmentation(video=video)._repr_html_()
        assert "(masks alone: " in html
        assert reason in html
        assert html.count("<img ") == T


def test_a_notebook_does_not_decode_an_hour() -> None:
    decoded: list[int] = []

    class Hour(VideoReader):
        def __iter__(self) -> Iterator[np.ndarray]:
            for index in range(90_000):
                decoded.append(index)
                yield np.full((H, W, 3), 90, np.uint8)

    track = make_track(segmentations=(encode_mask(box_mask(1, 1)),) * 2000)
    video = Hour("hour.mp4", (H, W), Fraction(25), None, slice(None))
    html = make_segmentation(frames=range(2000), tracks=[track], video=video)._repr_html_()
    assert "frame 299" in html
    assert "masks alone" not in html
    assert decoded[-1] == 299


# --- maps


def test_the_best_score_wins_where_masks_overlap(overlapping: VideoSegmentation) -> None:
    best, other = box_mask(4, 4), box_mask(8, 8)
    expected = np.where(best, 3, np.where(other, 7, 0))
    np.testing.assert_array_equal(overlapping.instance_map(1), expected)
    np.testing.assert_array_equal(overlapping.semantic_map(1), np.where(best, 2, np.where(other, 1, 0)))
    assert overlapping.instance_map(0).dtype == np.int64
    assert overlapping.semantic_map(0).dtype == np.int32
    for call in (overlapping.instance_map, overlapping.semantic_map):
        with pytest.raises(IndexError, match="frame -1"):
            call(-1)
    assert not make_segmentation(tracks=()).instance_map(0).any()


def test_ids_of_any_size_are_in_a_map() -> None:
    result = make_segmentation(tracks=[make_track(id=10**12)])
    assert set(np.unique(result.instance_map(0)).tolist()) == {0, 10**12}


# --- round trips


def by_coco(result: VideoSegmentation, folder: Path) -> VideoSegmentation:
    write_coco(result, folder / "coco.json")
    assert json.loads((folder / "coco.json").read_text()) == result.to_coco()
    return VideoSegmentation.from_coco(folder / "coco.json")


def by_youtube_vis(result: VideoSegmentation, folder: Path) -> VideoSegmentation:
    write_youtube_vis(result, folder / "rows.json", video_id=4)
    rows = result.to_youtube_vis(video_id=4)
    assert json.loads((folder / "rows.json").read_text()) == rows
    options: dict[str, Any] = {"fps": result.fps, "frames": result.frames}
    assert VideoSegmentation.from_youtube_vis(rows, LABELS, **options).tracks == VideoSegmentation.from_youtube_vis(
        folder / "rows.json", LABELS, **options
    ).tracks  # fmt: skip
    return VideoSegmentation.from_youtube_vis(folder / "rows.json", LABELS, video_id=4, **options)


def by_png(result: VideoSegmentation, folder: Path) -> VideoSegmentation:
    result.to_png(folder / "maps")
    return VideoSegmentation.from_png(folder / "maps")


@pytest.mark.parametrize("way", [by_coco, by_youtube_vis, by_png])
@pytest.mark.parametrize("lines", [False, True])
def test_what_does_not_overlap_comes_back_whole(
    apart: VideoSegmentation, way: Callable[..., VideoSegmentation], lines: bool, tmp_path: Path
) -> None:
    given = as_lines(apart, tmp_path / "result") if lines else apart
    back = way(given, tmp_path)
    if way is not by_youtube_vis:
        assert back.source == apart.source
    assert dataclasses.replace(back, source=apart.source) == apart


@pytest.mark.parametrize("way", [by_coco, by_youtube_vis])
def test_formats_of_several_masks_a_pixel_keep_overlaps(
    overlapping: VideoSegmentation, way: Callable[..., VideoSegmentation], tmp_path: Path
) -> None:
    assert dataclasses.replace(way(overlapping, tmp_path), source=overlapping.source) == overlapping


def test_png_maps_hold_what_the_best_score_leaves(overlapping: VideoSegmentation, tmp_path: Path) -> None:
    back = by_png(overlapping, tmp_path)
    assert [(track.id, track.label, track.score) for track in back.tracks] == [
        (3, "dog", 0.8),
        (7, "person", 0.4),
        (4, "train", 0.2),
    ]
    np.testing.assert_array_equal(back.instance_map(2), overlapping.instance_map(2))
    assert back.tracks[2].num_frames_visible == 0


@pytest.mark.parametrize("lines", [False, True])
def test_mots_comes_back_but_for_scores(apart: VideoSegmentation, lines: bool, tmp_path: Path) -> None:
    file = tmp_path / "mots.txt"
    (as_lines(apart, tmp_path / "result") if lines else apart).to_mots(file)
    line = file.read_text().splitlines()[0].split(" ")
    assert line[:5] == ["3", "1", "3", str(H), str(W)]
    assert line[5] == encode_mask(box_mask(20, 1))["counts"]  # type: ignore[index]
    back = VideoSegmentation.from_mots(file, LABELS, fps=apart.fps, frames=apart.frames)
    assert {track.id: (track.label, track.segmentations, track.score) for track in back.tracks} == {
        track.id: (track.label, track.segmentations, 1.0) for track in apart.tracks[:2]
    }
    assert (back.frames, back.fps, back.source) == (apart.frames, apart.fps, "mots")
    assert VideoSegmentation.from_mots(file, LABELS).frames == tuple(range(13))


def test_masks_of_mots_do_not_overlap(overlapping: VideoSegmentation, tmp_path: Path) -> None:
    overlapping.to_mots(tmp_path / "mots.txt")
    back = VideoSegmentation.from_mots(tmp_path / "mots.txt", LABELS)
    assert back.masks(0).sum(0).max() == 1
    assert sorted(track.id for track in back.tracks) == [3, 7]


def test_a_result_without_tracks(tmp_path: Path) -> None:
    empty = make_segmentation(tracks=())
    assert by_coco(empty, tmp_path) == empty
    assert by_png(empty, tmp_path) == empty
    back = VideoSegmentation.from_youtube_vis(empty.to_youtube_vis(), LABELS, size=(H, W), frames=range(T))
    assert back.tracks == ()
    empty.to_mots(tmp_path / "mots.txt")
    assert (tmp_path / "mots.txt").read_text() == ""
    assert VideoSegmentation.from_mots(tmp_path / "mots.txt", LABELS, size=(H, W), frames=range(T)).tracks == ()
    empty.to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines() == [",".join(COLUMNS)]
    assert empty._repr_html_().count("<img ") == T


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 5), st.integers(1, 40), st.integers(1, 40))
def test_any_result_without_overlaps_comes_back(seed: int, length: int, count: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, count + 1, (length, height, width)) * (rng.random((length, 1, 1)) < 0.8)
    scores = np.sort(rng.random((2, count)))[:, ::-1]
    tracks = [
        make_track(
            id=int(id_), query_id=place, score=float(scores[0, place]), certainty=float(scores[1, place]),
            segmentations=tuple(encode_mask(owner == place + 1) for owner in owners),
        )
        for place, id_ in enumerate(rng.permutation(200)[:count] + 1)
    ]  # fmt: skip
    tracks = [dataclasses.replace(t, query_id=n) for t, n in zip(tracks, _queries(tracks), strict=True)]
    frames = np.sort(rng.permutation(10**6)[:length]).tolist()
    result = make_segmentation(width=width, height=height, tracks=tracks, frames=frames, video=None)
    for way in (by_coco, by_png):
        with tempfile.TemporaryDirectory() as folder:
            assert way(result, Path(folder)) == result
    for position in range(length):
        expected = np.array([0, *(track.id for track in tracks)])[owners[position]]
        np.testing.assert_array_equal(result.instance_map(position), expected)


def _queries(tracks: list[Track]) -> list[int]:
    """Tracks that are never seen have equal masks, and count as one query's when they come back."""
    return [next(n for n, other in enumerate(tracks) if other.segmentations == t.segmentations) for t in tracks]


# --- coco


def test_pycocotools_reads_what_is_written(apart: VideoSegmentation, tmp_path: Path) -> None:
    write_coco(apart, tmp_path / "coco.json")
    coco = COCO(tmp_path / "coco.json")
    assert sorted(coco.imgs) == [1, 2, 3, 4]
    assert [coco.imgs[n]["file_name"] for n in (1, 4)] == ["00003.jpg", "00012.jpg"]
    assert [coco.cats[n]["name"] for n in sorted(coco.cats)] == list(LABELS)
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=2)):
        track = next(track for track in apart.tracks if track.id == annotation["track_id"])
        np.testing.assert_array_equal(coco.annToMask(annotation), track.mask(1))
        assert tuple(annotation["bbox"]) == track.box(1)
        assert annotation["area"] == track.area(1)
    assert len(coco.anns) == 7


def test_one_frame_in_coco(apart: VideoSegmentation) -> None:
    one = apart.to_coco(2)
    assert [image["frame_index"] for image in one["images"]] == [9]
    assert [row["track_id"] for row in one["annotations"]] == [1]
    assert one["annotations"][0]["image_id"] == one["images"][0]["id"] == 3
    with pytest.raises(IndexError, match="frame 4"):
        apart.to_coco(4)
    back = VideoSegmentation.from_coco(one)
    assert back.frames == (9,)
    np.testing.assert_array_equal(back.instance_map(0), apart.instance_map(2))


def test_coco_of_other_programs(tmp_path: Path) -> None:
    image = {"width": W, "height": H}
    data = {
        "images": [{"id": 70, **image, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "brush"}],
        "annotations": [
            {"id": 1, "image_id": 70, "category_id": 90, "segmentation": [[2, 3, 12, 3, 12, 13, 2, 13]], "score": 0.5},
            {"id": 2, "image_id": 70, "category_id": 3, "segmentation": {"size": [H, W], "counts": [0, 9, H * W - 9]}},
        ],
    }
    result = VideoSegmentation.from_coco(saved_json(tmp_path / "boxes.json", data))
    assert [(track.id, track.label, track.score) for track in result.tracks] == [(2, "car", 1.0), (1, "brush", 0.5)]
    assert result.tracks[1].box(0) == (2, 3, 10, 10)
    assert (result.source, result.fps, result.labels) == ("boxes", 25.0, ("car", "brush"))


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images",), DELETE, "the file has no 'images'"),
        (("images",), [], "there are no images"),
        (("images", 1, "width"), W + 1, "sizes"),
        (("images", 0), 3, "image 0 has no 'id'"),
        (("images", 1, "id"), 1, "two images have the same id"),
        (("images", 1, "frame_index"), 3, "frames must be rising"),
        (("images", 1, "frame_index"), True, "image 1: 'frame_index' has the wrong type"),
        (("categories", 1, "id"), 1, "two categories have the same id"),
        (("annotations", 0), None, "annotation 0 has no"),
        (("annotations", 0, "track_id"), DELETE, "annotation 1 has no 'track_id'"),
        (("annotations", 0, "image_id"), 99, "annotation 1: image_id 99 is not among"),
        (("annotations", 0, "category_id"), 2, "annotation 1: its track has category_id 3"),
        (("annotations", 0, "track_id"), 2, "annotation 1: its track has category_id 2, and it has 3"),
        (("annotations", 0, "segmentation"), DELETE, "annotation 1 has no 'segmentation'"),
        (("annotations", 0, "segmentation", "counts"), "zz", "annotation 1: the run lengths are damaged"),
        (("annotations", 0, "score"), "high", "annotation 1: 'score' has the wrong type"),
        (("annotations", 0, "image_id"), 2, "annotation 2: track 1 is there twice in image 2"),
        (("tracks", 0, "category_id"), 9, "category_id 9"),
        (("tracks", 0, "id"), 5, "two tracks have the same id"),
        (("tracks", 0), [], "'tracks' holds something that is no object"),
        (("videos", 0, "fps"), 0, "fps must be positive"),
        (("videos", 0, "fps"), "25", "the video: 'fps' has the wrong type"),
    ],
)
def test_coco_that_is_damaged(
    apart: VideoSegmentation, path: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    data = apart.to_coco()
    data["annotations"].sort(key=lambda row: row["track_id"])  # 1 to 4 are of track 1
    for number, row in enumerate(data["annotations"], 1):
        row["id"] = number
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if value is DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    file = saved_json(tmp_path / "coco.json", data)
    with pytest.raises(ValueError, match=rf"coco\.json: .*{message}"):
        VideoSegmentation.from_coco(file)
    with pytest.raises(ValueError, match=message):
        VideoSegmentation.from_coco(data)


def test_many_tracks_in_many_images_are_refused() -> None:
    images = [{"id": n, "width": 1, "height": 1} for n in range(20000)]
    data = {"images": images, "categories": [], "annotations": [], "tracks": [{"id": n} for n in range(20000)]}
    with pytest.raises(ValueError, match="too many for a result in memory"):
        VideoSegmentation.from_coco(data)


# --- youtube-vis


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].pop("video_id"), "row 0 has no 'video_id'"),
        (lambda rows: rows[0].update(video_id=2), "of 2 videos"),
        (lambda rows: rows[1].update(category_id=4), "row 1: category_id 4 is none of the 3 labels"),
        (lambda rows: rows[1].update(score=None), "row 1: 'score' has the wrong type"),
        (lambda rows: rows[1].update(segmentations=7), "row 1: 'segmentations' has the wrong type"),
        (lambda rows: rows[1]["segmentations"].pop(), "3 segmentations for 4 frames"),
        (lambda rows: rows[1]["segmentations"].__setitem__(1, {"size": [2, 2], "counts": "4"}), "row 1, frame 1: the"),
        (lambda rows: rows.insert(0, 5), "row 0 has no 'video_id'"),
        (lambda rows: rows.clear(), "no mask to tell the size"),
    ],
)  # fmt: skip
def test_youtube_vis_rows_that_are_damaged(
    apart: VideoSegmentation, change: Callable[[list[Any]], object], message: str, tmp_path: Path
) -> None:
    rows = apart.to_youtube_vis()
    change(rows)
    with pytest.raises(ValueError, match=message):
        VideoSegmentation.from_youtube_vis(rows, LABELS)
    with pytest.raises(ValueError, match=rf"rows\.json: .*{message}"):
        VideoSegmentation.from_youtube_vis(saved_json(tmp_path / "rows.json", rows), LABELS)


def test_another_file_than_rows(apart: VideoSegmentation, tmp_path: Path) -> None:
    apart.save(tmp_path, overlay=False)
    with pytest.raises(ValueError, match=r"is a tracks\.json; read it with VideoSegmentation\.load"):
        VideoSegmentation.from_youtube_vis(tmp_path / "tracks.json", LABELS)
    with pytest.raises(ValueError, match="a list of rows"):
        VideoSegmentation.from_youtube_vis(saved_json(tmp_path / "a.json", {}), LABELS)
    with pytest.raises(FileNotFoundError):
        VideoSegmentation.from_youtube_vis(tmp_path / "none.json", LABELS)


def test_one_of_several_videos(apart: VideoSegmentation) -> None:
    rows = apart.to_youtube_vis(1) + make_segmentation().to_youtube_vis(2)
    assert len(VideoSegmentation.from_youtube_vis(rows, LABELS, video_id=2).tracks) == 2
    with pytest.raises(ValueError, match="no mask"):
        VideoSegmentation.from_youtube_vis(rows, LABELS, video_id=3)


def test_the_evaluator_takes_the_rows(apart: VideoSegmentation) -> None:
    truth = GroundTruth(source="a", sizes={4: (H, W, T)}, categories={1: "a", 2: "b", 3: "c"}, tracks=())
    tracks = load_results(apart.to_youtube_vis(4), truth)
    assert [(track.category_id, track.score) for track in tracks] == [(3, 0.95), (2, 0.9), (1, 0.1)]


def test_many_tracks_pass_in_groups(tmp_path: Path) -> None:
    masks = [(encode_mask(box_mask(n % 20, n % 37)),) * T for n in range(150)]
    tracks = [make_track(id=n + 1, score=1 - n / 200, query_id=n, segmentations=m) for n, m in enumerate(masks)]
    result = make_segmentation(tracks=tracks)
    write_youtube_vis(result, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == result.to_youtube_vis()
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


# --- png


def test_the_palette_is_that_of_pascal_voc_and_davis() -> None:
    palette = davis_palette()
    assert palette.shape == (256, 3)
    assert palette[:9].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128],
        [128, 128, 128], [64, 0, 0],
    ]  # fmt: skip
    assert palette[20].tolist() == [0, 64, 128]
    assert palette[255].tolist() == [224, 224, 192]
    assert len(np.unique(palette, axis=0)) == 256


def test_maps_are_indexed_and_named_by_frame(apart: VideoSegmentation, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    apart.to_png(tmp_path / "new" / "maps", progress=lambda done, total: calls.append((done, total)))
    names = sorted(path.name for path in (tmp_path / "new" / "maps").iterdir())
    assert names == ["00003.png", "00006.png", "00009.png", "00012.png", "ids.json"]
    assert calls == [(n, T) for n in range(1, T + 1)]
    with Image.open(tmp_path / "new" / "maps" / "00003.png") as image:
        assert image.mode == "P"
        assert np.array(image.getpalette(), np.uint8).reshape(-1, 3)[2].tolist() == [0, 128, 0]
        np.testing.assert_array_equal(np.asarray(image), apart.instance_map(0))
    with pytest.raises(FileExistsError, match="exists already"):
        apart.to_png(tmp_path / "new" / "maps")


def test_large_ids_have_small_numbers(tmp_path: Path) -> None:
    lower = (encode_mask(box_mask(20, 30)),) * T
    tracks = [make_track(id=300), make_track(id=7, score=0.1, segmentations=lower)]
    result = make_segmentation(tracks=tracks)
    assert by_png(result, tmp_path).tracks == tuple(dataclasses.replace(t, query_id=n) for n, t in enumerate(tracks))
    with Image.open(tmp_path / "maps" / "00000.png") as image:
        assert set(np.unique(np.asarray(image)).tolist()) == {0, 1, 2}
    many = make_segmentation(tracks=[make_track(id=n) for n in range(1, 257)])
    with pytest.raises(ValueError, match="256 tracks are more than the 255"):
        many.to_png(tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_maps_of_other_programs(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        Image.fromarray((box_mask(3, 3) * 5 + box_mask(20, 9 * number) * 255).astype(np.uint8)).save(tmp_path / name)
    result = VideoSegmentation.from_png(tmp_path, fps=10)
    assert [(track.id, track.label, track.score, track.num_frames_visible) for track in result.tracks] == [
        (5, "object", 1.0, 2)
    ]
    assert (result.frames, result.fps, result.source) == ((0, 1), 10, tmp_path.name)
    Image.fromarray(np.zeros((H, W), np.uint8)).save(tmp_path / "c.png")
    assert len(VideoSegmentation.from_png(tmp_path).frames) == 3


def test_maps_that_are_none(apart: VideoSegmentation, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            VideoSegmentation.from_png(tmp_path / "maps")

    refused("there is no such folder")
    (tmp_path / "maps").mkdir()
    refused("holds no PNG files")
    apart.to_png(tmp_path / "maps")
    first, ids = tmp_path / "maps" / "00003.png", tmp_path / "maps" / "ids.json"
    whole, said = first.read_bytes(), json.loads(ids.read_text())
    first.write_bytes(whole[:200])
    refused(r"maps: 00003\.png is no PNG, or cut off")
    first.write_bytes(b"")
    refused(r"maps: 00003\.png is no PNG, or cut off")
    Image.new("RGB", (W, H)).save(first)
    refused(r"00003\.png is no map of numbers: its pixels are RGB")
    Image.new("L", (W + 1, H)).save(first)
    refused(r"00006\.png is \(32, 48\)")
    Image.new("L", (W, H), 9).save(first)
    refused(r"the maps hold 9, of which ids\.json says nothing")
    first.write_bytes(whole)
    for change, message in (
        ({"tracks": [said["tracks"][0]] * 2}, "track 1: a value is one track's"),
        ({"tracks": [said["tracks"][0] | {"value": 0}]}, "a value is one track's, from 1 to 255, got 0"),
        ({"tracks": None}, "'tracks' has the wrong type"),
        ({"video": said["video"] | {"width": 7}}, "says 32 x 7"),
        ({"video": {}}, "video has no 'height'"),
        ({"tracks": [row | {"category": "cat"} for row in said["tracks"]]}, "label 'cat' is not number"),
    ):
        ids.write_text(json.dumps(said | change))
        refused(message)


# --- mots


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", "line 1: a line is 'frame id class height width counts', got '1 2 3'"),
        ("0 1 1 32 x a", "line 1: a line is"),
        ("0 1 1 32 48 zzz", "line 1: the run lengths are damaged"),
        ("0 1 4 {rle}", "line 1: class 4 is none of the 3 labels"),
        ("0 1 1 {rle}\n1 1 2 {rle}", "line 2: track 1 is of class 1 before, and of 2 here"),
        ("0 1 1 {rle}\n0 1 1 {rle}", "line 2: track 1 is there twice in frame 0"),
        ("0 1 1 {rle}\n1 1 1 2 2 4", r"line 2: the mask is \[2, 2\]"),
        ("", "holds no mask to tell the size"),
        ("\0\xff", "line 1: a line is"),
        ("999999999 1 1 {rle}", "frame 999999999 is of no video that is read without frames"),
    ],
)
def test_mots_that_is_damaged(text: str, message: str, tmp_path: Path) -> None:
    rle = encode_mask(box_mask(3, 3))
    assert rle is not None
    (tmp_path / "a.txt").write_bytes(text.format(rle=f"{H} {W} {rle['counts']}").encode("latin-1"))
    with pytest.raises(ValueError, match=rf"a\.txt.*{message}"):
        VideoSegmentation.from_mots(tmp_path / "a.txt", LABELS)


def test_mots_of_other_programs(tmp_path: Path) -> None:
    rle = encode_mask(box_mask(3, 3))
    assert rle is not None
    counts = f"{H} {W} {rle['counts']}"
    (tmp_path / "0002.txt").write_text(f"4 2005 2 {counts}\n4 10000 10 {counts}\n6 2005 2 {counts}\n")
    result = VideoSegmentation.from_mots(tmp_path / "0002.txt", ("car", "pedestrian"))
    assert [(track.id, track.label, track.num_frames_visible) for track in result.tracks] == [(2005, "pedestrian", 2)]
    assert result.frames == tuple(range(7))
    with pytest.raises(ValueError, match="masks in frame 6, which is not among the frames given"):
        VideoSegmentation.from_mots(tmp_path / "0002.txt", ("car", "pedestrian"), frames=range(6))
    with pytest.raises(FileNotFoundError):
        VideoSegmentation.from_mots(tmp_path / "none.txt", LABELS)


# --- tables and detections


def test_a_table_has_a_row_for_every_track_in_every_frame(apart: VideoSegmentation, tmp_path: Path) -> None:
    apart.to_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["frame"], row["id"]) for row in rows] == [
        ("3", "1"), ("3", "2"), ("6", "1"), ("6", "2"), ("9", "1"), ("12", "1"), ("12", "2"),
    ]  # fmt: skip
    assert {key: rows[3][key] for key in ("label", "x", "y", "width", "height", "area")} == {
        "label": "dog", "x": "5", "y": "2", "width": "10", "height": "10", "area": "100",
    }  # fmt: skip
    assert float(rows[3]["time"]) == pytest.approx(6 * 1001 / 30000)
    assert float(rows[3]["score"]) == 0.9


def test_a_pandas_data_frame(apart: VideoSegmentation, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = apart.to_dataframe()
    assert list(table.columns) == list(COLUMNS)
    apart.to_csv(tmp_path / "a.csv")
    pandas.testing.assert_frame_equal(table, pandas.read_csv(tmp_path / "a.csv"), check_dtype=False)
    assert table.groupby("label")["area"].sum().to_dict() == {"dog": 300, "train": 400}
    empty = make_segmentation(tracks=()).to_dataframe()
    assert {name: str(kind) for name, kind in empty.dtypes.items()}["area"] == "int64"
    assert list(empty.columns) == list(COLUMNS)


class Detections(SimpleNamespace):
    """What is used of supervision's, where that is not installed."""

    @classmethod
    def empty(cls) -> "Detections":
        return cls(xyxy=np.empty((0, 4), np.float32), mask=None, tracker_id=None)

    def __len__(self) -> int:
        return len(self.xyxy)


def test_detections_have_boxes_masks_and_ids(apart: VideoSegmentation, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        importlib.import_module("supervision")
    except ImportError:
        monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=Detections))
    detections = apart.to_supervision()
    assert len(detections) == T
    second = detections[1]
    assert second.xyxy.tolist() == [[4, 20, 14, 30], [5, 2, 15, 12]]
    assert second.tracker_id.tolist() == [1, 2]
    assert second.class_id.tolist() == [2, 1]
    assert second.confidence.tolist() == pytest.approx([0.95, 0.9])
    assert second.data["class_name"].tolist() == ["train", "dog"]
    np.testing.assert_array_equal(second.mask, apart.masks(1)[:2])
    assert [len(each) for each in detections] == [2, 2, 1, 2]
    assert [len(each) for each in detections[2:]] == [1, 2]
    assert len(detections[-1]) == 2
    assert [len(each) for each in make_segmentation(tracks=()).to_supervision()] == [0] * T
    with pytest.raises(IndexError):
        detections[T]


def test_supervision_takes_them(apart: VideoSegmentation) -> None:
    supervision = pytest.importorskip("supervision")
    drawn = supervision.MaskAnnotator().annotate(np.zeros((H, W, 3), np.uint8), apart.to_supervision()[0])
    assert (drawn[apart.masks(0).any(0)] > 0).any(-1).all()


@pytest.mark.parametrize(("name", "method"), [("pandas", "to_dataframe"), ("supervision", "to_supervision")])
def test_a_package_that_is_missing_is_named(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{method} needs {name}: pip install 'm2f-video\[results\]'"):
        getattr(make_segmentation(), method)()


# --- any length, all or nothing


WRITERS: dict[str, Callable[..., Any]] = {
    "coco": write_coco,
    "youtube-vis": write_youtube_vis,
    "png": VideoSegmentation.to_png,
    "mots": VideoSegmentation.to_mots,
    "csv": VideoSegmentation.to_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_line_of_a_long_result_is_read_once(
    apart: VideoSegmentation, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = as_lines(apart, tmp_path / "result")
    read: list[int] = []
    masks = TracksLines.masks

    def watched(self: TracksLines, position: int) -> Any:
        if position != self._last[0]:
            read.append(position)
        return masks(self, position)

    monkeypatch.setattr(TracksLines, "masks", watched)
    calls: list[tuple[int, int]] = []
    WRITERS[name](lines, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert read == list(range(T))
    assert calls == [(n, T) for n in range(1, T + 1)]


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    noise = encode_mask(np.random.default_rng(0).random((120, 160)) < 0.5)
    size = {"width": 160, "height": 120, "frames": range(250)}
    result = make_segmentation(**size, tracks=[make_track(segmentations=(noise,) * 250)], video=None)
    lines = as_lines(result, tmp_path / "result")
    assert (tmp_path / "result" / "tracks.jsonl").stat().st_size > 2 * 2**20
    for name in ("coco", "youtube-vis"):  # as for the others, a whole frame is in memory anyway
        tracemalloc.start()
        WRITERS[name](lines, tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_half_written_remains(apart: VideoSegmentation, name: str, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](apart, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    if name != "png":  # which makes folders
        with pytest.raises(FileNotFoundError, match="nowhere"):
            WRITERS[name](apart, tmp_path / "nowhere" / "out")
        assert list(tmp_path.iterdir()) == []


def test_masks_are_those_of_the_result(apart: VideoSegmentation) -> None:
    for row in apart.to_coco()["annotations"]:
        track = next(track for track in apart.tracks if track.id == row["track_id"])
        np.testing.assert_array_equal(decode_mask(row["segmentation"]), track.mask(row["image_id"] - 1))

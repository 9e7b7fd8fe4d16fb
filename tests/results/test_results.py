import copy
import dataclasses
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from m2f_video.results import masks as masks_module
from m2f_video.results import overlay
from m2f_video.results.masks import encode_mask
from m2f_video.results.tracks import Track, VideoSegmentation
from m2f_video.video import VideoError, open_video, read_video

H, W, T = 32, 48, 4
LABELS = ("person", "dog", "train")


def box_mask(top: int, left: int, size: int = 10) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def make_track(**changes: Any) -> Track:
    segmentations = tuple(encode_mask(box_mask(4, 5 * index)) if index != 2 else None for index in range(T))
    fields = {"id": 2, "label": "dog", "label_id": 1, "score": 0.9, "query_id": 7, "segmentations": segmentations}
    return Track(**(fields | changes))


def make_segmentation(**changes: Any) -> VideoSegmentation:
    other = tuple(encode_mask(box_mask(15, 3 * index + 1)) for index in range(T))
    fields: dict[str, Any] = {
        "source": "cars.mp4",
        "width": W,
        "height": H,
        "fps": 25,
        "frames": range(T),
        "labels": LABELS,
        "tracks": (
            make_track(),
            make_track(id=1, label="train", label_id=2, score=0.95, query_id=3, segmentations=other),
        ),
        "video": np.full((T, H, W, 3), 90, np.uint8),
    }
    return VideoSegmentation(**(fields | changes))


# --- masks


@given(arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_masks_survive_run_length_encoding(mask: np.ndarray) -> None:
    rle = encode_mask(mask)
    if not mask.any():
        assert rle is None
        return
    assert rle is not None
    assert json.loads(json.dumps(rle)) == rle
    track = make_track(segmentations=(None, rle))
    np.testing.assert_array_equal(track.mask(1), mask)
    np.testing.assert_array_equal(track.mask(0), np.zeros_like(mask))
    assert (track.area(1), track.area(0), track.num_frames_visible) == (mask.sum(), 0, 1)
    assert encode_mask(mask.astype(np.uint8)) == rle


@pytest.mark.parametrize("mask", [np.zeros((2, 3, 4), bool), np.zeros((3, 4)), np.zeros((0, 4), bool)])
def test_what_is_no_mask(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a mask must be"):
        encode_mask(mask)


@given(arrays(bool, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.booleans()))
def test_run_lengths_are_read_as_pycocotools_writes_them(mask: np.ndarray) -> None:
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    runs = masks_module._text_runs(counts)
    assert runs is not None
    values = np.resize([False, True], len(runs))
    np.testing.assert_array_equal(np.repeat(values, runs), mask.ravel(order="F"))


def test_run_lengths_of_large_masks() -> None:
    for index in (0, 1, 5_000_000, 9_999_999):
        mask = np.zeros(10_000_000, np.uint8)
        mask[index] = 1
        runs = masks_module._text_runs(
            coco.encode(np.asfortranarray(mask.reshape(4000, 2500, order="F")))["counts"].decode()
        )
        assert runs is not None
        assert runs.tolist() == [n for n in (index, 1, 10_000_000 - index - 1) if n or index == 0][: len(runs)]


# --- tracks and results


def test_tracks_are_sorted_by_score_and_give_their_masks() -> None:
    result = make_segmentation()
    assert [track.score for track in result.tracks] == [0.95, 0.9]
    masks = result.masks(2)
    assert masks.shape == (2, H, W)
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks[0], box_mask(15, 7))
    assert not masks[1].any()
    assert result.tracks[1].num_frames_visible == T - 1
    assert make_segmentation(tracks=()).masks(0).shape == (0, H, W)


@pytest.mark.parametrize("frame", [-1, T])
def test_frames_outside_are_an_index_error(frame: int) -> None:
    for call in (make_segmentation().masks, make_track().mask, make_track().area):
        with pytest.raises(IndexError, match=f"frame {frame}: the result has {T} frames"):
            call(frame)


def test_a_track_that_is_never_seen() -> None:
    never = make_track(segmentations=(None,) * T)
    assert never.num_frames_visible == never.area(0) == 0
    with pytest.raises(ValueError, match="no mask in any frame"):
        never.mask(0)
    assert not make_segmentation(tracks=[never]).masks(0).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, "track 2: the score"),
        ({"score": float("inf")}, "track 2: the score"),
        ({"segmentations": (None, {"size": [H, W], "counts": [1, 2]})}, "track 2, frame 1: a segmentation"),
        ({"segmentations": ({"counts": "abc"},)}, "track 2, frame 0: a segmentation"),
        ({"segmentations": ({"size": [0, W], "counts": "abc"},)}, "track 2, frame 0: a segmentation"),
        ({"segmentations": (box_mask(0, 0),)}, "track 2, frame 0: a segmentation"),
    ],
)
def test_tracks_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_track(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width, height and fps must be positive"),
        ({"fps": 0}, "width, height and fps must be positive"),
        ({"fps": float("nan")}, "width, height and fps must be positive"),
        ({"frames": ()}, "frames must be rising"),
        ({"frames": (0, 2, 1, 3)}, "frames must be rising"),
        ({"frames": (-1, 0, 1, 2)}, "frames must be rising"),
        ({"frames": range(T + 1)}, f"track 1: {T} segmentations for {T + 1} frames"),
        ({"height": H + 1}, r"track 1, frame 0: the mask is \[32, 48\] but the video is \[33, 48\]"),
        ({"labels": ("person", "dog")}, "label 'train' is not number 2 of the 2 labels"),
        ({"tracks": (make_track(), make_track())}, "track ids must differ"),
        ({"tracks": (make_track(label="cat"),)}, "label 'cat' is not number 1"),
    ],
)
def test_results_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_segmentation(**changes)


# --- files


def test_the_file_is_a_youtubevis_submission_with_categories(tmp_path: Path) -> None:
    result = make_segmentation()
    result.save(tmp_path / "new" / "out", overlay=False)
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == ["tracks.json", "tracks.jsonl"]
    data = json.loads((tmp_path / "new" / "out" / "tracks.json").read_text())
    assert data == result.to_dict()
    assert data.keys() == {"video", "categories", "results"}
    assert data["video"] == {"source": "cars.mp4", "width": W, "height": H, "fps": 25.0, "frames": [0, 1, 2, 3]}
    assert data["categories"] == [{"id": i + 1, "name": name} for i, name in enumerate(LABELS)]
    row = data["results"][1]
    assert row.keys() == {"video_id", "id", "category_id", "category", "score", "certainty", "segmentations"}
    assert (row["id"], row["category_id"], row["category"], row["score"]) == (2, 2, "dog", 0.9)
    assert row["segmentations"][2] is None
    assert row["segmentations"][0] == {"size": [H, W], "counts": encode_mask(box_mask(4, 0))["counts"]}  # type: ignore[index]


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    result = make_segmentation(fps=30000 / 1001, frames=(3, 6, 9, 12))
    result.save(tmp_path, overlay=False)
    for path in (tmp_path, tmp_path / "tracks.json", str(tmp_path)):
        loaded = VideoSegmentation.load(path)
        assert loaded.to_dict() == result.to_dict()
        assert loaded.frames == result.frames
        assert loaded.video is None
        assert [track.id for track in loaded.tracks] == [1, 2]
        renumbered = tuple(dataclasses.replace(track, query_id=i) for i, track in enumerate(result.tracks))
        assert loaded == dataclasses.replace(result, tracks=renumbered)


def test_tracks_with_equal_masks_come_back_as_one_query(tmp_path: Path) -> None:
    second = make_track(id=3, label="person", label_id=0, score=0.3)
    make_segmentation(tracks=(make_track(), second)).save(tmp_path, overlay=False)
    first, same = VideoSegmentation.load(tmp_path).tracks
    assert first.query_id == same.query_id


def test_the_overlay_is_written_beside(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = make_segmentation()
    result.save(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["overlay.mp4", "tracks.json", "tracks.jsonl"]
    assert calls == [(index + 1, T) for index in range(T)]
    overlay = read_video(tmp_path / "overlay.mp4", strict=True)
    assert overlay.shape == (T, H, W, 3)
    assert np.abs(overlay.astype(int) - 90).max() > 50
    loaded = VideoSegmentation.load(tmp_path)
    with pytest.raises(ValueError, match="no video to draw on: pass overlay=False"):
        loaded.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    dataclasses.replace(loaded, video=result.video).save(tmp_path / "again")
    np.testing.assert_array_equal(read_video(tmp_path / "again" / "overlay.mp4"), overlay)


def test_the_video_is_neither_compared_nor_shown() -> None:
    assert make_segmentation() == make_segmentation(video=None)
    assert "video=" not in repr(make_segmentation())


@pytest.mark.parametrize("existed", [False, True])
def test_a_failing_overlay_leaves_nothing_half_written(
    tmp_path: Path, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a" / "b"
    if existed:
        out.mkdir(parents=True)
        (out / "tracks.json").write_text("of an earlier run")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(overlay.VideoWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        make_segmentation().save(out)
    if existed:
        assert [p.name for p in out.iterdir()] == ["tracks.json"]
        assert (out / "tracks.json").read_text() == "of an earlier run"
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_tracks_file_leaves_nothing(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(path: Path, text: str, **options: object) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise error

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(type(error)):
        make_segmentation().save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overlay_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_segmentation().save(tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_someone_else_filled_stays(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        (tmp_path / "out" / "mine.txt").write_text("mine")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_segmentation().save(tmp_path / "out", progress=interrupt)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match="file"):
            make_segmentation().save(directory)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        make_segmentation().save(tmp_path, overlay=False)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_video_is_noticed(tmp_path: Path) -> None:
    result = make_segmentation(video=np.zeros((T - 1, H, W, 3), np.uint8))
    with pytest.raises(VideoError, match="frame 3 was segmented but the video does not give it"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_serves_as_the_video(tmp_path: Path) -> None:
    video = np.full((12, H, W, 3), 90, np.uint8)
    result = make_segmentation(frames=(2, 5, 8, 11), video=open_video(video, slice(2, None, 3)))
    result.save(tmp_path)
    assert len(read_video(tmp_path / "overlay.mp4")) == T


# --- files from strangers


def saved(tmp_path: Path) -> dict[str, Any]:
    make_segmentation().save(tmp_path, overlay=False)
    return json.loads((tmp_path / "tracks.json").read_text())


DELETE = object()
DAMAGES = [
    (("video",), DELETE, "the file has no 'video'"),
    (("video",), [], "'video' has the wrong type, list"),
    (("video", "fps"), "25", "'fps' has the wrong type, str"),
    (("video", "fps"), True, "'fps' has the wrong type, bool"),
    (("video", "fps"), 10**400, "does not fit into 64 bits"),
    (("video", "width"), 48.0, "'width' has the wrong type, float"),
    (("video", "width"), -48, "result 0, frame 0: the mask is"),
    (("video", "frames"), [0, 1, "2", 3], "frames must be whole numbers"),
    (("video", "frames"), [0, 1, 2], "4 segmentations for 3 frames"),
    (("categories", 1, "id"), 7, "category 1: ids must count from 1"),
    (("categories", 1, "name"), None, "category 1: 'name' has the wrong type"),
    (("results", 0), "row", "result 0 has no 'segmentations'"),
    (("results", 0, "score"), DELETE, "result 0 has no 'score'"),
    (("results", 0, "category_id"), 9, "label 'train' is not number 8"),
    (("results", 0, "category"), "x" * 10_000, "label 'xxxx"),
    (("results", 0, "segmentations"), None, "'segmentations' has the wrong type"),
    (("results", 0, "segmentations", 1), {"size": [H, W]}, "result 0, frame 1: a segmentation is null or"),
    (("results", 0, "segmentations", 1, "size"), [W, H], "result 0, frame 1: the mask is"),
]


@pytest.mark.parametrize(("where", "value", "message"), DAMAGES)
def test_damaged_files_are_refused_naming_the_part(
    tmp_path: Path, where: tuple[str | int, ...], value: object, message: str
) -> None:
    data = saved(tmp_path)
    part: Any = data
    for key in where[:-1]:
        part = part[key]
    if value is DELETE:
        del part[where[-1]]
    else:
        part[where[-1]] = value
    (tmp_path / "tracks.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tracks\.json: not a result of this program: ") as caught:
        VideoSegmentation.load(tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "counts", ["", "o", "0", "05", "P0d1", "PPPPPPPPPPPPPPPP0", "0d1", "é", "~", " ", "00000", "<ooooo?"]
)
def test_damaged_run_lengths_never_reach_the_decoder(tmp_path: Path, counts: str) -> None:
    data = saved(tmp_path)
    data["results"][1]["segmentations"][1]["counts"] = counts
    (tmp_path / "tracks.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="result 1, frame 1: the run lengths are damaged"):
        VideoSegmentation.load(tmp_path)


@given(st.text(alphabet=[chr(48 + n) for n in range(64)], max_size=12))
def test_any_counts_are_refused_or_decode_to_a_full_mask(counts: str) -> None:
    rle = {"size": [3, 4], "counts": counts}
    try:
        masks_module.check_rle(rle, 3, 4)
    except ValueError:
        return
    runs = masks_module._text_runs(counts)
    assert runs is not None
    assert masks_module.decode_mask(rle).sum() == runs[1::2].sum()


def test_run_lengths_as_other_programs_write_them_are_read(tmp_path: Path) -> None:
    data = saved(tmp_path)
    expected = VideoSegmentation.load(tmp_path)
    for row in data["results"]:
        for rle in filter(None, row["segmentations"]):
            rle.update(size=[float(H), float(W)], area=7)
    (tmp_path / "tracks.json").write_text(json.dumps(data))
    assert VideoSegmentation.load(tmp_path) == expected
    assert VideoSegmentation.load(tmp_path).to_dict() == expected.to_dict()


def test_a_picture_larger_than_any_is_refused(tmp_path: Path) -> None:
    for height, width in ((10**9, 10**9), (1, 2**17), (2**16, 2**15)):
        data = saved(tmp_path)
        data["video"].update(height=height, width=width)
        data["results"] = []
        (tmp_path / "tracks.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"tracks\.json: .* is too large for a mask"):
            VideoSegmentation.load(tmp_path)


def test_many_tracks_are_no_matter(tmp_path: Path) -> None:
    data = saved(tmp_path)
    row = next(row for row in data["results"] if any(row["segmentations"]))
    visible = next(filter(None, row["segmentations"]))
    data["video"]["frames"] = list(range(1000))
    shown = [[visible if frame == 500 + track // 2 else None for frame in range(1000)] for track in range(800)]
    data["results"] = [row | {"id": number, "segmentations": masks} for number, masks in enumerate(shown, 1)]
    (tmp_path / "tracks.json").write_text(json.dumps(data))
    start = time.process_time()
    tracks = VideoSegmentation.load(tmp_path).tracks
    assert time.process_time() - start < 2  # comparing each with each takes half a minute
    assert [track.query_id for track in tracks] == [index // 2 * 2 for index in range(800)]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tracks.json")
    with pytest.raises(ValueError, match=r"tracks\.json is a named pipe"):
        VideoSegmentation.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", '{"video": NaN}', "[" * 100_000, "\xff"])
def test_what_is_no_json_of_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tracks.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"tracks\.json: not a result of this program"):
        VideoSegmentation.load(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tracks.json"
    saved(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a result of this program"):
            VideoSegmentation.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tracks\.json: there is no such result file"):
        VideoSegmentation.load(tmp_path)


def test_loading_does_not_change_with_extra_keys(tmp_path: Path) -> None:
    data = saved(tmp_path)
    expected = copy.deepcopy(data)
    data["note"] = "kept by another program"
    (tmp_path / "tracks.json").write_text(json.dumps(data))
    assert VideoSegmentation.load(tmp_path).to_dict() == expected


@pytest.mark.parametrize("name", ["tracks.json", "overlay.mp4"])
def test_saving_is_all_or_nothing(tmp_path: Path, name: str) -> None:
    old = make_segmentation(fps=5)
    old.save(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(IsADirectoryError, match=name):
        make_segmentation().save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert (tmp_path / name).is_dir()

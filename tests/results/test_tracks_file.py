"""Results as lines: written frame by frame, read in bounded memory, good as far as they go."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m2f_video.results import tracks as tracks_module
from m2f_video.results.tracks import VideoSegmentation
from m2f_video.results.tracks_file import TracksLines, TracksWriter, header_of
from m2f_video.video import read_video
from tests.results.test_results import LABELS, H, T, W, box_mask, make_segmentation, make_track

VIDEO = {"source": "cars.mp4", "width": W, "height": H, "fps": 25.0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make_segmentation(made={"window": 8}).save(tmp_path, overlay=False)
    (tmp_path / "tracks.json").unlink()
    return tmp_path / "tracks.jsonl"


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def change(file: Path, number: int, **fields: object) -> None:
    lines = lines_of(file)
    lines[number - 1] |= fields
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_file_says_all_there_is(file: Path) -> None:
    header, *frames, footer = lines_of(file)
    assert header == header_of(VIDEO, LABELS, {"window": 8})
    assert [frame["frame"] for frame in frames] == list(range(T))
    assert [sorted(frame["masks"]) for frame in frames] == [["3", "7"], ["3", "7"], ["3"], ["3", "7"]]
    assert footer == {
        "tracks": [
            {"id": 1, "masks": 3, "category_id": 3, "category": "train", "score": 0.95, "certainty": 0.95, "frames": 4},
            {"id": 2, "masks": 7, "category_id": 2, "category": "dog", "score": 0.9, "certainty": 0.9, "frames": 3},
        ],
        "complete": True,
    }


def test_what_is_read_when_asked_for_is_what_was_in_memory(file: Path, tmp_path: Path) -> None:
    result = make_segmentation()
    for path in (file, file.parent):
        loaded = VideoSegmentation.load(path)
        assert loaded == result
        assert loaded.made == {"window": 8}
        assert loaded.to_dict() == result.to_dict()
    for ours, theirs in zip(loaded.tracks, result.tracks, strict=True):
        assert ours.num_frames_visible == theirs.num_frames_visible
        assert ours.segmentations[-1] == theirs.segmentations[-1]
        assert ours.segmentations[1:3] == theirs.segmentations[1:3]
        assert ours.segmentations != theirs.segmentations[1:]
        assert [ours.area(n) for n in range(T)] == [theirs.area(n) for n in range(T)]
        np.testing.assert_array_equal(ours.mask(2), theirs.mask(2))
        with pytest.raises(IndexError):
            ours.segmentations[T]
    np.testing.assert_array_equal(loaded.masks(3), result.masks(3))
    replace(loaded, video=result.video).save(tmp_path / "again")
    result.save(tmp_path / "first")
    expected = read_video(tmp_path / "first" / "overlay.mp4")
    np.testing.assert_array_equal(read_video(tmp_path / "again" / "overlay.mp4"), expected)
    assert (tmp_path / "again" / "tracks.jsonl").read_bytes() == file.read_bytes()


def test_two_tracks_share_the_masks_of_a_query(tmp_path: Path) -> None:
    second = make_track(id=3, label="person", label_id=0, score=0.3)
    make_segmentation(tracks=(make_track(), second)).save(tmp_path, overlay=False)
    assert list(lines_of(tmp_path / "tracks.jsonl")[1]["masks"]) == ["7"]
    first, same = VideoSegmentation.load(tmp_path / "tracks.jsonl").tracks
    assert (first.id, same.id, first.query_id, same.query_id) == (2, 3, 7, 7)
    other = make_track(id=3, score=0.3, segmentations=(None,) * T)
    with pytest.raises(ValueError, match="track 3 has query 7, but not the masks of another"):
        make_segmentation(tracks=(make_track(), other)).save(tmp_path / "other", overlay=False)
    assert not (tmp_path / "other").exists()


def test_saving_many_frames_leaves_no_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_segmentation().save(tmp_path, overlay=False)
    monkeypatch.setattr(tracks_module, "MOST_JSON_FRAMES", T - 1)
    make_segmentation(fps=5).save(tmp_path, overlay=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tracks.jsonl"]
    assert VideoSegmentation.load(tmp_path).fps == 5


def test_old_files_without_ids_are_numbered(tmp_path: Path) -> None:
    make_segmentation(tracks=(make_track(id=5),)).save(tmp_path, overlay=False)
    assert VideoSegmentation.load(tmp_path).tracks[0].id == 5
    data = json.loads((tmp_path / "tracks.json").read_text())
    del data["results"][0]["id"]
    (tmp_path / "tracks.json").write_text(json.dumps(data))
    assert VideoSegmentation.load(tmp_path).tracks[0].id == 1
    data["results"][0]["id"] = "5"
    (tmp_path / "tracks.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="result 0: 'id' has the wrong type"):
        VideoSegmentation.load(tmp_path)


def write(path: Path, complete: bool = False) -> None:
    """Six frames with one object, tracks after the third, and at the end where it is complete."""
    row = {"id": 1, "masks": 4, "category_id": 2, "category": "dog", "score": 0.5}
    rle = make_track().segmentations[0]
    assert rle is not None
    with TracksWriter.begin(path, header_of(VIDEO, LABELS, {})) as lines:
        for number in range(6):
            lines.frame(2 * number, {4: rle} if number != 1 else {})
            if number == 2:
                lines.tracks([row])
        if complete:
            lines.end([row | {"score": 0.7}])


def test_every_cut_is_readable_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "tracks.jsonl"
    write(path, complete=True)
    whole, ends = path.read_bytes(), []
    assert VideoSegmentation.load(path).tracks[0].score == 0.7
    for line in whole.splitlines(keepends=True):
        ends.append(len(line) + (ends[-1] if ends else 0))
    for length in [*range(0, len(whole), 41), *ends[:-1], len(whole) - 1]:
        path.write_bytes(whole[:length])
        kept = [line for line in map(json.loads, whole[:length].rpartition(b"\n")[0].splitlines()) if "frame" in line]
        if not kept:
            with pytest.raises(ValueError, match="not a result of this program"):
                VideoSegmentation.load(path)
            continue
        with pytest.warns(UserWarning, match=f"stopped or is at work: {len(kept)} frames"):
            loaded = VideoSegmentation.load(path)
        assert loaded.frames == tuple(line["frame"] for line in kept)
        assert [track.score for track in loaded.tracks] == ([0.5] if length >= ends[4] else [])
        for track in loaded.tracks:
            assert [rle is not None for rle in track.segmentations] == [bool(line["masks"]) for line in kept]
            assert track.num_frames_visible == len(kept) - 1


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, "{}", "line 1: the header does not say that the format"),
        (1, '{"format": "m2f-video tracks", "version": 9}', "line 1: version 9"),
        (1, '{"format": "m2f-video tracks", "version": 1}', "the file has no 'video'"),
        (2, "{", "line 2: no JSON, or damaged"),
        (3, "[1, 2]", "line 3: it is no object"),
        (3, '{"frame": 0, "masks": {}}', "line 3: frames must be rising numbers from 0, got 0 after 0"),
        (3, '{"frame": true, "masks": {}}', "line 3: frames must be rising numbers"),
        (4, '{"frame": 2, "masks": []}', "line 4: a frame has 'masks'"),
        (4, '{"frame": 2, "masks": {"x": null}}', "line 4: a frame has 'masks'"),
        (4, '{"note": 2}', "line 4: it is neither a frame nor tracks"),
        (4, '{"tracks": [], "complete": true}', "line 5: it comes after the end"),
        (6, '{"tracks": [5], "complete": true}', "track 0 of the last line of tracks has no 'masks'"),
        (6, '{"tracks": [{"id": 1, "masks": "x"}], "complete": true}', "'masks' has the wrong type"),
    ],
)
def test_damaged_lines_are_named(file: Path, number: int, line: str, message: str) -> None:
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"tracks\.jsonl: not a result of this program: ") as error:
        VideoSegmentation.load(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rle", [5, {"size": [H, W]}, {"size": [W, H], "counts": "0"}, {"size": [H, W], "counts": "o"}])
def test_damaged_masks_are_named_when_they_are_read(file: Path, rle: object) -> None:
    change(file, 3, masks={"3": rle})
    loaded = VideoSegmentation.load(file)
    np.testing.assert_array_equal(loaded.masks(0)[0], box_mask(15, 1))
    for read in (lambda: loaded.masks(1), lambda: loaded.tracks[0].mask(1), loaded.to_dict):
        with pytest.raises(ValueError, match=r"tracks\.jsonl, line 3: mask 3: "):
            read()


def test_a_file_that_was_replaced_is_noticed(file: Path) -> None:
    loaded = VideoSegmentation.load(file)
    loaded.masks(0)
    make_segmentation(fps=7).save(file.parent, overlay=False)
    with pytest.raises(ValueError, match=r"tracks\.jsonl has changed since it was loaded; load it again"):
        loaded.masks(1)
    file.write_text("")
    with pytest.raises(ValueError, match="not a result of this program: line 1: the header is missing"):
        VideoSegmentation.load(file)


def test_a_frame_that_was_rewritten_in_its_place_is_noticed(file: Path) -> None:
    loaded = VideoSegmentation.load(file)
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"masks":{"', b'"masks":{"1', 1))
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        loaded.masks(0)
    file.write_bytes(content)
    loaded.masks(0)


def test_masks_are_read_from_any_working_directory(
    file: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    loaded = VideoSegmentation.load(file.name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert loaded.masks(1).any()


def test_writing_goes_on_where_it_was(tmp_path: Path) -> None:
    write(tmp_path / "whole.jsonl", complete=True)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    path, length = tmp_path / "tracks.jsonl", len(b"".join(lines[:4]))
    path.write_bytes(b"".join(lines[:6]) + b'{"fra')
    rle = make_track().segmentations[0]
    assert rle is not None
    with TracksWriter.go_on(path, length) as writer:
        assert (writer.num_frames, writer.frames_since, path.stat().st_size) == (3, 3, length)
        row = {"id": 1, "masks": 4, "category_id": 2, "category": "dog", "score": 0.5}
        writer.tracks([row])
        for number in (6, 8, 10):
            writer.frame(number, {4: rle})
        writer.end([row | {"score": 0.7}])
    assert path.read_bytes() == whole
    for bad, message in ((length + 1, "does not end with a line"), (10**6, "shorter than it was")):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=message):
            TracksWriter.go_on(path, bad)


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "tracks.jsonl"
    write(path)
    lines = TracksLines(path)
    assert (lines.seen[4], lines.frames_since, lines.complete) == (5, 3, False)
    assert lines.length == path.stat().st_size
    with path.open("ab") as more:  # a run that is at work
        more.write(b'{"frame": 20, "masks": {}}\n')
    assert lines.masks(5).keys() == {4}
    assert len(lines.frames) == 6


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tracks.jsonl")
    with pytest.raises(ValueError, match=r"tracks\.jsonl is a named pipe"):
        VideoSegmentation.load(tmp_path)

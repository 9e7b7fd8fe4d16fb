import contextlib
import copy
import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2f_video.evaluation import (
    EvaluationWarning,
    evaluate,
    evaluate_tracking,
    load_ground_truth,
    load_results,
    pair_tracks,
    write_submission,
)
from tests.evaluation.builders import H, T, W, annotation, box, dataset, result, segmentations

Change = Callable[[Any], Any]
TRUTH = dataset(annotation(5, [box(0, 0)] * T), annotation(8, [box(5, 5), None, None, None]))
RESULTS = [result(0.9, [box(0, 0)] * T), result(0.8, [box(5, 5), None, None, None])]


def put(*path: Any) -> Change:
    """Set the value at the end of the path, or delete the last key where the value is `...`."""
    *keys, last, value = path

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return change


ANNOTATION = ("annotations", 1)
TRUTH_FAULTS = {
    "no annotations": (put("annotations", None), r"'annotations' is missing or empty.*validation and test files"),
    "empty videos": (put("videos", []), r"there are no videos"),
    "annotations are an object": (
        put("annotations", {"1": 2}),
        r"'annotations' must be a list .* not \{'1': 2\}",
    ),
    "no categories": (put("categories", ...), r"'categories' must be a list of objects, not None"),
    "row is a list": (put("annotations", 1, [3]), r"'annotations' must be a list of objects, not \[3\]"),
    "duplicate annotation id": (put(*ANNOTATION, "id", 5), r"annotation 5: another annotation has the same id"),
    "duplicate category id": (put("categories", 1, "id", 1), r"category 1: another category has the same id"),
    "id is text": (put(*ANNOTATION, "id", "8"), r"annotation row 1: 'id' must be int, got '8'"),
    "video without height": (put("videos", 0, "height", ...), r"video 1: 'height' must be int, got None"),
    "video of no width": (put("videos", 0, "width", 0), r"video 1: width must be positive, got 0"),
    "video far too large": (put("videos", 0, "width", 10**9), r"video 1: a picture of .* is too large"),
    "unknown video": (put(*ANNOTATION, "video_id", 9), r"annotation 8: there is no video 9"),
    "unknown category": (put(*ANNOTATION, "category_id", 9), r"annotation 8: there is no category 9"),
    "no segmentations": (
        put(*ANNOTATION, "segmentations", ...),
        r"8: 'segmentations' must be list, got None",
    ),
    "empty segmentations": (
        put(*ANNOTATION, "segmentations", []),
        r"8: 0 segmentations for the 4 frames of video 1",
    ),
    "segmentations is null": (
        put(*ANNOTATION, "segmentations", None),
        r"8: 'segmentations' must be list, got None",
    ),
    "areas of other length": (put(*ANNOTATION, "areas", [1]), r"annotation 8: 1 areas for 4 segmentations"),
    "area not a number": (put(*ANNOTATION, "areas", 0, float("nan")), r"annotation 8: 'areas' must be numbers"),
    "area negative": (put(*ANNOTATION, "areas", 0, -1), r"annotation 8: 'areas' must be numbers"),
    "area of no picture": (put(*ANNOTATION, "areas", 0, 1e300), r"annotation 8: 'areas' must be numbers"),
    "iscrowd": (put(*ANNOTATION, "iscrowd", "no"), r"annotation 8: 'iscrowd' must be 0 or 1, got 'no'"),
    "mask of other size": (
        put(*ANNOTATION, "segmentations", 0, "size", [W, H]),
        rf"annotation 8, frame 0: the mask is \[{W}, {H}\] but the video is \[{H}, {W}\]",
    ),
    "mask without size": (
        put(*ANNOTATION, "segmentations", 0, "size", ...),
        r"annotation 8, frame 0: the mask is None but",
    ),
    "mask is a number": (put(*ANNOTATION, "segmentations", 2, 7), r"annotation 8, frame 2: a segmentation is"),
    "damaged run lengths": (
        put(*ANNOTATION, "segmentations", 0, "counts", "54"),
        r"frame 0: the run lengths are damag",
    ),
    "uncompressed, too short": (
        put(*ANNOTATION, "segmentations", 0, "counts", [5, 7]),
        r"frame 0: the run lengths are damaged",
    ),
    "uncompressed, negative": (
        put(*ANNOTATION, "segmentations", 0, "counts", [-1, H * W + 1]),
        r"frame 0: the run lengths are damaged",
    ),
    "uncompressed, other size": (
        put(*ANNOTATION, "segmentations", 0, {"size": 3, "counts": [H * W]}),
        r"frame 0: the mask is 3 but the video is",
    ),
    "polygon of two points": (
        put(*ANNOTATION, "segmentations", 0, [[1, 2, 3, 4]]),
        r"frame 0: a polygon must be a list .* three points",
    ),
    "polygon of text": (put(*ANNOTATION, "segmentations", 0, ["abcdef"]), r"frame 0: a polygon must be a list"),
    "polygon with NaN": (
        put(*ANNOTATION, "segmentations", 0, [[1, 2, 3, 4, 5, float("nan")]]),
        r"frame 0: a polygon holds something that is no coordinate",
    ),
    "polygon far away": (put(*ANNOTATION, "segmentations", 0, [[0, 0, 1e9, 0, 0, 1e9]]), r"frame 0: .* far outside"),
}
RESULT_FAULTS = {
    "row is text": (put(1, "x"), r"row 1 must be an object, got 'x'"),
    "no score": (put(1, "score", ...), r"row 1: the score must be a finite number, got None"),
    "score is NaN": (put(1, "score", float("nan")), r"row 1: the score must be a finite number, got nan"),
    "score is infinite": (put(1, "score", float("inf")), r"row 1: the score must be a finite number, got inf"),
    "score is text": (put(1, "score", "0.5"), r"row 1: the score must be a finite number, got '0.5'"),
    "unknown video": (put(1, "video_id", 3), r"row 1: video_id 3 is not among the 1 videos of .*made for\?"),
    "category is a fraction": (put(1, "category_id", 1.5), r"row 1: 'category_id' must be int, got 1.5"),
    "empty segmentations": (put(1, "segmentations", []), r"row 1: the list of segmentations is empty"),
    "mask of other size": (put(1, "segmentations", 0, "size", [1, 2]), r"row 1, frame 0: the mask is \[1, 2\] but"),
    "damaged run lengths": (put(1, "segmentations", 0, "counts", "\x7f"), r"row 1, frame 0: the run lengths are dam"),
    "uncompressed": (
        put(1, "segmentations", 0, {"size": [H, W], "counts": [H * W]}),
        r"row 1, frame 0: a segmentation is null or .*pycocotools.mask.encode",
    ),
    "polygon": (put(1, "segmentations", 0, [[1, 1, 5, 1, 5, 5]]), r"row 1, frame 0: a segmentation is null or"),
}


@pytest.mark.parametrize("fault", TRUTH_FAULTS)
def test_faulty_annotations(fault: str, tmp_path: Path) -> None:
    change, message = TRUTH_FAULTS[fault]
    data: Any = copy.deepcopy(TRUTH)
    change(data)
    file = tmp_path / "gt.json"
    file.write_text(json.dumps(data))
    for source, name in ((data, "ground truth"), (file, str(file))):
        with pytest.raises(ValueError, match=f"(?s){re.escape(name)}: .*{message}"):
            load_ground_truth(source)


@pytest.mark.parametrize("fault", RESULT_FAULTS)
def test_faulty_results(fault: str, tmp_path: Path) -> None:
    change, message = RESULT_FAULTS[fault]
    data: Any = copy.deepcopy(RESULTS)
    change(data)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(data))
    for source, name in ((data, "results"), (file, str(file))):
        with pytest.raises(ValueError, match=f"(?s){re.escape(name)}: {message}"):
            evaluate(TRUTH, source)


def test_faulty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gt\.json: there is no such file of ground truth"):
        evaluate(tmp_path / "gt.json", RESULTS)
    with pytest.raises(FileNotFoundError, match=r"results\.json: there is no such file of results"):
        evaluate(TRUTH, tmp_path / "results.json")
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps(RESULTS)[:-20])
    with pytest.raises(ValueError, match=r"cut\.json: not a JSON file, or cut off"):
        evaluate(TRUTH, cut)
    with pytest.raises(ValueError, match="swapped"):
        evaluate(RESULTS, TRUTH)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of a tracks.json only the list under 'results'"):
        evaluate(TRUTH, {"results": RESULTS})  # type: ignore[arg-type]


def test_unknown_categories_are_left_out_with_a_warning() -> None:
    extra = [row | {"category_id": category_id} for row in RESULTS for category_id in (40, 41)]
    with pytest.warns(
        EvaluationWarning, match=r"results: 4 of 6 rows have a category_id that ground truth .*: 40, 41;"
    ):
        measured = evaluate(TRUTH, RESULTS + extra)
    assert measured.stats == evaluate(TRUTH, RESULTS).stats


def test_annotation_of_other_length_than_its_video_warns() -> None:
    short = dataset(annotation(3, [box(0, 0)] * 2))
    with pytest.warns(EvaluationWarning, match=r"annotation id 3 has 2 segmentations but its video 4 frames"):
        assert evaluate(short, [result(1.0, [box(0, 0)] * T)]).stats["AP"] == pytest.approx(1)


def test_run_lengths_as_pycocotools_gives_them() -> None:
    rows: Any = copy.deepcopy(RESULTS)
    rows[0]["segmentations"][0]["counts"] = rows[0]["segmentations"][0]["counts"].encode()
    assert evaluate(TRUTH, rows).stats == evaluate(TRUTH, RESULTS).stats
    rows[0]["segmentations"][0]["counts"] = b"\xff"
    with pytest.raises(ValueError, match="row 0, frame 0: the run lengths are damaged"):
        evaluate(TRUTH, rows)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    truth = load_ground_truth(TRUTH, lambda *step: told.append(step))
    load_results(RESULTS, truth, lambda *step: told.append(step))
    assert told == [("annotations", 1, 2), ("annotations", 2, 2), ("results", 1, 2), ("results", 2, 2)]


def of_length(frames: int, *visible: int, **changes: Any) -> dict[str, Any]:
    """A data set of one object in one video, seen in some frames, in all where none are named."""
    (mask,) = segmentations([box(0, 0)])
    masks = [mask if not visible or frame in visible else None for frame in range(frames)]
    data = dataset(annotation(1, []) | {"segmentations": masks, "areas": None} | changes)
    data["videos"][0]["length"] = frames
    return data


@pytest.mark.parametrize(("frames", "visible"), [(255, ()), (256, ()), (300, ()), (70_000, (0, 300, 69_999))])
def test_videos_of_any_length(frames: int, visible: tuple[int, ...]) -> None:
    truth = of_length(frames, *visible)
    rows = [result(0.9, []) | {"segmentations": truth["annotations"][0]["segmentations"]}]
    loaded = load_ground_truth(truth)
    assert loaded.tracks[0].pixels.sum() == 100 * (len(visible) or frames)
    assert loaded.tracks[0].area == 100
    assert evaluate(truth, rows).stats["AP"] == pytest.approx(1)
    assert evaluate_tracking(truth, rows).combined.to_dict()["HOTA"] == pytest.approx(1)


def test_a_long_row_for_a_short_video_is_cheap() -> None:
    truth = of_length(4)
    rows = [result(0.9, [box(0, 0)] * 4)]
    rows[0]["segmentations"] += [None] * 1_000_000
    start = time.process_time()
    with pytest.warns(EvaluationWarning, match="row 0 has 1000004 segmentations but its video 4 frames"):
        assert evaluate(truth, rows).stats["AP"] == pytest.approx(1)
    with pytest.warns(EvaluationWarning, match="1000004 segmentations"):
        assert evaluate_tracking(truth, rows).combined.to_dict()["HOTA"] == pytest.approx(1)
    assert time.process_time() - start < 10


def test_more_than_memory_is_for_is_refused() -> None:
    truth = of_length(10**6, 0)
    truth["annotations"] = [truth["annotations"][0] | {"id": number} for number in range(3)]
    rows = [result(0.9, [box(0, 0)])] * 30
    loaded = load_ground_truth(truth)
    with pytest.warns(EvaluationWarning):
        results = load_results(rows, loaded)
    with pytest.raises(ValueError, match="video 1, category 1: 30 predicted and 3 annotated tracks of 1000000 frames"):
        pair_tracks(loaded, results)
    with pytest.raises(ValueError, match="6000 categories are too many"):
        load_ground_truth(dataset(annotation(1, [box(0, 0)] * T), categories=6000))


def test_what_is_missing_is_measured() -> None:
    rows: Any = copy.deepcopy(TRUTH)
    rows["videos"][0]["file_names"] = [f"{number}.jpg" for number in range(T)]
    del rows["videos"][0]["length"], rows["annotations"][0]["areas"]
    rows["annotations"][1]["areas"] = None
    assert load_ground_truth(rows).sizes == {1: (H, W, T)}
    assert [track.area for track in load_ground_truth(rows).tracks] == [100, 100]
    assert evaluate(rows, RESULTS).stats == evaluate(TRUTH, RESULTS).stats
    rows["videos"][0]["length"] = T + 1
    with pytest.raises(ValueError, match="video 1: length is 5, but there are 4 file names"):
        load_ground_truth(rows)
    del rows["videos"][0]["file_names"], rows["videos"][0]["length"]
    with pytest.raises(ValueError, match="video 1: 'length' must be int, got None"):
        load_ground_truth(rows)


def test_nothing_found_is_no_error() -> None:
    assert {name for name, value in evaluate(TRUTH, []).stats.items() if value > 0} == set()
    assert evaluate(TRUTH, []).stats["AP"] == 0
    assert evaluate_tracking(TRUTH, []).combined.HOTA == 0


def test_run_lengths_as_other_programs_write_them() -> None:
    rows: Any = copy.deepcopy(RESULTS)
    for mask in rows[0]["segmentations"]:
        mask["size"] = [float(side) for side in mask["size"]]
        mask["area"] = 100
    truth: Any = copy.deepcopy(TRUTH)
    truth["annotations"][0]["segmentations"] = rows[0]["segmentations"]
    assert evaluate(truth, rows).stats == evaluate(TRUTH, RESULTS).stats
    for size in ([H + 0.5, W], [float("nan"), W], [float("inf"), W], [True, W], [1e300, W]):
        rows[0]["segmentations"][0]["size"] = size
        with pytest.raises(ValueError, match=r"row 0, frame 0: (a segmentation is null or|the mask is)"):
            evaluate(TRUTH, rows)


def test_runs_of_no_pixel_change_nothing() -> None:
    area, runs = 3 * H, [2 * H, H, 0, 0, 0, 2 * H, (W - 5) * H, 0]
    truth = dataset(annotation(1, []) | {"segmentations": [{"size": [H, W], "counts": runs}], "areas": None})
    truth["videos"][0]["length"] = 1
    loaded = load_ground_truth(truth)
    assert loaded.tracks[0].area == area
    assert (
        loaded.tracks[0].masks
        == load_ground_truth(truth | {"annotations": [annotation(1, [(0, 2, H, 3)])]}).tracks[0].masks
    )
    # As text, where from the fourth number on differences count: all pixels at once, and in parts with nothing between.
    truth = of_length(1)
    for text in ("0hb0", "0T30`<", "0T30lL0d?", "0hb00"):
        for other in ("0hb0", "0T30`<"):
            truth["annotations"][0]["segmentations"][0] = {"size": [H, W], "counts": other}
            rows = [result(0.5, []) | {"segmentations": [{"size": [H, W], "counts": text}]}]
            loaded = load_ground_truth(truth)
            (pairing,) = pair_tracks(loaded, load_results(rows, loaded))
            assert pairing.intersections.sum() == H * W, (text, other)


def test_results_in_a_zip(tmp_path: Path) -> None:
    expected = evaluate(TRUTH, RESULTS).stats
    write_submission(tmp_path / "results.zip", RESULTS)
    assert evaluate(TRUTH, tmp_path / "results.zip").stats == expected
    whole = (tmp_path / "results.zip").read_bytes()
    messages = []
    for index in range(0, len(whole), 3):
        (tmp_path / "bad.zip").write_bytes(whole[:index] + bytes([whole[index] ^ 0xFF]) + whole[index + 1 :])
        with contextlib.suppress(ValueError):  # a byte that nothing depends on
            assert evaluate(TRUTH, tmp_path / "bad.zip").stats == expected
            continue
        with pytest.raises(ValueError, match=r"bad\.zip: ") as caught:
            evaluate(TRUTH, tmp_path / "bad.zip")
        messages.append(str(caught.value))
    assert len(messages) > len(whole) // 6
    assert max(map(len, messages)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (["a.json", "b.json"], b"[]", "holds one JSON file, this one 2"),
        (["results.txt"], b"[]", "holds one JSON file, this one 0"),
        (["results.json"], b"[]", "not a zip that can be read: its entry is packed by another method than deflate"),
        (["results.json"], b"[", "results.json is not a JSON file, or cut off"),
        (["results.json"], b"[" * 100_000, "results.json is not a JSON file, or cut off: it nests too deeply"),
        (["results.json"], b" " * (2**26 + 1), "results.json has more than 67108864 bytes"),
    ],
)
def test_zips_that_hold_something_else(names: list[str], content: bytes, message: str, tmp_path: Path) -> None:
    method = zipfile.ZIP_BZIP2 if "deflate" in message else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(tmp_path / "results.zip", "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=rf"results\.zip: .*{re.escape(message)}"):
        evaluate(TRUTH, tmp_path / "results.zip")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[1e999]", "[" + "9" * 5000 + "]", "[9223372036854775808]", "\xff", ""]
)
def test_files_that_no_reader_takes(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    for truth, results in ((tmp_path / "x.json", RESULTS), (TRUTH, tmp_path / "x.json")):
        with pytest.raises(ValueError, match=r"x\.json: not a JSON file, or cut off") as caught:
            evaluate(truth, results)
        assert len(str(caught.value)) < 300


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    for truth, results in ((tmp_path / "x.json", RESULTS), (TRUTH, tmp_path / "x.json"), (Path("/dev/zero"), RESULTS)):
        with pytest.raises(ValueError, match=r"is a (named pipe|device), not a regular file"):
            evaluate(truth, results)


@pytest.mark.parametrize("key", ["id", "video_id", "category_id", "iscrowd", "areas", "segmentations"])
@pytest.mark.parametrize("value", ["x" * 10_000, {"x" * 10_000: 1}, ["x" * 10_000] * 1000])
def test_no_message_shows_a_whole_value(key: str, value: Any) -> None:
    truth: Any = copy.deepcopy(TRUTH)
    truth["annotations"][1][key] = value
    truth["annotations"][1]["y" * 10_000] = 1
    with pytest.raises(ValueError, match=r"annotation (row 1|8)") as caught:
        load_ground_truth(truth)
    assert len(str(caught.value)) < 300

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2f_video.evaluation import EvaluationWarning, evaluate, load_ground_truth, load_results
from tests.evaluation.builders import H, T, W, annotation, box, dataset, result

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
    "empty videos": (put("videos", []), r"'videos' is missing or empty"),
    "annotations are an object": (put("annotations", {"1": 2}), r"'annotations' is a JSON object, not a list"),
    "no categories": (put("categories", ...), r"'categories' is missing or empty"),
    "row is a list": (put("annotations", 1, [3]), r"annotation row 1 must be an object, got a list"),
    "duplicate annotation id": (put(*ANNOTATION, "id", 5), r"annotation row 1: id 5 is used before"),
    "duplicate category id": (put("categories", 1, "id", 1), r"category row 1: id 1 is used before"),
    "id is text": (put(*ANNOTATION, "id", "8"), r"annotation row 1: id must be an integer, got '8'"),
    "video without height": (put("videos", 0, "height", ...), r"video row 0 has no 'height'"),
    "video of no width": (put("videos", 0, "width", 0), r"video row 0: width must be an integer of at least 1"),
    "video far too large": (put("videos", 0, "width", 10**9), r"video row 0: a picture of .* is too large"),
    "unknown video": (put(*ANNOTATION, "video_id", 9), r"annotation row 1 \(id 8\): video_id 9 is not among"),
    "unknown category": (put(*ANNOTATION, "category_id", 9), r"annotation row 1 \(id 8\): category_id 9 is not among"),
    "no segmentations": (put(*ANNOTATION, "segmentations", ...), r"\(id 8\) has no 'segmentations'; it has areas"),
    "empty segmentations": (put(*ANNOTATION, "segmentations", []), r"\(id 8\): the list of segmentations is empty"),
    "segmentations is null": (put(*ANNOTATION, "segmentations", None), r"segmentations must be a list .* got a null"),
    "areas of other length": (put(*ANNOTATION, "areas", [1]), r"\(id 8\): 1 areas for 4 segmentations"),
    "area not a number": (put(*ANNOTATION, "areas", 0, float("nan")), r"\(id 8\): areas must be numbers"),
    "area negative": (put(*ANNOTATION, "areas", 0, -1), r"\(id 8\): areas must be numbers"),
    "area of no picture": (put(*ANNOTATION, "areas", 0, 1e300), r"\(id 8\): areas must be numbers"),
    "iscrowd": (put(*ANNOTATION, "iscrowd", "no"), r"\(id 8\): iscrowd must be 0 or 1, got 'no'"),
    "mask of other size": (
        put(*ANNOTATION, "segmentations", 0, "size", [W, H]),
        rf"\(id 8\), frame 0: the mask is \[{W}, {H}\] but the video is \[{H}, {W}\]",
    ),
    "mask without size": (put(*ANNOTATION, "segmentations", 0, "size", ...), r"\(id 8\), frame 0: a segmentation is"),
    "mask is a number": (put(*ANNOTATION, "segmentations", 2, 7), r"\(id 8\), frame 2: a segmentation is"),
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
    "row is text": (put(1, "x"), r"row 1 must be an object, got a text"),
    "no score": (put(1, "score", ...), r"row 1 has no 'score'; it has category_id, segmentations, video_id"),
    "score is NaN": (put(1, "score", float("nan")), r"row 1: the score must be a finite number, got nan"),
    "score is infinite": (put(1, "score", float("inf")), r"row 1: the score must be a finite number, got inf"),
    "score is text": (put(1, "score", "0.5"), r"row 1: the score must be a finite number, got '0.5'"),
    "unknown video": (put(1, "video_id", 3), r"row 1: video_id 3 is not among the 1 videos of .*made for\?"),
    "category is a fraction": (put(1, "category_id", 1.5), r"row 1: category_id must be an integer, got 1.5"),
    "empty segmentations": (put(1, "segmentations", []), r"row 1: the list of segmentations is empty"),
    "mask of other size": (put(1, "segmentations", 0, "size", [1, 2]), r"row 1, frame 0: the mask is \[1, 2\] but"),
    "damaged run lengths": (put(1, "segmentations", 0, "counts", "\x7f"), r"row 1, frame 0: the run lengths are dam"),
    "uncompressed": (
        put(1, "segmentations", 0, {"size": [H, W], "counts": [H * W]}),
        r"row 1, frame 0: results take compressed run lengths only.*pycocotools.mask.encode",
    ),
    "polygon": (put(1, "segmentations", 0, [[1, 1, 5, 1, 5, 5]]), r"row 1, frame 0: results take compressed"),
}


@pytest.mark.parametrize("fault", TRUTH_FAULTS)
@pytest.mark.parametrize("as_file", [False, True])
def test_faulty_annotations(fault: str, as_file: bool, tmp_path: Path) -> None:
    change, message = TRUTH_FAULTS[fault]
    data: Any = copy.deepcopy(TRUTH)
    change(data)
    if as_file:
        file = tmp_path / "gt.json"
        file.write_text(json.dumps(data))
        data, message = file, f"{re.escape(str(file))}: .*{message}"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_ground_truth(data)


@pytest.mark.parametrize("fault", RESULT_FAULTS)
@pytest.mark.parametrize("as_file", [False, True])
def test_faulty_results(fault: str, as_file: bool, tmp_path: Path) -> None:
    change, message = RESULT_FAULTS[fault]
    data: Any = copy.deepcopy(RESULTS)
    change(data)
    if as_file:
        file = tmp_path / "results.json"
        file.write_text(json.dumps(data))
        data, message = file, f"{re.escape(str(file))}: {message}"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        evaluate(TRUTH, data)


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

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f_video.evaluation import (
    STATS,
    EvaluationWarning,
    VideoAPResult,
    evaluate,
    load_ground_truth,
    load_results,
    pair_tracks,
)
from m2f_video.evaluation.video_ap import (
    AREA_RANGES,
    DETECTION_LIMITS,
    IOU_THRESHOLDS,
    RECALL_THRESHOLDS,
    match_pairing,
)
from tests.evaluation.builders import T, annotation, box, dataset, random_case, result
from tests.golden_files import GOLDEN

EVAL = GOLDEN / "eval"
CASES = ("a", "b", "perfect")
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def same(one: VideoAPResult, other: VideoAPResult, tolerance: float = 1e-12) -> bool:
    return all(
        np.allclose(getattr(one, name), getattr(other, name), rtol=0, atol=tolerance)
        for name in ("precision", "recall")
    )


# --- the original evaluator


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> tuple[str, VideoAPResult, Any]:
    files = (EVAL / "gt.json", EVAL / f"results_{request.param}.json")
    if request.param == "perfect":
        measured = evaluate(*files)
    else:
        with pytest.warns(EvaluationWarning, match=r"1 of 147 rows have a category_id .* left out: 77"):
            measured = evaluate(*files)
    return request.param, measured, np.load(EVAL / f"expected_{request.param}.npz")


def test_numbers_equal_the_original(golden: tuple[str, VideoAPResult, Any]) -> None:
    _, measured, expected = golden
    assert tuple(measured.stats) == STATS
    np.testing.assert_allclose(list(measured.stats.values()), expected["stats"], rtol=0, atol=1e-12)


def test_curves_equal_the_original(golden: tuple[str, VideoAPResult, Any]) -> None:
    _, measured, expected = golden
    assert list(measured.categories) == expected["catIds"].tolist()
    for name in ("precision", "recall", "scores"):
        assert getattr(measured, name).shape == expected[name].shape
        np.testing.assert_allclose(getattr(measured, name), expected[name], rtol=0, atol=1e-12)


def test_categories_equal_the_original(golden: tuple[str, VideoAPResult, Any]) -> None:
    case, measured, _ = golden
    expected = json.loads((EVAL / "expected.json").read_text())[case]["per_category_AP"]
    for category_id, value in expected.items():
        own = measured.per_category[int(category_id)]["AP"]
        assert own == pytest.approx(-1 if value is None else value, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::m2f_video.evaluation.EvaluationWarning")
def test_overlaps_and_matches_equal_the_original(case: str) -> None:
    expected = json.loads((EVAL / "expected.json").read_text())[case]
    truth = load_ground_truth(EVAL / "gt.json")
    pairings = pair_tracks(truth, load_results(EVAL / f"results_{case}.json", truth))
    pairs = {f"{pairing.video_id},{pairing.category_id}": pairing for pairing in pairings}
    overlaps = next(value for key, value in expected.items() if key.startswith("iou"))
    for key, iou in overlaps.items():
        np.testing.assert_allclose(pairs[key].track_iou(), iou, rtol=0, atol=1e-12)
    for video in expected["per_video_all_areas"]:
        matches = match_pairing(pairs[f"{video['video_id']},{video['category_id']}"])
        assert matches.scores.tolist() == video["dtScores"]
        matched, ignored = (np.array(video[f"dt{what}_iou50"]) != 0 for what in ("Matches", "Ignore"))
        assert matches.true_positive[0, 0].tolist() == (matched & ~ignored).tolist()
        assert matches.false_positive[0, 0].tolist() == (~matched & ~ignored).tolist()


def test_thresholds_equal_the_original() -> None:
    expected = np.load(EVAL / "expected_a.npz")
    assert IOU_THRESHOLDS.tolist() == expected["iouThrs"].tolist()
    assert RECALL_THRESHOLDS.tolist() == expected["recThrs"].tolist()
    assert AREA_RANGES.tolist() == expected["areaRng"].tolist()
    assert list(DETECTION_LIMITS) == expected["maxDets"].tolist()


# --- computed by hand


def test_one_of_two_objects_found_before_a_mistake() -> None:
    truth = dataset(annotation(1, [box(0, 0)] * T), annotation(2, [box(0, 15)] * T))
    measured = evaluate(truth, [result(0.9, [box(0, 0)] * T), result(0.8, [box(10, 20)] * T)])
    # Precision is 1 up to recall 0.5, which are 51 of 101 recalls, and 0 beyond.
    assert measured.stats["AP"] == pytest.approx(51 / 101)
    assert measured.stats["AR1"] == measured.stats["AR100"] == 0.5
    assert measured.stats["APm"] == measured.stats["APl"] == -1  # objects of 100 pixels
    assert measured.per_category[2]["AP"] == -1


def test_iou_adds_up_over_frames() -> None:
    truth = dataset(annotation(1, [box(0, 0), box(0, 0), None, None]))
    # Intersection 100 + 0, union 100 + 100 + 50: IoU 0.4, although one frame fits perfectly.
    low = evaluate(truth, [result(0.9, [box(0, 0), None, box(0, 0, 5, 10), None])])
    assert low.stats["AP50"] == 0
    # Intersection 100 + 50, union 100 + 100: 0.75, which six thresholds accept.
    high = evaluate(truth, [result(0.9, [box(0, 0), box(0, 0, 5, 10), None, None])])
    assert high.stats["AP"] == pytest.approx(0.6)
    assert high.stats["AP75"] == pytest.approx(1)


def test_detections_beyond_the_limit_do_not_count() -> None:
    truth = dataset(*(annotation(number + 1, [box(number, number * 2)] * T) for number in range(3)))
    results = [result(0.9 - 0.1 * number, [box(number, number * 2)] * T) for number in range(3)]
    measured = evaluate(truth, results)
    assert measured.stats["AR1"] == pytest.approx(1 / 3)
    assert measured.stats["AR10"] == 1
    filler = [result(1.0, [box(15, 15, 2, 2)] * T) for _ in range(100)]
    assert evaluate(truth, filler + results).stats["AR100"] == 0


def test_areas_of_annotations_are_those_the_file_states() -> None:
    truth = dataset(annotation(1, [box(0, 0)] * T, areas=[128.0**2, None, 128**2, 0]))
    measured = evaluate(truth, [result(0.9, [box(0, 0)] * T)])
    assert measured.stats["APs"] == measured.stats["APm"] == pytest.approx(1)  # the limit belongs to both ranges
    assert measured.stats["APl"] == -1


def test_lists_of_different_length_are_cut_to_the_shorter() -> None:
    truth = dataset(annotation(1, [box(0, 0)] * T))
    with pytest.warns(EvaluationWarning, match=r"row 0 has 2 segmentations but its video 4 frames, 1 such row"):
        assert evaluate(truth, [result(0.9, [box(0, 0)] * 2)]).stats["AP"] == pytest.approx(1)
    longer = [box(0, 0)] * T + [box(5, 5)] * 2
    with pytest.warns(EvaluationWarning, match=r"row 0 has 6 segmentations"):
        assert evaluate(truth, [result(0.9, longer)]).stats["AP"] == pytest.approx(1)


def test_crowds_count_neither_way() -> None:
    crowd = annotation(2, [box(0, 15)] * T, iscrowd=1)
    truth = dataset(annotation(1, [box(0, 0)] * T), crowd)
    found = result(0.5, [box(0, 0)] * T)
    in_crowd = [result(0.9 - 0.1 * number, [box(0, 15)] * T) for number in range(3)]
    assert evaluate(truth, [*in_crowd, found]).stats["AP"] == pytest.approx(1)
    plain = dataset(annotation(1, [box(0, 0)] * T))
    assert evaluate(plain, [*in_crowd, found]).stats["AP"] == pytest.approx(1 / 4)
    assert evaluate(dataset(crowd), [found]).stats["AP"] == -1


def test_repeated_results_are_mistakes() -> None:
    truth = dataset(annotation(1, [box(0, 0)] * T), annotation(2, [box(0, 15)] * T))
    first, second = result(0.9, [box(0, 0)] * T), result(0.7, [box(0, 15)] * T)
    assert evaluate(truth, [first, second, first | {"score": 0.1}]).stats["AP"] == pytest.approx(1)
    # Precision 1 up to recall 0.5, 2 of 3 up to recall 1.
    for repeat in (first, first | {"score": 0.8}):
        assert evaluate(truth, [first, second, repeat]).stats["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_never_visible_objects_still_count() -> None:
    truth = dataset(annotation(1, [box(0, 0)] * T), annotation(2, [None] * T))
    measured = evaluate(truth, [result(0.9, [box(0, 0)] * T), result(0.5, [None] * T)])
    assert measured.stats["AR100"] == 0.5


# --- properties


@given(seeds)
@few
def test_perfect_results_reach_one(seed: int) -> None:
    truth, _ = random_case(seed)
    visible = [row for row in truth["annotations"] if any(row["segmentations"]) and not row["iscrowd"]]
    truth["annotations"] = visible
    if not visible:
        return
    rows = [
        {key: row[key] for key in ("video_id", "category_id", "segmentations")} | {"score": 1 / (1 + number)}
        for number, row in enumerate(visible)
    ]
    measured = evaluate(truth, rows)
    assert measured.stats["AP"] == pytest.approx(1)
    assert measured.stats["AR100"] == 1


@given(seeds)
@few
def test_only_the_order_of_scores_matters(seed: int) -> None:
    truth, results = random_case(seed)
    measured = evaluate(truth, results)
    rescaled = [row | {"score": row["score"] ** 3 - 5} for row in results]
    assert same(measured, evaluate(truth, rescaled))
    shuffled = [results[index] for index in np.random.default_rng(seed).permutation(len(results))]
    assert same(measured, evaluate(truth, shuffled))
    assert all(-1 <= value <= 1 for value in measured.stats.values())


@given(seeds)
@few
def test_less_certain_results_take_nothing_from_those_before(seed: int) -> None:
    truth, results = random_case(seed)
    measured = evaluate(truth, results)
    more = evaluate(truth, results + [row | {"score": row["score"] - 10} for row in results])
    assert (more.precision[..., 2] >= measured.precision[..., 2] - 1e-12).all()
    assert (more.recall >= measured.recall).all()


@given(seeds)
@few
def test_a_category_alone_is_the_category_among_others(seed: int) -> None:
    truth, results = random_case(seed)
    measured = evaluate(truth, results)
    for category_id in (1, 2):
        alone = {
            "videos": truth["videos"],
            "categories": [row for row in truth["categories"] if row["id"] == category_id],
            "annotations": [row for row in truth["annotations"] if row["category_id"] == category_id],
        }
        rows = [row for row in results if row["category_id"] == category_id]
        assert evaluate(alone, rows).stats == pytest.approx(measured.per_category[category_id])


def test_paths_and_parsed_content_are_the_same(tmp_path: Path) -> None:
    truth, results = random_case(0)
    before = copy.deepcopy((truth, results))
    measured = evaluate(truth, results)
    assert (truth, results) == before
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert evaluate(tmp_path / "gt.json", str(tmp_path / "results.json")).stats == measured.stats

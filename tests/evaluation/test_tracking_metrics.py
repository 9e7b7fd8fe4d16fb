import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f_video.evaluation import TrackingMetrics, evaluate_tracking
from tests.evaluation.builders import T, annotation, box, dataset, random_case, result

LEFT, RIGHT = box(0, 0), box(0, 15)
TWO = dataset(annotation(1, [LEFT] * T), annotation(2, [RIGHT] * T))
ONE = dataset(annotation(1, [LEFT] * T))


def measure(truth: Any, *results: Any, score_threshold: float = 0.3) -> dict[str, float]:
    return evaluate_tracking(truth, list(results), score_threshold).combined.to_dict()


def test_perfect_tracks() -> None:
    metrics = measure(TWO, result(0.9, [LEFT] * T), result(0.8, [RIGHT] * T))
    assert metrics == pytest.approx({"HOTA": 1, "DetA": 1, "AssA": 1, "IDF1": 1, "id_switches": 0})


def test_swapped_identities_cost_association_but_not_detection() -> None:
    metrics = measure(TWO, result(0.9, [LEFT, LEFT, RIGHT, RIGHT]), result(0.8, [RIGHT, RIGHT, LEFT, LEFT]))
    # Each match: its pair of tracks agrees in 2 frames, each of the two has 2 others: 2 / (2 + 2 + 2).
    assert metrics["DetA"] == pytest.approx(1)
    assert metrics["AssA"] == pytest.approx(1 / 3)
    assert metrics["HOTA"] == pytest.approx((1 / 3) ** 0.5)
    assert metrics["IDF1"] == pytest.approx(0.5)
    assert metrics["id_switches"] == 2


def test_a_track_that_breaks_in_two() -> None:
    metrics = measure(ONE, result(0.9, [LEFT, LEFT, None, None]), result(0.8, [None, None, LEFT, LEFT]))
    assert metrics["DetA"] == pytest.approx(1)
    assert metrics["AssA"] == pytest.approx(2 / 4)
    assert metrics["HOTA"] == pytest.approx(0.5**0.5)
    assert metrics["IDF1"] == pytest.approx(0.5)  # 2 right, 2 missed, 2 too many
    assert metrics["id_switches"] == 1


def test_a_track_that_ends_early() -> None:
    metrics = measure(ONE, result(0.9, [LEFT, LEFT, None, None]))
    assert metrics["DetA"] == metrics["AssA"] == metrics["HOTA"] == pytest.approx(0.5)
    assert metrics["IDF1"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert metrics["id_switches"] == 0


def test_masks_that_fit_badly_match_at_low_thresholds_only() -> None:
    metrics = measure(ONE, result(0.9, [box(0, 0, 5, 10)] * T))  # IoU 0.5: ten of the thresholds 0.05, ..., 0.95
    assert metrics["HOTA"] == metrics["DetA"] == metrics["AssA"] == pytest.approx(10 / 19)
    assert metrics["IDF1"] == 1


def test_wrong_categories_do_not_match() -> None:
    tracked = evaluate_tracking(ONE, [result(0.9, [LEFT] * T, category_id=2)])
    for metrics in (tracked.combined, tracked.per_category[1], tracked.per_category[2]):
        assert set(metrics.to_dict().values()) == {0}


def test_categories_and_their_combination() -> None:
    truth = dataset(annotation(1, [LEFT] * T), annotation(2, [RIGHT] * T, category_id=2), categories=3)
    found = result(0.9, [LEFT] * T)
    tracked = evaluate_tracking(truth, [found])
    assert tracked.per_category[1].to_dict()["HOTA"] == pytest.approx(1)
    assert tracked.per_category[2].to_dict()["HOTA"] == 0
    assert tracked.per_category[3] == TrackingMetrics(HOTA=-1, DetA=-1, AssA=-1, IDF1=-1, id_switches=0)
    combined = tracked.combined.to_dict()
    assert combined["DetA"] == pytest.approx(0.5)
    assert combined["AssA"] == pytest.approx(1)
    assert combined["IDF1"] == pytest.approx(2 * 4 / (2 * 4 + 4))


def test_uncertain_predictions_are_left_out() -> None:
    rows = (result(0.9, [LEFT] * T), result(0.29, [RIGHT] * T))
    assert measure(ONE, *rows)["HOTA"] == pytest.approx(1)
    assert measure(ONE, *rows, score_threshold=0.2)["DetA"] == pytest.approx(0.5)
    assert measure(ONE, *rows, score_threshold=0.95)["HOTA"] == 0
    with pytest.raises(ValueError, match="score threshold must be a finite number, got nan"):
        measure(ONE, *rows, score_threshold=float("nan"))


def test_crowds_are_not_followed() -> None:
    crowd = annotation(2, [box(0, 10, 20, 20)] * T, iscrowd=1)
    truth = dataset(annotation(1, [LEFT] * T), crowd)
    found, in_crowd, elsewhere = (result(0.9, [shape] * T) for shape in (LEFT, RIGHT, box(12, 2, 5, 5)))
    assert measure(truth, found, in_crowd)["HOTA"] == pytest.approx(1)
    assert measure(truth, found, elsewhere)["DetA"] == pytest.approx(0.5)
    assert measure(dataset(crowd), in_crowd)["HOTA"] == -1
    # In a crowd, but matching an object: it stays.
    over = dataset(annotation(1, [RIGHT] * T), crowd)
    assert measure(over, in_crowd)["HOTA"] == pytest.approx(1)
    assert measure(over, in_crowd, in_crowd)["HOTA"] == pytest.approx(1)


def test_objects_that_are_never_visible_change_nothing() -> None:
    truth = dataset(*ONE["annotations"], annotation(2, [None] * T))
    assert measure(truth, result(0.9, [LEFT] * T), result(0.8, [None] * T))["HOTA"] == pytest.approx(1)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_ranges_and_order_of_rows(seed: int) -> None:
    truth, results = random_case(seed)
    tracked = evaluate_tracking(truth, results, 0)
    for metrics in (tracked.combined, *tracked.per_category.values()):
        assert all(value == -1 or 0 <= value <= 1 + 1e-12 for value in list(metrics.to_dict().values())[:4])
    rows = [results[index] for index in np.random.default_rng(seed).permutation(len(results))]
    assert measure(truth, *rows, score_threshold=0)["HOTA"] == pytest.approx(tracked.combined.to_dict()["HOTA"])


def test_without_trackeval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackeval.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'm2f-video\[eval\]'"):
        measure(ONE, result(0.9, [LEFT] * T))

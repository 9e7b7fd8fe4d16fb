from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from m2f_video.evaluation import Pairing, load_ground_truth, load_results, pair_tracks
from tests.evaluation.builders import H, T, W, annotation, box, dataset, result, rle_of

masks = arrays(bool, (3, T, H, W), elements=st.booleans(), fill=st.booleans())


def pairing_of(annotated: np.ndarray, detected: np.ndarray) -> Pairing:
    """Of masks (N, T, H, W)."""

    def row(track: np.ndarray) -> dict[str, Any]:
        return {
            "video_id": 1,
            "category_id": 1,
            "segmentations": [rle_of(mask) for mask in track],
            "areas": [0] * len(track),
        }

    truth = load_ground_truth(dataset(*(row(track) | {"id": index} for index, track in enumerate(annotated))))
    results = load_results([row(track) | {"score": -float(index)} for index, track in enumerate(detected)], truth)
    (pairing,) = pair_tracks(truth, results)
    return pairing


@given(masks, masks)
@settings(max_examples=30, deadline=None)
def test_overlaps_equal_those_of_decoded_masks(annotated: np.ndarray, detected: np.ndarray) -> None:
    pairing = pairing_of(annotated, detected)
    intersections = np.einsum("dthw,gthw->tdg", detected.astype(int), annotated.astype(int))
    unions = (detected[:, None] | annotated[None]).sum((3, 4)).transpose(2, 0, 1)  # (T, D, G)
    assert (pairing.intersections == intersections).all()
    assert np.allclose(pairing.frame_iou(), intersections / np.maximum(unions, 1))
    assert np.allclose(pairing.track_iou(), intersections.sum(0) / np.maximum(unions.sum(0), 1))


def test_large_masks_are_exact() -> None:
    height, width = 2000, 3000
    truth = dataset()
    truth["videos"][0] |= {"height": height, "width": width, "length": 1}
    rng = np.random.default_rng(0)
    annotated, detected = (rng.random((height, width)) < share for share in (0.7, 0.4))
    truth["annotations"] = [
        {"id": 1, "video_id": 1, "category_id": 1, "segmentations": [rle_of(annotated)], "areas": [1]}
    ]
    loaded = load_ground_truth(truth)
    rows = [{"video_id": 1, "category_id": 1, "score": 1, "segmentations": [rle_of(detected)]}]
    (pairing,) = pair_tracks(loaded, load_results(rows, loaded))
    assert pairing.intersections.item() == (annotated & detected).sum()


def test_kinds_of_annotated_masks_are_the_same_mask() -> None:
    compressed = annotation(1, [box(2, 3)] * T)
    counts = [3 * H + 2, *[10, 10] * 9, 10, (W - 13) * H + 8]
    uncompressed = annotation(2, [None] * T, segmentations=[{"size": [H, W], "counts": counts}] * T, areas=[100] * T)
    polygon = [[3, 2, 13, 2, 13, 12, 3, 12]]
    outlined = annotation(3, [None] * T, segmentations=[polygon] * 2 + [[], None], areas=[100] * T)
    truth = load_ground_truth(dataset(compressed, uncompressed, outlined))
    (pairing,) = pair_tracks(truth, load_results([result(1.0, [box(2, 3)] * T)], truth))
    assert (pairing.frame_iou()[:, 0, :2] == 1).all()
    assert pairing.frame_iou()[:, 0, 2].tolist() == [1, 1, 0, 0]
    assert [track.pixels.tolist() for track in truth.tracks] == [[100] * 4, [100] * 4, [100, 100, 0, 0]]


def test_best_hundred_detections_are_kept_in_stable_order() -> None:
    truth = load_ground_truth(dataset(annotation(1, [box(0, 0)] * T)))
    rows = [result(score, [None] * T) for score in [0.1] * 60 + [0.2] * 60]
    (pairing,) = pair_tracks(truth, load_results(rows, truth))
    assert [track.id for track in pairing.detections] == [*range(60, 120), *range(40)]

"""Small data sets and results made of boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

H, W, T = 20, 30, 4
Box = tuple[int, int, int, int]  # top, left, height, width


def box(top: int, left: int, height: int = 10, width: int = 10) -> Box:
    return top, left, height, width


def mask_of(shape: Box | None) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    if shape is not None:
        top, left, height, width = shape
        mask[top : top + height, left : left + width] = 1
    return mask


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def segmentations(boxes: Sequence[Box | None]) -> list[dict[str, Any] | None]:
    return [None if shape is None else rle_of(mask_of(shape)) for shape in boxes]


def annotation(number: int, boxes: Sequence[Box | None], **changes: Any) -> dict[str, Any]:
    areas = [None if shape is None else shape[2] * shape[3] for shape in boxes]
    row = {"id": number, "video_id": 1, "category_id": 1, "iscrowd": 0, "areas": areas}
    return row | {"segmentations": segmentations(boxes)} | changes


def result(score: float, boxes: Sequence[Box | None], **changes: Any) -> dict[str, Any]:
    row = {"video_id": 1, "category_id": 1, "score": score}
    return row | {"segmentations": segmentations(boxes)} | changes


def dataset(*annotations: dict[str, Any], videos: int = 1, categories: int = 2) -> dict[str, Any]:
    return {
        "videos": [{"id": number + 1, "height": H, "width": W, "length": T} for number in range(videos)],
        "categories": [{"id": number + 1, "name": f"class {number + 1}"} for number in range(categories)],
        "annotations": list(annotations),
    }


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Three videos of two categories with absent frames and a crowd, and predictions with scores that all differ."""
    rng = np.random.default_rng(seed)

    def boxes() -> list[Box | None]:
        top, left, *size = rng.integers([0, 0, 2, 2], [10, 20, 11, 11]).tolist()
        return [None if rng.random() < 0.2 else (top + t // 2, left, *size) for t in range(T)]

    tracks = [boxes() for _ in range(8)]
    truth = dataset(
        *(
            annotation(index + 1, track, video_id=1 + index % 3, category_id=1 + index % 2, iscrowd=int(index == 5))
            for index, track in enumerate(tracks)
        ),
        videos=3,
    )
    scores = rng.permutation(20) / 20 + 0.01
    results = [
        result(
            float(score),
            tracks[index] if index < 4 else boxes(),
            video_id=1 + index % 3,
            category_id=1 + index % 2,
        )
        for index, score in enumerate(scores)
    ]
    return truth, results

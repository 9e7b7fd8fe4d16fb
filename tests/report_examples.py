"""Results and videos for pages: every frame of the video says its number, and every mask is where it is known to be."""

from typing import Any

import numpy as np

from m2f_video.results.masks import encode_mask
from m2f_video.results.tracks import Track, VideoSegmentation

H, W, T = 63, 95, 30  # odd sides, which a video does not have
LABELS = ("person", "dog", "train")
BITS, CELL = 10, 8


def numbered_frames(count: int = T, height: int = H, width: int = W) -> np.ndarray:
    """Frames whose upper left corner shows their number in cells of black and white."""
    frames = np.full((count, height, width, 3), 90, np.uint8)
    for number, frame in enumerate(frames):
        for bit in range(BITS):
            frame[:CELL, bit * CELL : (bit + 1) * CELL] = 235 if number >> bit & 1 else 16
    return frames


def blob(x: float, y: float, radius: float, height: int = H, width: int = W) -> np.ndarray:
    """A mask with a hole and a piece apart, so that runs of all kinds occur."""
    ys, xs = np.mgrid[:height, :width]
    distance = np.hypot(xs - x, ys - y)
    apart = (abs(xs - x) < 2) & (abs(ys - y - radius - 6) < 2)
    return ((distance < radius) & (distance > radius / 4)) | apart


def moving(first: float, y: float, radius: float, count: int = T, absent: range = range(0)) -> tuple[Any, ...]:
    """Run lengths of a blob that goes to the right."""
    masks = [encode_mask(blob(first + 1.5 * frame, y, radius)) for frame in range(count)]
    return tuple(None if frame in absent else mask for frame, mask in enumerate(masks))


def result(**changes: Any) -> VideoSegmentation:
    """Three objects, of which two overlap, and a second class for the first one's masks."""
    dog = moving(10, 25, 12)
    rows = [
        (3, "dog", 0.95, 7, dog),
        (1, "person", 0.9, 2, moving(20, 32, 14, absent=range(10, 16))),
        (2, "train", 0.6, 4, moving(60, 45, 9, absent=range(5))),
        (5, "person", 0.1, 7, dog),
    ]
    tracks = tuple(
        Track(id=id_, label=label, label_id=LABELS.index(label), score=score, query_id=query, segmentations=masks)
        for id_, label, score, query, masks in rows
    )
    fields: dict[str, Any] = {
        "source": "cars.mp4",
        "width": W,
        "height": H,
        "fps": 10,
        "frames": range(T),
        "labels": LABELS,
        "tracks": tracks,
        "video": numbered_frames(),
    }
    return VideoSegmentation(**(fields | changes))


def other_result(**changes: Any) -> VideoSegmentation:
    """As `result`, but the dog is larger from frame 20 on, the person a train, the train gone, and a dog come."""
    first = result().tracks
    larger = moving(10, 25, 12)[:20] + moving(10, 25, 15)[20:]
    tracks = (
        Track(id=1, label="dog", label_id=1, score=0.93, query_id=1, segmentations=larger),
        Track(id=2, label="train", label_id=2, score=0.8, query_id=5, segmentations=first[1].segmentations),
        Track(id=3, label="dog", label_id=1, score=0.7, query_id=9, segmentations=moving(5, 54, 5, absent=range(15))),
    )
    return result(tracks=tracks, **changes)

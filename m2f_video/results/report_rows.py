"""What a page shows of one result, or of two of one video: their masks in chunks, and a row for each object.

T frames of the result, K masks that differ (tracks of one query share one), H height, W width.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from m2f_video.results.drawing import track_colors
from m2f_video.results.masks import Rle, intersections, mask_area

if TYPE_CHECKING:
    from m2f_video.results.tracks import Track, VideoSegmentation

CHUNK = 50
"""Frames whose masks a browser decodes together."""
LEAST_IOU = 0.3
"""Intersection over union, through the video, from which two tracks of two results count as one object."""

Row = dict[str, Any]


class MaskScan:
    """One look at all masks of the results, frame by frame, with those of a chunk in memory.

    Attributes:
        keys: of each result, the position of each query among its masks.
        areas: of each result, pixels of each mask in each frame, uint32 (K, T).
        shared: pixels that a mask of the first result shares with one of the second, uint32 (T,) by both positions;
            none where they never do.
    """

    def __init__(self, results: "Sequence[VideoSegmentation]") -> None:
        self._results, self._count = results, len(results[0].frames)
        self.keys = [
            {query: place for place, query in enumerate(dict.fromkeys(track.query_id for track in result.tracks))}
            for result in results
        ]
        self.areas = [np.zeros((len(keys), self._count), np.uint32) for keys in self.keys]
        self.shared: dict[tuple[int, int], np.ndarray] = {}

    def chunks(self) -> Iterator[tuple[int, list[bytes]]]:
        """Chunk by chunk, how many frames are done and the masks of each result, deflated.

        Of each frame each mask has a line: its run lengths as COCO writes them, column by column; empty where the
        object is absent.

        Raises:
            ValueError: two tracks of one query have different masks.
        """
        for start in range(0, self._count, CHUNK):
            stop = min(start + CHUNK, self._count)
            lines: list[list[str]] = [[] for _ in self._results]
            for position in range(start, stop):
                masks = [self._masks(number, position) for number in range(len(self._results))]
                if len(masks) == 2:
                    self._compare(position, *masks)
                for of_result, found, keys in zip(lines, masks, self.keys, strict=True):
                    of_result += [found[place]["counts"] if place in found else "" for place in range(len(keys))]
            yield stop, [zlib.compress("\n".join(text).encode("ascii"), 9) for text in lines]

    def _masks(self, number: int, position: int) -> dict[int, Rle]:
        """What is seen of a result in a frame, by its position among the masks."""
        found: dict[int, Rle | None] = {}
        for track in self._results[number].tracks:
            rle, place = track.segmentations[position], self.keys[number][track.query_id]
            if found.setdefault(place, rle) != rle:
                raise ValueError(f"track {track.id} has query {track.query_id}, but not the masks of another")
        seen = {place: rle for place, rle in found.items() if rle is not None and mask_area(rle)}
        for place, rle in seen.items():
            self.areas[number][place, position] = mask_area(rle)
        return seen

    def _compare(self, position: int, ours: dict[int, Rle], theirs: dict[int, Rle]) -> None:
        pixels = intersections(list(ours.values()), list(theirs.values()))
        for row, column in np.argwhere(pixels):
            pair = list(ours)[row], list(theirs)[column]
            self.shared.setdefault(pair, np.zeros(self._count, np.uint32))[position] = pixels[row, column]


def single_rows(result: "VideoSegmentation", scan: MaskScan) -> list[Row]:
    """A row for each track, in the colour that it has in the overlay."""
    colors = track_colors(track.id for track in result.tracks).tolist()
    return [
        {"color": color, "tracks": [_track_of(track, scan, 0)], "iou": None}
        for track, color in zip(result.tracks, colors, strict=True)
    ]


def paired_rows(ours: "VideoSegmentation", theirs: "VideoSegmentation", scan: MaskScan) -> tuple[list[Row], np.ndarray]:
    """A row for each object that both results have, or one of them.

    Tracks belong together that cover the same pixels through the video, one of each, so that the sum of their IoU is
    the largest; of those with the same pixels, two of one class. A pair has the colour of the first one's track.

    Returns:
        The rows, and the pixels that pairs share, uint32 (pairs, T); a row says which in "shared".
    """
    from scipy.optimize import linear_sum_assignment

    iou = np.array([[_iou(scan, a, b) for b in theirs.tracks] for a in ours.tracks]).reshape(
        len(ours.tracks), len(theirs.tracks)
    )
    same = np.array([[a.label == b.label for b in theirs.tracks] for a in ours.tracks]).reshape(iou.shape)
    pairs = zip(*linear_sum_assignment(iou + 1e-3 * same, maximize=True), strict=True)
    partner = {int(a): int(b) for a, b in pairs if iou[a, b] >= LEAST_IOU}
    rows: list[Row] = []
    shared: list[np.ndarray] = []
    for number, (track, color) in enumerate(
        zip(ours.tracks, track_colors(track.id for track in ours.tracks).tolist(), strict=True)
    ):
        row = {"color": color, "tracks": [_track_of(track, scan, 0), None], "iou": None}
        if number in partner:
            other = theirs.tracks[partner[number]]
            row |= {"tracks": [row["tracks"][0], _track_of(other, scan, 1)], "iou": float(iou[number, partner[number]])}
            row["shared"] = len(shared)
            shared.append(scan.shared[scan.keys[0][track.query_id], scan.keys[1][other.query_id]])
        rows.append(row)
    alone = [track for number, track in enumerate(theirs.tracks) if number not in partner.values()]
    first = 1 + max((track.id for track in ours.tracks), default=0)  # colours that ours do not have
    for track, color in zip(alone, track_colors(range(first, first + len(alone))).tolist(), strict=True):
        rows.append({"color": color, "tracks": [None, _track_of(track, scan, 1)], "iou": None})
    return rows, np.array(shared, np.uint32).reshape(len(shared), len(ours.frames))


def _iou(scan: MaskScan, ours: "Track", theirs: "Track") -> float:
    """Of two tracks, through the video."""
    a, b = scan.keys[0][ours.query_id], scan.keys[1][theirs.query_id]
    if (a, b) not in scan.shared:
        return 0.0
    both = int(scan.shared[a, b].sum(dtype=np.int64))
    return both / (int(scan.areas[0][a].sum(dtype=np.int64)) + int(scan.areas[1][b].sum(dtype=np.int64)) - both)


def _track_of(track: "Track", scan: MaskScan, number: int) -> Row:
    key = scan.keys[number][track.query_id]
    return {
        "id": track.id,
        "label": track.label,
        "score": track.score,
        "certainty": track.certainty,
        "key": key,
        "seen": int(np.count_nonzero(scan.areas[number][key])),
    }

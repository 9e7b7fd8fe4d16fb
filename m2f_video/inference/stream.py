"""A video of any length, in windows: masks and tracks of its frames as they become final.

W frames of a window, S frames from one window's beginning to the next, R tracks, K classes, H W size of the video.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2f_video.inference.linking import Tracker, is_resumable
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.segments import check_thresholds
from m2f_video.inference.windows import Windowing, objects_of, window_features
from m2f_video.results.drawing import draw_tracks, track_colors
from m2f_video.results.masks import Rle, decode_mask
from m2f_video.results.tracks import Track


@dataclass(frozen=True, kw_only=True)
class FrameResult:
    """What is final of a frame.

    Attributes:
        frame: its number in the source, from 0.
        masks: of the tracks that are seen in it, by id.
        image: the frame itself, uint8 RGB (H, W, 3); of an array a view of it. Results that are kept keep their frames.
    """

    frame: int
    masks: dict[int, Rle]
    image: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class TrackScore:
    """A track and one of its classes, so far.

    Attributes:
        id: of the track, from 1, by birth.
        label_id: class of the model, from 0.
        score: probability of the class, averaged over all windows so far; 0 counts where the track is not seen.
        certainty: the same, averaged over the windows that it is seen in.
    """

    id: int
    label_id: int
    score: float
    certainty: float


class VideoStream:
    """The frames of a video as they become final; made by `stream_video`, and iterated once.

    Masks and ids of a frame are final once the first window that it is in has been decoded, so before W more frames
    have been read. Scores are means over all windows: they, and so which tracks are best, are final only at the end.

    Args:
        video: the model and its video.
        windowing: how it is cut, and objects are linked.
        plain: run the model as it is written, without accelerated twins.

    Attributes:
        video, windowing, plain: as they were given.
        source: see `VideoReader`; so are the next three.
        width: pixels.
        height: pixels.
        fps: frames per second.
        labels: names of all classes of the model, in the order of its class numbers.
        num_frames: that are final so far.
    """

    def __init__(self, video: ModelOnVideo, windowing: Windowing, plain: bool = False) -> None:
        self.video, self.windowing = video, windowing
        self.plain, self._begun = plain, False
        self._best: list[TrackScore] = []
        self._scored = 0  # after so many windows
        self._tracker = Tracker(windowing.linker)
        reader = video.reader
        self.source, self.width, self.height, self.fps = reader.source, reader.width, reader.height, float(reader.fps)
        self.labels = video.model.config.labels
        self.num_frames = 0

    def __iter__(self) -> Iterator[FrameResult]:
        with closing(self.windows()) as windows:
            for results in windows:
                yield from results

    @torch.inference_mode()
    def windows(self) -> Generator[list[FrameResult], None, None]:
        """The frames that become final together, window by window: what iterating gives, and as often, once."""
        if self._begun:
            raise ValueError("a stream is iterated once; call stream_video again")
        self._begun = True
        with self.video.accelerated(self.plain) as video:
            for window in window_features(video, self.windowing, self.num_frames):
                output = video.decode(window.features)
                objects = objects_of(output, window, video.mask_product, self.windowing)
                ids = self._tracker.link(objects)
                masks = video.encode_masks(objects.mask_logits[:, -len(window.images) :])
                first, self.num_frames = self.num_frames, self.num_frames + len(window.images)
                yield [
                    FrameResult(
                        frame=video.reader.frame_index(first + position),
                        masks={id_: rle for id_, track in zip(ids, masks, strict=True) if (rle := track[position])},
                        image=image,
                    )
                    for position, image in enumerate(window.images)
                ]
                video.report("frames", self.num_frames, video.reader.num_frames_hint)

    @property
    def num_tracks(self) -> int:
        """How many there ever were."""
        return len(self._tracker.tracks)

    @property
    def is_resumable(self) -> bool:
        """Whether `state_dict` has all; see `m2f_video.inference.linking.Linker`."""
        return is_resumable(self.windowing.linker)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is kept between two windows: with it another stream of the same video goes on where this one is."""
        return {"frames": torch.tensor(self.num_frames), **self._tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on, when iterated, after the last window of the stream whose state this is.

        What comes then is what that stream would have given, bit by bit: frames until there are read and left out.

        Raises:
            ValueError: iterating has begun.
            KeyError: a part of the state is missing.
        """
        if self._begun:
            raise ValueError("a stream goes on before it is iterated; call stream_video again")
        self._tracker.load_state_dict(state)
        self.num_frames = int(state["frames"])

    def scores(self, score_threshold: float = 0.0) -> list[TrackScore]:
        """The `top_k` best pairs of track and class so far, by falling score, without those that are less certain.

        Raises:
            ValueError: a threshold out of its range.
        """
        check_thresholds(score_threshold=score_threshold)
        if self._scored != self._tracker.windows:
            self._best, self._scored = self._best_pairs(), self._tracker.windows
        return [score for score in self._best if score.certainty >= score_threshold]

    def likeliest(self) -> list[TrackScore]:
        """Every track as its likeliest class so far, by falling score."""
        if not self._tracker.tracks:
            return []
        scores = self._tracker.scores()
        best, labels = scores.max(1)
        rows = best.argsort(descending=True, stable=True)
        return self._track_scores(scores, rows, labels[rows])

    def _best_pairs(self) -> list[TrackScore]:
        if not self._tracker.tracks:
            return []
        scores = self._tracker.scores()
        pairs = scores.flatten().topk(min(self.windowing.top_k, scores.numel())).indices
        return self._track_scores(scores, pairs // scores.shape[1], pairs % scores.shape[1])

    def _track_scores(self, scores: Tensor, rows: Tensor, columns: Tensor) -> list[TrackScore]:
        """Of scores (R, K), those of these tracks as these classes."""
        values = (rows, columns, scores[rows, columns], self._tracker.certainties()[rows, columns])
        return [
            TrackScore(id=row + 1, label_id=column, score=score, certainty=certainty)
            for row, column, score, certainty in zip(*(each.tolist() for each in values), strict=True)
        ]

    def draw(self, result: FrameResult, score_threshold: float = 0.0) -> np.ndarray:
        """A frame with the tracks that are seen in it, the most certain on top, each as its likeliest class so far.

        Returns:
            uint8 RGB (H, W, 3).

        Raises:
            ValueError: a threshold out of its range.
        """
        check_thresholds(score_threshold=score_threshold)
        likeliest = [(*self._tracker.likeliest(id_), id_) for id_ in result.masks]  # certainty, class, track
        seen = sorted((track for track in likeliest if track[0] >= score_threshold), key=lambda track: -track[0])
        seen = seen[: self.windowing.top_k]
        return draw_tracks(
            result.image,
            (decode_mask(result.masks[id_]) for *_, id_ in seen),
            track_colors([id_ for *_, id_ in seen]),
            [f"{self.labels[label_id]} {certainty:.2f}" for certainty, label_id, _ in seen],
        )


def segment_windows(stream: VideoStream, score_threshold: float) -> tuple[list[Track], int]:
    """All of a stream: the tracks by falling score, and the number of frames."""
    masks = dict[int, dict[int, Rle]]()  # by track and frame
    for position, result in enumerate(stream):
        for id_, rle in result.masks.items():
            masks.setdefault(id_, {})[position] = rle
    frames = range(stream.num_frames)
    return [
        Track(**row, segmentations=tuple(masks.get(row["query_id"], {}).get(position) for position in frames))
        for row in best_tracks(stream, score_threshold)
    ], len(frames)


def best_tracks(stream: VideoStream, score_threshold: float) -> list[dict[str, Any]]:
    """The tracks of a stream so far, by falling score: the fields of each `Track`, without its masks.

    Each has the id that its masks have in a `FrameResult`; where it is there again as another class, that one gets a
    number of its own, beyond those of all tracks.
    """
    rows, taken = list[dict[str, Any]](), set[int]()
    further = count(stream.num_tracks + 1)
    for best in stream.scores(score_threshold):
        rows.append(_fields(stream, best) | ({"id": next(further)} if best.id in taken else {}))
        taken.add(best.id)
    return rows


def other_tracks(stream: VideoStream, best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `best_tracks`, which gave these: all the others, each as its likeliest class."""
    named = {row["query_id"] for row in best}
    return [_fields(stream, track) for track in stream.likeliest() if track.id not in named]


def _fields(stream: VideoStream, track: TrackScore) -> dict[str, Any]:
    """Of a `Track`."""
    return {
        "id": track.id,
        "label": stream.labels[track.label_id],
        "label_id": track.label_id,
        "score": track.score,
        "certainty": track.certainty,
        "query_id": track.id,
    }

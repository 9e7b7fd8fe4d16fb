"""A video of any length, in windows: masks and tracks of its frames as they become final.

W frames of a window, S frames from one window's beginning to the next, R tracks, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from m2f_video.inference.linking import Tracker
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.segments import check_thresholds
from m2f_video.inference.windows import Windowing, objects_of, window_features
from m2f_video.results.masks import Rle
from m2f_video.results.tracks import Track


@dataclass(frozen=True, kw_only=True)
class FrameResult:
    """What is final of a frame.

    Attributes:
        frame: its number in the source, from 0.
        masks: of the tracks that are seen in it, by id.
    """

    frame: int
    masks: dict[int, Rle]


@dataclass(frozen=True, kw_only=True)
class TrackScore:
    """A track and one of its classes, so far.

    Attributes:
        id: of the track, from 1, by birth.
        label_id: class of the model, from 0.
        score: probability of the class, averaged over all windows so far; 0 counts where the track is not seen.
    """

    id: int
    label_id: int
    score: float


class VideoStream:
    """The frames of a video as they become final; made by `stream_video`, and iterated once.

    Masks and ids of a frame are final once the first window that it is in has been decoded, so before W more frames
    have been read. Scores are means over all windows: they, and so which tracks are best, are final only at the end.

    Args:
        video: the model and its video.
        windowing: how it is cut, and objects are linked.
        plain: run the model as it is written, without accelerated twins.
    """

    def __init__(self, video: ModelOnVideo, windowing: Windowing, plain: bool = False) -> None:
        self.video, self.windowing = video, windowing
        self._plain, self._begun = plain, False
        self._tracker = Tracker(windowing.linker)
        self.num_frames = 0
        """That were given so far."""

    @torch.inference_mode()
    def __iter__(self) -> Iterator[FrameResult]:
        if self._begun:
            raise ValueError("a stream is iterated once; call stream_video again")
        self._begun = True
        with self.video.accelerated(self._plain) as video:
            for window in window_features(video, self.windowing):
                output = video.model.decode_clip(window.features, output_masks=False)
                objects = objects_of(output, window, video.mask_product, self.windowing)
                ids = self._tracker.link(objects)
                masks = video.encode_masks(objects.mask_logits[:, -window.num_new :])
                for frame in range(window.num_new):
                    seen = {id_: rle for id_, of_track in zip(ids, masks, strict=True) if (rle := of_track[frame])}
                    self.num_frames += 1
                    yield FrameResult(frame=video.reader.frame_index(self.num_frames - 1), masks=seen)
                video.report("frames", self.num_frames, video.reader.num_frames_hint)

    def scores(self, score_threshold: float = 0.0) -> list[TrackScore]:
        """The `top_k` best pairs of track and class so far, by falling score, without those that score less.

        Raises:
            ValueError: a threshold out of its range.
        """
        check_thresholds(score_threshold=score_threshold)
        scores = self._tracker.scores()  # (R, K)
        if not scores.numel():
            return []
        best, pairs = scores.flatten().topk(min(self.windowing.top_k, scores.numel()))
        return [
            TrackScore(id=pair // scores.shape[1] + 1, label_id=pair % scores.shape[1], score=score)
            for score, pair in zip(best.tolist(), pairs.tolist(), strict=True)
            if score >= score_threshold
        ]


def segment_windows(stream: VideoStream, score_threshold: float) -> tuple[list[Track], int]:
    """All of a stream: the tracks by falling score, and the number of frames."""
    masks = dict[int, dict[int, Rle]]()  # by track and frame
    for position, result in enumerate(stream):
        for id_, rle in result.masks.items():
            masks.setdefault(id_, {})[position] = rle
    count, names = stream.num_frames, stream.video.model.config.labels
    return [
        Track(
            id=index + 1,
            label=names[best.label_id],
            label_id=best.label_id,
            score=best.score,
            query_id=best.id,
            segmentations=tuple(masks.get(best.id, {}).get(position) for position in range(count)),
        )
        for index, best in enumerate(stream.scores(score_threshold))
    ], count

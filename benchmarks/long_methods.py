"""The ways to segment a long video that `long_video.py` compares: the package's, and those of others on its parts.

G annotated objects, N objects of a window, R tracks, T frames, W frames of a window, h w size of the mask logits.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_video.config import VideoMask2FormerConfig
from m2f_video.inference.linking import LINKERS, EmbeddingLinker, Linker, MaskIouLinker, Tracker, TrackState, Window
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import segment_video
from m2f_video.inference.windows import Windowing, objects_of, window_features
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former, VideoMask2FormerOutput
from m2f_video.results.masks import Rle
from m2f_video.results.tracks import Track
from m2f_video.video.reader import open_video

TOP_K = 10
SMALLEST_IOU = 0.1
"""An object of a window that covers none of the annotated ones better than this is of none of them."""


class RememberingModel:
    """A model that encodes a frame once and decodes a clip once, for all methods; `segment_video` takes it as a model.

    What it gives is what the model gives: frames are known again by all of their bytes, clips by those of a level.

    Attributes:
        processor: what prepares frames for it.

    Args:
        model: accelerated already.
    """

    def __init__(self, model: VideoMask2Former) -> None:
        self.model = model
        self.config, self.device, self.dtype, self.mask_product = (
            model.config,
            model.device,
            model.dtype,
            model.mask_product,
        )
        self.processor = RememberingProcessor(model.config)
        self._frames: dict[bytes, FrameFeatures] = {}
        self._clips: dict[bytes, VideoMask2FormerOutput] = {}

    def encode_frames(self, frames: Tensor) -> FrameFeatures:
        """See `ClipModel`."""
        key = digest(frames)
        if key not in self._frames:
            self._frames[key] = self.model.encode_frames(frames)
        return self._frames[key]

    def decode_clip(self, features: FrameFeatures, *, output_masks: bool) -> VideoMask2FormerOutput:
        """See `ClipModel`."""
        key = digest(features.multi_scale[0])
        if key not in self._clips:
            self._clips[key] = self.model.decode_clip(features, output_masks=output_masks)
        return self._clips[key]

    def normed_queries(self, features: FrameFeatures) -> tuple[VideoMask2FormerOutput, Tensor]:
        """What the model says of a clip, and the queries (Q, C) that its heads say it of."""
        output = self.model.decode_clip(features, output_hidden=True, output_masks=False)
        assert output.queries is not None
        return output, self.model.transformer_decoder.norm(output.queries[-1])[0]


class RememberingProcessor(VideoProcessor):
    """Prepares a frame once."""

    def __init__(self, config: VideoMask2FormerConfig) -> None:
        super().__init__(config.preprocessing, config.labels)
        self._frames: dict[bytes, Tensor] = {}

    def process_frames(self, frames: np.ndarray) -> Tensor:
        """See `VideoProcessor`."""
        key = digest(torch.from_numpy(frames))
        if key not in self._frames:
            self._frames[key] = super().process_frames(frames)
        return self._frames[key]


def digest(values: Tensor) -> bytes:
    """Of all bytes."""
    return hashlib.blake2b(values.contiguous().numpy(), digest_size=16).digest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """What methods may know of a video.

    Attributes:
        frames: uint8 (T, H, W, 3).
        masks: bool (G, T, H, W), of its annotated objects; for the oracle alone.
    """

    frames: np.ndarray
    masks: Tensor


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to segment a video.

    Attributes:
        name: of it.
        group: `main`, `linkers`, `windows` or `bounds`.
        options: of `segment_video`; a linker may be made of the video.
        run: what does it instead of `segment_video`.
        note: what it is, in words.
    """

    name: str
    group: str
    options: Mapping[str, Any] = field(default_factory=dict)
    run: "Callable[[RememberingModel, Video], list[Track]] | None" = None
    note: str = ""

    def __call__(self, model: RememberingModel, video: Video) -> list[Track]:
        """Tracks of a video, of which each mask has the video's size."""
        if self.run is not None:
            return self.run(model, video)
        options = dict(self.options)
        if options.get("linker") is OracleLinker:
            options["linker"] = OracleLinker.of(model, video)
        return list(segment_video(model, video.frames, processor=model.processor, top_k=TOP_K, **options).tracks)

    @property
    def says(self) -> str:
        """All that the tracks depend on but model and video, in words: another one if a default changes."""
        if self.run is not None:
            return f"{self.run!r}".split(" at ")[0]
        options = {"window": 8, "linker": "transfer", **self.options}
        linker = options["linker"]
        return repr(options | {"linker": LINKERS[linker]() if isinstance(linker, str) else linker})


@dataclass(frozen=True, kw_only=True)
class Unlinked:
    """Every object of every window is a track of its own."""

    threshold: float = math.inf
    memory: int = 0
    every_query: bool = False

    def similarity(self, tracks: Sequence[TrackState], window: Window, missed: Tensor) -> Tensor:
        """See `Linker`."""
        return torch.zeros(len(tracks), len(window.queries))


class OracleLinker:
    """Links by the annotated object that a mask covers best: what the same objects of windows would allow.

    Args:
        masks: (G, T, h, w) in [0, 1], of the annotated objects.
    """

    threshold = 0.0
    memory = sys.maxsize
    every_query = False

    def __init__(self, masks: Tensor) -> None:
        self._masks = masks
        self._object_of: dict[int, int] = {}  # of tracks, by id

    @classmethod
    def of(cls, model: RememberingModel, video: Video) -> "OracleLinker":
        """That of a video, with its masks as the model would have made them."""
        size = video.masks.shape[-2:]
        resized, padded = model.processor.resized_size(*size), model.processor.padded_size(*size)
        masks = torch.stack(
            [F.interpolate(of_object[:, None].float(), resized, mode="area") for of_object in video.masks]
        )
        masks = F.pad(masks, (0, padded[1] - resized[1], 0, padded[0] - resized[0]))
        return cls(F.avg_pool2d(masks.flatten(0, 2), 4).unflatten(0, masks.shape[:2]))

    def similarity(self, tracks: Sequence[TrackState], window: Window, missed: Tensor) -> Tensor:
        """See `Linker`."""
        for track in tracks:
            if len(track.mask_logits):  # a track's first window is known when it is first asked of
                self._object_of.setdefault(track.id, int(self._best(track.mask_logits[None], track.start)[1]))
        iou, objects = self._best(window.mask_logits, window.start)  # (N,)
        of_tracks = torch.tensor([self._object_of.get(track.id, -1) for track in tracks])
        seen = torch.stack([track.probabilities[:-1].sum() for track in tracks])
        likeness = iou + (seen / (1 + seen))[:, None]  # the better mask goes to the surer track
        return likeness * ((of_tracks[:, None] == objects) & (objects >= 0))

    def _best(self, mask_logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The annotated objects that (N, W, h, w) cover best, -1 where none, and the IoU."""
        masks = (mask_logits > 0).flatten(1).float()
        truth = self._masks[:, start : start + mask_logits.shape[1]].flatten(1)
        inter = masks @ truth.T
        iou, objects = (inter / (masks.sum(1)[:, None] + truth.sum(1) - inter).clamp(min=1e-6)).max(1)
        return iou, torch.where(iou > SMALLEST_IOU, objects, -1)


class MeanLogitsTracker(Tracker):
    """Scores are softmax of class logits averaged over all frames, as MinVIS has it (arXiv 2208.02245)."""

    def link(self, window: Window) -> list[int]:
        """See `Tracker`. Logarithms of probabilities are logits but for a constant, which the softmax takes out."""
        tiny = torch.finfo(window.probabilities.dtype).tiny
        return super().link(replace(window, probabilities=window.probabilities.clamp(min=tiny).log()))

    def scores(self) -> Tensor:
        """See `Tracker`."""
        summed = torch.stack([track.probabilities for track in self.tracks.values()])
        return (summed / self.windows).softmax(1)[:, :-1]


class MeanSeenTracker(Tracker):
    """Scores are class probabilities averaged over the windows that a track is seen in, as IFC has it."""

    def __init__(self, linker: Linker) -> None:
        super().__init__(linker)
        self._windows_of: dict[int, int] = {}

    def link(self, window: Window) -> list[int]:
        """See `Tracker`."""
        ids = super().link(window)
        for id_ in ids:
            self._windows_of[id_] = self._windows_of.get(id_, 0) + 1
        return ids

    def scores(self) -> Tensor:
        """See `Tracker`."""
        summed = torch.stack([track.probabilities for track in self.tracks.values()])
        return summed[:, :-1] / torch.tensor([self._windows_of[id_] for id_ in self.tracks])[:, None]


def minvis(model: RememberingModel, video: Video) -> list[Track]:
    """MinVIS as published (arXiv 2208.02245, section 3): frame by frame, cosine of the queries, mean of class logits.

    No duplicate is removed.
    """
    tracker = MeanLogitsTracker(EmbeddingLinker())
    return published(
        model, video, Windowing(window=1, stride=1, linker=tracker.linker, max_overlap=1.0, top_k=TOP_K), tracker
    )


def ifc_like(model: RememberingModel, video: Video) -> list[Track]:
    """IFC's clip tracker: clips of 8 at every 4th frame, soft IoU in shared frames, mean score, no duplicate removed.

    After arXiv 2106.03299. Frames that two clips share keep the masks of the first; IFC averages their logits.
    """
    tracker = MeanSeenTracker(MaskIouLinker())
    return published(
        model, video, Windowing(window=8, stride=4, linker=tracker.linker, max_overlap=1.0, top_k=TOP_K), tracker
    )


def unlinked(model: RememberingModel, video: Video) -> list[Track]:
    """The default's windows without linking; scores as IFC's, since over all windows each would be next to nothing."""
    tracker = MeanSeenTracker(Unlinked())
    return published(
        model, video, Windowing(window=8, stride=8, linker=tracker.linker, max_overlap=0.5, top_k=TOP_K), tracker
    )


@torch.inference_mode()
def published(model: RememberingModel, video: Video, windowing: Windowing, tracker: Tracker) -> list[Track]:
    """As `VideoStream` goes through a video, with candidates, vectors to compare and scores as others have them."""
    reader = open_video(video.frames)
    on_video = ModelOnVideo(model, reader, model.processor, 1)
    segmentations: dict[int, list[Rle | None]] = {}
    count = 0
    for features in window_features(on_video, windowing):
        if windowing.linker.every_query:
            output, vectors = model.normed_queries(features.features)
            window = objects_of(output, features, model.mask_product, windowing)
            window = replace(window, mask_embeddings=vectors[window.queries])
        else:
            output = model.decode_clip(features.features, output_masks=False)
            window = of_objects(objects_of(output, features, model.mask_product, windowing))
        ids, new = tracker.link(window), len(features.images)
        for id_, encoded in zip(ids, on_video.encode_masks(window.mask_logits[:, -new:]), strict=True):
            segmentations.setdefault(id_, [None] * len(video.frames))[count : count + new] = encoded
        count += new
    if not tracker.tracks:
        return []
    scores = tracker.scores()
    best, pairs = scores.flatten().topk(min(TOP_K, scores.numel()))
    names = model.config.labels
    return [
        Track(
            id=index + 1,
            label=names[pair % len(names)],
            label_id=pair % len(names),
            score=score,
            query_id=pair // len(names) + 1,
            segmentations=tuple(segmentations[pair // len(names) + 1]),
        )
        for index, (score, pair) in enumerate(zip(best.tolist(), pairs.tolist(), strict=True))
    ]


def of_objects(window: Window) -> Window:
    """Without what is likeliest to be no object."""
    kept = window.probabilities.argmax(1) < window.probabilities.shape[1] - 1
    return replace(
        window,
        queries=window.queries[kept],
        probabilities=window.probabilities[kept],
        mask_embeddings=window.mask_embeddings[kept],
        mask_logits=window.mask_logits[kept],
    )


def windows(size: int, stride: int, **more: Any) -> dict[str, Any]:
    """Options of `segment_video`."""
    return {"mode": "window", "window": size, "stride": stride, **more}


DEFAULT = "window"
METHODS = (
    Method(name=DEFAULT, group="main", options={"mode": "window"}, note="the default: 8/8, transfer"),
    Method(name="whole", group="main", options={"mode": "whole"}, note="one clip, as published"),
    Method(name="MinVIS", group="main", run=minvis, note="frame by frame, as published"),
    Method(name="IFC-like", group="main", run=ifc_like, note="8/4, mask IoU, mean score, as published"),
    Method(name="whole, no duplicates", group="bounds", options={"mode": "whole", "max_overlap": 0.5}),
    Method(name="unlinked", group="bounds", run=unlinked, note="8/8, every object of a window is a track: the floor"),
    Method(name="oracle", group="bounds", options=windows(8, 8, linker=OracleLinker), note="links by the truth"),
    Method(name="window, duplicates kept", group="bounds", options=windows(8, 8, max_overlap=1.0)),
    Method(name="embedding 8/8", group="linkers", options=windows(8, 8, linker="embedding")),
    Method(name="mask_iou 8/4", group="linkers", options=windows(8, 4, linker="mask_iou")),
    Method(name="both 8/4", group="linkers", options=windows(8, 4, linker="both")),
    Method(name="both 8/8", group="linkers", options=windows(8, 8, linker="both")),
    *(
        Method(name=f"transfer {size}/{stride}", group="windows", options=windows(size, stride))
        for size, stride in ((1, 1), (2, 2), (4, 4), (4, 2), (8, 4), (8, 6), (12, 12), (16, 16), (16, 8))
    ),
)
"""All of them; the first is what others are compared with."""


def choose(names: Sequence[str]) -> list[Method]:
    """Methods by their names or groups, the default first; all, where none are named.

    Raises:
        ValueError: there is no such method; the message lists them.
    """
    known = {name for method in METHODS for name in (method.name, method.group)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no method {unknown[0]!r}; methods: {', '.join(method.name for method in METHODS)}")
    return [m for m in METHODS if not names or m.name == DEFAULT or m.name in names or m.group in names]

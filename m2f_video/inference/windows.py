"""A video as clips of a few frames: windows, each decoded as the model was trained to, and what they show.

W frames of a window, S frames from one window's beginning to the next, Q queries, N objects, C channels, K classes,
h w size of the mask logits.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from m2f_video.inference.clip_model import ClipPrediction
from m2f_video.inference.features import FeatureBuffer
from m2f_video.inference.linking import Linker, MaskProductFunction, Window
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.postprocess import select_top_k
from m2f_video.inference.segments import check_count, check_thresholds, class_probabilities
from m2f_video.modeling.video_mask2former import FrameFeatures

MAX_OVERLAP = 0.5
"""An object of whose mask more certain ones cover a larger share is a duplicate."""
MOST_WINDOW = 4096
"""Frames; a window's features are in memory together."""


@dataclass(frozen=True, eq=False)
class WindowFeatures:
    """Features of the frames of a window.

    Attributes:
        start: number of its first frame.
        features: of all its frames.
        images: those of its last frames that were in no window before, uint8 (H, W, 3).
    """

    start: int
    features: FrameFeatures
    images: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Windowing:
    """How a video is cut into windows, and what is seen in them is linked.

    Attributes:
        window: frames W of a window.
        stride: frames S from the beginning of one window to that of the next, at most W.
        linker: of objects to tracks.
        max_overlap: an object of whose mask more certain ones cover a larger share is left out; 1 keeps all.
        top_k: how many (object, class) pairs of a video are wanted.

    Raises:
        ValueError: one of them is out of its range.
    """

    window: int
    stride: int
    linker: Linker
    max_overlap: float
    top_k: int

    def __post_init__(self) -> None:
        check_count("window", self.window, MOST_WINDOW)
        check_count("stride", self.stride, self.window)
        check_thresholds(max_overlap=self.max_overlap)


def window_features(video: ModelOnVideo, windowing: Windowing, done: int = 0) -> Iterator[WindowFeatures]:
    """Cut a video of any length into windows, with the pixels of one window and the features of two in memory.

    Where fewer frames are left than a window has, the last one begins earlier: positions in time are scaled by a
    clip's length, so that a shorter clip would be another kind of input. A video that is shorter than a window is one.

    Args:
        video: the model and its video.
        windowing: how to cut.
        done: frames up to the end of a window that are not wanted any more. They are read, and those that later windows
            share are encoded, in the chunks in which they would have been.
    """
    size, stride = windowing.window, windowing.stride
    frames, recent = iter(video.reader), deque[np.ndarray](maxlen=size)
    overlap: FrameFeatures | None = None
    count = 0
    while new := list(islice(frames, stride if count else size)):
        buffer, again, end = FeatureBuffer(size), list[np.ndarray](), count + len(new)
        if count and len(new) < stride:
            again = list(recent)[len(new) - size :]
        elif overlap is not None:
            buffer.append(overlap)
        count = end
        recent.extend(new)
        if end <= done - (size - stride):
            video.report("frames", end, video.reader.num_frames_hint)
            continue
        pixels = again + new
        while pixels:
            chunk = pixels[: video.frames_per_chunk]  # which is halved where memory does not suffice
            pixels = pixels[len(chunk) :]
            buffer.append(video.encode(np.stack(chunk)))
        features = buffer.features()
        if end > done:
            yield WindowFeatures(end - len(features.mask_features), features, new)
        overlap = last_frames(features, size - stride) if stride < size else None


def last_frames(features: FrameFeatures, count: int) -> FrameFeatures:
    """Of so many frames at the end."""
    return FrameFeatures(features.mask_features[-count:], tuple(level[-count:] for level in features.multi_scale))


def objects_of(
    output: ClipPrediction,
    window: WindowFeatures,
    mask_product: MaskProductFunction,
    windowing: Windowing,
) -> Window:
    """The objects that a model sees in a window, the most certain first: `likely_queries` without duplicates.

    Args:
        output: of the window.
        window: of which the masks are made.
        mask_product: makes masks of embeddings and features.
        windowing: says what a duplicate is. Where all are kept, the queries of the `top_k` likeliest (query, class)
            pairs are taken too, as of a whole video.

    Raises:
        ValueError: NaN in the class logits.
    """
    class_logits, max_overlap = output.class_queries_logits[0], windowing.max_overlap
    if windowing.linker.every_query:
        queries, max_overlap = torch.arange(len(class_logits), device=class_logits.device), 1.0
    else:
        queries = likely_queries(class_logits, windowing.top_k if max_overlap >= 1 else None)
    embeddings = output.mask_embeddings[:, queries]
    logits = mask_product(embeddings, window.features.mask_features[None])[0]
    kept = without_duplicates(logits > 0, max_overlap) if max_overlap < 1 else slice(None)
    return Window(
        window.start,
        queries[kept],
        class_probabilities(class_logits)[queries[kept]],
        embeddings[0, kept],
        logits[kept],
        window.features.mask_features,
        mask_product,
    )


def likely_queries(class_logits: Tensor, top_k: int | None) -> Tensor:
    """Queries whose likeliest class is not no-object, and those of the `top_k` likeliest (query, class) pairs.

    Of class logits (Q, K+1); by falling probability of any object, of equals the first.
    """
    probabilities = class_probabilities(class_logits)
    is_likely = probabilities.argmax(1) < probabilities.shape[1] - 1
    if top_k is not None:
        is_likely[select_top_k(class_logits, top_k)[2]] = True
    queries = is_likely.nonzero().flatten()
    return queries[probabilities[queries, -1].argsort(stable=True)]


def without_duplicates(masks: Tensor, max_overlap: float) -> Tensor:
    """Which masks are of things of their own: better ones that are kept do not cover more than a share of them.

    A query that shows one object again goes, and one that shows two at once, each of which has its own.

    Args:
        masks: bool (N, ...), the best first.
        max_overlap: largest share of a mask, in [0, 1].

    Returns:
        Their indices, rising.
    """
    pixels, kept = masks.flatten(1), list[int]()
    taken = pixels.new_zeros(pixels.shape[1])
    for index, mask in enumerate(pixels):
        if (mask & taken).sum() <= max_overlap * mask.sum():
            kept.append(index)
            taken |= mask
    return torch.tensor(kept, dtype=torch.int64, device=masks.device)

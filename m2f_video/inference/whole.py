"""A video as one clip: every query attends to all of its frames (arXiv 2112.10764, section 3).

T frames, Q queries, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from m2f_video.inference.clip_model import ClipPrediction
from m2f_video.inference.features import FeatureBuffer
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.postprocess import select_top_k
from m2f_video.inference.windows import likely_queries, without_duplicates
from m2f_video.modeling.video_mask2former import FrameFeatures
from m2f_video.results.masks import Rle
from m2f_video.results.tracks import Track

MOST_ROOM = 256  # frames to make room for at once: what a file says of its length can be far off


def segment_whole(
    video: ModelOnVideo, *, top_k: int, score_threshold: float, max_overlap: float
) -> tuple[list[Track], int]:
    """Decode a video at once; until then each frame's features stay in memory.

    Args:
        video: the model and its video.
        top_k: see `segment_video`.
        score_threshold: see `segment_video`.
        max_overlap: see `segment_video`.

    Returns:
        The tracks by falling score, and the number of frames.
    """
    total = video.reader.num_frames_hint
    buffer, count = FeatureBuffer(min(total or MOST_ROOM, MOST_ROOM)), 0
    for part in encoded(video, video.reader, video.frames_per_chunk):
        buffer.append(part)
        video.report("frames", count := count + len(part.mask_features), total)
    features = buffer.features()
    output = video.decode(features)
    parts = features.mask_features.split(video.frames_per_chunk)
    return tracks_of(
        video, output, lambda: parts, count, top_k=top_k, score_threshold=score_threshold, max_overlap=max_overlap
    ), count


def encoded(video: ModelOnVideo, frames: Iterable[np.ndarray], size: int) -> Iterator[FrameFeatures]:
    """Features of frames, read and encoded so many at a time."""
    frames = iter(frames)
    while chunk := list(islice(frames, size)):
        yield video.encode(np.stack(chunk))


def tracks_of(
    video: ModelOnVideo,
    output: ClipPrediction,
    mask_features: Callable[[], Iterable[Tensor]],
    count: int,
    *,
    top_k: int,
    score_threshold: float,
    max_overlap: float,
) -> list[Track]:
    """The tracks of a decoded clip, by falling score.

    Args:
        video: the model and its video.
        output: of the clip.
        mask_features: gives those of all frames, part by part, (F, C, H/4, W/4) on the model's device.
        count: of the frames.
        top_k: see `segment_video`.
        score_threshold: see `segment_video`.
        max_overlap: see `segment_video`.
    """
    class_logits = output.class_queries_logits[0]
    among = torch.arange(len(class_logits), device=class_logits.device)
    if max_overlap < 1:
        among = likely_queries(class_logits, top_k)
        product = partial(video.mask_product, output.mask_embeddings[:, among])
        everywhere = torch.cat([(product(part[None])[0] > 0).cpu() for part in mask_features()], dim=1)
        among = among[without_duplicates(everywhere, max_overlap).to(among.device)]
    most = len(among) * (class_logits.shape[1] - 1)
    scores, labels, chosen = select_top_k(class_logits[among], min(top_k, most), score_threshold)
    queries, mask_of_pair = among[chosen].unique(return_inverse=True)

    per_frame: list[list[tuple[Rle | None, ...]]] = [[] for _ in queries]
    done = 0
    for part in mask_features():
        logits = video.mask_product(output.mask_embeddings[:, queries], part[None])[0]
        for masks, encoded_masks in zip(per_frame, video.encode_masks(logits), strict=True):
            masks.append(encoded_masks)
        video.report("masks", done := done + len(part), count)
    segmentations = [tuple(rle for part in masks for rle in part) for masks in per_frame]
    pairs = zip(scores.tolist(), labels.tolist(), among[chosen].tolist(), mask_of_pair.tolist(), strict=True)
    names = video.model.config.labels
    return [
        Track(
            id=index + 1,
            label=names[label],
            label_id=label,
            score=score,
            query_id=query,
            segmentations=segmentations[mask],
        )
        for index, (score, label, query, mask) in enumerate(pairs)
    ]

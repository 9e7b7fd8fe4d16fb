"""From a video to tracks: decode in a stream, encode frames in chunks, decode the clip as a whole.

T frames, Q queries, H W height and width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from m2f_video.acceleration import accelerated
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.features import FeatureBuffer
from m2f_video.inference.postprocess import resize_masks, select_top_k
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segments import chunks
from m2f_video.modeling.transformer_decoder import MaskProduct
from m2f_video.modeling.video_mask2former import FrameFeatures
from m2f_video.results.masks import Rle, encode_mask
from m2f_video.results.tracks import Track, VideoSegmentation
from m2f_video.video.reader import VideoReader, VideoSource, open_video

MOST_ROOM = 256  # frames to make room for at once: what a file says of its length can be far off

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("frames" or "masks"), how many frames it has done, and of how many (None: not known yet)."""


@torch.inference_mode()
def segment_video(
    model: ClipModel,
    source: VideoSource | VideoReader,
    *,
    processor: VideoProcessor | None = None,
    frames: slice | None = None,
    top_k: int = 10,
    score_threshold: float = 0.0,
    frames_per_chunk: int | None = None,
    strict: bool = False,
    plain: bool = False,
    progress: Progress | None = None,
) -> VideoSegmentation:
    """Segment and track the objects of a video.

    The video is one clip: every query attends to all frames (arXiv 2112.10764, section 3). One frame of pixels is
    alive at a time per frame of a chunk; what stays in memory until the end is each frame's features.

    Args:
        model: with `temporal="joint"`, on any device, in any dtype. It runs in evaluation mode and accelerated, see
            `m2f_video.acceleration.accelerated`, and is as it was afterwards; several threads may share it.
        source: what `open_video` takes (file, folder of frames, array), or an open reader.
        processor: other preprocessing than the model's own.
        frames: which frames of the source, counted from 0; None takes all. Not for an open reader.
        top_k: how many (query, class) pairs become tracks, as the published evaluation takes 10.
        score_threshold: pairs that score less are left out.
        frames_per_chunk: frames encoded at a time; None is 1 on a CPU and 8 elsewhere.
        strict: raise an error for a video that is damaged or changes its size, instead of warning and using
            what comes before.
        plain: run the model as it is written, without accelerated twins.
        progress: see `Progress`.

    Returns:
        Tracks by falling score; their masks have the source's size. `save` writes them and the overlay.

    Raises:
        VideoError: the source is no video, or none of its frames is selected.
        FileNotFoundError: there is no such file.
        TypeError: `model` is none.
        ValueError: a per-frame model, an option out of its range, or NaN in what the model gives.
    """
    if not isinstance(model, ClipModel):
        raise TypeError(
            f"the model comes first, loaded by VideoMask2Former.from_pretrained; got {type(model).__name__}"
        )
    if model.config.temporal != "joint":
        raise ValueError(
            "segment_video needs a model with temporal='joint', whose identities hold across frames; "
            "load the checkpoint with temporal='joint' (--temporal joint), or segment its frames as images with "
            "processor.post_process_instance_segmentation"
        )
    if isinstance(source, VideoReader) and frames is not None:
        raise ValueError("frames cannot be chosen for an open reader; give them to open_video")
    reader = source if isinstance(source, VideoReader) else open_video(source, frames, strict=strict)
    processor = processor or VideoProcessor.from_config(model.config)
    chunk_size = (1 if model.device.type == "cpu" else 8) if frames_per_chunk is None else frames_per_chunk
    if not 1 <= chunk_size < 2**31:
        raise ValueError(f"frames_per_chunk must be at least 1 and below {2**31}, got {frames_per_chunk!s:.30}")
    _check_selection(model, top_k, score_threshold)

    with _accelerated(model, plain) as model:
        features = _encode(model, reader, processor, chunk_size, progress)
        output = model.decode_clip(features, output_masks=False)
        scores, labels, queries = select_top_k(output.class_queries_logits[0], top_k, score_threshold)
        kept, mask_of_pair = queries.unique(return_inverse=True)
        masks = partial(getattr(model, "mask_product", MaskProduct()), output.mask_embeddings[:, kept])
        segmentations = _segmentations(masks, features.mask_features, reader, processor, chunk_size, progress)
    tracks = (
        Track(
            id=index + 1,
            label=model.config.labels[label],
            label_id=label,
            score=score,
            query_id=query,
            segmentations=segmentations[mask],
        )
        for index, (score, label, query, mask) in enumerate(
            zip(scores.tolist(), labels.tolist(), queries.tolist(), mask_of_pair.tolist(), strict=True)
        )
    )
    return VideoSegmentation(
        source=reader.source,
        width=reader.width,
        height=reader.height,
        fps=float(reader.fps),
        frames=reader.frame_indices(len(features.mask_features)),
        labels=model.config.labels,
        tracks=tuple(tracks),
        video=reader,
    )


def _accelerated(model: ClipModel, plain: bool) -> AbstractContextManager[ClipModel]:
    return accelerated(model, plain) if isinstance(model, nn.Module) else nullcontext(model)


def _encode(
    model: ClipModel,
    reader: VideoReader,
    processor: VideoProcessor,
    chunk_size: int,
    progress: Progress | None,
) -> FrameFeatures:
    """Features of all frames of a video, read and encoded chunk by chunk."""
    buffer, count = FeatureBuffer(min(reader.num_frames_hint or MOST_ROOM, MOST_ROOM)), 0
    for chunk in _chunks(reader, chunk_size):
        buffer.append(model.encode_frames(processor.process_frames(chunk).to(model.device)))
        count += len(chunk)
        if progress is not None:
            progress("frames", count, reader.num_frames_hint)
    return buffer.features()


def _chunks(reader: VideoReader, size: int) -> Iterator[np.ndarray]:
    """Frames in arrays (up to `size`, H, W, 3)."""
    frames = iter(reader)
    while chunk := list(islice(frames, size)):
        yield np.stack(chunk)


def _segmentations(
    masks_of: Callable[[Tensor], Tensor],
    mask_features: Tensor,
    reader: VideoReader,
    processor: VideoProcessor,
    chunk_size: int,
    progress: Progress | None,
) -> list[tuple[Rle | None, ...]]:
    """Encoded masks, at the source's size, of the kept queries in every frame of mask features (T, C, H/4, W/4)."""
    size = (reader.height, reader.width)
    resized, padded = processor.resized_size(*size), processor.padded_size(*size)
    per_frame: list[list[Rle | None]] = []
    for chunk in mask_features.split(chunk_size):
        logits = masks_of(chunk[None])[0]
        logits = logits.flatten(0, 1)[:, None]  # (Q * chunk, 1, h, w)
        encoded: list[Rle | None] = []
        for part in chunks(len(logits), size[0] * size[1]):
            masks = resize_masks(logits[part], padded, resized, size) > 0
            encoded += [encode_mask(mask) for mask in masks[:, 0].cpu().numpy()]
        per_frame += [encoded[frame :: len(chunk)] for frame in range(len(chunk))]
        if progress is not None:
            progress("masks", len(per_frame), len(mask_features))
    return list(zip(*per_frame, strict=True))


def _check_selection(model: ClipModel, top_k: int, score_threshold: float) -> None:
    """Fail before the work rather than after it."""
    config = model.config
    blank = torch.zeros(config.transformer_decoder.num_queries, config.num_labels + 1)
    select_top_k(blank, top_k, score_threshold)

"""A video as one clip, as in `whole`, with one frame at a time on the model's device.

What decoding needs of a frame, the levels that are attended to and the mask features at their sizes, is kept until the
end, in host memory and beyond a limit in a temporary file: at 480x864 with the default model 17.4 MB a frame in
float32, 8.7 in bfloat16. Masks are made of mask features at stride 4, 26.5 and 13.3 MB: these stay where they fit, and
are made again of later frames, for which the video is read a second time. Where it can be read only once they are kept
in such a file, too.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import cast

from torch import Tensor

from m2f_video.acceleration.streamed_decoder import StreamedDecoder, why_not_streamed
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.frame_store import FrameStore
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.whole import encoded, tracks_of
from m2f_video.modeling.transformer_decoder import MaskedTransformerDecoder
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.results.tracks import Track
from m2f_video.video.decode import VideoError

LEVEL_MEMORY = 4 << 30
"""Bytes of the levels, and of mask features at their sizes, that stay in host memory; later ones are in a file."""
MASK_MEMORY = 2 << 30
"""Bytes of mask features at stride 4 that stay in host memory; later ones are made again from the video."""


def segment_streamed(
    video: ModelOnVideo, *, top_k: int, score_threshold: float, max_overlap: float
) -> tuple[list[Track], int]:
    """Decode a video as one clip.

    Frames are encoded one by one on a CPU, whose kernels may round otherwise for several at a time, and
    `frames_per_chunk` at a time elsewhere; in all that follows each is by itself.

    Args:
        video: the model and its video.
        top_k: see `segment_video`.
        score_threshold: see `segment_video`.
        max_overlap: see `segment_video`.

    Returns:
        The tracks by falling score, and the number of frames.

    Raises:
        ValueError: the model's decoder is not one that `why_not_streamed` knows.
        VideoError: the video has another number of frames when it is read again.
        OSError: there is no room for the file.
    """
    model, size = video.model, 1 if video.model.device.type == "cpu" else video.frames_per_chunk
    with FrameStore(LEVEL_MEMORY) as levels, FrameStore(MASK_MEMORY, spills=video.reader.read_once) as kept:
        decoder, count = StreamedDecoder(_known_decoder(model), levels), 0
        for features in encoded(video, video.reader, size):
            decoder.append(features)
            for frame in features.mask_features:
                kept.append([_as_kept(frame)])
            count += len(features.mask_features)
            video.report("frames", count, video.reader.num_frames_hint)
        _known_decoder(model)  # or it was touched meanwhile
        output = decoder.decode(partial(video.report, "attention"))
        parts = partial(_mask_features, video, kept, count, size)
        return tracks_of(
            video, output, parts, count, top_k=top_k, score_threshold=score_threshold, max_overlap=max_overlap
        ), count


def _known_decoder(model: ClipModel) -> MaskedTransformerDecoder:
    if reason := why_not_streamed(model):
        raise ValueError(
            "mode='streamed' computes what the transformer decoder does as it is written, which this model's need not "
            f"do: {reason}; take mode='whole' or 'window', in which hooks, model.capture and modules of your own count"
        )
    return cast("VideoMask2Former", model).transformer_decoder


def _mask_features(video: ModelOnVideo, kept: FrameStore, count: int, size: int) -> Iterator[Tensor]:
    """Of all frames one by one, (1, C, H/4, W/4): those that are kept, and the others made again."""
    for frame in range(len(kept)):
        yield _as_map(kept.read(frame, 0).to(video.model.device))
    if (found := len(kept)) == count:
        return
    for features in encoded(video, islice(video.reader, found, None), size):
        for frame_features in features.mask_features:
            yield _as_map(_as_kept(frame_features))
        found += len(features.mask_features)
    if found != count:
        raise VideoError(f"{video.reader.source}: it had {count} frames, and {found} when it was read again")


def _as_kept(mask_features: Tensor) -> Tensor:
    """Of a frame, (C, h, w) -> (h, w, C): in the one order in memory, on which the rounding of products may depend."""
    return mask_features.permute(1, 2, 0).contiguous()


def _as_map(mask_features: Tensor) -> Tensor:
    """(h, w, C) -> (1, C, h, w)."""
    return mask_features.permute(2, 0, 1)[None]

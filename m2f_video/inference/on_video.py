"""A model and a video: what every way to segment shares, frames to features and mask logits to run lengths.

F frames, N masks, H W height and width of the video, h w of the mask logits.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from m2f_video.acceleration import accelerated
from m2f_video.inference.clip_model import ClipModel, ClipPrediction
from m2f_video.inference.linking import MaskProductFunction
from m2f_video.inference.postprocess import resize_masks
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segments import chunks
from m2f_video.modeling.transformer_decoder import MaskProduct
from m2f_video.modeling.video_mask2former import FrameFeatures
from m2f_video.results.masks import Rle, encode_mask
from m2f_video.video.reader import VideoReader

_LOGGER = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("frames" or "masks"; between them "attention", where a clip is streamed, whose layers each take
all frames), how many frames it has done, and of how many (None: not known yet)."""


class OutOfMemoryError(MemoryError):
    """Memory does not suffice for the least that can be done at a time; the message says what would take less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: in PyTorch, on a CPU, it is a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@dataclass
class ModelOnVideo:
    """A model, a video and how they meet.

    Attributes:
        model: sees the frames.
        reader: of the video.
        processor: prepares frames, and says what was done to them.
        frames_per_chunk: frames encoded, and masks made, at a time; halved where memory does not suffice.
        progress: see `Progress`.
    """

    model: ClipModel
    reader: VideoReader
    processor: VideoProcessor
    frames_per_chunk: int
    progress: Progress | None = None

    @contextmanager
    def accelerated(self, plain: bool) -> Iterator["ModelOnVideo"]:
        """With the model's twins in place for a while, or with `plain` as it is written, in evaluation mode."""
        if not isinstance(self.model, nn.Module):
            yield self
            return
        with accelerated(self.model, plain) as model:
            yield replace(self, model=model)

    @property
    def mask_product(self) -> MaskProductFunction:
        """What makes mask logits of mask embeddings and mask features."""
        return getattr(self.model, "mask_product", None) or MaskProduct()

    def encode(self, pixels: np.ndarray) -> FrameFeatures:
        """Features of frames (F, H, W, 3), `frames_per_chunk` at a time.

        Raises:
            OutOfMemoryError: memory does not suffice for one frame.
        """
        parts: list[FrameFeatures] = []
        done = 0
        while done < len(pixels) or not parts:
            chunk = pixels[done : done + self.frames_per_chunk]
            features = self._encoded(chunk)
            if features is None:
                self._halve(len(chunk))
            else:
                parts.append(features)
                done += len(chunk)
        return parts[0] if len(parts) == 1 else FrameFeatures.concatenate(parts)

    def decode(self, features: FrameFeatures) -> ClipPrediction:
        """Classes and mask embeddings of a clip, without its masks.

        Raises:
            OutOfMemoryError: memory does not suffice; a clip cannot be halved.
        """
        try:
            return self.model.decode_clip(features, output_masks=False)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"{self.reader.source}: out of memory while a clip of {len(features.mask_features)} frames is decoded; "
                "take smaller windows (--mode window, --window), --mode streamed, fewer frames (--frames) or smaller "
                "ones (--shortest-edge)"
            ) from error

    def encode_masks(self, mask_logits: Tensor) -> list[tuple[Rle | None, ...]]:
        """Masks of logits (N, F, h, w), at the video's size: for each of the N, one of each frame."""
        size = (self.reader.height, self.reader.width)
        resized, padded = self.processor.resized_size(*size), self.processor.padded_size(*size)
        N, F = mask_logits.shape[:2]
        logits = mask_logits.flatten(0, 1)[:, None]  # (N*F, 1, h, w)
        encoded: list[Rle | None] = []
        for part in chunks(len(logits), size[0] * size[1]):
            masks = resize_masks(logits[part], padded, resized, size) > 0
            encoded += [encode_mask(mask) for mask in masks[:, 0].cpu().numpy()]
        return [tuple(encoded[row * F : (row + 1) * F]) for row in range(N)]

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Tell how far it is."""
        if self.progress is not None:
            self.progress(stage, done, total)

    def _encoded(self, pixels: np.ndarray) -> FrameFeatures | None:
        """Features of frames at once; None where memory does not suffice. What had been made of them is free then."""
        try:
            return self.model.encode_frames(self.processor.process_frames(pixels).to(self.model.device))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(pixels) <= 1:
                raise OutOfMemoryError(
                    f"{self.reader.source}: out of memory with one frame at a time; take smaller frames "
                    "(--shortest-edge), bfloat16 (--dtype), or --mode window, which keeps fewer in memory"
                ) from error
        return None

    def _halve(self, tried: int) -> None:
        self.frames_per_chunk = max(1, tried // 2)
        _LOGGER.warning("out of memory with %d frames at a time; going on with %d", tried, self.frames_per_chunk)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what is free, but in pieces of other sizes

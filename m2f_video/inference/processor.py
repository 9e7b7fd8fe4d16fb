"""Video frames into model input, and the model's outputs back to the size of the video.

The arithmetic is that of the original Video Mask2Former (arXiv 2112.10764): 8-bit bilinear resize, normalisation, then
zero padding on the right and below. The padding is not masked anywhere in the model, so its amount matters. Checkpoints
of the image model (`fit="resize"`) are resized as transformers' processor does it with PIL; with torchvision it gives
pixels that differ by up to one of 255 levels.

Shape letters: B videos, T frames, H W size of the video, H' W' size of the model's input, Q queries, K classes.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from math import ceil
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, cast

import numpy as np
import torch
from torch import Tensor

from m2f_video.config import PreprocessingConfig, VideoMask2FormerConfig
from m2f_video.inference import postprocess, postprocess_image
from m2f_video.inference.segments import SegmentationOutputs, Size, Sizes, check_outputs, geometries
from m2f_video.video.arrays import ArrayVideo

if TYPE_CHECKING:
    from m2f_video.hub import ConfigSource, HubOptions

P = ParamSpec("P")
R = TypeVar("R")


def _as_method(function: Callable[P, R]) -> "Callable[Concatenate[VideoProcessor, P], R]":
    """A function of post-processing as a method, which knows `resized_sizes` and `labels` where they are not given."""
    signature = inspect.signature(function)

    @wraps(function)
    def method(self: "VideoProcessor", /, *args: P.args, **kwargs: P.kwargs) -> R:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        given["resized_sizes"] = self._resized_sizes(given["outputs"], given["target_sizes"], given["resized_sizes"])
        if "labels" in given and given["labels"] is None:
            given["labels"] = self.labels
        return cast("Callable[..., R]", function)(*call.args, **call.kwargs)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    vars(method)["__signature__"] = signature.replace(parameters=parameters)
    return method


class VideoProcessor:
    """Makes the model's input from videos and the final masks from its outputs.

    Its methods `post_process_*` are the functions of `postprocess` (videos) and `postprocess_image`, with the same
    arguments. Without `resized_sizes` they compute from `target_sizes`, which are then the original sizes, how much of
    the model's input is padding, and raise ValueError where such videos do not make this input; without `labels` they
    take the processor's.

    Args:
        config: how frames are resized, normalised and padded.
        labels: class names by class index.

    Raises:
        ValueError: labels is empty or one string.
    """

    def __init__(self, config: PreprocessingConfig, labels: Sequence[str]) -> None:
        if isinstance(labels, str) or len(labels) == 0:
            raise ValueError(f"labels must be a sequence of class names, got {labels!r}")
        self.config = config
        self.labels = tuple(labels)

    @classmethod
    def from_config(cls, config: VideoMask2FormerConfig) -> Self:
        """The processor that belongs to a model of this configuration."""
        return cls(config.preprocessing, config.labels)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        config: "ConfigSource | None" = None,
        **hub_options: "Unpack[HubOptions]",
    ) -> Self:
        """The processor of a published or saved model; the arguments are those of the model's `from_pretrained`."""
        from m2f_video.hub import load_config

        return cls.from_config(load_config(source, config=config, **hub_options))

    def __call__(self, videos: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Model input of one video or a batch of them: `model(**processor(video))`.

        Args:
            videos: one video as uint8 RGB (T, H, W, 3), array or tensor; one as a list of frames, each (H, W, 3) or an
                RGB PIL image; or a list of videos of the same number of frames. Videos of different sizes are padded
                to the largest.
            return_tensors: "pt"; there is no other kind.

        Returns:
            `pixel_values`, float32 (B, T, 3, H', W') on the CPU.

        Raises:
            ValueError: not uint8 RGB frames, nothing in it, or videos of different length.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt' (PyTorch tensors), got {return_tensors!r}")
        batch = _as_batch(videos)
        lengths = [len(video) for video in batch]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"videos of one batch must have the same number of frames, got {lengths}; cut or split them"
            )
        return {"pixel_values": self._pixel_values(batch)}

    def process_frames(self, frames: Any) -> Tensor:
        """Model input of some frames of a video: each frame's result depends on that frame alone.

        Args:
            frames: uint8 RGB (T, H, W, 3), array or tensor, or a list of frames.

        Returns:
            float32 (T, 3, H', W') on the CPU.

        Raises:
            ValueError: not uint8 RGB frames, or none.
        """
        return self._pixel_values([ArrayVideo(frames)])[0]

    def resized_size(self, height: int, width: int) -> Size:
        """(height, width) a frame of this size is resized to, before padding.

        Raises:
            ValueError: a side is not positive, or would be resized to nothing.
        """
        if min(height, width) < 1:
            raise ValueError(f"frames must have positive height and width, got {height} x {width}")
        config = self.config
        if config.fixed_size is not None:
            size = config.fixed_size
        elif config.fit == "pad":
            size = _original_size(height, width, config.shortest_edge, config.longest_edge)
        else:
            size = _transformers_size(height, width, config.shortest_edge, config.longest_edge)
        if min(size) < 1:
            raise ValueError(
                f"a frame of {height} x {width} is so elongated that it would be resized to {size[0]} x {size[1]}; "
                "crop it, or set fixed_size in the preprocessing config"
            )
        return self._round_up(size) if config.fit == "resize" else size

    def padded_size(self, height: int, width: int) -> Size:
        """(H', W') of the model's input for a single video of this size.

        Raises:
            ValueError: as `resized_size`.
        """
        return self._round_up(self.resized_size(height, width))

    post_process_video_instance_segmentation = _as_method(postprocess.post_process_video_instance_segmentation)
    post_process_video_semantic_segmentation = _as_method(postprocess.post_process_video_semantic_segmentation)
    post_process_video_panoptic_segmentation = _as_method(postprocess.post_process_video_panoptic_segmentation)
    post_process_instance_segmentation = _as_method(postprocess_image.post_process_instance_segmentation)
    post_process_semantic_segmentation = _as_method(postprocess_image.post_process_semantic_segmentation)
    post_process_panoptic_segmentation = _as_method(postprocess_image.post_process_panoptic_segmentation)

    def _resized_sizes(
        self, outputs: SegmentationOutputs, target_sizes: Sizes | None, resized_sizes: Sizes | None
    ) -> Sizes | None:
        """The given sizes, or those the videos of `target_sizes` were resized to when they became this input."""
        if resized_sizes is not None or target_sizes is None:
            return resized_sizes
        items = geometries(check_outputs(outputs)[1], target_sizes, None)
        actual, targets = items[0].padded, [item.target for item in items]
        sizes = [self.resized_size(*size) for size in targets]
        expected = self._batch_size(sizes)
        if actual == expected:
            return sizes
        if self.config.fit == "resize" and len(targets) == 1 and self._fills(targets[0], actual):
            return [actual]  # of an image that was resized alone, whatever its size was
        raise ValueError(
            f"target_sizes {target_sizes!r:.60} make a model input of {expected}, but these outputs are of one of "
            f"{actual}; if they are not the original sizes (or this is part of a batch), pass resized_sizes, the "
            "(height, width) of each item in the input before padding"
        )

    def _fills(self, size: Size, padded: Size) -> bool:
        """Whether an image fills the model's input, but for what rounding up adds, when it is scaled to fit."""
        scale = min(padded[0] / size[0], padded[1] / size[1])
        return all(whole - scale * side < self.config.size_divisor for whole, side in zip(padded, size, strict=True))

    def _round_up(self, size: Size) -> Size:
        divisor = self.config.size_divisor
        return ceil(size[0] / divisor) * divisor, ceil(size[1] / divisor) * divisor

    def _batch_size(self, resized_sizes: Sequence[Size]) -> Size:
        """(H', W') that holds every video of a batch."""
        heights, widths = zip(*resized_sizes, strict=True)
        return self._round_up((max(heights), max(widths)))

    def _pixel_values(self, videos: Sequence[ArrayVideo]) -> Tensor:
        """Videos of T frames each, resized and normalised into the top left of zeros (B, T, 3, H', W')."""
        from PIL import Image

        sizes = [self.resized_size(*video.size) for video in videos]
        pixel_values = torch.zeros(len(videos), len(videos[0]), 3, *self._batch_size(sizes))
        # in 0..255, as the original does: the same numbers to the last bit
        mean = torch.tensor([255 * value for value in self.config.image_mean]).view(3, 1, 1)
        std = torch.tensor([255 * value for value in self.config.image_std]).view(3, 1, 1)
        for video, (height, width), outs in zip(videos, sizes, pixel_values, strict=True):
            for frame, out in zip(video, outs, strict=True):
                # PIL, not torch: its antialiased uint8 resize is off by one in up to a quarter of the values
                image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (height, width, 3) -> (3, height, width)
                out[:, :height, :width] = (pixels - mean) / std
        return pixel_values


def _original_size(height: int, width: int, shortest: int, longest: int) -> Size:
    """Shorter side to `shortest`, or less where the longer would exceed `longest`; rounded half up."""
    scale = shortest / min(height, width)
    sides: tuple[float, float] = (shortest, scale * width) if height < width else (scale * height, shortest)
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = (sides[0] * scale, sides[1] * scale)
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def _transformers_size(height: int, width: int, shortest: int, longest: int) -> Size:
    """The size transformers resizes to, before rounding up: the longer side is cut to an integer, not rounded."""
    short, long = min(height, width), max(height, width)
    exact: float = shortest
    if long / short * shortest > longest:
        exact = longest * short / long
    edge = round(exact)
    if short == edge:
        return height, width
    other = int(exact * long / short)
    return (other, edge) if width < height else (edge, other)


def _as_batch(videos: Any) -> list[ArrayVideo]:
    """One video or a list of them as a list."""
    if isinstance(videos, str | os.PathLike):
        raise ValueError(f"{os.fspath(videos)!r:.100} is a path, the frames are needed: read_video(path) gives them")
    first = videos[0] if isinstance(videos, list | tuple) and videos else None
    is_list_of_videos = isinstance(first, list | tuple) or getattr(first, "ndim", 0) == 4
    return [ArrayVideo(video) for video in (videos if is_list_of_videos else [videos])]

"""Videos that are in memory already: arrays, tensors and lists of frames, checked one by one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from m2f_video.video.decode import VideoError, check_pixels


class ArrayVideo:
    """The frames of an array or tensor (T, H, W, 3), or of a sequence of arrays, tensors or PIL images.

    A frame is taken from the source each time it is asked for, without a copy where it is an array.

    Attributes:
        size: (H, W) of all frames.

    Raises:
        VideoError: it holds no frames, or others than uint8 RGB of one size.
    """

    def __init__(self, video: Any) -> None:
        if isinstance(video, torch.Tensor):
            video = video.detach().cpu().numpy()
        if not isinstance(video, np.ndarray | Sequence) or isinstance(video, str | bytes | bytearray):
            raise VideoError(
                "a video is a path, an array or a list of frames, an iterator of them or an open binary file, got "
                f"{type(video).__name__}"
            )
        if isinstance(video, np.ndarray) and video.ndim != 4:
            raise VideoError(
                f"a video array must be (T, H, W, 3), got shape {video.shape}; one frame needs a time axis, frame[None]"
            )
        self._video = video
        self.size = one_size((f"frame {index}", image.shape[:2]) for index, image in enumerate(self))

    def __len__(self) -> int:
        return len(self._video)

    def __getitem__(self, index: int) -> np.ndarray:
        return as_image(self._video[index], f"frame {index}")

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))


def one_size(sizes: Iterator[tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    """The size (H, W) that all frames have, each given with its name.

    Raises:
        VideoError: they differ, or there are none.
    """
    first, (height, width) = next(sizes, ("", (0, 0)))
    if not first:
        raise VideoError("the video holds no frames")
    for name, size in sizes:
        if size != (height, width):
            raise VideoError(
                f"{name} is {size[1]}x{size[0]} but {first} is {width}x{height}; all frames of a video must have one "
                "size"
            )
    return height, width


def as_image(frame: Any, name: str) -> np.ndarray:
    """A frame, array, tensor or PIL image, as uint8 (H, W, 3).

    Raises:
        VideoError: it is no such frame; the message names the remedy.
    """
    mode = getattr(frame, "mode", None)  # of a PIL image
    if isinstance(mode, str) and mode != "RGB":
        raise VideoError(f"{name} is a PIL image of mode {mode!r}, frames are RGB: call .convert('RGB') on it")
    image = frame.detach().cpu().numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
    if image.dtype.kind == "f":
        raise VideoError(
            f"{name} is {image.dtype}, frames are uint8 RGB: if they are in [0, 1], convert with "
            "(frames * 255).round().astype('uint8')"
        )
    if image.ndim == 3 and image.shape[0] == 3 != image.shape[2]:
        raise VideoError(
            f"{name} has shape {image.shape}, channels first, frames are (H, W, 3): move the channels last, "
            "video.permute(0, 2, 3, 1) for a tensor, video.transpose(0, 2, 3, 1) for an array"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise VideoError(f"{name} has shape {image.shape} and type {image.dtype}, frames are uint8 (H, W, 3)")
    check_pixels(name, *image.shape[:2])
    return image

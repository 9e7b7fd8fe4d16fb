"""Features of a video's frames, kept until the clip is decoded.

F frames, C channels, H W height and width of a map.
"""

from torch import Tensor

from m2f_video.modeling.video_mask2former import FrameFeatures


class FeatureBuffer:
    """Collects features of frames that come chunk by chunk, each at its final place, so that none is held twice.

    Args:
        capacity: frames to make room for. Room that stays empty costs no memory on a CPU; when more frames come, all
            are copied once to twice the room.

    Raises:
        ValueError: `capacity` is not positive.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be positive, got {capacity}")
        self._capacity = capacity
        self._count = 0
        self._tensors: list[Tensor] = []

    def append(self, features: FrameFeatures) -> None:
        """Add the features of the next frames; hidden states are not kept.

        Raises:
            ValueError: they differ in size from those before.
        """
        parts = (features.mask_features, *features.multi_scale)
        if not self._tensors:
            self._tensors = [self._room(part) for part in parts]
        sizes = [[tuple(tensor.shape[1:]) for tensor in tensors] for tensors in (self._tensors, parts)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"features of all frames must be of one size, got {sizes[0]} and then {sizes[1]}")
        stop = self._count + len(parts[0])
        if stop > self._capacity:
            self._capacity = max(2 * self._capacity, stop)
            for index, tensor in enumerate(self._tensors):
                self._tensors[index] = self._room(tensor)
                self._tensors[index][: self._count] = tensor[: self._count]
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor[self._count : stop] = part
        self._count = stop

    def features(self) -> FrameFeatures:
        """Of all frames so far, without a copy.

        Raises:
            ValueError: there are none.
        """
        if not self._tensors:
            raise ValueError("there are no frame features in the buffer")
        mask_features, *multi_scale = (tensor[: self._count] for tensor in self._tensors)
        return FrameFeatures(mask_features, tuple(multi_scale))

    def _room(self, like: Tensor) -> Tensor:
        """For features (F, C, H, W) in the memory order of `like`, in which the decoder reads each without a copy."""
        channels_last = like.stride(1) == 1
        shape = (self._capacity, *like.shape[1:])
        if not channels_last:
            return like.new_empty(shape)
        return like.new_empty(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)

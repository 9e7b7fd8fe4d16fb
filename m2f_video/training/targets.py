"""What a clip's predictions are trained towards.

n instances, T frames, H W size of a frame in pixels, K classes.
"""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

LabelSource = Literal["any_frame", "last_frame"]


@dataclass(frozen=True, eq=False)
class ClipTarget:
    """The instances of one clip. An instance is one target in all frames; where it is absent, its mask is empty.

    Attributes:
        labels: (n,) int64, class indices from 0; K stands for "no object".
        masks: (n, T, H, W), 0 or 1 (float masks: anything between, too), in the pixels of the model's input. A clip
            smaller than the batch it is padded to may keep its own, unpadded size.

    Raises:
        ValueError: shapes that do not fit together, another dtype, a negative label, or mask values outside [0, 1].
    """

    labels: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        """Check shapes, dtypes and values."""
        labels, masks = self.labels, self.masks
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(f"labels must be (n,) int64, got {tuple(labels.shape)} {labels.dtype}")
        if masks.ndim != 4 or masks.shape[0] != labels.shape[0] or 0 in masks.shape[1:]:
            raise ValueError(
                f"masks must be (n, T, H, W) with n = {labels.shape[0]}, as there are labels, got {tuple(masks.shape)}"
            )
        if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
            raise ValueError(f"masks must be bool, uint8 or floating point, got {masks.dtype}")
        if labels.numel() and labels.min() < 0:
            raise ValueError(f"labels must not be negative, got {int(labels.min())}")
        if masks.dtype != torch.bool and not ((masks >= 0) & (masks <= 1)).all():
            raise ValueError("masks have NaN or values outside [0, 1]; 255 for foreground must become 1")

    def to(self, device: torch.device | str) -> Self:
        """The same target on another device."""
        return type(self)(self.labels.to(device), self.masks.to(device))


def prepare_target(
    labels: Tensor,
    masks: Tensor,
    *,
    num_labels: int,
    label_source: LabelSource = "any_frame",
    present: Tensor | None = None,
) -> ClipTarget:
    """The target of a sampled clip, from the annotations of all of a video's instances.

    Instances that no sampled frame shows are dropped.

    Args:
        labels: (n,) int64, the instances' classes, 0 to K - 1.
        masks: (n, T, H, W) in the sampled frames, empty where an instance is absent.
        num_labels: K.
        label_source: `any_frame`: an instance seen in any frame has its class. `last_frame`: the original's
            behaviour, which reads classes from the last sampled frame and so trains an instance that is absent there
            as "no object" (class K), although its masks are still learned.
        present: bool (n, T), in which frames an instance is annotated, for `last_frame`: one whose mask augmentation
            has cropped away is annotated there still. None goes by the masks.

    Raises:
        ValueError: as `ClipTarget`, a label that is not below K, `present` of another shape, or an unknown
            `label_source`.
    """
    if label_source not in get_args(LabelSource):
        raise ValueError(f"label_source must be one of {get_args(LabelSource)}, got {label_source!r}")
    ClipTarget(labels, masks)  # checks them
    if labels.numel() and labels.max() >= num_labels:
        raise ValueError(f"labels must be below num_labels={num_labels}, got {int(labels.max())}")
    seen = masks.bool().flatten(2).any(-1)  # (n, T)
    if present is None:
        present = seen
    if present.shape != seen.shape or present.dtype != torch.bool:
        raise ValueError(f"present must be bool {tuple(seen.shape)}, got {present.dtype} {tuple(present.shape)}")
    if label_source == "last_frame":
        labels = torch.where(present[:, -1], labels, num_labels)
    visible = seen.any(1)
    return ClipTarget(labels[visible], masks[visible])

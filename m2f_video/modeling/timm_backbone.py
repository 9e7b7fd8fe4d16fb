"""Any timm feature extractor as the backbone."""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from m2f_video.config import ConfigError

STRIDES = (4, 8, 16, 32)
_FAULTS = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError)  # by which timm's families say no


class TimmBackbone(nn.Module):
    """A timm model's maps at strides 4, 8, 16 and 32.

    In training mode batch norms use the statistics of the batch, and learn; the original's ResNets keep theirs as they
    were pretrained. In evaluation mode the two are the same function.

    Args:
        name: timm model name; it is built with random weights.

    Raises:
        ConfigError: timm does not know the name, or the model does not give these maps for frames of any size.
    """

    def __init__(self, *, name: str) -> None:
        import timm

        super().__init__()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists the names"
            raise ConfigError(f"timm has no model {name!r}{hint}")
        self.model = _build(name)
        indices = [self.model.feature_info.reduction().index(stride) for stride in STRIDES]
        self.channels = tuple(self.model.feature_info.channels()[index] for index in indices)
        self._indices = tuple(indices)
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Frames (B, 3, height, width), normalised -> maps (B, C_i, H_i, W_i), fine to coarse."""
        frames = frames.contiguous(memory_format=torch.channels_last)  # in which convolutions are fastest
        maps = self.model(frames)
        levels = (maps[index] for index in self._indices)
        return tuple(level.permute(0, 3, 1, 2) if self._channels_last else level for level in levels)


def _build(name: str) -> Any:
    """The feature extractor, told to take any size where it has to be told."""
    import timm

    try:
        return _checked(timm.create_model(name, features_only=True))
    except _FAULTS as error:
        try:
            return _checked(timm.create_model(name, features_only=True, strict_img_size=False))
        except _FAULTS:
            raise ConfigError(
                f"timm model {name!r} does not give features at strides {STRIDES} for frames of any size: {error}"
            ) from error


@torch.no_grad()
def _checked(model: Any) -> Any:
    """Run a model once, on a size that none was trained at, so that it fails when built and not in use."""
    reductions = model.feature_info.reduction()
    if missing := [stride for stride in STRIDES if stride not in reductions]:
        raise ValueError(f"it has strides {reductions}, not {missing}")
    model.eval()(torch.zeros(1, 3, 64, 96))
    return model.train()

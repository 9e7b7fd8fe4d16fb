"""Any timm feature extractor as the backbone."""

import difflib

from torch import Tensor, nn

from m2f_video.config import ConfigError

STRIDES = (4, 8, 16, 32)


class TimmBackbone(nn.Module):
    """A timm model's maps at strides 4, 8, 16 and 32.

    Args:
        name: timm model name; it is built with random weights.

    Raises:
        ConfigError: timm does not know the name, or the model has no maps at these strides.
    """

    def __init__(self, *, name: str) -> None:
        import timm

        super().__init__()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists the names"
            raise ConfigError(f"timm has no model {name!r}{hint}")
        try:
            reductions = timm.create_model(name, features_only=True).feature_info.reduction()
            indices = tuple(reductions.index(stride) for stride in STRIDES)
        except (RuntimeError, AttributeError, ValueError) as error:  # timm's, and a stride that is missing
            raise ConfigError(f"timm model {name!r} does not offer features at strides {STRIDES}: {error}") from error
        self.model = timm.create_model(name, features_only=True, out_indices=indices)
        self.channels = tuple(self.model.feature_info.channels())
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Frames (B, 3, height, width), normalised -> maps (B, C_i, H_i, W_i), fine to coarse."""
        maps = self.model(frames)
        return tuple(level.permute(0, 3, 1, 2) if self._channels_last else level for level in maps)

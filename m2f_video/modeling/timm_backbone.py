"""Any timm feature extractor as the backbone."""

import difflib
from functools import partial
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
        name: timm model name, which may have the tag of pretrained weights; it is built with random ones.

    Raises:
        ConfigError: timm does not know the name or its tag, or the model does not give these maps for frames of any
            size.
    """

    def __init__(self, *, name: str) -> None:
        import timm

        super().__init__()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists the names"
            raise ConfigError(f"timm has no model {name!r}{hint}")
        if "." in name and name not in (tagged := timm.list_pretrained(f"{name.split('.')[0]}.*")):
            known = f"its tags: {', '.join(tagged)}" if tagged else "it has none"
            raise ConfigError(f"timm has no pretrained weights {name!r}; {known:.200}")
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


def pretrained_weights(name: str, *, features_only: bool) -> dict[str, Tensor]:
    """The weights that timm knows for a name with or without a tag, such as `resnet50.a1_in1k`, downloaded if need be.

    Args:
        name: of the weights.
        features_only: those that a `TimmBackbone` holds, under its names; otherwise the whole classifier.

    Raises:
        ConfigError: timm knows no such weights.
        FileNotFoundError: they are not in the hub's cache, and the hub was not reached.
    """
    import timm
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the client library's

    if not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f"{name.split('.')[0]}.*") or timm.list_pretrained()
        close = difflib.get_close_matches(name, known, n=3, cutoff=0) or known[:3]
        raise ConfigError(f"timm has no pretrained weights {name!r:.60}; did you mean {', '.join(close)}?")
    try:
        model = _build(name, pretrained=True) if features_only else timm.create_model(name, pretrained=True)
    except (OSError, HTTPError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"the pretrained weights {name} of timm cannot be fetched: {reason:.120}") from error
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def _build(name: str, pretrained: bool = False) -> Any:
    """The feature extractor, told to take any size where it has to be told."""
    import timm

    create = partial(timm.create_model, name, features_only=True, pretrained=pretrained)
    try:
        return _checked(create())
    except _FAULTS as error:
        try:
            return _checked(create(strict_img_size=False))
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

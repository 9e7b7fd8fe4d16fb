"""Weights to begin a training with: of a checkpoint whose classes may be others, of a backbone alone, or what fits."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from m2f_video.backbone_weights import load_backbone
from m2f_video.config import ConfigError
from m2f_video.hub import in_words, load_checkpoint, load_state_dict_strictly, other_function
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.partial_loading import load_partially


@dataclass(frozen=True)
class InitialWeights:
    """What a run begins with; random weights where there is no source.

    Attributes:
        init: checkpoint.
        backbone: source of a backbone alone.
        partial: whether what fits is enough.

    Raises:
        ValueError: both sources, or none and `partial`.
    """

    init: str | None = None
    backbone: str | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if self.init is not None and self.backbone is not None:
            raise ValueError("give init or init_backbone, not both: the first brings a backbone along")
        if self.partial and self.source is None:
            raise ValueError("init_partial loads what fits of weights; give them by init or init_backbone")

    @property
    def source(self) -> str | None:
        """Where they are from."""
        return self.backbone if self.init is None else self.init

    def load(self, model: VideoMask2Former) -> list[str]:
        """Load them into a model; gives what there is to say."""
        if self.backbone is not None:
            return [str(load_backbone(model, self.backbone, partial=self.partial))]
        if self.init is None:
            return []
        if self.partial:
            return [str(load_partially(model, self.init))]
        if load_initial_weights(model, self.init):
            return []
        return [f"{self.init} knows other classes: the classifier begins with random weights"]


def load_initial_weights(model: VideoMask2Former, source: str) -> bool:
    """Load a checkpoint's weights into a model; a classifier of other labels keeps the weights it has.

    Warns where the checkpoint was made for another temporal mode or other frames, as one of an image model is.

    Returns:
        Whether the classifier was loaded too.

    Raises:
        ConfigError: its weights would compute something else in this model, as with other numbers of heads.
        weights_convert.ConversionError: other weights are missing, left over, or of other shapes.
        FileNotFoundError: no such checkpoint.
    """
    path = Path(source)
    bare = path.is_file() and not (path.parent / "config.json").exists()  # and so taken to be of this model
    config, weights = load_checkpoint(source, config=model.config if bare else None)
    head = {name: own for name, own in model.state_dict().items() if name.startswith("transformer_decoder.class_head.")}
    fits = all(name not in weights or weights[name].shape == own.shape for name, own in head.items())
    knows_classes = config.labels == model.config.labels and fits  # a bare file says how many by its shapes alone
    changed = other_function(config, model.config)
    asked = {name: both for name, both in changed.items() if name == "temporal" or name.startswith("preprocessing.")}
    if other := {name: both for name, both in changed.items() if name not in asked and name != "labels"}:
        raise ConfigError(
            f"{source:.80} would compute something else here than what it was trained for: {in_words(other)}; train "
            "with its own config, or load what fits by --init-partial"
        )
    load_state_dict_strictly(model, weights if knows_classes else weights | head, source)
    if asked:
        warnings.warn(f"{source:.80} was trained for other frames: {in_words(asked)}", stacklevel=5)
    return knows_classes

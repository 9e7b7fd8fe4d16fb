"""Weights of a checkpoint to begin a training with, whose classes may be others."""

import warnings
from pathlib import Path

from m2f_video.config import ConfigError
from m2f_video.hub import in_words, load_checkpoint, load_state_dict_strictly, other_function
from m2f_video.modeling.video_mask2former import VideoMask2Former


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
        warnings.warn(f"{source:.80} was trained for other frames: {in_words(asked)}", stacklevel=4)
    return knows_classes

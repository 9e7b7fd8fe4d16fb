"""Weights of a backbone alone, for a model to begin with: from a file, a hub, or timm."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m2f_video.config import ConfigError, TimmBackboneConfig
from m2f_video.hub import config_beside, first_misfit, in_words, warn_of_other_function, weights_path
from m2f_video.loading_report import LoadingReport, Weight
from m2f_video.partial_loading import load_what_fits
from weights_convert import ConversionError, import_state_dict, naming, read_state_dict

if TYPE_CHECKING:
    from m2f_video.modeling.video_mask2former import VideoMask2Former

_OF_BACKBONE = ("backbone.", "preprocessing.image_")  # fields of a config that a backbone's weights depend on


def load_backbone(model: "VideoMask2Former", source: str | os.PathLike[str], *, partial: bool = False) -> LoadingReport:
    """Load the weights of a backbone into a model; all others stay as they are.

    Warns where the model normalises frames otherwise than those that the weights were trained on, as timm or a config
    beside them says, or where that config tells of another backbone.

    Args:
        model: changed in place, or not at all where the weights do not fit.
        source: a file, folder or hub name with a backbone alone (converted, or under the names of timm, torchvision,
            detectron2 or Swin's authors), or with a whole model, of which the backbone is taken; or `timm:NAME`, the
            pretrained weights of timm, as `timm:resnet50.a1_in1k`; or `timm`, those that timm takes by default for a
            timm backbone.
        partial: load what fits, as `load_partially`.

    Returns:
        What was loaded and what was not. Swin's output norms, which no classifier has, may stay as they were; all
        other weights of the backbone must be there, unless `partial`.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be fetched.
        ConfigError: timm knows no such weights, or they are of another model than the backbone.
        weights_convert.ConversionError: the file cannot be read, or what it holds does not fit the backbone.
    """
    name = str(source)
    expected = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("backbone.")}
    timm_name = model.config.backbone.name if isinstance(model.config.backbone, TimmBackboneConfig) else None
    kind, _, tag = name.partition(":")
    if kind == "timm" and not Path(source).exists():
        tag = tag or timm_name or ""
        state_dict, path = _pretrained(name, tag, timm_name), None
    else:
        path = weights_path(source, {})
        state_dict, tag = read_state_dict(path), name.removeprefix("timm/") if name.startswith("timm/") else ""
    weights, left_out = _backbone_weights(state_dict, name, timm_name, expected)
    counts = [key for key in expected if key.endswith(".num_batches_tracked") and key not in weights]
    weights |= {key: torch.zeros_like(expected[key]) for key in counts}  # old files lack them; nothing depends on them
    needed = {key: t for key, t in expected.items() if key in weights or not key.startswith("backbone.out_norms.")}
    if not partial and (misfit := first_misfit(needed, weights)):
        raise ConversionError(
            f"the weights of {name:.100} do not fit the model's backbone: {misfit}; give weights of its kind and sizes"
        )
    report = load_what_fits(model, weights, name, prefix="backbone.")
    if changed := _other_normalisation(tag, model):
        warnings.warn(f"the backbone of {name:.80} was trained on other frames: {in_words(changed)}", stacklevel=2)
    elif path and not tag:
        warn_of_other_function(config_beside(path), model.config, name, of=_OF_BACKBONE, stacklevel=3)
    rest = tuple(Weight(group, "ignored", 0, count=count) for group, count in left_out.items())
    return replace(report, source=f"backbone of {name}", weights=report.weights + rest)


def _pretrained(source: str, tag: str, timm_name: str | None) -> dict[str, Tensor]:
    """The weights that timm has under a tag, for a model whose backbone is timm's `timm_name` or of another kind."""
    from m2f_video.modeling.timm_backbone import pretrained_weights

    if not tag:
        raise ConfigError("the backbone is not timm's; name weights, such as timm:swin_tiny_patch4_window7_224")
    if timm_name and tag.split(".")[0] != timm_name.split(".")[0]:
        raise ConfigError(f"{source:.80} is of another model than the backbone, timm's {timm_name}")
    return pretrained_weights(tag, features_only=timm_name is not None)


def _other_normalisation(tag: str, model: "VideoMask2Former") -> dict[str, tuple[Any, Any]]:
    """Mean and deviation of the frames that timm's weights of a tag were trained on and the model's, where they differ.

    Nothing where timm has no weights under it.
    """
    import timm

    own = timm.get_pretrained_cfg(tag) if tag and timm.is_model_pretrained(tag) else None
    if own is None:
        return {}
    used = model.config.preprocessing
    both = {"image_mean": (own.mean, used.image_mean), "image_std": (own.std, used.image_std)}
    return {f"preprocessing.{name}": pair for name, pair in both.items() if tuple(pair[0]) != pair[1]}


def _backbone_weights(
    state_dict: dict[str, Tensor], source: str, timm_name: str | None, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The backbone's weights in a state dict, by native key, and how many others are there, by group."""
    if timm_name:  # whose extractors have underscores where its classifiers have dots
        own = {key.removeprefix("backbone.model.").replace(".", "_"): key for key in expected}
        parts = tuple({f"{key.split('.')[2]}_" for key in expected})  # more of them are of a deeper backbone
        spelled = {key: key.replace(".", "_") for key in state_dict}
        if any(name in own for name in spelled.values()):
            weights = {
                own.get(name, f"backbone.model.{key}"): state_dict[key]
                for key, name in spelled.items()
                if name in own or name.startswith(parts)
            }
            return weights, dict(Counter(k.split(".")[0] for k, name in spelled.items() if not name.startswith(parts)))
    with naming(source):
        translation = import_state_dict(state_dict)
    weights = {key: tensor for key, tensor in translation.state_dict.items() if key.startswith("backbone.")}
    rest = Counter(key.split(".")[0] for key in translation.state_dict if key not in weights)
    return weights, dict(rest + translation.ignored)

"""The model of a run: one that the caller has built, and the moving average of its weights.

The average is tensors, not a second model: what is evaluated and saved is the trained model itself, holding them for as
long as that takes, with all hooks and patches that it has by then.
"""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2f_video.checked_config import shown
from m2f_video.config import TRAINING_PARTS, ConfigError, VideoMask2FormerConfig
from m2f_video.modeling.as_built import recorded_config, tensors_of
from m2f_video.modeling.build import require_parts
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer
from m2f_video.modeling.swin import SwinBlock
from m2f_video.modeling.transformer_decoder import DecoderLayer
from m2f_video.modeling.video_mask2former import VideoMask2Former


def config_of(
    model: VideoMask2Former, config: VideoMask2FormerConfig, labels: tuple[str, ...]
) -> VideoMask2FormerConfig:
    """The config of a model that a run is given, modules that were put into it included.

    Args:
        model: built by the caller.
        config: of the run. A default one says nothing; any other has to be the model's, but for its labels.
        labels: of the data.

    Raises:
        TypeError: it is no such model.
        ConfigError: the run's config is of another model, the model has other labels than the data, or its loss or
            matcher is missing.
        ValueError: no weight learns or one is in half precision; or its state dict does not give back what it was.
    """
    if not isinstance(model, VideoMask2Former):
        raise TypeError(f"model must be a VideoMask2Former, got {type(model).__name__}")
    own = recorded_config(model)
    require_parts(own, model.training_parts, TRAINING_PARTS)
    if config != VideoMask2FormerConfig():
        differences = model.config.differences(config.replace(labels=own.labels, parts=model.config.parts))
        for name, (has, asked) in differences.items():
            raise ConfigError(
                f"the model given has {name} {shown(has)}, the training config {shown(asked)}; give "
                "config.replace(model=model.config)"
            )
    if own.labels != labels:
        wrong = next((pair for pair in zip(own.labels, labels, strict=False) if pair[0] != pair[1]), None)
        count = f"{len(own.labels)} of them, not {len(labels)}"
        said = f"{shown(wrong[0])} where they have {shown(wrong[1])}" if wrong else count
        raise ConfigError(
            f"the labels of the model given are not those of the data, in their order: {said}; build it with "
            "config.replace(labels=tuple(videos.labels))"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no weight of the model given learns, as after prepare_for_inference; call requires_grad_()")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no numbers; build the model on another")
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {parameter.dtype}; train model.float(), with the precision of the config")
    _check_round_trip(model)
    return own


def _check_round_trip(model: nn.Module) -> None:
    """Make sure that the state dict, which is what is saved, averaged and resumed from, is the model's state."""
    before = copied(tensors_of(model))
    try:
        model.load_state_dict(before)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the model's state dict does not load into the model itself: {reason:.200}") from error
    for name, tensor in tensors_of(model).items():
        if name not in before or not torch.allclose(tensor, before[name], rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"{name} is another once the model has loaded its own state dict; look at its hooks")


def check_unchanged(
    model: VideoMask2Former, config: VideoMask2FormerConfig, optimizer: torch.optim.Optimizer, names: Set[str]
) -> None:
    """Make sure that a model has the modules and weights with which its run was made, hooks and patches aside.

    Others would not be trained, averaged or resumed.

    Args:
        model: as it is now.
        config: of the run.
        optimizer: of the run.
        names: of the state dict, when the run was made.

    Raises:
        ValueError: it has others; the message names one.
    """
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    other = {name for name, weight in model.named_parameters() if weight.requires_grad and weight not in known}
    other |= names ^ model.state_dict().keys()
    other |= config.differences(recorded_config(model)).keys()
    if other:
        raise ValueError(
            f"the model is another than when the Trainer was made ({min(other)}); change it before, and give it to the "
            "Trainer by model="
        )


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict: tensors that do not change with the model."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let a model have other weights, unless these are None, and evaluation mode; it is as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    own = None if weights is None else copied(model.state_dict())
    try:
        if weights is not None:
            model.load_state_dict(weights)
        model.eval()
        yield
    finally:
        if own is not None:
            model.load_state_dict(own)
        for module, training in modes.items():
            module.training = training


@contextmanager
def recompute_activations(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let each Swin block, encoder layer and decoder layer compute its activations again in the backward pass.

    Put the forward pass alone into the `with` block. Backbones of timm, and layers of one's own that are none of these,
    keep theirs.

    Args:
        model: whose layers are called; a wrapper of it, as by `DistributedDataParallel`, does as well.
        wanted: False changes nothing.
    """
    kinds = (SwinBlock, DeformableEncoderLayer, DecoderLayer)
    layers = [module for module in model.modules() if wanted and isinstance(module, kinds)]
    patched = {module: module.__dict__.get("forward") for module in layers}
    try:
        for module in patched:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
        yield
    finally:
        for module, own in patched.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own

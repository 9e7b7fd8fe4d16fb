"""From a config to modules: the one place that sees both. Each value of a field is one class, named here.

Modules of your own (`parts`) are called with the keyword arguments of the class in whose place they stand, or, by the
name of a single module, with that module.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from m2f_video.config import PARTS, TRAINING_PARTS, WHOLE_MODEL, ConfigError, SwinConfig, VideoMask2FormerConfig
from m2f_video.modeling.cross_attention import (
    CrossAttention,
    FullCrossAttention,
    MaskPooling,
    SpatiallyModulatedCrossAttention,
)
from m2f_video.modeling.feature_pyramids import (
    AlignedFeaturePyramid,
    BackboneProjections,
    BidirectionalFeaturePyramid,
    FeaturePyramid,
    SemanticFeaturePyramid,
)
from m2f_video.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from m2f_video.modeling.position_encoding import NoPosition, SinePosition2D, SinePosition3D
from m2f_video.modeling.swin import SwinTransformer
from m2f_video.modeling.timm_backbone import TimmBackbone
from m2f_video.modeling.transformer_decoder import DecoderLayer, MaskedTransformerDecoder, SelfFirstDecoderLayer

Parts = Mapping[str, Callable[..., Any]]
"""What makes modules, loss or matcher of your own, by the names of `config.PARTS`; or by that of a module in the model,
in whose place comes what it makes of the one that is there."""

PIXEL_DECODERS: dict[str, type[nn.Module]] = {
    "ms_deform_attn": MSDeformAttnPixelDecoder,
    "fpn": FeaturePyramid,
    "semantic_fpn": SemanticFeaturePyramid,
    "bifpn": BidirectionalFeaturePyramid,
    "fapn": AlignedFeaturePyramid,
    "none": BackboneProjections,
}
CROSS_ATTENTIONS: dict[str, type[nn.Module]] = {
    "masked": CrossAttention,
    "full": FullCrossAttention,
    "mask_pooling": MaskPooling,
    "smca": SpatiallyModulatedCrossAttention,
}
LAYER_ORDERS: dict[str, type[nn.Module]] = {"cross_first": DecoderLayer, "self_first": SelfFirstDecoderLayer}
POSITIONS: dict[str, type[nn.Module]] = {"sine_3d": SinePosition3D, "sine_2d": SinePosition2D, "none": NoPosition}


def with_parts(config: VideoMask2FormerConfig, parts: Parts, is_subclass: bool = False) -> VideoMask2FormerConfig:
    """A config that records these parts; the record of a loss or matcher stays where they are not given.

    Args:
        config: of the model.
        parts: that it is built with.
        is_subclass: it is of a class of your own.

    Raises:
        ConfigError: one that is no name of a part, or no callable; or the config is of a model with others, which are
            not given, or of a subclass.
    """
    if not isinstance(parts, Mapping):
        raise ConfigError(f"parts must be a dict of modules of your own by name, got {parts!r:.60}")
    for name, make in parts.items():
        if not callable(make) or isinstance(make, nn.Module):
            raise ConfigError(f"parts[{name!r:.40}] must be a class or function that makes a module, got {make!r:.60}")
    if WHOLE_MODEL in config.parts and not is_subclass:
        raise ConfigError(
            f"the model is a {config.parts[WHOLE_MODEL]:.100}; load it by from_pretrained of that class, and train it "
            "by Trainer(..., model=model)"
        )
    require_parts(config, parts, [name for name in config.parts if name not in (*TRAINING_PARTS, WHOLE_MODEL)])
    given = {name: qualified_name(make) for name, make in parts.items()}
    for name, what in config.parts.items():
        if given.get(name, what) != what:
            said = f"{name} was a {what:.100} when the model was built first, now {given[name]:.100}"
            warnings.warn(said, stacklevel=3)
    return config.replace(parts={**config.parts, **given})


def require_parts(config: VideoMask2FormerConfig, parts: Parts, needed: Iterable[str]) -> None:
    """Make sure that of these names all parts are given that a config records.

    Raises:
        ConfigError: some are not.
    """
    if missing := [name for name in needed if name in config.parts and name not in parts]:
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        called = ", ".join(f"{name} of its own ({config.parts[name]:.100})" for name in missing[:2])
        wanted = ", ".join(f"{name!r}: ..." for name in missing[:2])
        raise ConfigError(f"the model has {called}{more}; give parts={{{wanted}}}{more}")


def qualified_name(make: Callable[..., Any]) -> str:
    """Where a class or function is written, and its name there."""
    while isinstance(make, partial):
        make = make.func
    named = make if hasattr(make, "__qualname__") else type(make)
    return f"{named.__module__}.{named.__qualname__}"


def build_backbone(config: VideoMask2FormerConfig, parts: Parts) -> Any:
    """The frame encoder."""
    kind = SwinTransformer if isinstance(config.backbone, SwinConfig) else TimmBackbone
    backbone = _maker("backbone", kind, parts)(**asdict(config.backbone))
    channels = getattr(backbone, "channels", None)
    if not isinstance(channels, Sequence) or len(channels) != 4:
        raise ConfigError(f"a backbone has channels, of its maps at strides 4, 8, 16, 32; yours has {channels!r:.60}")
    return backbone


def build_pixel_decoder(config: VideoMask2FormerConfig, parts: Parts, in_channels: tuple[int, ...]) -> Any:
    """Of maps with these channels at strides 4, 8, 16, 32."""
    make = _maker("pixel_decoder", PIXEL_DECODERS[config.pixel_decoder.kind], parts)
    return make(in_channels=in_channels, **config.pixel_decoder.arguments())


def build_transformer_decoder(config: VideoMask2FormerConfig, parts: Parts) -> MaskedTransformerDecoder:
    """Of what the pixel decoder gives."""
    fields: dict[str, Any] = asdict(config.transformer_decoder)
    chosen: dict[str, Any] = {
        "cross_attention": CROSS_ATTENTIONS[fields.pop("cross_attention")],
        "decoder_layer": LAYER_ORDERS[fields.pop("layer_order")],
        "position_encoding": POSITIONS[fields.pop("temporal_position")],
    }
    return MaskedTransformerDecoder(
        in_channels=config.pixel_decoder.hidden_dim,
        mask_dim=config.pixel_decoder.mask_dim,
        num_labels=config.num_labels,
        **fields,
        **{name: _maker(name, kind, parts) for name, kind in chosen.items()},
    )


def _maker(name: str, ours: type[nn.Module], parts: Parts) -> Any:
    """What makes a module: our class, or a part of your own, of which it is seen that it does."""
    if name not in parts:
        return ours

    def make(**arguments: Any) -> nn.Module:
        try:
            inspect.signature(parts[name]).bind(**arguments)
        except TypeError as error:
            taken = ", ".join(arguments)
            raise ConfigError(f"parts[{name!r}] must make a {name} from {taken}: {error}") from error
        made = parts[name](**arguments)
        if not isinstance(made, nn.Module):
            raise ConfigError(f"parts[{name!r}] must make a torch.nn.Module, got {made!r:.60}")
        return made

    return make


def exchange_modules(model: nn.Module, parts: Parts) -> None:
    """Put what parts named after a module make of it in its place.

    Raises:
        ConfigError: there is no such module, or what is made is none.
    """
    for name in sorted(set(parts) - set(PARTS)):  # a module before those in it, which it may exchange
        try:
            plain = model.get_submodule(name)
        except AttributeError as error:
            raise ConfigError(f"parts has {name!r:.80}, and the model no module of that name: {error}") from error
        made = parts[name](plain)
        if not isinstance(made, nn.Module):
            raise ConfigError(f"parts[{name!r:.80}] must make a module of the one that is there, got {made!r:.60}")
        model.set_submodule(name, made)

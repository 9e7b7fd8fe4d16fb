"""Model configuration: nested frozen dataclasses, presets for the published checkpoints, JSON both ways.

The defaults are the published Video Mask2Former with a Swin-tiny backbone (arXiv 2112.10764; architecture of
arXiv 2112.01527, section 3). Every field changes what is built or computed; nothing else configures the model.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from m2f_video.categories import LABEL_SETS, YOUTUBEVIS_2019

__all__ = [
    "PRESETS",
    "CheckedConfig",
    "ConfigError",
    "PixelDecoderConfig",
    "PreprocessingConfig",
    "SwinConfig",
    "TimmBackboneConfig",
    "TransformerDecoderConfig",
    "VideoMask2FormerConfig",
    "build_config",
]

MODEL_TYPE = "m2f-video"
FORMAT_VERSION = 1
GROUP_NORM_GROUPS = 32  # fixed in the published architecture, so hidden widths must be divisible by it


class ConfigError(ValueError):
    """A configuration value that no model can be built from; the message names the field and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} must be positive, got {value}")


class CheckedConfig:
    """Checks the type of every field of a config, and makes lists tuples, before the config checks their values."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            path = f"{type(self).__name__}.{item.name}"
            object.__setattr__(self, item.name, _convert(hints[item.name], getattr(self, item.name), path))
        self._check()

    def _check(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SwinConfig(CheckedConfig):
    """Swin transformer (arXiv 2103.14030), as Mask2Former uses it: four stages, every stage's output normalised."""

    embed_dim: int = 96
    """Channels of the first stage; each later stage doubles them."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks per stage."""
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    """Attention heads per stage."""
    window_size: int = 7
    """Side of the attention windows, in tokens."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over its input width."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    drop_path_rate: float = 0.3
    """Stochastic depth of the last block; it rises linearly from 0. Acts in training only."""

    def _check(self) -> None:
        _require_positive(self, "embed_dim", "window_size", "mlp_ratio")
        _require(
            len(self.depths) == len(self.num_heads) == 4,
            f"SwinConfig needs four stages, got depths={self.depths} and num_heads={self.num_heads}",
        )
        _require(
            int(self.embed_dim * self.mlp_ratio) > 0,
            f"SwinConfig.mlp_ratio={self.mlp_ratio} leaves the MLP of the first stage no channels",
        )
        _require(min(self.depths) > 0, f"SwinConfig.depths must be positive, got {self.depths}")
        for stage, heads in enumerate(self.num_heads):
            channels = self.embed_dim * 2**stage
            _require(
                heads > 0 and channels % heads == 0,
                f"SwinConfig.num_heads[{stage}]={heads} does not divide the {channels} channels of that stage",
            )
        _require(
            0 <= self.drop_path_rate < 1,
            f"SwinConfig.drop_path_rate must be in [0, 1), got {self.drop_path_rate}",
        )


@dataclass(frozen=True, kw_only=True)
class TimmBackboneConfig(CheckedConfig):
    """Any timm model that offers `features_only` maps at strides 4, 8, 16 and 32, by name."""

    name: str
    """The timm model name, such as `resnet50` or `convnext_tiny`."""

    def _check(self) -> None:  # whether timm knows the name is checked when the model is built
        _require(bool(self.name), "TimmBackboneConfig.name is empty; give a timm model name such as 'resnet50'")


BackboneConfig = SwinConfig | TimmBackboneConfig
_BACKBONE_TYPES: dict[str, type[SwinConfig] | type[TimmBackboneConfig]] = {
    "swin": SwinConfig,
    "timm": TimmBackboneConfig,
}


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig(CheckedConfig):
    """Multi-scale deformable-attention pixel decoder (arXiv 2112.01527, section 3.2.2; arXiv 2010.04159)."""

    hidden_dim: int = 256
    """Width of the encoder tokens and of the multi-scale features."""
    mask_dim: int = 256
    """Channels of the mask features, and of the mask embeddings multiplied with them."""
    num_layers: int = 6
    """Deformable encoder layers."""
    ffn_dim: int = 1024
    """Hidden width of each encoder layer's feed-forward network."""
    num_heads: int = 8
    """Heads of the deformable attention."""
    num_points: int = 4
    """Sampling points per head and level."""
    dropout: float = 0.0
    """Dropout after the attention and inside the feed-forward network. Acts in training only."""

    def _check(self) -> None:
        _require_positive(self, "hidden_dim", "mask_dim", "num_layers", "ffn_dim", "num_heads", "num_points")
        for divisor, why in ((GROUP_NORM_GROUPS, "the groups of its norms"), (self.num_heads, "num_heads")):
            _require(
                self.hidden_dim % divisor == 0,
                f"PixelDecoderConfig.hidden_dim={self.hidden_dim} is not divisible by {divisor} ({why})",
            )
        _require(0 <= self.dropout < 1, f"PixelDecoderConfig.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig(CheckedConfig):
    """Masked-attention transformer decoder (arXiv 2112.01527, section 3.2.1)."""

    hidden_dim: int = 256
    """Width of the queries. Where it differs from the pixel decoder's, a 1x1 convolution adapts each level."""
    num_queries: int = 100
    """Number of learnable queries: the most objects one clip can have."""
    num_layers: int = 9
    """Decoder layers; layer i attends to level i mod 3 (strides 32, 16, 8)."""
    num_heads: int = 8
    """Heads of cross- and self-attention."""
    ffn_dim: int = 2048
    """Hidden width of each layer's feed-forward network."""

    def _check(self) -> None:
        _require_positive(self, "hidden_dim", "num_queries", "num_layers", "num_heads", "ffn_dim")
        for divisor, why in (
            (4, "sine positions have y and x halves of sine and cosine"),
            (self.num_heads, "num_heads"),
        ):
            _require(
                self.hidden_dim % divisor == 0,
                f"TransformerDecoderConfig.hidden_dim={self.hidden_dim} is not divisible by {divisor} ({why})",
            )


@dataclass(frozen=True, kw_only=True)
class PreprocessingConfig(CheckedConfig):
    """How frames become model input: resize, normalise, fit to a multiple of `size_divisor`."""

    shortest_edge: int = 480
    """Shorter side after resizing, in pixels (the original: 360 with ResNet, 480 with Swin)."""
    longest_edge: int = 1333
    """Upper bound of the longer side after resizing, in pixels."""
    fixed_size: tuple[int, int] | None = None
    """(height, width) to resize every frame to, whatever its aspect; None resizes by the two edges above."""
    size_divisor: int = 32
    """Both sides of the model's input are multiples of this."""
    fit: Literal["pad", "resize"] = "pad"
    """`pad` keeps the aspect and adds zeros right and below (the original); `resize` rounds the resized size up to
    the multiple instead, which changes the aspect (the transformers image processor)."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per RGB channel, for pixels in [0, 1]."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per RGB channel, for pixels in [0, 1]."""

    def _check(self) -> None:
        _require_positive(self, "shortest_edge", "longest_edge", "size_divisor")
        _require(
            self.longest_edge >= self.shortest_edge,
            f"PreprocessingConfig.longest_edge={self.longest_edge} is below shortest_edge={self.shortest_edge}",
        )
        _require(
            self.fixed_size is None or min(self.fixed_size) > 0,
            f"PreprocessingConfig.fixed_size must be positive, got {self.fixed_size}",
        )
        _require(
            self.fit in ("pad", "resize"),
            f"PreprocessingConfig.fit must be 'pad' or 'resize', got {self.fit!r}",
        )
        _require(min(self.image_std) > 0, f"PreprocessingConfig.image_std must be positive, got {self.image_std}")


@dataclass(frozen=True, kw_only=True)
class VideoMask2FormerConfig(CheckedConfig):
    """Everything a `VideoMask2Former` is built from.

    Raises:
        ConfigError: a field has a value no model can be built from; the message names it.
    """

    backbone: BackboneConfig = field(default_factory=SwinConfig)
    """Frame encoder. A string `timm:NAME` stands for `TimmBackboneConfig(name=NAME)`."""
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    """Multi-scale features and mask features from the backbone's maps."""
    transformer_decoder: TransformerDecoderConfig = field(default_factory=TransformerDecoderConfig)
    """Queries, classes and masks from the pixel decoder's features."""
    temporal: Literal["joint", "per_frame"] = "joint"
    """`joint`: queries attend to all frames of a clip at once (the video model, arXiv 2112.10764). `per_frame`: every
    frame is decoded alone (the image model)."""
    labels: tuple[str, ...] = YOUTUBEVIS_2019
    """Class names by class index; their number is the number of classes K."""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    """How frames become model input."""

    def __post_init__(self) -> None:
        if isinstance(self.backbone, str):
            object.__setattr__(self, "backbone", _timm_from_name(self.backbone))
        super().__post_init__()

    def _check(self) -> None:
        _require(len(self.labels) > 0, "labels is empty; a model needs at least one class name")

    @property
    def num_labels(self) -> int:
        """Number of classes K, without the no-object class."""
        return len(self.labels)

    @classmethod
    def preset(cls, name: str) -> Self:
        """The configuration of a published checkpoint, by name (one of `PRESETS`).

        Raises:
            ConfigError: no such preset; the message lists them.
        """
        if name not in _PRESETS:
            raise ConfigError(f"unknown preset {name!r:.60}; presets: {PRESETS_IN_WORDS}")
        backbone, num_queries, shortest_edge, label_set = _PRESETS[name]
        return cls(
            backbone=backbone,
            transformer_decoder=TransformerDecoderConfig(num_queries=num_queries),
            labels=LABEL_SETS[label_set],
            preprocessing=PreprocessingConfig(shortest_edge=shortest_edge),
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with the given fields changed; it is validated again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, as written to `config.json`; `from_dict` is its inverse."""
        backbone_type = "swin" if isinstance(self.backbone, SwinConfig) else "timm"
        data = json.loads(json.dumps(asdict(self)))  # tuples to lists
        data["backbone"] = {"type": backbone_type, **data["backbone"]}
        return {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from plain containers; fields left out keep their defaults.

        Raises:
            ConfigError: another model type, an unknown field, or a value of the wrong type; the message names it.
        """
        _require(isinstance(data, dict), f"a config must be a JSON object, got {type(data).__name__}")
        data = dict(data)
        model_type = data.pop("model_type", MODEL_TYPE)
        _require(model_type == MODEL_TYPE, f"model_type is {model_type!r}, expected {MODEL_TYPE!r}")
        version = data.pop("format_version", FORMAT_VERSION)
        _require(
            version == FORMAT_VERSION,
            f"format_version {version!r} is not {FORMAT_VERSION}; a newer m2f-video wrote it: upgrade",
        )
        if isinstance(data.get("backbone"), dict):
            data["backbone"] = _backbone_from_dict(data["backbone"])
        return build_config(cls, data, path="")

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of a `config.json`.

        Raises:
            ConfigError: not JSON, or not a valid config.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the config is not valid JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a `config.json` file.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: not JSON, or not a valid config; the message names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error


def _timm_from_name(name: str) -> TimmBackboneConfig:
    prefix, _, model_name = name.partition(":")
    _require(prefix == "timm", f"backbone {name!r} is not known; give a SwinConfig or 'timm:MODEL_NAME'")
    return TimmBackboneConfig(name=model_name)


def _backbone_from_dict(data: dict[str, Any]) -> BackboneConfig:
    kind = data.get("type", "swin")
    _require(
        isinstance(kind, str) and kind in _BACKBONE_TYPES,
        f"backbone.type {kind!r} is not known; it must be one of {list(_BACKBONE_TYPES)}",
    )
    return build_config(_BACKBONE_TYPES[kind], {k: v for k, v in data.items() if k != "type"}, path="backbone.")


def build_config(cls: type, data: dict[str, Any], path: str) -> Any:
    """Build dataclass `cls` from plain data, checking names and types; `path` prefixes names in messages."""
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    _require(
        not unknown,
        f"unknown config field {path}{unknown[0] if unknown else ''}; known: {', '.join(sorted(known))}",
    )
    hints = get_type_hints(cls)
    arguments = {name: _convert(hints[name], value, path + name) for name, value in data.items()}
    try:
        return cls(**arguments)
    except TypeError as error:  # a field without default is missing
        raise ConfigError(f"{path or 'config: '}{error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check `value`, as JSON has it, against a field's type and give what the field holds."""
    origin = get_origin(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        if isinstance(value, dict):
            return build_config(hint, value, path + ".")
        matches = isinstance(value, hint)
    elif origin in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        resolved = isinstance(value, str) and TimmBackboneConfig in options  # "timm:NAME": the config itself reads it
        absent = value is None and type(None) in get_args(hint)
        if absent or resolved or type(value) in options:
            return value
        return _convert(options[0], value, path)
    elif origin is tuple:
        element, *rest = get_args(hint)
        matches = isinstance(value, list | tuple) and (rest == [...] or len(value) == 1 + len(rest))
        if matches:
            return tuple(_convert(element, item, f"{path}[{i}]") for i, item in enumerate(value))
    elif origin is Literal:
        matches = value in get_args(hint)
    elif hint is float:
        matches = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    else:
        matches = type(value) is hint  # exact, so that true is not an int
    _require(matches, f"{path} must be {_type_name(hint)}, got {value!r}")
    return float(value) if hint is float else value


def _type_name(hint: Any) -> str:
    if hint is float:
        return "a finite float"
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("typing.", "")


_BACKBONES: dict[str, tuple[BackboneConfig, int, int]] = {  # with the queries and the shorter side of the frames
    "swin_tiny": (SwinConfig(), 100, 480),
    "swin_small": (SwinConfig(depths=(2, 2, 18, 2)), 100, 480),
    "swin_base": (SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12), 100, 480),
    "swin_large": (
        SwinConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12),
        200,
        480,
    ),
    "resnet50": (TimmBackboneConfig(name="resnet50"), 100, 360),
    "resnet101": (TimmBackboneConfig(name="resnet101"), 100, 360),
}
_PRESETS = {
    f"{name}_{dataset}": (*sizes, dataset)
    for name, sizes in _BACKBONES.items()
    for dataset in ("youtubevis_2019", "youtubevis_2021")
}
PRESETS: tuple[str, ...] = tuple(_PRESETS)
PRESETS_IN_WORDS = f"{', '.join(_BACKBONES)}, each followed by _youtubevis_2019 or _youtubevis_2021"

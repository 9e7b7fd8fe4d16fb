"""Model configuration: nested frozen dataclasses, presets for the published checkpoints, JSON both ways.

The defaults are the published Video Mask2Former with a Swin-tiny backbone (arXiv 2112.10764; architecture of
arXiv 2112.01527, section 3). Every field changes what is built or computed; nothing else configures the model.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from m2f_video.categories import LABEL_SETS, YOUTUBEVIS_2019
from m2f_video.checked_config import CheckedConfig, ConfigError, FileConfig, build_config, check_fields, require, shown

__all__ = [
    "MODULE_PARTS",
    "PARTS",
    "PRESETS",
    "TRAINING_PARTS",
    "ConfigError",
    "PixelDecoderConfig",
    "PreprocessingConfig",
    "SwinConfig",
    "TimmBackboneConfig",
    "TransformerDecoderConfig",
    "VideoMask2FormerConfig",
]

MODULE_PARTS = ("backbone", "pixel_decoder", "decoder_layer", "cross_attention", "position_encoding")
TRAINING_PARTS = ("loss", "matcher")
"""No modules of the network: a trained model does without them."""
WHOLE_MODEL = "model"
"""In the record of parts: a subclass of `VideoMask2Former`, which alone builds such a model."""
PARTS = MODULE_PARTS + TRAINING_PARTS
"""What something of your own can take the place of; any one module can too, by its name in the model."""
MODEL_TYPE = "m2f-video"
FORMAT_VERSION = 1
_MODULE_NAME = re.compile(r"(backbone|pixel_decoder|transformer_decoder)(\.\w+)*")
GROUP_NORM_GROUPS = 32  # fixed in the published architecture, so hidden widths must be divisible by it
# The most that is built, far above what was ever published: a config from a stranger must not take all memory.
MOST_WIDTH, MOST_HIDDEN, MOST_LAYERS, MOST_HEADS = 4096, 65536, 128, 512
MOST_LABELS, MOST_LABEL_LENGTH = 30_000, 1000
MOST_PIXELS = 16384  # of a side of the model's input


def _require_range(config: object, **most: int) -> None:
    """Check that fields are positive and at most so large."""
    for name, limit in most.items():
        value, path = getattr(config, name), f"{type(config).__name__}.{name}"
        require(value > 0, f"{path} must be positive, got {shown(value)}")
        require(value <= limit, f"{path} must be at most {limit}, got {shown(value)}")


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
        _require_range(self, embed_dim=MOST_WIDTH, window_size=32, mlp_ratio=64)
        require(
            len(self.depths) == len(self.num_heads) == 4,
            f"SwinConfig needs four stages, got depths={shown(self.depths)} and num_heads={shown(self.num_heads)}",
        )
        require(
            int(self.embed_dim * self.mlp_ratio) > 0,
            f"SwinConfig.mlp_ratio={self.mlp_ratio} leaves the MLP of the first stage no channels",
        )
        check_fields(self, "must be positive", lambda depth: depth > 0, "depths")
        require(
            sum(self.depths) <= MOST_LAYERS,
            f"SwinConfig.depths must be at most {MOST_LAYERS} together, got {shown(self.depths)}",
        )
        for stage, heads in enumerate(self.num_heads):
            channels = self.embed_dim * 2**stage
            require(
                heads > 0 and channels % heads == 0,
                f"SwinConfig.num_heads[{stage}]={shown(heads)} does not divide the {channels} channels of that stage",
            )
        check_fields(self, "must be in [0, 1)", lambda rate: 0 <= rate < 1, "drop_path_rate")


@dataclass(frozen=True, kw_only=True)
class TimmBackboneConfig(CheckedConfig):
    """Any timm model that offers `features_only` maps at strides 4, 8, 16 and 32, by name."""

    name: str
    """The timm model name, such as `resnet50` or `convnext_tiny`, or with the tag of its pretrained weights, such as
    `resnet50.a1_in1k`, which are loaded by `load_backbone(model, "timm")` or `train --init-backbone timm`."""

    def _check(self) -> None:  # whether timm knows the name is checked when the model is built
        require(bool(self.name), "TimmBackboneConfig.name is empty; give a timm model name such as 'resnet50'")
        require(len(self.name) <= 200, f"TimmBackboneConfig.name is too long for a timm model: {shown(self.name)}")


BackboneConfig = SwinConfig | TimmBackboneConfig
_BACKBONE_TYPES: dict[str, type[SwinConfig] | type[TimmBackboneConfig]] = {
    "swin": SwinConfig,
    "timm": TimmBackboneConfig,
}


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig(CheckedConfig):
    """Pixel decoder (arXiv 2112.01527, section 3.2.2; arXiv 2010.04159), or what the paper compares it with."""

    kind: Literal["ms_deform_attn", "fpn", "semantic_fpn", "bifpn", "fapn", "none"] = "ms_deform_attn"
    """What makes features of the backbone's maps (table 4e): a deformable encoder; an FPN, Semantic FPN, BiFPN or FaPN;
    or nothing, so that they are only projected."""
    hidden_dim: int = 256
    """Width of the encoder tokens and of the multi-scale features."""
    mask_dim: int = 256
    """Channels of the mask features, and of the mask embeddings multiplied with them."""
    num_layers: int = 6
    """Deformable encoder layers, or layers of a BiFPN; 0 leaves the projected maps as they are. This field is of no
    other kind, and those below are of `ms_deform_attn` alone."""
    ffn_dim: int = 1024
    """Hidden width of each encoder layer's feed-forward network."""
    num_heads: int = 8
    """Heads of the deformable attention."""
    num_points: int = 4
    """Sampling points per head and level."""
    num_levels: int = 3
    """Levels that the encoder sees, from stride 32 on: 1 to 4, which are strides 32, 16, 8 and 4. Those that it does
    not see come by feature-pyramid steps."""
    dropout: float = 0.0
    """Dropout after the attention and inside the feed-forward network. Acts in training only."""

    def _check(self) -> None:
        _require_range(self, hidden_dim=MOST_WIDTH, mask_dim=MOST_WIDTH, ffn_dim=MOST_HIDDEN)
        _require_range(self, num_heads=MOST_HEADS, num_points=64, num_levels=4)
        check_fields(self, f"must be 0 to {MOST_LAYERS}", lambda depth: 0 <= depth <= MOST_LAYERS, "num_layers")
        for divisor, why in ((GROUP_NORM_GROUPS, "the groups of its norms"), (self.num_heads, "num_heads")):
            require(
                self.hidden_dim % divisor == 0,
                f"PixelDecoderConfig.hidden_dim={self.hidden_dim} is not divisible by {divisor} ({why})",
            )
        check_fields(self, "must be in [0, 1)", lambda rate: 0 <= rate < 1, "dropout")

    def arguments(self) -> dict[str, Any]:
        """The fields that a decoder of this kind is built from; it has no use for the others."""
        names = {item.name for item in fields(self)} - {"kind"}
        if self.kind != "ms_deform_attn":
            names = {"hidden_dim", "mask_dim"} | ({"num_layers"} if self.kind == "bifpn" else set())
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in names}


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig(CheckedConfig):
    """Masked-attention transformer decoder (arXiv 2112.01527, section 3.2.1)."""

    hidden_dim: int = 256
    """Width of the queries. Where it differs from the pixel decoder's, a 1x1 convolution adapts each level."""
    num_queries: int = 100
    """Number of learnable queries: the most objects one clip can have."""
    num_layers: int = 9
    """Decoder layers; of several levels, layer i attends to level i mod 3 (strides 32, 16, 8)."""
    num_heads: int = 8
    """Heads of cross- and self-attention."""
    ffn_dim: int = 2048
    """Hidden width of each layer's feed-forward network."""
    dropout: float = 0.0
    """Dropout of attention weights, after each part of a layer and inside the feed-forward network. Acts in training
    only. Without it is better (arXiv 2112.01527, table 4b)."""
    cross_attention: Literal["masked", "full", "mask_pooling", "smca"] = "masked"
    """How queries see pixels (table 4c): those that their mask covers, all, the mean of those that it covers, or those
    near a place that they predict."""
    layer_order: Literal["cross_first", "self_first"] = "cross_first"
    """Which attention a layer begins with (table 4b)."""
    query_features: Literal["learnable_supervised", "learnable", "zero"] = "learnable_supervised"
    """What queries begin as (table 4b): features of their own, which predict masks and are trained to; features of
    their own; or zeros. Only the first give the first layer masks; with the others it attends everywhere."""
    features: Literal["round_robin", "concatenated", "single"] = "round_robin"
    """Which of strides 32, 16, 8 a layer attends to (table 4d): by turns, all as one sequence, or `scale` alone."""
    scale: Literal[8, 16, 32] = 8
    """Stride of the `single` level."""
    temporal_position: Literal["sine_3d", "sine_2d", "none"] = "sine_3d"
    """Positions of keys: in space and time (arXiv 2112.10764, section 3.1), in space alone, or none."""

    def _check(self) -> None:
        _require_range(self, hidden_dim=MOST_WIDTH, num_queries=2000)
        _require_range(self, num_heads=MOST_HEADS, ffn_dim=MOST_HIDDEN)
        check_fields(self, f"must be 0 to {MOST_LAYERS}", lambda depth: 0 <= depth <= MOST_LAYERS, "num_layers")
        check_fields(self, "must be in [0, 1)", lambda rate: 0 <= rate < 1, "dropout")
        require(
            self.scale == 8 or self.features == "single",
            f"TransformerDecoderConfig.scale={shown(self.scale)} is of features='single', got {shown(self.features)}",
        )
        for divisor, why in (
            (4, "sine positions have y and x halves of sine and cosine"),
            (self.num_heads, "num_heads"),
        ):
            require(
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
        _require_range(self, shortest_edge=MOST_PIXELS, longest_edge=MOST_PIXELS, size_divisor=1024)
        require(
            self.longest_edge >= self.shortest_edge,
            f"PreprocessingConfig.longest_edge={self.longest_edge} is below shortest_edge={self.shortest_edge}",
        )
        require(
            self.fixed_size is None or (min(self.fixed_size) > 0 and max(self.fixed_size) <= MOST_PIXELS),
            f"PreprocessingConfig.fixed_size must be positive and at most {MOST_PIXELS}, got {shown(self.fixed_size)}",
        )
        check_fields(self, "is for pixels in [0, 1]", lambda mean: abs(mean) <= 1000, "image_mean")
        positive = "must be positive, for pixels in [0, 1]"
        check_fields(self, positive, lambda deviation: 1e-6 <= deviation <= 1000, "image_std")


@dataclass(frozen=True, kw_only=True)
class VideoMask2FormerConfig(FileConfig):
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
    parts: dict[str, str] = field(default_factory=dict, hash=False)
    """What of your own the model has in the place of ours, by the names of `PARTS` or of modules: what each is called,
    as a record. Set by `VideoMask2Former(config, parts=...)` and by saving; nothing is ever imported by it."""

    def __post_init__(self) -> None:
        if isinstance(self.backbone, str):
            object.__setattr__(self, "backbone", _timm_from_name(self.backbone))
        super().__post_init__()

    def _check(self) -> None:
        require(len(self.labels) > 0, "labels is empty; a model needs at least one class name")
        require(
            len(self.labels) <= MOST_LABELS, f"labels must be at most {MOST_LABELS} names, there are {len(self.labels)}"
        )
        for index, label in enumerate(self.labels):
            require(
                len(label) <= MOST_LABEL_LENGTH and _is_text(label),
                f"labels[{index}] must be text of at most {MOST_LABEL_LENGTH} characters, got {shown(label)}",
            )
        known = (*PARTS, WHOLE_MODEL)
        if unknown := sorted(name for name in self.parts if name not in known and not _MODULE_NAME.fullmatch(name)):
            raise ConfigError(
                f"parts has {shown(unknown[0])}; a part of your own can be {', '.join(PARTS)}, or a module by its name "
                "in the model"
            )

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

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, as written to `config.json`; `from_dict` is its inverse."""
        backbone_type = "swin" if isinstance(self.backbone, SwinConfig) else "timm"
        data = json.loads(json.dumps(asdict(self)))  # tuples to lists
        data["backbone"] = {"type": backbone_type, **data["backbone"]}
        if not self.parts:
            del data["parts"]  # of a model that has none
        return {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from plain containers; fields left out keep their defaults.

        Raises:
            ConfigError: another model type, an unknown field, or a value of the wrong type; the message names it.
        """
        require(isinstance(data, dict), f"a config must be a JSON object, got {type(data).__name__}")
        data = dict(data)
        model_type = data.pop("model_type", MODEL_TYPE)
        require(model_type == MODEL_TYPE, f"model_type is {shown(model_type)}, expected {MODEL_TYPE!r}")
        version = data.pop("format_version", FORMAT_VERSION)
        require(
            version == FORMAT_VERSION,
            f"format_version {shown(version)} is not {FORMAT_VERSION}; a newer m2f-video wrote it: upgrade",
        )
        if isinstance(data.get("backbone"), dict):
            data["backbone"] = _backbone_from_dict(data["backbone"])
        return build_config(cls, data, path="")


def _is_text(label: str) -> bool:
    """Whether it can be written: JSON may hold halves of characters."""
    try:
        label.encode()
    except UnicodeEncodeError:
        return False
    return True


def _timm_from_name(name: str) -> TimmBackboneConfig:
    prefix, _, model_name = name.partition(":")
    require(prefix == "timm", f"backbone {shown(name)} is not known; give a SwinConfig or 'timm:MODEL_NAME'")
    return TimmBackboneConfig(name=model_name)


def _backbone_from_dict(data: dict[str, Any]) -> BackboneConfig:
    kind = data.get("type", "swin")
    require(
        isinstance(kind, str) and kind in _BACKBONE_TYPES,
        f"backbone.type {shown(kind)} is not known; it must be one of {list(_BACKBONE_TYPES)}",
    )
    return build_config(_BACKBONE_TYPES[kind], {k: v for k, v in data.items() if k != "type"}, path="backbone.")


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

"""From a config to modules: the one place that sees both. Each value of a field is one class, named here."""

from dataclasses import asdict
from typing import Any

from torch import nn

from m2f_video.config import SwinConfig, VideoMask2FormerConfig
from m2f_video.modeling.cross_attention import (
    CrossAttention,
    FullCrossAttention,
    MaskPooling,
    SpatiallyModulatedCrossAttention,
)
from m2f_video.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from m2f_video.modeling.position_encoding import NoPosition, SinePosition2D, SinePosition3D
from m2f_video.modeling.swin import SwinTransformer
from m2f_video.modeling.timm_backbone import TimmBackbone
from m2f_video.modeling.transformer_decoder import DecoderLayer, MaskedTransformerDecoder, SelfFirstDecoderLayer

CROSS_ATTENTIONS: dict[str, type[nn.Module]] = {
    "masked": CrossAttention,
    "full": FullCrossAttention,
    "mask_pooling": MaskPooling,
    "smca": SpatiallyModulatedCrossAttention,
}
LAYER_ORDERS: dict[str, type[nn.Module]] = {"cross_first": DecoderLayer, "self_first": SelfFirstDecoderLayer}
POSITIONS: dict[str, type[nn.Module]] = {"sine_3d": SinePosition3D, "sine_2d": SinePosition2D, "none": NoPosition}


def build_backbone(config: VideoMask2FormerConfig) -> SwinTransformer | TimmBackbone:
    """The frame encoder."""
    backbone = config.backbone
    kind = SwinTransformer if isinstance(backbone, SwinConfig) else TimmBackbone
    return kind(**asdict(backbone))


def build_pixel_decoder(config: VideoMask2FormerConfig, in_channels: tuple[int, ...]) -> MSDeformAttnPixelDecoder:
    """Of maps with these channels at strides 4, 8, 16, 32."""
    return MSDeformAttnPixelDecoder(in_channels=in_channels, **asdict(config.pixel_decoder))


def build_transformer_decoder(config: VideoMask2FormerConfig) -> MaskedTransformerDecoder:
    """Of what the pixel decoder gives."""
    fields: dict[str, Any] = asdict(config.transformer_decoder)
    return MaskedTransformerDecoder(
        in_channels=config.pixel_decoder.hidden_dim,
        mask_dim=config.pixel_decoder.mask_dim,
        num_labels=config.num_labels,
        cross_attention=CROSS_ATTENTIONS[fields.pop("cross_attention")],
        decoder_layer=LAYER_ORDERS[fields.pop("layer_order")],
        position_encoding=POSITIONS[fields.pop("temporal_position")],
        **fields,
    )

"""Masked-attention transformer decoder (arXiv 2112.01527, section 3.2.1; over time: arXiv 2112.10764, section 3).

Queries attend to the pixels of a clip that their previous mask covers, level by level. A clip is one sequence of keys:
frames outermost, then rows, then columns. What the paper compares (table 4) are classes beside the published
one, or arguments: cross-attention in `cross_attention.py`, the order within a layer, queries and features here.

B clips, T frames, Q queries, C channels, H W height and width of a level, S = T*H*W keys, M heads, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.modeling.cross_attention import CrossAttention, Level, SelfAttention, attention_mask
from m2f_video.modeling.position_encoding import SinePosition3D

QueryFeatures = Literal["learnable_supervised", "learnable", "zero"]
FeatureUse = Literal["round_robin", "concatenated", "single"]
SCALES = (32, 16, 8)
"""Strides of the levels, coarse to fine."""


@dataclass(frozen=True)
class Prediction:
    """What the prediction head makes of the queries at one depth.

    Attributes:
        class_queries_logits: (B, Q, K+1), the last column is "no object".
        masks_queries_logits: (B, Q, T, H/4, W/4).
    """

    class_queries_logits: Tensor
    masks_queries_logits: Tensor


@dataclass(frozen=True)
class TransformerDecoderOutput:
    """Result of decoding a batch of clips.

    Attributes:
        class_queries_logits: (B, Q, K+1), the last column is "no object".
        mask_embeddings: (B, Q, mask_dim); `MaskProduct` multiplies them with mask features.
        auxiliary: the predictions at every depth (the learnable queries' first, if these are supervised, the final one
            last), when asked for.
        queries: queries (B, Q, C) at every depth before the prediction head's norm, when hidden states are asked for.
        attention_masks: `attention_mask` of each layer's mask logits, (B, Q, S) bool, when hidden states are asked for:
            what masked attention sees, whatever another kind of attention does with the logits.
    """

    class_queries_logits: Tensor
    mask_embeddings: Tensor
    auxiliary: tuple[Prediction, ...] | None = None
    queries: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None


class MaskProduct(nn.Module):
    """Mask logits: dot products of mask embeddings and the pixels' mask features (arXiv 2112.01527, section 3)."""

    def forward(self, mask_embeddings: Tensor, mask_features: Tensor) -> Tensor:
        """Embeddings (B, Q, C) and features (B, T, C, H, W) -> logits (B, Q, T, H, W)."""
        pixels = mask_features.permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, S, C), no copy where channels come last
        return (mask_embeddings @ pixels.transpose(1, 2)).unflatten(-1, (-1, *mask_features.shape[-2:]))


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, X, Y, H, W) to (B, X, Y, *size), without antialiasing."""
    flat = frames.flatten(0, 1)
    if flat.is_contiguous(memory_format=torch.channels_last):
        # Views of a single frame may have any stride between frames; only the usual one makes the result channels-last.
        flat = flat.permute(0, 2, 3, 1).flatten().view(-1, *flat.shape[2:], flat.shape[1]).permute(0, 3, 1, 2)
    resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return resized.unflatten(0, frames.shape[:2])


def _input_projection(in_channels: int, out_channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return convolution


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward network: in this order, each post-norm.

    Args:
        dim: channels C.
        num_heads: attention heads.
        ffn_dim: hidden width of the feed-forward network.
        dropout: of attention weights, after each of the three parts and inside the last, in training.
        cross_attention: makes the cross-attention from `dim`, `num_heads` and `dropout`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float = 0.0,
        cross_attention: Callable[..., nn.Module] = CrossAttention,
    ) -> None:
        super().__init__()
        self.cross_attn = cross_attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, query_position: Tensor, level: Level, mask_logits: Tensor | None) -> Tensor:
        """Update the queries.

        Args:
            x: queries (B, Q, C).
            query_position: (Q, C), added to queries and to the keys of the self-attention.
            level: of the clips, to attend to.
            mask_logits: (B, Q, S), whose `attention_mask` says where a query may attend; None: everywhere.

        Returns:
            (B, Q, C).
        """
        x = self.cross_attn_norm(x + self.dropout(self.cross_attn(x + query_position, level, mask_logits)))
        x = self.self_attn_norm(x + self.dropout(self.self_attn(x, query_position)))
        return self.ffn_norm(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class SelfFirstDecoderLayer(DecoderLayer):
    """Self-attention first, the standard order (arXiv 2112.01527, table 4b)."""

    def forward(self, x: Tensor, query_position: Tensor, level: Level, mask_logits: Tensor | None) -> Tensor:
        """As `DecoderLayer`."""
        x = self.self_attn_norm(x + self.dropout(self.self_attn(x, query_position)))
        x = self.cross_attn_norm(x + self.dropout(self.cross_attn(x + query_position, level, mask_logits)))
        return self.ffn_norm(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class MaskedTransformerDecoder(nn.Module):
    """Learnable queries, refined by masked attention to one level after the other, and the prediction head.

    Args:
        in_channels: channels of the multi-scale features; where they differ from `hidden_dim`, each level gets a
            1x1 convolution.
        hidden_dim: width C of the queries.
        mask_dim: channels of the mask features.
        num_queries: queries Q.
        num_layers: layers; layer i attends to level i mod 3, coarse to fine.
        num_heads: attention heads.
        ffn_dim: hidden width of each layer's feed-forward network.
        num_labels: classes K.
        dropout: of the layers, in training.
        query_features: what the queries begin as: `learnable_supervised`, features of their own that predict masks,
            which are trained as such and tell the first layer where to attend; `learnable` ones or `zero`, which
            predict nothing, so that the first layer attends everywhere.
        features: levels are attended to in turns (`round_robin`), by all layers as one sequence (`concatenated`), or
            only one of them is (`single`).
        scale: stride of the single one.
        decoder_layer: makes a layer from `dim`, `num_heads`, `ffn_dim`, `dropout` and `cross_attention`.
        cross_attention: makes that of each layer.
        position_encoding: makes the positions of keys from `dim`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        hidden_dim: int,
        mask_dim: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        num_labels: int,
        dropout: float = 0.0,
        query_features: QueryFeatures = "learnable_supervised",
        features: FeatureUse = "round_robin",
        scale: int = 8,
        decoder_layer: Callable[..., nn.Module] = DecoderLayer,
        cross_attention: Callable[..., nn.Module] = CrossAttention,
        position_encoding: Callable[..., nn.Module] = SinePosition3D,
    ) -> None:
        super().__init__()
        self.supervises_queries = query_features == "learnable_supervised"
        self.concatenates = features == "concatenated"
        self.scales = (scale,) if features == "single" else SCALES
        self.query_features = None if query_features == "zero" else nn.Embedding(num_queries, hidden_dim)
        self.query_positions = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(len(self.scales), hidden_dim)
        adapts = in_channels != hidden_dim
        self.input_projections = nn.ModuleList(
            _input_projection(in_channels, hidden_dim) for _ in range(len(self.scales) if adapts else 0)
        )
        self.layers = nn.ModuleList(
            decoder_layer(
                dim=hidden_dim, num_heads=num_heads, ffn_dim=ffn_dim, dropout=dropout, cross_attention=cross_attention
            )
            for _ in range(num_layers)
        )
        self.position_encoding = position_encoding(dim=hidden_dim)
        self.mask_product = MaskProduct()
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_head = nn.Linear(hidden_dim, num_labels + 1)
        self.mask_head = nn.ModuleList(nn.Linear(hidden_dim, width) for width in (hidden_dim, hidden_dim, mask_dim))

    def forward(
        self,
        mask_features: Tensor,
        multi_scale: tuple[Tensor, ...],
        output_auxiliary: bool = False,
        output_hidden: bool = False,
    ) -> TransformerDecoderOutput:
        """Decode a batch of clips.

        Without `output_auxiliary` no layer's full masks are made: bilinear resizing is linear, so the dot products of
        the mask embeddings with resized mask features are the resized masks that the attention needs. With it, masks
        are made in full and resized, as the paper describes. A product or a resizing that is not linear would make the
        two differ: such a variant has to make masks in full always.

        Args:
            mask_features: (B, T, mask_dim, H/4, W/4).
            multi_scale: strides 32, 16, 8, each (B, T, in_channels, H_l, W_l).
            output_auxiliary: also give the predictions at every depth.
            output_hidden: also give the queries and attention masks at every depth.
        """
        levels = self._levels(multi_scale)
        resized: dict[int, list[Tensor]] = {}  # mask features at the sizes of a level

        x = self._initial_queries().expand(mask_features.shape[0], -1, -1)
        queries, attention_masks, auxiliary = [x], [], []
        for index, layer in enumerate(self.layers):
            number = index % len(levels)
            level = levels[number]
            mask_logits = None
            if index > 0 or self.supervises_queries:
                class_logits, mask_embeddings = self._predict(x)
                if output_auxiliary:
                    masks = self.mask_product(mask_embeddings, mask_features)
                    auxiliary.append(Prediction(class_logits, masks))
                    parts = [resize_frames(masks.detach(), size) for size in level.sizes]
                else:
                    if number not in resized:
                        resized[number] = [resize_frames(mask_features.detach(), size) for size in level.sizes]
                    parts = [self.mask_product(mask_embeddings.detach(), features) for features in resized[number]]
                    if number == len(levels) - 1 and mask_features.shape[1] > 1:
                        del resized[number]  # the finest is large: of several frames it costs less to make than to keep
                mask_logits = _as_keys(parts)
            x = layer(x, self.query_positions.weight, level, mask_logits)
            if output_hidden:
                queries.append(x)
                attention_masks.append(_visible(mask_logits, x, level))

        class_logits, mask_embeddings = self._predict(x)
        if output_auxiliary:
            auxiliary.append(Prediction(class_logits, self.mask_product(mask_embeddings, mask_features)))
        return TransformerDecoderOutput(
            class_logits,
            mask_embeddings,
            auxiliary=tuple(auxiliary) if output_auxiliary else None,
            queries=tuple(queries) if output_hidden else None,
            attention_masks=tuple(attention_masks) if output_hidden else None,
        )

    def _initial_queries(self) -> Tensor:
        """(Q, C)."""
        if self.query_features is None:
            return torch.zeros_like(self.query_positions.weight)
        return self.query_features.weight

    def _predict(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, K+1) and mask embeddings (B, Q, mask_dim); the norm serves the heads alone."""
        x = self.norm(queries)
        class_logits = self.class_head(x)
        *hidden, last = self.mask_head
        for layer in hidden:
            x = F.relu(layer(x))
        return class_logits, last(x)

    def _levels(self, multi_scale: Sequence[Tensor]) -> list[Level]:
        """Levels (B, T, C', H, W) as cross-attention reads them."""
        used = [features for features, scale in zip(multi_scale, SCALES, strict=True) if scale in self.scales]
        levels = [self._level(features, index) for index, features in enumerate(used)]
        return [Level.concatenate(levels)] if self.concatenates else levels

    def _level(self, features: Tensor, index: int) -> Level:
        T, H, W = features.shape[1], *features.shape[-2:]
        if self.input_projections:
            features = self.input_projections[index](features.flatten(0, 1)).unflatten(0, features.shape[:2])
        tokens = features.flatten(3).transpose(2, 3)  # (B, T, H*W, C), a view where channels come last
        positions = self.position_encoding(tokens, T, H, W)
        return Level(((H, W),), tokens, self.level_embed.weight[index], *positions)


def _as_keys(mask_logits: list[Tensor]) -> Tensor:
    """Mask logits (B, Q, T, H, W) at the sizes of a level, in the order of its keys: (B, Q, S)."""
    if len(mask_logits) == 1:
        return mask_logits[0].flatten(2)
    return torch.cat([logits.flatten(3) for logits in mask_logits], dim=3).flatten(2)


def _visible(mask_logits: Tensor | None, queries: Tensor, level: Level) -> Tensor:
    if mask_logits is not None:
        return attention_mask(mask_logits)
    return torch.ones(*queries.shape[:2], level.tokens[0, ..., 0].numel(), dtype=torch.bool, device=queries.device)

"""Masked-attention transformer decoder (arXiv 2112.01527, section 3.2.1; over time: arXiv 2112.10764, section 3).

Queries attend to the pixels of a clip that their previous mask covers, level by level. A clip is one sequence of keys:
frames outermost, then rows, then columns.

B clips, T frames, Q queries, C channels, H W height and width of a level, S = T*H*W keys, M heads, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.modeling.pixel_decoder import NUM_LEVELS
from m2f_video.modeling.position_encoding import position_dtype, sine_1d, sine_2d


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
        auxiliary: the predictions at every depth (the learnable queries' first, the final one last), when asked for.
        queries: queries (B, Q, C) at every depth before the prediction head's norm, when hidden states are asked for.
        attention_masks: what each layer's cross-attention may see, (B, Q, S) bool, when hidden states are asked for.
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


def attention_mask(mask_logits: Tensor) -> Tensor:
    """Which keys each query may attend to (arXiv 2112.01527, equation 2): (B, Q, S) logits -> (B, Q, S) bool.

    This is the one place where masked attention gets its mask. A key is blocked where sigmoid(logit) < 0.5, which is
    where the logit is negative. A query whose keys are all blocked attends to all of them instead.
    """
    blocked = mask_logits.detach() < 0
    return ~blocked | blocked.all(-1, keepdim=True)


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


@dataclass(frozen=True)
class Level:
    """One level of a batch of clips, as cross-attention reads it: S = T*H*W keys and values.

    Keys and values are made where they are projected, and not kept: those of a long clip take more memory than all
    else that a layer needs.

    Attributes:
        size: (H, W).
        tokens: features of the pixels, (B, T, H*W, C).
        embedding: learned, of the level, (C,).
        pixel_position: of a pixel in its frame, (H*W, C).
        frame_position: of a frame in its clip, (T, C).
    """

    size: tuple[int, int]
    tokens: Tensor
    embedding: Tensor
    pixel_position: Tensor
    frame_position: Tensor

    @property
    def values(self) -> Tensor:
        """Features: (B, T, H*W, C)."""
        return self.tokens + self.embedding

    @property
    def keys(self) -> Tensor:
        """Features plus positions in space and time (arXiv 2112.10764, section 3.1): (B, T, H*W, C)."""
        return self.values + (self.pixel_position + self.frame_position[:, None])


class Attention(nn.Module):
    """Multi-head attention with the query, key and value projections in one parameter.

    Args:
        dim: channels C.
        num_heads: heads M.
    """

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def projections(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight (C, C) and bias (C,) of queries, of keys, and of values."""
        return zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of projected queries (B, Q, C) to projected keys and values (B, S, C), where mask (B, Q, S) is."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, M, Q or S, C/M)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None])
        return self.out_proj(output.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Queries attend to each other; positions take part in queries and keys."""

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Queries (B, Q, C) and their positions (Q, C) -> (B, Q, C)."""
        of_queries, of_keys, of_values = self.projections()
        positioned = x + position
        return self.attend(F.linear(positioned, *of_queries), F.linear(positioned, *of_keys), F.linear(x, *of_values))


class CrossAttention(Attention):
    """Queries attend to the pixels of a clip that their masks cover."""

    def forward(self, query: Tensor, level: Level, mask_logits: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C), positions included.
            level: what is attended to.
            mask_logits: (B, Q, S), whose `attention_mask` says where a query may attend; None lets every query attend
                everywhere.

        Returns:
            (B, Q, C).
        """
        of_queries, of_keys, of_values = self.projections()
        k = F.linear(level.keys, *of_keys).flatten(1, 2)  # (B, S, C)
        v = F.linear(level.values, *of_values).flatten(1, 2)
        mask = None if mask_logits is None else attention_mask(mask_logits)
        return self.attend(F.linear(query, *of_queries), k, v, mask)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward network: in this order, each post-norm.

    Args:
        dim: channels C.
        num_heads: attention heads.
        ffn_dim: hidden width of the feed-forward network.
    """

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(dim=dim, num_heads=num_heads)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim=dim, num_heads=num_heads)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, query_position: Tensor, level: Level, mask_logits: Tensor) -> Tensor:
        """Update the queries.

        Args:
            x: queries (B, Q, C).
            query_position: (Q, C), added to queries and to the keys of the self-attention.
            level: of the clips, to attend to.
            mask_logits: (B, Q, S), whose `attention_mask` says where a query may attend.

        Returns:
            (B, Q, C).
        """
        x = self.cross_attn_norm(x + self.cross_attn(x + query_position, level, mask_logits))
        x = self.self_attn_norm(x + self.self_attn(x, query_position))
        return self.ffn_norm(x + self.linear2(F.relu(self.linear1(x))))


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
    ) -> None:
        super().__init__()
        self.query_features = nn.Embedding(num_queries, hidden_dim)
        self.query_positions = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_LEVELS, hidden_dim)
        adapts = in_channels != hidden_dim
        self.input_projections = nn.ModuleList(
            _input_projection(in_channels, hidden_dim) for _ in range(NUM_LEVELS if adapts else 0)
        )
        self.layers = nn.ModuleList(
            DecoderLayer(dim=hidden_dim, num_heads=num_heads, ffn_dim=ffn_dim) for _ in range(num_layers)
        )
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
        are made in full and resized, as the paper describes.

        Args:
            mask_features: (B, T, mask_dim, H/4, W/4).
            multi_scale: strides 32, 16, 8, each (B, T, in_channels, H_l, W_l).
            output_auxiliary: also give the predictions at every depth.
            output_hidden: also give the queries and attention masks at every depth.
        """
        levels = [self._level(features, index) for index, features in enumerate(multi_scale)]
        resized: dict[int, Tensor] = {}  # mask features at the size of a level

        x = self.query_features.weight.expand(mask_features.shape[0], -1, -1)
        queries, attention_masks, auxiliary = [x], [], []
        for index, layer in enumerate(self.layers):
            number = index % NUM_LEVELS
            level = levels[number]
            class_logits, mask_embeddings = self._predict(x)
            if output_auxiliary:
                masks = self.mask_product(mask_embeddings, mask_features)
                auxiliary.append(Prediction(class_logits, masks))
                mask_logits = resize_frames(masks.detach(), level.size)
            else:
                if number not in resized:
                    resized[number] = resize_frames(mask_features.detach(), level.size)
                mask_logits = self.mask_product(mask_embeddings.detach(), resized[number])
                if number == NUM_LEVELS - 1 and mask_features.shape[1] > 1:
                    del resized[number]  # the finest is large: of several frames it costs less to make than to keep
            mask_logits = mask_logits.flatten(2)  # (B, Q, S)
            x = layer(x, self.query_positions.weight, level, mask_logits)
            if output_hidden:
                queries.append(x)
                attention_masks.append(attention_mask(mask_logits))

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

    def _predict(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, K+1) and mask embeddings (B, Q, mask_dim); the norm serves the heads alone."""
        x = self.norm(queries)
        class_logits = self.class_head(x)
        *hidden, last = self.mask_head
        for layer in hidden:
            x = F.relu(layer(x))
        return class_logits, last(x)

    def _level(self, features: Tensor, index: int) -> Level:
        """A level (B, T, C', H, W) as cross-attention reads it."""
        T, H, W = features.shape[1], *features.shape[-2:]
        if self.input_projections:
            features = self.input_projections[index](features.flatten(0, 1)).unflatten(0, features.shape[:2])
        tokens = features.flatten(3).transpose(2, 3)  # (B, T, H*W, C), a view where channels come last
        dim, dtype, device = tokens.shape[-1], position_dtype(tokens), tokens.device
        pixel_position = sine_2d(H, W, dim, dtype=dtype, device=device).flatten(0, 1)
        frame_position = sine_1d(T, dim, dtype=dtype, device=device)
        return Level(
            (H, W), tokens, self.level_embed.weight[index], pixel_position.to(tokens), frame_position.to(tokens)
        )

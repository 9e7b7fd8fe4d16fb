"""How queries see the pixels of a clip: masked attention, and what the paper compares it with.

One class for each row of arXiv 2112.01527, table 4c; over time as in arXiv 2112.10764, section 3. All
are called alike, `cross_attn(query, level, mask_logits)`, and one of your own may take their place.

B clips, T frames, Q queries, C channels, M heads, H W height and width of a level, N = H*W pixels of a frame (of all
levels, where several are one sequence), S = T*N keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.modeling.position_encoding import pixel_centres, position_dtype
from m2f_video.ops import Shapes


def attention_mask(mask_logits: Tensor) -> Tensor:
    """Which keys each query may attend to (arXiv 2112.01527, equation 2): (B, Q, S) logits -> (B, Q, S) bool.

    This is the one place where masked attention gets its mask. A key is blocked where sigmoid(logit) < 0.5, which is
    where the logit is negative. A query whose keys are all blocked attends to all of them instead.
    """
    blocked = mask_logits.detach() < 0
    return ~blocked | blocked.all(-1, keepdim=True)


def pooling_weights(mask_logits: Tensor) -> Tensor:
    """Shares of the pixels that each query's mask covers in its mean: (B, Q, S) logits -> (B, Q, S)."""
    mask = attention_mask(mask_logits)
    return mask.to(position_dtype(mask_logits)) / mask.sum(-1, keepdim=True)  # never by 0; counts leave float16


@dataclass(frozen=True)
class Level:
    """One level of a batch of clips, as cross-attention reads it: S keys and values.

    Keys and values are made where they are projected, and not kept: those of a long clip take more memory than all
    else that a layer needs.

    Attributes:
        sizes: (H, W); several where levels are one sequence.
        tokens: features of the pixels, (B, T, N, C).
        embedding: learned, of the level, (C,) or (N, C).
        pixel_position: of a pixel in its frame, (N, C).
        frame_position: of a frame in its clip, (T, C).
    """

    sizes: Shapes
    tokens: Tensor
    embedding: Tensor
    pixel_position: Tensor
    frame_position: Tensor

    @property
    def values(self) -> Tensor:
        """Features: (B, T, N, C)."""
        return self.tokens + self.embedding

    @property
    def keys(self) -> Tensor:
        """Features plus positions in space and time (arXiv 2112.10764, section 3.1): (B, T, N, C)."""
        return self.values + (self.pixel_position + self.frame_position[:, None])

    @classmethod
    def concatenate(cls, levels: Sequence["Level"]) -> "Level":
        """All of them as one sequence, frame by frame (arXiv 2112.01527, table 4d, naive multi-scale)."""
        return cls(
            tuple(size for level in levels for size in level.sizes),
            torch.cat([level.tokens for level in levels], dim=2),
            torch.cat([level.embedding.expand_as(level.pixel_position) for level in levels]),
            torch.cat([level.pixel_position for level in levels]),
            levels[0].frame_position,
        )


class Attention(nn.Module):
    """Multi-head attention with the query, key and value projections in one parameter.

    Args:
        dim: channels C.
        num_heads: heads M.
        dropout: share of the attention weights that are dropped, in training.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = dropout
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def projections(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight (C, C) and bias (C,) of queries, of keys, and of values."""
        return zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of projected queries (B, Q, C) to projected keys and values (B, S, C).

        Args:
            q: queries.
            k: keys.
            v: values.
            mask: what a query may attend to, bool, or what is added to its products with the keys: (B, Q, S), or
                (B, M, Q, S) where heads differ.
        """
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, M, Q or S, C/M)
        mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
        rate = self.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Queries attend to each other; positions take part in queries and keys."""

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Queries (B, Q, C) and their positions (Q, C) -> (B, Q, C)."""
        of_queries, of_keys, of_values = self.projections()
        positioned = x + position
        return self.attend(F.linear(positioned, *of_queries), F.linear(positioned, *of_keys), F.linear(x, *of_values))


class CrossAttention(Attention):
    """Masked attention: queries attend to the pixels of a clip that their masks cover."""

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


class FullCrossAttention(CrossAttention):
    """Standard cross-attention (arXiv 2005.12872): every query attends to all pixels."""

    def forward(self, query: Tensor, level: Level, mask_logits: Tensor | None = None) -> Tensor:
        """As `CrossAttention`, whatever the masks."""
        return super().forward(query, level)


class MaskPooling(nn.Module):
    """The mean of the pixels that a query's mask covers, instead of attention (as in K-Net, arXiv 2106.14855).

    Args:
        dim: channels C.
        num_heads: not used; there is nothing to attend with.
        dropout: not used either.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, level: Level, mask_logits: Tensor | None = None) -> Tensor:
        """As `CrossAttention`; the query counts for nothing but its mask."""
        values = level.values.flatten(1, 2)  # (B, S, C)
        if mask_logits is None:
            pooled = values.mean(1, keepdim=True).expand(-1, query.shape[1], -1)
        else:
            pooled = pooling_weights(mask_logits).to(values) @ values
        return self.out_proj(pooled)


class SpatiallyModulatedCrossAttention(Attention):
    """SMCA (arXiv 2101.07448): attention near a place that each query predicts, in each head by another Gaussian.

    The place is one in the frame, the same in all frames of a clip, and masks are not used. The Gaussian's widths are
    kept from 0, where the paper leaves them free.

    Args:
        dim: channels C.
        num_heads: heads M.
        dropout: share of the attention weights that are dropped, in training.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.centre = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 2))
        self.offsets = nn.Linear(dim, 2 * num_heads)
        self.widths = nn.Linear(dim, 2 * num_heads)
        for layer in (self.offsets, self.widths):  # all heads begin at the centre, with the same width
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def log_prior(self, query: Tensor, sizes: Shapes) -> Tensor:
        """Logarithm of the Gaussians at the pixels of a frame (section 3.2): queries (B, Q, C) -> (B, M, Q, N)."""
        heads = (self.num_heads, 2)
        dtype = position_dtype(query)
        centres = self.centre(query).sigmoid()[:, :, None] + self.offsets(query).unflatten(-1, heads)  # (B, Q, M, 2)
        widths = self.widths(query).unflatten(-1, heads).to(dtype).exp()  # of the frame's
        pixels = torch.cat([pixel_centres(*size, dtype=dtype, device=query.device) for size in sizes])
        distances = (pixels - centres.to(dtype)[..., None, :]) / widths[..., None, :]  # (B, Q, M, N, 2)
        return -distances.square().sum(-1).transpose(1, 2).to(query.dtype)

    def forward(self, query: Tensor, level: Level, mask_logits: Tensor | None = None) -> Tensor:
        """As `CrossAttention`, whatever the masks."""
        of_queries, of_keys, of_values = self.projections()
        k = F.linear(level.keys, *of_keys).flatten(1, 2)  # (B, S, C)
        v = F.linear(level.values, *of_values).flatten(1, 2)
        prior = self.log_prior(query, level.sizes).repeat(1, 1, 1, level.tokens.shape[1])  # (B, M, Q, S)
        return self.attend(F.linear(query, *of_queries), k, v, prior)

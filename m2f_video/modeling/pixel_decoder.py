"""Pixel decoder: multi-scale features and mask features from a backbone's maps (arXiv 2112.01527, section 3.2.2).

The maps at strides 32, 16 and 8 become one token sequence for a deformable-attention encoder (arXiv 2010.04159); its
stride-8 output, upsampled and added to the stride-4 map, becomes the mask features. Everything here is per frame.
`feature_pyramids.py` has what the paper compares it with.

B frames, N tokens of all levels, C channels, H W height and width of a level; levels are ordered coarse to fine.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.config import GROUP_NORM_GROUPS
from m2f_video.modeling.maps import GroupNorm, conv_norm, mask_projection, output_conv, resize
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.modeling.position_encoding import pixel_centres, position_dtype, sine_2d
from m2f_video.ops import Shapes

Maps = tuple[Tensor, ...]


@dataclass(frozen=True)
class PixelDecoderOutput:
    """What the pixel decoder makes of each frame.

    Attributes:
        mask_features: (B, mask_dim, H/4, W/4), multiplied with mask embeddings to give mask logits.
        multi_scale: strides 32, 16, 8, each (B, C, H_l, W_l), attended to by the transformer decoder.
        encoder_layers: tokens (B, N, C) after each encoder layer, when asked for; empty where there is no encoder.
    """

    mask_features: Tensor
    multi_scale: Maps
    encoder_layers: Maps | None = None


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels and a feed-forward network, both post-norm.

    Args:
        dim: channels C.
        ffn_dim: hidden width of the feed-forward network.
        num_heads: attention heads.
        num_points: sampling points per head and level.
        num_levels: levels.
        dropout: after the attention and after both layers of the feed-forward network, in training.
    """

    def __init__(
        self, *, dim: int, ffn_dim: int, num_heads: int, num_points: int, num_levels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Shapes) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C); positions (N, C) are added to the queries only, not to the values."""
        attended = self.self_attn(x + position, x, reference_points, spatial_shapes)
        x = self.self_attn_norm(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.ffn_norm(x + self.dropout(self.linear2(hidden)))


class MSDeformAttnPixelDecoder(nn.Module):
    """Deformable encoder over strides 32, 16, 8 and one feature-pyramid step to stride 4.

    Args:
        in_channels: channels of the backbone's maps at strides 4, 8, 16, 32.
        hidden_dim: width C of tokens and multi-scale features.
        mask_dim: channels of the mask features.
        num_layers: encoder layers; without any, levels are the projected maps.
        ffn_dim: hidden width of each layer's feed-forward network.
        num_heads: attention heads.
        num_points: sampling points per head and level.
        num_levels: levels that the encoder sees, from stride 32 on. Each finer one comes by a feature-pyramid step.
        dropout: dropout of the encoder, in training.
    """

    lateral_conv: nn.Sequential
    output_conv: nn.Sequential

    def __init__(
        self,
        *,
        in_channels: tuple[int, ...],
        hidden_dim: int,
        mask_dim: int,
        num_layers: int,
        ffn_dim: int,
        num_heads: int,
        num_points: int,
        num_levels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        encoded, others = in_channels[::-1][:num_levels], in_channels[::-1][num_levels:]
        self.input_projections = nn.ModuleList(_input_projection(channels, hidden_dim) for channels in encoded)
        self.level_embed = nn.Parameter(torch.randn(num_levels, hidden_dim))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(
                dim=hidden_dim,
                ffn_dim=ffn_dim,
                num_heads=num_heads,
                num_points=num_points,
                num_levels=num_levels,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.pyramid = ("_16", "_8", "")[num_levels - 1 :]  # names of the steps: the last is what the published one has
        for name, channels in zip(self.pyramid, others, strict=True):
            self.add_module(f"lateral_conv{name}", conv_norm(channels, hidden_dim, kernel_size=1))
            self.add_module(f"output_conv{name}", output_conv(hidden_dim))
        self.mask_projection = mask_projection(hidden_dim, mask_dim)

    def forward(self, maps: Maps, output_hidden: bool = False) -> PixelDecoderOutput:
        """Decode the maps of a batch of frames.

        Args:
            maps: (B, C_i, H_i, W_i) at strides 4, 8, 16, 32.
            output_hidden: also keep the tokens after every encoder layer.
        """
        coarse_to_fine = maps[::-1]
        encoded = zip(self.input_projections, coarse_to_fine, strict=False)  # the others' steps are below
        levels = tuple(projection(level) for projection, level in encoded)
        shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, N, C)
        levels, encoder_layers = self.encode(x, shapes, output_hidden)
        for name, level in zip(self.pyramid, coarse_to_fine[len(levels) :], strict=True):
            lateral, output = getattr(self, f"lateral_conv{name}"), getattr(self, f"output_conv{name}")
            levels = (*levels, output(lateral(level) + resize(levels[-1], level)))
        *multi_scale, finest = levels
        return PixelDecoderOutput(self.mask_projection(finest), tuple(multi_scale), encoder_layers)

    def encode(self, x: Tensor, shapes: Shapes, output_hidden: bool = False) -> tuple[Maps, Maps | None]:
        """Run the encoder on tokens (B, N, C) of levels of these shapes, (height, width) each.

        Returns:
            Each level as a map (B, C, H_l, W_l), channels last, and the tokens after every layer where asked for.
        """
        positions = self._positions(shapes, x)
        references = torch.cat([pixel_centres(*shape, dtype=position_dtype(x), device=x.device) for shape in shapes])
        encoder_layers = []
        for layer in self.layers:
            x = layer(x, positions, references, shapes)
            if output_hidden:
                encoder_layers.append(x)
        levels = zip(x.split([height * width for height, width in shapes], dim=1), shapes, strict=True)
        multi_scale = tuple(tokens.unflatten(1, shape).permute(0, 3, 1, 2) for tokens, shape in levels)
        return multi_scale, tuple(encoder_layers) if output_hidden else None

    def _positions(self, shapes: Shapes, x: Tensor) -> Tensor:
        """Sine positions plus level embedding: (N, C) in the dtype of `x`."""
        C, dtype = x.shape[-1], position_dtype(x)
        sines = [sine_2d(*shape, C, dtype=dtype, device=x.device).flatten(0, 1) for shape in shapes]
        levels = zip(sines, self.level_embed.to(dtype), strict=True)
        return torch.cat([sine + embedding for sine, embedding in levels]).to(x.dtype)


def _input_projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution with bias and group norm."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(cast("Tensor", convolution.bias))
    return nn.Sequential(convolution, GroupNorm(GROUP_NORM_GROUPS, out_channels))

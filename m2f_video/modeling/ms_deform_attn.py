"""Multi-scale deformable attention module (arXiv 2010.04159, section 4.1).

B frames, Q queries, N tokens of all levels, C channels, M heads, L levels, P points.
"""

import math

import torch
from torch import Tensor, nn

from m2f_video.ops import Backend, ms_deform_attn_from_offsets
from m2f_video.ops.conditions import only_values
from m2f_video.ops.linear import Linear, is_plain, linear


class MSDeformAttn(nn.Module):
    """Each query samples P points per head and level around its reference point and weighs them.

    Offsets and attention weights are linear in the query; no query-key products are made.

    Args:
        dim: channels C.
        num_heads: heads M.
        num_levels: feature levels L.
        num_points: points P per head and level.
        backend: implementation of the sampling, see `m2f_video.ops.ms_deform_attn`.

    Attributes:
        compiled: let `auto` be the compiled kernel for a CPU, see `m2f_video.ops.resolve_backend`.
    """

    def __init__(
        self, *, dim: int, num_heads: int, num_levels: int, num_points: int, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.backend: Backend = backend
        self.compiled = False
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(dim, 2 * samples)
        self.attention_weights = Linear(dim, samples)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from uniform weights and fixed offsets: head m looks in direction m, point p at distance p + 1."""
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(
                initial_offsets(self.num_heads, self.num_levels, self.num_points).flatten()
            )
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C), positions included.
            value: (B, N, C), the levels' pixels one after the other.
            reference_points: (Q, 2) as (x, y) in [0, 1]; at least float32, whose dtype the locations get.
            spatial_shapes: (height, width) of each level.

        Returns:
            (B, Q, C).
        """
        return self.output_proj(self.sample(query, value, reference_points, spatial_shapes))

    def sample(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """`forward` without the last projection: the heads' weighted sums of samples, (B, Q, C)."""
        B, Q, _ = query.shape
        L, M, P = self.num_levels, self.num_heads, self.num_points
        return ms_deform_attn_from_offsets(
            self.value_proj(value).view(B, -1, M, value.shape[-1] // M),
            spatial_shapes,
            reference_points,
            self._offsets(query).unflatten(2, (M, L, P)),
            self.attention_weights(query).view(B, Q, M, L, P),
            backend=self.backend,
            compiled=self.compiled,
        )

    def _offsets(self, query: Tensor) -> Tensor:
        """(B, Q, M L P, 2), in inference on a CPU all x before all y in memory: `embedding_bag` reads them faster."""
        layer = self.sampling_offsets
        plain = is_plain(layer) and layer.bias is not None and only_values(query, layer.weight, layer.bias)
        if self.compiled or not plain or query.device.type != "cpu":
            return layer(query).unflatten(2, (-1, 2))
        # what `pack` may have made for oneDNN has the rows in the other order, and is not used
        weight, bias = (torch.cat((parameter[0::2], parameter[1::2])) for parameter in (layer.weight, layer.bias))
        return linear(query, weight, bias).unflatten(2, (2, -1)).transpose(2, 3)


def initial_offsets(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """Initial sampling offsets (M, L, P, 2) as (x, y), in pixels: M directions, on squares of side 2(p + 1)."""
    angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
    direction = direction / direction.abs().amax(-1, keepdim=True)  # (M, 2)
    distance = torch.arange(1, num_points + 1, dtype=torch.float32)
    offsets = direction[:, None, None, :] * distance[None, None, :, None]
    return offsets.expand(num_heads, num_levels, num_points, 2)

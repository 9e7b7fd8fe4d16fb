"""Swin transformer backbone (arXiv 2103.14030) with a normalised map per stage, as Mask2Former uses it.

Works for any input size: patches, windows and pairs of pixels that do not fill up are padded with zeros. Padded tokens
take part in the attention of the windows they are in, as in the published model.

B frames, H W height and width in tokens, C channels, M heads, D channels of a head, S window side, N = S*S tokens of a
window, n windows of a frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHIFT_MASK = -100.0
"""Added to the logits of token pairs that a cyclic shift brought together; the published model's value."""


def round_up(size: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return (size + multiple - 1) // multiple * multiple


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad (B, H, W, C) at the bottom and right until H and W are multiples of `multiple`."""
    _, H, W, _ = x.shape
    return F.pad(x, (0, 0, 0, round_up(W, multiple) - W, 0, round_up(H, multiple) - H))


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C), H and W multiples of S -> (B*n, N, C)."""
    B, H, W, C = x.shape
    rows, columns = H // window_size, W // window_size
    x = x.view(B, rows, window_size, columns, window_size, C)
    return x.transpose(2, 3).reshape(B * rows * columns, window_size * window_size, C)


def window_merge(windows: Tensor, window_size: int, height: int, width: int) -> Tensor:
    """(B*n, N, C) -> (B, H, W, C), the inverse of `window_partition`."""
    C = windows.shape[-1]
    rows, columns = height // window_size, width // window_size
    B = windows.shape[0] // (rows * columns)
    x = windows.view(B, rows, columns, window_size, window_size, C)
    return x.transpose(2, 3).reshape(B, height, width, C)


def shifted_window_mask(height: int, width: int, window_size: int, shift: int, like: Tensor) -> Tensor:
    """Additive mask (n, N, N) that keeps shifted windows from mixing tokens that are not neighbours (section 3.2).

    After the cyclic shift the last windows hold tokens of up to four regions; pairs of different regions get
    `SHIFT_MASK`. `height` and `width` are the padded ones.
    """

    def regions(size: int) -> Tensor:
        position = torch.arange(size, device=like.device)
        return (position >= size - window_size).int() + (position >= size - shift).int()

    region = 3 * regions(height)[:, None] + regions(width)[None, :]
    windows = window_partition(region[None, :, :, None], window_size).squeeze(-1)  # (n, N)
    different = windows[:, :, None] != windows[:, None, :]
    return torch.zeros(different.shape, dtype=like.dtype, device=like.device).masked_fill_(different, SHIFT_MASK)


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window: (N, N), int64."""
    axis = torch.arange(window_size)
    row, column = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    row_offset = row[:, None] - row[None, :] + window_size - 1
    column_offset = column[:, None] - column[None, :] + window_size - 1
    return row_offset * (2 * window_size - 1) + column_offset


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position (equation 4).

    Args:
        dim: channels C.
        num_heads: heads M.
        window_size: side S of a window, in tokens.
        qkv_bias: whether queries, keys and values have a bias.
    """

    relative_position_index: Tensor

    def __init__(self, *, dim: int, num_heads: int, window_size: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            windows: (B*n, N, C).
            mask: (n, N, N) added to the logits of every frame's windows; None adds nothing.

        Returns:
            (B*n, N, C).
        """
        count, N, C = windows.shape
        query, key, value = self.qkv(windows).view(count, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias()[None]  # (1, M, N, N)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(count // mask.shape[0], 1, 1, 1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(output.transpose(1, 2).reshape(count, N, C))

    def relative_position_bias(self) -> Tensor:
        """(M, N, N)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """In training, leaves a branch out for a frame with probability `drop_prob`, else weighs it more (1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not (self.training and self.drop_prob):
            return x
        kept = 1 - self.drop_prob
        return x * (x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(kept) / kept)


class SwinBlock(nn.Module):
    """Windowed attention and MLP, both pre-norm and residual (figure 3b).

    Args:
        dim: channels C.
        num_heads: attention heads M.
        window_size: side S of a window, in tokens.
        shift: tokens by which the windows are shifted; 0 for regular windows.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path: probability of skipping a branch for a frame, in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim=dim, num_heads=num_heads, window_size=window_size, qkv_bias=qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        """Attention in the regular or shifted windows of a map (B, H, W, C)."""
        S, shift, (_, H, W, _) = self.window_size, self.shift, x.shape
        x = pad_to_multiple(x, S)
        _, padded_height, padded_width, _ = x.shape
        mask = None
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
            mask = shifted_window_mask(padded_height, padded_width, S, shift, like=x)
        x = window_merge(self.attn(window_partition(x, S), mask), S, padded_height, padded_width)
        if shift:
            x = x.roll((shift, shift), dims=(1, 2))
        return x[:, :H, :W]


class PatchMerging(nn.Module):
    """Join 2x2 neighbours into one token of twice the channels (section 3.1)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.reduction(self.norm(self.gather(x)))

    @staticmethod
    def gather(x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C), neighbours in the order (0, 0), (1, 0), (0, 1), (1, 1)."""
        x = pad_to_multiple(x, 2)
        B, H, W, C = x.shape
        return x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, embedded linearly and normalised."""

    def __init__(self, *, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, ceil(height/p), ceil(width/p), C) for patch size p."""
        (height, width), patch = frames.shape[-2:], self.patch_size
        frames = F.pad(frames, (0, round_up(width, patch) - width, 0, round_up(height, patch) - height))
        return self.norm(self.proj(frames).permute(0, 2, 3, 1))


class SwinStage(nn.Module):
    """Blocks with regular and shifted windows in turn, then patch merging where another stage follows."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window_size: int,
        drop_path: list[float],
        mlp_ratio: float,
        qkv_bias: bool,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=dim,
                num_heads=num_heads,
                window_size=window_size,
                shift=window_size // 2 if index % 2 else 0,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_path=rate,
            )
            for index, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim=dim) if downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> the stage's output (B, H, W, C) and what the next stage gets (merged, unless last)."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """Swin transformer that gives the normalised output of every stage.

    Args:
        embed_dim: channels of the first stage; each later stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of the attention windows, in tokens.
        patch_size: side of the first patches, in pixels.
        mlp_ratio: hidden width of each MLP over its input width.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over all blocks.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: int,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        self.patch_embed = PatchEmbedding(patch_size=patch_size, dim=embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            SwinStage(
                dim=dim,
                num_heads=heads,
                window_size=window_size,
                drop_path=[next(rates) for _ in range(depth)],
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                downsample=dim != self.channels[-1],
            )
            for dim, heads, depth in zip(self.channels, num_heads, depths, strict=True)
        )
        self.out_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.channels)

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Maps of all stages, fine to coarse.

        Args:
            frames: (B, 3, height, width), normalised.

        Returns:
            One (B, C_i, H_i, W_i) per stage, strides patch_size * 2^i (sizes rounded up).
        """
        x = self.patch_embed(frames)
        maps = []
        for stage, norm in zip(self.stages, self.out_norms, strict=True):
            output, x = stage(x)
            maps.append(norm(output).permute(0, 3, 1, 2))
        return tuple(maps)

"""Attention for inference on a CPU: in Swin's windows, and of queries to the pixels under their masks.

B frames or clips, M heads, D channels of a head, H W height and width of a map, N tokens of a window, Q queries,
S keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_video.ops import cpu_kernels

LANES = 16  # the kernels take multiples of it as D

SHIFT_MASK = -100.0
"""Added to the logits of token pairs that a cyclic shift brought together; the published model's value."""

PART_BYTES = 2**22
"""Of whole windows' queries, keys and values that are copied at a time: what a cache holds, and an allocator keeps."""


def kernels_run(dim: int, *tensors: Tensor | None) -> bool:
    """Whether the kernels know heads of `dim` channels and these tensors."""
    return dim % LANES == 0 and cpu_kernels.runs(*tensors)


def window_attention(
    qkv: Tensor, qkv_bias: Tensor | None, position_bias: Tensor, window_size: int, shift: int, compiled: bool
) -> Tensor:
    """Multi-head attention in the windows of a map that is not padded or shifted for it (arXiv 2103.14030).

    Windows that do not fill up are padded with tokens that have the bias as queries, keys and values, and are attended
    to. There are no derivatives.

    Args:
        qkv: projections (B, H, W, 3 M D) to queries, keys and values.
        qkv_bias: (3 M D,), the projection of the zeros that fill up windows; None where it has no bias.
        position_bias: (M, N, N), added to the logits of queries by keys; taken in the dtype of `qkv`.
        window_size: side of the windows, in tokens.
        shift: tokens by which the windows are shifted towards the bottom right.
        compiled: by the kernel, for which check `kernels_run` first; else by PyTorch.

    Returns:
        (B, H, W, M D).

    Raises:
        ValueError: shapes that do not fit together.
    """
    B, H, W, channels = qkv.shape
    M = position_bias.shape[0]
    dim = channels // (3 * M)
    if position_bias.shape != (M, window_size**2, window_size**2) or channels != 3 * M * dim:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} and position_bias {tuple(position_bias.shape)} do not fit windows of {window_size}"
        )
    if compiled and dim % LANES:
        raise ValueError(f"the kernel takes heads of a multiple of {LANES} channels, got {dim}")
    if not 0 <= shift < window_size:
        raise ValueError(f"the shift of windows of {window_size} must be from 0 to {window_size - 1}, got {shift}")
    if qkv_bias is not None and (qkv_bias.shape != (channels,) or qkv_bias.dtype != qkv.dtype):
        raise ValueError(
            f"qkv_bias must be ({channels},) in {qkv.dtype}, got {tuple(qkv_bias.shape)}, {qkv_bias.dtype}"
        )
    padding = qkv.new_zeros(channels) if qkv_bias is None else qkv_bias.contiguous()
    position_bias, output = position_bias.to(qkv.dtype), qkv.new_empty(B, H, W, M * dim)
    if not output.numel():
        return output
    if not compiled:
        whole = _attend_in_whole_windows(qkv, position_bias, window_size, shift, output)
        if whole != (-(-H // window_size), -(-W // window_size)):
            _attend_in_other_windows(qkv, padding, position_bias, window_size, shift, whole, output)
        return output
    qkv, bias = qkv.contiguous(), position_bias.permute(1, 2, 0).contiguous()  # as a table by relative positions has it
    cpu_kernels.call("window_attention", qkv, qkv, padding, bias, output, B, H, W, M, dim, window_size, shift)
    return output


def _attend_in_whole_windows(
    qkv: Tensor, position_bias: Tensor, window_size: int, shift: int, output: Tensor
) -> tuple[int, int]:
    """Write the attention of windows that the map fills and the shift did not tear; count their rows and columns."""
    B, H, W, channels = qkv.shape
    S = window_size
    rows, columns = max(H - shift, 0) // S, max(W - shift, 0) // S
    if not columns:
        return 0, 0

    def cut(maps: Tensor, part: slice) -> Tensor:
        """Windows (B, rows, columns, S, S, C), a view."""
        maps = maps[:, shift + part.start * S : shift + part.stop * S, shift : shift + columns * S]
        return maps.unflatten(1, (-1, S)).unflatten(3, (columns, S)).transpose(2, 3)

    step = max(PART_BYTES // (B * columns * S * S * channels * qkv.element_size()), 1)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        windows = cut(qkv, part)
        attended = _attend(windows.reshape(-1, S * S, channels), position_bias[None])
        cut(output, part).copy_(attended.view(*windows.shape[:-1], -1))
    return rows, columns


def _attend_in_other_windows(
    qkv: Tensor,
    padding: Tensor,
    position_bias: Tensor,
    window_size: int,
    shift: int,
    whole: tuple[int, int],
    output: Tensor,
) -> None:
    """Write the attention of the windows behind the whole rows and columns: padded ones, and those the shift tore."""
    B, H, W, _ = qkv.shape
    tokens, pieces = _tokens_of_windows(H, W, window_size, shift)
    other = torch.ones(tokens.shape[:2], dtype=torch.bool, device="cpu")
    other[: whole[0], : whole[1]] = False
    tokens, pieces = tokens[other], pieces[other]  # (n, N)
    there = tokens >= 0
    windows = qkv.flatten(1, 2)[:, tokens]  # (B, n, N, 3 M D)
    windows[:, ~there] = padding
    torn = pieces[:, None, :, None] != pieces[:, None, None, :]  # (n, 1, N, N)
    bias = position_bias + SHIFT_MASK * torn.to(position_bias.dtype)
    attended = _attend(windows.flatten(0, 1), bias.repeat(B, 1, 1, 1)).unflatten(0, (B, -1))
    output.flatten(1, 2)[:, tokens[there]] = attended[:, there]


def _tokens_of_windows(height: int, width: int, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    """Of all windows (rows, columns, N): numbers of the tokens, -1 for padding; and numbers of the pieces they are of.

    What a shift moves out of the map on one side comes back on the other, where it is another piece of a window.
    """
    S = window_size
    rows, columns = -(-height // S), -(-width // S)
    y = torch.arange(shift, shift + rows * S, device="cpu").view(rows, 1, S, 1)
    x = torch.arange(shift, shift + columns * S, device="cpu").view(1, columns, 1, S)
    pieces = 2 * (y >= rows * S) + (x >= columns * S)
    y, x = y % (rows * S), x % (columns * S)
    tokens = torch.where((y < height) & (x < width), y * width + x, -1)
    return tokens.flatten(2), pieces.flatten(2)


def _attend(qkv: Tensor, bias: Tensor) -> Tensor:
    """Queries, keys and values of windows (n, N, 3 M D) and biases of their logits (n or 1, M, N, N) -> (n, N, M D)."""
    query, key, value = qkv.unflatten(2, (3, bias.shape[1], -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention to the keys whose mask logit is not negative, or to all keys where there is none.

    Check `kernels_run` first.

    Args:
        query: (B, Q, M D).
        key: (B, S, M D).
        value: (B, S, M D).
        mask_logits: (B, Q, S).
        num_heads: M.

    Returns:
        (B, Q, M D).

    Raises:
        ValueError: shapes that do not fit together.
    """
    (B, Q, channels), S = query.shape, key.shape[1]
    dim = channels // num_heads
    if not key.shape == value.shape == (B, S, channels) or mask_logits.shape != (B, Q, S):
        shapes = [tuple(tensor.shape) for tensor in (query, key, value, mask_logits)]
        raise ValueError(f"query, key, value and mask logits do not fit together: {shapes}")
    if len({tensor.dtype for tensor in (query, key, value, mask_logits)}) > 1:
        raise ValueError("query, key, value and mask logits must be of one dtype")
    if S == 0 or channels != num_heads * dim or dim % LANES:
        raise ValueError(f"there must be keys, and heads of a multiple of {LANES} channels; got {S} keys of {channels}")
    query, key, value, output = query.contiguous(), key.contiguous(), value.contiguous(), query.new_empty(query.shape)
    mask_logits = mask_logits.contiguous()
    if output.numel():
        cpu_kernels.call("masked_attention", query, query, key, value, mask_logits, output, B, Q, S, num_heads, dim)
    return output

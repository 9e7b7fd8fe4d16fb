"""Attention by compiled kernels on a CPU: in Swin's windows, and of queries to the pixels under their masks.

B frames or clips, M heads, D channels of a head, H W height and width of a map, N tokens of a window, Q queries,
S keys.
"""

from torch import Tensor

from m2f_video.ops import cpu_kernels

LANES = 16  # the kernels take multiples of it as D


def kernels_run(dim: int, *tensors: Tensor | None) -> bool:
    """Whether the kernels know heads of `dim` channels and these tensors."""
    return dim % LANES == 0 and cpu_kernels.runs(*tensors)


def window_attention(
    qkv: Tensor, qkv_bias: Tensor | None, position_bias: Tensor, window_size: int, shift: int
) -> Tensor:
    """Multi-head attention in the windows of a map that is not cut up, padded or shifted for it (arXiv 2103.14030).

    Check `kernels_run` first.

    Args:
        qkv: projections (B, H, W, 3 M D) to queries, keys and values.
        qkv_bias: (3 M D,), the projection of the zeros that fill up windows; None where it has no bias.
        position_bias: (M, N, N), added to the logits of queries by keys; taken in the dtype of `qkv`.
        window_size: side of the windows, in tokens.
        shift: tokens by which the windows are shifted towards the bottom right.

    Returns:
        (B, H, W, M D).

    Raises:
        ValueError: shapes that do not fit together.
    """
    B, H, W, channels = qkv.shape
    M = position_bias.shape[0]
    dim = channels // (3 * M)
    if position_bias.shape != (M, window_size**2, window_size**2) or channels != 3 * M * dim or dim % LANES:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} and position_bias {tuple(position_bias.shape)} do not fit windows of {window_size}"
        )
    if not 0 <= shift < window_size:
        raise ValueError(f"the shift of windows of {window_size} must be from 0 to {window_size - 1}, got {shift}")
    if qkv_bias is not None and (qkv_bias.shape != (channels,) or qkv_bias.dtype != qkv.dtype):
        raise ValueError(
            f"qkv_bias must be ({channels},) in {qkv.dtype}, got {tuple(qkv_bias.shape)}, {qkv_bias.dtype}"
        )
    bias = position_bias.to(qkv.dtype).permute(1, 2, 0).contiguous()  # as it comes from a table by relative positions
    padding = qkv.new_zeros(channels) if qkv_bias is None else qkv_bias.contiguous()
    qkv, output = qkv.contiguous(), qkv.new_empty(B, H, W, M * dim)
    if output.numel():
        cpu_kernels.call("window_attention", qkv, qkv, padding, bias, output, B, H, W, M, dim, window_size, shift)
    return output


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

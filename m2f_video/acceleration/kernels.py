"""The compiled kernels as operators of PyTorch, `torch.ops.m2f_video`, and plain functions that call them.

They know values and no derivatives, on a CPU, in float32 and bfloat16. Nothing is checked here: whoever calls them, the
twins of this package, has done so. Each has a fake, so that what traces operators sees one node with its shapes.

B frames or clips, C channels, M heads, D channels of a head, H W height and width, N tokens, Q queries, S keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.acceleration import cpu_kernels
from m2f_video.ops import Shapes

Activation = Literal["relu", "gelu"]
_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2}  # the kernels' numbers

LANES = 16
"""Widths of hidden layers, outputs and heads are multiples of it."""

PANEL = 64
"""Outputs whose weights are read together."""

PACKED_ROWS = 2048
"""Rows of an input that weights are packed for by oneDNN; they serve any number."""

_LIBRARY = torch.library.Library("m2f_video", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Tensor | None]) -> Callable[[Callable[..., Tensor | None]], None]:
    """Make a function the implementation on a CPU of an operator."""

    def register(function: Callable[..., Tensor | None]) -> None:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"m2f_video::{name}", fake, lib=_LIBRARY)

    return register


def _like_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operator(
    "linear_layers(Tensor x, Tensor? before_weight, Tensor? before_bias, float before_eps, Tensor? first_weight, "
    "Tensor? first_bias, int hidden, Tensor weight, Tensor? bias, int outputs, int activation, Tensor? residual, "
    "Tensor? after_weight, Tensor? after_bias, float after_eps) -> Tensor",
    fake=lambda x, *others: x.new_empty(*x.shape[:-1], others[8]),
)
def _linear_layers(
    x: Tensor,
    before_weight: Tensor | None,
    before_bias: Tensor | None,
    before_eps: float,
    first_weight: Tensor | None,
    first_bias: Tensor | None,
    hidden: int,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    activation: int,
    residual: Tensor | None,
    after_weight: Tensor | None,
    after_bias: Tensor | None,
    after_eps: float,
) -> Tensor:
    x, inputs = x.contiguous(), x.shape[-1]
    output = x.new_empty(*x.shape[:-1], outputs)
    before, after = (before_weight, before_bias, before_eps), (after_weight, after_bias, after_eps)
    layers = (first_weight, first_bias, weight, bias, activation)
    residual = None if residual is None else residual.contiguous()
    sizes = x.numel() // inputs, inputs, hidden, outputs
    cpu_kernels.call("linear_layers", x, x, *before, *layers, residual, *after, output, *sizes)
    return output


@_operator(
    "window_attention(Tensor qkv, Tensor padding, Tensor bias, int window_size, int shift) -> Tensor",
    fake=lambda qkv, *_: qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3),
)
def _window_attention(qkv: Tensor, padding: Tensor, bias: Tensor, window_size: int, shift: int) -> Tensor:
    (B, H, W, channels), heads = qkv.shape, bias.shape[-1]
    output, dim = qkv.new_empty(B, H, W, channels // 3), channels // (3 * heads)
    cpu_kernels.call("window_attention", qkv, qkv, padding, bias, output, B, H, W, heads, dim, window_size, shift)
    return output


@_operator(
    "deformable_attention(Tensor value, int[] sizes, Tensor points, Tensor offsets, Tensor logits, int heads) "
    "-> Tensor",
    fake=lambda value, _sizes, _points, offsets, *_: value.new_empty(*offsets.shape[:2], value.shape[2]),
)
def _deformable_attention(
    value: Tensor, sizes: list[int], points: Tensor, offsets: Tensor, logits: Tensor, heads: int
) -> Tensor:
    (B, N, C), Q, L = value.shape, offsets.shape[1], len(sizes) // 2
    output, samples = value.new_empty(B, Q, C), logits.shape[2] // (heads * L)
    arguments = value, torch.tensor(sizes, dtype=torch.int64), points, offsets, logits, output
    cpu_kernels.call("ms_deform_attn_from_offsets", value, *arguments, B, N, Q, heads, C // heads, L, samples)
    return output


@_operator(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor mask_logits, int heads) -> Tensor",
    fake=_like_first,
)
def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor, heads: int) -> Tensor:
    (B, Q, C), S = query.shape, key.shape[1]
    output = query.new_empty(B, Q, C)
    arguments = query, key, value, mask_logits.contiguous(), output
    cpu_kernels.call("masked_attention", query, *arguments, B, Q, S, heads, C // heads)
    return output


@_operator(
    "layer_norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps) -> Tensor",
    fake=_like_first,
)
def _layer_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    output, C = torch.empty_like(x), x.shape[-1]
    cpu_kernels.call("layer_norm", x, x, branch, weight, bias, eps, output, x.numel() // C, C)
    return output


@_operator(
    "group_norm_(Tensor(a!) pixels, Tensor weight, Tensor bias, int groups, float eps, Tensor? coarse, bool relu) "
    "-> ()",
    fake=lambda *_: None,
)
def _group_norm_(
    pixels: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, coarse: Tensor | None, relu: bool
) -> None:
    B, H, W, C = pixels.shape
    added = (None, 0, 0, 0) if coarse is None else (coarse[0], coarse.stride(0), coarse.shape[1], coarse.shape[2])
    arguments = pixels, weight, bias, eps, pixels, B, H, W, C, groups, int(relu)
    cpu_kernels.call("group_norm", pixels, *arguments, *added)


@_operator(
    "winograd_convolution(Tensor pixels, Tensor weight, int outputs) -> Tensor",
    fake=lambda pixels, _weight, outputs: pixels.new_empty(*pixels.shape[:3], outputs),
)
def _winograd_convolution(pixels: Tensor, weight: Tensor, outputs: int) -> Tensor:
    output = pixels.new_empty(*pixels.shape[:3], outputs)
    cpu_kernels.call("winograd_convolution", pixels, pixels, weight, output, *pixels.shape, outputs)
    return output


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A linear layer's weight (O, I) in the order that a kernel, or oneDNN, reads, and its bias (O,)."""

    weight: Tensor
    bias: Tensor | None
    outputs: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "PackedLinear":
        """For the kernel where it is fast and knows the sizes, else for oneDNN."""
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        in_kernel = misfit(weight) is None and cpu_kernels.has_fast_products(weight.dtype)
        return cls(pack_weight(weight) if in_kernel else order_for_onednn(weight), bias, len(weight))

    def plus(self, bias: Tensor | None) -> "PackedLinear":
        """The same product plus another bias."""
        return replace(self, bias=bias)


def misfit(weight: Tensor) -> str | None:
    """Why the kernel does not know a layer of this weight (O, I); None where it does."""
    outputs, inputs = weight.shape
    if outputs % LANES or inputs % 2 or not weight.numel():
        return f"{inputs} inputs and {outputs} outputs; kernels take even numbers and multiples of {LANES}"
    return None


def pack_weight(weight: Tensor) -> Tensor:
    """Put the weight of a linear layer into the order in which the kernel reads it.

    Args:
        weight: (O, I), I even in bfloat16.

    Returns:
        (panels, I / step, PANEL, step), where step is 1 in float32 and 2 in bfloat16: inputs that are multiplied at a
        time. The last panel ends in zeros where PANEL does not divide O.
    """
    step = torch.float32.itemsize // weight.dtype.itemsize
    padded = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return padded.view(-1, PANEL, weight.shape[1] // step, step).transpose(1, 2).contiguous()


def order_for_onednn(weight: Tensor) -> Tensor:
    """A weight (O, I) in oneDNN's order, in which its operator does not have to put it in every call."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)


def onednn_linear(x: Tensor, layer: PackedLinear, activation: Activation | None = None) -> Tensor:
    """(..., I) -> (..., O) by oneDNN, in one pass over the result where PyTorch's own makes two in float32."""
    algorithm = "none" if activation == "gelu" else ""  # gelu's exact form
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, activation or "none", [], algorithm)


def onednn_product(x: Tensor, y: Tensor) -> Tensor:
    """(N, C) and (S, C) -> (N, S)."""
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def linear(
    x: Tensor,
    *layers: PackedLinear,
    activation: Activation | None = None,
    before: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    after: nn.LayerNorm | None = None,
) -> Tensor:
    """`after(residual + layers(before(x)))` of one layer, or of two with an activation between.

    The kernel takes a block of rows from the first norm to the last, hidden layer included, before it goes on to the
    next: one pass over memory.

    Args:
        x: (..., I).
        layers: one, or a hidden layer and the one behind it.
        activation: between two layers.
        before: norm over I, of pre-norm layers.
        residual: (..., O), what is added.
        after: norm over O, of post-norm layers.

    Returns:
        (..., O).
    """
    if any(layer.weight.is_mkldnn for layer in layers):
        x = x if before is None else layer_norm(x, before)
        for layer in layers:
            x = onednn_linear(x, layer, activation if layer is not layers[-1] else None)
        if after is not None:
            return layer_norm(x, after, residual)
        return x if residual is None else residual + x
    first, last = layers[0] if len(layers) > 1 else None, layers[-1]
    hidden = (None, None, 0) if first is None else (first.weight, first.bias, first.outputs)
    product = last.weight, last.bias, last.outputs, _ACTIVATIONS[activation]
    return torch.ops.m2f_video.linear_layers(x, *_values(before), *hidden, *product, residual, *_values(after))


def _values(norm: nn.LayerNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, float(norm.eps))


def layer_norm(x: Tensor, norm: nn.LayerNorm, branch: Tensor | None = None) -> Tensor:
    """`norm(x + branch)`, (..., C) each."""
    return torch.ops.m2f_video.layer_norm(x, branch, *_values(norm))


def window_attention(qkv: Tensor, padding: Tensor, bias: Tensor, window_size: int, shift: int) -> Tensor:
    """Attention in the windows of a map that is neither padded nor shifted for it (arXiv 2103.14030).

    Args:
        qkv: projections (B, H, W, 3 M D) to queries, keys and values, contiguous.
        padding: (3 M D,), the projection of the zeros that fill up windows, which are attended to.
        bias: (N, N, M), added to the logits of queries by keys.
        window_size: side of the windows, in tokens.
        shift: tokens by which the windows are shifted towards the bottom right; less than their side.

    Returns:
        (B, H, W, M D).
    """
    return torch.ops.m2f_video.window_attention(qkv, padding, bias, window_size, shift)


def deformable_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    heads: int,
) -> Tensor:
    """Sampling and weighing of `m2f_video.ops.ms_deform_attn_from_offsets`, all contiguous.

    Args:
        value: (B, N, M D).
        spatial_shapes: (height, width) of each of the L levels.
        points: (Q, 2), float32.
        offsets: (B, Q, M L P 2).
        logits: (B, Q, M L P).
        heads: M.

    Returns:
        (B, Q, M D).
    """
    sizes = [size for shape in spatial_shapes for size in shape]
    return torch.ops.m2f_video.deformable_attention(value, sizes, points, offsets, logits, heads)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor, heads: int) -> Tensor:
    """Attention to the keys whose mask logit is not negative, or to all keys where there is none.

    Args:
        query: (B, Q, M D), contiguous as keys and values are.
        key: (B, S, M D).
        value: (B, S, M D).
        mask_logits: (B, Q, S).
        heads: M.

    Returns:
        (B, Q, M D).
    """
    return torch.ops.m2f_video.masked_attention(query, key, value, mask_logits, heads)


def group_norm_(pixels: Tensor, norm: nn.GroupNorm, coarse: Tensor | None = None, relu: bool = False) -> Tensor:
    """Write `norm(pixels)` over a map, with a coarser map added, and a ReLU behind it, where asked for.

    Args:
        pixels: (B, H, W, C), contiguous.
        norm: over the C channels, a multiple of 32.
        coarse: (B, h, w, C), each map contiguous; resized bilinearly to H W.
        relu: whether to end with a ReLU.
    """
    torch.ops.m2f_video.group_norm_(pixels, norm.weight, norm.bias, norm.num_groups, float(norm.eps), coarse, relu)
    return pixels


def winograd_convolution(pixels: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """3x3 convolution of (B, H, W, I), contiguous, by a weight of `winograd.pack_weight` -> (B, H, W, O)."""
    return torch.ops.m2f_video.winograd_convolution(pixels, weight, outputs)

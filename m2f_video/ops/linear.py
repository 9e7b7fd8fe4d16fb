"""Linear layers and feed-forward networks, with the norms and sums around them, for inference on CPUs in few passes.

`F.linear` in float32 writes the bias before it multiplies and knows no activation: three passes over a result that, at
the sizes of a video frame, fits no cache. oneDNN's operator, which `torch.compile` puts in the place of linear layers
on CPUs, makes one pass of them, and its products are the faster ones on AMD processors. The compiled kernel takes a
block of rows from the norm before a layer to the norm after the sum with the residual, hidden layer included, before it
goes on to the next.
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.ops import cpu_kernels
from m2f_video.ops.conditions import has_hooks, only_values
from m2f_video.ops.norm import is_plain_norm, layer_norm, layer_norm_of_sum
from m2f_video.ops.packing import PackedWeight

Activation = Literal["relu", "gelu"]

HIDDEN_BYTES = 2**22
"""Of a feed-forward network's hidden layer that are made at a time: what a cache holds, and an allocator keeps."""

PACKED_ROWS = 2048
"""Rows of an input that weights are packed for by oneDNN; they serve any number."""

PANEL = 64
"""Outputs whose weights the compiled kernel reads together."""

LANES = 16
"""The compiled kernel takes multiples of it as widths of hidden layers and outputs."""

_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2}  # the compiled kernel's numbers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,); None adds nothing.
        packed: what `pack_weight` made of the weight, for the compiled kernel.

    Returns:
        (..., O).
    """
    if packed is not None and x.numel() and x.shape[-1] == weight.shape[1] and cpu_kernels.runs(x, weight, bias):
        return _in_kernel(x, [(packed, bias, len(weight))], None)
    if _runs_in_onednn(x, weight, bias):
        return _onednn_linear(x, weight, bias, None)
    return F.linear(x, weight, bias)


class PackingLayer(nn.Module):
    """What `Linear` and `PointwiseConv` share: a weight that may be packed.

    Attributes:
        compiled: let the compiled kernel compute it, with weights that `pack` made, see `m2f_video.ops.cpu_kernels`.
    """

    weight: Tensor
    compiled: bool = False
    _packed: PackedWeight | None = None

    def pack(self) -> None:
        """Keep a copy of the weight in the order that the kernel reads, or oneDNN, which would make it in every call.

        The copy is for inference on a CPU. It takes no part in the state dict, and is left unused once the weight has
        changed in value, dtype or device; but not where `weight.data` or a NumPy view of it was written to, of which
        PyTorch keeps no count: pack again then. A weight made in inference mode, whose changes are never counted, gets
        none.
        """
        weight = self.weight.detach().flatten(1)
        self._packed = packed_for_kernel(self.weight) if self.compiled else None
        if self._packed is None and _runs_in_onednn(weight, weight) and not weight.is_inference():
            self._packed = PackedWeight.of(self.weight, _in_order_of_onednn(weight))

    def offsets(self) -> Tensor | None:
        """The bias (O,), None where there is none."""
        return cast("Tensor | None", self.bias)

    def weight_for_onednn(self) -> Tensor:
        """(O, I), packed where it was and has not changed since."""
        packed = self._packed
        valid = packed is not None and packed.tensor.is_mkldnn and packed.fits(self.weight)
        return packed.tensor if valid and packed is not None else self.weight.flatten(1)

    def weight_for_kernel(self) -> Tensor | None:
        """As `pack_weight` made it; None where it did not, or the weight has changed since."""
        packed = self._packed
        valid = packed is not None and not packed.tensor.is_mkldnn and packed.fits(self.weight)
        return packed.tensor if valid and packed is not None else None

    def _rows(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        weight, bias = self.weight.flatten(1), self.offsets()
        packed = self.weight_for_kernel() if self.compiled else None
        if packed is None and _runs_in_onednn(x, weight, bias):
            return _onednn_linear(x, self.weight_for_onednn(), bias, None)
        return linear(x, weight, bias, packed)


class Linear(PackingLayer, nn.Linear):
    """`nn.Linear` by oneDNN, or by the compiled kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self._rows(x)


class PointwiseConv(PackingLayer, nn.Conv2d):
    """A 1x1 convolution, computed as a linear layer over pixels."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W), read without a copy where channels come last, as in tokens -> (B, O, H, W) of that kind."""
        return self._rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def project(
    x: Tensor,
    layer: Linear,
    *,
    before: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    drop: nn.Module | None = None,
    after: nn.LayerNorm | None = None,
) -> Tensor:
    """`after(residual + drop(layer(before(x))))`, of which all but the layer may be missing.

    Args:
        x: (..., I).
        layer: from I to O.
        before: norm over I, of pre-norm layers.
        residual: (..., O), what is added.
        drop: dropout or stochastic depth, in training.
        after: norm over O, of post-norm layers.

    Returns:
        (..., O).
    """
    if is_plain(layer) and _is_silent(drop) and _kernel_runs(x, layer, before=before, residual=residual, after=after):
        return _in_kernel(x, _parameters(layer), None, before=before, residual=residual, after=after)
    return _around(x, layer, _asks_for_kernels(layer), before, residual, drop, after)


def feed_forward(
    x: Tensor,
    first: Linear,
    second: Linear,
    activation: Activation,
    dropout: nn.Dropout | None = None,
    *,
    before: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    drop: nn.Module | None = None,
    after: nn.LayerNorm | None = None,
) -> Tensor:
    """`second(activation(first(x)))`, without a hidden layer of all tokens where no gradient needs it.

    What is around it, `after(residual + drop(...(before(x))))`, is as in `project`.

    Args:
        x: (..., I).
        first: from I to the hidden width.
        second: from the hidden width to O.
        activation: between them, `relu` or the exact `gelu`.
        dropout: of the hidden layer, in training.
        before: norm over I.
        residual: (..., O), what is added.
        drop: dropout or stochastic depth, in training.
        after: norm over O.

    Returns:
        (..., O).
    """
    plain = is_plain(first) and is_plain(second) and _is_silent(dropout)
    if plain and _is_silent(drop) and _kernel_runs(x, first, second, before=before, residual=residual, after=after):
        layers = _parameters(first, second)
        return _in_kernel(x, layers, activation, before=before, residual=residual, after=after)

    compiled = _asks_for_kernels(first)
    if plain and _is_silent(drop):
        others = (first.bias, second.weight, second.bias, residual, *_parameters_of(before), *_parameters_of(after))
        if _runs_in_onednn(x, first.weight, *others):
            return _in_parts(x, first, second, activation, compiled, before, residual, after)

    def network(x: Tensor) -> Tensor:
        hidden = _activate(first(x), activation)
        return second(hidden if dropout is None else dropout(hidden))

    return _around(x, network, compiled, before, residual, drop, after)


def _around(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    compiled: bool,
    before: nn.LayerNorm | None,
    residual: Tensor | None,
    drop: nn.Module | None,
    after: nn.LayerNorm | None,
) -> Tensor:
    output = branch(x if before is None else layer_norm(x, before, compiled))
    if drop is not None:
        output = drop(output)
    if residual is not None and after is not None:
        return layer_norm_of_sum(residual, output, after, compiled)
    if residual is not None:
        output = residual + output
    return output if after is None else layer_norm(output, after, compiled)


def _in_parts(
    x: Tensor,
    first: Linear,
    second: Linear,
    activation: Activation,
    compiled: bool,
    before: nn.LayerNorm | None,
    residual: Tensor | None,
    after: nn.LayerNorm | None,
) -> Tensor:
    """The feed-forward network by oneDNN, and what is around it, some rows at a time."""
    size = (*x.shape[:-1], second.out_features)
    tokens, added = x.reshape(-1, x.shape[-1]), None if residual is None else residual.expand(size).flatten(0, -2)
    rows = max(HIDDEN_BYTES // (first.out_features * x.element_size()), 1)
    weights = [first.weight_for_onednn()]
    # oneDNN sums a float32 hidden layer's many products one by one, with twice the error of what is behind `F.linear`
    by_onednn = x.dtype != torch.float32
    if by_onednn:
        weights.append(second.weight_for_onednn())
    if len(tokens) > rows:  # once, rather than in every call
        weights = [_in_order_of_onednn(weight) for weight in weights]

    def network(tokens: Tensor) -> Tensor:
        hidden = _onednn_linear(tokens, weights[0], first.bias, activation)
        if by_onednn:
            return _onednn_linear(hidden, weights[1], second.bias, None)
        return F.linear(hidden, second.weight, second.bias)

    output = x.new_empty(len(tokens), second.out_features)
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        part_added = None if added is None else added[part]
        output[part] = _around(tokens[part], network, compiled, before, part_added, None, after)
    return output.view(size)


def _in_order_of_onednn(weight: Tensor) -> Tensor:
    return weight if weight.is_mkldnn else torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)


def packed_for_kernel(weight: Tensor) -> PackedWeight | None:
    """A weight (O, I, ...) as the compiled kernel reads it; None where that is of no use, or not for inference only."""
    matrix = weight.detach().flatten(1)
    return None if matrix.is_inference() or not _kernel_takes(matrix) else PackedWeight.of(weight, pack_weight(matrix))


def pack_weight(weight: Tensor) -> Tensor:
    """Put the weight of a linear layer into the order in which the compiled kernel reads it.

    Args:
        weight: (O, I), I even in bfloat16.

    Returns:
        (panels, I / step, PANEL, step), where step is 1 in float32 and 2 in bfloat16: inputs that are multiplied at a
        time. The last panel ends in zeros where PANEL does not divide O.
    """
    step = torch.float32.itemsize // weight.dtype.itemsize
    padded = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return padded.view(-1, PANEL, weight.shape[1] // step, step).transpose(1, 2).contiguous()


def _kernel_takes(weight: Tensor) -> bool:
    """Whether the compiled kernel knows layers of this weight (O, I), and is fast where we are."""
    outputs, inputs = weight.shape
    return (
        weight.device.type == "cpu"
        and weight.dtype in cpu_kernels.DTYPES
        and (outputs % LANES, inputs % 2) == (0, 0)
        and min(outputs, inputs) > 0
        and cpu_kernels.has_fast_products(weight.dtype)
    )


def _kernel_runs(
    x: Tensor,
    *layers: PackingLayer,
    before: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    after: nn.LayerNorm | None = None,
) -> bool:
    """Whether the kernel computes these layers, which were packed for it, one after the other on this input."""
    if not all(layer.compiled and layer.weight_for_kernel() is not None for layer in layers) or x.numel() == 0:
        return False
    inputs, outputs = layers[0].weight.shape[1], layers[-1].weight.shape[0]
    if x.shape[-1] != inputs or (residual is not None and residual.shape != (*x.shape[:-1], outputs)):
        return False  # and PyTorch says what is wrong, or broadcasts
    if len(layers) > 1 and layers[0].weight.shape[0] != layers[1].weight.shape[1]:
        return False
    if before is not None and not is_plain_norm(before, inputs):
        return False
    if after is not None and not is_plain_norm(after, outputs):
        return False
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.offsets())]
    return cpu_kernels.runs(x, residual, *_parameters_of(before), *_parameters_of(after), *parameters)


def _in_kernel(
    x: Tensor,
    layers: list[tuple[Tensor | None, Tensor | None, int]],
    activation: Activation | None,
    *,
    before: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    after: nn.LayerNorm | None = None,
) -> Tensor:
    """One layer or two, of a packed weight, a bias and outputs each."""
    *first, (weight, bias, outputs) = layers
    hidden_weight, hidden_bias, hidden = first[0] if first else (None, None, 0)
    inputs, output = x.shape[-1], x.new_empty(*x.shape[:-1], outputs)
    products = hidden_weight, _contiguous(hidden_bias), weight, _contiguous(bias), _ACTIVATIONS[activation]
    around = _contiguous(residual), *_values(after), output
    sizes = x.numel() // inputs, inputs, hidden, outputs
    cpu_kernels.call("linear_layers", x, x.contiguous(), *_values(before), *products, *around, *sizes)
    return output


def _parameters(*layers: PackingLayer) -> list[tuple[Tensor | None, Tensor | None, int]]:
    return [(layer.weight_for_kernel(), layer.offsets(), len(layer.weight)) for layer in layers]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _values(norm: nn.LayerNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, float(norm.eps))


def _parameters_of(norm: nn.LayerNorm | None) -> tuple[Tensor | None, ...]:
    return () if norm is None else (norm.weight, norm.bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is its function of weight and bias: not replaced, hooked, pruned or parametrised."""
    return type(layer) is Linear and not has_hooks(layer)


def _asks_for_kernels(layer: nn.Module) -> bool:
    return isinstance(layer, PackingLayer) and layer.compiled


def _is_silent(drop: nn.Module | None) -> bool:
    """Whether a dropout, or timm's stochastic depth, drops nothing."""
    if drop is None:
        return True
    return type(drop).__name__ in ("Dropout", "DropPath") and not (drop.training or has_hooks(drop))


def _runs_in_onednn(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether oneDNN's operator does the same as `F.linear`: it knows no derivatives, no autocast and no tracing."""
    tensors = [tensor for tensor in (x, weight, *others) if tensor is not None]
    if x.device.type != "cpu" or not only_values(*tensors):  # the compiler chooses for itself
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if any(tensor.dtype != x.dtype for tensor in tensors) or x.numel() == 0 or x.shape[-1] != weight.shape[-1]:
        return False  # and `F.linear` says what is wrong
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    algorithm = "none" if activation == "gelu" else ""  # gelu's exact form
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], algorithm)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    return F.relu(x) if activation == "relu" else F.gelu(x)

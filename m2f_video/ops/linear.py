"""Linear layers and feed-forward networks, by oneDNN on CPUs when no gradient is asked for.

`F.linear` in float32 writes the bias before it multiplies and knows no activation: three passes over a result that, at
the sizes of a video frame, fits no cache. oneDNN's operator, which `torch.compile` puts in the place of linear layers
on CPUs, makes one pass of them, and its products are the faster ones on AMD processors.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

Activation = Literal["relu", "gelu"]

HIDDEN_BYTES = 2**22
"""Of a feed-forward network's hidden layer that are made at a time: what a cache holds, and an allocator keeps."""

PACKED_ROWS = 2048
"""Rows of an input that weights are packed for; they serve any number."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,); None adds nothing.

    Returns:
        (..., O).
    """
    if _runs_in_onednn(x, weight, bias):
        return _onednn_linear(x, weight, bias, None)
    return F.linear(x, weight, bias)


@dataclass(frozen=True, eq=False)
class _Packed:
    """A weight in the order that a kernel reads. Copies of a module lose it.

    Attributes:
        tensor: the weight in that order.
        version: of the weight's state that it was made of.
        source: that weight, held so that none that takes its place comes to lie at its address.
    """

    tensor: Tensor
    version: tuple[int, int]
    source: Tensor

    @classmethod
    def of(cls, weight: Tensor, tensor: Tensor) -> "_Packed":
        return cls(tensor, _version(weight), weight.detach())

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    _packed: _Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if _runs_in_onednn(x, self.weight, self.bias):
            return _onednn_linear(x, self.weight_in_order(), self.bias, None)
        return F.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Keep a copy of the weight in the order oneDNN reads, which it would make in every call.

        The copy is for inference on a CPU. It takes no part in the state dict, and is left unused once the weight has
        changed in value, dtype or device; but not where `weight.data` or a NumPy view of it was written to, of which
        PyTorch keeps no count: pack again then. A weight made in inference mode, whose changes are never counted, gets
        none.
        """
        self._packed = None
        weight = self.weight.detach()
        if _runs_in_onednn(weight, weight) and not weight.is_inference():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
            self._packed = _Packed.of(self.weight, packed)

    def weight_in_order(self) -> Tensor:
        """The weight as oneDNN is to read it: packed, where it was and has not changed since."""
        packed = self._packed
        return self.weight if packed is None or packed.version != _version(self.weight) else packed.tensor


def _version(weight: Tensor) -> tuple[int, int]:
    """Changes with the weight's values, in place or by new memory; -1 stands for changes that are not counted."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, computed as a linear layer over pixels."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W), read without a copy where channels come last, as in tokens -> (B, O, H, W) of that kind."""
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def feed_forward(
    x: Tensor, first: Linear, second: Linear, activation: Activation, dropout: nn.Dropout | None = None
) -> Tensor:
    """`second(activation(first(x)))`, without a hidden layer of all tokens where no gradient needs it.

    Args:
        x: (..., I).
        first: from I to the hidden width.
        second: from the hidden width to O.
        activation: between them, `relu` or the exact `gelu`.
        dropout: of the hidden layer, in training.

    Returns:
        (..., O).
    """
    drops = dropout is not None and dropout.training and dropout.p > 0
    plain = _is_plain(first) and _is_plain(second) and not drops
    if not (plain and _runs_in_onednn(x, first.weight, first.bias, second.weight, second.bias)):
        hidden = _activate(first(x), activation)
        return second(hidden if dropout is None else dropout(hidden))
    tokens = x.reshape(-1, x.shape[-1])
    rows = max(HIDDEN_BYTES // (first.out_features * x.element_size()), 1)
    output = x.new_empty(len(tokens), second.out_features)
    first_weight, second_weight = first.weight_in_order(), second.weight_in_order()
    for start in range(0, len(tokens), rows):
        hidden = _onednn_linear(tokens[start : start + rows], first_weight, first.bias, activation)
        output[start : start + rows] = _onednn_linear(hidden, second_weight, second.bias, None)
    return output.view(*x.shape[:-1], second.out_features)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is its function of weight and bias: not replaced, hooked, pruned or parametrised."""
    return type(layer) is Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


def _runs_in_onednn(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether oneDNN's operator does the same as `F.linear`: it knows no derivatives, no autocast and no tracing."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # the compiler chooses for itself
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    tensors = [tensor for tensor in (x, weight, *others) if tensor is not None]
    if needs_gradient(*tensors) or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    if any(tensor.dtype != x.dtype for tensor in tensors) or x.numel() == 0 or x.shape[-1] != weight.shape[-1]:
        return False  # and `F.linear` says what is wrong
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the derivative by one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    algorithm = "none" if activation == "gelu" else ""  # gelu's exact form
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], algorithm)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    return F.relu(x) if activation == "relu" else F.gelu(x)

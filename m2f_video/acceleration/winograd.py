"""3x3 convolutions by fewer multiplications, for inference on a CPU (arXiv 1509.09308).

F(4x4, 3x3) multiplies 36 numbers where a convolution multiplies 144: a tile of 6x6 inputs and the 3x3 weights are both
transformed, multiplied number by number, summed over channels and transformed back into a tile of 4x4 results.

Its rounding errors are known to be large. Here they are no larger than oneDNN's convolution has from 128 channels on,
and about twice as large at 16, by two means: the polynomials are evaluated at points whose powers are near each other
(the usual ones, 1 and 2, have over twice the error), and the sums over channels, which round the most, are made in
parts. All of it is in float32, of maps in bfloat16 too, where it still takes less time than bfloat16 products.

O I output and input channels, S transformed size 6.
"""

import torch
from torch import Tensor, nn

POINTS = (0.0, 0.6875, -0.6875, 1.5, -1.5)
"""Where polynomials are evaluated, beside infinity; the kernel has their transforms of inputs and results."""

PANEL = 32
"""Output channels that the kernel computes at a time."""


def pack_weight(weight: Tensor) -> Tensor:
    """Transform the weights of a convolution and put them into the order in which the kernel reads them.

    Args:
        weight: (O, I, 3, 3).

    Returns:
        (panels, S * S, I, PANEL) in float32, transformed in float64; the last panel ends in zeros where PANEL does not
        divide O.
    """
    transform = torch.tensor([_row(point) for point in POINTS] + [[0.0, 0.0, 1.0]], dtype=torch.float64)
    transformed = torch.einsum("sy,oiyx,tx->stio", transform, weight.double(), transform).flatten(0, 1)
    padded = nn.functional.pad(transformed.float(), (0, -weight.shape[0] % PANEL))
    return padded.unflatten(-1, (-1, PANEL)).permute(2, 0, 1, 3).contiguous()


def _row(point: float) -> list[float]:
    """A point's powers, divided by its differences from the other points: the kernel's transforms leave that out."""
    divisor = 1.0
    for other in POINTS:
        divisor *= point - other if other != point else 1.0
    return [1 / divisor, point / divisor, point**2 / divisor]

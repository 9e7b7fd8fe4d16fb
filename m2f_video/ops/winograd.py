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

from m2f_video.ops import cpu_kernels
from m2f_video.ops.packing import PackedWeight

POINTS = (0.0, 0.6875, -0.6875, 1.5, -1.5)
"""Where polynomials are evaluated, beside infinity; the kernel has their transforms of inputs and results."""

PANEL = 32
"""Output channels that the kernel computes at a time."""


class WinogradConv(nn.Conv2d):
    """`nn.Conv2d` of kernel size 3, padding 1 and no bias, by fewer multiplications where `pack` made it so.

    Args:
        in_channels: of the input. The kernel is for multiples of 16, of inputs and outputs.
        out_channels: of the result.

    Attributes:
        compiled: let a compiled kernel compute it, for inference on a CPU, with weights that `pack` made.
    """

    _packed: PackedWeight | None = None

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.compiled = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H, W); the kernel reads channels that come last without a copy, and returns such.

        In the kernel, NaN and infinity spread from the results that depend on them to others of their 4x4 tiles.
        """
        packed = self._packed
        if packed is None or not self._runs_in_kernel(x) or not packed.fits(self.weight):
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1).contiguous()
        output = pixels.new_empty(*pixels.shape[:3], self.out_channels)
        cpu_kernels.call(
            "winograd_convolution", pixels, pixels, packed.tensor, output, *pixels.shape, self.out_channels
        )
        return output.permute(0, 3, 1, 2)

    def pack(self) -> None:
        """Keep a transformed copy of the weight, four times its size, for the kernel, if it is asked for.

        As with `m2f_video.ops.linear.Linear.pack`, it takes no part in the state dict, and is left unused once the
        weight has changed. A weight that the kernel does not take, or that was made in inference mode, gets none.
        """
        self._packed = None
        weight, channels = self.weight.detach(), (self.in_channels, self.out_channels)
        known = (
            self.compiled
            and weight.device.type == "cpu"
            and weight.dtype in cpu_kernels.DTYPES
            and not weight.is_inference()
        )
        if known and all(number % 16 == 0 for number in channels):
            self._packed = PackedWeight.of(self.weight, pack_weight(weight))

    def _runs_in_kernel(self, x: Tensor) -> bool:
        if not self.compiled or not cpu_kernels.runs(x, self.weight):
            return False
        return x.dim() == 4 and x.shape[1] == self.in_channels and x.numel() > 0  # else the plain one has its say


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

"""Copies of weights in the order that a kernel reads them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedWeight:
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
    def of(cls, weight: Tensor, tensor: Tensor) -> "PackedWeight":
        """Remember what `tensor` was made of."""
        return cls(tensor, _version(weight), weight.detach())

    def fits(self, weight: Tensor) -> bool:
        """Whether the weight is still the one that was packed, and has its values."""
        return self.version == _version(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def _version(weight: Tensor) -> tuple[int, int]:
    """Changes with the weight's values, in place or by new memory; -1 stands for changes that are not counted."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version

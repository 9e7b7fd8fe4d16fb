"""How close numbers must be, by the one table of tolerances that the parity check uses too."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from m2f_video.parity import TOLERANCES


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||; against a reference of zeros, 0 where ours are zeros too."""
    difference = (ours.detach().double() - reference.double()).norm()
    return float(difference / reference.double().norm()) if difference else 0.0


def differences(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, object]:
    """What does not agree, by name: bool and integer tensors exactly, others within their dtype's tolerance."""
    found: dict[str, object] = dict.fromkeys(ours.keys() ^ reference.keys(), "on one side only")
    for name in ours.keys() & reference.keys():
        mine, expected = ours[name], reference[name]
        if mine.shape != expected.shape or mine.dtype != expected.dtype:
            found[name] = (mine.shape, mine.dtype, expected.shape, expected.dtype)
        elif not expected.is_floating_point():
            if different := int((mine != expected).sum()):
                found[name] = f"{different} of {expected.numel()} differ"
        elif not (error := relative_error(mine, expected)) <= TOLERANCES[expected.dtype]:
            found[name] = error
    return found


def assert_close(ours: Tensor, reference: Tensor) -> None:
    found = differences({"all": ours}, {"all": reference})
    assert found == {}


def identical(model: nn.Module, expected: nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit."""
    ours, theirs = model.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )

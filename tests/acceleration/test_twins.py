"""Every twin computes what its plain module computes."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2f_video.acceleration import cpu_kernels
from m2f_video.acceleration.swap import Fused, fuse
from m2f_video.acceleration.twins import TWINS
from m2f_video.modeling.cross_attention import CrossAttention, Level
from m2f_video.modeling.maps import GroupNorm
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer, MSDeformAttnPixelDecoder
from m2f_video.modeling.position_encoding import pixel_centres
from m2f_video.modeling.swin import Mlp, PatchMerging, SwinBlock
from m2f_video.modeling.transformer_decoder import DecoderLayer, MaskProduct
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs a C++ compiler")

SHAPES = ((2, 3), (4, 5), (7, 9))
TOKENS = sum(height * width for height, width in SHAPES)


def level(batch: int, frames: int, pixels: int, dim: int) -> Level:
    shapes = ((batch, frames, pixels, dim), (dim,), (pixels, dim), (frames, dim))
    return Level(((1, pixels),), *(torch.randn(shape) for shape in shapes))


def maps(*sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size).to(memory_format=torch.channels_last) for size in sizes)


def block(shift: int = 0, window: int = 3, bias: bool = True) -> SwinBlock:
    return SwinBlock(dim=32, num_heads=2, window_size=window, shift=shift, qkv_bias=bias)


def encoder_layer() -> DeformableEncoderLayer:
    return DeformableEncoderLayer(dim=64, ffn_dim=32, num_heads=4, num_points=4)


def pixel_decoder() -> MSDeformAttnPixelDecoder:
    sizes = {"hidden_dim": 64, "mask_dim": 32, "num_layers": 1, "ffn_dim": 32, "num_heads": 4, "num_points": 4}
    return MSDeformAttnPixelDecoder(in_channels=(32, 64, 96, 128), **sizes)


def points() -> Tensor:
    return torch.cat([pixel_centres(height, width, dtype=torch.float32) for height, width in SHAPES])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "SwinBlock": (block, lambda: (torch.randn(1, 7, 8, 32),)),
    "SwinBlock, shifted": (lambda: block(1), lambda: (torch.randn(2, 5, 4, 32),)),
    "SwinBlock, other windows, no bias": (lambda: block(2, 5, False), lambda: (torch.randn(3, 11, 3, 32),)),
    "SwinBlock, not contiguous": (lambda: block(1), lambda: (torch.randn(2, 32, 5, 4).permute(0, 2, 3, 1),)),
    "Mlp": (lambda: Mlp(dim=32, hidden_dim=48), lambda: (torch.randn(2, 3, 5, 32),)),
    "PatchMerging": (lambda: PatchMerging(dim=32), lambda: (torch.randn(2, 5, 7, 32),)),
    "MSDeformAttn": (
        lambda: MSDeformAttn(dim=64, num_heads=4, num_levels=3, num_points=4),
        lambda: (torch.randn(2, 9, 64), torch.randn(2, TOKENS, 64), torch.rand(9, 2), SHAPES),
    ),
    "DeformableEncoderLayer": (
        encoder_layer,
        lambda: (torch.randn(2, TOKENS, 64), torch.randn(TOKENS, 64), points(), SHAPES),
    ),
    "GroupNorm": (lambda: GroupNorm(32, 64), lambda: (torch.randn(2, 5, 7, 64).permute(0, 3, 1, 2),)),
    "MSDeformAttnPixelDecoder": (
        pixel_decoder,
        lambda: (maps((2, 32, 9, 11), (2, 64, 5, 6), (2, 96, 3, 3), (2, 128, 2, 3)),),
    ),
    "CrossAttention": (
        lambda: CrossAttention(dim=64, num_heads=4),
        lambda: (torch.randn(2, 5, 64), level(2, 1, 7, 64), torch.randn(2, 5, 7)),
    ),
    "DecoderLayer": (
        lambda: DecoderLayer(dim=64, num_heads=4, ffn_dim=32),
        lambda: (torch.randn(2, 5, 64), torch.randn(5, 64), level(2, 1, 7, 64), torch.randn(2, 5, 7)),
    ),
    "DecoderLayer, several frames": (
        lambda: DecoderLayer(dim=64, num_heads=4, ffn_dim=32),
        lambda: (torch.randn(1, 5, 64), torch.randn(5, 64), level(1, 3, 7, 64), torch.randn(1, 5, 21) - 2),
    ),
    "MaskProduct": (MaskProduct, lambda: (torch.randn(2, 5, 8), torch.randn(2, 3, 8, 4, 6))),
    "Linear": (lambda: nn.Linear(30, 48), lambda: (torch.randn(2, 3, 30),)),
    "Linear of one row, no bias": (lambda: nn.Linear(30, 48, bias=False), lambda: (torch.randn(30),)),
    "Linear of odd widths": (lambda: nn.Linear(31, 41), lambda: (torch.randn(2, 31),)),
    "Conv2d, 1x1": (lambda: nn.Conv2d(30, 48, 1), lambda: (torch.randn(2, 30, 3, 5),)),
    "Conv2d, 1x1 of odd widths": (lambda: nn.Conv2d(31, 41, 1, bias=False), lambda: (torch.randn(2, 31, 3, 5),)),
    "Conv2d, 3x3": (lambda: nn.Conv2d(32, 48, 3, padding=1, bias=False), lambda: (torch.randn(2, 32, 5, 7),)),
    "LayerNorm": (lambda: nn.LayerNorm(48), lambda: (torch.randn(2, 3, 48),)),
}


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Everything but reference points, which keep float32."""
    if isinstance(value, Level):
        return Level(value.sizes, *(tensor.to(dtype) for tensor in list(vars(value).values())[1:]))
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.shape[-1] != 2 else value


def flat(output: Any) -> Tensor:
    tensors = [output] if isinstance(output, Tensor) else [output.mask_features, *output.multi_scale]
    return torch.cat([tensor.float().flatten() for tensor in tensors])


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_twin_equals_its_plain_module(
    case: str, dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[case]
    plain = make().eval()
    for parameter in plain.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    arguments = inputs()
    exact = flat(plain(*arguments)).detach()
    arguments, plain = tuple(cast(value, dtype) for value in arguments), plain.to(dtype)
    twin, ran = copy.deepcopy(plain), []
    fuse(twin, [each for each in TWINS if kernels or not each.needs_kernels])
    for each in TWINS:
        compute = each.fused
        monkeypatch.setattr(each, "fused", lambda *args, f=compute: (ran.append("ran"), f(*args))[1])
    with torch.no_grad():
        expected, ours = flat(plain(*arguments)), flat(twin(*arguments))
    has_twin = any(isinstance(module, Fused) for module in twin.modules())
    assert bool(ran) == has_twin
    assert has_twin or not kernels
    if dtype == torch.float32:
        assert relative_error(ours, exact) < 2e-6
    else:
        assert relative_error(ours, exact) < 1.5 * relative_error(expected, exact) + 2e-3


OTHERS: dict[str, Callable[[Tensor], object]] = {
    "none": lambda x: None,
    "another type": lambda x: x.double(),
    "whole numbers": lambda x: x.long(),
    "empty": lambda x: x[:0],
    "fewer channels": lambda x: x[..., :-1],
    "one more axis": lambda x: x[None],
    "one axis less": lambda x: x[0],
    "twice the batch": lambda x: torch.cat([x, x]),
    "less of the batch": lambda x: x[:1],
    "turned": lambda x: x.transpose(0, -1),
    "sparse": lambda x: x.to_sparse(),
    "wants gradients": lambda x: x.clone().requires_grad_(x.is_floating_point()),
    "view": lambda x: torch.stack([x, x], -1)[..., 0],
    "broadcast": lambda x: x[:1].expand_as(x),
}


def with_one_changed(value: Any, change: Callable[[Tensor], object]) -> Iterator[Any]:
    """The arguments, with each of the tensors in them changed in turn."""
    if isinstance(value, Tensor):
        yield change(value)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            for changed in with_one_changed(item, change):
                yield (*value[:index], changed, *value[index + 1 :])
    elif isinstance(value, Level):
        for name, item in vars(value).items():
            for changed in with_one_changed(item, change) if isinstance(item, Tensor) else ():
                yield replace(value, **{name: changed})


def outcome(module: nn.Module, arguments: tuple[Any, ...], gradients: bool) -> Any:
    """What a call gives, or what it says is wrong."""
    try:
        with torch.set_grad_enabled(gradients):
            result = module(*arguments)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return type(error), str(error)
    return flat(result).detach()


@pytest.mark.parametrize("case", CASES)
def test_whatever_is_given_a_twin_does_as_its_plain_module(case: str) -> None:
    """Values, errors and their messages are the plain module's."""
    torch.manual_seed(0)
    make, inputs = CASES[case]
    plain = make().eval()
    twin = copy.deepcopy(plain)
    fuse(twin, TWINS)
    arguments = inputs()
    variants = [("too few", arguments[:-1]), ("too many", (*arguments, None, None))]
    for name, change in OTHERS.items():
        variants += [(name, variant) for variant in with_one_changed(arguments, change)]
    for name, variant in variants:
        for gradients in (False, True):
            expected, ours = outcome(plain, variant, gradients), outcome(twin, variant, gradients)
            if isinstance(expected, Tensor) and isinstance(ours, Tensor):
                assert ours.shape == expected.shape, name
                assert relative_error(ours, expected) < 1e-5, name
            else:
                assert repr(ours) == repr(expected), name


def test_what_is_not_a_number_stays_where_it_was() -> None:
    torch.manual_seed(0)
    twin = block(1).eval()
    fuse(twin, TWINS)
    x = torch.randn(1, 9, 9, 32)
    with torch.no_grad():
        clean = twin(x)
        x[0, 4, 4] = torch.nan
        spoilt = twin(x)
    broken = spoilt.isnan().any(-1)[0]
    assert broken.any()
    assert broken.sum() <= 9  # the tokens of its window
    assert torch.equal(spoilt[0][~broken], clean[0][~broken])

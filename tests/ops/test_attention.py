"""Compiled attention kernels against PyTorch's operators in float64."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from m2f_video.modeling.swin import SwinBlock, SwinStage, WindowAttention, round_up, shifted_window_mask
from m2f_video.modeling.transformer_decoder import Attention
from m2f_video.ops import cpu_kernels
from m2f_video.ops.attention import kernels_run, masked_attention, window_attention

pytestmark = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs Linux and a C++ compiler")
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were called."""
    names: list[str] = []
    call = cpu_kernels.call
    monkeypatch.setattr(cpu_kernels, "call", lambda name, *args: (names.append(name), call(name, *args)))
    return names


def close(ours: Tensor, expected: Tensor) -> None:
    bound = TOLERANCES[ours.dtype] * max(expected.abs().max().item(), 1.0)
    assert_close(ours.double(), expected, rtol=0, atol=bound)


def attention(*, dtype: torch.dtype, window_size: int, num_heads: int = 2, dim: int = 32, bias: bool = True):
    torch.manual_seed(0)
    module = WindowAttention(dim=num_heads * dim, num_heads=num_heads, window_size=window_size, qkv_bias=bias)
    torch.nn.init.normal_(module.relative_position_bias_table)
    if bias:
        torch.nn.init.normal_(module.qkv.bias)
    return module.requires_grad_(False).to(dtype)


@DTYPES
@pytest.mark.parametrize(
    ("window_size", "height", "width", "shift", "batch"),
    [(7, 14, 21, 0, 1), (7, 14, 21, 3, 2), (7, 9, 25, 3, 1), (7, 3, 2, 3, 2), (3, 1, 1, 1, 1), (12, 20, 13, 6, 1)],
)
def test_windows_equal_pytorchs(
    dtype: torch.dtype, window_size: int, height: int, width: int, shift: int, batch: int, calls: list[str]
) -> None:
    module = attention(dtype=dtype, window_size=window_size)
    x = torch.randn(batch, height, width, 64).to(dtype)
    padded = round_up(height, window_size), round_up(width, window_size)
    mask = shifted_window_mask(*padded, window_size, shift, like=x.double())
    expected = attention(dtype=dtype, window_size=window_size).double().on_map(x.double(), shift, mask)
    module.compiled = True
    close(module.on_map(x, shift, mask), expected)
    assert calls == ["window_attention"]


@pytest.mark.parametrize("dim", [16, 48, 64])
def test_windows_with_heads_of_other_widths_and_without_a_bias(dim: int, calls: list[str]) -> None:
    module = attention(dtype=torch.float32, window_size=4, num_heads=3, dim=dim, bias=False)
    x = torch.randn(1, 6, 7, 3 * dim)
    expected = module.double().on_map(x.double(), 0, None)
    module.float().compiled = True
    close(module.on_map(x, 0, None), expected)
    assert calls == ["window_attention"]


def test_windows_of_heads_that_the_kernel_does_not_know_go_through_pytorch(calls: list[str]) -> None:
    module = attention(dtype=torch.float32, window_size=4, dim=12)
    x = torch.randn(1, 6, 7, 24)
    expected = module.on_map(x, 0, None)
    module.compiled = True
    assert not kernels_run(12, x)
    assert torch.equal(module.on_map(x, 0, None), expected)
    assert calls == []


@pytest.mark.parametrize("learns", ["attn.qkv.weight", "norm1.weight", "attn.relative_position_bias_table"])
def test_gradients_go_through_pytorch(learns: str, calls: list[str]) -> None:
    block = SwinBlock(dim=32, num_heads=1, window_size=4, shift=0).requires_grad_(False)
    block.attn.compiled = True
    parameter = block.get_parameter(learns).requires_grad_()
    block(torch.randn(1, 4, 4, 32)).sum().backward()
    assert parameter.grad is not None
    assert "window_attention" not in calls


def test_a_shifted_block_that_goes_through_pytorch_after_all_makes_its_mask(calls: list[str]) -> None:
    torch.manual_seed(0)
    stage = SwinStage(
        dim=32, num_heads=1, window_size=4, drop_path=[0.0] * 2, mlp_ratio=2.0, qkv_bias=True, downsample=False
    ).requires_grad_(False)
    x = torch.randn(1, 9, 10, 32)
    expected = stage(x)[0]
    for block in stage.blocks:
        block.attn.compiled = True
    stage.blocks[0].mlp.requires_grad_()  # what the second block gets needs gradients, what the stage gets does not
    assert_close(stage(x)[0], expected)
    assert calls == ["window_attention"]


def test_hooks_see_the_attention(calls: list[str]) -> None:
    module = attention(dtype=torch.float32, window_size=4)
    module.compiled, seen = True, []
    module.register_forward_hook(lambda *args: seen.append(args))
    module.on_map(torch.randn(1, 8, 8, 64), 0, None)
    assert len(seen) == 1
    assert calls == []


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_records_operators_gets_pytorchs(calls: list[str]) -> None:
    module = attention(dtype=torch.float32, window_size=4)
    module.compiled, x = True, torch.randn(3, 1, 8, 8, 64)
    expected = torch.stack([module.on_map(maps, 0, None) for maps in x])
    assert_close(torch.vmap(lambda maps: module.on_map(maps, 0, None))(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module.on_map(mode.from_tensor(x[0]), 0, None).shape == (1, 8, 8, 64)
    assert calls == ["window_attention"] * 3


def test_no_frames_and_no_queries_give_nothing() -> None:
    for compiled in (False, True):
        nothing = window_attention(torch.zeros(0, 4, 4, 96), None, torch.zeros(2, 16, 16), 4, 0, compiled)
        assert nothing.shape == (0, 4, 4, 32)
    nothing = masked_attention(*(torch.zeros(0, size, 32) for size in (2, 3, 3)), torch.zeros(0, 2, 3), 2)
    assert nothing.shape == (0, 2, 32)


def test_a_token_that_is_not_a_number_spoils_its_window_alone() -> None:
    module = attention(dtype=torch.float32, window_size=4)
    module.compiled = True
    x = torch.randn(1, 8, 8, 64)
    x[0, 1, 2] = torch.nan
    spoilt = module.on_map(x, 0, None).isnan().any(-1)[0]
    assert spoilt[:4, :4].all()
    assert spoilt.sum() == 16


@pytest.mark.parametrize(
    ("shapes", "window_size", "shift"),
    [
        (((1, 4, 4, 97), (97,), (1, 16, 16)), 4, 0),
        (((1, 4, 4, 96), (97,), (1, 16, 16)), 4, 0),
        (((1, 4, 4, 96), (96,), (1, 9, 9)), 4, 0),
        (((1, 4, 4, 96), (96,), (2, 16, 16)), 4, 4),
        (((1, 4, 4, 72), (72,), (1, 16, 16)), 4, 0),
    ],
)
def test_windows_check_their_inputs(shapes: tuple[tuple[int, ...], ...], window_size: int, shift: int) -> None:
    qkv, qkv_bias, position_bias = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"qkv|shift|heads"):
        window_attention(qkv, qkv_bias, position_bias, window_size, shift, True)


# --- under masks


def under_masks(*tensors: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """By PyTorch in float64, and by the kernel."""
    module = Attention(dim=tensors[0].shape[-1], num_heads=heads).requires_grad_(False).to(tensors[0].dtype)
    module.out_proj = torch.nn.Identity()
    expected = module._attend(*(tensor.double() for tensor in tensors))
    module.compiled = True
    return module._attend(*tensors), expected


@DTYPES
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "dim"),
    [(1, 100, 405, 8, 32), (2, 7, 61, 3, 16), (1, 64, 60, 1, 48), (3, 1, 1, 2, 32), (1, 129, 200, 5, 64)],
)
def test_masked_attention_equals_pytorchs(
    dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int, dim: int, calls: list[str]
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, size, heads * dim).to(dtype) for size in (queries, keys, keys))
    mask_logits = torch.randn(batch, queries, keys).to(dtype)
    mask_logits[:, queries // 2] = -1.0  # sees no key, and so all
    mask_logits[0, 0, : keys - 1] = -1.0  # sees the last one
    close(*under_masks(3 * query, key, value, mask_logits, heads=heads))
    assert calls == ["masked_attention"]


def test_large_logits_neither_overflow_nor_vanish() -> None:
    torch.manual_seed(0)
    query, key, value = 40 * torch.randn(1, 5, 32), 40 * torch.randn(1, 300, 32), torch.randn(1, 300, 32)
    ours, expected = under_masks(query, key, value, torch.randn(1, 5, 300), heads=1)
    assert_close(ours.double(), expected, rtol=0, atol=2e-3)  # logits of thousands have that error in float32


@DTYPES
def test_the_first_of_many_keys_weigh_as_much_as_the_last(dtype: torch.dtype) -> None:
    query, value = torch.full((1, 1, 32), 1.7, dtype=dtype), torch.ones(1, 6000, 32, dtype=dtype)
    value[:, :3000] = -1.0
    output = masked_attention(query, query.expand(1, 6000, 32), value, torch.zeros(1, 1, 6000, dtype=dtype), 1)
    assert_close(output, torch.zeros_like(output), rtol=0, atol=2e-6)


def test_zero_and_nan_in_mask_logits_do_not_block() -> None:
    query, key, value = torch.zeros(1, 1, 16), torch.zeros(1, 4, 16), torch.eye(4, 16)[None]
    mask_logits = torch.tensor([[[-1.0, 0.0, torch.nan, -0.0]]])
    output = masked_attention(query, key, value, mask_logits, 1)
    assert_close(output[0, 0, :4], torch.tensor([0.0, 1.0, 1.0, 1.0]) / 3)


def test_a_query_that_is_not_a_number_spoils_itself_alone() -> None:
    query, key, value = (torch.randn(1, size, 32) for size in (20, 70, 70))
    query[0, 3] = torch.nan
    spoilt = masked_attention(query, key, value, torch.randn(1, 20, 70), 2).isnan().any(-1)[0]
    assert spoilt.tolist() == [index == 3 for index in range(20)]


@pytest.mark.parametrize(
    ("shapes", "heads"),
    [
        (((1, 2, 32), (1, 3, 32), (1, 4, 32), (1, 2, 3)), 2),
        (((1, 2, 32), (1, 3, 32), (1, 3, 32), (1, 3, 2)), 2),
        (((1, 2, 32), (1, 0, 32), (1, 0, 32), (1, 2, 0)), 2),
        (((1, 2, 32), (1, 3, 32), (1, 3, 32), (1, 2, 3)), 3),
    ],
)
def test_masked_attention_checks_its_inputs(shapes: tuple[tuple[int, ...], ...], heads: int) -> None:
    with pytest.raises(ValueError, match=r"fit together|there must be keys"):
        masked_attention(*(torch.zeros(shape) for shape in shapes), heads)

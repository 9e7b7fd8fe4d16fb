from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2f_video.modeling.swin import (
    PatchEmbedding,
    PatchMerging,
    SwinBlock,
    SwinStage,
    SwinTransformer,
    WindowAttention,
    pad_to_multiple,
    relative_position_index,
    shifted_window_mask,
    window_merge,
    window_partition,
)
from tests.golden_files import load_swin_blocks, read_info
from tests.tolerances import assert_close, differences

CASES = tuple(read_info("ops")["swin"])


def transformer(*, window_size: int = 3, drop_path_rate: float = 0.0, seed: int = 0) -> SwinTransformer:
    torch.manual_seed(seed)
    return SwinTransformer(
        embed_dim=8,
        depths=(2, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        window_size=window_size,
        mlp_ratio=2.0,
        drop_path_rate=drop_path_rate,
    ).double()


# --- the original's numbers


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_swin_blocks()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def expected(golden: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}."): tensor for name, tensor in golden.items() if name.startswith(f"{case}.")}


def test_a_stage_equals_the_original_with_gradients(case: str, expected: dict[str, Tensor]) -> None:
    info = read_info("ops")["swin"][case]
    stage = SwinStage(
        dim=info["dim"],
        num_heads=info["heads"],
        window_size=info["window"],
        drop_path=[0.0, 0.0],
        mlp_ratio=4.0,
        qkv_bias=True,
        downsample=True,
    ).double()
    stage.load_state_dict(
        {name.removeprefix("param."): value for name, value in expected.items() if name.startswith("param.")}
    )
    ours: dict[str, Tensor] = {}

    def catch(name: str, tokens: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if tokens:
                ours[f"{name}.out"] = output.flatten(1, 2)
            else:
                ours[f"{name}.window_attn_in"], ours[f"{name}.window_attn_out"] = inputs[0], output

        return hook

    for index, block in enumerate(stage.blocks):
        block.register_forward_hook(catch(f"block{index}", tokens=True))
        block.attn.register_forward_hook(catch(f"block{index}", tokens=False))
    tokens = expected["input"].clone().requires_grad_()
    output, merged = stage(tokens.unflatten(1, (info["H"], info["W"])))
    ours |= {"input": tokens, "output": output.flatten(1, 2), "merged": merged.flatten(1, 2)}
    torch.autograd.backward(
        (ours["output"], ours["merged"]),
        (expected["grad_output"], expected["grad_merged"]),
        inputs=[tokens, *stage.parameters()],
    )
    ours["grad_input"] = tokens.grad
    parameters = dict(stage.named_parameters())
    for name in expected:
        if name.startswith("grad.") and name.removeprefix("grad.") in parameters:
            ours[name] = parameters[name.removeprefix("grad.")].grad
    elsewhere = ("param.", "grad_output", "grad_merged", "block1.mask", "relative_position_index")
    assert differences(ours, {name: value for name, value in expected.items() if not name.startswith(elsewhere)}) == {}


def test_shift_mask_equals_the_original(case: str, expected: dict[str, Tensor]) -> None:
    info = read_info("ops")["swin"][case]
    window = info["window"]
    height, width = (size + -size % window for size in (info["H"], info["W"]))
    mask = shifted_window_mask(height, width, window, info["shift_of_block1"], like=torch.zeros(1, dtype=torch.float64))
    assert mask.dtype == torch.float64
    assert torch.equal(mask, -100.0 * expected["block1.mask"].double())


def test_relative_position_index_equals_the_original(case: str, expected: dict[str, Tensor]) -> None:
    window = read_info("ops")["swin"][case]["window"]
    assert torch.equal(relative_position_index(window), expected["relative_position_index"])


# --- windows


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.integers(0, 9999)
)
@settings(deadline=None)
def test_merging_windows_undoes_partitioning(
    batch: int, rows: int, columns: int, size: int, dim: int, seed: int
) -> None:
    height, width = rows * size, columns * size
    x = torch.randn(batch, height, width, dim, generator=torch.Generator().manual_seed(seed))
    windows = window_partition(x, size)
    assert windows.shape == (batch * rows * columns, size * size, dim)
    assert torch.equal(windows[columns if rows > 1 else 0][0], x[0, size if rows > 1 else 0, 0])
    assert torch.equal(window_merge(windows, size, height, width), x)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_padding_goes_to_the_bottom_and_right(height: int, width: int, multiple: int) -> None:
    x = torch.ones(2, height, width, 1)
    padded = pad_to_multiple(x, multiple)
    assert padded.shape[1] % multiple == padded.shape[2] % multiple == 0
    assert padded.shape[1] - height < multiple
    assert padded.shape[2] - width < multiple
    assert padded[:, :height, :width].eq(1).all()
    assert padded.sum() == x.sum()


def test_tokens_brought_together_by_the_shift_do_not_mix() -> None:
    torch.manual_seed(0)
    block = SwinBlock(dim=4, num_heads=2, window_size=4, shift=2).double()
    x = torch.randn(1, 8, 8, 4, dtype=torch.float64)
    changed = x.clone()
    changed[0, 7, 7] *= -1
    moved = (block(changed) - block(x)).abs().sum(-1)[0] > 1e-12
    assert moved[6:, 6:].all()  # the corner's own 2x2 piece of a window
    assert moved.sum() == 4


def test_window_attention_without_a_mask_is_plain_attention_with_a_bias() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(dim=6, num_heads=2, window_size=2).double()
    windows = torch.randn(3, 4, 6, dtype=torch.float64)
    query, key, value = attention.qkv(windows).chunk(3, -1)
    heads = []
    for head, channels in enumerate((slice(0, 3), slice(3, 6))):
        logits = query[..., channels] @ key[..., channels].transpose(1, 2) / 3**0.5
        bias = attention.relative_position_bias_table[attention.relative_position_index, head]
        heads.append((logits + bias).softmax(-1) @ value[..., channels])
    assert_close(attention(windows), attention.proj(torch.cat(heads, -1)).detach())


# --- the whole backbone


@pytest.mark.parametrize("size", [(64, 96), (1, 1), (37, 50), (33, 128)])
def test_maps_have_sizes_rounded_up(size: tuple[int, int]) -> None:
    maps = transformer()(torch.randn(2, 3, *size, dtype=torch.float64))
    height, width = size
    expected = [
        (2, 8 * 2**stage, -(-height // stride), -(-width // stride)) for stage, stride in enumerate((4, 8, 16, 32))
    ]
    assert [tuple(level.shape) for level in maps] == expected
    assert transformer().channels == (8, 16, 32, 64)


def test_padding_the_input_to_whole_patches_changes_nothing() -> None:
    model, frames = transformer(), torch.randn(1, 3, 30, 41, dtype=torch.float64)
    padded = nn.functional.pad(frames, (0, 3, 0, 2))
    for ours, expected in zip(model(frames), model(padded), strict=True):
        assert torch.equal(ours, expected)


def test_batched_equals_single() -> None:
    model, frames = transformer(), torch.randn(3, 3, 40, 56, dtype=torch.float64)
    batched = model(frames)
    for index in range(3):
        for ours, expected in zip(model(frames[index : index + 1]), batched, strict=True):
            assert_close(ours, expected[index : index + 1].detach())


def test_maps_are_normalised() -> None:
    for level in transformer()(torch.randn(1, 3, 64, 64, dtype=torch.float64)):
        assert level.mean(1).abs().max() < 1e-12
        torch.testing.assert_close(level.var(1, unbiased=False), torch.ones_like(level[:, 0]), rtol=0, atol=1e-2)


def test_stochastic_depth_rises_linearly_over_all_blocks() -> None:
    model = transformer(drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_stochastic_depth_acts_in_training_only() -> None:
    model, frames = transformer(drop_path_rate=0.9), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    same = transformer(drop_path_rate=0.0)
    for ours, expected in zip(model.eval()(frames), same.train()(frames), strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(model.train()(frames)[3], same(frames)[3])


def test_a_skipped_branch_leaves_the_tokens_of_that_frame() -> None:
    torch.manual_seed(0)
    block = SwinBlock(dim=4, num_heads=2, window_size=2, shift=0, drop_path=0.6).train()
    x = torch.randn(64, 2, 2, 4)
    kept = (block(x) - x).flatten(1).abs().amax(1) == 0
    assert 0 < kept.sum() < 64


def test_blocks_alternate_regular_and_shifted_windows() -> None:
    shifts = [[block.shift for block in stage.blocks] for stage in transformer(window_size=5).stages]
    assert shifts == [[0, 2], [0], [0, 2], [0]]


def test_the_index_buffer_is_no_weight() -> None:
    assert not any("relative_position_index" in name for name in transformer().state_dict())


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (SwinBlock(dim=4, num_heads=2, window_size=2, shift=0, mlp_ratio=2.0), torch.randn(1, 3, 2, 4)),
        (PatchMerging(dim=2), torch.randn(1, 3, 2, 2)),
        (PatchEmbedding(patch_size=2, dim=3), torch.randn(1, 3, 3, 4)),
    ],
)
def test_gradcheck(module: nn.Module, x: Tensor) -> None:
    assert torch.autograd.gradcheck(module.double(), x.double().requires_grad_(), fast_mode=True)


def test_gradcheck_of_a_shifted_block() -> None:
    block = SwinBlock(dim=4, num_heads=2, window_size=3, shift=1, mlp_ratio=2.0).double()
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x, fast_mode=True)

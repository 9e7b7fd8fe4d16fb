"""The backend `cpp` of deformable attention, against the reference."""

import pytest
import torch
from torch import Tensor

from m2f_video import ops
from m2f_video.ops import (
    available_backends,
    cpu_kernels,
    ms_deform_attn,
    ms_deform_attn_from_offsets,
    resolve_backend,
)

REASON = cpu_kernels.why_no_kernels()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "they compile")

Shapes = tuple[tuple[int, int], ...]
Inputs = tuple[Tensor, Shapes, Tensor, Tensor, Tensor]

# levels; batch, queries, heads, channels of a head, points
CASES = {
    "model": (((15, 27), (30, 54), (60, 108)), (1, 300, 8, 32, 4)),
    "odd channels": (((3, 5), (4, 2)), (2, 7, 3, 7, 3)),
    "more than a vector of samples": (((3, 5), (4, 2), (1, 1), (9, 3)), (2, 6, 2, 16, 9)),
    "one level": (((6, 4),), (3, 5, 1, 48, 16)),
    "many channels": (((2, 9), (5, 5)), (1, 9, 2, 131, 2)),
    "one of all": (((1, 1),), (1, 1, 1, 1, 1)),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def random_inputs(case: str = "odd channels", dtype: torch.dtype = torch.float32, spread: float = 2) -> Inputs:
    """Value, levels, reference points, offsets and logits."""
    shapes, (batch, queries, heads, channels, points) = CASES[case]
    generator = torch.Generator().manual_seed(0)
    tokens, samples = sum(h * w for h, w in shapes), (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, tokens, heads, channels, generator=generator).to(dtype)
    references = torch.rand(queries, 2, generator=generator)
    offsets = (spread * torch.randn(*samples, 2, generator=generator)).to(dtype)
    return value, shapes, references, offsets, (3 * torch.randn(samples, generator=generator)).to(dtype)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-12))


def exactly(value: Tensor, shapes: Shapes, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    wide = (references.double(), offsets.double(), logits.double())
    return ms_deform_attn_from_offsets(value.double(), shapes, *wide, backend="reference")


@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spread", [0.0, 2.0, 50.0])
def test_from_offsets_equals_the_reference(case: str, dtype: torch.dtype, spread: float) -> None:
    inputs = random_inputs(case, dtype, spread)
    ours = ms_deform_attn_from_offsets(*inputs, backend="cpp")
    assert ours.dtype == dtype
    assert error(ours, exactly(*inputs)) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spread", [0.0, 0.7, 1e12])
def test_of_locations_equals_the_reference(case: str, dtype: torch.dtype, spread: float) -> None:
    value, shapes, _, offsets, weights = random_inputs(case, dtype)
    locations = 0.5 + spread * offsets.float()
    ours = ms_deform_attn(value, shapes, locations, weights, backend="cpp")
    exact = ms_deform_attn(value.double(), shapes, locations.double(), weights.double(), backend="reference")
    assert ours.dtype == dtype
    assert error(ours, exact) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
def test_an_offset_that_is_no_number_reads_zeros(dtype: torch.dtype, bad: float) -> None:
    value, shapes, references, offsets, logits = random_inputs(dtype=dtype)
    far = offsets.clone()
    offsets[0, 1, 1, :, 1, 0], far[0, 1, 1, :, 1] = bad, 1e4
    offsets[1, 2], far[1, 2] = bad, 1e4
    ours = ms_deform_attn_from_offsets(value, shapes, references, offsets, logits, backend="cpp")
    assert torch.equal(ours, ms_deform_attn_from_offsets(value, shapes, references, far, logits, backend="cpp"))
    assert ours[1, 2].eq(0).all()


@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_and_values_spread_as_in_embedding_bag(dtype: torch.dtype, bad: float) -> None:
    value, shapes, references, offsets, logits = random_inputs(dtype=dtype)
    logits[0, 1, 2, 1, 1] = bad
    value[1, 3, 0] = bad
    ours, expected = (
        ms_deform_attn_from_offsets(value, shapes, references, offsets, logits, backend=backend)
        for backend in ("cpp", "embedding_bag")
    )
    assert 0 < expected.isfinite().float().mean() < 1
    assert torch.equal(ours.isfinite(), expected.isfinite())


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_softmax_of_large_logits(shift: float) -> None:
    *others, logits = random_inputs()
    ours, plain = (ms_deform_attn_from_offsets(*others, each, backend="cpp") for each in (logits + shift, logits))
    torch.testing.assert_close(ours, plain, rtol=0, atol=5e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_views_and_threads_change_nothing(threads: int) -> None:
    value, shapes, references, offsets, logits = random_inputs()
    expected = ms_deform_attn_from_offsets(value, shapes, references, offsets, logits, backend="cpp")
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = ms_deform_attn_from_offsets(
            turned, shapes, references.T.contiguous().T, offsets.flip(-1).flip(-1), logits.mT.contiguous().mT, "cpp"
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours, expected)


def test_mixed_dtypes_from_offsets() -> None:
    value, shapes, references, offsets, logits = random_inputs(dtype=torch.bfloat16)
    ours = ms_deform_attn_from_offsets(value, shapes, references, offsets.float(), logits, backend="cpp")
    assert error(ours, exactly(value, shapes, references, offsets, logits)) < 1e-2


@pytest.mark.parametrize("empty", ["batch", "queries", "channels", "points"])
def test_nothing_to_do(empty: str) -> None:
    value, shapes, references, offsets, logits = random_inputs()
    if empty == "batch":
        value, offsets, logits = value[:0], offsets[:0], logits[:0]
    elif empty == "queries":
        references, offsets, logits = references[:0], offsets[:, :0], logits[:, :0]
    elif empty == "channels":
        value = value[..., :0]
    else:
        offsets, logits = offsets[..., :0, :], logits[..., :0]
    ours = ms_deform_attn_from_offsets(value, shapes, references, offsets, logits, backend="cpp")
    assert ours.shape == (len(value), len(references), 3 * value.shape[-1])
    assert ours.eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "embedding_bag", "cpp"])
def test_reference_points_that_do_not_fit_are_named(backend: str) -> None:
    value, shapes, references, offsets, logits = random_inputs()
    with pytest.raises(ValueError, match=r"reference_points must be \(7, 2\), got \(6, 2\)"):
        ms_deform_attn_from_offsets(value, shapes, references[1:], offsets, logits, backend=backend)


# --- which backend


def test_auto_takes_it_where_kernels_were_asked_for_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert resolve_backend("auto", x) == "embedding_bag"
    assert resolve_backend("auto", x, compiled=True) == "cpp"
    assert resolve_backend("reference", x, compiled=True) == "reference"
    for other in (x.double(), x.clone().requires_grad_()):
        assert resolve_backend("auto", other, compiled=True) == "embedding_bag"
    assert resolve_backend("auto", x.to("meta"), compiled=True) == "reference"
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "embedding_bag")
    assert resolve_backend("auto", x, compiled=True) == "embedding_bag"
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "cpp")
    assert resolve_backend("auto", x) == "cpp"


def test_why_it_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    cases = {
        "needs CPU tensors, got meta": (x, x.to("meta")),
        r"float32 and bfloat16, got .*float64": (x, x.double()),
        "no gradients; take 'embedding_bag'": (x, x.clone().requires_grad_()),
    }
    for message, inputs in cases.items():
        with pytest.raises(ValueError, match=f"'cpp' cannot run: it .*{message}"):
            resolve_backend("cpp", *inputs)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="'cpp' cannot run: it knows no autocast"),
    ):
        resolve_backend("cpp", x)
    assert available_backends()["cpp"] is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"'cpp' cannot run: there is no C\+\+ compiler 'no-such-compiler'"):
        resolve_backend("cpp", x)
    assert "no-such-compiler" in (available_backends()["cpp"] or "")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from m2f_video.ops import (
    ms_deform_attn,
    ms_deform_attn_from_offsets,
    resolve_backend,
    sampling_locations_from_offsets,
)
from tests.golden_files import GOLDEN
from tests.tolerances import assert_close, differences

CASES = (
    "single",
    "square",
    "three_levels",
    "out_of_range",
    "all_outside",
    "one_pixel_level",
    "non_square_many",
    "border_exact",
)
BACKENDS = ("reference", "embedding_bag")
INPUTS = ("value", "locations", "weights")
Shapes = tuple[tuple[int, int], ...]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "ops" / "msdeform_core.safetensors")


def of_case(golden: dict[str, Tensor], case: str) -> tuple[dict[str, Tensor], Shapes]:
    tensors = {name.split(".")[1]: tensor for name, tensor in golden.items() if name.startswith(f"{case}.")}
    return tensors, tuple((height, width) for height, width in tensors["shapes"].tolist())


def random_inputs(
    shapes: Shapes = ((2, 3), (4, 6)),
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    dim: int = 3,
    points: int = 2,
    spread: float = 0.7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Value, locations of which a part is outside, and attention weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tokens, levels = sum(height * width for height, width in shapes), len(shapes)
    weights = normal(batch, queries, heads, levels * points).softmax(-1).unflatten(3, (levels, points))
    return {
        "value": normal(batch, tokens, heads, dim).to(dtype),
        "locations": (0.5 + spread * normal(batch, queries, heads, levels, points, 2)).to(dtype),
        "weights": weights.to(dtype),
    }


def run(inputs: dict[str, Tensor], shapes: Shapes, backend: str = "auto") -> Tensor:
    return ms_deform_attn(inputs["value"], shapes, inputs["locations"], inputs["weights"], backend=backend)


def by_hand(inputs: dict[str, Tensor], shapes: Shapes) -> Tensor:
    """The definition, pixel by pixel in Python: bilinear, zeros outside."""
    value, locations, weights = (inputs[name] for name in INPUTS)
    B, Q, M, L, P, _ = locations.shape
    output = torch.zeros(B, Q, M, value.shape[-1], dtype=value.dtype)
    starts = [sum(height * width for height, width in shapes[:level]) for level in range(L)]
    for b, q, m, level, p in torch.cartesian_prod(*map(torch.arange, (B, Q, M, L, P))).tolist():
        height, width = shapes[level]
        x, y = (locations[b, q, m, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row in range(height):
            for column in range(width):
                share = max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
                pixel = value[b, starts[level] + row * width + column, m]
                output[b, q, m] += share * weights[b, q, m, level, p] * pixel
    return output.flatten(2)


# --- the original's numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_output_equals_the_original(golden: dict[str, Tensor], case: str, backend: str) -> None:
    tensors, shapes = of_case(golden, case)
    assert_close(run(tensors, shapes, backend), tensors["output"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_original(golden: dict[str, Tensor], case: str, backend: str) -> None:
    tensors, shapes = of_case(golden, case)
    inputs = {name: tensors[name].clone().requires_grad_() for name in INPUTS}
    gradients = torch.autograd.grad(run(inputs, shapes, backend), tuple(inputs.values()), tensors["grad_output"])
    ours = dict(zip(INPUTS, gradients, strict=True))
    expected = {name: tensors[f"grad_{name}"] for name in INPUTS}
    if case == "border_exact":  # locations on pixel centres, where the derivative has two values
        del ours["locations"], expected["locations"]
    assert differences(ours, expected) == {}


# --- properties


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_compute_the_definition(backend: str) -> None:
    shapes = ((2, 3), (1, 4))
    inputs = random_inputs(shapes, queries=3)
    assert_close(run(inputs, shapes, backend), by_hand(inputs, shapes))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4).map(tuple),
    sizes=st.tuples(*[st.integers(1, top) for top in (3, 7, 4, 5, 4)]),
    spread=st.sampled_from([0.0, 0.2, 1.0, 30.0, 1e12]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_embedding_bag_equals_the_reference(
    shapes: Shapes, sizes: tuple[int, ...], spread: float, dtype: torch.dtype, seed: int
) -> None:
    batch, queries, heads, dim, points = sizes
    inputs = random_inputs(
        shapes, batch=batch, queries=queries, heads=heads, dim=dim, points=points, spread=spread, dtype=dtype, seed=seed
    )
    if dtype == torch.float64:
        assert_close(run(inputs, shapes, "embedding_bag"), run(inputs, shapes, "reference"))
        return
    # In float32 the products location * size round differently, which a pixel that hardly counts can blow up.
    exact = run({name: tensor.double() for name, tensor in inputs.items()}, shapes, "reference")
    torch.testing.assert_close(run(inputs, shapes, "embedding_bag").double(), exact, rtol=0, atol=2e-5)


@given(st.integers(0, 2**16))
@settings(deadline=None, max_examples=20)
def test_locations_on_pixel_centres_and_edges(seed: int) -> None:
    shapes = ((3, 4), (1, 2))
    inputs = random_inputs(shapes, queries=20, seed=seed)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)
    halves = (inputs["locations"] * 2 * sizes[:, None]).round()  # of a pixel, beyond the edges too
    inputs["locations"] = halves / 2 / sizes[:, None]
    assert_close(run(inputs, shapes, "embedding_bag"), run(inputs, shapes, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_location_that_is_no_number_spoils_nothing_else(backend: str, bad: float) -> None:
    shapes = ((4, 6),)
    inputs = random_inputs(shapes, batch=1, queries=4, spread=0.1)
    expected = run(inputs, shapes, backend)
    inputs["locations"][0, 1] = bad
    output = run(inputs, shapes, backend)
    assert_close(output[:, [0, 2, 3]], expected[:, [0, 2, 3]])
    if backend == "embedding_bag":
        assert output[0, 1].eq(0).all()  # it reads from outside


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_half_a_pixel_outside_is_zero(backend: str) -> None:
    shapes = ((4, 4),)
    inputs = random_inputs(shapes, batch=1, queries=8, points=1)
    outside = torch.tensor([-0.126, 1.126], dtype=torch.float64)
    inputs["locations"][..., 0] = outside[torch.arange(8) % 2][None, :, None, None, None]
    assert run(inputs, shapes, backend).eq(0).all()
    inputs["locations"] = inputs["locations"].clamp(-0.12, 1.12)
    inputs["locations"][..., 1] = 0.5
    assert run(inputs, shapes, backend).ne(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_weights_at_a_pixel_centre_give_its_value(backend: str) -> None:
    shapes = ((2, 4), (2, 2))  # all centres are exact in binary
    inputs = random_inputs(shapes, batch=1, queries=1, points=1)
    inputs["weights"] = torch.zeros_like(inputs["weights"])
    inputs["weights"][:, :, :, 1] = 1
    inputs["locations"] = torch.full_like(inputs["locations"], 0.25)
    assert torch.equal(run(inputs, shapes, backend)[0, 0], inputs["value"][0, 8].flatten())


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_equals_single(backend: str) -> None:
    shapes = ((2, 3), (4, 6))
    inputs = random_inputs(shapes, batch=3)
    batched = run(inputs, shapes, backend)
    for index in range(3):
        single = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        assert_close(run(single, shapes, backend), batched[index : index + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    shapes = ((2, 3), (1, 2))
    inputs = random_inputs(shapes, batch=1, queries=2)
    arguments = [inputs[name].requires_grad_() for name in INPUTS]

    def operation(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, shapes, locations, weights, backend=backend)

    assert torch.autograd.gradcheck(operation, arguments)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4).map(tuple),
    sizes=st.tuples(*[st.integers(1, top) for top in (3, 7, 4, 5, 4)]),
    spread=st.sampled_from([0.0, 0.2, 1.0, 30.0]),
    wanted=st.sets(st.sampled_from(INPUTS), min_size=1),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_gradients_of_embedding_bag_equal_those_of_the_reference(
    shapes: Shapes, sizes: tuple[int, ...], spread: float, wanted: set[str], seed: int
) -> None:
    batch, queries, heads, dim, points = sizes
    inputs = random_inputs(
        shapes, batch=batch, queries=queries, heads=heads, dim=dim, points=points, spread=spread, seed=seed
    )
    asked = [inputs[name].requires_grad_() for name in sorted(wanted)]
    ours, expected = (
        torch.autograd.grad(run(inputs, shapes, backend).square().sum(), asked)
        for backend in ("embedding_bag", "reference")
    )
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtypes_of_the_inputs(dtype: torch.dtype) -> None:
    shapes = ((4, 6),)
    exact = {name: tensor.requires_grad_() for name, tensor in random_inputs(shapes, spread=0.2).items()}
    rounded = {
        name: tensor.detach().to(torch.float32 if name == "locations" else dtype).requires_grad_()
        for name, tensor in exact.items()
    }
    expected, ours = (
        torch.autograd.grad(run(inputs, shapes, backend).float().square().sum(), tuple(inputs.values()))
        for inputs, backend in ((exact, "reference"), (rounded, "embedding_bag"))
    )
    for one, other, source in zip(ours, expected, rounded.values(), strict=True):
        assert one.dtype == source.dtype
        error = (one.double() - other).norm() / other.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_value(backend: str, dtype: torch.dtype) -> None:
    shapes = ((4, 6),)
    inputs = random_inputs(shapes, spread=0.2)
    expected = run(inputs, shapes, "reference")
    lower = inputs | {"value": inputs["value"].to(dtype), "weights": inputs["weights"].to(dtype)}
    lower["locations"] = inputs["locations"].to(torch.promote_types(dtype, torch.float32))  # as the module gives them
    output = run(lower, shapes, backend)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5 if torch.finfo(dtype).eps < 1e-6 else 0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_are(backend: str) -> None:
    shapes = ((2, 3), (4, 6))
    inputs = random_inputs(shapes)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    run(inputs, shapes, backend)
    assert all(torch.equal(inputs[name], before[name]) for name in INPUTS)


def test_locations_from_offsets() -> None:
    reference = torch.tensor([[0.25, 0.5], [0.75, 0.1]], dtype=torch.float64)
    offsets = torch.zeros(1, 2, 1, 2, 1, 2, dtype=torch.float64)
    offsets[0, 0, 0, 0, 0] = torch.tensor([1.0, -1.0])  # of a level of 2 x 4: a quarter of its width, half its height
    offsets[0, 1, 0, 1, 0] = torch.tensor([3.0, 0.5])
    locations = sampling_locations_from_offsets(reference, offsets, ((2, 4), (5, 3)))
    assert locations.shape == offsets.shape
    expected = reference[:, None, :].repeat(1, 2, 1)
    expected[0, 0] += torch.tensor([0.25, -0.5])
    expected[1, 1] += torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert_close(locations[0, :, 0, :, 0], expected)


def test_from_offsets_backends_agree_under_autocast_too() -> None:
    shapes, generator = ((60, 108), (30, 54)), torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(1, tokens, 2, 8, generator=generator)
    references = torch.rand(tokens, 2, generator=generator)
    offsets = 3 * torch.randn(1, tokens, 2, 2, 4, 2, generator=generator)
    logits = torch.randn(1, tokens, 2, 2, 4, generator=generator)
    inputs = (value, shapes, references, offsets, logits)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = ms_deform_attn_from_offsets(*inputs, backend="reference")
        ours = ms_deform_attn_from_offsets(*inputs)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("shift", [-1000.0, -70.0, 0.0, 70.0, 1000.0])
def test_softmax_of_small_and_large_logits(scale: float, shift: float) -> None:
    shapes, generator = ((5, 7), (3, 4)), torch.Generator().manual_seed(0)
    value = torch.randn(1, 47, 2, 8, generator=generator)
    references = torch.rand(9, 2, generator=generator)
    offsets = torch.randn(1, 9, 2, 2, 4, 2, generator=generator)
    logits = scale * torch.randn(1, 9, 2, 2, 4, generator=generator) + torch.tensor([shift, 0.0])[:, None, None]
    inputs = (value, shapes, references, offsets, logits)
    ours, expected = (ms_deform_attn_from_offsets(*inputs, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_spoil_their_head_alone(bad: float) -> None:
    shapes, logits = ((5, 7),), torch.zeros(1, 9, 2, 1, 4)
    logits[0, 3, 1, 0, 2] = bad
    output = ms_deform_attn_from_offsets(
        torch.ones(1, 35, 2, 8), shapes, torch.full((9, 2), 0.5), torch.zeros(1, 9, 2, 1, 4, 2), logits
    )
    assert output.isnan().nonzero()[:, 1].unique().tolist() == [3]
    assert output[0, 3].isnan().tolist() == [False] * 8 + [True] * 8


# --- which backend


def test_auto_is_the_fast_one_on_a_cpu() -> None:
    assert resolve_backend("auto", torch.zeros(1)) == "embedding_bag"
    assert resolve_backend("auto", torch.zeros(1, requires_grad=True)) == "embedding_bag"
    assert resolve_backend("auto", torch.zeros(1, device="meta")) == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_is_taken(backend: str) -> None:
    assert resolve_backend(backend, torch.zeros(1, requires_grad=True)) == backend


def test_an_unknown_backend_is_named() -> None:
    inputs = random_inputs()
    with pytest.raises(ValueError, match=r"'cuda'.*auto.*reference.*embedding_bag"):
        run(inputs, ((2, 3), (4, 6)), "cuda")


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"value": i["value"].flatten(2)}, r"value must be \(B, N, M, D\)"),
        (lambda i: i | {"locations": i["locations"][..., 0]}, r"sampling_locations \(B, Q, M, L, P, 2\)"),
        (lambda i: i | {"locations": i["locations"].repeat_interleave(2, -1)}, r"sampling_locations"),
        (lambda i: i | {"shapes": ((2, 3), (0, 6))}, "must be positive, got .*0, 6"),
        (lambda i: i | {"shapes": ((-2, -3), (4, 6))}, "must be positive, got .*-2, -3"),
        (lambda i: i | {"value": i["value"][:, 1:]}, "value has 29 tokens.*30 pixels"),
        (lambda i: i | {"locations": i["locations"][:1]}, "do not fit batch 2"),
        (lambda i: i | {"locations": i["locations"][:, :, :1]}, "2 heads"),
        (lambda i: i | {"locations": i["locations"][:, :, :, :1]}, "2 levels"),
        (lambda i: i | {"weights": i["weights"][..., :1]}, r"attention_weights must be \(2, 5, 2, 2, 2\)"),
        (lambda i: i | {"weights": i["weights"][:, :1]}, "attention_weights must be"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_shapes_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], dict[str, Any]], message: str, backend: str
) -> None:
    changed = change(random_inputs())
    with pytest.raises(ValueError, match=message):
        run(changed, changed.get("shapes", ((2, 3), (4, 6))), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_give_no_output(backend: str) -> None:
    inputs = random_inputs()
    inputs = inputs | {name: inputs[name][:, :0] for name in ("locations", "weights")}
    assert run(inputs, ((2, 3), (4, 6)), backend).shape == (2, 0, 6)


def test_locations_in_bfloat16_on_a_map_of_a_size_that_bfloat16_does_not_have() -> None:
    generator = torch.Generator().manual_seed(0)
    locations = torch.cat((torch.ones(1, 1, 1, 1, 3, 2), torch.rand(1, 40, 1, 1, 3, 2, generator=generator)), 1)
    inputs = (torch.ones(1, 258, 1, 4), ((1, 258),), locations.bfloat16(), torch.ones(1, 41, 1, 1, 3))
    ours, expected = (ms_deform_attn(*inputs, backend=backend) for backend in BACKENDS[::-1])
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "embedding_bag"])
def test_half_precision_is_near_float32_on_large_maps(backend: str, dtype: torch.dtype) -> None:
    """Locations keep float32 whatever the values have: half precision cannot tell the pixels of a large map apart."""
    generator = torch.Generator().manual_seed(0)
    shapes, Q = ((60, 108),), 50
    value = torch.randn(1, 60 * 108, 8, 32, generator=generator)
    locations = torch.rand(1, Q, 8, 1, 4, 2, generator=generator)
    weights = torch.rand(1, Q, 8, 1, 4, generator=generator).softmax(-1)
    exact = ms_deform_attn(value, shapes, locations, weights, backend="reference")
    with torch.no_grad():
        rounded = ms_deform_attn(value.to(dtype), shapes, locations, weights.to(dtype), backend=backend)
    assert ((rounded.float() - exact).norm() / exact.norm()) < 1e-2

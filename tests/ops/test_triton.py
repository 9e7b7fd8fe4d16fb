"""The Triton kernels, and when they are taken.

The kernels run on a GPU or, where TRITON_INTERPRET=1 was set before triton was imported, on a CPU. Without a GPU the
tests of kernels are therefore skipped, and `test_the_kernels_under_the_interpreter` runs this file again with it set.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import m2f_video.ops as ops
from m2f_video.ops import available_backends, ms_deform_attn, resolve_backend
from tests.ops.test_ms_deform_attn import CASES, INPUTS, Shapes, golden, of_case, random_inputs, run
from tests.tolerances import assert_close, differences, relative_error

__all__ = ["golden"]  # a fixture

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = ((3, 5), (2, 7), (1, 1))
FEW = "not (three_levels or many or 1e or inf or 1000000000000 or shapes2 or dtype1 or rules or whole or graph)"
"""Tests and cases of each kind, as pytest's -k selects them."""
FRAME = ((60, 108), (30, 54), (15, 27))  # of 480x864

runs_kernels = pytest.mark.skipif(
    not INSTALLED or not (INTERPRETED or torch.cuda.is_available()), reason="needs triton with a GPU or its interpreter"
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="not under the interpreter")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@needs_triton
@compiled_only
@pytest.mark.parametrize(
    "selection",
    [
        pytest.param(FEW, id="small"),
        pytest.param("triton", id="all", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_under_the_interpreter(selection: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(autouse=True)
def _tuned_only_at_the_size_of_a_frame(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning compiles six kernels where one will do."""
    if INSTALLED and "gpu" not in request.keywords:
        from m2f_video.ops import triton_kernels

        monkeypatch.setattr(triton_kernels, "_fixed_config", lambda: True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_device(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE, dtype).requires_grad_() for name, tensor in inputs.items()}


def output_and_gradients(
    inputs: dict[str, Tensor], shapes: Shapes, backend: str, grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """All of them, those of the reference in float64."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    if backend == "reference":
        inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
        torch.use_deterministic_algorithms(False)  # or else the backward of `grid_sample` is an error on CUDA
    output = run(inputs, shapes, backend)
    if grad_output is None:  # integers are exact in any dtype
        grad_output = (torch.arange(output.numel()) % 7 - 3).view(output.shape)
    gradients = torch.autograd.grad(output, [inputs[name] for name in INPUTS], grad_output.to(output))
    torch.use_deterministic_algorithms(deterministic)
    return {"output": output.detach(), **dict(zip(INPUTS, gradients, strict=True))}


# --- numbers


@runs_kernels
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_original(golden: dict[str, Tensor], case: str) -> None:
    tensors, shapes = of_case(golden, case)
    inputs = on_device({name: tensors[name] for name in INPUTS})
    ours = output_and_gradients(inputs, shapes, "triton", tensors["grad_output"])
    expected = {"output": tensors["output"], **{name: tensors[f"grad_{name}"] for name in INPUTS}}
    if case == "border_exact":  # locations on pixel centres, where the derivative has two values
        del ours["locations"], expected["locations"]
    assert differences(ours, {name: tensor.to(DEVICE, torch.float32) for name, tensor in expected.items()}) == {}


@runs_kernels
@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (((1, 1),), {"batch": 1, "queries": 1, "heads": 1, "dim": 1, "points": 1}),
        (SHAPES, {"batch": 3, "queries": 13, "heads": 1, "dim": 5, "points": 1}),  # a second, not full program
        (SHAPES, {"batch": 1, "queries": 5, "heads": 8, "dim": 32, "points": 4}),  # the model's sizes
        (SHAPES, {"batch": 2, "queries": 3, "heads": 3, "dim": 6, "points": 3, "spread": 30.0}),  # mostly outside
    ],
)
def test_output_and_gradients_equal_the_reference(shapes: Shapes, sizes: dict) -> None:
    inputs = on_device(random_inputs(shapes, **sizes))
    ours, exact = (output_and_gradients(inputs, shapes, backend) for backend in ("triton", "reference"))
    assert differences(ours, {name: tensor.float() for name, tensor in exact.items()}) == {}


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("locations_dtype", [torch.float32, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, locations_dtype: torch.dtype) -> None:
    inputs = on_device(random_inputs(SHAPES, queries=4), dtype)
    inputs["locations"] = inputs["locations"].detach().to(locations_dtype).requires_grad_()
    ours, exact = (output_and_gradients(inputs, SHAPES, backend) for backend in ("triton", "reference"))
    for name, tensor in exact.items():
        result_dtype = locations_dtype if name == "locations" else dtype
        assert ours[name].dtype == result_dtype
        torch.testing.assert_close(ours[name].double(), tensor, rtol=torch.finfo(result_dtype).eps, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e12])
def test_a_location_that_is_no_number_spoils_nothing(bad: float) -> None:
    inputs = on_device(random_inputs(SHAPES, batch=1, queries=3, spread=0.1))
    expected = output_and_gradients(inputs, SHAPES, "triton")
    with torch.no_grad():
        inputs["locations"][0, 1] = bad
    results = output_and_gradients(inputs, SHAPES, "triton")
    for name in ("output", "locations", "weights"):
        assert results[name][0, 1].eq(0).all()
        assert torch.equal(results[name][:, [0, 2]], expected[name][:, [0, 2]])
    assert results["value"].isfinite().all()


@runs_kernels
def test_inputs_need_not_be_contiguous() -> None:
    inputs = on_device(random_inputs(SHAPES))
    strided = {
        name: tensor.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for name, tensor in inputs.items()
    }
    one = torch.ones(())
    ours = output_and_gradients(strided, SHAPES, "triton", one.expand(2, 5, 6))
    expected = output_and_gradients(inputs, SHAPES, "triton", one.repeat(2, 5, 6))
    assert differences(ours, expected) == {}


@runs_kernels
def test_no_queries_give_no_output_and_no_gradient() -> None:
    inputs = random_inputs(SHAPES)
    inputs = on_device(inputs | {name: inputs[name][:, :0] for name in ("locations", "weights")})
    results = output_and_gradients(inputs, SHAPES, "triton")
    assert results["output"].shape == (2, 0, 6)
    assert results["value"].eq(0).all()


# --- reproducible gradients


@runs_kernels
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_deterministic_gradients_do_not_depend_on_the_order_of_additions(size: float) -> None:
    """Permuted queries add to the same pixels in another order."""
    inputs = on_device(random_inputs(((2, 2), (1, 1)), batch=1, queries=24, spread=0.3))
    grad_output = size * torch.randn(1, 24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    permuted = {name: t.detach() if name == "value" else t.detach()[:, order] for name, t in inputs.items()}
    shapes = ((2, 2), (1, 1))
    first = output_and_gradients(inputs, shapes, "triton", grad_output)
    second = output_and_gradients(on_device(permuted), shapes, "triton", grad_output[:, order])
    assert torch.equal(first["value"], second["value"])
    assert torch.equal(first["locations"][:, order], second["locations"])
    exact = output_and_gradients(inputs, shapes, "reference", grad_output)
    assert differences(first, {name: tensor.float() for name, tensor in exact.items()}) == {}


@runs_kernels
@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, in the interpreter
def test_deterministic_gradients_of_nothing_and_of_no_number() -> None:
    inputs = on_device(random_inputs(SHAPES, batch=1, queries=2))
    grad_output = torch.zeros(1, 2, 6, dtype=torch.float64)
    assert output_and_gradients(inputs, SHAPES, "triton", grad_output)["value"].eq(0).all()
    for bad in (float("nan"), float("inf")):
        grad_output[0, 0, 0] = bad
        assert not output_and_gradients(inputs, SHAPES, "triton", grad_output)["value"].isfinite().any()


# --- as an operator of torch


@runs_kernels
def test_the_operator_keeps_torch_s_rules() -> None:
    from m2f_video.ops.triton_kernels import _forward_op

    inputs = on_device(random_inputs(SHAPES, batch=1, queries=2))
    sizes = [size for shape in SHAPES for size in shape]
    torch.library.opcheck(_forward_op, (inputs["value"], sizes, inputs["locations"], inputs["weights"]))


class Attention(torch.nn.Module):
    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, SHAPES, locations, weights, backend="triton")


@runs_kernels
def test_compile_and_export_take_it_whole() -> None:
    inputs = tuple(tensor.detach() for tensor in on_device(random_inputs(SHAPES, batch=2, queries=2)).values())
    compiled = torch.compile(Attention(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), Attention()(*inputs))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Attention(), inputs, dynamic_shapes=[{0: batch}] * 3)
    assert [str(node.target) for node in exported.graph.nodes][3:-1] == ["m2f_video.ms_deform_attn.default"]


# --- which backend


@pytest.fixture
def cuda_tensor() -> Iterator[Tensor]:
    """Of a device that need not exist."""
    with FakeTensorMode():
        yield torch.zeros(1, device="cuda")


@pytest.mark.parametrize(
    ("verified", "capability", "dtype", "nvidia", "expected"),
    [
        (set(), (9, 0), torch.float32, True, "reference"),
        ({(8, 0)}, (9, 0), torch.float32, True, "reference"),
        pytest.param({(8, 0), (9, 0)}, (9, 0), torch.bfloat16, True, "triton", marks=needs_triton),
        ({(9, 0)}, (9, 0), torch.float64, True, "reference"),  # which the kernels do not take
        ({(9, 0)}, (9, 0), torch.float32, False, "reference"),  # another make counts otherwise
    ],
)
def test_auto_on_cuda_is_triton_where_it_has_passed(
    verified: set, capability: tuple, dtype: torch.dtype, nvidia: bool, expected: str, cuda_tensor: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ops, "VERIFIED", frozenset(verified))
    monkeypatch.setattr(torch.version, "cuda", "13.0" if nvidia else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert resolve_backend("auto", cuda_tensor.to(dtype)) == expected


def test_auto_on_cuda_that_is_not_there_is_the_reference(cuda_tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "VERIFIED", frozenset({(9, 0)}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_backend("auto", cuda_tensor) == "reference"


def test_what_is_verified_does_not_break_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "VERIFIED", frozenset({(9, 0)}))
    monkeypatch.setattr(torch.version, "cuda", None)  # a patched function would be one of PyTorch's to the compiler
    doubled = torch.compile(lambda x: x if ops._is_verified(0) else 2 * x, fullgraph=True, backend="eager")
    assert doubled(torch.ones(1)).item() == 2
    same = torch.compile(lambda x: x if (9, 0) in ops.VERIFIED else 2 * x, fullgraph=True, backend="eager")
    assert same(torch.ones(1)).item() == 1


def test_triton_that_is_not_installed_is_an_error(cuda_tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        resolve_backend("triton", cuda_tensor)


def test_the_environment_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    monkeypatch.setenv("M2F_VIDEO_MS_DEFORM_ATTN", "reference")
    assert resolve_backend("auto", tensor) == "reference"
    assert resolve_backend("embedding_bag", tensor) == "embedding_bag"
    for no_choice in ("auto", ""):
        monkeypatch.setenv("M2F_VIDEO_MS_DEFORM_ATTN", no_choice)
        assert resolve_backend("auto", tensor) == "embedding_bag"
    monkeypatch.setenv("M2F_VIDEO_MS_DEFORM_ATTN", "cuda")
    assert resolve_backend("reference", tensor) == "reference"
    with pytest.raises(ValueError, match=r"'cuda' in the environment variable M2F_VIDEO_MS_DEFORM_ATTN.*reference"):
        resolve_backend("auto", tensor)


@needs_triton
@compiled_only
def test_triton_on_a_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(SHAPES, dtype=torch.float32)
    with pytest.raises(ValueError, match="'triton' cannot run: it needs CUDA tensors, got cpu"):
        run(inputs, SHAPES, "triton")
    monkeypatch.setenv("M2F_VIDEO_MS_DEFORM_ATTN", "triton")
    with pytest.raises(ValueError, match="'triton' cannot run: it needs CUDA tensors, got cpu"):
        run(inputs, SHAPES, "auto")


@needs_triton
def test_triton_refuses_other_dtypes_and_two_devices(cuda_tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=r"'triton' cannot run: it takes float32.*torch.float64.*'reference'"):
        resolve_backend("triton", cuda_tensor, cuda_tensor.double())
    with pytest.raises(ValueError, match=r"different devices, \['cuda:0', 'meta'\]"):
        resolve_backend("triton", cuda_tensor, torch.zeros(1, device="meta"))


def test_available_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = INSTALLED and (INTERPRETED or torch.cuda.is_available())
    reasons = available_backends()
    assert reasons.pop("triton") is None if runs else reasons.pop("triton")
    assert reasons == {"reference": None, "embedding_bag": None}
    monkeypatch.setattr(ops, "_TRITON_INSTALLED", False)
    assert "not installed" in (available_backends()["triton"] or "")


# --- on a GPU, at the size of a frame


def frame_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    queries = sum(height * width for height, width in FRAME)
    inputs = on_device(random_inputs(FRAME, queries=queries, heads=8, dim=32, points=4, spread=0.3))
    return {n: t.detach().to(torch.float32 if n == "locations" else dtype).requires_grad_() for n, t in inputs.items()}


class TestOnAGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_output_and_gradients_equal_the_reference(self, dtype: torch.dtype) -> None:
        inputs = frame_inputs(dtype)
        ours, exact = (output_and_gradients(inputs, FRAME, backend) for backend in ("triton", "reference"))
        for name, tensor in exact.items():
            # a location that rounding moves across a pixel's centre has another derivative: of millions, some do
            tolerance = 1e-2 if name == "locations" else 1e-5
            assert relative_error(ours[name], tensor) < max(tolerance, 0.5 * torch.finfo(ours[name].dtype).eps)

    @pytest.mark.usefixtures("deterministic")
    def test_deterministic_gradients_are_the_same_twice(self) -> None:
        inputs = frame_inputs()
        first, second = (output_and_gradients(inputs, FRAME, "triton") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        exact = output_and_gradients(inputs, FRAME, "reference")
        assert_close(first["value"], exact["value"].float())

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled(self, mode: str) -> None:
        inputs = frame_inputs()

        def loss(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return ms_deform_attn(value, FRAME, locations, weights, "triton").square().mean()

        compiled = torch.compile(loss, fullgraph=True, mode=mode)
        for _ in range(3):  # eager warm-up, recording and replay of CUDA graphs
            ours = torch.autograd.grad(compiled(*inputs.values()), list(inputs.values()))
            ours = [gradient.clone() for gradient in ours]
        expected = torch.autograd.grad(loss(*inputs.values()), list(inputs.values()))
        assert max(relative_error(a, b) for a, b in zip(ours, expected, strict=True)) < 1e-5

    @pytest.mark.parametrize("reproducible", [False, True])
    def test_a_cuda_graph_records_it(self, reproducible: bool) -> None:
        inputs = frame_inputs()

        def compute() -> list[Tensor]:
            output = run(inputs, FRAME, "triton")
            return [output.detach(), *torch.autograd.grad(output.square().sum(), list(inputs.values()))]

        torch.use_deterministic_algorithms(reproducible)
        try:
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                expected = compute()  # compiles and tunes, too, which cannot be recorded
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # where anything that waits for the device is an error
                recorded = compute()
        finally:
            torch.use_deterministic_algorithms(False)
        for tensor in recorded:
            tensor.zero_()
        graph.replay()
        assert max(relative_error(a, b) for a, b in zip(recorded, expected, strict=True)) < 1e-5

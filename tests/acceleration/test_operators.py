"""The kernels as operators of PyTorch: what traces, records or compiles operators sees them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from m2f_video import VideoMask2Former
from m2f_video.acceleration import cpu_kernels, kernels, winograd
from tests.acceleration.conftest import clip

pytestmark = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs Linux and a C++ compiler")

Arguments = tuple[Any, ...]


def linear_layers(dtype: torch.dtype) -> Arguments:
    x, residual, norm = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 5, 16).to(dtype), torch.rand(2, 32).to(dtype)
    weights = [kernels.pack_weight(torch.randn(size).to(dtype)) for size in ((48, 32), (16, 48))]
    around = norm[0], norm[1], 1e-5, weights[0], None, 48, weights[1], torch.randn(16).to(dtype), 16, 2
    return x, *around, residual, norm[0, :16].clone(), norm[1, :16].clone(), 1e-5


def layer_norm(dtype: torch.dtype) -> Arguments:
    x, branch, (weight, bias) = torch.randn(2, 5, 7), torch.randn(2, 7, 5).transpose(1, 2), torch.randn(2, 7)
    return x.to(dtype), branch.to(dtype), weight.to(dtype), bias.to(dtype), 1e-5


def group_norm_(dtype: torch.dtype) -> Arguments:
    maps, coarse, (weight, bias) = torch.randn(2, 4, 5, 32), torch.randn(2, 2, 3, 32), torch.randn(2, 32)
    return maps.to(dtype), weight.to(dtype), bias.to(dtype), 4, 1e-5, coarse.to(dtype), True


def window_attention(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 5, 4, 96).to(dtype), torch.zeros(96).to(dtype), torch.randn(9, 9, 2).to(dtype), 3, 1


def masked_attention(dtype: torch.dtype) -> Arguments:
    sizes = (2, 5, 32), (2, 7, 32), (2, 7, 32), (2, 5, 7)
    return *(torch.randn(size).to(dtype) for size in sizes), 2


def deformable_attention(dtype: torch.dtype) -> Arguments:
    value, offsets, logits = torch.randn(2, 10, 32), torch.randn(2, 3, 48), torch.randn(2, 3, 24)
    return value.to(dtype), [2, 3, 4, 1], torch.rand(3, 2), offsets.to(dtype), logits.to(dtype), 4


def winograd_convolution(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 5, 6, 16).to(dtype), winograd.pack_weight(torch.randn(32, 16, 3, 3)), 32


OPERATORS: dict[str, Callable[[torch.dtype], Arguments]] = {
    function.__name__: function
    for function in (
        linear_layers,
        layer_norm,
        group_norm_,
        window_attention,
        masked_attention,
        deformable_attention,
        winograd_convolution,
    )
}


class Calls(nn.Module):
    """One operator; what it writes over is copied first."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        x = x.clone() if self.name.endswith("_") else x
        result = getattr(torch.ops.m2f_video, self.name)(x, *others)
        return x if result is None else result


def operators_of(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def test_all_operators_are_tested() -> None:
    assert {name.removeprefix("m2f_video::") for name in kernels._LIBRARY._op_defs} == set(OPERATORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_does_what_its_schema_and_its_fake_say(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.library.opcheck(getattr(torch.ops.m2f_video, name).default, OPERATORS[name](dtype))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i % 2 == 0 else pytest.mark.slow) for i, name in enumerate(OPERATORS)]
)
def test_an_operator_is_compiled_and_exported_as_one_node(name: str) -> None:
    torch.manual_seed(0)
    calls, arguments = Calls(name), OPERATORS[name](torch.float32)
    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(module.graph)
        return module.forward

    with torch.no_grad():
        expected = calls(*arguments)
        assert torch.equal(torch.compile(calls, backend=backend, fullgraph=True)(*arguments), expected)
        exported = torch.export.export(calls, arguments)
        assert torch.equal(exported.module()(*arguments), expected)
    [graph] = graphs
    for each in (graph, exported.graph):
        assert any(f"m2f_video.{name}" in operator for operator in operators_of(each))


@pytest.mark.parametrize("name", [name for name in OPERATORS if not name.endswith("_")])
def test_a_gradient_that_no_operator_knows_is_no_silent_zero(name: str) -> None:
    x, *others = OPERATORS[name](torch.float32)
    with pytest.warns(UserWarning, match="autograd kernel"):
        Calls(name)(x.requires_grad_(), *others).sum().backward()


def test_the_profiler_names_the_kernels_of_a_prepared_model(model: VideoMask2Former) -> None:
    model.prepare_for_inference()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(clip())
    names = {event.key for event in recorded.key_averages()}
    missing = {f"m2f_video::{name}" for name in OPERATORS} - names
    assert not missing


def test_a_prepared_model_is_exported_and_compiled_as_it_is_written(model: VideoMask2Former) -> None:
    """Both are for machines and batches of any kind, and give what the plain model gives."""
    block = model.backbone.stages[1].blocks[1]
    x = torch.randn(1, 6, 7, 64)
    with torch.no_grad():
        expected = block(x)
        model.prepare_for_inference()
        exported = torch.export.export(block, (x,))
        assert not any("m2f_video" in operator for operator in operators_of(exported.graph))
        assert torch.equal(exported.module()(x), expected)
        assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), expected)

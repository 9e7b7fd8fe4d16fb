import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from m2f_video import VideoMask2Former
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.ops import cpu_kernels
from m2f_video.ops.linear import Linear
from tests.tolerances import assert_close, differences, identical, relative_error


def clips(frames: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(1, frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def predictions(model: VideoMask2Former, pixels: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        output = model(pixels)
    assert output.masks_queries_logits is not None
    return {"classes": output.class_queries_logits, "masks": output.masks_queries_logits}


@pytest.fixture
def prepared(tiny_model: VideoMask2Former) -> VideoMask2Former:
    return copy.deepcopy(tiny_model).prepare_for_inference(compile="none")


def test_it_predicts_the_same(tiny_model: VideoMask2Former, prepared: VideoMask2Former) -> None:
    for frames in (1, 3):
        assert differences(predictions(prepared, clips(frames)), predictions(tiny_model, clips(frames))) == {}


needs_kernels = pytest.mark.skipif(
    cpu_kernels.why_no_kernels() is not None, reason=cpu_kernels.why_no_kernels() or "they compile"
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no kernels had been loaded in this process."""
    monkeypatch.setattr(cpu_kernels, "_library", cpu_kernels._library.__wrapped__)


@needs_kernels
def test_compiled_kernels_predict_the_same_at_any_size(tiny_model: VideoMask2Former) -> None:
    prepared = copy.deepcopy(tiny_model).prepare_for_inference(compile="kernels")
    assert all(module.compiled for module in prepared.modules() if isinstance(module, MSDeformAttn))
    for pixels in (clips(2), clips(3, 96, 64)):
        assert differences(predictions(prepared, pixels), predictions(tiny_model, pixels)) == {}


def test_it_is_in_place_and_for_inference(prepared: VideoMask2Former) -> None:
    prepared.train().requires_grad_(True)
    assert prepared.prepare_for_inference(compile="none") is prepared
    assert not prepared.training
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


def test_the_state_dict_stays(tiny_model: VideoMask2Former, prepared: VideoMask2Former) -> None:
    assert identical(prepared, tiny_model)


def test_dtype(tiny_model: VideoMask2Former) -> None:
    rough = copy.deepcopy(tiny_model).prepare_for_inference(dtype="bfloat16", compile="none")
    assert rough.dtype == torch.bfloat16
    cast = copy.deepcopy(tiny_model).bfloat16()
    ours, expected = predictions(rough, clips()), predictions(cast, clips())
    assert all(relative_error(ours[name], expected[name].float()) < 0.3 for name in ours)


@pytest.mark.parametrize("how", ["load", "in place", "cast", "data"])
def test_changed_weights_are_used(tiny_model: VideoMask2Former, prepared: VideoMask2Former, how: str) -> None:
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    if how == "load":
        prepared.load_state_dict(other.state_dict())
    elif how == "in place":
        with torch.no_grad():
            for ours, theirs in zip(prepared.parameters(), other.parameters(), strict=True):
                ours.copy_(theirs)
    elif how == "cast":
        prepared, other = prepared.double(), copy.deepcopy(tiny_model).double()
    else:
        for ours, theirs in zip(prepared.parameters(), other.parameters(), strict=True):
            ours.data = theirs.data
    pixels = clips().to(other.dtype)
    assert differences(predictions(prepared, pixels), predictions(other, pixels)) == {}


def test_a_prepared_model_can_be_copied_and_trained(prepared: VideoMask2Former) -> None:
    copied = copy.deepcopy(prepared).requires_grad_(True).train()
    assert all(module._packed is None for module in copied.modules() if isinstance(module, Linear))
    copied(clips()).class_queries_logits.sum().backward()
    assert copied.transformer_decoder.class_head.weight.grad is not None
    prepared.requires_grad_(True)(clips()).class_queries_logits.sum().backward()
    assert prepared.transformer_decoder.class_head.weight.grad is not None


def test_in_inference_mode_weights_stay_unpacked(tiny_model: VideoMask2Former, prepared: VideoMask2Former) -> None:
    with torch.inference_mode():
        made_there = copy.deepcopy(tiny_model).prepare_for_inference(compile="none")
        with torch.no_grad():
            made_there.pixel_decoder.layers[0].linear1.weight.mul_(2)
        changed = predictions(made_there, clips())
        assert differences(changed, predictions(tiny_model, clips())) != {}
        prepared.double()  # gives it weights of that kind
        assert predictions(prepared, clips().double())["classes"].dtype == torch.float64


def test_a_prepared_model_compiles_as_one_graph(prepared: VideoMask2Former) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(prepared.pixel_decoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        maps = prepared.backbone(clips()[0])
        assert_close(compiled(maps).mask_features, prepared.pixel_decoder(maps).mask_features)


def test_the_model_is_compiled_on_request_and_no_longer(
    tiny_model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_eagerly = partial(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_eagerly(module))
    model = copy.deepcopy(tiny_model).prepare_for_inference(compile="model")
    assert model.backbone._compiled_call_impl is not None
    assert differences(predictions(model, clips()), predictions(tiny_model, clips())) == {}
    model.prepare_for_inference(compile="none")
    assert model.backbone._compiled_call_impl is None


def test_bad_options_are_named(prepared: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.train()
    with pytest.raises(ValueError, match=r"compile must be auto, kernels, model or none, got 'fast'"):
        prepared.prepare_for_inference(compile="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int8"):
        prepared.prepare_for_inference(dtype="int8")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile='kernels' cannot be done: there is no C\+\+ compiler 'no-such"):
        prepared.prepare_for_inference(compile="kernels", dtype="bfloat16")
    assert prepared.training
    assert prepared.dtype == torch.float32
    with pytest.raises(ValueError, match=r"compile='kernels' is for a CPU, the model is on meta"):
        prepared.to("meta").prepare_for_inference(compile="kernels")


def is_compiled(model: VideoMask2Former) -> bool:
    return any(module.compiled for module in model.modules() if isinstance(module, MSDeformAttn))


@needs_kernels
def test_everything_that_knows_kernels_gets_them_and_loses_them(prepared: VideoMask2Former) -> None:
    knows = [module for module in prepared.modules() if hasattr(module, "compiled")]
    assert knows
    for compile, expected in (("kernels", True), ("none", False), ("auto", True)):
        prepared.prepare_for_inference(compile=compile)
        assert {module.compiled for module in knows} == {expected}


@needs_kernels
@pytest.mark.usefixtures("no_library")
def test_kernels_that_do_not_compile_leave_the_model(
    prepared: VideoMask2Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.train()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="do not compile: false"):
        prepared.prepare_for_inference(compile="kernels", dtype="bfloat16")
    assert prepared.training
    assert prepared.dtype == torch.float32
    assert not is_compiled(prepared)


@needs_kernels
@pytest.mark.usefixtures("no_library")
def test_auto_goes_on_without_kernels(prepared: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(RuntimeWarning, match="going on without compiled kernels: .*do not compile: false"):
        prepared.prepare_for_inference()
    assert not is_compiled(prepared)
    monkeypatch.setenv("CXX", "no-such-compiler")  # no reason to warn
    assert not is_compiled(prepared.prepare_for_inference())

"""Acceleration for the length of a call, and for good: who shares it, and what it leaves behind."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import MethodType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m2f_video import VideoMask2Former, segment_video
from m2f_video.acceleration import accelerated, context, cpu_kernels, prepare, release, report, swap
from m2f_video.acceleration.swap import Fused
from tests.acceleration.conftest import clip
from tests.tolerances import relative_error

Build = Callable[[str], VideoMask2Former]

TOLERANCE = 1e-5
BLOCK = "backbone.stages.1.blocks.1"


def predict(model: nn.Module) -> Tensor:
    output = model(clip())
    return torch.cat([output.class_queries_logits.flatten(), output.masks_queries_logits.flatten()])


def twins(model: nn.Module) -> int:
    return sum(isinstance(module, Fused) for module in model.modules())


def is_as_it_was(model: nn.Module) -> bool:
    sealed = any("_seal" in vars(module) for module in model.modules())
    return not twins(model) and not sealed and not context._users


@pytest.fixture
def expected(build: Build) -> Tensor:
    with torch.no_grad():
        return predict(build("swin"))


@pytest.fixture(autouse=True)
def _said_nothing_yet() -> None:
    context._say_once.cache_clear()


def test_twins_are_in_place_for_the_length_of_a_call(model: VideoMask2Former, expected: Tensor) -> None:
    seen = []
    block = model.get_submodule(BLOCK)
    block.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad(), accelerated(model) as fast:
        assert fast is model
        assert twins(model) > 10
        assert relative_error(predict(fast), expected) < TOLERANCE
    assert seen == [block]  # hooks see the user's own modules, with all frames
    assert is_as_it_was(model)


@pytest.mark.parametrize("plain", [False, True])
def test_a_model_is_as_it_was_after_an_error(plain: bool, model: VideoMask2Former) -> None:
    model.get_submodule(BLOCK).register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), accelerated(model, plain):
        model(clip())
    assert is_as_it_was(model)


def test_packing_that_is_interrupted_leaves_nothing(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(model.backbone)
    before, put = twins(model), swap._put
    calls: list[object] = []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) > before + 3:
            raise KeyboardInterrupt
        return put(*args)

    monkeypatch.setattr(swap, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt), accelerated(model):
        pass
    assert twins(model) == twins(model.backbone) == before
    assert not context._users


def test_the_last_to_leave_takes_twins_out(model: VideoMask2Former, expected: Tensor) -> None:
    first, second = ExitStack(), ExitStack()
    with torch.no_grad():
        first.enter_context(accelerated(model))
        second.enter_context(accelerated(model))
        packed = model.get_submodule(BLOCK).__dict__["_seal"]
        first.close()
        assert model.get_submodule(BLOCK).__dict__["_seal"] is packed
        assert relative_error(predict(model), expected) < TOLERANCE
        with accelerated(model):  # a third, nested
            second.close()
            assert twins(model)
    assert is_as_it_was(model)


def test_a_part_that_others_use_too_keeps_its_twins(model: VideoMask2Former) -> None:
    with accelerated(model):
        whole = twins(model)
        with accelerated(model.backbone):
            assert twins(model) == whole
        assert twins(model) == whole
    assert is_as_it_was(model)


def test_threads_share_twins(model: VideoMask2Former, expected: Tensor) -> None:
    started = threading.Barrier(4)

    def infer(_: int) -> list[float]:
        started.wait()
        errors = []
        for _ in range(4):
            with torch.inference_mode(), accelerated(model) as fast:
                errors.append(relative_error(predict(fast), expected))
        return errors

    with ThreadPoolExecutor(4) as pool:
        assert max(error for errors in pool.map(infer, range(4)) for error in errors) < TOLERANCE
    assert is_as_it_was(model)


def test_gradients_are_those_of_the_plain_model_meanwhile(model: VideoMask2Former, build: Build) -> None:
    other = build("swin")
    gradients = []
    for each in (other, model):
        each.requires_grad_(True)
        with accelerated(model):
            predict(each).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE


def test_a_training_model_stays_in_training_mode_all_along(model: VideoMask2Former, expected: Tensor) -> None:
    model.train()
    model.get_submodule(BLOCK).drop_path.drop_prob = 0.5
    with torch.no_grad(), accelerated(model) as fast:
        assert all(module.training for module in model.modules())
        assert not any(module.training for module in fast.modules())
        assert not twins(model)
        assert twins(fast)
        assert relative_error(predict(fast), expected) < TOLERANCE
        torch.manual_seed(0)
        assert relative_error(predict(model), expected) > 100 * TOLERANCE  # who trains it meanwhile has its dropout
        names = dict(model.named_parameters())
        assert all(parameter is names[name] for name, parameter in fast.named_parameters())
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert relative_error(predict(fast), expected) > 100 * TOLERANCE  # and its steps count
    assert all(module.training for module in model.modules())
    assert is_as_it_was(model)


def test_one_part_in_training_mode_is_enough(model: VideoMask2Former, expected: Tensor) -> None:
    part = model.get_submodule(BLOCK).drop_path.train()
    part.drop_prob = 0.9
    with torch.no_grad(), accelerated(model) as fast:
        assert fast is not model
        assert relative_error(predict(fast), expected) < TOLERANCE
    assert [module for module in model.modules() if module.training] == [part]


def test_patches_of_a_training_model_go_along(model: VideoMask2Former, build: Build) -> None:
    def patch(model: VideoMask2Former) -> VideoMask2Former:
        block = model.get_submodule(BLOCK)
        block.drop_path.drop_prob = 0.9
        original = type(block)._attend
        block._attend = MethodType(lambda self, x: 3 * original(self, x), block)
        model.transformer_decoder.norm.forward = lambda x: x
        return model

    with torch.no_grad():
        expected = predict(patch(build("swin")))
        with accelerated(patch(model).train()) as fast:
            assert relative_error(predict(fast), expected) < TOLERANCE


def test_a_patch_that_holds_modules_in_training_mode_is_named(
    model: VideoMask2Former, caplog: pytest.LogCaptureFixture
) -> None:
    block = model.get_submodule(BLOCK)
    original = block.forward
    block.forward = lambda x: original(x)
    with caplog.at_level(logging.WARNING), accelerated(model):
        assert not caplog.messages
    model.train()
    with caplog.at_level(logging.WARNING), accelerated(model), accelerated(model):
        pass
    [message] = caplog.messages
    assert "forward of a SwinBlock is a function or object of its own" in message
    assert "model.eval()" in message


def test_a_prepared_model_stays_prepared(model: VideoMask2Former, expected: Tensor) -> None:
    model.prepare_for_inference()
    seals = [vars(module).get("_seal") for module in model.modules()]
    for plain in (False, True):
        with torch.no_grad(), accelerated(model, plain) as fast:
            assert relative_error(predict(fast), expected) < TOLERANCE
        assert [vars(module).get("_seal") for module in model.modules()] == seals  # nor is anything packed anew
    assert twins(model) > 10
    assert not context._users


def test_what_is_prepared_meanwhile_stays(model: VideoMask2Former, expected: Tensor) -> None:
    with torch.no_grad(), accelerated(model):
        model.prepare_for_inference()
    with torch.no_grad():
        assert relative_error(predict(model), expected) < TOLERANCE
    assert twins(model) > 10
    assert not context._users
    release(model)
    assert is_as_it_was(model)


def test_what_is_released_meanwhile_is_plain(model: VideoMask2Former) -> None:
    with accelerated(model):
        release(model)
        assert not twins(model)
    assert is_as_it_was(model)


def test_a_module_that_is_put_in_meanwhile_is_let_alone(model: VideoMask2Former, build: Build) -> None:
    with accelerated(model):
        old = model.get_submodule(BLOCK)
        new = model.backbone.stages[1].blocks[1] = build("swin").get_submodule(BLOCK)
        assert type(new) is old.plain
    assert is_as_it_was(model)
    assert not isinstance(old, Fused)


def test_a_module_in_two_places_is_accelerated_once(model: VideoMask2Former, build: Build) -> None:
    with torch.no_grad():
        other = build("swin")
        for each in (model, other):
            each.transformer_decoder.layers[2] = each.transformer_decoder.layers[0]
        with accelerated(model) as fast:
            assert relative_error(predict(fast), predict(other)) < TOLERANCE
    assert is_as_it_was(model)


def test_what_is_compiled_is_not_compiled_anew(model: VideoMask2Former, expected: Tensor) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    model.pixel_decoder.compile(backend=backend)
    with torch.no_grad():
        model(clip(1))
        before = len(compiled)
        with accelerated(model) as fast:
            assert not twins(model.pixel_decoder)
            assert twins(model.backbone)
            assert relative_error(predict(fast), expected) < TOLERANCE
        assert len(compiled) == before
    assert is_as_it_was(model)


def test_a_compiled_model_in_training_mode_does_not_drop(model: VideoMask2Former, expected: Tensor) -> None:
    model.get_submodule(BLOCK).drop_path.drop_prob = 0.9
    model.backbone = torch.compile(model.backbone.train(), backend="eager")
    model.pixel_decoder.compile(backend="eager")
    with torch.no_grad(), accelerated(model.train()) as fast:
        assert relative_error(predict(fast), expected) < TOLERANCE


def test_a_model_elsewhere_than_on_a_cpu_has_no_twins(model: VideoMask2Former) -> None:
    model.to("meta")
    with accelerated(model):
        assert not twins(model)
    assert {row.state for row in report(model)} == {"plain"}


def test_without_kernels_onednn_does_it_and_a_line_says_so(
    model: VideoMask2Former, expected: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_kernels, "why_no_kernels", lambda: "there is no C++ compiler")
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            with accelerated(model) as fast:
                assert relative_error(predict(fast), expected) < TOLERANCE
                states = {row.type: row.state for row in report(model)}
    assert states["Linear"] == "oneDNN"
    assert states["SwinBlock"] == "plain"
    [line] = caplog.messages
    assert line == "m2f-video: going on without compiled kernels, by oneDNN: there is no C++ compiler"


@pytest.mark.parametrize("compile", ["auto", "kernels", "none"])
def test_ways_to_prepare(compile: context.Compile, model: VideoMask2Former, calls: list[str]) -> None:
    model.prepare_for_inference(compile=compile)
    with torch.no_grad():
        model(clip())
    assert bool(calls) == (compile != "none")


def test_a_report_names_every_module_and_why_it_is_plain(model: VideoMask2Former) -> None:
    assert {row.reason for row in report(model) if row.type == "SwinBlock"} == {"not accelerated"}
    block, layer = model.get_submodule(BLOCK), model.transformer_decoder.layers[0]
    block.mlp.register_forward_hook(lambda *_: None)
    model.backbone.stages[0].blocks[0].forward = block.forward
    model.prepare_for_inference()
    layer.linear1.weight.mul_(2)
    rows = {row.name: row for row in report(model)}
    assert (rows[BLOCK].state, rows[BLOCK].reason) == ("plain", "mlp is hooked or patched")
    assert rows["backbone.stages.0.blocks.0"].reason == "its forward is patched"
    assert rows["transformer_decoder.layers.0"].reason == "it was touched since"
    assert rows["transformer_decoder.layers.1"].state == "fused"
    assert rows["transformer_decoder.query_features"].reason == "there is no twin for it"
    assert rows[f"{BLOCK}.mlp"].state == "fused"  # what is inside such a module is accelerated by itself
    assert "transformer_decoder.layers.1.linear1" not in rows  # covered by the layer's twin
    names = {name for name, _ in model.named_parameters()}
    assert all(any(name.startswith(row) for row in rows) for name in names)


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float16, "not float16"), (torch.float64, "not float64")], ids=str)
def test_other_types_are_plain_and_the_report_says_so(dtype: torch.dtype, reason: str, model: VideoMask2Former) -> None:
    model.to(dtype)
    prepare(model)
    blocks = [row for row in report(model) if row.type == "SwinBlock"]
    assert all(row.state == "plain" and reason in row.reason for row in blocks)


def test_segmenting_in_threads_and_in_training_mode_gives_the_same_tracks(model: VideoMask2Former) -> None:
    video = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    expected = [track.score for track in segment_video(model, video, plain=True).tracks]
    model.train()
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda _: segment_video(model, video), range(2)):
            assert [track.score for track in result.tracks] == pytest.approx(expected, rel=1e-4)
    assert all(module.training for module in model.modules())
    assert is_as_it_was(model)

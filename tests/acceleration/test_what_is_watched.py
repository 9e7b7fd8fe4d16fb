"""What a twin does not see, it must not stand for: names that functions use, what mixes frames, files that change."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video import VideoMask2Former
from m2f_video.acceleration import accelerated, report, written_for
from m2f_video.acceleration.swap import Fused
from m2f_video.modeling import cross_attention, pixel_decoder, swin, transformer_decoder, video_mask2former
from m2f_video.modeling.transformer_decoder import CrossAttention, Level, attention_mask
from tests.acceleration.conftest import clip
from tests.tolerances import relative_error

Build = Callable[[str], VideoMask2Former]


def predict(model: VideoMask2Former) -> Tensor:
    return model(clip(3)).class_queries_logits.detach()


def assert_followed(model: VideoMask2Former, change: Callable[[], object], tolerance: float = 1e-4) -> None:
    """A change of a prepared model has the effect that it has on its plain copy, and has one."""
    with torch.no_grad():
        with accelerated(model, plain=True) as plain:
            before = predict(plain)
        model.prepare_for_inference()
        change()
        with accelerated(model, plain=True) as plain:
            expected = predict(plain)
        assert relative_error(expected, before) > 10 * tolerance  # or this would test nothing
        assert relative_error(predict(model), expected) < tolerance
        with accelerated(model) as fast:
            assert relative_error(predict(fast), expected) < tolerance


# --- frames that see each other


class MixFrames(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


class OtherPixelDecoder(pixel_decoder.MSDeformAttnPixelDecoder):
    def forward(self, maps: tuple[Tensor, ...], output_hidden: bool = False) -> Any:
        return super().forward(tuple(level - 0.5 * level.mean(0, keepdim=True) for level in maps), output_hidden)


def replace_norm(model: VideoMask2Former) -> None:
    model.pixel_decoder.lateral_conv[1] = nn.BatchNorm2d(64, track_running_stats=False).requires_grad_(False)


WAYS_TO_MIX: dict[str, Callable[[VideoMask2Former], object]] = {
    "module": lambda model: model.pixel_decoder.lateral_conv.append(MixFrames()),
    "norm": replace_norm,
    "subclass": lambda model: setattr(model.pixel_decoder, "__class__", OtherPixelDecoder),
    "hook": lambda model: (
        model.backbone.stages[1].blocks[0].register_forward_hook(lambda _, args, output: MixFrames()(output))
    ),
    "pre-hook": lambda model: model.pixel_decoder.register_forward_pre_hook(
        lambda _, args: (tuple(level - 0.5 * level.mean(0, keepdim=True) for level in args[0]), *args[1:])
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_MIX)
def test_what_mixes_frames_sees_them_all(way: str, model: VideoMask2Former) -> None:
    assert_followed(model, lambda: WAYS_TO_MIX[way](model))


def test_a_changed_concatenation_of_frames_counts(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    concatenate = video_mask2former.FrameFeatures.concatenate.__func__

    @classmethod
    def doubled(cls: Any, parts: Any) -> Any:
        whole = concatenate(cls, parts)
        return cls(2 * whole.mask_features, tuple(2 * level for level in whole.multi_scale))

    assert_followed(model, lambda: monkeypatch.setattr(video_mask2former.FrameFeatures, "concatenate", doubled))


def test_hooks_on_the_backbone_see_all_frames(model: VideoMask2Former) -> None:
    seen: list[int] = []
    model.backbone.register_forward_hook(lambda _, args, output: seen.append(len(output[0])))
    with torch.no_grad(), accelerated(model) as fast:
        predict(fast)
    assert seen == [3]


def test_what_is_trained_after_preparing_runs_as_written(build: Build) -> None:
    expected, prepared = build("timm").train(), build("timm").prepare_for_inference()
    prepared.train().requires_grad_(True)
    assert relative_error(predict(prepared), predict(expected)) < 1e-4  # batch norms of all frames


def test_gradients_are_those_of_all_frames_at_once(model: VideoMask2Former) -> None:
    calls: list[int] = []
    backbone_forward = swin.SwinTransformer.forward
    model.prepare_for_inference().requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            swin.SwinTransformer, "forward", lambda self, x: (calls.append(len(x)), backbone_forward(self, x))[1]
        )
        predict(model)
    assert calls == [3]


# --- names


def test_a_cached_property_counts(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = functools.cached_property(lambda level: level.values)
    keys.__set_name__(Level, "keys")
    assert_followed(model, lambda: monkeypatch.setattr(Level, "keys", keys))


def test_another_module_of_the_same_name_counts(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(**{**vars(F), "relu": F.silu})
    assert_followed(model, lambda: monkeypatch.setattr(transformer_decoder, "F", other))


def test_an_overridden_call_counts(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(module: nn.Module, x: Tensor) -> Tensor:
        return 2 * nn.Module.__call__(module, x)

    assert_followed(model, lambda: monkeypatch.setattr(swin.Mlp, "__call__", doubled, raising=False))


def test_code_exchanged_within_a_function_counts(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(mask_logits: Tensor) -> Tensor:
        return torch.ones_like(mask_logits, dtype=torch.bool)

    assert_followed(model, lambda: monkeypatch.setattr(attention_mask, "__code__", everything.__code__))


def test_the_same_text_in_another_file_counts(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds its names there."""
    forward = CrossAttention.forward
    names = {**vars(cross_attention), "__name__": "script", "attention_mask": lambda logits: logits >= 0.5}
    copied = FunctionType(forward.__code__, names, "forward", forward.__defaults__)
    assert_followed(model, lambda: monkeypatch.setattr(CrossAttention, "forward", copied))


@pytest.mark.parametrize("later", ["def f(x):\n    return x < 0.0\n", "def f(x):\n    return (\n", ""])
def test_a_file_changed_after_it_was_imported_tells_nothing(later: str, tmp_path: Path) -> None:
    file = tmp_path / "edited.py"
    file.write_text("def f(x):\n    return x < 0.5\n")
    spec = importlib.util.spec_from_file_location("edited", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["edited"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        file.write_text(later)  # taken back, half typed, or emptied
        assert written_for._hash_source.__wrapped__(module.f.__code__, "function") == ""
    finally:
        del sys.modules["edited"]


# --- plain


def test_plain_is_plain_where_a_model_is_prepared(model: VideoMask2Former) -> None:
    with torch.no_grad():
        expected = predict(model)
        model.prepare_for_inference()
        with accelerated(model, plain=True) as plain:
            assert torch.equal(predict(plain), expected)
            assert {row.state for row in report(plain)} == {"plain"}
    assert any(isinstance(module, Fused) for module in model.modules())


def test_an_attribute_that_runs_a_module_is_said(
    model: VideoMask2Former, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("m2f_video.acceleration.context._say_once", said.append)
    layer = model.pixel_decoder.layers[0]
    layer.apply_dropout = lambda x: layer.dropout(x)
    with accelerated(model.train()):
        pass
    assert any("apply_dropout of a DeformableEncoderLayer" in line for line in said)


@pytest.mark.parametrize("call", [
    lambda model, x: model(x), lambda model, x: model(pixel_values=x), lambda model, x: model(x, True),
    lambda model, x: model(x, False, False, None), lambda model, x: model(x, output_auxiliary=True),
])  # fmt: skip
def test_frames_are_encoded_one_by_one_however_a_model_is_called(
    call: Callable[[VideoMask2Former, Tensor], Any], model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        expected = call(model, clip(3)).class_queries_logits
        sizes: list[int] = []
        blocks = model.prepare_for_inference().backbone.stages[0].blocks
        fused = type(blocks[0]).fused
        monkeypatch.setattr(
            type(blocks[0]), "fused", lambda self, packed, x: (sizes.append(len(x)), fused(self, packed, x))[1]
        )
        assert relative_error(call(model, clip(3)).class_queries_logits, expected) < 1e-4
    assert sizes == [1] * 3 * (len(sizes) // 3)
    assert sizes


@pytest.mark.parametrize("kind", [cross_attention.CrossAttention, cross_attention.SelfAttention])
@pytest.mark.parametrize("name", ["attend", "projections"])
def test_an_inherited_method_overridden_by_the_heir_counts(
    kind: type[nn.Module], name: str, model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = getattr(kind, name)
    changes = {
        "attend": lambda self, *args: 3 * inherited(self, *args).roll(1, dims=-1),
        "projections": lambda self: ((3 * weight.roll(1, dims=0), bias) for weight, bias in inherited(self)),
    }
    assert_followed(model, lambda: monkeypatch.setattr(kind, name, changes[name], raising=False))

"""What a module's `forward` says is what runs: whatever anybody changes takes effect in every mode and on every way.

No speed-up may break this. The modules are found, not listed: a new one is tested from its first day.
"""

import copy
import dataclasses
import functools
import inspect
import io
import json
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import MethodType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

import m2f_video.modeling
from m2f_video import VideoMask2Former, segment_video
from m2f_video.acceleration import accelerated, written_for
from m2f_video.acceleration.swap import Fused
from m2f_video.acceleration.twins import WRITTEN
from m2f_video.modeling import cross_attention, feature_pyramids, position_encoding, swin, transformer_decoder
from m2f_video.modeling.cross_attention import Level
from m2f_video.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from m2f_video.modeling.timm_backbone import TimmBackbone
from m2f_video.ops import BACKEND_VARIABLE
from tests.acceleration.conftest import clip
from tests.tolerances import relative_error

Build = Callable[[str], VideoMask2Former]

TOLERANCE = 1e-4
VIDEO = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)


def public_modules() -> list[type[nn.Module]]:
    found = []
    for info in pkgutil.iter_modules(m2f_video.modeling.__path__):
        module = import_module(f"m2f_video.modeling.{info.name}")
        for name, value in vars(module).items():
            is_ours = inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
            if is_ours and not name.startswith("_") and value.forward is not nn.Module.forward:
                found.append(value)
    return found


MODULES = public_modules()
VARIANTS: dict[type[nn.Module], dict[str, str]] = {
    cross_attention.FullCrossAttention: {"cross_attention": "full"},
    cross_attention.MaskPooling: {"cross_attention": "mask_pooling"},
    cross_attention.SpatiallyModulatedCrossAttention: {"cross_attention": "smca"},
    transformer_decoder.SelfFirstDecoderLayer: {"layer_order": "self_first"},
    position_encoding.SinePosition2D: {"temporal_position": "sine_2d"},
    position_encoding.NoPosition: {"temporal_position": "none"},
    feature_pyramids.BackboneProjections: {"kind": "none"},
    feature_pyramids.FeaturePyramid: {"kind": "fpn"},
    feature_pyramids.SemanticFeaturePyramid: {"kind": "semantic_fpn"},
    feature_pyramids.AlignedFeaturePyramid: {"kind": "fapn"},
    feature_pyramids.FeatureSelection: {"kind": "fapn"},
    feature_pyramids.FeatureAlignment: {"kind": "fapn"},
    feature_pyramids.DeformableConv: {"kind": "fapn"},
    feature_pyramids.BidirectionalFeaturePyramid: {"kind": "bifpn"},
    feature_pyramids.BidirectionalLayer: {"kind": "bifpn"},
    feature_pyramids.WeightedFusion: {"kind": "bifpn"},
}
"""Fields of the transformer decoder, or the kind of pixel decoder, that build what the published model has not."""
WITHOUT_BACKWARD = (
    feature_pyramids.BackboneProjections, feature_pyramids.FeaturePyramid, feature_pyramids.SemanticFeaturePyramid,
    feature_pyramids.AlignedFeaturePyramid, feature_pyramids.BidirectionalFeaturePyramid,
    MSDeformAttnPixelDecoder, transformer_decoder.MaskedTransformerDecoder, VideoMask2Former,
    position_encoding.SinePosition3D, position_encoding.SinePosition2D, position_encoding.NoPosition,
)  # fmt: skip
"""For which PyTorch calls no backward hooks: they give dataclasses, or what has no gradients."""


def changed(value: Any) -> Any:
    """The same structure with other numbers, that no norm and no softmax takes back."""
    if isinstance(value, Tensor) and value.is_floating_point():
        rows = torch.linspace(1, 2, len(value), dtype=value.dtype).view(-1, *(1,) * (value.ndim - 1))
        return value * 1.25 + rows * torch.linspace(-0.5, 0.5, value.shape[-1], dtype=value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(changed(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: changed(item) for name, item in vars(value).items()})
    return value


def variant(kind: type[nn.Module]) -> str:
    """What `build` calls the model that has such a module."""
    return "timm" if kind is TimmBackbone else "/".join(*VARIANTS[kind].items()) if kind in VARIANTS else "swin"


def first_of(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return next(m for m in model.modules() if (m.plain if isinstance(m, Fused) else type(m)) is kind)


def subclass(module: nn.Module, kind: type[nn.Module]) -> None:
    forward = kind.forward
    methods = {"forward": lambda self, *args, **kwargs: changed(forward(self, *args, **kwargs))}
    module.__class__ = type("Changed", (kind,), methods)


def patch_instance(module: nn.Module, kind: type[nn.Module]) -> None:
    forward = kind.forward
    module.forward = MethodType(lambda self, *args, **kwargs: changed(forward(self, *args, **kwargs)), module)


def hook(module: nn.Module, kind: type[nn.Module]) -> None:
    module.register_forward_hook(lambda _, args, output: changed(output))


def pre_hook(module: nn.Module, kind: type[nn.Module]) -> None:
    module.register_forward_pre_hook(lambda _, args: changed(args))


def nothing(module: nn.Module, kind: type[nn.Module]) -> None:
    """What is changed is the class."""


WAYS = {"subclass": subclass, "instance": patch_instance, "hook": hook, "pre-hook": pre_hook, "class": nothing}


@contextmanager
def class_patched(kind: type[nn.Module], way: str) -> Iterator[None]:
    forward, is_own = kind.forward, "forward" in vars(kind)
    if way == "class":
        kind.forward = lambda self, *args, **kwargs: changed(forward(self, *args, **kwargs))
    try:
        yield
    finally:
        if is_own:
            kind.forward = forward
        elif way == "class":
            del kind.forward  # which is inherited


def predict(model: VideoMask2Former) -> Tensor:
    output = model(clip())
    assert output.masks_queries_logits is not None
    return torch.cat([output.class_queries_logits.flatten(), output.masks_queries_logits.flatten()]).detach()


def scores(model: VideoMask2Former, plain: bool) -> list[float]:
    return [track.score for track in segment_video(model, VIDEO, top_k=6, plain=plain).tracks]


def cases() -> list[Any]:
    """Every module by every way; fast ones are a way for each of the published model's and each way for some."""
    return [
        pytest.param(kind, way, id=f"{kind.__name__}-{way}", marks=marks(kind, (i + j) % len(WAYS) == 0))
        for i, kind in enumerate(MODULES)
        for j, way in enumerate(WAYS)
        if way != "pre-hook" or not issubclass(kind, position_encoding.SinePosition3D)  # whose arguments are sizes
    ]


def marks(kind: type[nn.Module], fast: bool) -> Any:
    return () if fast and kind not in VARIANTS else pytest.mark.slow


@pytest.fixture(scope="module")
def of_unchanged(build: Build) -> Callable[[str], tuple[Tensor, list[float]]]:
    """Gives the predictions and scores of a model as it is."""
    return functools.cache(torch.no_grad()(lambda name: (predict(build(name)), scores(build(name), plain=False))))


@pytest.mark.parametrize(("kind", "way"), cases())
def test_a_changed_module_runs(
    kind: type[nn.Module], way: str, build: Build, of_unchanged: Callable[[str], tuple[Tensor, list[float]]]
) -> None:
    backbone = variant(kind)

    def altered() -> VideoMask2Former:
        model = build(backbone)
        WAYS[way](first_of(model, kind), kind)
        return model

    unchanged, before = of_unchanged(backbone)
    prepared = build(backbone).prepare_for_inference()
    with class_patched(kind, way):
        results = {}
        with torch.no_grad():
            model = altered()
            expected = predict(model)
            assert relative_error(expected, unchanged) > 10 * TOLERANCE  # or this would test nothing
            WAYS[way](first_of(prepared, kind), kind)
            results["prepared, then changed"] = predict(prepared)
            results["changed, then prepared"] = predict(altered().prepare_for_inference())
        with torch.inference_mode():
            results["inference mode"] = predict(model)
            with accelerated(model) as fast:
                results["accelerated"] = predict(fast)
        if kind is not VideoMask2Former:  # whose two halves are called there
            plain = scores(model, plain=True)
            assert scores(model, plain=False) == pytest.approx(plain, rel=1e-3)
            assert plain != pytest.approx(before, rel=1e-3)
        assert not any(isinstance(module, Fused) for module in model.modules())
        model = altered().train()
        if backbone != "timm":  # whose batch norms are another function then
            results["training"] = predict(model.requires_grad_(True))
        with torch.inference_mode(), accelerated(model) as fast:
            results["accelerated, in training"] = predict(fast)
    errors = {route: relative_error(result, expected) for route, result in results.items()}
    assert all(error < TOLERANCE for error in errors.values()), errors
    with torch.no_grad():
        if way == "class":
            assert relative_error(predict(prepared), unchanged) < TOLERANCE  # fused again


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=marks(kind, i % 3 == 0)) for i, kind in enumerate(MODULES)],
    ids=lambda kind: kind.__name__,
)
def test_backward_hooks_are_called(kind: type[nn.Module], build: Build) -> None:
    model, seen = build(variant(kind)).prepare_for_inference(), []
    with torch.no_grad():
        expected = predict(model)
    module = first_of(model, kind)
    module.register_full_backward_pre_hook(lambda *_: seen.append("called"))
    with torch.no_grad():
        assert relative_error(predict(model), expected) < TOLERANCE
    model.train().requires_grad_(True)
    predictions = model(clip(1, 64, 64).requires_grad_(), output_auxiliary=True).auxiliary or ()
    parts = [logits for each in predictions for logits in (each.class_queries_logits, each.masks_queries_logits)]
    torch.stack([logits.square().mean() for logits in parts]).sum().backward()
    assert bool(seen) == (kind not in WITHOUT_BACKWARD)


def check(model: VideoMask2Former, change: Callable[[VideoMask2Former], object], build: Build) -> None:
    """A change to a prepared model has the effect that it has on a plain one; so has one before it is prepared."""
    plain = build("swin")
    with torch.no_grad():
        unchanged = predict(plain)
    model.prepare_for_inference()
    for each in (model, plain):
        change(each)
    with torch.no_grad():
        expected = predict(plain)
        assert relative_error(expected, unchanged) > 10 * TOLERANCE
        assert relative_error(predict(model), expected) < TOLERANCE
        assert relative_error(predict(model.prepare_for_inference()), expected) < TOLERANCE


def set_attribute(name: str, attribute: str, value: object) -> Callable[[VideoMask2Former], None]:
    return lambda model: setattr(model.get_submodule(name), attribute, value)


def patch_method(name: str, method: str, patch: Callable[[Any], Any]) -> Callable[[VideoMask2Former], None]:
    def change(model: VideoMask2Former) -> None:
        module = model.get_submodule(name)
        original = getattr(module, method)
        setattr(module, method, lambda *args: patch(original(*args)))

    return change


def append_layer(name: str) -> Callable[[VideoMask2Former], None]:
    return lambda model: model.get_submodule(name).append(nn.Tanh())


def add_bias(name: str) -> Callable[[VideoMask2Former], None]:
    bias = torch.linspace(-9, 9, 64)
    return lambda model: setattr(model.get_submodule(name), "bias", nn.Parameter(bias, requires_grad=False))


def set_data_twice(model: VideoMask2Former) -> None:
    weight = model.pixel_decoder.layers[0].linear1.weight
    for factor in (9, 1 / 3):  # the second often gets the address that the first has left
        weight.data = weight.data * factor


def learn(model: VideoMask2Former) -> None:
    """By an optimiser in C++, which counts no change."""
    with torch.enable_grad():
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(clip(1, 64, 64)).class_queries_logits.square().sum().backward()
        optimizer.step()
        model.requires_grad_(False)


BLOCK, LAYER = "backbone.stages.1.blocks.1", "transformer_decoder.layers.0"
CHANGES: dict[str, Callable[[VideoMask2Former], object]] = {
    "shift": set_attribute(BLOCK, "shift", 2),
    "eps": set_attribute(f"{BLOCK}.norm1", "eps", 3.0),
    "heads": set_attribute(f"{LAYER}.cross_attn", "num_heads", 2),
    "pruned": lambda model: prune.l1_unstructured(model.get_submodule(f"{BLOCK}.mlp.fc1"), "weight", amount=0.9),
    "parametrized": lambda model: parametrizations.weight_norm(model.get_submodule(f"{LAYER}.linear1")),
    "assigned": lambda model: setattr(
        model.get_submodule(f"{LAYER}.linear2"), "weight", nn.Parameter(torch.ones(64, 64))
    ),
    "data": lambda model: setattr(model.pixel_decoder.layers[0].linear1.weight, "data", torch.ones(64, 64)),
    "in place": lambda model: model.pixel_decoder.layers[0].linear1.weight.mul_(3),
    "loaded": lambda model: model.load_state_dict({n: t * 1.5 for n, t in model.state_dict().items()}),
    "data, twice": set_data_twice,
    "in place, in inference mode": torch.inference_mode()(
        lambda model: model.pixel_decoder.layers[0].linear1.weight.mul_(3)
    ),
    "learnt": learn,
    "method of a block": patch_method(BLOCK, "_attend", lambda x: x * 3),
    "method of a part": patch_method(f"{BLOCK}.attn", "relative_position_bias", lambda bias: 50 * bias),
    "method of a base class": patch_method(
        f"{LAYER}.cross_attn", "projections", lambda pairs: ((w * 5, b) for w, b in pairs)
    ),
    "method that the twin calls": patch_method("pixel_decoder", "_positions", lambda x: 0 * x),
    "bias of a linear layer": add_bias("backbone.stages.0.downsample.reduction"),
    "bias of a convolution": add_bias("pixel_decoder.lateral_conv.0"),
    "layer at the end of a pair": append_layer("pixel_decoder.input_projections.2"),
    "layer at the end": append_layer("pixel_decoder.output_conv"),
    "another part": lambda model: setattr(model.get_submodule(BLOCK), "mlp", nn.Identity()),
}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=() if i % 2 == 0 else pytest.mark.slow)
        for i, how in enumerate(CHANGES)
        if how != "parametrized"
    ],
)
def test_a_changed_part_counts(how: str, model: VideoMask2Former, build: Build) -> None:
    with torch.no_grad():
        check(model, CHANGES[how], build)


def test_a_parametrized_weight_counts(model: VideoMask2Former) -> None:
    model.prepare_for_inference()
    CHANGES["parametrized"](model)
    with torch.no_grad():
        before = predict(model)
        model.get_submodule(f"{LAYER}.linear1").parametrizations.weight.original0.mul_(3)
        assert relative_error(predict(model), before) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (cross_attention, "attention_mask", lambda logits: torch.ones_like(logits, dtype=torch.bool)),
        (
            swin,
            "shifted_window_mask",
            lambda h, w, s, shift, like: like.new_zeros(1).expand(-(-h // s) * -(-w // s), s * s, s * s),
        ),
        (swin, "SHIFT_MASK", 0.0),
        (Level, "keys", property(lambda level: level.values)),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_changed_function_counts(
    place: Any, name: str, value: Any, model: VideoMask2Former, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        check(model, lambda _: monkeypatch.setattr(place, name, value), build)


def test_the_mask_is_made_in_one_place(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = build("swin")
    for layer in everything.transformer_decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda _, args: args[:2])  # without mask logits
    monkeypatch.setattr(cross_attention, "attention_mask", lambda logits: torch.ones_like(logits, dtype=torch.bool))
    assert scores(build("swin"), plain=False) == pytest.approx(scores(everything, plain=True), rel=1e-3)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_a_class_patched_by_what_looks_like_the_original_counts(
    kind: type[nn.Module], model: VideoMask2Former, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = kind.forward

    @functools.wraps(forward)
    def patched(module: nn.Module, x: Tensor) -> Tensor:
        return changed(forward(module, x))

    with torch.no_grad():
        check(model, lambda _: monkeypatch.setattr(kind, "forward", patched), build)


def test_modes_see_the_calls_of_a_prepared_model(model: VideoMask2Former) -> None:
    class Mode(TorchFunctionMode):
        called: ClassVar[list[object]] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.called.append(func)
            return func(*args, **(kwargs or {}))

    model.prepare_for_inference()
    with torch.no_grad(), Mode():
        model(clip())
    assert sum(function is F.linear for function in Mode.called) > 50


def test_a_backend_that_is_asked_for_later_is_taken(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    model.prepare_for_inference()
    monkeypatch.setenv(BACKEND_VARIABLE, "no such")
    with torch.no_grad(), pytest.raises(ValueError, match="no such"):
        model(clip())


def pickled(model: VideoMask2Former) -> VideoMask2Former:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain_and_equal(
    copied: Callable[[VideoMask2Former], VideoMask2Former], model: VideoMask2Former
) -> None:
    with torch.no_grad():
        expected = predict(model)
        other = copied(model.prepare_for_inference())
        assert torch.equal(predict(other), expected)
    assert not any(isinstance(module, Fused) or "_seal" in vars(module) for module in other.modules())
    assert isinstance(model.backbone.stages[0].blocks[0], Fused)


def test_weights_written_behind_pytorchs_back_count_from_the_next_call(model: VideoMask2Former, build: Build) -> None:
    with torch.no_grad(), accelerated(model.prepare_for_inference()) as fast:
        predict(fast)
    plain = build("swin")
    for each in (model, plain):
        each.pixel_decoder.layers[0].linear1.weight.data.mul_(3)
    with torch.no_grad(), accelerated(model) as fast:
        assert relative_error(predict(fast), predict(plain)) < TOLERANCE


def test_global_hooks_see_every_module(model: VideoMask2Former) -> None:
    model.prepare_for_inference()
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module))
    with torch.no_grad():
        predict(model)
    handle.remove()
    called = [m for m in model.modules() if not isinstance(m, nn.ModuleList | nn.Embedding)]
    assert set(called) == set(seen)


@pytest.mark.parametrize("change", ["double", "bfloat16"])
def test_a_model_that_is_cast_is_plain(change: str, model: VideoMask2Former) -> None:
    model.prepare_for_inference()
    with torch.no_grad():
        assert model.to(getattr(torch, change))(clip()).class_queries_logits.shape == (1, 5, 3)


def test_a_prepared_model_learns(model: VideoMask2Former, build: Build) -> None:
    expected = build("swin").requires_grad_(True)
    model.prepare_for_inference().requires_grad_(True)
    for each in (model, expected):
        optimizer = torch.optim.SGD(each.parameters(), lr=1.0)
        each(clip()).class_queries_logits.square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert relative_error(predict(model), predict(expected)) < TOLERANCE


def test_dropout_drops_in_training_and_not_in_inference(model: VideoMask2Former) -> None:
    model.prepare_for_inference()
    model.backbone.stages[1].blocks[1].drop_path.drop_prob = 0.5
    model.pixel_decoder.layers[0].dropout.p = 0.5
    with torch.no_grad():
        quiet = predict(model)
        model.train()
        torch.manual_seed(0)
        assert relative_error(predict(model), quiet) > 10 * TOLERANCE
        with accelerated(model) as fast:
            assert relative_error(predict(fast), quiet) < TOLERANCE
            assert not fast.training
            assert model.training


def test_twins_are_written_for_the_functions_as_they_are() -> None:
    now = written_for.digests(function for twin in WRITTEN for function in twin.functions())
    kept = json.loads(written_for.FILE.read_text(encoding="utf-8"))
    assert kept == now, "see m2f_video/acceleration/__main__.py"

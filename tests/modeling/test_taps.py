"""Taps: what is captured is what runs, in every mode, and what runs stays what it is."""

import copy
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video import VideoMask2Former, segment_video
from m2f_video.acceleration import accelerated, report
from m2f_video.acceleration.swap import Fused
from m2f_video.modeling.cross_attention import CrossAttention, MaskPooling, attention_mask
from m2f_video.modeling.position_encoding import pixel_centres
from m2f_video.modeling.taps import TapError, attention_weights, capture, tap_names
from m2f_video.modeling.video_mask2former import VideoMask2FormerOutput
from m2f_video.ops import ms_deform_attn, ms_deform_attn_from_offsets
from m2f_video.parity import random_model
from tests.acceleration.conftest import BACKBONES, IN_LANES, clip
from tests.tolerances import assert_close, relative_error

LAYER = "transformer_decoder.layers.1"
CROSS = f"{LAYER}.cross_attn"
SELF = "pixel_decoder.layers.0.self_attn"
EVERYTHING = (
    "transformer_decoder.layers.*", "*.attention_mask", "*.attention_weights", "*.mask_logits", "pixel_decoder",
    "*.sampling_locations", "*.sampling_weights", "backbone", "backbone.stages.*.blocks.*.mlp",
)  # fmt: skip


@pytest.fixture
def model() -> VideoMask2Former:
    return random_model(IN_LANES, 0)


def build(**decoder: Any) -> VideoMask2Former:
    return random_model(IN_LANES.replace(transformer_decoder=replace(IN_LANES.transformer_decoder, **decoder)), 0)


def numbers(output: VideoMask2FormerOutput) -> Tensor:
    assert output.masks_queries_logits is not None
    return torch.cat([output.class_queries_logits.flatten(), output.masks_queries_logits.flatten()])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- results


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("train", [False, True])
def test_capturing_everything_changes_nothing(backbone: str, train: bool) -> None:
    model = random_model(BACKBONES[backbone], 0).train(train)
    batch_norms = copy.deepcopy(model.state_dict())
    expected = model(clip(2), output_auxiliary=True)
    gradients = torch.autograd.grad(numbers(expected).square().sum(), list(model.parameters()), allow_unused=True)
    model.load_state_dict(batch_norms)
    names = EVERYTHING if backbone == "swin" else EVERYTHING[:-1]
    for detach in (True, False):
        with model.capture(*names, detach=detach) as taps:
            output = model(clip(2), output_auxiliary=True)
        assert torch.equal(numbers(output), numbers(expected))
        again = torch.autograd.grad(numbers(output).square().sum(), list(model.parameters()), allow_unused=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, gradients, strict=True))
        model.load_state_dict(batch_norms)
        assert taps[CROSS].requires_grad != detach
    assert hooks(model) == 0


@pytest.mark.parametrize("way", ["prepared", "accelerated", "accelerated in training", "chunks", "halves"])
def test_every_way_to_run_gives_the_same(way: str, model: VideoMask2Former) -> None:
    frames = clip(3)
    with torch.no_grad(), model.capture(*EVERYTHING) as expected:
        result = numbers(model(frames))
    if way == "prepared":
        model.prepare_for_inference()
    with torch.no_grad(), model.capture(*EVERYTHING) as taps:
        if way == "chunks":
            output = model(frames, frames_per_chunk=2)
        elif way == "halves":
            parts = [model.encode_frames(frame[None]) for frame in frames[0]]
            output = model.decode_clip(type(parts[0]).concatenate(parts))
        else:
            with accelerated(model.train(way == "accelerated in training")) as running:
                output = running(frames)
    assert relative_error(numbers(output), result) < 1e-4
    assert taps.keys() == expected.keys()
    for name in taps:
        assert len(taps.calls(name)) == len(expected.calls(name)), name
        for mine, theirs in zip(taps.calls(name), expected.calls(name), strict=True):
            assert_alike(name, mine, theirs)


def assert_alike(name: str, mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs)
    if isinstance(mine, Tensor):
        assert mine.shape == theirs.shape, name
        assert not mine.requires_grad
        assert relative_error(mine.double(), theirs.double()) < 1e-4, name
    elif isinstance(mine, tuple):
        for each in zip(mine, theirs, strict=True):
            assert_alike(name, *each)
    elif mine is not None:
        for part, value in vars(mine).items():
            assert_alike(name, value, getattr(theirs, part))


@pytest.mark.slow
def test_each_name_by_itself_is_captured_of_a_prepared_model(model: VideoMask2Former) -> None:
    """Whatever twin does the work of a module steps aside."""
    names = list(tap_names(model))
    with torch.no_grad():
        with model.capture(*names) as expected:
            model(clip(2, 64, 64))
        uncalled = [name for name in names if not expected.calls(name)]
        assert all(isinstance(model.get_submodule(name), nn.Embedding) for name in uncalled)  # weights alone
        model.prepare_for_inference()
        for name in names:
            with model.capture(name) as taps:
                model(clip(2, 64, 64))
            assert len(taps.calls(name)) == len(expected.calls(name)), name
            for pair in zip(taps.calls(name), expected.calls(name), strict=True):
                assert_alike(name, *pair)


class Pair(NamedTuple):
    count: int
    level: Tensor


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.transformer_decoder = nn.Sequential(nn.Identity()), nn.Identity()

    def forward(self, frames: Tensor, chunk: int) -> Any:
        for part in frames.split(chunk):
            self.backbone({"pair": Pair(3, part), "list": [part[0, 0, 0], None], "text": str(len(part))})
        return self.transformer_decoder(frames)


def test_chunks_of_any_structure_are_joined() -> None:
    net, frames = Nested(), torch.arange(8.0).view(4, 1, 2)[[0, 0, 0, 0]]
    with capture(net, "backbone", "backbone.0") as taps:
        net(frames, 2)
        net(frames, 4)
    halves, whole = taps.calls("backbone.0")
    assert halves["pair"].count == 3
    assert torch.equal(halves["pair"].level, frames)
    assert torch.equal(halves["list"][0], frames[0, 0, 0])
    assert halves["list"][1] is None
    assert (halves["text"], whole["text"]) == ("2", "4")
    with capture(net, "backbone") as taps:
        net(frames, 3)
    with pytest.raises(TapError, match="a str that differs"):
        taps["backbone"]


def test_windows_and_clips_are_entries(model: VideoMask2Former) -> None:
    video = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), np.uint8)
    with model.capture("backbone.out_norms.0", SELF, CROSS, f"{CROSS}.attention_weights") as taps:
        for size in (1, 3):
            segment_video(model, video, frames_per_chunk=size)
        segment_video(model, video[:2])
    for name in taps:
        first, second, third = taps.calls(name)
        assert relative_error(first, second) < 1e-4
        assert len(taps.calls(name)) == 3
        assert third.shape != first.shape or name == CROSS
    assert len(taps.calls("backbone.out_norms.0")[0]) == 5
    assert len(taps.calls("backbone.out_norms.0")[2]) == 2


def test_a_module_called_thrice_for_a_frame_is_three_entries(model: VideoMask2Former) -> None:
    name = "pixel_decoder.layers.0.dropout"
    with torch.no_grad(), model.capture(name) as taps, model.capture(name) as whole:
        model(clip(3), frames_per_chunk=1)
    assert [len(call) for call in taps.calls(name)] == [3, 3, 3]
    assert not torch.equal(taps.calls(name)[0], taps.calls(name)[2])
    assert all(torch.equal(*pair) for pair in zip(taps.calls(name), whole.calls(name), strict=True))


def test_a_step_with_activation_checkpointing_is_captured_once(model: VideoMask2Former) -> None:
    from torch.utils.checkpoint import checkpoint

    with model.train().capture("backbone.out_norms.0", f"{CROSS}.attention_mask") as taps:
        features = checkpoint(model.encode_frames, clip(2)[0], use_reentrant=False)
        output = checkpoint(model.decode_clip, features, use_reentrant=False)
        numbers(output).sum().backward()
    assert len(taps["backbone.out_norms.0"]) == 2
    assert taps[f"{CROSS}.attention_mask"].dtype == torch.bool


def test_what_changes_in_place_later_is_captured_as_it_was(model: VideoMask2Former) -> None:
    name = "pixel_decoder.output_conv.1"  # before a ReLU in place
    with torch.no_grad(), model.capture(name) as taps:
        model(clip(1))
    assert bool((taps[name] < 0).any())


# --- what runs


def test_what_is_captured_runs_plain_and_the_rest_fused(model: VideoMask2Former) -> None:
    model.prepare_for_inference()
    fused = {row.name for row in report(model) if row.state == "fused"}
    with model.capture(f"{CROSS}.attention_mask", f"{SELF}.sampling_locations"):
        with accelerated(model):
            plain = fused - {row.name for row in report(model) if row.state == "fused"}
        assert plain >= {CROSS.removesuffix(".cross_attn"), SELF.removesuffix(".self_attn")}
        reasons = {row.name: row.reason for row in report(model) if row.state == "plain"}
    assert not [name for name in plain if not (LAYER + ".").startswith(name) and not SELF.startswith(name)]
    assert "" in reasons  # which encodes frames one by one where nobody looks
    with accelerated(model):
        assert {row.name for row in report(model) if row.state == "fused"} == fused


def test_reports_name_why(model: VideoMask2Former) -> None:
    with model.capture(f"{CROSS}.attention_mask"), accelerated(model):
        reasons = {row.name: row.reason for row in report(model)}
    assert "hooked" in reasons[CROSS]
    assert "hooked" in reasons[LAYER]
    assert reasons[""] == ""  # frames are encoded one by one still


def test_an_edited_module_is_seen_as_it_is(model: VideoMask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2f_video.modeling.cross_attention.attention_mask", lambda logits: logits > -0.5)
    with torch.no_grad(), model.capture(f"{CROSS}.attention_mask", f"{CROSS}.mask_logits") as taps:
        model(clip(1))
    assert torch.equal(taps[f"{CROSS}.attention_mask"], taps[f"{CROSS}.mask_logits"] > -0.5)


# --- what no forward returns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_weights_times_values_are_the_output_before_its_projection(dtype: torch.dtype) -> None:
    model = random_model(IN_LANES, 0).to(dtype)
    attention = model.get_submodule(CROSS)
    kept: dict[str, Any] = {}
    attention.register_forward_pre_hook(lambda _, args: kept.update(level=args[1], logits=args[2]))
    attention.out_proj.register_forward_pre_hook(lambda _, args: kept.update(before=args[0]))
    with torch.no_grad(), model.capture(f"{CROSS}.*", f"{CROSS}.attention_weights", f"{CROSS}.attention_mask") as taps:
        model(clip(2).repeat(2, 1, 1, 1, 1))
        _, _, of_values = attention.projections()
        values = F.linear(kept["level"].values, *of_values).flatten(1, 2).unflatten(-1, (4, -1)).transpose(1, 2)
    weights, mask = taps[f"{CROSS}.attention_weights"], taps[f"{CROSS}.attention_mask"]
    assert weights.shape == (2, 4, 5, values.shape[2])
    assert_close((weights @ values).transpose(1, 2).flatten(2), kept["before"])
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert torch.equal(mask, attention_mask(kept["logits"]))
    assert bool((weights[~mask[:, None].expand_as(weights)] == 0).all())


@pytest.mark.parametrize("options", [
    {}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": torch.tensor([[True, False, True, True]])},
    {"attn_mask": torch.linspace(-2, 2, 4)[None]}, {"enable_gqa": True},
])  # fmt: skip
def test_weights_are_those_of_pytorchs_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in options else 4
    query, key, value = (torch.randn(2, n, 4, 6, dtype=torch.float64) for n in (4, heads, heads))
    weights = attention_weights(query, key, value, **options)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    assert_close(weights @ value.repeat_interleave(4 // heads, 1), expected)


def test_a_query_that_may_attend_nowhere_weighs_nothing() -> None:
    x = torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    weights = attention_weights(x, x, x, mask)
    assert_close(weights @ x, F.scaled_dot_product_attention(x, x, x, mask))
    assert weights[0, 0, 1].tolist() == [0, 0, 0]


def test_sampling_is_that_of_the_formula(model: VideoMask2Former) -> None:
    names = [f"{SELF}.{name}" for name in ("sampling_locations", "sampling_weights", "sampling_offsets", "value_proj")]
    names += [f"{SELF}.attention_weights", SELF]
    with torch.no_grad(), model.capture(*names) as taps:
        model(clip(2, 64, 96), frames_per_chunk=1)
    sizes = ((2, 3), (4, 6), (8, 12))
    centres = torch.cat([pixel_centres(*size, dtype=torch.float32, device=torch.device("cpu")) for size in sizes])
    offsets = taps[names[2]].view(2, 126, 4, 3, 4, 2)
    expected = torch.empty_like(offsets)
    for level, (height, width) in enumerate(sizes):
        expected[..., level, :, 0] = centres[:, 0, None, None] + offsets[..., level, :, 0] / width
        expected[..., level, :, 1] = centres[:, 1, None, None] + offsets[..., level, :, 1] / height
    assert_close(taps[names[0]], expected)
    logits = taps[names[4]].view(2, 126, 4, 12)
    assert_close(taps[names[1]].flatten(3), logits.exp() / logits.exp().sum(-1, keepdim=True))
    values = taps[names[3]].unflatten(2, (4, -1))
    with torch.no_grad():
        sampled = ms_deform_attn(values, sizes, taps[names[0]], taps[names[1]])
        assert_close(model.get_submodule(SELF).output_proj(sampled), taps[SELF])


@pytest.mark.parametrize("backend", ["reference", "embedding_bag"])
def test_the_operator_shows_its_calls_to_modes_once(backend: str) -> None:
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (ms_deform_attn, ms_deform_attn_from_offsets):
                seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    torch.manual_seed(0)
    value, points = torch.randn(1, 6, 2, 4), torch.rand(3, 2)
    offsets, logits = torch.randn(1, 3, 2, 1, 5, 2), torch.randn(1, 3, 2, 1, 5)
    arguments = value, ((2, 3),), points, offsets, logits, backend
    expected = ms_deform_attn_from_offsets(*arguments)
    with Mode():
        assert torch.equal(ms_deform_attn_from_offsets(*arguments), expected)
        assert seen == [ms_deform_attn_from_offsets]
        ms_deform_attn(value, ((2, 3),), points[:, None, None, None].expand(1, 3, 2, 1, 5, 2), logits, backend)
    assert seen == [ms_deform_attn_from_offsets, ms_deform_attn]


@pytest.mark.parametrize("kind", ["full", "smca", "mask_pooling"])
def test_other_cross_attentions_give_what_they_have(kind: str) -> None:
    model = build(cross_attention=kind)
    names = [f"{CROSS}.{name}" for name in ("attention_mask", "attention_weights", "mask_logits")]
    kept: dict[str, Any] = {}
    attention = model.get_submodule(CROSS)
    attention.register_forward_pre_hook(lambda _, args: kept.update(level=args[1]))
    attention.out_proj.register_forward_pre_hook(lambda _, args: kept.update(before=args[0]))
    with torch.no_grad(), model.capture(*names) as taps:
        model(clip(2))
    mask, weights, logits = (taps[name] for name in names)
    if kind == "full":
        assert mask is None
    elif kind == "smca":
        assert mask.shape == weights.shape
        assert mask.is_floating_point()
    else:
        assert torch.equal(mask, attention_mask(logits))
        assert_close(weights @ kept["level"].values.flatten(1, 2).detach(), kept["before"])
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_a_first_layer_without_masks_has_none() -> None:
    model = build(query_features="zero", cross_attention="mask_pooling")
    with torch.no_grad(), model.capture("*.layers.0.mask_logits", "*.layers.*.cross_attn.attention_mask") as taps:
        model(clip(1))
    assert taps["transformer_decoder.layers.0.mask_logits"] is None
    assert taps["transformer_decoder.layers.0.cross_attn.attention_mask"] is None
    assert taps["transformer_decoder.layers.1.cross_attn.attention_mask"].dtype == torch.bool


class Own(nn.Module):
    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, query: Tensor, level: Any, logits: Tensor | None = None) -> Tensor:
        keys = level.values.flatten(1, 2)
        return self.out(F.scaled_dot_product_attention(query, keys, keys, attn_mask=logits > 0.5))


class Renamed(CrossAttention):
    def forward(self, query: Tensor, level: Any, where: Tensor | None) -> Tensor:
        return super().forward(query, level, where)


class OwnPooling(MaskPooling):
    def forward(self, query: Tensor, level: Any, mask_logits: Tensor | None = None) -> Tensor:
        return self.out_proj(query)


def test_a_module_of_ones_own_is_seen_by_what_it_calls() -> None:
    model = VideoMask2Former(IN_LANES, parts={"cross_attention": Own}).eval()
    with torch.no_grad(), model.capture(f"{LAYER}.mask_logits", "*.cross_attn.attention_mask") as taps:
        model(clip(1))
    assert torch.equal(taps[f"{CROSS}.attention_mask"], taps[f"{LAYER}.mask_logits"] > 0.5)


def test_arguments_are_those_of_ones_own_forward() -> None:
    model = VideoMask2Former(IN_LANES, parts={"cross_attention": Renamed}).eval()
    assert f"{CROSS}.mask_logits" not in tap_names(model)
    with torch.no_grad(), model.capture("*.mask_logits") as taps:
        model(clip(1))
    assert list(taps) == [f"transformer_decoder.layers.{layer}.mask_logits" for layer in range(3)]


def test_what_a_module_does_not_call_is_said() -> None:
    model = VideoMask2Former(IN_LANES, parts={"cross_attention": OwnPooling}).eval()
    with torch.no_grad(), model.capture(f"{CROSS}.attention_weights") as taps:
        model(clip(1))
    with pytest.raises(TapError, match="neither PyTorch's scaled_dot_product_attention nor ms_deform_attn"):
        taps[f"{CROSS}.attention_weights"]
    assert taps.calls(f"{CROSS}.attention_weights") == ()


# --- around a call


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_nothing_behind(error: type[BaseException], model: VideoMask2Former) -> None:
    def fail(*_: Any) -> None:
        raise error("stop")

    handle = model.get_submodule(f"{CROSS}.out_proj").register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(error), model.capture(f"{CROSS}.attention_mask", SELF) as taps:
        model(clip(1))
    handle.remove()
    assert torch._C._len_torch_function_stack() == 0
    assert hooks(model) == 0
    assert taps[f"{CROSS}.attention_mask"].dtype == torch.bool


def test_after_a_call_that_failed_the_next_is_captured(model: VideoMask2Former) -> None:
    name = f"{CROSS}.attention_mask"
    with torch.no_grad(), model.capture(name, CROSS) as taps:
        with pytest.raises(ValueError, match="frames must be"):
            model(clip(1)[0])
        model(clip(1))
    assert taps[name].shape[:2] == taps[CROSS].shape[:2]


def test_copies_made_inside_run_as_ever_afterwards(model: VideoMask2Former) -> None:
    names = f"{CROSS}.attention_weights", "backbone.out_norms.0"
    with torch.no_grad():
        expected = numbers(model(clip(1)))
        with model.capture(*names) as taps:
            other = copy.deepcopy(model)
        assert torch.equal(numbers(other(clip(1))), expected)
        with other.capture(*names) as theirs:
            other(clip(1))
    assert [taps.calls(name) for name in names] == [(), ()]
    assert all(len(theirs.calls(name)) == 1 for name in names)


def test_another_threads_calls_are_not_captured(model: VideoMask2Former) -> None:
    with model.capture(f"{CROSS}.attention_mask", CROSS) as taps:
        thread = threading.Thread(target=lambda: model(clip(1)))
        thread.start()
        thread.join()
    assert taps.calls(CROSS) == ()
    with pytest.raises(TapError, match="another thread"):
        taps[f"{CROSS}.attention_mask"]


def test_what_is_captured_goes_where_it_is_asked_to(model: VideoMask2Former) -> None:
    with torch.no_grad(), model.capture(CROSS, device="meta") as taps:
        model(clip(1))
    assert taps[CROSS].device.type == "meta"


def test_gradients_flow_where_they_are_kept(model: VideoMask2Former) -> None:
    with model.capture(CROSS, f"{CROSS}.attention_weights", detach=False) as taps:
        output = model(clip(1))
    for name in taps:
        loss = output.class_queries_logits.square().sum() if name == CROSS else taps[name].square().sum()
        wrt = taps[name] if name == CROSS else model.get_submodule(CROSS).in_proj_weight
        assert float(torch.autograd.grad(loss, wrt, retain_graph=True)[0].abs().sum()) > 0


# --- what is wrong


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "give names of what to capture"),
        (("transformer_decoder.layer.1.cross_attn",), "there is .*transformer_decoder.layers.1.cross_attn"),
        (("*.attention_masks",), "nothing in the model is called"),
        (("transformer_decoder.layers",), "nothing in the model is called"),  # a list, which is never called
        ((f"{CROSS}.sampling_locations",), "nothing in the model is called"),
        (("",), "nothing in the model is called"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(names: tuple[str, ...], message: str, model: VideoMask2Former) -> None:
    with pytest.raises(ValueError, match=message):
        model.capture(*names)
    assert hooks(model) == 0


def test_what_is_no_name_or_device_is_an_error(model: VideoMask2Former) -> None:
    with pytest.raises(TypeError, match="are texts, got 3"):
        model.capture(3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no such"):
        model.capture(CROSS, device="no such")


def test_what_was_not_captured_or_not_once_is_an_error(model: VideoMask2Former) -> None:
    with torch.no_grad(), model.capture(CROSS) as taps:
        with pytest.raises(TapError, match="was not called"):
            taps[CROSS]
        model(clip(1))
        with pytest.raises(TapError, match="captured were transformer_decoder"):
            taps[SELF]
        model(clip(1))
        with pytest.raises(TapError, match="2 times; taps"):
            taps[CROSS]


def test_frames_of_several_sizes_in_a_clip_are_an_error(model: VideoMask2Former) -> None:
    with torch.no_grad(), model.capture("backbone.out_norms.0") as taps:
        model.encode_frames(clip(1)[0])
        model.encode_frames(clip(1, 96)[0])
    with pytest.raises(TapError, match="does not fit together"):
        taps["backbone.out_norms.0"]


@pytest.mark.slow  # compiles
def test_a_compiled_model_is_refused(model: VideoMask2Former) -> None:
    with pytest.raises(ValueError, match="backbone is compiled by torch"):
        copy.deepcopy(model).prepare_for_inference(compile="model").capture(CROSS)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="the model is compiled"):
        type(model).capture(compiled, CROSS)


@pytest.mark.slow
def test_what_torch_compile_made_is_said_not_to_be_seen(model: VideoMask2Former) -> None:
    names = CROSS, f"{CROSS}.attention_mask", f"{SELF}.sampling_locations"
    compiled = torch.compile(model.requires_grad_(False), backend="eager", fullgraph=True)
    with torch.no_grad(), compiled.capture(*names) as taps:
        output = compiled(clip(1))
        assert_close(numbers(output), numbers(model(clip(1))))  # the same modules, uncompiled: these are seen
        assert [len(taps.calls(name)) for name in names] == [1, 1, 1]
    with torch.no_grad(), compiled.capture(CROSS) as taps:
        compiled(clip(1))
    with pytest.raises(TapError, match="by what torch"):
        taps[CROSS]


def test_taps_tell_what_they_hold(model: VideoMask2Former) -> None:
    model.prepare_for_inference()
    with torch.no_grad(), model.capture(CROSS, f"{LAYER}.mask_logits") as taps:
        assert isinstance(model.get_submodule("transformer_decoder.layers.0"), Fused)
        model(clip(1))
    assert len(taps) == 2
    assert list(taps) == list(dict(taps)) == [CROSS, f"{LAYER}.mask_logits"]
    assert CROSS in taps
    assert SELF not in taps
    assert repr(taps) == f"Taps({CROSS}: 1, {LAYER}.mask_logits: 1)"

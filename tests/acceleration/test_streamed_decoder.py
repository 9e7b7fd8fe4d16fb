"""A clip decoded frame by frame is the clip decoded at once; where the decoder is another one, it is refused."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

from m2f_video import VideoMask2Former
from m2f_video.acceleration import accelerated, streamed_decoder
from m2f_video.acceleration.streamed_decoder import RunningAttention, StreamedDecoder, why_not_streamed
from m2f_video.benchmark import peak_bytes
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.inference.frame_store import FrameStore
from m2f_video.modeling import cross_attention, position_encoding, transformer_decoder
from m2f_video.modeling.build import build_transformer_decoder
from m2f_video.modeling.cross_attention import CrossAttention, FullCrossAttention
from m2f_video.modeling.transformer_decoder import DecoderLayer, MaskedTransformerDecoder, SelfFirstDecoderLayer
from m2f_video.modeling.video_mask2former import FrameFeatures
from tests.tolerances import relative_error

Build = Callable[[str], VideoMask2Former]

MASK_DIM, SIZES = 12, ((2, 3), (4, 6), (8, 12))


def decoder(**changes: Any) -> MaskedTransformerDecoder:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "hidden_dim": 16, "mask_dim": MASK_DIM, "num_queries": 7, "num_layers": 4}
    built = MaskedTransformerDecoder(**sizes | {"num_heads": 4, "ffn_dim": 20, "num_labels": 3} | changes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.double().eval().requires_grad_(False)


def clip(T: int, channels: int = 16) -> FrameFeatures:
    torch.manual_seed(1)
    maps = [torch.randn(T, size, h, w, dtype=torch.float64) for size, (h, w) in zip([channels] * 3, SIZES, strict=True)]
    return FrameFeatures(torch.randn(T, MASK_DIM, 16, 24, dtype=torch.float64), tuple(maps))


def at_once(decoder: MaskedTransformerDecoder, features: FrameFeatures, **options: bool) -> Any:
    return decoder(features.mask_features[None], tuple(level[None] for level in features.multi_scale), **options)


def streamed(decoder: MaskedTransformerDecoder, features: FrameFeatures, chunk: int = 1, memory: int = 1 << 30) -> Any:
    with FrameStore(memory) as store:
        stream = StreamedDecoder(decoder, store)
        parts = zip(features.mask_features.split(chunk), *(x.split(chunk) for x in features.multi_scale), strict=True)
        for mask_features, *levels in parts:
            stream.append(FrameFeatures(mask_features, tuple(levels)))
        return stream.decode()


def error(decoder: MaskedTransformerDecoder, features: FrameFeatures) -> float:
    """The larger of those of classes and mask embeddings."""
    ours, expected = streamed(decoder, features), at_once(decoder, features)
    return max(
        relative_error(ours.class_queries_logits, expected.class_queries_logits),
        relative_error(ours.mask_embeddings, expected.mask_embeddings),
    )


def to(features: FrameFeatures, dtype: torch.dtype) -> FrameFeatures:
    return FrameFeatures(features.mask_features.to(dtype), tuple(level.to(dtype) for level in features.multi_scale))


# --- the same function


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("changes", [
    {}, {"cross_attention": FullCrossAttention}, {"decoder_layer": SelfFirstDecoderLayer},
    {"query_features": "learnable"}, {"query_features": "zero"}, {"features": "concatenated"},
    {"features": "single", "scale": 16}, {"position_encoding": position_encoding.SinePosition2D},
    {"position_encoding": position_encoding.NoPosition}, {"num_layers": 0}, {"num_layers": 9}, {"in_channels": 10},
], ids=str)  # fmt: skip
def test_streamed_is_at_once(changes: dict[str, Any], T: int) -> None:
    assert error(decoder(**changes), clip(T, changes.get("in_channels", 16))) < 1e-10


def test_every_choice_with_every_other() -> None:
    choices: dict[str, Sequence[Any]] = {
        "decoder_layer": (DecoderLayer, SelfFirstDecoderLayer),
        "query_features": ("zero", "learnable_supervised"),
        "features": ("single", "concatenated"),
        "cross_attention": (CrossAttention, FullCrossAttention),
        "position_encoding": (position_encoding.SinePosition3D, position_encoding.NoPosition),
    }
    for chosen in itertools.product(*choices.values()):
        assert error(decoder(**dict(zip(choices, chosen, strict=True)), num_layers=2), clip(3)) < 1e-10


def covering(signs: Sequence[float]) -> tuple[MaskedTransformerDecoder, FrameFeatures]:
    """A clip in whose frames every mask logit is negative, positive, or whatever it is (0)."""
    built, features = decoder(), clip(len(signs))
    with torch.no_grad():
        built.mask_head[-1].weight[0] = 0
        built.mask_head[-1].bias[0] = 1  # of all queries
    for frame, sign in enumerate(signs):
        features.mask_features[frame, 0] = 1e3 * sign
    return built, features


@pytest.mark.parametrize("signs", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (-1, -1, 1), (-1, -1, -1), (1, 1), (-1,)])
def test_frames_and_clips_without_a_mask(signs: tuple[float, ...]) -> None:
    built, features = covering(signs)
    masks = at_once(built, features, output_hidden=True).attention_masks
    everywhere = [mask.all() for mask in masks]
    assert everywhere == [all(sign == -1 for sign in signs) or all(sign == 1 for sign in signs)] * len(masks)
    assert error(built, features) < 1e-10


def test_queries_without_a_mask_beside_others_with_one() -> None:
    """Which begin to see at frames of their own: 0, 1, 2, and never."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 5, dtype=torch.float64) for n in (4, 3 * 6, 3 * 6))
    visible = torch.rand(1, 4, 3, 6) < 0.5
    visible[0, 1, 0] = visible[0, 2, :2] = visible[0, 3] = False
    running = RunningAttention(q)
    for frame in range(3):
        part = slice(6 * frame, 6 * frame + 6)
        running.add(k[:, :, part], v[:, :, part], visible[:, :, frame])
    mask = visible.flatten(2)
    mask = mask | ~mask.any(-1, keepdim=True)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    assert relative_error(running.result(), expected) < 1e-14


def test_large_products_do_not_overflow() -> None:
    q, k, v = torch.full((1, 1, 1, 4), 300.0), torch.linspace(-300, 300, 12).view(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    running = RunningAttention(q)
    for key in range(3):
        running.add(k[:, :, key : key + 1], v[:, :, key : key + 1], None)
    assert relative_error(running.result(), v[:, :, 2:]) < 1e-6


def flipped_bits(built: MaskedTransformerDecoder, features: FrameFeatures, force: bool) -> tuple[int, int, Any]:
    """Mask bits that streaming makes otherwise, of how many, and what it gives; `force`: by the bits made at once."""
    T, counts = len(features.mask_features), [0, 0]
    masks = [m.unflatten(-1, (T, -1)) for m in at_once(built, features, output_hidden=True).attention_masks]
    expected = (mask[:, :, frame] for mask in masks for frame in range(T))
    seen: list[Tensor] = []

    def covered(mask_logits: Tensor) -> Tensor:
        seen.append(~(mask_logits < 0))
        return next(expected) if force else seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_decoder, "covered", covered)
        output = streamed(built, features)
    for layer, mask in enumerate(masks):
        bits = torch.stack(seen[layer * T : layer * T + T], dim=2).flatten(2)
        bits |= ~bits.any(-1, keepdim=True)
        counts[0] += int((bits != mask.flatten(2)).sum())
        counts[1] += bits.numel()
    return counts[0], counts[1], output


def test_float32_is_equal_to_rounding_where_the_masks_are_equal() -> None:
    built, features = decoder(num_layers=9).float(), to(clip(13), torch.float32)
    expected = at_once(built, features)
    _, _, forced = flipped_bits(built, features, force=True)
    assert relative_error(forced.class_queries_logits, expected.class_queries_logits) < 1e-5
    assert relative_error(forced.mask_embeddings, expected.mask_embeddings) < 1e-5
    flipped, bits, _ = flipped_bits(built, features, force=False)
    print(f"{flipped} of {bits} bits of the attention masks differ")
    assert flipped < 1e-4 * bits


def test_bfloat16_is_as_near_to_float32_as_at_once() -> None:
    built, features = decoder(cross_attention=FullCrossAttention), clip(5)
    exact = at_once(built, features).mask_embeddings
    built, features = built.bfloat16(), to(features, torch.bfloat16)
    ours, theirs = (f(built, features).mask_embeddings for f in (streamed, at_once))
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact)


def test_neither_chunks_nor_places_change_a_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        built, features = decoder().to(dtype), to(clip(7), dtype)
        one = streamed(built, features)
        for chunk, memory in ((2, 1 << 30), (7, 1 << 30), (1, 0), (3, 30_000)):
            other = streamed(built, features, chunk, memory)
            assert torch.equal(other.class_queries_logits, one.class_queries_logits)
            assert torch.equal(other.mask_embeddings, one.mask_embeddings)


def test_no_frames_are_told() -> None:
    with pytest.raises(ValueError, match="no frames"):
        StreamedDecoder(decoder(), FrameStore(0)).decode()


def test_memory_does_not_grow_with_frames() -> None:
    """But for 1 kB of positions a frame, which a device would not have."""
    built, peaks = decoder(), {}
    for T in (2, 30):
        features = clip(T)
        with FrameStore(0) as store:
            stream = StreamedDecoder(built, store)
            stream.append(features)
            peaks[T] = peak_bytes(stream.decode)
        assert peak_bytes(partial(at_once, built, features)) > T * 10_000
    assert peaks[30] - peaks[2] < 28 * 1000


class Counted:
    """A memory that only counts."""

    frames: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.frames)

    def append(self, parts: Sequence[Tensor]) -> None:
        self.frames = [*self.frames, sum(part.nbytes for part in parts)]

    def read(self, frame: int, part: int) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 17.5e6), (torch.bfloat16, 8.8e6)])
def test_what_is_kept_of_a_frame_of_480x864(dtype: torch.dtype, most: float) -> None:
    with torch.device("meta"):
        built = build_transformer_decoder(VideoMask2FormerConfig(), {}).to(dtype)
        levels = tuple(torch.empty(2, 256, 480 // s, 864 // s, dtype=dtype) for s in (32, 16, 8))
        memory = Counted()
        StreamedDecoder(built, memory).append(FrameFeatures(torch.empty(2, 256, 120, 216, dtype=dtype), levels))
    assert memory.frames == [2 * 8505 * 256 * dtype.itemsize] * 2
    assert memory.frames[0] < most


# --- the guard


LAYER = "transformer_decoder.layers.1"


class Other(nn.Module):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def swapped(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[VideoMask2Former], None]:
    return lambda model: model.set_submodule(name, make(model.get_submodule(name)))


def subclassed(name: str) -> Callable[[VideoMask2Former], None]:
    def change(model: VideoMask2Former) -> None:
        module = model.get_submodule(name) if name else model
        module.__class__ = type("Mine", (type(module),), {})

    return change


def hooked(name: str) -> Callable[[VideoMask2Former], None]:
    return lambda model: model.get_submodule(name).register_forward_hook(lambda *_: None)


REFUSED: dict[str, tuple[Callable[[VideoMask2Former], object], str]] = {
    "replaced": (swapped(f"{LAYER}.cross_attn", lambda _: Other()), f"{LAYER}.cross_attn is a Other"),
    "mask product": (swapped("transformer_decoder.mask_product", lambda _: Other()), "mask_product is a Other"),
    "positions": (subclassed("transformer_decoder.position_encoding"), "position_encoding is a Mine"),
    "decoder": (subclassed("transformer_decoder"), "transformer_decoder is a Mine"),
    "layer": (subclassed(LAYER), f"{LAYER} is a Mine"),
    "norm": (subclassed("transformer_decoder.norm"), "norm is a Mine"),
    "model": (subclassed(""), "it is a Mine"),
    "added": (lambda model: model.get_submodule(LAYER).add_module("adapter", Other()), f"{LAYER}.adapter is a Other"),
    "parametrized": (lambda model: parametrizations.weight_norm(model.get_submodule(f"{LAYER}.linear1")), "linear1 is"),
    "pruned": (
        lambda model: prune.l1_unstructured(model.get_submodule(f"{LAYER}.linear2"), "weight", amount=0.5),
        f"{LAYER}.linear2 is hooked or patched",
    ),
    "patched": (
        lambda model: setattr(model.get_submodule(f"{LAYER}.cross_attn"), "attend", print),
        "hooked or patched",
    ),
    "patched decode_clip": (lambda model: setattr(model, "decode_clip", print), "its decode_clip is patched"),
    "hooked layer": (hooked(LAYER), f"{LAYER} is hooked"),
    "hooked decoder": (hooked("transformer_decoder"), "transformer_decoder is hooked"),
    "hooked projection": (hooked(f"{LAYER}.cross_attn.out_proj"), f"{LAYER}.cross_attn.out_proj is hooked"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_was_touched_is_refused_and_named(how: str, model: VideoMask2Former) -> None:
    assert why_not_streamed(model) is None
    change, named = REFUSED[how]
    change(model)
    assert named in (why_not_streamed(model) or "")


def test_dropout_in_training_is_refused(model: VideoMask2Former) -> None:
    attention = model.get_submodule(f"{LAYER}.cross_attn").train()
    assert why_not_streamed(model) is None  # at a rate of 0
    attention.dropout = 0.5
    assert f"{LAYER}.cross_attn is dropping" in (why_not_streamed(model) or "")


@pytest.mark.parametrize("name", ["mask_pooling", "smca"])
def test_what_has_no_streamed_form_is_refused(name: str, build: Build) -> None:
    assert "cross_attn is a" in (why_not_streamed(build(f"cross_attention/{name}")) or "")


@pytest.mark.parametrize(("place", "name"), [
    (cross_attention, "attention_mask"), (cross_attention.CrossAttention, "forward"), (cross_attention.Level, "keys"),
    (cross_attention.SelfAttention, "forward"), (transformer_decoder, "resize_frames"), (nn.LayerNorm, "forward"),
    (transformer_decoder.MaskedTransformerDecoder, "forward"), (transformer_decoder.MaskProduct, "forward"),
    (position_encoding, "sine_1d"), (VideoMask2Former, "decode_clip"),
])  # fmt: skip
def test_patched_functions_are_refused(place: Any, name: str, model: VideoMask2Former, monkeypatch: Any) -> None:
    monkeypatch.setattr(place, name, lambda *args, **kwargs: None)
    assert name in (why_not_streamed(model) or "")


def test_every_module_of_the_decoder_counts(model: VideoMask2Former) -> None:
    for name, module in model.transformer_decoder.named_modules(prefix="transformer_decoder"):
        kind = type(module)
        handle = module.register_forward_pre_hook(lambda *_: None)
        assert f"{name} is hooked" in (why_not_streamed(model) or "")
        handle.remove()
        module.__class__ = type("Mine", (kind,), {})
        assert f"{name} is a Mine" in (why_not_streamed(model) or "")
        module.__class__ = kind
    assert why_not_streamed(model) is None


class Mode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_who_looks_at_everything_is_refused(model: VideoMask2Former) -> None:
    handle = register_module_forward_hook(lambda *_: None)
    assert "hooks on all modules" in (why_not_streamed(model) or "")
    handle.remove()
    with Mode():
        assert "a mode looks" in (why_not_streamed(model) or "")
    with torch.autocast("cpu"):
        assert "autocast" in (why_not_streamed(model) or "")
    with model.capture("*.cross_attn.attention_weights"):
        assert "cross_attn is hooked" in (why_not_streamed(model) or "")
    assert why_not_streamed(object()) == "it is a object"
    assert why_not_streamed(model) is None


def test_twins_may_be_in_place_and_hooks_outside_the_decoder(model: VideoMask2Former) -> None:
    model.backbone.register_forward_hook(lambda *_: None)
    model.pixel_decoder = Other()
    with accelerated(model) as fast:
        assert why_not_streamed(fast) is None
    for built in (copy.deepcopy(model).double(), model.prepare_for_inference()):
        assert why_not_streamed(built) is None


def test_running_attention_is_nan_where_a_value_is() -> None:
    running = RunningAttention(torch.ones(1, 1, 1, 2))
    running.add(torch.full((1, 1, 1, 2), math.nan), torch.ones(1, 1, 1, 2), None)
    running.add(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), None)
    assert running.result().isnan().all()

"""The transformer decoder over a clip of any length, of which one frame at a time is on the device.

All that it does with frames is cross-attention, a softmax over the keys of all of them; everything else sees queries
alone. A softmax needs no two frames at once: its sum, and that of the values it weighs, are carried from one frame to
the next and scaled anew where a larger product comes (online softmax, arXiv 1805.02867, as FlashAttention does,
arXiv 2205.14135). A query whose mask covers nothing in all frames attends everywhere (arXiv 2112.01527, equation 2), so
until a query has seen something it sums up everything, and then begins anew.

B clips, T frames, Q queries, C channels, M heads, N pixels of a frame at a level.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.acceleration.swap import Fused, asked_for_more, difference, plain_type
from m2f_video.acceleration.written_for import Function, functions_of
from m2f_video.modeling.cross_attention import CrossAttention, FullCrossAttention, Level, SelfAttention
from m2f_video.modeling.position_encoding import NoPosition, SinePosition2D, SinePosition3D, position_dtype
from m2f_video.modeling.transformer_decoder import (
    DecoderLayer,
    MaskedTransformerDecoder,
    MaskProduct,
    SelfFirstDecoderLayer,
    TransformerDecoderOutput,
    resize_frames,
)
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former

_DECODER, _LAYER = "transformer_decoder", "transformer_decoder.layers.*"
KNOWN: Mapping[str, tuple[type[nn.Module], ...]] = {
    _DECODER: (MaskedTransformerDecoder,),
    f"{_DECODER}.query_features": (nn.Embedding,),
    f"{_DECODER}.query_positions": (nn.Embedding,),
    f"{_DECODER}.level_embed": (nn.Embedding,),
    f"{_DECODER}.input_projections": (nn.ModuleList,),
    f"{_DECODER}.input_projections.*": (nn.Conv2d,),
    f"{_DECODER}.position_encoding": (SinePosition3D, SinePosition2D, NoPosition),
    f"{_DECODER}.mask_product": (MaskProduct,),
    f"{_DECODER}.norm": (nn.LayerNorm,),
    f"{_DECODER}.class_head": (nn.Linear,),
    f"{_DECODER}.mask_head": (nn.ModuleList,),
    f"{_DECODER}.mask_head.*": (nn.Linear,),
    f"{_DECODER}.layers": (nn.ModuleList,),
    _LAYER: (DecoderLayer, SelfFirstDecoderLayer),
    f"{_LAYER}.cross_attn": (CrossAttention, FullCrossAttention),
    f"{_LAYER}.cross_attn.out_proj": (nn.Linear,),
    f"{_LAYER}.cross_attn_norm": (nn.LayerNorm,),
    f"{_LAYER}.self_attn": (SelfAttention,),
    f"{_LAYER}.self_attn.out_proj": (nn.Linear,),
    f"{_LAYER}.self_attn_norm": (nn.LayerNorm,),
    f"{_LAYER}.linear1": (nn.Linear,),
    f"{_LAYER}.linear2": (nn.Linear,),
    f"{_LAYER}.ffn_norm": (nn.LayerNorm,),
    f"{_LAYER}.dropout": (nn.Dropout,),
}
"""What the decoder of a model may be made of, by its place there."""


class Streamed(Fused, VideoMask2Former):
    """What streaming stands for, as a twin says it; but it is asked alone, and never put in a model's place."""

    plain = VideoMask2Former

    @classmethod
    def functions(cls) -> list[Function]:
        """Of all that the decoder may be made of."""
        kinds = (kind for kinds in KNOWN.values() for kind in kinds)
        return functions_of((cls.plain, *kinds), (Level, FrameFeatures))

    @classmethod
    def called(cls, module: VideoMask2Former) -> Mapping[str, type[nn.Module]]:
        """All of the transformer decoder; twins of single parts of it may be in place."""
        inside = module.transformer_decoder.named_modules(prefix=_DECODER, remove_duplicate=False)
        return {name: plain_type(part) for name, part in inside}

    @classmethod
    def misfit(cls, module: VideoMask2Former) -> str | None:
        """The first part that there is no streamed form of."""
        for name, kind in cls.called(module).items():
            if kind not in KNOWN.get(re.sub(r"\.\d+", ".*", name), ()):
                return f"{name} is a {kind.__name__}"
        return None


def why_not_streamed(model: Any) -> str | None:
    """Why a model's decoder cannot be streamed; None where that gives what the decoder gives."""
    if not isinstance(model, VideoMask2Former):
        return f"it is a {type(model).__name__}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    return asked_for_more() or Streamed.misfit(model) or difference(model, Streamed)


class FrameMemory(Protocol):
    """Where tensors of frames are kept."""

    def __len__(self) -> int:
        """Number of frames."""

    def append(self, parts: Sequence[Tensor]) -> object:
        """Keep the tensors of the next frame; each has the same size in all frames."""

    def read(self, frame: int, part: int) -> Tensor:
        """One of them, on the CPU."""


class StreamedDecoder:
    """A transformer decoder that is given the frames of one clip in any chunks, and then decodes it.

    Args:
        decoder: of which `why_not_streamed` knows nothing to say.
        memory: empty. For each level it gets a frame's tokens (N, C) and, resized to the level, its mask features.
    """

    def __init__(self, decoder: MaskedTransformerDecoder, memory: FrameMemory) -> None:
        self._decoder, self._memory = decoder, memory
        self._levels: list[Level] = []  # without tokens
        self._frame_positions = torch.empty(0)  # (T, C), on the CPU as all that grows with a clip

    def append(self, features: FrameFeatures) -> None:
        """Take the next frames."""
        for frame in range(len(features.mask_features)):
            levels = self._decoder._levels(tuple(level[None, frame : frame + 1] for level in features.multi_scale))
            mask_features = features.mask_features[None, frame : frame + 1]
            parts: list[Tensor] = []
            for level in levels:
                resized = [resize_frames(mask_features, size)[0, 0] for size in level.sizes]
                parts += [level.tokens[0, 0], torch.cat([part.flatten(1).T for part in resized])]
            self._memory.append(parts)
            self._levels = self._levels or [replace(level, tokens=level.tokens.new_empty(0)) for level in levels]

    def decode(self, progress: Callable[[int, int], None] | None = None) -> TransformerDecoderOutput:
        """Decode the clip.

        Args:
            progress: called with how many frames all layers have attended to, and how many they will.

        Returns:
            As of `MaskedTransformerDecoder`, of one clip: class logits and mask embeddings.

        Raises:
            ValueError: there are no frames.
        """
        if not self._levels:
            raise ValueError("there are no frames to decode")
        decoder, T = self._decoder, len(self._memory)
        self._frame_positions = decoder.position_encoding(self._levels[0].pixel_position, T, 1, 1)[1].cpu()
        x = decoder._initial_queries()[None]
        for index, layer in enumerate(decoder.layers):

            def attended(frame: int, before: int = index * T) -> None:
                if progress is not None:
                    progress(before + frame + 1, len(decoder.layers) * T)

            mask_embeddings = decoder._predict(x)[1] if index > 0 or decoder.supervises_queries else None
            # the layer's own forward, in which only cross-attention is another, called with a level and what masks it
            attend = partial(self._attend, layer.cross_attn, attended)
            parts: Any = SimpleNamespace(**{**layer._modules, "cross_attn": attend})
            position, level = decoder.query_positions.weight, index % len(self._levels)
            x = plain_type(layer).forward(parts, x, position, level, mask_embeddings)
        return TransformerDecoderOutput(*decoder._predict(x))

    def _attend(
        self, attn: Any, attended: Callable[[int], None], query: Tensor, level: int, mask_embeddings: Tensor | None
    ) -> Tensor:
        """As `CrossAttention.forward`, frame by frame: queries (B, Q, C) -> (B, Q, C)."""
        of_queries, of_keys, of_values = attn.projections()
        masks = mask_embeddings if plain_type(attn) is CrossAttention else None
        attention = RunningAttention(_heads(F.linear(query, *of_queries), attn.num_heads))
        for frame in range(len(self._memory)):
            read = self._frame(level, frame)
            k = F.linear(read.keys, *of_keys).flatten(1, 2)  # (B, N, C)
            v = F.linear(read.values, *of_values).flatten(1, 2)
            visible = None if masks is None else self._visible(level, frame, masks)
            attention.add(_heads(k, attn.num_heads), _heads(v, attn.num_heads), visible)
            attended(frame)
        return attn.out_proj(attention.result().transpose(1, 2).flatten(2).to(query))

    def _frame(self, level: int, frame: int) -> Level:
        """One frame of a level."""
        of_all = self._levels[level]
        tokens = self._memory.read(frame, 2 * level).to(of_all.embedding.device)
        position = self._frame_positions[frame : frame + 1].to(tokens)
        return replace(of_all, tokens=tokens[None, None], frame_position=position)

    def _visible(self, level: int, frame: int, mask_embeddings: Tensor) -> Tensor:
        """Which keys of a frame the masks of queries cover: (B, Q, N) bool."""
        sizes = self._levels[level].sizes
        pixels = self._memory.read(frame, 2 * level + 1).to(mask_embeddings.device)  # (N, mask_dim)
        maps = [
            part.view(1, 1, *size, -1).permute(0, 1, 4, 2, 3)
            for size, part in zip(sizes, pixels.split([height * width for height, width in sizes]), strict=True)
        ]
        logits = [self._decoder.mask_product(mask_embeddings, part) for part in maps]
        return covered(torch.cat([part.flatten(2) for part in logits], dim=2))


def covered(mask_logits: Tensor) -> Tensor:
    """Where masks are: `attention_mask` before queries that see nothing are let see everything."""
    return ~(mask_logits.detach() < 0)


def _heads(x: Tensor, count: int) -> Tensor:
    """(B, N, C) -> (B, M, N, C/M)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class RunningAttention:
    """Attention to keys that come a part at a time; what is kept between two has the size of the queries.

    Products are at least float32 and sums float64, so that an error does not grow with the number of parts.

    Args:
        q: (B, M, Q, C/M), of each head.
    """

    def __init__(self, q: Tensor) -> None:
        self._q = q.to(position_dtype(q)) * q.shape[-1] ** -0.5
        self._largest = q.new_full((*q.shape[:3], 1), -math.inf, dtype=torch.float64)  # product so far
        self._weight = q.new_zeros((*q.shape[:3], 1), dtype=torch.float64)  # sum of exp(product - largest)
        self._values = q.new_zeros(q.shape, dtype=torch.float64)  # sum of values by that weight
        self._sees = q.new_zeros((q.shape[0], 1, q.shape[2], 1), dtype=torch.bool)

    def add(self, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
        """Attend to more keys and values (B, M, N, C/M), where these are visible, (B, Q, N); None: everywhere."""
        products = self._q @ k.to(self._q).transpose(-2, -1)  # (B, M, Q, N)
        if visible is not None:
            visible = visible[:, None]
            sees = self._sees | visible.any(-1, keepdim=True)
            self._largest.masked_fill_(sees & ~self._sees, -math.inf)  # begins anew: what was summed weighs exp(-inf)
            self._sees = sees
            products.masked_fill_(sees & ~visible, -math.inf)
        largest = torch.maximum(self._largest, products.amax(-1, keepdim=True))
        weights = (products - largest.to(products)).exp()
        before = (self._largest - largest).exp()
        self._weight = self._weight * before + weights.sum(-1, keepdim=True, dtype=torch.float64)
        self._values = self._values * before + weights @ v.to(weights)
        self._largest = largest

    def result(self) -> Tensor:
        """(B, M, Q, C/M) in float64."""
        return self._values / self._weight

"""Twins of the transformer decoder's parts."""

from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.acceleration import kernels
from m2f_video.acceleration.kernels import LANES, PackedLinear
from m2f_video.acceleration.swap import Fused, are_values
from m2f_video.modeling.cross_attention import Attention, CrossAttention, Level, SelfAttention
from m2f_video.modeling.transformer_decoder import DecoderLayer, MaskProduct


class _CrossAttention(NamedTuple):
    q: PackedLinear
    k: PackedLinear
    v: PackedLinear
    output: PackedLinear

    @classmethod
    def of(cls, attn: CrossAttention) -> "_CrossAttention":
        q, k, v = (PackedLinear.of(*parameters) for parameters in attn.projections())
        return cls(q, k, v, PackedLinear.of(attn.out_proj.weight, attn.out_proj.bias))

    def attend(self, query: Tensor, level: Level, mask_logits: Tensor, heads: int) -> Tensor:
        """Attention before the last projection, (B, Q, C); no mask is made.

        Projections are linear: those of the embedding and of the positions are added to those of the tokens, so that
        neither keys nor values are ever held beside their projections.
        """
        embedded = [kernels.linear(level.embedding[None], part)[0] for part in (self.k, self.v)]
        if level.tokens.shape[1] == 1:  # one product instead of two
            positioned = level.tokens + (level.pixel_position + level.frame_position[:, None])
            k = kernels.linear(positioned, self.k.plus(embedded[0]))
        else:
            k = kernels.linear(level.tokens, self.k.plus(embedded[0]))
            k += kernels.linear(level.pixel_position, self.k.plus(None))
            k += kernels.linear(level.frame_position, self.k.plus(None))[:, None]
        v = kernels.linear(level.tokens, self.v.plus(embedded[1]))
        q = kernels.linear(query, self.q)
        return kernels.masked_attention(q, k.flatten(1, 2), v.flatten(1, 2), mask_logits, heads)


def _misfit(attn: Attention) -> str | None:
    dim = attn.out_proj.in_features
    if dim // attn.num_heads % LANES:
        return f"heads of {dim // attn.num_heads} channels; the kernel takes multiples of {LANES}"
    return kernels.misfit(attn.out_proj.weight)


def _takes(dtype: torch.dtype | None, query: Tensor, level: object, mask_logits: object, dim: int) -> bool:
    """Whether the kernel attends to these; anything else goes where errors are raised."""
    if type(level) is not Level or not isinstance(mask_logits, Tensor) or query.ndim != 3:
        return False
    (B, T, N, C), Q = level.tokens.shape, query.shape[1]
    tensors = query, mask_logits, level.tokens, level.embedding, level.pixel_position, level.frame_position
    return (
        are_values(dtype, *tensors)
        and query.shape == (B, Q, dim)
        and dim == C
        and mask_logits.shape == (B, Q, T * N)
        and level.embedding.shape == (C,)
        and level.pixel_position.shape == (N, C)
        and level.frame_position.shape == (T, C)
    )


class FusedCrossAttention(Fused, CrossAttention):
    """Masked attention that makes no mask, where the layer around it is another."""

    plain = CrossAttention
    parts: ClassVar = {"out_proj": nn.Linear}
    types = (Level,)

    @classmethod
    def misfit(cls, module: CrossAttention) -> str | None:
        """The kernels' widths."""
        return _misfit(module)

    def pack(self) -> _CrossAttention:
        """All projections."""
        return _CrossAttention.of(self)

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """With a mask."""
        return not kwargs and len(args) == 3 and _takes(dtype, *args, self.out_proj.in_features)

    def fused(self, packed: _CrossAttention, query: Tensor, level: Level, mask_logits: Tensor) -> Tensor:
        """(B, Q, C)."""
        return kernels.linear(packed.attend(query, level, mask_logits, self.num_heads), packed.output)


class _Layer(NamedTuple):
    cross: _CrossAttention
    self_qk: PackedLinear
    self_v: PackedLinear
    self_out: PackedLinear
    linear1: PackedLinear
    linear2: PackedLinear


class FusedDecoderLayer(Fused, DecoderLayer):
    """Masked attention that makes no mask, and every sum and norm within the product before it."""

    plain = DecoderLayer
    parts: ClassVar = {
        "cross_attn": CrossAttention,
        "cross_attn.out_proj": nn.Linear,
        "cross_attn_norm": nn.LayerNorm,
        "self_attn": SelfAttention,
        "self_attn.out_proj": nn.Linear,
        "self_attn_norm": nn.LayerNorm,
        "linear1": nn.Linear,
        "linear2": nn.Linear,
        "ffn_norm": nn.LayerNorm,
        "dropout": nn.Dropout,
    }
    types = (Level,)

    @classmethod
    def misfit(cls, module: DecoderLayer) -> str | None:
        """The kernels' widths."""
        layers = module.linear1.weight, module.linear2.weight
        norms = module.cross_attn_norm, module.self_attn_norm, module.ffn_norm
        if any(norm.weight is None or norm.bias is None for norm in norms):
            return "a norm is not affine"
        attentions = _misfit(cast("CrossAttention", module.cross_attn)) or _misfit(module.self_attn)
        return attentions or next((reason for layer in layers if (reason := kernels.misfit(layer))), None)

    def pack(self) -> _Layer:
        """All weights."""
        attn = self.self_attn
        C = attn.out_proj.in_features
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        return _Layer(
            _CrossAttention.of(cast("CrossAttention", self.cross_attn)),
            PackedLinear.of(weight[: 2 * C], bias[: 2 * C]),
            PackedLinear.of(weight[2 * C :], bias[2 * C :]),
            *(PackedLinear.of(layer.weight, layer.bias) for layer in (attn.out_proj, self.linear1, self.linear2)),
        )

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """As the plain one's."""
        if kwargs or len(args) != 4:
            return False
        x, query_position, level, mask_logits = args
        fits = are_values(dtype, query_position) and query_position.shape == x.shape[1:]
        return fits and _takes(dtype, x, level, mask_logits, self.linear1.in_features)

    def fused(self, packed: _Layer, x: Tensor, query_position: Tensor, level: Level, mask_logits: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        attended = packed.cross.attend(
            x + query_position, level, mask_logits, cast("CrossAttention", self.cross_attn).num_heads
        )
        x = kernels.linear(attended, packed.cross.output, residual=x, after=self.cross_attn_norm)

        q, k = kernels.linear(x + query_position, packed.self_qk).chunk(2, -1)
        v, heads = kernels.linear(x, packed.self_v), self.self_attn.num_heads
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = kernels.linear(attended, packed.self_out, residual=x, after=self.self_attn_norm)
        layers = packed.linear1, packed.linear2
        return kernels.linear(x, *layers, activation="relu", residual=x, after=self.ffn_norm)


class FusedMaskProduct(Fused, MaskProduct):
    """By oneDNN, clip by clip, where PyTorch's product of batches is the slower one."""

    plain = MaskProduct
    needs_kernels = False

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """Of one type, and such that the plain one would not refuse."""
        if kwargs or len(args) != 2 or not are_values(args[0].dtype, *args):
            return False
        embeddings, features = args
        fits = embeddings.ndim == 3 and features.ndim == 5
        return are_values(None, *args) and fits and embeddings.shape[::2] == (features.shape[0], features.shape[2])

    def fused(self, packed: None, mask_embeddings: Tensor, mask_features: Tensor) -> Tensor:
        """(B, Q, T, H, W)."""
        pixels = mask_features.permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, S, C)
        clips = [kernels.onednn_product(*clip) for clip in zip(mask_embeddings, pixels, strict=True)]
        logits = clips[0][None] if len(clips) == 1 else torch.stack(clips)
        return logits.unflatten(-1, (-1, *mask_features.shape[-2:]))

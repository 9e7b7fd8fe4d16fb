"""The multi-scale deformable attention op and its backends.

B batch, N tokens of all levels, Q queries, M heads, D channels of a head, L levels, P points.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from m2f_video.ops.embedding_bag import ms_deform_attn_embedding_bag
from m2f_video.ops.reference import ms_deform_attn_reference, sampling_locations_from_offsets

__all__ = ["Backend", "ms_deform_attn", "resolve_backend", "sampling_locations_from_offsets"]

Backend = Literal["auto", "reference", "embedding_bag"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Sum over levels and points of bilinearly sampled values times attention weights (arXiv 2010.04159, eq. 3).

    Locations outside a level read zeros, so a location beyond half a pixel from its edge contributes nothing.

    Args:
        value: (B, N, M, D); the levels' pixels one after the other, each level row by row.
        spatial_shapes: (height, width) of each of the L levels.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0 and 1 being the level's outer edges.
        attention_weights: (B, Q, M, L, P).
        backend: which implementation computes it; `auto` is `resolve_backend`'s rule. `embedding_bag` has no gradient
            of the locations.

    Returns:
        (B, Q, M * D), in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend, or one without the gradient asked for.
    """
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    if resolve_backend(backend, value, sampling_locations, attention_weights) == "embedding_bag":
        if torch.is_grad_enabled() and sampling_locations.requires_grad:
            raise ValueError(
                "backend 'embedding_bag' gives no gradient of the locations; train with 'auto' or 'reference'"
            )
        return ms_deform_attn_embedding_bag(value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def resolve_backend(backend: Backend, *inputs: Tensor) -> Literal["reference", "embedding_bag"]:
    """The backend that will run: `auto` takes `embedding_bag` on a CPU when no gradient is asked for.

    The backward of `embedding_bag` is many times slower than grid_sample's, and on other devices it is not the
    faster one, so everywhere else `auto` is `reference`.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown deformable attention backend {backend!r}; choose one of {get_args(Backend)}")
    if backend != "auto":
        return backend
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return "reference" if needs_grad or inputs[0].device.type != "cpu" else "embedding_bag"


def _check_shapes(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> None:
    if value.ndim != 4 or locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"value must be (B, N, M, D) and sampling_locations (B, Q, M, L, P, 2), "
            f"got {tuple(value.shape)} and {tuple(locations.shape)}"
        )
    B, N, M, _ = value.shape
    pixels = sum(height * width for height, width in spatial_shapes)
    if pixels != N:
        raise ValueError(f"value has {N} tokens, but spatial_shapes {spatial_shapes} have {pixels} pixels")
    if (locations.shape[0], *locations.shape[2:4]) != (B, M, len(spatial_shapes)):
        raise ValueError(
            f"sampling_locations {tuple(locations.shape)} do not fit batch {B}, {M} heads and "
            f"{len(spatial_shapes)} levels"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"attention_weights must be {tuple(locations.shape[:-1])}, got {tuple(weights.shape)}")

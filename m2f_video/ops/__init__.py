"""The multi-scale deformable attention op and its backends.

B batch, N tokens of all levels, Q queries, M heads, D channels of a head, L levels, P points.
"""

import importlib.util
import os
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from m2f_video.ops.embedding_bag import ms_deform_attn_embedding_bag, ms_deform_attn_embedding_bag_from_offsets
from m2f_video.ops.reference import (
    Shapes,
    ms_deform_attn_reference,
    samples_from_offsets,
    sampling_locations_from_offsets,
)
from m2f_video.ops.triton_verified import VERIFIED

__all__ = [
    "Backend",
    "Shapes",
    "available_backends",
    "ms_deform_attn",
    "ms_deform_attn_from_offsets",
    "resolve_backend",
    "samples_from_offsets",
    "sampling_locations_from_offsets",
]

Backend = Literal["auto", "reference", "embedding_bag", "triton"]

BACKEND_VARIABLE = "M2F_VIDEO_MS_DEFORM_ATTN"
"""Environment variable with the backend that `auto` stands for."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # finds it, does not import it
_NO_TRITON = "triton is not installed; it comes with torch's CUDA builds for Linux"


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
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
        backend: which implementation computes it; `auto` is `resolve_backend`'s rule. `embedding_bag` has no second
            derivatives; `triton` runs on CUDA devices, in float32, bfloat16 and float16, and is reproducible bit by
            bit after `torch.use_deterministic_algorithms(True)`.

    Returns:
        (B, Q, M * D), in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend, or one that cannot run here or on these
            inputs.
    """
    tensors = value, sampling_locations, attention_weights
    if has_torch_function(tensors):  # as of PyTorch's own functions, modes and subclasses see the call
        rest = spatial_shapes, sampling_locations, attention_weights, backend
        return handle_torch_function(ms_deform_attn, tensors, value, *rest)
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    resolved = resolve_backend(backend, value, sampling_locations, attention_weights)
    if resolved == "triton":
        from m2f_video.ops.triton_kernels import ms_deform_attn_triton

        return ms_deform_attn_triton(value, spatial_shapes, sampling_locations, attention_weights)
    if resolved == "embedding_bag":
        return ms_deform_attn_embedding_bag(value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """`ms_deform_attn` of what a module predicts: offsets from reference points, and weights before their softmax.

    Args:
        value: (B, N, M, D).
        spatial_shapes: (height, width) of each of the L levels.
        reference_points: (Q, 2) as (x, y) in [0, 1], shared by batch, heads and levels; at least float32, whose dtype
            the locations get.
        offsets: (B, Q, M, L, P, 2) as (x, y), in pixels.
        attention_logits: (B, Q, M, L, P); the softmax is over the L P samples of a head.
        backend: which implementation computes it.

    Returns:
        (B, Q, M * D), in the dtype of `value`.

    Raises:
        ValueError: as `ms_deform_attn`.
    """
    tensors = value, reference_points, offsets, attention_logits
    if has_torch_function(tensors):
        rest = spatial_shapes, reference_points, offsets, attention_logits, backend
        return handle_torch_function(ms_deform_attn_from_offsets, tensors, value, *rest)
    _check_shapes(value, spatial_shapes, offsets, attention_logits)
    if reference_points.shape != (offsets.shape[1], 2):
        raise ValueError(f"reference_points must be {(offsets.shape[1], 2)}, got {tuple(reference_points.shape)}")
    resolved = resolve_backend(backend, value, offsets, attention_logits)
    if resolved == "embedding_bag":
        return ms_deform_attn_embedding_bag_from_offsets(
            value, spatial_shapes, reference_points, offsets, attention_logits
        )
    locations, weights = samples_from_offsets(reference_points, offsets, attention_logits, spatial_shapes)
    return ms_deform_attn(value, spatial_shapes, locations, weights, resolved)


def resolve_backend(backend: Backend, *inputs: Tensor) -> Literal["reference", "embedding_bag", "triton"]:
    """The backend that will run.

    A named backend is taken as it is. `auto` is the one that the environment variable M2F_VIDEO_MS_DEFORM_ATTN names.
    Without it, or where it says `auto`, the first of these that holds:

    - on a CPU: `embedding_bag`;
    - on a CUDA device of a kind that the kernels have passed their tests on (`triton_verified.VERIFIED`), where they
      can run on the inputs: `triton`;
    - `reference`.

    Raises:
        ValueError: an unknown backend, named by the argument or the environment, or `triton` where it cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown deformable attention backend {backend!r}; choose one of {get_args(Backend)}")
    if backend == "auto":
        backend = _backend_of_environment()
    if backend == "auto":
        backend = _automatic_backend(*inputs)
    if backend == "triton" and (reason := _why_not_triton(*inputs)):
        raise ValueError(f"deformable attention backend 'triton' cannot run: {reason}")
    return backend


def available_backends() -> dict[str, str | None]:
    """Every backend but `auto`, and why it cannot run on this machine: None where it can."""
    reasons: dict[str, str | None] = dict.fromkeys(get_args(Backend)[1:])
    if not _TRITON_INSTALLED:
        reasons["triton"] = _NO_TRITON
    elif not (torch.cuda.is_available() or _triton_interpreted()):
        reasons["triton"] = "there is no CUDA device"
    return reasons


def _automatic_backend(*inputs: Tensor) -> Literal["reference", "embedding_bag", "triton"]:
    device = inputs[0].device
    if device.type == "cpu":
        return "embedding_bag"
    verified = device.type == "cuda" and _is_verified(device.index)
    return "triton" if verified and not _why_not_triton(*inputs) else "reference"


def _is_verified(index: int | None) -> bool:
    """Whether the kernels have passed their tests on a card like this one, which must be NVIDIA's."""
    if not VERIFIED or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    card = torch.cuda.get_device_properties(index)  # which `torch.compile` knows as a constant
    return (card.major, card.minor) in VERIFIED


def _backend_of_environment() -> Backend:
    name = os.environ.get(BACKEND_VARIABLE) or "auto"
    if name not in get_args(Backend):
        raise ValueError(
            f"unknown deformable attention backend {name!r} in the environment variable {BACKEND_VARIABLE}; "
            f"choose one of {get_args(Backend)}"
        )
    return cast("Backend", name)


def _why_not_triton(*inputs: Tensor) -> str | None:
    if not _TRITON_INSTALLED:
        return _NO_TRITON
    dtypes = [tensor.dtype for tensor in inputs]
    if not all(dtype in TRITON_DTYPES for dtype in dtypes):
        return f"it takes float32, bfloat16 and float16, got {dtypes}; cast the inputs or take 'reference'"
    devices = {tensor.device for tensor in inputs}
    if len(devices) > 1:
        return f"the inputs are on different devices, {sorted(map(str, devices))}"
    device = inputs[0].device.type
    if device != "cuda" and not (device == "cpu" and _triton_interpreted()):
        return (
            f"it needs CUDA tensors, got {device} (to try it on a CPU, slowly, set TRITON_INTERPRET=1 before the start)"
        )
    return None


def _triton_interpreted() -> bool:
    """Whether the kernels run on CPU tensors. Imports triton."""
    from m2f_video.ops.triton_kernels import INTERPRETED

    return INTERPRETED


def _check_shapes(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"value must be (B, N, M, D) and sampling_locations (B, Q, M, L, P, 2), "
            f"got {tuple(value.shape)} and {tuple(locations.shape)}"
        )
    if any(size < 1 for shape in spatial_shapes for size in shape):
        raise ValueError(f"heights and widths in spatial_shapes must be positive, got {spatial_shapes}")
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

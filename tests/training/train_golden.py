"""Recorded training steps of the original: predictions, draws, matches, losses and gradients of the tiny model."""

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from m2f_video.training import ClipTarget, Match
from tests.golden_files import GOLDEN, PIXEL_MEAN, PIXEL_STD, original_weights, read_info, unpack_bools
from weights_convert import to_native

CASES = ("a", "b", "c", "d")
NUM_LABELS = 5
NUM_POINTS = 256
VIDEOS = (0, 1)
FRAMES = (0, 1)
PREDICTIONS = ("aux0", "aux1", "aux2", "final")
DRAW_ORDER = ("final", "aux0", "aux1", "aux2")
DRAWS_PER_PREDICTION = 4  # one per video for matching, the oversampled points, the extra random ones


def load_packed_case(case: str) -> dict[str, Tensor]:
    """Every tensor of the original run; what follows from others is put back."""
    info = read_info("train")["cases"][case]
    tensors = load_file(GOLDEN / "train" / f"case_{case}.safetensors")
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    height, width = info["padded_size"]
    frames = [(tensors[f"video{video}.frames_uint8"].float() - mean) / std for video in VIDEOS]
    tensors["input.padded"] = torch.cat(
        [torch.nn.functional.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in frames]
    )
    for index, prediction in enumerate(DRAW_ORDER):
        extra = tensors[f"rand.{DRAWS_PER_PREDICTION * index + 3:03d}"]
        points = tensors[f"point_coords.{prediction}"]
        tensors[f"point_coords.{prediction}"] = torch.cat((points, extra), dim=1)
    return tensors


def load_case(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    info = read_info("train")["cases"][case]
    return unpack_bools(load_packed_case(case), info["bool_shapes"]), info


def golden_targets(golden: dict[str, Tensor]) -> list[ClipTarget]:
    return [ClipTarget(golden[f"video{v}.target.labels"], golden[f"video{v}.target.masks"]) for v in VIDEOS]


def replay(golden: dict[str, Tensor]) -> tuple[Callable[[tuple[int, ...]], Tensor], Callable[[], int]]:
    """The recorded draws in order, and how many are left."""
    draws = [golden[name] for name in sorted(golden) if name.startswith("rand.")]

    def draw(shape: tuple[int, ...]) -> Tensor:
        return draws.pop(0)  # the caller checks the shape

    return draw, lambda: len(draws)


def as_lists(matches: tuple[tuple[Match, ...], ...]) -> dict[str, list[dict[str, list[int]]]]:
    """In the form of info.json."""
    return {
        name: [{"query": match.queries.tolist(), "target": match.targets.tolist()} for match in clips]
        for name, clips in zip(PREDICTIONS, matches, strict=True)
    }


def native_gradients(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The recorded full gradients under this project's names."""
    prefix = "grad."
    full = {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}
    native = to_native({name: full.get(name, torch.full_like(x, torch.nan)) for name, x in _parameters().items()})
    return {name: value for name, value in native.items() if not value.isnan().any()}


def native_gradient_norms(golden: dict[str, Tensor], run: str) -> dict[str, float]:
    """Norms of every parameter's gradient under this project's names; `run` is `grad_norm` or `grad_norm_fp64_run`."""
    by_name = dict(zip(read_info("train")["parameters"], golden[run], strict=True))
    native = to_native({name: by_name[name].expand(x.shape) for name, x in _parameters().items()})
    return {name: float(value.flatten()[0]) for name, value in native.items()}


def _parameters() -> dict[str, Tensor]:
    names = read_info("train")["parameters"]
    weights = original_weights()
    return {name: weights[name] for name in names}

"""Time a training step of our model and of transformers', with the same weights, frames and targets, in one process.

    python benchmarks/training.py [--height 480 --width 864 --frames 2 --instances 5 --device cpu --json FILE]

A step is the forward pass with predictions at all depths, the loss at 12544 points of each mask, and the backward pass,
in float32, without the optimizer. Implementations take turns; ours runs with the deformable attention backend that
`auto` stands for and with `reference`. None has dropout or stochastic depth here. What differs: transformers has an
image model, so the clip's T frames are T images to it, each with queries and matching of its own, where our queries see
all frames at once; backbone and pixel decoder do the same work. With `--frames 1` the function is the same, and so
are the losses up to rounding; with more, our mask losses are sums over frames and theirs means.

Peak memory is that of a step's tensors, the parameters' gradients included, weights and input not. On a CPU it leaves
out what is not PyTorch's: gradients that `embedding_bag`'s backward gets from SciPy, of one layer at a time. The second
table is the deformable attention op alone, at the sizes of one frame of 480x864.
"""

import json as json_format
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro
from common import box_target
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from m2f_video.benchmark import machine, measure, peak_bytes
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.files import atomic_path
from m2f_video.inference.segments import MASK_STRIDE
from m2f_video.modeling.position_encoding import pixel_centres
from m2f_video.ops import BACKEND_VARIABLE, available_backends, ms_deform_attn, resolve_backend
from m2f_video.ops.reference import sampling_locations_from_offsets
from m2f_video.parity import random_frames, random_model, transformers_model
from m2f_video.training import ClipTarget, LossConfig, VideoMask2FormerLoss

PARTS = ("forward", "loss", "backward")
LEVELS, HEADS, CHANNELS, POINTS = ((15, 27), (30, 54), (60, 108)), 8, 32, 4

Mark = Callable[[], None]
Step = Callable[[Mark], tuple[object, Tensor]]
"""Calls its argument before the loss; gives the output, which a training loop holds until the next, and the loss."""


def our_step(model: Any, frames: Tensor, target: ClipTarget, backend: str, mark: Mark) -> tuple[object, Tensor]:
    """Our output and loss for the clip (T, 3, H, W)."""
    os.environ[BACKEND_VARIABLE] = backend
    output = model(frames[None], output_auxiliary=True)
    mark()
    return output, VideoMask2FormerLoss(LossConfig(), model.config.num_labels)(output, [target]).total


def transformers_step(model: Any, frames: Tensor, targets: dict[str, Any], mark: Mark) -> tuple[object, Tensor]:
    """Transformers' output and loss, which it computes in its forward pass, for the images (T, 3, H, W)."""
    with model.criterion.register_forward_pre_hook(lambda *_: mark()):
        output = model(pixel_values=frames, **targets)
    return output, output.loss


def run_step(name: str, model: nn.Module, step: Step, runs: list[dict[str, float]]) -> None:
    """Append seconds and loss to `runs`; no gradients stay."""
    marks: list[float] = []

    def mark() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    torch.manual_seed(0)
    mark()
    _held, loss = step(mark)
    mark()
    loss.backward()
    mark()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not all(tensor.isfinite().all() for tensor in (loss, *gradients)):
        raise SystemExit(f"{name}: the loss or a gradient is not finite, so its times would mean nothing")
    model.zero_grad()
    seconds = {f"{part}_s": marks[index + 1] - marks[index] for index, part in enumerate(PARTS)}
    runs.append(seconds | {"step_s": marks[-1] - marks[0], "loss": loss.item()})


def measure_steps(steps: dict[str, tuple[nn.Module, Step]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Of each implementation, the columns of the table: medians of seconds and loss, ratio of the step, memory."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    functions = {name: partial(run_step, name, *step, runs[name]) for name, step in steps.items()}
    measure(functions, repeats, device)
    rows = {name: {key: median(run[key] for run in runs[name][1:]) for key in runs[name][0]} for name in steps}
    for name, row in rows.items():
        row["transformers_ratio"] = rows["transformers"]["step_s"] / row["step_s"]
        row["peak_mb"] = peak_bytes(functions[name], device) / 1e6
    return rows


def measure_op(repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Median seconds of the op, forward alone and with its gradients, by every backend for training here."""
    torch.manual_seed(0)
    queries = torch.cat([pixel_centres(*level, dtype=torch.float32) for level in LEVELS])
    shape = (1, len(queries), HEADS, len(LEVELS), POINTS)
    locations = sampling_locations_from_offsets(queries, 2 * torch.randn(*shape, 2), LEVELS)  # near, as in real frames
    weights = torch.randn(shape).flatten(3).softmax(-1).view(shape)
    inputs = [x.to(device).requires_grad_() for x in (torch.randn(*shape[:3], CHANNELS), locations, weights)]
    grad = torch.randn(1, len(queries), HEADS * CHANNELS, device=device)
    op: Any = partial(ms_deform_attn, inputs[0], LEVELS, inputs[1], inputs[2])
    names = [name for name, reason in available_backends().items() if reason is None]
    functions = {f"{name} forward": partial(torch.no_grad()(op), name) for name in names}
    functions |= {f"{name} both": partial(lambda b: torch.autograd.grad(op(b), inputs, grad), name) for name in names}
    seconds = measure(functions, repeats, device)
    return {name: {f"{part}_s": median(seconds[f"{name} {part}"]) for part in ("forward", "both")} for name in names}


def main(
    height: int = 240,
    width: int = 432,
    frames: int = 2,
    instances: int = 5,
    preset: str = "swin_tiny_youtubevis_2019",
    threads: int = 2,
    repeats: int = 3,
    device: Literal["cpu", "cuda"] = "cpu",
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Print medians of a training step and of the deformable attention op; write them as JSON too where asked for.

    Args:
        height: of the model's input, a multiple of 4.
        width: of the model's input, a multiple of 4.
        frames: of the clip.
        instances: of the clip, seen in all frames.
        preset: of the model; its weights are random.
        threads: of PyTorch.
        repeats: timed steps of each implementation, and calls of the op.
        device: where all runs.
        json: file to write.
    """
    for name in ("height", "width", "frames", "instances", "threads", "repeats"):
        if (number := locals()[name]) < 1:
            raise SystemExit(f"--{name} must be positive, got {number}")
    if height % MASK_STRIDE or width % MASK_STRIDE:
        raise SystemExit(f"--height and --width must be multiples of {MASK_STRIDE}, got {height} and {width}")
    if json is not None and not json.absolute().parent.is_dir():
        raise SystemExit(f"--json {json}: there is no such folder; make it first")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; leave out --device cuda")
    torch.set_num_threads(threads)
    pixels = random_frames(frames, height, width, seed=0).float().to(device)
    try:
        config = VideoMask2FormerConfig.preset(preset)
        backbone: Any = config.backbone
        model = random_model(config.replace(backbone=replace(backbone, drop_path_rate=0.0)), seed=0)
        reference = transformers_model(model).to(device).train()
        backends = dict.fromkeys((resolve_backend("auto", pixels), "reference"))
    except (ValueError, ImportError) as error:  # preset, backend, or no transformers
        raise SystemExit(str(error)) from error
    model = model.to(device).train()
    target = box_target(instances, config.num_labels, (frames, height, width)).to(device)
    steps: Any = {f"ours, {name}": (model, partial(our_step, model, pixels, target, name)) for name in backends}
    targets = {"mask_labels": list(target.masks.float().unbind(1)), "class_labels": [target.labels] * frames}
    steps["transformers"] = (reference, partial(transformers_step, reference, pixels, targets))
    rows, op_rows = measure_steps(steps, repeats, device), measure_op(repeats, device)

    title = f"training step, {preset}, float32, {frames} frame(s) of {height}x{width}, {instances} instances, {device}"
    table = Table("seconds", *PARTS, "step", "value", "ratio", "MB")
    for name, row in rows.items():
        table.add_row(name, *(f"{number:.{0 if key == 'peak_mb' else 2}f}" for key, number in row.items()))
    op_table = Table("deformable attention, seconds", "forward", "forward and backward")
    for name, row in op_rows.items():
        op_table.add_row(name, *(f"{seconds:.4f}" for seconds in row.values()))
    print(f"{title}; value of the loss, ratio transformers / step, MB of peak memory")
    Console().print(table, op_table)
    if json is not None:
        versions = {name: version(name) for name in ("m2f-video", "torch", "transformers", "scipy")}
        about = {"title": title, "command": " ".join(("python", *sys.argv)), "machine": machine(device)}
        about |= {"versions": {"python": sys.version.split()[0], **versions}}
        with atomic_path(json) as temporary:
            temporary.write_text(json_format.dumps(about | {"step": rows, "op": op_rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

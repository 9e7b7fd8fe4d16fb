"""Measure peak memory: of the training loss, with masks compared at points and as a whole, and of segmenting a clip.

    python benchmarks/memory.py loss [--height 480 --width 864 --frames 2 --instances 8 --device cpu --json FILE]
    python benchmarks/memory.py clip [--height 480 --width 864 --frames 16 32 --mode whole --dtype float32 --json FILE]

Counted are the bytes of tensors that are allocated at once, beyond what there is before: of the loss, the predictions
(random leaves, made beforehand) and the targets are not part of it, their gradients are; of a clip, the weights and the
video's pixels are not, each frame's features are. `--mode streamed` keeps these in a file, where they are not counted.
On CUDA that is
`torch.cuda.max_memory_allocated`; on a CPU the sum of what the profiler records of PyTorch's allocator, every block
that is taken or freed inside an operator included. The process's resident memory would be the other way, but it keeps
what the C library does not hand back and counts libraries as they load. A small case runs first, because cuBLAS keeps
the workspace that its first product takes.
"""

import json as json_format
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from m2f_video.benchmark import machine, peak_bytes
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.files import atomic_path
from m2f_video.inference import streamed
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import segment_video
from m2f_video.inference.segments import MASK_STRIDE
from m2f_video.modeling.transformer_decoder import Prediction
from m2f_video.modeling.video_mask2former import VideoMask2FormerOutput
from m2f_video.parity import random_model
from m2f_video.training import ClipTarget, LossConfig, VideoMask2FormerLoss

CASES: dict[str, tuple[Literal["points", "masks"], Literal["points", "masks"]]] = {
    "points": ("points", "points"),
    "points, matched by masks": ("points", "masks"),
    "masks, matched by points": ("masks", "points"),
    "masks": ("masks", "masks"),
}
"""`mask_loss` and `matching` of the compared losses."""


def random_predictions(
    count: int, queries: int, classes: int, size: tuple[int, int, int], device: str
) -> VideoMask2FormerOutput:
    """Auxiliary predictions of one clip as leaves; `size` is (T, H, W) of the model's input."""
    frames, height, width = size
    generator = torch.Generator(device).manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).requires_grad_()

    auxiliary = tuple(
        Prediction(leaf(1, queries, classes + 1), leaf(1, queries, frames, height // MASK_STRIDE, width // MASK_STRIDE))
        for _ in range(count)
    )
    final = auxiliary[-1]
    return VideoMask2FormerOutput(
        final.class_queries_logits, final.masks_queries_logits, torch.empty(0), auxiliary=auxiliary
    )


def random_target(instances: int, classes: int, size: tuple[int, int, int]) -> ClipTarget:
    """Instances of noise: memory depends on shapes alone."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(instances, *size, generator=generator) < 0.5
    return ClipTarget(torch.randint(classes, (instances,), generator=generator), masks)


def loss_bytes(config: LossConfig, output: VideoMask2FormerOutput, target: ClipTarget, device: str) -> int:
    """Peak of the loss's forward and backward pass, on fresh gradients."""
    for prediction in output.auxiliary or ():
        prediction.class_queries_logits.grad = prediction.masks_queries_logits.grad = None
    num_labels = output.class_queries_logits.shape[2] - 1
    criterion = VideoMask2FormerLoss(config, num_labels)
    generator = torch.Generator(device).manual_seed(0)
    return peak_bytes(lambda: criterion(output, [target], generator).total.backward(), device)


def loss(
    height: int = 480,
    width: int = 864,
    frames: int = 2,
    instances: int = 8,
    queries: int = 100,
    predictions: int = 10,
    classes: int = 40,
    num_points: int = 12544,
    device: Literal["cpu", "cuda"] = "cpu",
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Peak memory of the training loss for one clip; write it as JSON too where a file is given.

    Args:
        height: of the model's input, a multiple of 4.
        width: of the model's input, a multiple of 4.
        frames: of the clip.
        instances: of the clip, seen in all frames.
        queries: of the model.
        predictions: at all depths, the learnable queries' included.
        classes: of the model.
        num_points: per mask and frame, where masks are compared at points.
        device: where the loss runs.
        json: file to write.
    """
    if height % MASK_STRIDE or width % MASK_STRIDE:
        raise SystemExit(f"height and width must be multiples of {MASK_STRIDE}, got {height}x{width}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; leave out --device cuda")
    size = (frames, height, width)
    output = random_predictions(predictions, queries, classes, size, device)
    target = random_target(instances, classes, size)
    small = (1, 8 * MASK_STRIDE, 8 * MASK_STRIDE)
    peaks = {}
    for name, (mask_loss, matching) in CASES.items():
        config = LossConfig(mask_loss=mask_loss, matching=matching, num_points=num_points)
        loss_bytes(config, random_predictions(1, 2, classes, small, device), random_target(1, classes, small), device)
        peaks[name] = loss_bytes(config, output, target, device)
    leaves = [leaf for at in output.auxiliary or () for leaf in (at.class_queries_logits, at.masks_queries_logits)]
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    title = (
        f"loss, forward and backward, float32, 1 clip of {frames} frame(s) of {height}x{width}, {instances} instances, "
        f"{predictions} predictions of {queries} queries, {classes} classes, {num_points} points, {device}, "
        f"torch {torch.__version__}"
    )
    table = Table("masks compared at", "peak, MB", "ratio to points")
    rows = {}
    for name, peak in peaks.items():
        rows[name] = {"peak_mb": peak / 1e6, "ratio_to_points": peak / peaks["points"]}
        table.add_row(name, f"{peak / 1e6:.0f}", f"{peak / peaks['points']:.2f}")
    print(title)
    Console().print(table)
    print(f"of each row, the gradients of the predictions: {gradients / 1e6:.0f} MB")
    if json is not None:
        write_report(json, title, device, {"gradients_mb": gradients / 1e6, "cases": rows})


def clip(
    frames: tuple[int, int] = (16, 32),
    height: int = 480,
    width: int = 864,
    preset: str = "swin_tiny_youtubevis_2019",
    mode: Literal["whole", "streamed"] = "whole",
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Peak memory of segmenting a video as one clip, for two lengths, and what each further frame adds.

    Args:
        frames: the two lengths; short clips are bounded by the encoding of a frame and not by their length.
        height: of the video and of the model's input.
        width: of the video and of the model's input.
        preset: of the model; its weights are random.
        mode: at once, or frame by frame.
        dtype: of the model.
        device: where it runs.
        json: file to write.
    """
    if not 0 < frames[0] < frames[1]:
        raise SystemExit(f"--frames must be two lengths, the shorter first, got {frames[0]} and {frames[1]}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; leave out --device cuda")
    model = random_model(VideoMask2FormerConfig.preset(preset), 0).to(device=device, dtype=getattr(torch, dtype))
    preprocessing = replace(model.config.preprocessing, fixed_size=(height, width))
    processor = VideoProcessor(preprocessing, model.config.labels)
    streamed.LEVEL_MEMORY = streamed.MASK_MEMORY = 0
    peaks = {}
    for count in frames:
        video = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
        peaks[count] = peak_bytes(
            lambda video=video: segment_video(model, video, processor=processor, mode=mode), device
        )
    slope = (peaks[frames[1]] - peaks[frames[0]]) / (frames[1] - frames[0])

    title = (
        f"segment_video, {mode}, one clip of {height}x{width}, {preset}, {dtype}, {device}, torch {torch.__version__}"
    )
    table = Table("frames", "peak, MB")
    for count, peak in peaks.items():
        table.add_row(str(count), f"{peak / 1e6:.0f}")
    print(title)
    Console().print(table)
    print(f"each further frame: {slope / 1e6:.1f} MB")
    if json is not None:
        rows = {str(count): {"peak_mb": peak / 1e6} for count, peak in peaks.items()}
        write_report(json, title, device, {"mb_per_frame": slope / 1e6, "frames": rows})


def write_report(path: Path, title: str, device: str, numbers: dict[str, object]) -> None:
    """Write a run as JSON, with command and machine."""
    report = {"title": title, "command": " ".join(("python", *sys.argv)), "machine": machine(device), **numbers}
    with atomic_path(path) as temporary:
        temporary.write_text(json_format.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"loss": loss, "clip": clip})

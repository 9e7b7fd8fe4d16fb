"""Measure what an export to ONNX loses and costs: errors by size and length, and seconds beside the model's own.

    python benchmarks/export.py [--checkpoint demo] [--frames 1 3 8 --repeats 5 --json-file FILE --table FILE]

Errors are those of the logits, of the clip model and of the pair, relative to the eager model in float32, on random
clips of two sizes: that of 16:9 video, and an upright one with half of its sides. With `--repeats 0` nothing is timed.
Timed are, taking turns and each frame by frame: the model as it is written, prepared for inference, and the exported
pair by ONNX Runtime.
"""

import json
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from comparison import Comparison, Implementation, measure_parts
from torch import Tensor

from m2f_video import benchmark as bench
from m2f_video.cli.console import print_table, progress_bars
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.evaluation.report import check_writable
from m2f_video.export import OPSET, TOLERANCE, Check, check_sizes, export_model
from m2f_video.exported import ExportedModel
from m2f_video.files import atomic_path
from m2f_video.inference.clip_model import ClipModel
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former
from m2f_video.parity import random_frames, random_model

EAGER, PREPARED, EXPORTED = "ours eager", "ours prepared", "exported pair"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


def main(
    checkpoint: str | None = None,
    preset: str = "swin_tiny_youtubevis_2019",
    frames: tuple[int, ...] = (1, 3, 8),
    repeats: int = 5,
    threads: int | None = None,
    json_file: Path | None = None,
    table: Path | None = None,
) -> None:
    """Print a table of errors, and one of seconds per frame.

    Args:
        checkpoint: model to export; by default one with random weights.
        preset: of the model with random weights.
        frames: lengths of the clips.
        repeats: timed runs of each; one before them warms up. 0 times nothing.
        threads: of PyTorch and ONNX Runtime; by default as many as PyTorch chooses.
        json_file: write all numbers to this file.
        table: write the errors to this file, as Markdown.
    """
    if min(frames, default=0) < 1 or repeats < 0:
        raise ValueError(f"--frames must be positive and --repeats not negative, got {frames} and {repeats}")
    for file in (json_file, table):
        if file is not None:
            check_writable(file)
    if threads is not None:
        torch.set_num_threads(threads)
    if checkpoint is None:
        model = random_model(VideoMask2FormerConfig.preset(preset), 0)
    else:
        model = VideoMask2Former.from_pretrained(checkpoint)
    what = f"{preset}, random weights" if checkpoint is None else checkpoint
    sizes = [(count, height, width) for _, height, width in check_sizes(model) for count in frames]
    report: dict[str, Any] = {
        "title": f"{what}, opset {OPSET}, float32",
        "machine": bench.machine() | {name: version(name) for name in PACKAGES},
        "command": " ".join(("python", *sys.argv)),
        "tolerance": TOLERANCE,
    }
    with TemporaryDirectory() as folder, progress_bars() as progress:
        output = Path(folder) / "model.onnx"
        result = export_model(model, output, sizes=sizes, progress=progress)
        report["megabytes"] = {file.name: round(file.stat().st_size / 1e6, 1) for file in result.files}
        report["errors"] = [asdict(check) for check in result.checks]
        text = markdown(report["title"], report["machine"], result.checks)
        print(text)
        if not result.passed:
            raise ValueError(f"an error is over the tolerance of {TOLERANCE:.0e}")
        if repeats:
            _, height, width = check_sizes(model)[0]
            times = measured(model, ExportedModel.load(output), frames, (height, width), repeats, progress)
            for each in times.tables():
                print_table(each)
            report["speed"] = times.to_dict()
    for file, content in ((json_file, json.dumps(report, indent=2)), (table, text)):
        if file is not None:
            with atomic_path(file) as temporary:
                temporary.write_text(content + "\n")


def markdown(title: str, machine: dict[str, Any], checks: tuple[Check, ...]) -> str:
    """The table of errors."""
    lines = [
        f"Relative error against the eager model: {title}. {', '.join(f'{k} {v}' for k, v in machine.items())}.",
        "",
        "| run | frames | size | class logits | mask logits |",
        "|---|---|---|---|---|",
    ]
    for check in checks:
        errors = f"{check.class_error:.1e} | {check.mask_error:.1e}"
        lines.append(f"| {check.part} | {check.frames} | {check.height}x{check.width} | {errors} |")
    return "\n".join(lines)


def measured(
    model: VideoMask2Former,
    exported: ExportedModel,
    frames: tuple[int, ...],
    size: tuple[int, int],
    repeats: int,
    progress: Any,
) -> Comparison:
    """Seconds of the whole model, by all three."""
    eager = bench.variant(model, torch.float32, prepare=False)
    models: dict[str, ClipModel] = {EAGER: eager, PREPARED: bench.variant(model, torch.float32, True)}
    models[EXPORTED] = exported
    ceilings = {"float32": bench.matmul_ceiling(torch.float32)}
    rows = []
    for count in frames:
        pixels = random_frames(count, *size, seed=0).float()
        counted = {bench.WHOLE_MODEL: lambda pixels=pixels: run(eager, pixels)}
        implementations = [
            Implementation(
                name=name,
                dtype=torch.float32,
                parts={bench.WHOLE_MODEL: lambda each=each, pixels=pixels: run(each, pixels)},
                counted=counted,
            )
            for name, each in models.items()
        ]
        found = measure_parts(implementations, frames=count, repeats=repeats, ceilings=ceilings, progress=progress)
        rows += [
            replace(row, peak_mb=None) if row.implementation == EXPORTED else row for row in found
        ]  # not PyTorch's
    title = f"exported to ONNX, {size[0]} x {size[1]}, cpu"
    baselines = (EAGER, PREPARED)
    return Comparison(title=title, machine=bench.machine(), ceilings=ceilings, rows=rows, baselines=baselines)


def run(model: ClipModel, pixels: Tensor) -> object:
    """A clip (T, 3, H, W) from frames to classes and mask logits."""
    features = FrameFeatures.concatenate([model.encode_frames(frame[None]) for frame in pixels])
    return model.decode_clip(features, output_masks=True)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"export.py: error: {error}")

"""Time a frame through our model and through transformers, with the same weights and input, alternating in one process.

    python benchmarks/speed.py [--height 480 --width 864 --frames 1 --repeats 7 --json-file FILE]

Medians, and the ratio transformers / ours of each part. A clip's frames are timed together; the time is divided by T.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from m2f_video.config import VideoMask2FormerConfig
from m2f_video.parity import random_frames, random_model, transformers_model


def median_seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each function; they take turns, so that a drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def main(
    height: int = 480,
    width: int = 864,
    frames: int = 1,
    repeats: int = 7,
    threads: int = 2,
    preset: str = "swin_tiny_youtubevis_2019",
    json_file: Path | None = None,
) -> None:
    """Print a table of seconds per frame and ratios; write it as JSON too where a file is given."""
    torch.set_num_threads(threads)
    model = random_model(VideoMask2FormerConfig.preset(preset), seed=0)
    reference = transformers_model(model)
    pixels = random_frames(frames, height, width, seed=0).float()
    maps = model.backbone(pixels)
    pixel_level = reference.model.pixel_level_module
    parts: dict[str, Callable[[], object]] = {
        "ours backbone": lambda: model.backbone(pixels),
        "transformers backbone": lambda: pixel_level.encoder(pixels),
        "ours pixel decoder": lambda: model.pixel_decoder(maps),
        "transformers pixel decoder": lambda: pixel_level.decoder(list(maps)),
        "ours whole model": lambda: model(pixels[None]),
        "transformers whole model": lambda: reference(pixel_values=pixels),
    }
    seconds = {name: value / frames for name, value in median_seconds(parts, repeats).items()}

    title = f"{preset}, float32, {frames} frame(s) of {height}x{width}, {threads} threads, torch {torch.__version__}"
    table = Table("part", "ours, s/frame", "transformers, s/frame", "ratio", title=title)
    rows = {}
    for part in ("backbone", "pixel decoder", "whole model"):
        ours, theirs = seconds[f"ours {part}"], seconds[f"transformers {part}"]
        rows[part] = {"ours_s": ours, "transformers_s": theirs, "ratio": theirs / ours}
        table.add_row(part, f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}")
    Console().print(table)
    if json_file is not None:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        json_file.write_text(json.dumps({"title": title, "machine": machine, "parts": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

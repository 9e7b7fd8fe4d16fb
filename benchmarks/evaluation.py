"""Time the evaluation of results, step by step, on made-up videos.

    python benchmarks/evaluation.py [--videos 300 --frames 30 --predictions 10 --annotations 4 --json-file FILE]

Annotated tracks are ellipses with wavy outlines that move; predictions are the same, shifted and of other shape, half
of them somewhere else. Both are written to files first, so that reading and checking them is timed as well.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pycocotools import mask as coco
from rich.console import Console
from rich.table import Table

from m2f_video.evaluation import average_precision, load_ground_truth, load_results, pair_tracks, tracking_metrics


def blob(size: tuple[int, int], centre: np.ndarray, radius: np.ndarray, phase: float) -> dict[str, Any]:
    """An ellipse with a wavy outline as a compressed encoding; centre and radius are (y, x)."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    wave = 1 + 0.1 * np.sin(7 * angle + phase)
    y, x = centre[0] + radius[0] * wave * np.sin(angle), centre[1] + radius[1] * wave * np.cos(angle)
    (rle,) = coco.frPyObjects([np.stack([x, y], axis=1).ravel().tolist()], *size)
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def make_video(
    video_id: int, frames: int, size: tuple[int, int], counts: tuple[int, int], categories: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Annotations and results of one video; `counts` are how many of each."""
    rng = np.random.default_rng((seed, video_id))
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    starts = [rng.uniform(0.2, 0.8, 2) * size for _ in range(max(counts))]
    for index in range(counts[0] + counts[1]):
        predicted = index >= counts[0]
        like = (index - counts[0]) if predicted else index
        known = like < counts[0]
        centre = starts[like] + (rng.normal(0, 8, 2) if predicted else 0)
        radius = rng.uniform(0.08, 0.2, 2) * size
        speed = np.array([3.0, 5.0]) * (-1) ** like
        masks = [blob(size, centre + t * speed, radius, like + t / 5) for t in range(frames)]
        row = {
            "video_id": video_id,
            "category_id": 1 + (like if known else int(rng.integers(categories))) % categories,
            "segmentations": masks,
        }
        if predicted:
            results.append(row | {"score": float(rng.uniform(0.4, 1) if known else rng.uniform(0, 0.6))})
        else:
            row |= {"id": video_id * 1000 + index, "iscrowd": 0, "areas": coco.area(masks).tolist()}
            annotations.append(row)
    return annotations, results


def main(
    videos: int = 300,
    frames: int = 30,
    predictions: int = 10,
    annotations: int = 4,
    height: int = 720,
    width: int = 1280,
    categories: int = 40,
    seed: int = 0,
    json_file: Path | None = None,
) -> None:
    """Print a table of seconds by step; write it as JSON too where a file is given."""
    with tempfile.TemporaryDirectory() as folder:
        truth_file, results_file = Path(folder) / "annotations.json", Path(folder) / "results.json"
        pairs = [
            make_video(number, frames, (height, width), (annotations, predictions), categories, seed)
            for number in range(1, videos + 1)
        ]
        truth = {
            "videos": [
                {"id": number, "height": height, "width": width, "length": frames} for number in range(1, videos + 1)
            ],
            "categories": [{"id": number, "name": f"class {number}"} for number in range(1, categories + 1)],
            "annotations": [row for rows, _ in pairs for row in rows],
        }
        truth_file.write_text(json.dumps(truth))
        results_file.write_text(json.dumps([row for _, rows in pairs for row in rows]))
        megabytes = results_file.stat().st_size / 1e6

        seconds: dict[str, float] = {}

        def timed(step: str, function: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            value = function()
            seconds[step] = time.perf_counter() - start
            return value

        ground_truth = timed("read and check annotations", lambda: load_ground_truth(truth_file))
        tracks = timed("read and check results", lambda: load_results(results_file, ground_truth))
    pairings = timed("compare masks", lambda: pair_tracks(ground_truth, tracks))
    ap = timed("AP and AR", lambda: average_precision(ground_truth, pairings))
    ap_seconds = sum(seconds.values())
    tracking = timed("HOTA, IDF1, id switches", lambda: tracking_metrics(ground_truth, pairings))

    title = (
        f"{videos} videos x {frames} frames of {height}x{width}, {predictions} predicted and {annotations} annotated "
        f"tracks each, {categories} categories; results.json {megabytes:.0f} MB"
    )
    table = Table("step", "s")
    for step, value in seconds.items():
        table.add_row(step, f"{value:.2f}")
    table.add_row("all for AP and AR", f"{ap_seconds:.2f}")
    table.add_row("all", f"{sum(seconds.values()):.2f}")
    print(title)
    Console().print(table)
    print(f"AP {ap.stats['AP']:.3f}  AP50 {ap.stats['AP50']:.3f}  HOTA {tracking.combined.HOTA:.3f}")
    if json_file is not None:
        machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
        json_file.write_text(json.dumps({"title": title, "machine": machine, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

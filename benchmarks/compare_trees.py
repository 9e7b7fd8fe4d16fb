"""Time two source trees of this package against each other, in turns.

    python benchmarks/compare_trees.py --old /path/to/old/tree [--new . --mode prepared --dtype float32 --frames 1]

Each tree runs in a process of its own, pinned to the same cores, on the same weights and frames; one waits while the
other runs, and who goes first changes from round to round. What counts is the median of the rounds' ratios, which a
machine that other work slows down moves less than the medians of seconds. The trees need only have
`VideoMask2Former`, `prepare_for_inference`, `segment_video` and the training loss where they always were; how far
apart their outputs are is printed too, so that nothing is compared that computes something else.

Modes: `eager`, the model as it is built; `onednn` and `prepared`, what `prepare_for_inference` makes of it without and
with a compiler; `transformers`, its model on the frames as images; `training`, forward, loss and backward; `memory`,
megabytes of tensors that each further frame of a clip adds to the peak of `segment_video`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Worker, WorkerError, box_target, emit, orders, timed

MODES = ("prepared", "onednn", "eager", "transformers", "training", "memory")
PRESET = "swin_tiny_youtubevis_2019"
LENGTHS = (8, 16)
"""Frames of the two clips that `memory` compares."""


def main() -> int:
    """Compare, or be one of the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="root of a tree")
    parser.add_argument("--new", type=Path, default=Path(__file__).parents[1], help="root of another; this one")
    parser.add_argument("--mode", choices=MODES, default="prepared")
    parser.add_argument("--old-mode", choices=MODES, help="for the old tree alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--old-dtype", choices=("float32", "bfloat16"), help="for the old tree alone")
    parser.add_argument("--frames", type=int, default=1, help="of the clip (default 1)")
    parser.add_argument("--height", type=int, default=480, help="of the input, a multiple of 32")
    parser.add_argument("--width", type=int, default=864, help="of the input, a multiple of 32")
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, and cores (default 2)")
    parser.add_argument("--transformers", action="store_true", help="time transformers' model in turns with the two")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # where its output goes
    options = parser.parse_args()
    for name in ("frames", "repeats", "threads", "height", "width"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    if options.worker:
        return _work(options)
    for name in ("old", "new"):
        tree = getattr(options, name).resolve()
        setattr(options, name, tree)
        if not (tree / "m2f_video").is_dir():
            parser.error(f"--{name} {tree} holds no m2f_video")
    if len(os.sched_getaffinity(0)) < options.threads:
        parser.error(f"--threads {options.threads}, but there are {len(os.sched_getaffinity(0))} cores")
    return _compare(options)


def _compare(options: argparse.Namespace) -> int:
    memory = options.mode == "memory"
    what = {
        "old": (options.old, options.old_mode or options.mode, options.old_dtype or options.dtype),
        "new": (options.new, options.mode, options.dtype),
    }
    if options.transformers:
        what["transformers"] = (options.new, "transformers", options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        try:
            for name, each in what.items():
                print(f"{name}: {', '.join(map(str, each))}", flush=True)
                workers[name] = _worker(options, *each, Path(folder) / name)
                workers[name].answer()  # one after the other: building and warming up use all cores
            if not memory:
                print(_distance(Path(folder), what), flush=True)
            rounds: list[dict[str, float]] = []
            for number in range(1 if memory else options.repeats):  # tensors take the same memory every time
                order = list(workers) if number % 2 == 0 else list(reversed(workers))
                measured = {}
                for name in order:
                    time.sleep(0.05)  # threads of the one before go to sleep
                    workers[name].tell()
                    measured[name] = workers[name].answer()
                rounds.append(measured)
                print(f"{number + 1}: " + ", ".join(f"{name} {measured[name]:.4g}" for name in what), flush=True)
        except WorkerError as error:
            raise SystemExit(f"{name}: the worker {error}") from error
        finally:
            for worker in workers.values():
                worker.close()

    unit = "MB a frame" if memory else "s a frame"
    report: dict[str, Any] = {
        "command": " ".join(("python", *sys.argv)),
        "what": {name: [mode, dtype] for name, (_, mode, dtype) in what.items()},
        "frames": list(LENGTHS) if memory else options.frames,
        "unit": unit,
        "rounds": rounds,
        "medians": {name: statistics.median(row[name] for row in rounds) for name in what},
    }
    print("medians: " + ", ".join(f"{name} {value:.4g} {unit}" for name, value in report["medians"].items()))
    for above, below in [("new", "old"), *((("transformers", "old"), ("transformers", "new")) * options.transformers)]:
        ratios = sorted(row[above] / row[below] for row in rounds)
        quartiles = [ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75)]
        quartiles[1] = statistics.median(ratios)
        report[f"{above} / {below}"] = quartiles
        print(f"{above} / {below}: {quartiles[1]:.3f}  (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _worker(options: argparse.Namespace, tree: Path, mode: str, dtype: str, output: Path) -> Worker:
    command = [__file__, "--old", str(tree), "--worker", str(output), "--mode", mode, "--dtype", dtype]
    for option in ("frames", "height", "width", "threads"):
        command += [f"--{option}", str(getattr(options, option))]
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    variables = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(options.threads)}
    return Worker(command, variables, tree, cores)


def _work(options: argparse.Namespace) -> int:
    import torch

    import m2f_video

    tree = options.old.resolve()
    if not Path(str(m2f_video.__file__)).is_relative_to(tree):
        raise SystemExit(f"m2f_video was imported from {m2f_video.__file__}, which is not in {tree}")
    torch.set_num_threads(options.threads)
    call = _call(options)
    if options.mode == "memory":
        emit("ready")
        for _ in orders():
            emit(call())
    else:
        torch.save(call(), options.worker)  # warms up, too
        call()
        emit("ready")
        for _ in orders():
            emit(timed(call) / options.frames)
    return 0


def _call(options: argparse.Namespace) -> Callable[[], Any]:
    """What is timed; gives the tensors to compare, or megabytes."""
    import torch

    from m2f_video.config import VideoMask2FormerConfig
    from m2f_video.modeling.video_mask2former import VideoMask2Former

    dtype, mode = getattr(torch, options.dtype), options.mode
    config = VideoMask2FormerConfig.preset(PRESET)
    if mode == "training":
        from dataclasses import replace

        config = config.replace(backbone=replace(config.backbone, drop_path_rate=0.0))
    torch.manual_seed(0)
    model: Any = VideoMask2Former(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # initial weights alone leave offsets at zero and norms at one
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    pixels = torch.randn(1, options.frames, 3, options.height, options.width, generator=generator)
    if mode == "training":
        return _training_step(model.to(dtype).train(), pixels.to(dtype))
    model.requires_grad_(False)
    if mode in ("eager", "transformers"):
        model = model.to(dtype)
    else:
        model = model.prepare_for_inference(dtype=dtype, **({"compile": "none"} if mode == "onednn" else {}))
    if mode == "memory":
        return lambda: _megabytes_per_frame(model, options.height, options.width)
    if mode == "transformers":
        from m2f_video.parity import transformers_model

        model = transformers_model(model)
        pixels = pixels[0]
    pixels = pixels.to(dtype)

    @torch.inference_mode()
    def call() -> list[torch.Tensor]:
        output = model(pixel_values=pixels)
        return [output.class_queries_logits, output.masks_queries_logits]

    return call


def _training_step(model: Any, pixels: Any) -> Callable[[], Any]:
    import torch

    from m2f_video.training import LossConfig, VideoMask2FormerLoss

    target = box_target(5, model.config.num_labels, (pixels.shape[1], *pixels.shape[3:]))
    criterion = VideoMask2FormerLoss(LossConfig(), model.config.num_labels)

    def step() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        loss = criterion(model(pixels, output_auxiliary=True), [target]).total
        loss.backward()
        return [loss.detach()]

    return step


def _megabytes_per_frame(model: Any, height: int, width: int) -> float:
    from dataclasses import replace

    import numpy as np

    from m2f_video import VideoProcessor, segment_video
    from m2f_video.benchmark import peak_bytes

    processor = VideoProcessor(replace(model.config.preprocessing, fixed_size=(height, width)), model.config.labels)
    peaks = []
    for count in LENGTHS:
        video = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
        peaks.append(peak_bytes(lambda video=video: segment_video(model, video, processor=processor)))
    return (peaks[1] - peaks[0]) / (LENGTHS[1] - LENGTHS[0]) / 1e6


def _distance(folder: Path, what: dict[str, Any]) -> str:
    """How far the others' outputs are from the old tree's; NaN where theirs have another shape or are none."""
    import torch

    outputs = {name: torch.load(folder / name, weights_only=True) for name in what}
    found = []
    for name, tensors in outputs.items():
        if name != "old":
            pairs = zip(tensors, outputs["old"], strict=True)
            found.append(f"{name} {max(_relative(a, b) for a, b in pairs):.1e}")
    return "relative distance of the outputs from the old tree's: " + ", ".join(found)


def _relative(ours: Any, theirs: Any) -> float:
    if ours.numel() != theirs.numel():  # a clip's tracks are not an image's
        return float("nan")
    difference = ours.double().flatten() - theirs.double().flatten()
    return float(difference.norm() / theirs.double().norm())


if __name__ == "__main__":
    sys.exit(main())

"""`m2f-video benchmark`."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from m2f_video.cli.console import print_table, progress_bars
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.hub import parse_device, parse_dtype
from m2f_video.modeling.video_mask2former import VideoMask2Former


def benchmark(
    checkpoint: str | None = None,
    preset: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    frames: int = 1,
    height: int = 480,
    width: int = 864,
    video_frames: int = 4,
    repeats: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    plain: bool = False,
    compile: Literal["auto", "kernels", "model", "none"] = "auto",
    json: Path | None = None,
) -> int:
    """Time the model on this machine, part by part and from a video file to tracks.

    The table gives the median of seconds per frame; GFLOP, of a frame's matrix products and convolutions, two a
    multiply-add; the share that GFLOP/s have of the ceiling, a large matrix product on this machine; and the most
    memory that tensors take beside weights and input. The deformable encoder is a part of the pixel decoder.

    Example: m2f-video benchmark --dtype bfloat16 --frames 4 --json speed.json

    Args:
        checkpoint: model to time, as for `segment`.
        preset: shape of a model with random weights to time instead, which are as fast as trained ones; by default
            swin_tiny_youtubevis_2019.
        dtype: floating-point type the model runs in.
        frames: of the clip that the parts get.
        height: of the model's input, in pixels; a multiple of 32.
        width: of the model's input, in pixels; a multiple of 32.
        video_frames: of the video that is segmented from its file.
        repeats: timed runs of each part; one before them warms up.
        threads: of PyTorch; by default as many as it chooses.
        device: such as cpu, cuda or cuda:1.
        plain: time the model as it is written, not as `prepare_for_inference` leaves it.
        compile: what `prepare_for_inference` compiles: our kernels in seconds, or the whole model in minutes;
            auto is kernels on a CPU where there is a C++ compiler, else none.
        json: write the numbers to this file.
    """
    from tempfile import TemporaryDirectory

    from m2f_video import benchmark as bench
    from m2f_video.evaluation.report import check_writable
    from m2f_video.parity import random_frames, random_model

    if checkpoint is not None and preset is not None:
        raise ValueError("give --checkpoint or --preset, not both")
    if compile != "auto" and plain:
        raise ValueError("--compile is a part of accelerating; leave out --plain")
    counts = {"frames": frames, "video_frames": video_frames, "repeats": repeats}
    bench.check_options(height, width, **counts, threads=1 if threads is None else threads)
    target, model_dtype = parse_device(device), parse_dtype(dtype)
    if json is not None:
        check_writable(json)
    if threads is not None:
        torch.set_num_threads(threads)
    preset = preset or "swin_tiny_youtubevis_2019"
    if checkpoint is not None:
        loaded = VideoMask2Former.from_pretrained(checkpoint, device=target)
    else:
        loaded = random_model(VideoMask2FormerConfig.preset(preset), 0).to(target)
    eager = bench.variant(loaded, model_dtype, prepare=False)
    model = eager if plain else bench.variant(loaded, model_dtype, prepare=True, compile=compile)

    pixels = random_frames(frames, height, width, seed=0).to(target, model_dtype)
    ceilings: dict[str, float] = {dtype: bench.matmul_ceiling(model_dtype, target)}
    measure = partial(bench.measure_part, repeats=repeats, ceilings=ceilings, device=target)
    name = "plain" if plain else f"prepared, compile {compile}"
    rows: list[bench.Row] = []

    def add(part: str, function: bench.Part | None, counted: bench.Part | None, length: int, missing: str) -> None:
        """Measure a part; or say why it is missing."""
        if function is not None:
            key: tuple[str, str] = (name, dtype)
            rows.extend(measure(part, {key: function}, {key: counted or function}, frames=length, progress=progress))
        else:
            row = bench.Row(
                part=part, implementation=name, dtype=dtype, device=str(target), frames=length, note=missing
            )
            rows.append(row)

    with TemporaryDirectory() as folder, progress_bars("round") as progress:
        parts = bench.stages(model, pixels, compiled=compile == "model")
        for part, counted in bench.stages(eager, pixels).items():
            add(part, parts.get(part), counted, frames, bench.COMPILED_AS_ONE)
        end_to_end = None
        if model.config.temporal == "joint":
            video = Path(folder) / "video.mp4"
            bench.write_video(video, video_frames, height, width)
            end_to_end = bench.end_to_end(model, video, height, width)
        add(bench.END_TO_END, end_to_end, None, video_frames, "an image model, which makes no tracks")

    what = checkpoint or f"{preset}, random weights"
    report = bench.Report(
        title=f"{what}, {height} x {width}", machine=bench.machine(target), ceilings=ceilings, rows=rows
    )
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    print(f"ceiling: {ceilings[dtype]:.0f} GFLOP/s in a large matrix product in {dtype}")
    for table in report.tables():
        print_table(table)
    if json is not None:
        report.write(json)
        print(f"written to {json}")
    return 0

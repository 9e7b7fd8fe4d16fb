"""Where a frame's time goes, by kind of operator, and how far the whole is from its matrix products alone.

    python benchmarks/operators.py [--dtype float32 --height 480 --width 864 --repeats 5]

PyTorch's profiler adds up what each operator takes by itself, of the model that `prepare_for_inference` leaves. The
floor is what the frame's matrix products and convolutions would take at the rate of one large product.
"""

import os
import statistics
import time
from collections import defaultdict
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from m2f_video.benchmark import check_options, count_flops, machine, matmul_ceiling, variant
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import random_frames, random_model

KINDS = {
    "linear layers": ("m2f_video::linear_layers", "mkldnn::_linear", "aten::addmm", "aten::mm", "aten::linear"),
    "convolutions": ("aten::mkldnn_convolution", "m2f_video::winograd"),
    "attention": ("aten::_scaled_dot_product", "m2f_video::window_attention", "m2f_video::masked_attention"),
    "deformable sampling": ("m2f_video::ms_deform_attn", "aten::_embedding_bag"),
    "norms": ("aten::native_layer_norm", "aten::native_group_norm", "m2f_video::layer_norm", "m2f_video::group_norm"),
    "resizing": ("aten::upsample",),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_"),
    "elementwise": ("aten::add", "aten::mul", "aten::sub", "aten::gelu", "aten::clamp", "aten::relu", "aten::where"),
}


def main(
    dtype: Literal["float32", "bfloat16"] = "float32",
    height: int = 480,
    width: int = 864,
    repeats: int = 5,
    threads: int = 2,
    preset: str = "swin_tiny_youtubevis_2019",
) -> None:
    """Print a table of milliseconds per kind of operator: medians over profiled frames, on a CPU.

    Args:
        dtype: the model runs in.
        height: of the frame, a multiple of 32.
        width: of the frame, a multiple of 32.
        repeats: profiled frames.
        threads: of PyTorch.
        preset: of the model; its weights are random.
    """
    check_options(height, width, repeats=repeats, threads=threads)
    torch.set_num_threads(threads)
    weights = random_model(VideoMask2FormerConfig.preset(preset), 0)
    kind = getattr(torch, dtype)
    eager, model = variant(weights, kind, prepare=False), variant(weights, kind, prepare=True)
    frame = random_frames(1, height, width, seed=0).to(kind)[None]
    with torch.inference_mode():
        spent, seconds = time_operators(model, frame, repeats)
        total, ceiling = sum(map(statistics.median, spent.values())), matmul_ceiling(kind)
        floor = count_flops(lambda: eager(frame)) / ceiling / 1e6

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    table = Table("operators", "ms", "share", title=f"{preset}, {dtype}, one frame of {height}x{width}, profiled")
    for name, values in sorted(spent.items(), key=lambda item: -statistics.median(item[1])):
        table.add_row(name, f"{statistics.median(values):.0f}", f"{statistics.median(values) / total:.0%}")
    table.add_section()
    table.add_row("all, profiled", f"{total:.0f}", "100%")
    table.add_row("all, not profiled", f"{1e3 * statistics.median(seconds):.0f}", "")
    table.add_row(f"floor: products at {ceiling:.0f} GFLOP/s", f"{floor:.0f}", "")
    Console().print(table)


def time_operators(
    model: VideoMask2Former, clip: torch.Tensor, repeats: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Milliseconds of each kind of operator in profiled calls, and seconds of as many calls without the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would log each start and stop
    spent: dict[str, list[float]] = defaultdict(list)
    seconds = []
    model(clip)
    for _ in range(repeats):
        start = time.perf_counter()
        model(clip)
        seconds.append(time.perf_counter() - start)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(clip)
        once = dict.fromkeys((*KINDS, "all else"), 0.0)
        for event in profiler.key_averages():
            once[kind_of(event.key)] += event.self_cpu_time_total / 1e3
        for name, milliseconds in once.items():
            spent[name].append(milliseconds)
    return spent, seconds


def kind_of(operator: str) -> str:
    """Kind of an operator, by the beginning of its name."""
    return next((kind for kind, names in KINDS.items() if operator.startswith(names)), "all else")


if __name__ == "__main__":
    tyro.cli(main)

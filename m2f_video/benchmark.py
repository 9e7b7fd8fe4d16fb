"""How fast a model runs on this machine, part by part, and how far that is from what the machine can do.

T frames, H W height and width of the model's input in pixels.
"""

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from m2f_video.data.synthetic import SyntheticVideos
from m2f_video.files import atomic_path
from m2f_video.inference.on_video import Progress
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import segment_video
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.video import VideoWriter

if TYPE_CHECKING:
    from rich.table import Table

Part = Callable[[], object]
Compile = Literal["auto", "kernels", "model", "none"]

BACKBONE, PIXEL_DECODER, DEFORMABLE_ENCODER = "backbone", "pixel decoder", "deformable encoder"
TRANSFORMER_DECODER, WHOLE_MODEL, END_TO_END = "transformer decoder", "whole model", "end to end"
PARTS = (BACKBONE, PIXEL_DECODER, DEFORMABLE_ENCODER, TRANSFORMER_DECODER, WHOLE_MODEL, END_TO_END)
STRIDE = 32  # height and width must be multiples of it, so that stages and end to end see the same size
NOT_MEASURED = "not measured"
COMPILED_AS_ONE = "compiled as one with the pixel decoder"
"""Why the deformable encoder is missing of a compiled model."""


def measure(
    functions: Mapping[str, Part],
    repeats: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Seconds of each call of each function, after one that warms up and does not count.

    The functions take turns (A, B, A, B, ...), so that a drift of the machine meets all alike.

    Args:
        functions: by name.
        repeats: calls of each that are timed.
        device: where they run; a CUDA device is waited for before and after each call.
        progress: called after each round with how many are done, and of how many.
    """
    on_cuda = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            if on_cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            function()
            if on_cuda:
                torch.cuda.synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
        if progress is not None:
            progress(repeat + 1, repeats + 1)
    return {name: tuple(values) for name, values in seconds.items()}


def count_flops(function: Part) -> int:
    """Floating-point operations of the matrix products and convolutions in a call; a multiply-add is two.

    Not counted are elementwise operations and the sampling of deformable attention, nor anything inside a compiled
    function: count its eager form. Parameters must not require gradients.
    """
    unknown: dict[Any, Callable[..., int]] = {torch.ops.torchvision.deform_conv2d: _deform_conv_flops}  # to the counter
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        unknown[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    counter = FlopCounterMode(display=False, custom_mapping=unknown)
    with sdpa_kernel(SDPBackend.MATH), counter:  # plain products, because attention's fused CPU kernel is unknown too
        function()
    return counter.get_total_flops()


def _linear_flops(input_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(input_shape) * weight_shape[0]


def _deform_conv_flops(_: Sequence[int], weight_shape: Sequence[int], *__: object, out_shape: Sequence[int]) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def peak_bytes(function: Part, device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors on the device at any time while the function runs, beyond those before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would log each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes), default=0)


@torch.inference_mode()
def matmul_ceiling(dtype: torch.dtype, device: torch.device | str = "cpu", size: int | None = None) -> float:
    """GFLOP/s of a large matrix product, which no part of a model can beat by much.

    It is the best of a few calls of `F.linear` and, on a CPU, of a 1x1 convolution in channels-last layout: they run in
    different libraries, and in float32 it depends on the make of the processor which one is faster.

    Args:
        dtype: of the matrices.
        device: where they are.
        size: side of the square matrices; None is 2048 on a CPU and 8192 elsewhere.
    """
    on_cpu = torch.device(device).type == "cpu"
    size = size or (2048 if on_cpu else 8192)
    x, weight = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    functions: dict[str, Part] = {"linear": lambda: F.linear(x, weight)}
    if on_cpu:
        pixels = x[None, None].permute(0, 3, 1, 2)  # (1, C, 1, size), channels innermost
        kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
        functions["convolution"] = lambda: F.conv2d(pixels, kernel)
    return 2e-9 * size**3 / min(min(seconds) for seconds in measure(functions, 4, device).values())


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a measurement runs on: processor, PyTorch's threads and version and, for a CUDA device, the GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
    found = {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {})


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one part of one implementation.

    Attributes:
        part: name of it.
        implementation: name of it.
        dtype: such as `float32`.
        device: such as `cpu`.
        frames: T that run together.
        seconds: per frame, of each repeat; empty where the part was not measured.
        gflop: of a frame (`count_flops`); None where they are not counted.
        ceiling: GFLOP/s of a large matrix product in this dtype.
        peak_mb: memory for all frames together (`peak_bytes`); None where it was not measured.
        note: why the part was not measured.
    """

    part: str
    implementation: str
    dtype: str
    device: str
    frames: int
    seconds: tuple[float, ...] = ()
    gflop: float | None = None
    ceiling: float | None = None
    peak_mb: float | None = None
    note: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the seconds, which there must be."""
        first, median, third = np.percentile(self.seconds, (25, 50, 75)).tolist()
        return first, median, third

    @property
    def rate(self) -> float | None:
        """GFLOP/s, by the median."""
        return None if self.gflop is None else self.gflop / self.quartiles[1]

    @property
    def share(self) -> float | None:
        """The rate as a fraction of the ceiling."""
        return None if self.rate is None or self.ceiling is None else self.rate / self.ceiling

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        row = {name: getattr(self, name) for name in ("part", "implementation", "dtype", "device", "frames")}
        if not self.seconds:
            return row | {"seconds_per_frame": NOT_MEASURED, "note": self.note}
        seconds = dict(zip(("first_quartile", "median", "third_quartile"), self.quartiles, strict=True))
        row["seconds_per_frame"] = seconds | {"all": list(self.seconds)}
        row |= {"gflop_per_frame": self.gflop, "gflop_per_s": self.rate, "share_of_ceiling": self.share}
        return row | {"peak_mb": self.peak_mb}


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished benchmark.

    Attributes:
        title: what ran.
        machine: where (`machine`).
        ceilings: GFLOP/s of a large matrix product (`matmul_ceiling`) by dtype.
        rows: what was measured.
    """

    title: str
    machine: Mapping[str, Any]
    ceilings: Mapping[str, float]
    rows: Sequence[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        head = {"title": self.title, "machine": self.machine, "ceiling_gflop_per_s": self.ceilings}
        return head | {"rows": [row.to_dict() for row in self.rows]}

    def write(self, path: str | os.PathLike[str], **more: object) -> None:
        """Write it as JSON, with more fields after its own."""
        with atomic_path(path) as file:
            file.write_text(json.dumps(self.to_dict() | more, indent=2) + "\n")

    def columns(self, row: Row) -> dict[str, str]:
        """Headings and cells of a row that was measured, but for what was measured and the seconds."""
        numbers = {"GFLOP": (row.gflop, ".1f"), "GFLOP/s": (row.rate, ".1f"), "ceiling": (row.share, ".0%")}
        numbers["peak MB"] = (row.peak_mb, ".0f")
        return {name: "" if number is None else format(number, spec) for name, (number, spec) in numbers.items()}

    def tables(self) -> "list[Table]":
        """One for each dtype."""
        return [self._table(dtype) for dtype in dict.fromkeys(row.dtype for row in self.rows)]

    def _table(self, dtype: str) -> "Table":
        from rich.table import Table

        rows = [row for row in self.rows if row.dtype == dtype]
        columns = {id(row): self.columns(row) for row in rows if row.seconds}
        headings = dict.fromkeys(name for cells in columns.values() for name in cells)
        table = Table("part", "frames", "model", "s/frame", "quartiles", *headings, title=f"{self.title}, {dtype}")
        are_compared = len({row.implementation for row in rows}) > 1
        for previous, row in zip([None, *rows], rows, strict=False):
            if are_compared and (previous is None or row.part != previous.part):
                table.add_section()
            names = (row.part, str(row.frames), row.implementation)
            if not row.seconds:
                table.add_row(*names, NOT_MEASURED, row.note)
                continue
            first, median, third = row.quartiles
            table.add_row(*names, f"{median:.3g}", f"{first:.3g} to {third:.3g}", *columns[id(row)].values())
        return table


@torch.inference_mode()
def measure_part(
    part: str,
    functions: Mapping[tuple[str, str], Part],
    counted: Mapping[tuple[str, str], Part],
    *,
    frames: int,
    repeats: int,
    ceilings: Mapping[str, float],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Time a part; several implementations of it take turns.

    FLOPs are counted of all but `end to end`; memory is measured of the whole model and of that.

    Args:
        part: one of `PARTS`.
        functions: that do the same, by names of implementation and dtype.
        counted: the same functions in eager form, to count FLOPs of.
        frames: T that a function takes at a call.
        repeats: timed calls of each.
        ceilings: as in `Report`.
        device: where they run.
        progress: called with the part, rounds done, and of how many.
    """
    keys = {" ".join(key): key for key in functions}
    report = None if progress is None else partial(progress, f"{part}, {frames} frame(s)")
    seconds = measure({name: functions[key] for name, key in keys.items()}, repeats, device, report)
    flops = {} if part == END_TO_END else {f: count_flops(f) for f in {counted[key] for key in functions}}
    has_peak = part in (WHOLE_MODEL, END_TO_END)
    return [
        Row(
            part=part,
            implementation=key[0],
            dtype=key[1],
            device=str(device),
            frames=frames,
            seconds=tuple(value / frames for value in seconds[name]),
            gflop=flops[counted[key]] / frames / 1e9 if flops else None,
            ceiling=ceilings[key[1]],
            peak_mb=peak_bytes(functions[key], device) / 1e6 if has_peak else None,
        )
        for name, key in keys.items()
    ]


def variant(model: VideoMask2Former, dtype: torch.dtype, prepare: bool, compile: Compile = "auto") -> VideoMask2Former:
    """A copy of a model to time: eager, or by `prepare_for_inference`, to which `compile` goes."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    return model.prepare_for_inference(dtype=dtype, compile=compile) if prepare else model.to(dtype)


@torch.inference_mode()
def stages(model: VideoMask2Former, pixels: Tensor, compiled: bool = False) -> dict[str, Part]:
    """All `PARTS` but the last, each with the input that it has within the model, of all frames at once.

    On a CPU the whole model encodes frame by frame, which is faster: of several frames, the parts take longer together.

    Args:
        model: in evaluation mode.
        pixels: one clip (T, 3, H, W), on the model's device and in its dtype.
        compiled: leave out the deformable encoder, which a compiled pixel decoder does not run as a part.
    """
    maps = model.backbone(pixels)
    features = model.encode_frames(pixels)
    parts: dict[str, Part] = {
        BACKBONE: lambda: model.backbone(pixels),
        PIXEL_DECODER: lambda: model.pixel_decoder(maps),
    }
    layers = [module for module in model.pixel_decoder.modules() if isinstance(module, DeformableEncoderLayer)]
    if layers and not compiled:
        (tokens, *others), options = inputs_of(layers[0], parts[PIXEL_DECODER])

        def deformable_encoder() -> Tensor:
            x = tokens
            for layer in layers:
                x = layer(x, *others, **options)
            return x

        parts[DEFORMABLE_ENCODER] = deformable_encoder
    return parts | {
        TRANSFORMER_DECODER: lambda: model.decode_clip(features, len(pixels)),
        WHOLE_MODEL: lambda: model(pixels[None]),
    }


def inputs_of(module: nn.Module, function: Part) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments that a module gets at its last call while the function runs."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with module.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True):
        function()
    return inputs[-1]


def end_to_end(model: VideoMask2Former, video: Path, height: int, width: int) -> Part:
    """From a video file to tracks, by a model that sees frames of this size."""
    preprocessing = replace(model.config.preprocessing, fixed_size=(height, width))
    processor = VideoProcessor(preprocessing, model.config.labels)
    return lambda: segment_video(model, video, processor=processor, mode="whole")


def write_video(path: Path, frames: int, height: int, width: int) -> None:
    """Write a video of the synthetic benchmark, scaled up, as a file to segment."""
    video = SyntheticVideos(1, num_frames=frames, height=height, width=width)[0]
    with VideoWriter(path, 8, width, height) as writer:
        for frame in video.clip(range(frames)).frames:
            writer.write(frame.permute(1, 2, 0).numpy())


def check_options(height: int, width: int, **counts: int) -> None:
    """Check the numbers that a benchmark is given.

    Raises:
        ValueError: a count below 1, or a side of frames that is no multiple of 32; the message names it.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {count}")
    if min(height, width) < STRIDE or height % STRIDE or width % STRIDE:
        raise ValueError(f"--height and --width must be multiples of {STRIDE}, got {height} and {width}")

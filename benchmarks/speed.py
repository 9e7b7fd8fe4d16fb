"""Time our model beside transformers' and timm's, with the same weights and input, taking turns in one process.

    python benchmarks/speed.py [--dtypes float32 bfloat16 --frames 1 4 --repeats 3 --json-file FILE --plot FILE.png]

Every part is given the input that it has within the model, of all frames at once; our whole model goes frame by frame
on a CPU. "End to end" goes from a video file to masks: ours by
`segment_video`; transformers', which knows no video, frame by frame from our reader through its image processor, model
and instance post-processing, whose threshold few of its untrained predictions pass, which spares it work. timm's Swin
has our weights, but not the four norms of its maps, and pads after the shift of windows and not before it.
"""

import copy
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from comparison import Comparison, Implementation, measure_parts
from plot import draw
from torch import Tensor, nn

from m2f_video import benchmark as bench
from m2f_video.benchmark import Part, Row
from m2f_video.cli.console import print_table, progress_bars
from m2f_video.config import SwinConfig, VideoMask2FormerConfig
from m2f_video.evaluation.report import check_writable
from m2f_video.hub import parse_device
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import random_frames, random_model, transformers_model
from m2f_video.video.reader import open_video

EAGER, PREPARED, COMPILED = "ours eager", "ours prepared", "ours compiled"
THEIRS, THEIRS_COMPILED = "transformers", "transformers compiled"
AS_ONE = {bench.DEFORMABLE_ENCODER: bench.COMPILED_AS_ONE}


def main(
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    frames: tuple[int, ...] = (1, 4),
    height: int = 480,
    width: int = 864,
    video_frames: int = 2,
    repeats: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    preset: str = "swin_tiny_youtubevis_2019",
    compiled: bool = False,
    json_file: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Print a table of seconds per frame; the columns "/ ours" are how many times longer than ours a row takes.

    Args:
        dtypes: that the models run in.
        frames: lengths of the clips that the parts get.
        height: of the input, a multiple of 32.
        width: of the input, a multiple of 32.
        video_frames: of the video that is segmented from its file.
        repeats: timed runs of each part; one before them warms up.
        threads: of PyTorch; by default as many as it chooses.
        device: such as cpu or cuda.
        preset: of the model; its weights are random.
        compiled: time both models compiled too, ours by `prepare_for_inference`; compiling takes minutes.
        json_file: write all numbers to this file.
        plot: draw the medians into this file, such as speed.png; needs the extra m2f-video[bench].
    """
    counts = {"frames": min(frames, default=0), "video_frames": video_frames, "repeats": repeats}
    bench.check_options(height, width, **counts, dtypes=len(dtypes), threads=1 if threads is None else threads)
    target = parse_device(device)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:  # said before the work
        raise ImportError("--plot needs matplotlib: pip install 'm2f-video[bench]'")
    for file in (json_file, plot):
        if file is not None:
            check_writable(file)
    if threads is not None:
        torch.set_num_threads(threads)

    model = random_model(VideoMask2FormerConfig.preset(preset), 0).to(target)
    ceilings = {dtype: bench.matmul_ceiling(getattr(torch, dtype), target) for dtype in dtypes}
    models = {dtype: Models(model, getattr(torch, dtype), (height, width), compiled) for dtype in dtypes}
    rows: list[Row] = []
    with TemporaryDirectory() as folder, progress_bars("round") as progress:
        options: dict[str, Any] = {"repeats": repeats, "ceilings": ceilings, "device": target, "progress": progress}
        for count in frames:
            pixels = random_frames(count, height, width, seed=0).to(target)
            implementations = [each for dtype in dtypes for each in models[dtype].stages(pixels)]
            rows += measure_parts(implementations, frames=count, **options)
        video = Path(folder) / "video.mp4"
        bench.write_video(video, video_frames, height, width)
        implementations = [each for dtype in dtypes for each in models[dtype].end_to_end(video)]
        rows += measure_parts(implementations, frames=video_frames, **options)
    if target.type == "cpu":
        nothing = Row(part=bench.WHOLE_MODEL, implementation="all on a GPU", dtype="", device="cuda", frames=frames[0])
        rows += [replace(nothing, dtype=dtype, note="without --device cuda") for dtype in dtypes]

    report = Comparison(
        title=f"{preset}, random weights, {height} x {width}, {device}",
        machine=bench.machine(target),
        ceilings=ceilings,
        rows=rows,
        baselines=(EAGER, PREPARED, COMPILED) if compiled else (EAGER, PREPARED),
    )
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    print("ceilings: " + ", ".join(f"{value:.0f} GFLOP/s in {dtype}" for dtype, value in ceilings.items()))
    for table in report.tables():
        print_table(table)
    if json_file is not None:
        report.write(json_file, command=" ".join(("python", *sys.argv)))
    if plot is not None:
        draw(report, plot)


class Models:
    """All implementations in one dtype, with the same weights.

    Args:
        model: ours.
        dtype: of all.
        size: height and width of the input.
        compiled: with compiled ones.
    """

    def __init__(self, model: VideoMask2Former, dtype: torch.dtype, size: tuple[int, int], compiled: bool) -> None:
        self.dtype, self.size = dtype, size
        self.ours = {EAGER: bench.variant(model, dtype, prepare=False), PREPARED: bench.variant(model, dtype, True)}
        self.theirs = {THEIRS: transformers_model(self.ours[EAGER]).to(model.device).requires_grad_(False)}
        self.failures: dict[str, str] = {}
        if compiled:
            self._add_compiled(model)
        is_swin = isinstance(model.config.backbone, SwinConfig)
        self.timm = timm_backbone(model, size).to(model.device, dtype) if is_swin else None

    def _add_compiled(self, model: VideoMask2Former) -> None:
        headers = Path(sysconfig.get_path("include"), "Python.h")
        if model.device.type == "cpu" and not (shutil.which(os.environ.get("CXX") or "g++") and headers.exists()):
            self.failures = dict.fromkeys((COMPILED, THEIRS_COMPILED), "needs a C++ compiler and Python's headers")
            return
        frame = torch.zeros(1, 3, *self.size, device=model.device, dtype=self.dtype)
        ours, theirs = bench.variant(model, self.dtype, True, compile="model"), copy.deepcopy(self.theirs[THEIRS])
        backbone, pixel_decoder, _, transformer_decoder = stage_modules(theirs)
        for module in (backbone, pixel_decoder, transformer_decoder):
            module.compile()
        with torch.inference_mode():  # as in what is timed, for which it would be compiled again otherwise
            ours(pixel_values=frame[None])
            theirs(pixel_values=frame)
        self.ours[COMPILED], self.theirs[THEIRS_COMPILED] = ours, theirs

    @torch.inference_mode()
    def stages(self, pixels: Tensor) -> list[Implementation]:
        """What to time of a clip (T, 3, H, W)."""
        pixels = pixels.to(self.dtype)
        found = []
        eager = bench.stages(self.ours[EAGER], pixels)
        for name, model in self.ours.items():
            missing = AS_ONE if name == COMPILED else {}
            found.append(self._named(name, bench.stages(model, pixels, name == COMPILED), eager, missing))
        theirs = transformers_stages(list(self.theirs.values()), pixels)
        for name, parts in zip(self.theirs, theirs, strict=True):
            missing = AS_ONE if name == THEIRS_COMPILED else {}
            parts = {part: function for part, function in parts.items() if part not in missing}
            found.append(self._named(name, parts, theirs[0], missing))
        for name, reason in self.failures.items():
            found.append(self._named(name, {}, missing=dict.fromkeys(eager, reason)))
        parts = {} if self.timm is None else {bench.BACKBONE: lambda: self.timm(pixels)}
        found.append(self._named("timm", parts, missing={} if parts else {bench.BACKBONE: "the backbone is no Swin"}))
        return found

    def end_to_end(self, video: Path) -> list[Implementation]:
        """What to time of a video file."""
        parts = {name: bench.end_to_end(model, video, *self.size) for name, model in self.ours.items()}
        parts |= {name: transformers_end_to_end(model, video, *self.size) for name, model in self.theirs.items()}
        found = [self._named(name, {bench.END_TO_END: part}) for name, part in parts.items()]
        failures = [self._named(name, {}, missing={bench.END_TO_END: why}) for name, why in self.failures.items()]
        return found + failures

    def _named(
        self,
        name: str,
        parts: Mapping[str, Part],
        counted: Mapping[str, Part] = {},
        missing: Mapping[str, str] = {},
    ) -> Implementation:
        return Implementation(name=name, dtype=self.dtype, parts=parts, counted=counted, missing=missing)


def stage_modules(model: Any) -> tuple[nn.Module, ...]:
    """Backbone, pixel decoder, the deformable encoder in it, and transformer decoder of transformers' model."""
    level = model.model.pixel_level_module
    return level.encoder, level.decoder, level.decoder.encoder, model.model.transformer_module


def transformers_stages(models: Sequence[Any], pixels: Tensor) -> list[dict[str, Part]]:
    """The parts of each of transformers' models, with the inputs that they have within the first."""
    run = partial(models[0], pixel_values=pixels)
    inputs = [bench.inputs_of(module, run) for module in stage_modules(models[0])]

    def stages(model: Any) -> dict[str, Part]:
        calls = zip(bench.PARTS, stage_modules(model), inputs, strict=False)
        parts: dict[str, Part] = {name: partial(module, *args, **kwargs) for name, module, (args, kwargs) in calls}
        return parts | {bench.WHOLE_MODEL: partial(model, pixel_values=pixels)}

    return [stages(model) for model in models]


def transformers_end_to_end(model: Any, video: Path, height: int, width: int) -> Part:
    """From a video file to one map of instances a frame."""
    from transformers import Mask2FormerImageProcessor

    processor = Mask2FormerImageProcessor(size={"height": height, "width": width})

    @torch.inference_mode()
    def run() -> list[Any]:
        results = []
        for frame in open_video(video):
            pixels = processor(images=frame, return_tensors="pt")["pixel_values"]
            output = model(pixel_values=pixels.to(model.device, model.dtype))
            results += processor.post_process_instance_segmentation(output, target_sizes=[frame.shape[:2]])
        return results

    return run


def timm_backbone(model: VideoMask2Former, size: tuple[int, int]) -> nn.Module:
    """Swin of timm, with the weights of our backbone."""
    import timm

    swin = model.config.backbone
    names = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")
    options = {name: getattr(swin, name) for name in names}
    backbone = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=size, always_partition=True, **options
    )
    weights = {}
    for name, tensor in model.backbone.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "stages":
            index, _, rest = rest.partition(".")
            # merging comes last in our stages and first in timm's
            part = f"layers_{int(index) + rest.startswith('downsample')}"
        if part != "out_norms":
            weights[f"{part}.{rest}"] = tensor
    backbone.load_state_dict(weights)
    return backbone.eval().requires_grad_(False)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"speed.py: error: {error}")

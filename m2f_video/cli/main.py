"""The `m2f-video` command: it parses, calls the library and prints.

Exit codes: 0 done; 1 a check failed; 2 bad input, with one line that says what is wrong; 130 interrupted; 141 nobody
reads the output any more.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import torch
import tyro
from rich.table import Table
from tyro.conf import subcommand

from m2f_video.acceleration.cpu_kernels import KernelError
from m2f_video.cli.console import one_line, print_table, progress_bars
from m2f_video.cli.data import DATA_COMMANDS
from m2f_video.cli.evaluate import eval_results
from m2f_video.cli.train import train_command
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.files import check_replaceable, made_directory, naming
from m2f_video.hub import load_config, parse_device, parse_dtype, resolve_config
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.results.tracks import OVERLAY_FILE, TRACKS_FILE, VideoSegmentation

if TYPE_CHECKING:
    from m2f_video.inference.processor import VideoProcessor
    from m2f_video.video.reader import VideoReader

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
DtypeName = Literal["float32", "float64", "bfloat16", "float16"]

PREPARE_PIXELS = 25 * 480 * 864
"""Of a video's frames as the model sees them, from which on preparing pays: compiling takes 8 s at most, where the
kernels are not on disk yet, and a frame of 480x864 gets cheaper by about 0.4 s."""


def segment(
    source: Source,
    /,
    checkpoint: str,
    output: Path,
    config: str | None = None,
    temporal: Literal["joint"] | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: DtypeName = "float32",
    frames: str | None = None,
    top_k: int = 10,
    score_threshold: float = 0.0,
    shortest_edge: int | None = None,
    frames_per_chunk: int | None = None,
    prepare: Literal["auto", "always", "never"] = "auto",
    strict: bool = False,
    overlay: bool = True,
) -> int:
    """Segment and track the objects of a video; write tracks.json and overlay.mp4.

    Example: m2f-video segment cars.mp4 --checkpoint facebook/video-mask2former-swin-tiny-youtubevis-2019-instance
    --output out --score-threshold 0.3

    Args:
        source: video file, or a folder of frames (jpg, png, tif, ...), one picture each.
        checkpoint: hub name, folder (config.json and weights; this project's or transformers' format) or weight file.
        output: folder to write to; made where missing.
        config: for a weight file without a config.json beside it: a preset such as swin_tiny_youtubevis_2019, or a
            config.json.
        temporal: read an image checkpoint, whose frames are decoded alone, as a video model (joint). Its identities
            then hold across frames, though it was not trained for that.
        revision: branch, tag or commit of a checkpoint on the hub.
        device: such as cpu, cuda or cuda:1; by default cuda where there is one, else cpu.
        dtype: floating-point type the model runs in.
        frames: which frames, START:STOP or START:STOP:STEP, counted from 0, such as 10:50:2.
        top_k: how many (query, class) pairs become tracks; the published evaluation takes 10.
        score_threshold: leave out tracks that score less. 0 keeps all top-k, as the published evaluation does; 0.3
            suits most videos.
        shortest_edge: resize frames to this shorter side, in pixels, instead of the checkpoint's.
        frames_per_chunk: frames encoded at a time; by default 1 on a CPU and 8 elsewhere.
        prepare: pack the weights and compile kernels first, which costs seconds once and makes each frame cheaper; auto
            does so on a CPU for videos long enough to win the time back, and says so.
        strict: fail on a video that is damaged or changes its size, instead of segmenting what comes before.
        overlay: write overlay.mp4.
    """
    from m2f_video.inference.processor import VideoProcessor
    from m2f_video.inference.whole import segment_video
    from m2f_video.video.reader import open_video, parse_frames
    from m2f_video.video.writer import MAX_SIDE

    reader = open_video(source, None if frames is None else parse_frames(frames), strict=strict)
    _check_output(output, TRACKS_FILE, *([OVERLAY_FILE] if overlay else []))
    if overlay and max(reader.width, reader.height) > MAX_SIDE:
        raise ValueError(
            f"{source} is {reader.width}x{reader.height}, and an overlay has at most {MAX_SIDE} pixels on a side; give "
            "--no-overlay"
        )
    if Path(source).resolve() == (output / OVERLAY_FILE).resolve():
        raise ValueError(f"{source} is what --output would overwrite; give --output another folder")
    if load_config(checkpoint, config=config, temporal=temporal, revision=revision).temporal != "joint":
        raise ValueError(f"{checkpoint} is an image model; --temporal joint reads it as a video model")
    model = VideoMask2Former.from_pretrained(
        checkpoint,
        config=config,
        temporal=temporal,
        revision=revision,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=dtype,
    )
    preprocessing = model.config.preprocessing
    if shortest_edge is not None:
        longest_edge = max(preprocessing.longest_edge, shortest_edge)
        preprocessing = replace(preprocessing, shortest_edge=shortest_edge, longest_edge=longest_edge, fixed_size=None)
    processor = VideoProcessor(preprocessing, model.config.labels)
    if prepare == "always" or (prepare == "auto" and _pays_to_prepare(model, reader, processor)):
        model.prepare_for_inference()
        print(f"prepared the model for inference on {reader.num_frames_hint or 'an unknown number of'} frames")
    with progress_bars(unit="frame") as update:
        segmentation = segment_video(
            model,
            reader,
            processor=processor,
            top_k=top_k,
            score_threshold=score_threshold,
            frames_per_chunk=frames_per_chunk,
            progress=update,
        )
        segmentation.save(output, overlay, progress=lambda done, total: update("overlay", done, total))
    _print_tracks(segmentation)
    print(one_line(f"written to {output}: {TRACKS_FILE}{f', {OVERLAY_FILE}' if overlay else ''}"))
    return 0


def _pays_to_prepare(model: VideoMask2Former, reader: "VideoReader", processor: "VideoProcessor") -> bool:
    """Whether a video is long and large enough to win back on a CPU what preparing costs."""
    height, width = processor.padded_size(reader.height, reader.width)
    return model.device.type == "cpu" and (reader.num_frames_hint or 0) * height * width >= PREPARE_PIXELS


def demo(
    output: Path = Path("demo_output"),
    checkpoint: str = "demo",
    difficulty: Literal["easy", "medium", "hard"] = "medium",
    seed: int = 2001,
    score_threshold: float = 0.8,
) -> int:
    """Render a video of the synthetic benchmark, segment the file, and measure the result by the known truth.

    Writes OUTPUT/video.mp4, OUTPUT/tracks.json and OUTPUT/overlay.mp4. The model is a small one inside the package,
    trained on videos of seed 0. What it reaches on 100 videos: m2f-video eval --data synthetic --checkpoint demo

    Args:
        output: folder to write to; made where missing.
        checkpoint: model for the classes of the benchmark: demo, or what m2f-video train has written.
        difficulty: how hard to segment and follow the objects are.
        seed: of the video; by default one with five objects, three of them crosses.
        score_threshold: the table and the overlay leave out tracks that score less; tracks.json and AP take all.
    """
    from m2f_video.data import SyntheticVideos
    from m2f_video.evaluation import average_precision, load_results, pair_tracks, prepare_ground_truth
    from m2f_video.inference.whole import segment_video
    from m2f_video.video import VideoWriter

    file = output / "video.mp4"
    _check_output(output, file.name, TRACKS_FILE, OVERLAY_FILE)
    videos = SyntheticVideos(1, seed, difficulty)
    video = videos[0]
    if (labels := load_config(checkpoint).labels) != videos.labels:
        raise ValueError(f"{checkpoint} knows {labels[0]}, ... and not the shapes of the benchmark")
    model = VideoMask2Former.from_pretrained(checkpoint)
    with made_directory(output), progress_bars(unit="frame") as update:
        with VideoWriter(file, 8, video.width, video.height) as writer:
            for frame in video.clip(range(video.num_frames)).frames:
                writer.write(frame.permute(1, 2, 0).numpy())
        segmentation = segment_video(model, file, progress=update)
        segmentation.save(
            output, min_score=score_threshold, progress=lambda done, total: update("overlay", done, total)
        )
    truth = prepare_ground_truth(videos)
    _print_tracks(segmentation, score_threshold)
    if truth is not None:
        rows = load_results(segmentation.to_dict()["results"], truth)
        stats = average_precision(truth, pair_tracks(truth, rows)).stats
        print(
            f"against the truth of this {difficulty} video of seed {seed} ({len(truth.tracks)} objects): "
            f"AP {100 * stats['AP']:.1f}, AP50 {100 * stats['AP50']:.1f}"
        )
    print(one_line(f"written to {output}: {file.name}, {TRACKS_FILE}, {OVERLAY_FILE}"))
    return 0


def parity(
    reference: Literal["hf"] = "hf",
    checkpoint: str | None = None,
    random: int | None = None,
    config: str | None = None,
    dtype: Literal["float32", "float64", "bfloat16"] = "float32",
    prepare: bool = False,
    frames: int = 1,
    height: int = 480,
    width: int = 864,
) -> int:
    """Compare every stage of the model with the reference implementation; exit with 1 where it is over tolerance.

    The yardstick is the reference in float64. The last column is the reference's own error in the chosen dtype.

    Example: m2f-video parity --random 0 --dtype float64

    Args:
        reference: hf is transformers' Mask2Former, which needs the extra m2f-video[parity].
        checkpoint: weights to compare with, as for `segment`.
        random: seed of random weights to compare with instead; 0 where no checkpoint is given.
        config: what to build for random weights or a bare weight file: a preset or a config.json; by default
            swin_tiny_youtubevis_2019.
        dtype: both implementations run in it. In bfloat16 the differences are reported and not judged.
        prepare: compare what `prepare_for_inference` makes of the model: packed weights and compiled kernels.
        frames: number of random frames, each compared alone.
        height: of the frames, in pixels.
        width: of the frames, in pixels.
    """
    from m2f_video.parity import TOLERANCES, compare_with_transformers, random_frames, random_model, within_tolerance

    if checkpoint is not None and random is not None:
        raise ValueError("give --checkpoint or --random, not both")
    if min(frames, height, width) < 1:
        raise ValueError(f"frames, height and width must be positive, got {frames}, {height} and {width}")
    model_dtype = parse_dtype(dtype)
    if checkpoint is not None:
        model = VideoMask2Former.from_pretrained(checkpoint, config=config, dtype=dtype)
        what = checkpoint
    else:
        preset = config or "swin_tiny_youtubevis_2019"
        model = random_model(resolve_config(preset), random or 0)
        what = f"{preset}, random weights of seed {random or 0}"
    pixels = random_frames(frames, height, width, seed=random or 0)
    ours, own = compare_with_transformers(model, pixels, model_dtype, prepare)

    how = f"{dtype}, prepared" if prepare else dtype
    print(f"{what}; {frames} x {height} x {width}, {how}, against {reference} in float64")
    table = Table("stage", "max abs", "relative", "1 - cosine", "mask bits", f"{reference}'s own")
    for mine, theirs in zip(ours, own, strict=True):
        if mine.flips is None:
            numbers = (f"{mine.max_abs:.1e}", f"{mine.relative:.1e}", f"{max(1 - mine.cosine, 0):.0e}", "")
            table.add_row(mine.stage, *numbers, f"{theirs.relative:.1e}")
        else:
            flips = f"{mine.flips[0]} of {mine.flips[1]} flipped"
            table.add_row(mine.stage, "", "", "", flips, str(theirs.flips[0] if theirs.flips else ""))
    print_table(table)
    worst = max(ours, key=lambda comparison: comparison.relative)
    passed = within_tolerance(ours, model_dtype)
    if (tolerance := TOLERANCES.get(model_dtype)) is None:
        verdict = f"there is no tolerance in {dtype}; compare it with {reference}'s own"
    else:
        verdict = f"{'within' if passed else 'OVER'} the tolerance of {tolerance:.0e}"
    print(f"largest relative error {worst.relative:.1e} ({worst.stage}): {verdict}")
    return 0 if passed else 1


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
    prepare: bool = True,
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
        prepare: time the model as `prepare_for_inference` leaves it.
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
    if compile != "auto" and not prepare:
        raise ValueError("--compile is a part of preparing; leave out --no-prepare")
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
    model = bench.variant(loaded, model_dtype, prepare=True, compile=compile) if prepare else eager

    pixels = random_frames(frames, height, width, seed=0).to(target, model_dtype)
    ceilings: dict[str, float] = {dtype: bench.matmul_ceiling(model_dtype, target)}
    measure = partial(bench.measure_parts, repeats=repeats, ceilings=ceilings, device=target)
    with TemporaryDirectory() as folder, progress_bars("round") as progress:
        compiled = compile == "model"
        ours = bench.Implementation(
            name=f"prepared, compile {compile}" if prepare else "eager",
            dtype=model_dtype,
            parts=bench.stages(model, pixels, compiled),
            counted=bench.stages(eager, pixels),
            missing=bench.COMPILED_AS_ONE if compiled else {},
        )
        rows = measure([ours], frames=frames, progress=progress)
        if model.config.temporal == "joint":
            video = Path(folder) / "video.mp4"
            bench.write_video(video, video_frames, height, width)
            ours = replace(ours, parts={bench.END_TO_END: bench.end_to_end(model, video, height, width)}, missing={})
        else:
            ours = replace(ours, parts={}, missing={bench.END_TO_END: "an image model, which makes no tracks"})
        rows += measure([ours], frames=video_frames, progress=progress)

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


def info() -> int:
    """Show versions and devices, which implementation of deformable attention runs on them, and what is compiled."""
    from importlib.metadata import version

    from m2f_video.acceleration import cpu_kernels
    from m2f_video.ops import BACKEND_VARIABLE, available_backends, resolve_backend

    for package in ("m2f-video", "torch", "torchvision", "timm", "av"):
        print(f"{package} {version(package)}")
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices[1:]:
        properties = torch.cuda.get_device_properties(device)
        print(f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")

    choice = os.environ.get(BACKEND_VARIABLE)
    table = Table("deformable attention", *devices, title=f"{BACKEND_VARIABLE} is {choice or 'not set'}")
    for task, needs_grad in {"to segment, plain": False, "to train": True}.items():
        cells: list[str] = []
        for device in devices:
            try:
                like = torch.zeros(1, device=device, requires_grad=needs_grad)
                cells.append(resolve_backend("auto", like))
            except ValueError as error:
                cells.append(str(error))
        table.add_row(task, *cells)
    print_table(table)
    for backend, reason in available_backends().items():
        print(f"{backend}: {'can run' if reason is None else f'cannot run, {reason}'}")
    reason = cpu_kernels.why_no_kernels()
    kept = f"none, {reason}" if reason else f"compiled when a model is prepared, kept in {cpu_kernels.folder()}"
    print(f"kernels for a CPU: {kept}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "segment": segment,
    "demo": demo,
    "parity": parity,
    "benchmark": benchmark,
    "eval": eval_results,
    "info": info,
}


def _one_of(commands: Mapping[str, Callable[..., int]]) -> Any:
    """The type by which the parser chooses a command and runs it."""
    choices = (Annotated[Any, subcommand(name=name, constructor=command)] for name, command in commands.items())
    return Union[tuple(choices)]  # noqa: UP007  # made at run time


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            data = subcommand(
                name="data", constructor=_one_of(DATA_COMMANDS), description="Make, check and split datasets."
            )
            commands = COMMANDS | {"train": train_command(sys.argv[1:] if argv is None else argv)}
            command: Any = Union[_one_of(commands), Annotated[Any, data]]  # noqa: UP007
            code: int = tyro.cli(
                command,
                prog="m2f-video",
                description="Video Mask2Former: published weights in, segmented and tracked video out.",
                args=argv,
            )
            with naming("standard output"):
                sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("m2f-video: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, as `head` does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141
    except (ValueError, OSError, ImportError, KernelError) as error:
        message = str(error).strip() or type(error).__name__
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = "out of memory; choose fewer frames, smaller ones (--shortest-edge), a smaller batch, or bfloat16"
    print(one_line(f"m2f-video: error: {message}"), file=sys.stderr)
    return 2


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """On a CPU, PyTorch says so with a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(one_line(f"m2f-video: warning: {message}"), file=sys.stderr)


def _check_output(folder: Path, *files: str) -> None:
    """Fail before the work where these files could not be written to the folder after it."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; give --output a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} is not writable; give --output another folder")
    for name in files:
        check_replaceable(folder / name)


def _print_tracks(segmentation: VideoSegmentation, min_score: float = 0.0) -> None:
    count = len(segmentation.frames)
    tracks = [track for track in segmentation.tracks if track.score >= min_score]
    if not tracks:
        print(f"{segmentation.source}: {count} frames, no track reaches the --score-threshold")
        return
    print(f"{segmentation.source}: {count} frames, {len(tracks)} tracks")
    table = Table("id", "label", "score", "frames", "mean area, px")
    for track in tracks:
        visible = track.num_frames_visible
        area = sum(track.area(frame) for frame in range(count)) / max(visible, 1)
        table.add_row(str(track.id), track.label, f"{track.score:.3f}", f"{visible}/{count}", f"{area:.0f}")
    print_table(table)

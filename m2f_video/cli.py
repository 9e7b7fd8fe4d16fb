"""The `m2f-video` command: it parses, calls the library and prints.

Exit codes: 0 done; 1 a check failed; 2 bad input, with one line that says what is wrong; 130 interrupted.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import torch
import tyro
from rich.table import Table
from tyro.conf import subcommand

from m2f_video.console import print_table, progress_bars
from m2f_video.data.command import DATA_COMMANDS
from m2f_video.evaluation.command import eval_results
from m2f_video.hub import load_config, parse_dtype, resolve_config
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.results import OVERLAY_FILE, TRACKS_FILE, VideoSegmentation, made_directory
from m2f_video.training.command import train_command

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
DtypeName = Literal["float32", "float64", "bfloat16", "float16"]


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
    strict: bool = False,
    overlay: bool = True,
) -> int:
    """Segment and track the objects of a video; write tracks.json and overlay.mp4.

    Example: m2f-video segment cars.mp4 --checkpoint facebook/video-mask2former-swin-tiny-youtubevis-2019-instance
    --output out --score-threshold 0.3

    Args:
        source: video file, or a folder of frames (jpg, png, ...).
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
        strict: fail on a damaged video instead of segmenting what decodes.
        overlay: write overlay.mp4.
    """
    from m2f_video.inference import segment_video
    from m2f_video.processor import VideoProcessor
    from m2f_video.video_io import open_video, parse_frames

    reader = open_video(source, None if frames is None else parse_frames(frames), strict=strict)
    _check_output(output)
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
    with progress_bars(unit="frame") as update:
        segmentation = segment_video(
            model,
            reader,
            processor=VideoProcessor(preprocessing, model.config.labels),
            top_k=top_k,
            score_threshold=score_threshold,
            frames_per_chunk=frames_per_chunk,
            progress=update,
        )
        segmentation.save(output, overlay, progress=lambda done, total: update("overlay", done, total))
    _print_tracks(segmentation)
    print(f"written to {output}: {TRACKS_FILE}{f', {OVERLAY_FILE}' if overlay else ''}")
    return 0


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
    from m2f_video.inference import segment_video
    from m2f_video.video_io import VideoWriter

    _check_output(output)
    file = output / "video.mp4"
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
    print(f"written to {output}: {file.name}, {TRACKS_FILE}, {OVERLAY_FILE}")
    return 0


def parity(
    reference: Literal["hf"] = "hf",
    checkpoint: str | None = None,
    random: int | None = None,
    config: str | None = None,
    dtype: Literal["float32", "float64"] = "float32",
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
        dtype: both implementations run in it.
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
    ours, own = compare_with_transformers(model, pixels, model_dtype)

    print(f"{what}; {frames} x {height} x {width}, {dtype}, against {reference} in float64")
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
    tolerance = TOLERANCES[model_dtype]
    passed = within_tolerance(ours, model_dtype)
    verdict = "within" if passed else "OVER"
    print(f"largest relative error {worst.relative:.1e} ({worst.stage}): {verdict} the tolerance of {tolerance:.0e}")
    return 0 if passed else 1


def info() -> int:
    """Show versions and devices, and which implementation of deformable attention runs on them."""
    from importlib.metadata import version

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
    for task, needs_grad in (("to segment", False), ("to train", True)):
        cells: list[str] = []
        for device in devices:
            try:
                cells.append(resolve_backend("auto", torch.zeros(1, device=device, requires_grad=needs_grad)))
            except ValueError as error:
                cells.append(str(error))
        table.add_row(task, *cells)
    print_table(table)
    for backend, reason in available_backends().items():
        print(f"{backend}: {'can run' if reason is None else f'cannot run, {reason}'}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "segment": segment,
    "demo": demo,
    "parity": parity,
    "eval": eval_results,
    "info": info,
}


def _one_of(commands: Mapping[str, Callable[..., int]]) -> Any:
    """The type by which the parser chooses a command and runs it."""
    choices = (Annotated[Any, subcommand(name=name, constructor=command)] for name, command in commands.items())
    return Union[tuple(choices)]  # noqa: UP007  # made at run time


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            data = subcommand(
                name="data", constructor=_one_of(DATA_COMMANDS), description="Make, check and split datasets."
            )
            commands = COMMANDS | {"train": train_command(sys.argv[1:] if argv is None else argv)}
            command: Any = Union[_one_of(commands), Annotated[Any, data]]  # noqa: UP007
            return tyro.cli(
                command,
                prog="m2f-video",
                description="Video Mask2Former: published weights in, segmented and tracked video out.",
                args=argv,
            )
    except KeyboardInterrupt:
        print("m2f-video: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = "out of memory; choose fewer frames, smaller ones (--shortest-edge), a smaller batch, or bfloat16"
    print(f"m2f-video: error: {message}", file=sys.stderr)
    return 2


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """On a CPU, PyTorch says so with a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"m2f-video: warning: {message}", file=sys.stderr)


def _check_output(folder: Path) -> None:
    """Fail before the work where the output could not be written after it."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; give --output a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} is not writable; give --output another folder")


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

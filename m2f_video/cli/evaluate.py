"""The `eval` command: for results that exist already, and for a model that makes them."""

import importlib.util
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from m2f_video.cli.console import print_table, progress_bars
from m2f_video.data.source import is_synthetic, open_dataset
from m2f_video.data.synthetic import SyntheticVideos
from m2f_video.data.youtube_vis import YouTubeVis
from m2f_video.distributed import join_workers
from m2f_video.evaluation import report
from m2f_video.evaluation.annotations import (
    EvaluationWarning,
    GroundTruth,
    MaskTrack,
    Progress,
    load_ground_truth,
    load_results,
)
from m2f_video.evaluation.pairing import pair_tracks
from m2f_video.evaluation.predict import predict_on_all_ranks, prepare_ground_truth
from m2f_video.evaluation.tracking import SCORE_THRESHOLD, TrackingResult, tracking_metrics
from m2f_video.evaluation.video_ap import VideoAPResult, average_precision
from m2f_video.files import made_directory
from m2f_video.hub import load_config
from m2f_video.inference.linking import LinkerName
from m2f_video.inference.segment import WINDOW, Mode
from m2f_video.modeling.video_mask2former import VideoMask2Former

SUBMISSION_FILE = "results.zip"
JOURNAL_FILE = "journal-{}.jsonl"
"""Of the finished videos of a rank, while there are others to do."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How `eval --data --checkpoint` makes its results."""

    output: Path = Path("eval_output")
    """with --data: folder for results.json and results.zip (for evaluation servers); a stopped run goes on there."""
    split: Literal["train", "val", "test"] | None = None
    """with --data: which part; by default test of the synthetic benchmark, and val of a folder."""
    videos: int | None = None
    """with --data: only the first so many videos."""
    frames: Path | None = None
    """with --data: folder of the videos' folders of frames; by default found where published datasets have it."""
    config: str | None = None
    """with --data: for a weight file without a config.json beside it, a preset or a config.json."""
    temporal: Literal["joint"] | None = None
    """with --data: read an image checkpoint, whose frames are decoded alone, as a video model (joint)."""
    device: str | None = None
    """with --data: such as cpu, cuda or cuda:1; by default cuda where there is one, else cpu."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """with --data: floating-point type the model runs in."""
    plain: bool = False
    """with --data: run the model as it is written, without the accelerated twins of its modules."""
    top_k: int = 10
    """with --data: how many (query, class) pairs of a video become results; the published evaluation takes 10."""
    frames_per_chunk: int | None = None
    """with --data: frames encoded at a time; by default 1 on a CPU and 8 elsewhere."""
    mode: Mode = "whole"
    """with --data: decode each video as a whole, as published; streamed, the same with one frame at a time on the
    device; in windows; or auto, by its length."""
    window: int = WINDOW
    """with --data: frames of a window."""
    stride: int | None = None
    """with --data: frames from one window to the next; by default as many as a window has."""
    linker: LinkerName = "transfer"
    """with --data: how objects of a window are linked to tracks."""
    max_overlap: float | None = None
    """with --data: leave out an object of whose mask more certain ones cover a larger share; by default 1, which keeps
    all, for whole and streamed videos, and 0.5 in windows."""


def eval_results(
    annotations: Path | None = None,
    results: Path | None = None,
    data: str | None = None,
    checkpoint: str | None = None,
    json: Path | None = None,
    tracking: bool = True,
    score_threshold: float = SCORE_THRESHOLD,
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions(),
) -> int:
    """Measure results, or a model on a dataset: video AP and AR, HOTA, IDF1, id switches.

    Takes --annotations and --results, both in the YouTubeVIS format, or --data and --checkpoint. With a dataset whose
    annotations are not public the results are written all the same. Under torchrun each process takes a share of the
    videos.

    Examples: m2f-video eval --annotations valid.json --results results.json --json report.json

    m2f-video eval --data synthetic:medium --checkpoint trained --output measured

    torchrun --nproc-per-node 4 -m m2f_video eval --data ytvis_2021/valid --checkpoint trained

    Args:
        annotations: JSON file with videos, categories and annotations.
        results: JSON file with the rows of a submission (video_id, category_id, score, segmentations), or a zip of it.
        data: dataset to run the model on, a folder or annotation file in the YouTubeVIS format, whose categories are
            the labels of the model; or synthetic:easy, synthetic:medium, synthetic:hard.
        checkpoint: model to run: hub name, folder (config.json and weights) or weight file.
        json: write the numbers to this file, as fractions; -1 where there is nothing to measure by.
        tracking: measure HOTA, IDF1 and id switches too; needs the extra m2f-video[eval] and is left out, with a
            warning, where it is not installed.
        score_threshold: tracking leaves out predictions that score less; AP takes all.
        options: how the model runs.
    """
    if annotations is not None and results is not None and data is None and checkpoint is None:
        if options != ModelOptions():
            raise ValueError("with --annotations and --results no model runs: leave out the options for --data")
        return _evaluate_results(annotations, results, json, tracking, score_threshold)
    if data is not None and checkpoint is not None and annotations is None and results is None:
        return _evaluate_checkpoint(data, checkpoint, options, json, tracking, score_threshold)
    names = {"--annotations": annotations, "--results": results, "--data": data, "--checkpoint": checkpoint}
    given = [name for name, value in names.items() if value is not None]
    raise ValueError(
        "give --annotations and --results to measure results, or --data and --checkpoint to run a model; got "
        f"{' and '.join(given) or 'none of them'}"
    )


def _evaluate_results(
    annotations: Path, results: Path, json: Path | None, tracking: bool, score_threshold: float
) -> int:
    if json is not None:
        report.check_writable(json)
        _check_spares(json, annotations, results)
    tracking = tracking and _can_track()
    with progress_bars() as progress:
        truth = load_ground_truth(annotations, progress)
        tracks = load_results(results, truth, progress)
        ap, followed = _measure(truth, tracks, tracking, score_threshold, progress)
    _show(ap, followed, json)
    return 0


def _check_spares(json: Path, *inputs: Path) -> None:
    """Make sure that the report does not take the place of what it is made from."""
    for file in inputs:
        if json.exists() and file.exists() and json.samefile(file):
            raise ValueError(f"{json} is what the numbers are made from; give --json another name")


def _evaluate_checkpoint(
    data: str, checkpoint: str, options: ModelOptions, json: Path | None, tracking: bool, score_threshold: float
) -> int:
    if options.videos is not None and options.videos < 1:
        raise ValueError(f"--videos must be positive, got {options.videos}")
    results, submission = options.output / report.RESULTS_FILE, options.output / SUBMISSION_FILE
    if options.output.exists() and not options.output.is_dir():
        raise NotADirectoryError(f"{options.output} is a file; give --output a folder")
    if json is not None and json.resolve() in {results.resolve(), submission.resolve()}:
        raise ValueError(f"{json} is where the results go; give --json another name")
    split = options.split or ("test" if is_synthetic(data) else "val")
    videos = open_dataset(data, split, options.videos, options.frames)
    if json is not None:
        _check_spares(json, *([videos.file] if isinstance(videos, YouTubeVis) else []))
        if json.resolve().parent == options.output.resolve() and json.match(JOURNAL_FILE.format("[0-9]*")):
            raise ValueError(f"{json} is removed at the end, as the journals are; give --json another name")
    with join_workers(options.device) as worker, made_directory(options.output):
        for file in (results, submission, *([] if json is None else [json])):
            report.check_writable(file)
        model = _load_model(checkpoint, options, worker.device)
        journal = options.output / JOURNAL_FILE.format(worker.rank)
        predict = partial(
            predict_on_all_ranks,
            model,
            videos,
            top_k=options.top_k,
            frames_per_chunk=options.frames_per_chunk,
            plain=options.plain,
            journal=journal,
            mode=options.mode,
            window=options.window,
            stride=options.stride,
            linker=options.linker,
            max_overlap=options.max_overlap,
        )
        if not worker.is_main:
            predict()
            return 0
        tracking = tracking and _can_track()
        print(f"{_describe(videos, split)}: {len(videos)} videos")
        with progress_bars() as progress:
            truth = prepare_ground_truth(videos, progress)  # first, so that a fault in it shows before the work
            rows = predict(progress=_saying_what_was_done(journal, progress))
            report.write_results(results, rows)
            report.write_submission(submission, rows)
            if truth is not None:
                ap, followed = _measure(truth, load_results(rows, truth, progress), tracking, score_threshold, progress)
    if truth is None:
        unwritten = "" if json is None else f", and {json} is not written"
        print(f"there are no annotations: there is no truth to measure by{unwritten}")
    else:
        _show(ap, followed, json)
    for finished in options.output.glob(JOURNAL_FILE.format("[0-9]*")):  # of every rank
        if finished.is_file():
            finished.unlink()
    print(f"written to {options.output}: {results.name}, {submission.name}")
    return 0


def _saying_what_was_done(journal: Path, progress: Progress) -> Progress:
    """Progress that starts with a line on the videos that a stopped run had finished."""
    started = False

    def update(stage: str, done: int, total: int) -> None:
        nonlocal started
        if not started and done:
            print(f"going on from {journal}: {done} of {total} videos are done already")
        started = True
        progress(stage, done, total)

    return update


def _load_model(checkpoint: str, options: ModelOptions, device: torch.device) -> VideoMask2Former:
    if load_config(checkpoint, config=options.config, temporal=options.temporal).temporal != "joint":
        raise ValueError(f"{checkpoint} is an image model; --temporal joint reads it as a video model")
    return VideoMask2Former.from_pretrained(
        checkpoint, config=options.config, temporal=options.temporal, device=device, dtype=options.dtype
    )


def _describe(videos: YouTubeVis | SyntheticVideos, split: str) -> str:
    if isinstance(videos, SyntheticVideos):
        return f"{videos.info['description']} v{videos.info['version']}, {videos.info['difficulty']}, {split}"
    return str(videos.file)


def _can_track() -> bool:
    if importlib.util.find_spec("trackeval") is not None:
        return True
    warnings.warn(
        "HOTA, IDF1 and id switches are left out, they need trackeval: pip install 'm2f-video[eval]'",
        EvaluationWarning,
        stacklevel=3,
    )
    return False


def _measure(
    truth: GroundTruth, tracks: list[MaskTrack], tracking: bool, score_threshold: float, progress: Progress
) -> tuple[VideoAPResult, TrackingResult | None]:
    pairings = pair_tracks(truth, tracks, progress)
    ap = average_precision(truth, pairings, progress)
    return ap, tracking_metrics(truth, pairings, score_threshold, progress) if tracking else None


def _show(ap: VideoAPResult, followed: TrackingResult | None, json: Path | None) -> None:
    """Print the tables, and write the numbers where that is asked for."""
    if json is not None:
        report.write_report(json, ap, followed)
    for table in report.tables(ap, followed):
        print_table(table)
    if json is not None:
        print(f"written to {json}")

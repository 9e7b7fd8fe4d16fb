"""Train every row of the papers' ablation tables alike, and compare them on the same test videos.

    python benchmarks/ablations.py --output runs/ablations [--rows base "cross-attention full" --seeds 0 1]
    torchrun --nproc-per-node 4 benchmarks/ablations.py --output runs/ablations
    python benchmarks/ablations.py --output runs/ablations --report-only

A row (`VARIANTS`) is what changes in the config of a small model (`BASE`), trained from random weights on the synthetic
benchmark: equally many steps of equally many clips for each row, and for each seed the same clips in the same order. A
row and a seed take about half an hour on one thread.

A run that is done is not done again, and one that was stopped goes on from its last checkpoint: start the same command
again. Any number of processes may work in one folder, each takes runs that no other is at. On machines that share no
folder, `--shard 0/2` and `--shard 1/2` divide the runs; copy the folders of the runs into one afterwards, for
`--report-only`. Under torchrun every process takes its share, on a GPU of its own where there are some; no run is
divided.

The report gives the mean AP over seeds, and the difference to the base on the same test videos with a 95 % interval:
videos are drawn again, with replacement, and so are seeds, each row with the base of the same seed and the same videos.
It says that a difference was shown where the interval leaves out 0, and the difference is more than two standard errors
of what another seed changes in any row. What was not shown may be there all the same.

`--quick` does all of it for every row, at a size of frames and for so few steps that its numbers mean nothing.
"""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from ablation_report import (
    RESULT_FILE,
    Finished,
    TrackMatches,
    Variant,
    check_saved,
    costs,
    inference_ms,
    median_step,
    model_input,
    write_report,
)
from filelock import FileLock, Timeout

from m2f_video.benchmark import machine
from m2f_video.config import (
    ConfigError,
    PixelDecoderConfig,
    PreprocessingConfig,
    SwinConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.data.augment import AugmentConfig
from m2f_video.data.clip import ClipSampling
from m2f_video.data.synthetic import SHAPES, STANDARD_SPLITS, SyntheticVideo, SyntheticVideos
from m2f_video.distributed import Worker
from m2f_video.evaluation import (
    GroundTruth,
    average_precision,
    load_results,
    pair_tracks,
    predict_videos,
    prepare_ground_truth,
)
from m2f_video.files import atomic_path, read_json
from m2f_video.hub import parse_device
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.training import LossConfig, OptimConfig, TrainConfig, Trainer
from m2f_video.training.folder import FINAL_FOLDER
from m2f_video.training.log import STEPS_FILE

BASE = TrainConfig(
    model=VideoMask2FormerConfig(
        backbone=SwinConfig(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.0),
        pixel_decoder=PixelDecoderConfig(hidden_dim=64, mask_dim=64, num_layers=2, ffn_dim=256, num_heads=4),
        transformer_decoder=TransformerDecoderConfig(
            hidden_dim=64, num_queries=20, num_layers=3, num_heads=4, ffn_dim=256
        ),
        labels=SHAPES,
        preprocessing=PreprocessingConfig(shortest_edge=96),
    ),
    loss=LossConfig(class_weight=4.0, num_points=512),
    sampling=ClipSampling(frame_range=15),
    augment=AugmentConfig(shortest_edges=(96,)),
    optim=OptimConfig(
        learning_rate=8e-4, backbone_factor=1.0, clip_norm=1.0, schedule="cosine", warmup_steps=100, ema_decay=0.99
    ),
    steps=1800,
    batch_size=8,
    checkpoint_every=100,
    keep_checkpoints=1,
    log_every=100,
)
"""What each row changes; 1.2 million parameters, each stride attended to once."""
QUICK = {
    "num_workers": 0,
    "steps": 4,
    "batch_size": 2,
    "checkpoint_every": 2,
    "optim.warmup_steps": 1,
    "loss.num_points": 64,
    "augment.shortest_edges": [32],
    "model.preprocessing.shortest_edge": 32,
}
QUICK_SIZE = {"height": 32, "width": 48, "num_frames": 4}

CROSS, ORDER = "model.transformer_decoder.cross_attention", "model.transformer_decoder.layer_order"
FEATURES, SCALE = "model.transformer_decoder.features", "model.transformer_decoder.scale"
QUERIES, DROPOUT = "model.transformer_decoder.query_features", "model.transformer_decoder.dropout"
POSITION, DEPTH = "model.transformer_decoder.temporal_position", "model.transformer_decoder.num_layers"
PIXELS, ENCODER = "model.pixel_decoder.kind", "model.pixel_decoder.num_layers"


def single(scale: int) -> dict[str, Any]:
    """Changes for one level instead of three."""
    return {FEATURES: "single", SCALE: scale}


VARIANTS = (
    Variant("base"),
    Variant("cross-attention full", "M2F 4a, 4c", {CROSS: "full"}, "37.8, -5.9"),
    Variant("cross-attention smca", "M2F 4c", {CROSS: "smca"}, "37.9, -5.8"),
    Variant("cross-attention mask_pooling", "M2F 4c", {CROSS: "mask_pooling"}, "43.1, -0.6"),
    Variant("queries zero", "M2F 4b", {QUERIES: "zero"}, "42.9, -0.8"),
    Variant("queries learnable", "M2F 3.2.1", {QUERIES: "learnable"}),
    Variant("self-attention first", "M2F 4b", {ORDER: "self_first"}, "43.2, -0.5"),
    Variant("dropout 0.1", "M2F 4b", {DROPOUT: 0.1}, "43.0, -0.7"),
    Variant("all three of 4b", "M2F 4b", {QUERIES: "zero", ORDER: "self_first", DROPOUT: 0.1}, "42.3, -1.4"),
    Variant("features 1-32", "M2F 4a, 4d", single(32), "41.5, -2.2"),
    Variant("features 1-16", "M2F 4d", single(16), "43.0, -0.7"),
    Variant("features 1-8", "M2F 4d", {FEATURES: "single"}, "44.0, +0.3"),
    Variant("features concatenated", "M2F 4d", {FEATURES: "concatenated"}, "44.0, +0.3"),
    Variant("pixel decoder fpn", "M2F 4e", {PIXELS: "fpn"}, "41.5, -2.2"),
    Variant("pixel decoder semantic_fpn", "M2F 4e", {PIXELS: "semantic_fpn"}, "42.1, -1.6"),
    Variant("pixel decoder fapn", "M2F 4e", {PIXELS: "fapn"}, "42.4, -1.3"),
    Variant("pixel decoder bifpn", "M2F 4e", {PIXELS: "bifpn", ENCODER: 3}, "43.5, -0.2"),
    Variant("pixel decoder none", "", {PIXELS: "none"}),
    Variant("matching by masks", "M2F 5", {"loss.matching": "masks"}, "lower"),
    Variant("loss of masks", "M2F 5", {"loss.mask_loss": "masks"}, "about equal, 3 times the memory"),
    Variant("matching and loss of masks", "M2F 5", {"loss.matching": "masks", "loss.mask_loss": "masks"}, "lower"),
    Variant("points uniform", "M2F 3.3", {"loss.importance_sample_ratio": 0.0}),
    Variant("no deep supervision", "M2F 3.2.1", {"loss.deep_supervision": False}),
    Variant("encoder 1 layer", "", {ENCODER: 1}),
    Variant("encoder 4 layers", "", {ENCODER: 4}),
    Variant("decoder 1 layer", "", {DEPTH: 1}),
    Variant("decoder 6 layers", "", {DEPTH: 6}),
    Variant("queries 10", "", {"model.transformer_decoder.num_queries": 10}),
    Variant("queries 40", "", {"model.transformer_decoder.num_queries": 40}),
    Variant("positions sine_2d", "VM2F 3.1", {POSITION: "sine_2d"}),
    Variant("positions none", "VM2F 3.1", {POSITION: "none"}),
    Variant("clips of 1 frame", "VM2F 4.1", {"sampling.num_frames": 1}),
    Variant("clips of 4 frames", "VM2F 4.1", {"sampling.num_frames": 4}),
    Variant("clips within 2 frames", "VM2F 4.1", {"sampling.frame_range": 2}),
)
"""All rows. What the paper found is AP on COCO with a ResNet-50, and the difference to its own 43.7."""


def apply(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """A config with other values of some fields, named by dotted paths; all of them are changed before any is checked.

    Raises:
        ConfigError: there is no such field, or a value is not one of it; the message names it.
    """
    data = config.to_dict()
    for path, value in changes.items():
        *parents, name = path.split(".")
        part = data
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    return TrainConfig.from_dict(data)


@dataclass(frozen=True)
class Run:
    """A row and a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant.name.replace(' ', '_')}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all runs have in common.

    Attributes:
        folder: of the runs' folders.
        base: config that rows change.
        train: videos to learn from.
        test: videos to measure on.
        device: of all.
        rehearsal: stop each run once, and check what it leaves.
    """

    folder: Path
    base: TrainConfig
    train: SyntheticVideos
    test: SyntheticVideos
    device: torch.device
    rehearsal: bool = False

    def config(self, run: Run) -> TrainConfig:
        """What a run is trained with."""
        try:
            return apply(self.base, {**run.variant.changes, "seed": run.seed})
        except ConfigError as error:
            raise ConfigError(f"row {run.variant.name!r}: {error}") from error

    @cached_property
    def truth(self) -> GroundTruth:
        """Of the test videos, made once in a process."""
        truth = prepare_ground_truth(self.test)
        assert truth is not None
        return truth

    def result(self, run: Run) -> dict[str, Any] | None:
        """What is known of a run that is done; None where it is not, or was measured on other videos.

        Raises:
            ValueError: the run was trained with another config.
        """
        file = self.folder / run.name / RESULT_FILE
        if not file.exists():
            return None
        result: dict[str, Any] = read_json(file)
        if different := TrainConfig.from_dict(result["config"]).differences(self.config(run)):
            raise ValueError(
                f"{file.parent} was trained with another {', '.join(list(different)[:5])}; take that again, or another "
                "--output"
            )
        return result if result["test"] == self.test.fingerprint else None

    def perform(self, run: Run) -> dict[str, Any] | None:
        """Train and measure, what is left of both; None where another process is at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / f"{run.name}.lock", timeout=0):
                return self.result(run) or self._measure(run)
        except Timeout:
            return None

    def _measure(self, run: Run) -> dict[str, Any]:
        config, folder = self.config(run), self.folder / run.name
        if self.rehearsal and not folder.exists():
            with contextlib.suppress(StoppedError):
                self._train(run, Stopping(self.train, config.batch_size * config.checkpoint_every))
        model = self._train(run, self.train)
        rows = predict_videos(model, self.test, journal=folder / f"predictions-{len(self.test)}.jsonl")
        pairings = pair_tracks(self.truth, load_results(rows, self.truth))
        TrackMatches.of(pairings, list(self.truth.sizes), list(self.truth.categories)).save(folder)
        if self.rehearsal:
            check_saved(folder, config.steps, model_input(config.model, self.test[0], self.device))
        result = {
            "row": run.variant.name,
            "seed": run.seed,
            "config": config.to_dict(),
            "test": self.test.fingerprint,
            "stats": average_precision(self.truth, pairings).stats,
            "seconds_per_step": median_step(folder / STEPS_FILE),
            **costs(config, self.train, self.test[0], self.device),
            "machine": machine(self.device),
        }
        with atomic_path(folder / RESULT_FILE) as file:  # last: it says that the run is done
            file.write_text(json.dumps(result, indent=2) + "\n")
        return result

    def _train(self, run: Run, videos: SyntheticVideos) -> VideoMask2Former:
        worker = Worker(0, 1, self.device)
        return Trainer(self.config(run), videos, self.folder / run.name, worker=worker, resume=True).train()


class StoppedError(Exception):
    """A run was stopped on purpose."""


class Stopping(SyntheticVideos):
    """Videos that end a run when so many were asked for, as a kill would."""

    def __init__(self, videos: SyntheticVideos, left: int) -> None:
        vars(self).update(vars(videos))
        self._left = left

    def __getitem__(self, index: int, /) -> SyntheticVideo:
        """One of them, while there are some left."""
        if not self._left:
            raise StoppedError
        self._left -= 1
        return super().__getitem__(index)


def share_of(shard: str | None) -> tuple[int, int]:
    """Number of a share of the runs, and how many shares there are: by `--shard`, else torchrun's, else all.

    Raises:
        ValueError: it is no share.
    """
    if shard is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--shard must be such as 0/2 or 1/2, got {shard}")
    return int(number), int(count)


def choose(rows: tuple[str, ...]) -> list[Variant]:
    """Variants by name, the base first; all, where none are named.

    Raises:
        ValueError: there is no such row; the message lists them.
    """
    names = [variant.name for variant in VARIANTS]
    if unknown := [row for row in rows if row not in names]:
        raise ValueError(f"there is no row {unknown[0]!r}; rows: {', '.join(names)}")
    return [variant for variant in VARIANTS if not rows or variant.name in (VARIANTS[0].name, *rows)]


def device_of(name: str | None) -> torch.device:
    """A device by name; of several GPUs, under torchrun, the process's own."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return parse_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name)


def perform_all(study: Study, runs: list[Run]) -> Iterator[tuple[Run, str]]:
    """Do runs one after the other; gives those that failed, and why."""
    for number, run in enumerate(runs):
        print(f"{run.name}: {number + 1} of {len(runs)}", flush=True)
        try:
            result = study.perform(run)
        except (ValueError, OSError, RuntimeError) as error:  # the others can be done all the same
            print(f"{run.name} failed: {error}", file=sys.stderr, flush=True)
            yield run, str(error)
            continue
        print("another process is at it" if result is None else f"AP {100 * result['stats']['AP']:.1f}", flush=True)


def main(
    output: Path,
    rows: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1),
    steps: int | None = None,
    videos: int | None = None,
    difficulty: Literal["easy", "medium", "hard"] = "medium",
    report: Path | None = None,
    shard: str | None = None,
    report_only: bool = False,
    quick: bool = False,
    draws: int = 1000,
    repeats: int = 5,
    threads: int = 1,
    nice: int = 19,
    workers: int = 0,
    device: str | None = None,
) -> int:
    """Train and compare the rows of the papers' ablation tables; write ablations.json, .md and .png.

    Args:
        output: folder of the runs; the same command goes on there.
        rows: names of rows to train and report, besides the base; all by default. A wrong name lists them.
        seeds: of weights and clips; each row is trained with each.
        steps: of every run, each of 8 clips; by default 1800.
        videos: to measure on, of the test videos; by default 300, as among sets of 100 AP varies by 4.
        difficulty: of all videos.
        report: folder of the report; by default output.
        shard: i/n does every n-th run, from the i-th on, counted from 0; others do the rest.
        report_only: train nothing, report what is done.
        quick: check that every row trains, resumes, saves, loads and measures, in some minutes; claims nothing.
        draws: of videos and seeds, for the intervals.
        repeats: timed calls of every model for the report, in turns; 0 times none.
        threads: of PyTorch in this process.
        nice: lowest priority that this process gives itself, 0 to 19.
        workers: processes beside this one that make clips; some, where the model is on a GPU.
        device: such as cpu or cuda; by default cuda where there is one.
    """
    for name, number in {"steps": steps, "videos": videos, "draws": draws, "threads": threads}.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be positive, got {number}")
    if not seeds or min(seeds) < 0 or min(repeats, workers) < 0 or not 0 <= nice <= 19:
        raise ValueError("--seeds must name some, from 0 on, --repeats and --workers too, and --nice is 0 to 19")
    first, count = share_of(shard)
    os.nice(max(nice - os.nice(0), 0))
    torch.set_num_threads(threads)
    base = apply(BASE, {"num_workers": workers, **(QUICK if quick else {}), **({"steps": steps} if steps else {})})
    kind: dict[str, Any] = {"difficulty": difficulty, **(QUICK_SIZE if quick else {})}
    study = Study(
        folder=output,
        base=base,
        train=SyntheticVideos(**STANDARD_SPLITS["train"], **kind),
        test=SyntheticVideos(videos or (2 if quick else 300), STANDARD_SPLITS["test"]["seed"], **kind),
        device=device_of(device),
        rehearsal=quick,
    )
    runs = [Run(variant, seed) for seed in dict.fromkeys(seeds) for variant in choose(rows)]
    for run in runs:
        study.config(run)  # a row that cannot be built is named before the work
    failed = {} if report_only else dict(perform_all(study, runs[first::count]))
    results = {run: result for run in runs if (result := study.result(run)) is not None}
    print(f"{len(results)} of {len(runs)} runs are done", flush=True)
    if report_only and not results:
        raise ValueError(f"no run is done in {output}, there is nothing to report; leave out --report-only first")
    if report_only or len(results) == len(runs):
        about = {
            "title": f"{study.train.info['description']} v{study.train.info['version']}, {difficulty}; "
            f"{base.steps} steps of {base.batch_size} clips",
            "videos": len(study.test),
            "base": base.to_dict(),
            "missing": [run.name for run in runs if run not in results],
            "machine": machine(study.device),
            "command": shlex.join(("python", *sys.argv)),
        }
        finished = [
            Finished(variant=run.variant, seed=run.seed, result=result, matches=TrackMatches.load(output / run.name))
            for run, result in results.items()
        ]
        models = {run.variant.name: output / run.name / FINAL_FOLDER for run in results}
        times = inference_ms(models, study.test[0], study.device, repeats) if repeats else {}
        print(write_report(report or output, finished, VARIANTS[0].name, times, about, draws=draws, claims=not quick))
    for run, why in failed.items():
        print(f"failed: {run.name}: {why}", file=sys.stderr)
    return int(bool(failed) and "WORLD_SIZE" not in os.environ)  # torchrun would end the others


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main, description=__doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"ablations.py: error: {error}")

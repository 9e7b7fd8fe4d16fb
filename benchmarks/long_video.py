"""Compare ways to segment long videos: how well they find and follow objects, and what they cost as videos get longer.

    python benchmarks/long_video.py --output runs/long [--lengths 64 160 --seeds 4242 777 --methods main windows]
    python benchmarks/long_video.py --output runs/long --report benchmarks/results --report-only
    python benchmarks/long_video.py --output runs/long --costs --report benchmarks/results

Videos are those of the synthetic benchmark (`medium` by default), whose objects hide each other, leave and come back,
and have look-alikes; each length has videos of its own, from the same seeds. A method (`METHODS` in `long_methods.py`)
is options of `segment_video`, or the published way of others. Every frame is encoded once, and every window decoded
once, for all methods: they run as `segment_video` runs, on a model that remembers.

What is done is not done again: one file a video holds what each method's tracks are worth, and the same command goes
on after a kill. Any number of processes may work in one folder; each takes videos that no other is at.

The report gives AP, AP50, HOTA, IDF1 and identity switches of each method by length, over the videos of all seeds, and
the difference of the default to each other method on the same videos with a 95 % interval: videos are drawn again with
replacement, for both alike.

`--costs` measures memory and time instead, see `long_costs.py`. `--quick` does all of it at a size where its numbers
mean nothing, in two minutes.
"""

import hashlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from ablation_report import TrackMatches
from filelock import FileLock, Timeout
from long_costs import Sizes, measure_costs, write_costs
from long_methods import METHODS, Method, RememberingModel, Video, choose
from long_report import Numbers, write_report

from m2f_video.acceleration import accelerated
from m2f_video.benchmark import machine
from m2f_video.data.clip import Clip
from m2f_video.data.synthetic import SHAPES, SyntheticVideo, SyntheticVideos
from m2f_video.evaluation import GroundTruth, load_results, pair_tracks, prepare_ground_truth
from m2f_video.files import atomic_path, read_json
from m2f_video.modeling.video_mask2former import VideoMask2Former

CHECKPOINT = Path(__file__).resolve().parent / "data" / "demo_regnet"
LENGTHS, SEEDS, VIDEOS = (16, 36, 64, 160, 480), (4242, 777), 24
QUICK = {"lengths": (6, 20), "seeds": (0,), "videos": 2}


@dataclass(frozen=True)
class Task:
    """A video."""

    seed: int
    length: int
    index: int

    @property
    def name(self) -> str:
        """Of its file, without ending."""
        return f"seed{self.seed}-{self.length}frames/{self.index:03d}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all videos have in common.

    Attributes:
        folder: of what was found.
        checkpoint: folder of the model.
        difficulty: of the videos.
        methods: to compare.
    """

    folder: Path
    checkpoint: Path
    difficulty: Literal["easy", "medium", "hard"]
    methods: tuple[Method, ...]

    def found(self, task: Task) -> dict[str, dict[str, Any]]:
        """What is known of a video, by method, as far as it was found with the same options.

        Raises:
            ValueError: it was found with other weights, or of another video.
        """
        file = self.folder / f"{task.name}.json"
        if not file.exists():
            return {}
        kept = read_json(file)
        if kept["made_from"] != self.made_from(task):
            raise ValueError(f"{file} is of another checkpoint or video; take those again, or another --output")
        says = {method.name: method.says for method in METHODS}
        return {name: row for name, row in kept["methods"].items() if row["says"] == says.get(name)}

    def made_from(self, task: Task) -> list[str]:
        """What a video's file depends on, besides methods."""
        videos = SyntheticVideos(1, task.seed, self.difficulty, num_frames=task.length)
        return [weights_digest(self.checkpoint), videos.fingerprint]

    def perform(self, model: RememberingModel, task: Task) -> str:
        """Measure on a video what is left of the methods; says what came of it."""
        file = self.folder / f"{task.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(file.with_suffix(".lock"), timeout=0):
                found = self.found(task)
                left = [method for method in self.methods if method.name not in found]
                if not left:
                    return "done before"
                start = time.perf_counter()
                dataset = OneVideo(SyntheticVideos(task.index + 1, task.seed, self.difficulty, num_frames=task.length))
                truth = prepare_ground_truth(dataset)
                assert truth is not None
                for method in left:
                    found[method.name] = {"says": method.says, **measure(method, model, dataset, truth)}
                    with atomic_path(file) as temporary:
                        temporary.write_text(json.dumps({"made_from": self.made_from(task), "methods": found}) + "\n")
                return f"{len(left)} methods in {time.perf_counter() - start:.0f} s"
        except Timeout:
            return "another process is at it"


class OneVideo:
    """The last of some videos, rendered once, as a dataset."""

    def __init__(self, videos: SyntheticVideos) -> None:
        self.labels, self.fingerprint = videos.labels, videos.fingerprint
        self._video = videos[len(videos) - 1]
        self.clip = self._video.clip(range(self._video.num_frames))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int, /) -> "Rendered":
        """The video.

        Raises:
            IndexError: any other is asked for.
        """
        if index:
            raise IndexError("there is one video")
        return Rendered(self._video, self.clip)

    @property
    def video(self) -> Video:
        """What methods may know of it."""
        return Video(frames=self.clip.frames.permute(0, 2, 3, 1).contiguous().numpy(), masks=self.clip.masks)


class Rendered:
    """A video whose frames there are already."""

    def __init__(self, video: SyntheticVideo, clip: Clip) -> None:
        self.video_id, self.name, self.num_frames = video.video_id, video.name, video.num_frames
        self.height, self.width = video.height, video.width
        self._clip = clip

    def clip(self, frame_indices: Any) -> Clip:
        """All frames.

        Raises:
            ValueError: others are asked for.
        """
        if tuple(frame_indices) != self._clip.frame_indices:
            raise ValueError("all frames were rendered, and no others can be had")
        return self._clip


def measure(method: Method, model: RememberingModel, dataset: OneVideo, truth: GroundTruth) -> dict[str, Any]:
    """What a method's tracks of a video are worth."""
    video_id = dataset[0].video_id
    tracks = method(model, dataset.video)
    rows = [
        {
            "video_id": video_id,
            "category_id": track.label_id + 1,
            "score": track.score,
            "segmentations": list(track.segmentations),
        }
        for track in tracks
    ]
    pairings = pair_tracks(truth, load_results(rows, truth))
    matches = TrackMatches.of(pairings, [video_id], list(truth.categories))
    return Numbers.of(matches, pairings).to_dict()


def weights_digest(checkpoint: Path) -> str:
    """Of a checkpoint's weights."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def perform_all(study: Study, tasks: list[Task]) -> None:
    """Measure on videos one after the other.

    Raises:
        ValueError: the model names other classes than the videos'.
    """
    loaded = VideoMask2Former.from_pretrained(study.checkpoint)
    if loaded.config.labels != SHAPES:
        raise ValueError(f"the classes of {study.checkpoint} are not those of the synthetic benchmark")
    with accelerated(loaded, False) as model, torch.inference_mode():
        for number, task in enumerate(tasks):
            said = study.perform(RememberingModel(model), task)
            print(f"{time.strftime('%H:%M:%S')} {task.name}, {number + 1} of {len(tasks)}: {said}", flush=True)


def main(
    output: Path,
    methods: tuple[str, ...] = (),
    lengths: tuple[int, ...] = LENGTHS,
    seeds: tuple[int, ...] = SEEDS,
    videos: int = VIDEOS,
    difficulty: Literal["easy", "medium", "hard"] = "medium",
    checkpoint: Path = CHECKPOINT,
    report: Path | None = None,
    name: str = "long_video",
    report_only: bool = False,
    costs: bool = False,
    quick: bool = False,
    draws: int = 1000,
    threads: int = 1,
    nice: int = 15,
) -> None:
    """Compare ways to segment long videos; write NAME.json, .md and .png, or with --costs NAME_costs of each.

    Args:
        output: folder of what was found, a file a video; the same command goes on there.
        methods: names or groups (main, bounds, linkers, windows), besides the default; all by default.
        lengths: of the videos, in frames.
        seeds: of the videos; each gives so many of each length.
        videos: of each length and seed.
        difficulty: of the videos.
        checkpoint: folder of the model, in the native format.
        report: folder of the report; by default output.
        name: of the report's files, without ending.
        report_only: measure nothing, report what is done.
        costs: measure memory and time instead, on a machine that does nothing else.
        quick: check that all of it runs; claims nothing.
        draws: of videos, for the intervals.
        threads: of PyTorch in this process.
        nice: lowest priority that this process gives itself, 0 to 19; 0 for the costs.
    """
    if quick:
        lengths, seeds, videos = QUICK["lengths"], QUICK["seeds"], QUICK["videos"]
    for option, numbers in {"lengths": lengths, "videos": (videos,), "draws": (draws,), "threads": (threads,)}.items():
        if not numbers or min(numbers) < 1:
            raise ValueError(f"--{option} must be positive, got {' '.join(map(str, numbers)) or 'none'}")
    if not seeds or min(seeds) < 0 or not 0 <= nice <= 19:
        raise ValueError("--seeds must name some, from 0 on, and --nice is 0 to 19")
    if not (checkpoint / "model.safetensors").exists():
        raise FileNotFoundError(f"--checkpoint {checkpoint} holds no model.safetensors")
    torch.set_num_threads(threads)
    about = {"machine": machine(), "command": shlex.join(("python", *sys.argv)), "claims": not quick}
    if costs:
        found = measure_costs(checkpoint, Sizes.quick() if quick else Sizes(), output)
        print(write_costs(report or output, f"{name}_costs", found, about))
        return
    os.nice(max(nice - os.nice(0), 0))
    chosen = tuple(choose(methods))
    study = Study(folder=output, checkpoint=checkpoint, difficulty=difficulty, methods=chosen)
    tasks = [Task(seed, length, index) for length in lengths for seed in seeds for index in range(videos)]
    if not report_only:
        perform_all(study, tasks)
    numbers_of: dict[tuple[int, int], dict[str, list[Numbers]]] = {}
    for task in tasks:  # a method counts where it was measured on all videos of a length and seed
        for method, row in study.found(task).items():
            numbers_of.setdefault((task.length, task.seed), {}).setdefault(method, []).append(Numbers.from_dict(row))
    complete = {
        key: {method: Numbers.joined(of) for method, of in of_methods.items() if len(of) == videos}
        for key, of_methods in numbers_of.items()
    }
    if not any(complete.values()):
        raise ValueError(f"no method was measured on all videos in {output}; leave out --report-only first")
    title = f"m2f-video synthetic benchmark, {difficulty}, {videos} videos of each length and seed, checkpoint "
    about["title"] = title + checkpoint.name
    print(write_report(report or output, name, complete, about, draws=draws))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"long_video.py: error: {error}")

"""What `ablations.py` measures of its runs, checks in a rehearsal, and says: costs, intervals, tables, a plot.

Shape letters: V videos, N predicted tracks, T IoU thresholds, K categories, B draws of videos, S seeds.
"""

import contextlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch

from m2f_video.benchmark import count_flops, measure, peak_bytes
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.data.clip import AnnotatedVideo, AnnotatedVideos
from m2f_video.distributed import Worker
from m2f_video.evaluation.pairing import Pairing
from m2f_video.evaluation.video_ap import RECALL_THRESHOLDS, match_pairing
from m2f_video.files import atomic_path
from m2f_video.inference.processor import VideoProcessor
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.training import TrainConfig, Trainer
from m2f_video.training.folder import FINAL_FOLDER
from m2f_video.training.log import STEPS_FILE

RESULT_FILE, MATCHES_FILE = "result.json", "matches.npz"
CHUNK = 20  # draws at a time: their arrays fit a core's cache
NOT_SHOWN = "no difference shown"


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes:
        name: of it.
        where: the paper's table or section.
        changes: values of fields of the base's config, by dotted paths.
        found: what the paper found, where it says.
    """

    name: str
    where: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    found: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrackMatches:
    """Which predicted tracks are right, of which AP on any choice of the videos follows without a look at masks.

    Attributes:
        video: (N,), index of each track's.
        category: (N,), index of each track's.
        scores: (N,).
        true_positive: bool (T, N), which are right.
        false_positive: bool (T, N), which are wrong.
        num_annotations: (V, K), how many there are to find.
    """

    video: np.ndarray
    category: np.ndarray
    scores: np.ndarray
    true_positive: np.ndarray
    false_positive: np.ndarray
    num_annotations: np.ndarray

    @classmethod
    def of(cls, pairings: Sequence[Pairing], videos: Sequence[int], categories: Sequence[int]) -> Self:
        """Those of predictions paired with the annotations of these videos and categories, by id."""
        matches = [match_pairing(pairing) for pairing in pairings]
        places = [(videos.index(pair.video_id), categories.index(pair.category_id)) for pair in pairings]
        lengths = [len(match.scores) for match in matches]
        num_annotations = np.zeros((len(videos), len(categories)), np.int64)
        for place, match in zip(places, matches, strict=True):
            num_annotations[place] = match.num_annotations[0]  # of any area
        return cls(
            video=np.repeat([video for video, _ in places], lengths),
            category=np.repeat([category for _, category in places], lengths),
            scores=np.concatenate([match.scores for match in matches]),
            true_positive=np.concatenate([match.true_positive[0] for match in matches], axis=1),
            false_positive=np.concatenate([match.false_positive[0] for match in matches], axis=1),
            num_annotations=num_annotations,
        )

    def save(self, folder: Path) -> None:
        """Write them into a run's folder."""
        with atomic_path(folder / MATCHES_FILE) as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(folder / MATCHES_FILE, allow_pickle=False) as arrays:
            return cls(**arrays)

    def average_precision(self, counts: np.ndarray) -> np.ndarray:
        """AP (B,) where video v is there counts[b, v] times, as `evaluation.average_precision` has it; 0 of nothing.

        Args:
            counts: (B, V).
        """
        return np.concatenate([self._average_precision(counts[i : i + CHUNK]) for i in range(0, len(counts), CHUNK)])

    def _average_precision(self, counts: np.ndarray) -> np.ndarray:
        totals = counts @ self.num_annotations  # (B, K)
        found = np.zeros(totals.shape)
        for k in np.flatnonzero(self.num_annotations.any(0)):
            chosen = np.flatnonzero(self.category == k)
            chosen = chosen[np.argsort(-self.scores[chosen], kind="stable")]
            weights = counts[:, None, self.video[chosen]]  # (B, 1, N)
            true = (weights * self.true_positive[:, chosen]).cumsum(-1)  # (B, T, N)
            false = (weights * self.false_positive[:, chosen]).cumsum(-1)
            precision = true / (true + false + np.spacing(1))
            precision = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
            recall = true / np.maximum(totals[:, k], 1)[:, None, None]
            reached = np.searchsorted(RECALL_THRESHOLDS, recall, side="right")
            newly = np.diff(reached, axis=-1, prepend=0)  # recall thresholds that a track is the first to reach
            found[:, k] = (newly * precision).sum(-1).mean(-1) / len(RECALL_THRESHOLDS)
        defined = totals > 0
        return (found * defined).sum(1) / np.maximum(defined.sum(1), 1)


def model_input(config: VideoMask2FormerConfig, video: AnnotatedVideo, device: torch.device) -> torch.Tensor:
    """A video as one clip (1, T, 3, H, W)."""
    frames = video.clip(range(video.num_frames)).frames.permute(0, 2, 3, 1).numpy()
    pixels: torch.Tensor = VideoProcessor.from_config(config)(frames)["pixel_values"]
    return pixels.to(device)


def costs(config: TrainConfig, train: AnnotatedVideos, video: AnnotatedVideo, device: torch.device) -> dict[str, float]:
    """What depends on the config alone, so that any weights tell it: parameters, FLOPs of a video, memory of a step."""
    model = VideoMask2Former(config.model).to(device).eval().requires_grad_(False)
    pixels = model_input(config.model, video, device)
    with torch.inference_mode():
        flops = count_flops(lambda: model(pixels))
    one = replace(config, steps=1, optim=replace(config.optim, warmup_steps=0), num_workers=0)
    worker = Worker(0, 1, device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        peak = peak_bytes(lambda: Trainer(one, train, folder, worker=worker).train(), device)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflop_per_frame": flops / video.num_frames / 1e9,
        "train_peak_mb": peak / 1e6,
    }


def check_saved(folder: Path, steps: int, pixels: torch.Tensor) -> None:
    """Make sure that a run did each step once, and that what it saved predicts the same prepared as plain.

    Raises:
        RuntimeError: it did not, or does not.
    """
    done = [line.split(",")[0] for line in (folder / STEPS_FILE).read_text().splitlines()[1:]]
    if done != [str(step + 1) for step in range(steps)]:
        raise RuntimeError(f"stopped and resumed, it did steps {', '.join(done)} instead of 1 to {steps}")
    model = VideoMask2Former.from_pretrained(folder / FINAL_FOLDER, device=pixels.device)
    with torch.inference_mode():
        plain, prepared = model(pixels), model.prepare_for_inference()(pixels)
    for name in ("class_queries_logits", "masks_queries_logits"):
        if not torch.allclose(getattr(plain, name), getattr(prepared, name), rtol=1e-2, atol=1e-2):
            raise RuntimeError(f"prepared, it gives other {name} than plain")


def median_step(log: Path) -> float:
    """Of the seconds of a run's steps."""
    header, *rows = (line.split(",") for line in log.read_text().splitlines())
    return median(float(row[header.index("seconds")]) for row in rows)


@torch.inference_mode()
def inference_ms(
    checkpoints: Mapping[str, Path], video: AnnotatedVideo, device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds of a frame of each model, prepared, of a video as one clip: medians of calls in turns."""
    functions: dict[str, Any] = {}
    for name, checkpoint in checkpoints.items():
        model = VideoMask2Former.from_pretrained(checkpoint, device=device)
        functions[name] = partial(model.prepare_for_inference(), model_input(model.config, video, device))
    seconds = measure(functions, repeats, device)
    return {name: 1000 * median(values) / video.num_frames for name, values in seconds.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A run that is done: its row and seed, what `ablations.py` found (`RESULT_FILE`), and its matches."""

    variant: Variant
    seed: int
    result: Mapping[str, Any]
    matches: TrackMatches


def compare(runs: Sequence[Finished], base: str, draws: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """AP of every row, and its difference to the base, in percent.

    A draw takes V of the videos and S of the seeds that the row and the base have in common, both with replacement.

    Args:
        runs: of all rows, on the same videos.
        base: name of the row to compare with.
        draws: B.
        seed: of the draws.

    Returns:
        By row: `ap` by seed, `mean`, `spread` (standard deviation over seeds, None of one), `differences` by seed,
        `difference`, `interval` (95 %), and the `reading`. Without the base, the first three alone.
    """
    random = np.random.default_rng(seed)
    num_videos = len(runs[0].matches.num_annotations)
    counts = random.multinomial(num_videos, np.full(num_videos, 1 / num_videos), size=draws)
    drawn = {(run.variant.name, run.seed): 100 * run.matches.average_precision(counts) for run in runs}
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        found.setdefault(run.variant.name, {"ap": {}})["ap"][run.seed] = 100 * run.result["stats"]["AP"]
    reference = found.get(base, {"ap": {}})["ap"]
    for name, row in found.items():
        values = list(row["ap"].values())
        row |= {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        seeds = [seed for seed in row["ap"] if seed in reference]
        if name == base or not seeds:
            continue
        row["differences"] = {seed: row["ap"][seed] - reference[seed] for seed in seeds}
        row["difference"] = float(np.mean(list(row["differences"].values())))
        paired = np.stack([drawn[name, seed] - drawn[base, seed] for seed in seeds])  # (S, B)
        chosen = np.random.default_rng(seed).integers(len(seeds), size=paired.shape)
        means = np.take_along_axis(paired, chosen, axis=0).mean(0)
        row["interval"] = [float(value) for value in np.percentile(means, (2.5, 97.5))]
    noise = seed_noise(found)
    for row in found.values():
        if "interval" in row:
            row["reading"] = reading(row, noise)
    return found


def seed_noise(found: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Standard deviation of a row's difference from seed to seed, over all rows; None where no row has two seeds."""
    several = [list(row["differences"].values()) for row in found.values() if len(row.get("differences", ())) > 1]
    return float(np.sqrt(np.mean([np.var(values, ddof=1) for values in several]))) if several else None


def reading(row: Mapping[str, Any], noise: float | None) -> str:
    """What a difference says: `better`, `worse`, or that none was shown."""
    low, high = row["interval"]
    size, least = abs(row["difference"]), 2 * (noise or 0) / np.sqrt(len(row["differences"]))
    if low <= 0 <= high or size <= least:
        return NOT_SHOWN
    return "better" if row["difference"] > 0 else "worse"


def write_report(
    folder: Path,
    runs: Sequence[Finished],
    base: str,
    milliseconds: Mapping[str, float],
    about: Mapping[str, Any],
    *,
    draws: int,
    claims: bool,
) -> str:
    """Write `ablations.json`, `.md` and, with matplotlib, `.png`; gives the text of the second.

    Args:
        folder: of the three.
        runs: that are done.
        base: name of the row to compare with.
        milliseconds: of a frame's inference by row, where it was measured.
        about: what all runs have in common, by name.
        draws: of videos and seeds.
        claims: whether the numbers mean anything.
    """
    found = compare(runs, base, draws)
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        results = [run.result for run in runs if run.variant == variant]
        costs = {name: results[0][name] for name in ("parameters", "gflop_per_frame", "train_peak_mb")}
        costs["seconds_per_step"] = median([result["seconds_per_step"] for result in results])
        row = asdict(variant) | found[variant.name] | costs | {"ms_per_frame": milliseconds.get(variant.name)}
        rows.append(row if claims else row | {"reading": "claims nothing"})
    report = {**about, "draws": draws, "seed_noise": seed_noise(found), "claims": claims, "rows": rows}
    text = markdown(report)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("ablations.json", json.dumps(report, indent=2) + "\n"), ("ablations.md", text)):
        with atomic_path(folder / name) as file:
            file.write_text(content, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot, which needs matplotlib: pip install 'm2f-video[bench]'")
    else:
        draw(rows, folder / "ablations.png")
    return text


def markdown(report: Mapping[str, Any]) -> str:
    """The report to read."""
    rows = report["rows"]
    noise = report["seed_noise"]
    seeds = (
        "No row has two seeds, so that what another seed changes is not known, and no interval holds it."
        if noise is None
        else f"From seed to seed, a row's difference has a standard deviation of {noise:.1f}, over all rows."
    )
    parts = [
        "# Ablations",
        "" if report["claims"] else "**A rehearsal: the numbers mean nothing.**\n",
        f"{report['title']}. AP in percent, of {report['videos']} test videos; difference to the base, with its 95 % "
        f"interval ({report['draws']} draws of videos and seeds). {seeds} What the paper found: AP on "
        "COCO (ResNet-50), and its difference to 43.7.\n",
        table(
            ("row", "paper", "seeds", "AP", "difference", "interval", "reading", "paper found"),
            [
                (
                    row["name"],
                    row["where"],
                    str(len(row["ap"])),
                    number(row["mean"], ".1f") + ("" if row["spread"] is None else f" ± {row['spread']:.1f}"),
                    number(row.get("difference"), "+.1f"),
                    "" if "interval" not in row else "{:+.1f} to {:+.1f}".format(*row["interval"]),
                    row.get("reading", ""),
                    row["found"],
                )
                for row in rows
            ],
        ),
        "\nParameters and products (of plain PyTorch, a frame of a test video's clip) are exact; memory is that of "
        "tensors at the peak of a training step. Times were taken beside other work: they are indicative.\n",
        table(
            ("row", "M parameters", "GFLOP a frame", "training MB", "s a step", "inference, ms a frame"),
            [
                (
                    row["name"],
                    number(row["parameters"] / 1e6, ".2f"),
                    number(row["gflop_per_frame"], ".3g"),
                    number(row["train_peak_mb"], ".0f"),
                    number(row["seconds_per_step"], ".2f"),
                    number(row["ms_per_frame"], ".1f"),
                )
                for row in rows
            ],
        ),
        "\nWhat a row changes:\n",
        table(("row", "fields"), [(row["name"], changed(row["changes"])) for row in rows if row["changes"]]),
        f"\nNot done: {', '.join(report['missing'])}." if report["missing"] else "",
        f"\nMachine: {', '.join(f'{name} {value}' for name, value in report['machine'].items())}. "
        f"Command: `{report['command']}`",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def changed(changes: Mapping[str, Any]) -> str:
    """Fields and values in a cell."""
    return ", ".join(f"`{path}={value}`" for path, value in changes.items())


def number(value: float | None, spec: str) -> str:
    """A number in a cell, empty where there is none."""
    return "" if value is None else format(value, spec)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each row's difference to the base, of all seeds and of each, with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "interval" in row]
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.28 * len(shown)), layout="constrained")
    for place, row in enumerate(reversed(shown)):
        color = "gray" if row["reading"] not in ("better", "worse") else "tab:blue"
        axis.plot(row["interval"], [place, place], color=color)
        axis.plot(row["difference"], place, "o", color=color)
        axis.plot(list(row["differences"].values()), [place] * len(row["differences"]), "|", color="black")
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_yticks(range(len(shown)), [row["name"] for row in reversed(shown)])
    axis.set_xlabel("AP, difference to the base: mean, 95 % interval, each seed; gray where none was shown")
    with atomic_path(path) as file:
        figure.savefig(file, dpi=120)
    pyplot.close(figure)

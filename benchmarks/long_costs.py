"""Memory and time of each way to segment a video, as it gets longer; `long_video.py --costs` runs it.

Peak memory is that of tensors (`peak_bytes`) beyond weights and pixels of the video: a short rendered one, forwards and
backwards again and again. `original` is the original's scheme: all frames through the network at once, mask logits of
all queries for all frames, and only then the best ones; in plain PyTorch. The others are the modes of `segment_video`,
accelerated. On a CPU the features that `streamed` stores are counted too.

Resident memory is that of a process of its own that segments a long stream into a folder, overlay included.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
from common import Worker, emit, environment
from long_report import number, save, table

from m2f_video.acceleration import accelerated
from m2f_video.benchmark import measure, peak_bytes
from m2f_video.config import VideoMask2FormerConfig
from m2f_video.data.synthetic import SyntheticVideos
from m2f_video.files import atomic_path, read_json
from m2f_video.inference.linking import Tracker
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import WINDOW, Mode, segment_video
from m2f_video.inference.to_folder import segment_to_folder
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import random_model
from m2f_video.video.reader import DEFAULT_FPS, VideoReader, open_video

MODES = tuple(mode for mode in get_args(Mode) if mode != "auto")
ORIGINAL = "original"
RENDERED = 64
"""Frames that are rendered; a longer video repeats them."""
LARGE = (480, 864)
SMALL = (96, 160)
"""Pixels of the frames for resident memory, of which the model sees two thirds of the side."""
MOST_GROWTH, LEAST_THROUGHPUT, MOST_ASSOCIATION = 0.05, 0.88, 0.05
"""What is promised: resident memory, speed beside `whole` at a window's length, share of linking in the time."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        lengths: of videos, in frames, for the checkpoint at the size of the synthetic benchmark.
        large: of videos of 480x864, for a Swin-tiny with random weights; memory alone.
        windows: of the video whose linking and throughput are timed.
        resident: frames between which resident memory is held to grow by no more than 5 %.
        repeats: timed calls.
    """

    lengths: tuple[int, ...] = (16, 64, 160, 480)
    large: tuple[int, ...] = (8, 16, 32)
    windows: int = 20
    resident: tuple[int, int] = (1_000, 20_000)
    repeats: int = 3

    @classmethod
    def quick(cls) -> "Sizes":
        """Enough to see that it runs."""
        return cls(lengths=(3, 9), large=(), windows=2, resident=(16, 32), repeats=1)


class RepeatedVideo(VideoReader):
    """Some frames, forwards and backwards again and again, in no more memory than theirs.

    Args:
        frames: uint8 (F, H, W, 3).
        count: of the video.
    """

    def __init__(self, frames: np.ndarray, count: int) -> None:
        super().__init__("made up", frames.shape[1:3], DEFAULT_FPS, count, slice(None))
        self._shown, self._count = frames, count

    def __iter__(self) -> Iterator[np.ndarray]:
        return islice(there_and_back(self._shown), self._count)


def there_and_back(frames: np.ndarray) -> Iterator[np.ndarray]:
    """Frames without end, each beside one that was beside it."""
    return cycle([*frames, *frames[-2:0:-1]])


def render(height: int, width: int, count: int = RENDERED) -> np.ndarray:
    """Frames (count, height, width, 3) of a video of the benchmark."""
    clip = SyntheticVideos(1, 0, num_frames=count, height=height, width=width)[0].clip(range(count))
    return clip.frames.permute(0, 2, 3, 1).contiguous().numpy()


@torch.inference_mode()
def original(model: VideoMask2Former, video: VideoReader, processor: VideoProcessor) -> object:
    """Segment a video as the original does."""
    pixels = processor(np.stack(list(video)))["pixel_values"]
    size = (video.height, video.width)
    return processor.post_process_video_instance_segmentation(model(pixels), target_sizes=[size])


def by_length(
    make: Callable[[], VideoMask2Former], size: tuple[int, int], lengths: Sequence[int], repeats: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Peak memory and, with repeats, seconds a frame of every mode and of the original's scheme, by length.

    Args:
        make: the model; one is accelerated, another stays plain.
        size: (height, width) of the video; the model's own preprocessing is kept where it resizes.
        lengths: of the video.
        repeats: timed calls; 0 times none.
    """
    plain, frames = make().eval(), render(*size, min(RENDERED, max(lengths)))
    processor = VideoProcessor.from_config(plain.config)
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in (*MODES, ORIGINAL)}
    with accelerated(make(), False) as fast:
        for length in lengths:
            video = RepeatedVideo(frames, length)
            functions: dict[str, Callable[[], object]] = {
                mode: partial(segment_video, fast, video, mode=mode, processor=processor) for mode in MODES
            }
            functions[ORIGINAL] = partial(original, plain, video, processor)
            seconds = measure(functions, repeats) if repeats else {}
            for name, function in functions.items():
                row: dict[str, Any] = {"peak_mb": peak_bytes(function) / 1e6}
                if repeats:
                    row["seconds_per_frame"] = [value / length for value in seconds[name]]
                found[name][str(length)] = row
                print(f"{name}, {length} frames of {size[0]}x{size[1]}: {row['peak_mb']:.0f} MB", flush=True)
    return found


def throughput(model: VideoMask2Former, windows: int, repeats: int) -> dict[str, Any]:
    """Seconds a frame of a video in windows, and of clips of a window's length each as a whole, in turns."""
    height, width = 192, 320
    frames = render(height, width, windows * WINDOW)
    clips = np.split(frames, windows)

    def wholes() -> None:
        for clip in clips:
            segment_video(model, clip, mode="whole")

    functions: dict[str, Callable[[], object]] = {
        "whole": wholes,
        "window": partial(segment_video, model, frames, mode="window"),
    }
    seconds = {name: [s / len(frames) for s in of] for name, of in measure(functions, repeats).items()}
    return {
        "seconds_per_frame": seconds,
        "ratio": median(a / b for a, b in zip(seconds["whole"], seconds["window"], strict=True)),
    }


def association(model: VideoMask2Former, windows: int, repeats: int) -> dict[str, Any]:
    """Seconds of all calls of `Tracker.link`, and of all else, for a video in windows."""
    frames = render(192, 320, windows * WINDOW)
    link, shares, linking = Tracker.link, [], []

    def timed_link(tracker: Tracker, window: Any) -> list[int]:
        start = time.perf_counter()
        ids = link(tracker, window)
        linking.append(time.perf_counter() - start)
        return ids

    with patch.object(Tracker, "link", timed_link):
        for _ in range(repeats + 1):  # the first warms up
            linking.clear()
            start = time.perf_counter()
            segment_video(model, frames, mode="window")
            shares.append(sum(linking) / (time.perf_counter() - start))
    return {"share": median(shares[1:]), "ms_per_window": 1000 * sum(linking) / len(linking)}


def resident(checkpoint: Path, frames: tuple[int, int], threads: int) -> dict[str, Any]:
    """Resident memory in a process of its own, which says it by `emit`: see `resident_here`."""
    arguments = [__file__, str(checkpoint), *map(str, frames), str(threads)]
    worker = Worker(arguments, environment())
    try:
        found: dict[str, Any] = worker.answer()
    finally:
        worker.close()
    return found


def resident_here(checkpoint: Path, frames: tuple[int, int]) -> dict[str, Any]:
    """Resident memory of this process, MB, by frame, while it segments a stream of small frames into a folder."""
    model = VideoMask2Former.from_pretrained(checkpoint)
    processor = VideoProcessor(
        replace(model.config.preprocessing, shortest_edge=2 * SMALL[0] // 3, fixed_size=None), model.config.labels
    )
    source = islice(there_and_back(render(*SMALL)), frames[1] + WINDOW)
    page, megabytes, apart = 4096, dict[str, float](), max(1, frames[0] // 10)

    def look(stage: str, done: int, _: int | None) -> None:
        if stage == "frames" and (done // WINDOW) % max(1, apart // WINDOW) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            megabytes[str(done)] = pages * page / 1e6

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        segment_to_folder(model, open_video(source), Path(folder), mode="window", processor=processor, progress=look)
    at = [
        max(value for done, value in megabytes.items() if frame - 2 * apart <= int(done) <= frame + WINDOW)
        for frame in frames
    ]
    return {
        "frames": list(frames),
        "megabytes": at,
        "growth": at[1] / at[0] - 1,
        "seconds": time.perf_counter() - start,
        "by_frame": megabytes,
    }


def measure_costs(checkpoint: Path, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """All of it, some minutes to half an hour; what has been measured is kept in a folder, and not measured again."""
    threads = torch.get_num_threads()

    def demo() -> VideoMask2Former:
        return VideoMask2Former.from_pretrained(checkpoint)

    def large() -> VideoMask2Former:
        config = VideoMask2FormerConfig.preset("swin_tiny_youtubevis_2019")
        return random_model(replace(config, preprocessing=replace(config.preprocessing, fixed_size=LARGE)), 0)

    def fast(measured: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        with accelerated(demo(), False) as model:
            return measured(model, sizes.windows, sizes.repeats)

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "throughput": partial(fast, throughput),
        "association": partial(fast, association),
        "resident": partial(resident, checkpoint, sizes.resident, threads),
        "by_length": partial(by_length, demo, (192, 320), sizes.lengths, sizes.repeats),
    }
    if sizes.large:
        parts["by_length_large"] = partial(by_length, large, LARGE, sizes.large, 0)
    return {name: _kept(folder / f"costs-{name}.json", f"{sizes}, {threads} threads", parts[name]) for name in parts}


def _kept(file: Path, of: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in a file, or is measured and put there; what was measured otherwise is measured anew."""
    if not file.exists() or (kept := read_json(file))["of"] != of:
        kept = {"of": of, "found": measured()}
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(kept))
    found: dict[str, Any] = kept["found"]
    return found


def write_costs(folder: Path, name: str, found: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Write JSON, Markdown and, with matplotlib, a plot, of that name; gives the text of the second."""
    report = {**about, **found}
    return save(folder, name, report, markdown(report), draw)


def markdown(report: Mapping[str, Any]) -> str:
    """The report to read."""
    at, speed, link = report["resident"], report["throughput"], report["association"]
    first, last = at["frames"]
    parts = [
        "# Long videos: memory and time",
        "" if report["claims"] else "**A rehearsal: the numbers mean nothing.**\n",
        "Peak memory of tensors beyond weights and pixels, and medians of seconds a frame; `original`: all frames and "
        "all queries' mask logits at once, in plain PyTorch, as the original does.\n",
        "Checkpoint, 192x320:\n",
        lengths_table(report["by_length"]),
        "",
    ]
    if "by_length_large" in report:
        parts += ["Swin-tiny, random weights, 480x864:\n", lengths_table(report["by_length_large"]), ""]
    parts += [
        table(
            ("measured", "found", "promised"),
            [
                (
                    f"resident memory of `window` into a folder, {SMALL[0]}x{SMALL[1]}: frame {last:,} over {first:,}",
                    f"{at['megabytes'][1]:.0f} over {at['megabytes'][0]:.0f} MB, {100 * at['growth']:+.1f} %",
                    f"at most {100 * MOST_GROWTH:+.0f} %",
                ),
                (
                    f"throughput of `window` over `whole` of {WINDOW} frames",
                    f"{100 * speed['ratio']:.0f} %",
                    f"at least {100 * LEAST_THROUGHPUT:.0f} %",
                ),
                (
                    "linking in the time of `window`",
                    f"{100 * link['share']:.2f} %, {link['ms_per_window']:.2f} ms a window",
                    f"under {100 * MOST_ASSOCIATION:.0f} %",
                ),
            ],
        ),
        f"\nMachine: {', '.join(f'{name} {value}' for name, value in report['machine'].items())}. "
        f"Command: `{report['command']}`",
    ]
    return "\n".join(parts) + "\n"


def lengths_table(of_modes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Memory and time of each mode by length."""
    lengths = list(next(iter(of_modes.values())))
    return table(
        ("mode", *(f"{length} frames" for length in lengths)),
        [(mode, *(cell(row.get(length)) for length in lengths)) for mode, row in of_modes.items()],
    )


def cell(row: Mapping[str, Any] | None) -> str:
    """Memory and time."""
    if row is None:
        return ""
    seconds = row.get("seconds_per_frame")
    return f"{row['peak_mb']:.0f} MB" + (f", {number(1000 * median(seconds), '.1f')} ms a frame" if seconds else "")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Memory and time against length, and resident memory against frames."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for mode, rows in report["by_length"].items():
        lengths = [int(length) for length in rows]
        axes[0].plot(lengths, [row["peak_mb"] for row in rows.values()], "o-", label=mode)
        axes[1].plot(lengths, [1000 * median(row["seconds_per_frame"]) for row in rows.values()], "o-", label=mode)
    for axis, label in ((axes[0], "peak memory of tensors, MB"), (axes[1], "ms a frame")):
        axis.set_xlabel("frames of a video, 192x320")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    at = report["resident"]["by_frame"]
    axes[2].plot([int(frame) for frame in at], list(at.values()))
    axes[2].set_xlabel(f"frame of a stream of {SMALL[0]}x{SMALL[1]}, in windows")
    axes[2].set_ylabel("resident memory, MB")
    axes[2].set_ylim(bottom=0)
    with atomic_path(path) as file:
        figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    emit(resident_here(Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))))

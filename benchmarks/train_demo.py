"""Train the demo checkpoint, put it into the package, and measure it on the synthetic benchmark.

    python benchmarks/train_demo.py --output runs/demo

Three runs of `m2f-video train` on the medium training videos: the preset `demo` on frames of 96x160, where a step is
cheap, then two on frames of 128x213 that begin with the weights of the one before. Stopped, the command goes on where
it was; what is done already is not done again. The weights are stored in float16, which halves the package; loading
casts them back. Measured are the 100 test videos of each difficulty, which no run has seen.
"""

import json
import shlex
import sys
from pathlib import Path
from time import time

import torch
import tyro

from m2f_video.benchmark import machine
from m2f_video.cli import main as cli
from m2f_video.files import atomic_path
from m2f_video.hub import DEMO_FOLDER
from m2f_video.modeling.video_mask2former import VideoMask2Former

STAGES = {
    "stage1": "--preset demo --data synthetic --validation none --augment.shortest-edges 96 --steps 5000 "
    "--checkpoint-every 250",
    "stage2": "--preset demo --data synthetic --validation none --augment.shortest-edges 128 --steps 1200 "
    "--checkpoint-every 100 --optim.learning-rate 5e-4 --optim.warmup-steps 50 --init {output}/stage1/final",
    "stage3": "--preset demo --data synthetic --validation none --augment.shortest-edges 128 --steps 4800 --seed 1 "
    "--checkpoint-every 200 --optim.learning-rate 5e-4 --optim.warmup-steps 100 --init {output}/stage2/final",
}
LAST = list(STAGES)[-1]
DIFFICULTIES = ("easy", "medium", "hard")


def main(output: Path, results: Path = Path("benchmarks/results/demo.json"), threads: int = 1) -> None:
    """Train, store and measure.

    Args:
        output: folder of the runs.
        results: JSON file for commands, seconds, machine and metrics.
        threads: of PyTorch; another number rounds otherwise, and so trains other weights.
    """
    torch.set_num_threads(threads)
    commands = {}
    for name, flags in STAGES.items():
        command = f"train {flags.format(output=output)} --output {output / name}"
        commands[name] = f"m2f-video {command}"
        run(f"{command} --resume")
    VideoMask2Former.from_pretrained(output / LAST / "final", dtype="float16").save_pretrained(DEMO_FOLDER)
    (DEMO_FOLDER / "README.md").unlink()  # the hub's model card

    metrics = {}
    for difficulty in DIFFICULTIES:
        report = output / f"{difficulty}.json"
        folder = output / f"eval_{difficulty}"
        run(f"eval --data synthetic:{difficulty} --checkpoint demo --output {folder} --json {report}")
        numbers = json.loads(report.read_text())
        metrics[difficulty] = {name: value for name, value in numbers.items() if name != "per_category"}
    summary = {
        "commands": commands,
        "threads": threads,
        "seconds": {name: training_seconds(output / name / "log.csv") for name in STAGES},
        "machine": machine(),
        "metrics on 100 test videos": metrics,
    }
    with atomic_path(results) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")


def run(command: str) -> None:
    """Run a command of m2f-video in this process."""
    started = time()
    print(f"$ m2f-video {command}", flush=True)
    if code := cli.main(shlex.split(command)):
        sys.exit(code)
    print(f"({time() - started:.0f} s)", flush=True)


def training_seconds(log: Path) -> float:
    """Seconds that all steps of a run took together."""
    rows = log.read_text().splitlines()
    column = rows[0].split(",").index("seconds")
    return sum(float(row.split(",")[column]) for row in rows[1:])


if __name__ == "__main__":
    tyro.cli(main)

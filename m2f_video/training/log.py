"""What a run tells while it goes: lines on the console, CSV files, TensorBoard."""

import csv
import io
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from m2f_video.distributed import Worker
from m2f_video.files import atomic_path

STEPS_FILE, EVALUATIONS_FILE = "log.csv", "evaluation.csv"


class TrainingLog:
    """The log of a run; only the main worker writes one.

    `log.csv` has a row per step, `evaluation.csv` one per evaluation. A resumed run goes on with the rows up to the
    step it resumes from, so that no step is in them twice.

    Args:
        output: folder of the run.
        worker: this process.
        num_steps: of the run.
        first_step: steps done before.
        every: steps between lines on the console; a line shows averages over them.
        tensorboard: write TensorBoard's event files to `output/tensorboard` too.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, output: Path, worker: Worker, num_steps: int, first_step: int, every: int, tensorboard: bool = False
    ) -> None:
        self.output = output
        self.enabled = worker.is_main
        self.num_steps = num_steps
        self.every = every
        self._recent: list[Mapping[str, float]] = []
        self._writer: Any = None
        if not self.enabled:
            return
        for name in (STEPS_FILE, EVALUATIONS_FILE):
            _keep_rows(output / name, first_step)
        if tensorboard:
            self._writer = _summary_writer(output / "tensorboard", first_step)

    def say(self, text: str) -> None:
        """Print a line, from the main worker alone."""
        if self.enabled:
            print(text, flush=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step, counted from 1; `values` holds `loss`, `seconds` and what else there is, always the same."""
        if not self.enabled:
            return
        _append_row(self.output / STEPS_FILE, {"step": step, **values})
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)
        self._recent.append(values)
        if step % self.every == 0 or step == self.num_steps:
            self._print(step)

    def evaluation(self, step: int, stats: Mapping[str, float]) -> None:
        """Log an evaluation after a step; numbers are fractions, -1 where there is nothing to measure by."""
        if not self.enabled:
            return
        _append_row(self.output / EVALUATIONS_FILE, {"step": step, **stats})
        if self._writer is not None:
            for name, value in stats.items():
                self._writer.add_scalar(f"evaluation/{name}", value, step)
        shown = "  ".join(f"{name} {100 * stats[name]:.1f}" for name in ("AP", "AP50", "AP75", "AR10"))
        self.say(f"evaluation after step {step}:  {shown}")

    def close(self) -> None:
        """Write out what is still in memory."""
        if self._writer is not None:
            self._writer.close()

    def _print(self, step: int) -> None:
        mean = {name: sum(row[name] for row in self._recent) / len(self._recent) for name in self._recent[0]}
        self._recent.clear()
        seconds, rate, norm = mean.pop("seconds"), mean.pop("learning_rate"), mean.pop("grad_norm")
        losses = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in mean.items())
        left = timedelta(seconds=round(seconds * (self.num_steps - step)))
        memory = f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_initialized() else ""
        print(
            f"step {step}/{self.num_steps}  {losses}  lr {rate:.2e}  gradient {norm:.1f}  "
            f"{seconds:.2f} s/step  {left} left{memory}",
            flush=True,
        )
        if self._writer is not None:
            self._writer.flush()  # so that a killed run has lost no more than its last lines


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed: pip install 'm2f-video[train]'") from error
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row in one write; the first brings the header along."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    writer.writerow(row)
    with path.open("a", encoding="utf-8") as file:
        file.write(text.getvalue())


def _keep_rows(path: Path, last_step: int) -> None:
    """Keep the header and the rows up to a step; a line cut short by a kill or a full disk is one of those that go."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = lines[:1] + [row for row in lines[1:] if int(row.split(",", 1)[0]) <= last_step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")

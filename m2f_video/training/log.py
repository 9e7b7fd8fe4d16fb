"""What a run tells while it goes: lines on the console, CSV files, TensorBoard."""

import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from m2f_video.distributed import Worker
from m2f_video.evaluation.video_ap import STATS
from m2f_video.files import atomic_path, check_regular, naming

STEPS_FILE, EVALUATIONS_FILE, TENSORBOARD_FOLDER = "log.csv", "evaluation.csv", "tensorboard"
LOGGED_PARTS = ("loss_ce", "loss_mask", "loss_dice")
"""Of the final prediction; `loss` is the sum over all depths."""
_COLUMNS = {
    STEPS_FILE: ("step", "loss", *LOGGED_PARTS, "learning_rate", "grad_norm", "seconds"),
    EVALUATIONS_FILE: ("step", *STATS),
}


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
        ValueError: a file to go on with is no such log.
        OSError: files cannot be read or written.
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
        for name, columns in _COLUMNS.items():
            _keep_rows(output / name, columns, first_step)
        if tensorboard:
            with naming(output / TENSORBOARD_FOLDER):
                self._writer = _summary_writer(output / TENSORBOARD_FOLDER, first_step)

    def say(self, text: str) -> None:
        """Print a line, from the main worker alone."""
        if self.enabled:
            with naming("standard output"):
                print(text, flush=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step, counted from 1: a value for each column of `log.csv` but the first."""
        if not self.enabled:
            return
        self._record(STEPS_FILE, "train", step, values)
        self._recent.append(values)
        if step % self.every == 0 or step == self.num_steps:
            self._print(step)
            self._tensorboard("flush")  # a killed run has lost no more than its last lines

    def evaluation(self, step: int, stats: Mapping[str, float]) -> None:
        """Log an evaluation after a step; numbers are fractions, -1 where there is nothing to measure by."""
        if not self.enabled:
            return
        self._record(EVALUATIONS_FILE, "evaluation", step, stats)
        shown = "  ".join(f"{name} {100 * stats[name]:.1f}" for name in ("AP", "AP50", "AP75", "AR10"))
        self.say(f"evaluation after step {step}:  {shown}")

    def close(self) -> None:
        """Write out what is still in memory."""
        self._tensorboard("close")

    def _record(self, name: str, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add a row to a file in one write; the first brings the header along."""
        path, (_, *columns) = self.output / name, _COLUMNS[name]
        header = "" if path.exists() and path.stat().st_size else f"{','.join(_COLUMNS[name])}\n"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(f"{header}{step},{','.join(str(values[column]) for column in columns)}\n")
        for column in columns:
            self._tensorboard("add_scalar", f"{kind}/{column}", values[column], step)

    def _tensorboard(self, method: str, *arguments: object) -> None:
        if self._writer is not None:
            with naming(self.output / TENSORBOARD_FOLDER):
                getattr(self._writer, method)(*arguments)

    def _print(self, step: int) -> None:
        mean = {name: sum(row[name] for row in self._recent) / len(self._recent) for name in self._recent[0]}
        self._recent.clear()
        seconds, rate, norm = mean.pop("seconds"), mean.pop("learning_rate"), mean.pop("grad_norm")
        losses = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in mean.items())
        left = timedelta(seconds=round(seconds * (self.num_steps - step)))
        memory = f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_initialized() else ""
        self.say(
            f"step {step}/{self.num_steps}  {losses}  lr {rate:.2e}  gradient {norm:.1f}  "
            f"{seconds:.2f} s/step  {left} left{memory}"
        )


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed: pip install 'm2f-video[train]'") from error
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _keep_rows(path: Path, columns: Sequence[str], last_step: int) -> None:
    """Keep the header and the rows up to a step; a line cut short by a kill or a full disk is one of those that go.

    So do rows that are damaged, with a warning.
    """
    if not path.exists():
        return
    check_regular(path)
    *lines, _ = path.read_bytes().decode(errors="replace").split("\n")
    if lines[:1] not in ([], [",".join(columns)]):
        raise ValueError(f"{path} is no log to go on with, as its columns are not {','.join(columns)}; move it away")
    rows = [(line, _step(line, len(columns))) for line in lines[1:]]
    if damaged := sum(step is None for _, step in rows):
        warnings.warn(f"{path}: {damaged} damaged lines are left out", stacklevel=2)
    kept = lines[:1] + [line for line, step in rows if step is not None and step <= last_step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str, width: int) -> int | None:
    """Which step a row of so many numbers is of; None where it is damaged."""
    try:
        step, *values = line.split(",")
        number, _ = int(step), [float(value) for value in values]
    except ValueError:
        return None
    return number if len(values) == width - 1 else None

"""Three recorded steps of the tiny run: a change of what is learned shows here, wherever it comes from.

`python -m tests.training.test_train_trace` records them anew, where such a change is meant.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from m2f_video.training import Trainer
from tests.golden_files import GOLDEN
from tests.training.tiny_run import CONFIG, VIDEOS

FILE = GOLDEN / "train_step" / "trace.json"
STEPS = 3


def trace(output: Path) -> list[dict[str, float]]:
    """Every part of the loss at each step."""
    made = Trainer(CONFIG.replace(steps=STEPS), VIDEOS, output)
    steps: list[dict[str, float]] = []
    loss = made.loss

    def recorded(*arguments: object) -> object:
        result = loss(*arguments)
        steps.append({name: float(part.detach()) for name, part in result.parts.items()})
        return result

    made.loss = recorded
    made.train()
    return steps


def test_steps_are_the_recorded_ones(tmp_path: Path) -> None:
    expected = json.loads(FILE.read_text())["steps"]
    found = trace(tmp_path)
    assert len(found) == len(expected) == STEPS
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps({"torch": torch.__version__, "steps": trace(Path(folder))}, indent=1) + "\n")

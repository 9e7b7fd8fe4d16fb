"""Damaged files of every kind give results or one clear error: no traceback, crash, hang or hunger for memory."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutations import mutate_bytes, mutate_json
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]


def fuzz(seed: int, count: int, seconds: float, *targets: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz.worker", str(seed), str(count), str(seconds), *targets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    lines = done.stdout.splitlines()
    last = max((number for number, line in enumerate(lines) if ", mutant " in line), default=0)
    what = "\n".join(lines[last:]) + f"\n{done.stderr[-2000:]}"
    assert done.returncode == 0, f"exit code {done.returncode} at {what}"
    assert lines[-1] == "done"
    assert all(f"{target}, mutant 9 of seed {seed}" in lines for target in targets)


@pytest.mark.slow
def test_some_mutants() -> None:
    fuzz(1, 12, 20, *TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_mutants(target: str) -> None:
    fuzz(2, 10**6, 60 / len(TARGETS), target)


def test_mutants_depend_on_the_seed_alone() -> None:
    def mutants(seed: int) -> list[bytes]:
        rng = random.Random(seed)  # noqa: S311
        return [mutate_json({"a": [1, {"b": "c"}], "d": None}, rng) for _ in range(50)] + [
            mutate_bytes(bytes(range(200)), rng) for _ in range(50)
        ]

    assert mutants(3) == mutants(3)
    assert mutants(3) != mutants(4)
    assert len(set(mutants(3))) > 60

"""What several benchmarks need: processes that are told when to run, and made-up work.

Nothing but the standard library is imported at the top, so that `gpu.py` starts on a machine that lacks the rest.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "RESULT "
"""Begins the lines by which a process says what it found; the rest is JSON. All others are shown."""


def emit(value: object) -> None:
    """Say what was found to the process that started this one."""
    print(MARK + json.dumps(value), flush=True)


def environment(tree: Path = ROOT, **more: str) -> dict[str, str]:
    """This process's, for one that imports from a tree."""
    paths = (str(tree), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


class WorkerError(RuntimeError):
    """A process ended, or said nothing in time."""


class Worker:
    """A process that does something each time it is told to, and says by `emit` when it is ready and what it found.

    It ends with the process that made it, whose group it is in, or by `close`.

    Args:
        arguments: of this interpreter.
        variables: environment of the process.
        folder: where it runs.
        cores: that it may use; all, where None.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        folder: Path = ROOT,
        cores: Sequence[int] | None = None,
    ) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, *arguments],
            cwd=folder,
            env=dict(variables),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if cores is not None:
            os.sched_setaffinity(self._process.pid, cores)  # before it has other threads
        self._found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._found.put(line.removeprefix(MARK))
            else:
                print(line, end="", flush=True)
        self._found.put(None)

    def tell(self) -> None:
        """To do it once."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def answer(self, seconds: float | None = None) -> Any:
        """What it says next, waited for; None where it has said nothing when the time is over.

        Raises:
            WorkerError: it says nothing any more.
        """
        try:
            line = self._found.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            raise WorkerError(f"ended with exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def orders() -> Any:
    """What the other side of `Worker.tell` iterates over."""
    return sys.stdin


def box_target(instances: int, classes: int, size: tuple[int, int, int]) -> Any:
    """A training target: boxes with a quarter of the frames' sides, somewhere in each frame; `size` is (T, H, W)."""
    import torch

    from m2f_video.training import ClipTarget

    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(instances, *size, dtype=torch.bool)
    for frame in masks.flatten(0, 1):
        top, left = (0.75 * torch.rand(2, generator=generator) * torch.tensor(size[1:])).int().tolist()
        frame[top : top + size[1] // 4, left : left + size[2] // 4] = True
    return ClipTarget(torch.randint(classes, (instances,), generator=generator), masks)


def timed(function: Any, *, synchronize: Any = None) -> float:
    """Seconds of a call; `synchronize` waits for a device."""
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    function()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - start

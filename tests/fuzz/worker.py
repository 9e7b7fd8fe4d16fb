"""Reads mutants in a process of its own, which ends where one of them crashes, hangs, or takes too much memory.

    python -m tests.fuzz.worker SEED COUNT SECONDS TARGET...

reads mutants of each target, up to so many or for so long; prints a line before each, and at last "done". What a
mutant was is copied to the folder M2F_VIDEO_FUZZ_KEEP where that is named.
"""

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from m2f_video.acceleration.cpu_kernels import KernelError
from tests.fuzz.targets import TARGETS

EXPECTED = (ValueError, OSError, ImportError, KernelError)
"""What the command line makes one line of."""
LONGEST = 10  # seconds for a mutant
MOST_MEMORY = 2 * 2**30
ADDRESSES = 12 * 2**30  # a guard of the machine: what is reserved and not touched counts too


def main(seed: int, count: int, seconds: float, targets: list[str]) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    for target in targets:
        with tempfile.TemporaryDirectory() as name:
            base, place = Path(name) / "base", Path(name) / "mutant"
            base.mkdir()
            end = time.monotonic() + seconds
            mutants = TARGETS[target](base, random.Random(seed))  # noqa: S311
            for number, read in enumerate(islice(mutants, count)):
                if time.monotonic() > end:
                    break
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                print(f"{target}, mutant {number} of seed {seed}", flush=True)
                signal.alarm(LONGEST)
                fault = _fault(lambda read=read, place=place: read(place))
                signal.alarm(0)
                if fault is not None:
                    print(fault)
                    if folder := os.environ.get("M2F_VIDEO_FUZZ_KEEP"):
                        shutil.copytree(place, folder, dirs_exist_ok=True)
                    return 1
    print("done")
    return 0


def _fault(read: Callable[[], object]) -> str | None:
    """What is wrong with how a mutant was read."""
    try:
        read()
    except EXPECTED as error:
        if not str(error).strip():
            return f"the message is empty: {error!r}"
        if "weights_only" in str(error) or "Weights only" in str(error):
            return f"the message is PyTorch's own, which advises to load unsafely: {error}"
    except Exception:  # noqa: BLE001  # any other is what is looked for
        return traceback.format_exc()
    # what getrusage tells begins with the most of the process that started this one
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return None if peak < MOST_MEMORY else f"it took {peak / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))

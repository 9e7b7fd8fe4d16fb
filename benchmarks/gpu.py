"""Is this ready for the GPU here? Tests, kernels, speed, training, memory and compiling, each with a deadline.

    make gpu            (or: python3 benchmarks/gpu.py)

Needs torch, torchvision, timm, safetensors, huggingface_hub, numpy, scipy, triton, pytest and hypothesis, transformers
where it is to be compared with, and nothing else of what the package needs. Every part (`gpu_parts.py`) runs in
processes of its own, ended with all they have started at its deadline; what they found until then is kept, and a part
that fails stops no other. After every part writes benchmarks/results/gpu_<name>.json and a table beside it. All takes 8
minutes at most; what the other parts leave of them is for compiling. Exit code 1: a part failed; 2: there is no GPU.

`--rehearse` does all of it on a CPU, at tiny sizes, with Triton's interpreter, and without the libraries that need not
be there.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import MARK, ROOT, environment

RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = ROOT / "benchmarks" / "gpu_parts.py"
PARTS = {
    "tests": 100, "kernels": 65, "speed": 50, "training": 50, "memory": 25, "transformers": 40, "compiled": 110,
}  # fmt: skip
"""Seconds for each; `compiled` also gets what is left of ALL."""
MACHINE, ALL = 40, 465
REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny, by Triton's interpreter")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, help="folder of the results; a rehearsal's are not kept without it")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part in progress, too

    folder = options.output or (None if options.rehearse else RESULTS)
    slack = 5 if options.rehearse else 1  # for cores that others use too
    start = time.monotonic()
    status, rows, _ = run_part("machine", slack * MACHINE, options.rehearse)
    if status != "done":
        print("there is no CUDA device that PyTorch can use; --rehearse does all on a CPU", file=sys.stderr)
        return 2
    report: Row = {"machine": rows[0], "parts": {}, "rows": [], "output": {}}
    for part in options.part or PARTS:
        left, most = slack * ALL - (time.monotonic() - start), slack * PARTS[part]
        seconds = max(most, left) if part == "compiled" else min(most, left)
        status, rows, output = run_part(part, seconds, options.rehearse)
        report["parts"][part] = status
        report["rows"] += [{"part": part, **row} for row in rows]
        if status != "done":
            report["output"][part] = output
            report["parts"][part] += f": {output[-1]}" if output else ""
        if folder is not None:
            write(report, folder)
    print("\n" + markdown(report))
    failed = [part for part, status in report["parts"].items() if status != "done"]
    if failed:
        print(f"did not pass: {', '.join(failed)}")
    elif not options.rehearse and not options.part:
        capability = tuple(report["machine"]["capability"])
        print(f"all passed: `auto` may take triton here with {capability} in m2f_video/ops/triton_verified.py")
    return 1 if failed else 0


def run_part(part: str, seconds: float, rehearse: bool) -> tuple[str, list[Row], list[str]]:
    """Run one, the tests by several processes at once, as most of their time is compiling.

    Returns:
        How it ended, what it found until then, and the last lines it printed beside that.
    """
    count = max(2, min(8, (os.cpu_count() or 1) // 2)) if part == "tests" else 1
    command = [sys.executable, str(SCRIPT), part, f"--seconds={seconds}", *["--rehearse"] * rehearse]
    variables = environment(**(REHEARSAL if rehearse else {}))
    print(f"== {part}, at most {seconds:.0f} s", flush=True)
    start, rows, output = time.monotonic(), list[Row](), deque[str](maxlen=60)
    processes = [
        subprocess.Popen(  # noqa: S603
            [*command, f"--shard={index}/{count}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", cwd=ROOT, env=variables, start_new_session=True,
        )
        for index in range(count)
    ]  # fmt: skip
    listeners = [threading.Thread(target=_listen, args=(process, rows, output), daemon=True) for process in processes]
    try:
        for listener in listeners:
            listener.start()
        codes = [process.wait(max(0.0, start + seconds - time.monotonic())) for process in processes]
        status = f"failed with exit code {max(codes, key=abs)}" if any(codes) else "done"
    except subprocess.TimeoutExpired:
        status = f"stopped at its deadline of {seconds:.0f} s"
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has left behind
            process.wait()
    for listener in listeners:
        listener.join(5)
    print(f"== {part}: {status} after {time.monotonic() - start:.0f} s", flush=True)
    return status, list(rows), list(output)


def _listen(process: subprocess.Popen[str], rows: list[Row], output: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            rows.append(json.loads(line.removeprefix(MARK)))
            line = "  " + ", ".join(f"{name} {_cell(value)}" for name, value in rows[-1].items()) + "\n"
        else:
            output.append(line.rstrip("\n"))
        print(line, end="", flush=True)


def write(report: Row, folder: Path) -> None:
    """The report, as JSON and as tables, in files named by the device."""
    name = re.sub(r"\W+", "_", report["machine"]["device"]).strip("_").lower()
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(report, indent=1) + "\n"), ("md", markdown(report))):
        half = folder / f"gpu_{name}.{suffix}.half"
        half.write_text(text, encoding="utf-8")
        half.replace(half.with_suffix(""))


def markdown(report: Row) -> str:
    """The report as tables; tests that passed are only counted."""
    lines = ["# " + ", ".join(f"{key} {value}" for key, value in report["machine"].items()), ""]
    lines += [f"- {part}: {status}" for part, status in report["parts"].items()]
    for part in report["parts"]:
        rows = [{k: v for k, v in row.items() if k != "part"} for row in report["rows"] if row["part"] == part]
        if part == "tests":
            passed = sum(row["outcome"] == "passed" for row in rows)
            lines += ["", f"{passed} of {len(rows)} tests passed."]
            rows = [row for row in rows if row["outcome"] != "passed"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            lines += ["", f"## {part}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())

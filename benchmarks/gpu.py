"""Is this ready for the GPU here? Tests, kernels, speed, training and memory, each with a deadline, in one command.

    make gpu            (or: python3 benchmarks/gpu.py)

Needs torch, torchvision, timm, safetensors, huggingface_hub, numpy, scipy, triton and pytest; transformers where it is
to be compared with. Every part is a process of its own, ended at its deadline; what it measured until then is kept, and
a part that fails stops no other. Writes benchmarks/results/gpu_<name>.json and a table beside it, after every part.

`--rehearse` does all of it on a CPU, at tiny sizes, with Triton's interpreter.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEADLINES = {"tests": 120, "kernels": 90, "speed": 120, "compiled": 100, "training": 50}  # seconds
MARK = "RESULT "
Row = dict[str, Any]


def main() -> int:
    """Run all parts, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny, by Triton's interpreter")
    parser.add_argument("--part", choices=DEADLINES, action="append", help="only this one; may be repeated")
    parser.add_argument("--inside", choices=DEADLINES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.inside:
        for row in PARTS[options.inside](options.rehearse):
            print(MARK + json.dumps(row), flush=True)
        return 0
    report: Row = {"machine": _machine(options.rehearse), "parts": {}, "rows": []}
    name = re.sub(r"\W+", "_", report["machine"]["device"]).strip("_").lower()
    for part in options.part or DEADLINES:
        status, rows = _run(part, options.rehearse)
        report["parts"][part] = status
        report["rows"] += [{"part": part, **row} for row in rows]
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"gpu_{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.output / f"gpu_{name}.md").write_text(_markdown(report), encoding="utf-8")
    failed = [part for part, status in report["parts"].items() if status != "done"]
    print("\n" + _markdown(report))
    if not failed and not options.rehearse:
        major, minor = report["machine"]["capability"]
        print(f"all passed on compute capability {major}.{minor}")
    return 1 if failed else 0


def _run(part: str, rehearse: bool) -> tuple[str, list[Row]]:
    """A part in a process of its own: how it ended, and what it gave until then."""
    command = [sys.executable, __file__, "--inside", part, *(["--rehearse"] if rehearse else [])]
    environment = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
        | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    )
    print(f"== {part}, at most {DEADLINES[part]} s", flush=True)
    rows, start = [], time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:  # noqa: S603
        assert process.stdout is not None
        killer = subprocess.Popen(  # noqa: S603  # a part that hangs writes no line to wake up for
            [sys.executable, "-c", f"import time, os; time.sleep({DEADLINES[part]}); os.kill({process.pid}, 9)"]
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(MARK):
                rows.append(json.loads(line.removeprefix(MARK)))
        code = process.wait()
        killer.kill()
        killer.wait()
    seconds = time.monotonic() - start
    if code == -9:
        return f"stopped at its deadline of {DEADLINES[part]} s", rows
    print(f"== {part}: {'done' if code == 0 else f'failed ({code})'} in {seconds:.0f} s", flush=True)
    return "done" if code == 0 else f"failed with {code}", rows


def _machine(rehearse: bool) -> Row:
    import torch

    machine: Row = {"device": "rehearsal", "torch": torch.__version__}
    if not rehearse:
        properties = torch.cuda.get_device_properties(0)
        machine |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        machine |= {"capability": list(torch.cuda.get_device_capability(0)), "cuda": torch.version.cuda}
    return machine


def _markdown(report: Row) -> str:
    lines = ["# " + ", ".join(f"{key} {value}" for key, value in report["machine"].items()), ""]
    lines += [f"- {part}: {status}" for part, status in report["parts"].items()]
    for part in report["parts"]:
        rows = [{k: v for k, v in row.items() if k != "part"} for row in report["rows"] if row["part"] == part]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            lines += ["", f"## {part}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def seconds_of(function: Callable[..., object], *args: object, device: str, **kwargs: object) -> float:
    """Median seconds of ten calls, after three that warm up; of one call where it is rehearsed on a CPU."""
    import torch

    times = []
    for repeat in range(4 if device == "cpu" else 13):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(*args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def tests(rehearse: bool) -> Iterator[Row]:
    """The tests marked gpu, and those of Triton's kernels."""
    import pytest

    mark = "not gpu and not slow" if rehearse else "not network"
    args = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", mark, "tests/ops/test_triton.py"]
    code = pytest.main([*args, *(["-k", "available or refuses"] if rehearse else [])])
    yield {"tests": "passed" if code == 0 else f"pytest ended with {int(code)}"}
    if code:
        sys.exit(int(code))


def kernels(rehearse: bool) -> Iterator[Row]:
    """Deformable attention forward and backward by Triton: error, time, and share of what copying memory reaches."""
    import torch

    from m2f_video.ops import ms_deform_attn

    device = "cpu" if rehearse else "cuda"
    shapes = ((1, 2), (2, 2)) if rehearse else ((15, 27), (30, 54), (60, 108))
    heads, dim, points, levels = 8, 32, 4, len(shapes)
    tokens = sum(height * width for height, width in shapes)
    big = torch.empty(2**16 if rehearse else 2**28, device=device)
    bandwidth = 2 * big.nbytes / seconds_of(big.clone, device=device)
    yield {"what": "copying memory", "GB/s": round(bandwidth / 1e9)}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for batch in (1,) if rehearse else (1, 8):
            generator = torch.Generator(device).manual_seed(0)
            made: dict[str, Any] = {"generator": generator, "device": device}
            value = torch.randn(batch, tokens, heads, dim, **made).to(dtype).requires_grad_()
            locations = torch.rand(batch, tokens, heads, levels, points, 2, **made).requires_grad_()
            weights = torch.rand(batch, tokens, heads, levels, points, **made).to(dtype).requires_grad_()
            inputs = (value, locations, weights)
            outputs, grads = {}, {}
            for backend in ("triton", "reference"):
                output = ms_deform_attn(value, shapes, locations, weights, backend)
                outputs[backend] = output.detach()
                grads[backend] = torch.autograd.grad(output.float().square().sum(), inputs)
            error = _error(outputs["triton"], outputs["reference"])
            worst = max(_error(*pair) for pair in zip(grads["triton"], grads["reference"], strict=True))
            row: Row = {"what": "deformable attention", "dtype": str(dtype)[6:], "T": batch}
            row |= {"error": f"{error:.1e}", "gradients' error": f"{worst:.1e}"}
            limit = 1e-4 if dtype == torch.float32 else 3e-2
            forward = sum(tensor.nbytes for tensor in (*inputs, outputs["triton"]))
            for backend in ("triton", "reference"):
                with torch.no_grad():
                    seconds = seconds_of(ms_deform_attn, value, shapes, locations, weights, backend, device=device)
                row[f"{backend} ms"] = round(1e3 * seconds, 3)
                if backend == "triton":
                    row["of bandwidth"] = f"{100 * forward / seconds / bandwidth:.0f} %"
                output = ms_deform_attn(value, shapes, locations, weights, backend)
                grad = torch.ones_like(output)
                options = {"retain_graph": True, "device": device}
                seconds = seconds_of(torch.autograd.grad, output, inputs, grad, **options)
                row[f"{backend} backward ms"] = round(1e3 * seconds, 3)
                if backend == "triton":
                    moved = 2 * sum(tensor.nbytes for tensor in inputs) + grad.nbytes
                    row["backward of bandwidth"] = f"{100 * moved / seconds / bandwidth:.0f} %"
            yield row
            if error > limit or worst > limit:
                sys.exit(f"Triton's results are off by {max(error, worst):.1e}, more than {limit:.0e}")


def _error(ours: Any, theirs: Any) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _build(rehearse: bool) -> tuple[Any, tuple[int, int], str]:
    from m2f_video.config import VideoMask2FormerConfig
    from m2f_video.parity import random_model

    config = VideoMask2FormerConfig.preset("swin_tiny_youtubevis_2019")
    return random_model(config, 0), (64, 96) if rehearse else (480, 864), "cpu" if rehearse else "cuda"


def _cases(rehearse: bool) -> list[tuple[str, int]]:
    return [("float32", 1)] if rehearse else [("bfloat16", 8), ("bfloat16", 1), ("float32", 8), ("float32", 1)]


def speed(rehearse: bool) -> Iterator[Row]:
    """The model as it is written, by both ways of sampling, and transformers' image model on the same frames."""
    import torch

    from m2f_video.ops import BACKEND_VARIABLE

    model, size, device = _build(rehearse)
    for dtype, frames in _cases(rehearse):
        ours = model.to(device, getattr(torch, dtype))
        pixels = torch.randn(1, frames, 3, *size, device=device, dtype=getattr(torch, dtype))
        for backend in ("reference", "embedding_bag") if rehearse else ("triton", "reference"):
            os.environ[BACKEND_VARIABLE] = backend
            yield _timed({"model": f"eager, {backend}", "dtype": dtype, "T": frames}, device, ours, pixels)
    os.environ.pop(BACKEND_VARIABLE, None)
    try:
        from m2f_video.parity import transformers_model

        theirs = transformers_model(model.float().cpu())
    except ImportError as error:
        yield {"model": f"transformers: not measured, {error}"}
        return
    for dtype, frames in _cases(rehearse):
        moved = theirs.to(device, getattr(torch, dtype))
        pixels = torch.randn(frames, 3, *size, device=device, dtype=getattr(torch, dtype))
        yield _timed({"model": "transformers eager", "dtype": dtype, "T": frames}, device, moved, pixel_values=pixels)


def compiled(rehearse: bool) -> Iterator[Row]:
    """The same by `torch.compile`, as many cases as there is time for."""
    import torch

    from m2f_video.ops import BACKEND_VARIABLE

    if not rehearse:
        os.environ[BACKEND_VARIABLE] = "triton"
    for dtype, frames in _cases(rehearse):
        model, size, device = _build(rehearse)
        ours = model.to(device).prepare_for_inference(dtype=dtype, compile="none" if rehearse else "model")
        pixels = torch.randn(1, frames, 3, *size, device=device, dtype=getattr(torch, dtype))
        start = time.perf_counter()
        with torch.inference_mode():
            ours(pixels)
        seconds = round(time.perf_counter() - start)
        row = {"model": "compiled, triton", "dtype": dtype, "T": frames, "compiling s": seconds}
        yield _timed(row, device, ours, pixels)


def training(rehearse: bool) -> Iterator[Row]:
    """A training step on one clip of two frames: forward, loss, backward and optimiser."""
    import torch

    from m2f_video.ops import BACKEND_VARIABLE

    model, size, device = _build(rehearse)
    model = model.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    pixels = torch.randn(1, 2, 3, *size, device=device)

    def step() -> None:
        optimizer.zero_grad()
        predictions = model(pixels, output_auxiliary=True).auxiliary
        parts = [logits for p in predictions for logits in (p.class_queries_logits, p.masks_queries_logits)]
        torch.stack([logits.square().mean() for logits in parts]).sum().backward()
        optimizer.step()

    for backend in ("embedding_bag",) if rehearse else ("triton", "reference"):
        os.environ[BACKEND_VARIABLE] = backend
        yield _timed({"model": f"training step, {backend}", "dtype": "float32", "T": 2}, device, step, learns=True)


def _timed(
    row: Row, device: str, function: Callable[..., object], *args: object, learns: bool = False, **kw: object
) -> Row:
    """A row with milliseconds a frame, and the most memory a call takes beside what is there before it."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.inference_mode(not learns):
        seconds = seconds_of(function, *args, device=device, **kw)
    row["ms a frame"] = round(1e3 * seconds / row["T"], 2)
    if device == "cuda":
        row["peak MB a frame"] = round((torch.cuda.max_memory_allocated() - before) / 1e6 / row["T"])
    return row


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "tests": tests,
    "kernels": kernels,
    "speed": speed,
    "compiled": compiled,
    "training": training,
}

if __name__ == "__main__":
    sys.exit(main())

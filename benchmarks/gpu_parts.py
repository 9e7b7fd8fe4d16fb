"""The parts of `gpu.py`: each runs in a process of its own and says what it finds as it finds it."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from common import ROOT, Worker, WorkerError, box_target, emit, environment, orders, timed

CASES = [("bfloat16", 8), ("bfloat16", 1), ("float32", 8), ("float32", 1)]
"""Of the speed table, dtype and T, by how much they matter."""
NOT_THERE = ("av", "pycocotools", "rich", "tyro")
"""Libraries that need not be installed; a rehearsal does without them."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a part is told: whether it only rehearses, how many seconds it has, and which of how many it is."""

    rehearse: bool
    seconds: float
    shard: tuple[int, int]

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of frames."""
        return (32, 64) if self.rehearse else (480, 864)

    @property
    def cases(self) -> list[tuple[str, int]]:
        """Dtypes and T, in order."""
        return [("bfloat16", 2)] if self.rehearse else CASES

    @property
    def backends(self) -> tuple[str, ...]:
        """Of deformable attention."""
        return ("embedding_bag", "reference") if self.rehearse else ("triton", "reference")

    def model(self) -> Any:
        """Ours, with random weights."""
        from m2f_video.config import SwinConfig, VideoMask2FormerConfig
        from m2f_video.parity import random_model

        config = VideoMask2FormerConfig.preset("swin_tiny_youtubevis_2019")
        if self.rehearse:
            small = SwinConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4)
            pixel_decoder = replace(config.pixel_decoder, num_layers=1)
            decoder = replace(config.transformer_decoder, num_layers=3, num_queries=10)
            config = config.replace(backbone=small, pixel_decoder=pixel_decoder, transformer_decoder=decoder)
        return random_model(config, 0)

    def pixels(self, *shape: int, dtype: Any = None) -> Any:
        """Random frames."""
        import torch

        return torch.randn(*shape, 3, *self.size, device=self.device, dtype=dtype)

    def measure(self, row: Row, function: Callable[[], object]) -> None:
        """Emit a row with milliseconds a frame, and the most memory a call takes beside what is there before it."""
        import torch

        from m2f_video.benchmark import peak_bytes

        synchronize = None if self.rehearse else torch.cuda.synchronize
        for _ in range(1 if self.rehearse else 3):
            function()
        times = [timed(function, synchronize=synchronize) for _ in range(1 if self.rehearse else 10)]
        row["ms a frame"] = 1e3 * statistics.median(times) / row["T"]
        row["peak MB a frame"] = peak_bytes(function, self.device) / 1e6 / row["T"]
        emit(row)


def main() -> None:
    """Be one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--case", help="of `case`")
    options = parser.parse_args()
    if options.rehearse:
        sys.modules.update(dict.fromkeys(NOT_THERE))  # importing them is an error then
    index, count = map(int, options.shard.split("/"))
    job = Job(options.rehearse, options.seconds, (index, count))
    PARTS[options.part](job, *filter(None, [options.case]))


def machine(job: Job) -> None:
    """What all of it runs on."""
    import platform
    from importlib import metadata

    import torch

    found: Row = {"device": "rehearsal"}
    if not job.rehearse:
        properties = torch.cuda.get_device_properties(0)
        torch.zeros(1, device="cuda").add_(1).item()  # it works
        found = {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": list(torch.cuda.get_device_capability(0)), "cuda": torch.version.cuda}
    found |= {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "torchvision", "timm", "numpy", "scipy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    emit(found)


def tests(job: Job) -> None:
    """The tests marked gpu and those of the Triton kernels; of these tests, every so many-th."""
    import pytest

    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")]
    kernels = "test_triton and not under_the_interpreter" + " and (square and not many or refuses)" * job.rehearse
    selection = ["-m", "not slow and not network", "-k", f"{kernels} or gpu"]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts="]
    sys.exit(pytest.main([*quiet, *selection, *files], plugins=[_Shard(*job.shard)]))


class _Shard:
    """For pytest: every so many-th test, each emitted as it ends."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[self.index :: self.count]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._emit(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._emit(report)

    def _emit(self, report: Any) -> None:
        row = {"test": report.nodeid, "outcome": report.outcome, "s": getattr(report, "duration", 0.0)}
        if report.failed:
            print(report.longreprtext, flush=True)
            row["why"] = report.longreprtext.strip().splitlines()[-1]
        elif report.skipped:
            row["why"] = str(report.longrepr[-1])
        emit(row)


def kernels(job: Job) -> None:
    """Deformable attention by Triton: errors against the reference in float64, time, and bytes a second.

    "of copying" is the rate of reading every input and writing every output once, by the rate of a copy; "samples" is
    that of the pixels read for all samples, which come from caches for the most part.
    """
    import torch

    from m2f_video.ops import ms_deform_attn

    big = torch.empty(2**16 if job.rehearse else 2**28, device=job.device)
    bandwidth = 2 * big.nbytes / _kernel_seconds(big.clone, job)
    emit({"what": "copy", "GB/s": bandwidth / 1e9})
    del big
    shapes = tuple((-(-job.size[0] // stride), -(-job.size[1] // stride)) for stride in (32, 16, 8))
    tokens, heads, dim, points = sum(h * w for h, w in shapes), 1 if job.rehearse else 8, 32, 4
    wrong = []
    for name, frames in [*job.cases, *[("float16", 8)] * (not job.rehearse)]:
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        samples = (frames, tokens, heads, len(shapes), points)
        value = torch.randn(frames, tokens, heads, dim, device=job.device).to(dtype)
        locations = torch.rand(*samples, 2, device=job.device)
        weights = torch.rand(samples, device=job.device).flatten(3).softmax(-1).view(samples).to(dtype)
        inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        grad = torch.randn(frames, tokens, heads * dim, device=job.device).to(dtype)

        def forward(backend: str, inputs: list[Any] = inputs) -> Any:
            return ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2], backend)

        def backward(output: Any, inputs: list[Any] = inputs, grad: Any = grad) -> tuple[Any, ...]:
            return torch.autograd.grad(output, inputs, grad.to(output), retain_graph=True)

        output = forward("triton")
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        exact = forward("reference", doubles)
        pairs = zip((output, *backward(output)), (exact, *backward(exact, doubles)), strict=True)
        row: Row = {"what": "deformable attention", "dtype": name, "T": frames}
        for what, (ours, theirs) in zip(("output", "value", "locations", "weights"), pairs, strict=True):
            row[f"error of {what}"] = error = _relative(ours, theirs)
            # of millions of locations, rounding moves some across a pixel's centre, where the derivative jumps
            limit = max(1e-2 if what == "locations" else 1e-5, 0.5 * torch.finfo(ours.dtype).eps)
            if not error < limit:
                wrong.append(f"{what} in {name}, T={frames}: {error:.1e} > {limit:.1e}")
        del doubles, exact, pairs
        for backend in ("triton", "reference"):
            again = output if backend == "triton" else forward(backend)
            with torch.no_grad():
                seconds = _kernel_seconds(lambda b=backend, f=forward: f(b), job)
            backward_seconds = _kernel_seconds(lambda a=again, b=backward: b(a), job)
            row |= {f"{backend} ms": 1e3 * seconds, f"{backend} backward ms": 1e3 * backward_seconds}
            if backend == "triton":
                size = sum(tensor.nbytes for tensor in inputs)
                row["of copying"] = (size + output.nbytes) / seconds / bandwidth
                row["samples GB/s"] = 4 * weights.numel() * dim * value.element_size() / seconds / 1e9
                row["backward of copying"] = (2 * size + grad.nbytes) / backward_seconds / bandwidth
        emit(row)
    if wrong:
        sys.exit("Triton's results are off: " + "; ".join(wrong))


def _kernel_seconds(function: Callable[[], object], job: Job) -> float:
    """Median time on the device itself, without what the host takes to launch, and with cold caches."""
    if job.rehearse:
        return timed(function)
    from triton.testing import do_bench

    return 1e-3 * do_bench(function, return_mode="median")


def _relative(ours: Any, exact: Any) -> float:
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


def speed(job: Job) -> None:
    """The model as it is written, by both ways of sampling."""
    import torch

    from m2f_video.ops import BACKEND_VARIABLE

    model = job.model()
    for name, frames in job.cases:
        model = model.to(job.device, getattr(torch, name))
        pixels = job.pixels(1, frames, dtype=model.dtype)
        for backend in job.backends:
            os.environ[BACKEND_VARIABLE] = backend
            with torch.inference_mode():
                job.measure({"model": f"eager, {backend}", "dtype": name, "T": frames}, lambda: model(pixels))  # noqa: B023


def transformers(job: Job) -> None:
    """Transformers' image model on the same frames, each an image."""
    import torch

    from m2f_video.parity import transformers_model

    model = transformers_model(job.model())
    for name, frames in job.cases:
        model = model.to(job.device, getattr(torch, name))
        pixels = job.pixels(frames, dtype=model.dtype)
        with torch.inference_mode():
            job.measure({"model": "transformers eager", "dtype": name, "T": frames}, lambda: model(pixels))  # noqa: B023


def training(job: Job) -> None:
    """A training step on one clip of two frames: forward, loss, backward and optimiser."""
    import torch

    from m2f_video.ops import BACKEND_VARIABLE
    from m2f_video.training import LossConfig, VideoMask2FormerLoss

    frames = 2
    model = job.model().to(job.device).train().requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    pixels = job.pixels(1, frames)
    target = box_target(5, model.config.num_labels, (frames, *job.size)).to(job.device)
    criterion = VideoMask2FormerLoss(LossConfig(), model.config.num_labels)

    def step(dtype: str) -> None:
        optimizer.zero_grad()
        with torch.autocast(job.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = criterion(model(pixels, output_auxiliary=True), [target]).total
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            sys.exit(f"the loss is {loss.item()} in {dtype}")

    for backend in job.backends:
        os.environ[BACKEND_VARIABLE] = backend
        for dtype in ("float32", "bfloat16"):
            row = {"model": f"training step, {backend}", "dtype": dtype, "T": frames}
            job.measure(row, lambda d=dtype: step(d))


def memory(job: Job) -> None:
    """Peak memory of encoding a clip 8 frames at a time and decoding it as a whole, for two lengths."""
    import torch

    from m2f_video.benchmark import peak_bytes
    from m2f_video.inference.features import FeatureBuffer

    lengths = (2, 4) if job.rehearse else (16, 64)
    model = job.model()

    @torch.inference_mode()
    def run(length: int) -> None:
        buffer = FeatureBuffer(length)
        for start in range(0, length, 8):
            buffer.append(model.encode_frames(job.pixels(min(8, length - start), dtype=model.dtype)))
        model.decode_clip(buffer.features(), output_masks=False)

    for name in ("bfloat16", "float32"):
        model = model.to(job.device, getattr(torch, name))
        run(lengths[0])
        peaks = [peak_bytes(lambda n=length: run(n), job.device) / 1e6 for length in lengths]
        row = {f"{length} frames, MB": peak for length, peak in zip(lengths, peaks, strict=True)}
        emit({"dtype": name, **row, "MB a further frame": (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])})


def compiled(job: Job) -> None:
    """Ours and transformers' by `torch.compile`, as many cases as there is time for.

    Compiling keeps one core busy for a minute or more, so several cases compile at a time. When they are ready, or time
    is over, they are timed one by one.
    """
    cases = [f"{whose}/{dtype}/{frames}" for dtype, frames in job.cases for whose in ("ours", "transformers")]
    at_once = max(2, min(len(cases), (os.cpu_count() or 1) // 4))
    variables = environment(OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="4")
    stop = time.monotonic() + job.seconds - (5 if job.rehearse else 20)
    workers: dict[str, Worker] = {}
    rows: dict[str, Row] = {}  # of those that are ready
    failed: set[str] = set()
    while len(rows) + len(failed) < len(cases) and time.monotonic() < stop:
        busy = [case for case in workers if case not in rows and case not in failed]
        for case in [case for case in cases if case not in workers][: at_once - len(busy)]:
            command = [__file__, "case", "--case", case, *["--rehearse"] * job.rehearse]
            workers[case] = Worker(command, variables)
        for case in busy:
            try:
                if (row := workers[case].answer(0.1)) is not None:
                    rows[case] = row
            except WorkerError:
                failed.add(case)
    for case in workers.keys() - rows.keys():
        workers[case].close()
    for case in cases:
        row = dict(zip(("model", "dtype", "T"), case.split("/"), strict=True))
        row = row | {"model": f"{row['model']} compiled", "T": int(row["T"])}
        try:
            if case in rows:
                workers[case].tell()
                row |= {"what": "timed"} | rows[case] | workers[case].answer()
                workers[case].close()
            else:
                row["what"] = "failed" if case in failed else "no time for it"
        except WorkerError:
            failed.add(case)
            row["what"] = "failed"
        emit(row)
    if failed:
        sys.exit(f"{len(failed)} of {len(cases)} cases failed")


def case(job: Job, name: str) -> None:
    """Compile one case, say so, and time it when told to."""
    import torch

    from m2f_video.ops import BACKEND_VARIABLE
    from m2f_video.parity import transformers_model

    whose, dtype, frames = name.split("/")
    os.environ[BACKEND_VARIABLE] = job.backends[0]
    model = job.model()
    model = (model if whose == "ours" else transformers_model(model)).to(job.device, getattr(torch, dtype))
    pixels = job.pixels(*(1,) * (whose == "ours"), int(frames), dtype=model.dtype)
    with torch.inference_mode():
        expected = model(pixels).class_queries_logits
    if whose == "ours":
        model.prepare_for_inference(compile="none" if job.rehearse else "model")
    else:
        level = model.model.pixel_level_module
        for part in (level.encoder, level.decoder, model.model.transformer_module):
            part.compile(disable=job.rehearse)
    with torch.inference_mode():
        seconds = timed(lambda: model(pixels))
        distance = _relative(model(pixels).class_queries_logits, expected.double())
        emit({"compiling s": seconds, "distance to eager": distance})
        for _ in orders():
            job.measure({"T": int(frames)}, lambda: model(pixels))


PARTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (machine, tests, kernels, speed, transformers, training, memory, compiled, case)
}

if __name__ == "__main__":
    main()

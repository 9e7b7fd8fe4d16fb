"""`m2f-video info`."""

import os
import re
from collections import Counter

import torch
from rich.table import Table

from m2f_video.cli.console import print_table
from m2f_video.cli.outputs import DtypeName
from m2f_video.modeling.video_mask2former import VideoMask2Former


def info(checkpoint: str | None = None, config: str | None = None, dtype: DtypeName = "float32") -> int:
    """Show versions and devices, which implementation of deformable attention runs on them, and what is compiled.

    Example: m2f-video info --checkpoint demo

    Args:
        checkpoint: show too which modules of this model run fused on a CPU, and which plain and why.
        config: for a weight file without a config.json beside it: a preset, or a config.json.
        dtype: floating-point type of that model.
    """
    from importlib.metadata import version

    from m2f_video.acceleration import cpu_kernels
    from m2f_video.ops import BACKEND_VARIABLE, available_backends, resolve_backend

    for package in ("m2f-video", "torch", "torchvision", "timm", "av"):
        print(f"{package} {version(package)}")
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices[1:]:
        properties = torch.cuda.get_device_properties(device)
        print(f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")

    choice = os.environ.get(BACKEND_VARIABLE)
    table = Table("deformable attention", *devices, title=f"{BACKEND_VARIABLE} is {choice or 'not set'}")
    for task, needs_grad in {"to segment, plain": False, "to train": True}.items():
        cells: list[str] = []
        for device in devices:
            try:
                like = torch.zeros(1, device=device, requires_grad=needs_grad)
                cells.append(resolve_backend("auto", like))
            except ValueError as error:
                cells.append(str(error))
        table.add_row(task, *cells)
    print_table(table)
    for backend, reason in available_backends().items():
        print(f"{backend}: {'can run' if reason is None else f'cannot run, {reason}'}")
    reason = cpu_kernels.why_no_kernels()
    kept = f"none, {reason}" if reason else f"compiled once, for the first video, and kept in {cpu_kernels.folder()}"
    print(f"kernels for a CPU: {kept}")
    if checkpoint is not None:
        print_table(_modules(checkpoint, config, dtype))
    return 0


def _modules(checkpoint: str, config: str | None, dtype: DtypeName) -> Table:
    """Of a model, those that run alike in one row: numbers in their names are stars there."""
    from m2f_video.acceleration import report

    model = VideoMask2Former.from_pretrained(checkpoint, config=config, dtype=dtype).prepare_for_inference()
    rows = Counter(
        (re.sub(r"\d+", "*", row.name) or "the model", row.type, row.state, row.reason) for row in report(model)
    )
    table = Table("modules", "type", "", "how it runs", "why", title=f"{checkpoint}, {dtype}, on a CPU")
    for (name, kind, state, reason), count in rows.items():
        table.add_row(name, kind, str(count), state, reason)
    return table

"""`m2f-video export`."""

from pathlib import Path
from typing import Literal

from rich.table import Table

from m2f_video.cli.console import one_line, print_table, progress_bars


def export(
    checkpoint: str,
    output: Path,
    format: Literal["onnx", "torch"] = "onnx",
    config: str | None = None,
    temporal: Literal["joint", "per_frame"] | None = None,
    revision: str | None = None,
) -> int:
    """Write a model as ONNX, or as torch.export has it; run what was written, and exit with 1 where it is not the same.

    Beside model.onnx, which takes a clip, model.encoder.onnx takes frames and model.decoder.onnx what it makes of them:
    with these two m2f-video segment runs videos of any length. model.json names all. Clips may have any number of
    frames, and these any size that preprocessing gives. Classes, and how frames are prepared, are in each file. The
    model is written in float32.

    What was written is run on random clips of two sizes and lengths that it was not exported with, by ONNX Runtime, and
    compared with the model: the largest relative error allowed is 1e-4, and otherwise nothing is written.

    Needs the extra m2f-video[export].

    Examples: m2f-video export --checkpoint demo --output model.onnx

    m2f-video segment cars.mp4 --checkpoint model.onnx --output out

    Args:
        checkpoint: hub name, folder (config.json and weights; this project's or transformers' format) or weight file.
        output: file to write the model to, .onnx or, for torch, .pt2; the others are put beside it.
        format: onnx, which any runtime takes; or torch, for torch.export.load in your own Python: such files hold code,
            and the other commands do not take them.
        config: for a weight file without a config.json beside it: a preset such as swin_tiny_youtubevis_2019, or a
            config.json.
        temporal: decode clips as a whole (joint) or each frame alone (per_frame), instead of what the checkpoint does.
        revision: branch, tag or commit of a checkpoint on the hub.
    """
    from m2f_video.export import OPSET, TOLERANCE, check_target, export_model
    from m2f_video.modeling.video_mask2former import VideoMask2Former

    check_target(output, format)
    model = VideoMask2Former.from_pretrained(checkpoint, config=config, temporal=temporal, revision=revision)
    with progress_bars(unit="part") as update:
        result = export_model(model, output, format, progress=update)
    by = f"ONNX Runtime, opset {OPSET}" if format == "onnx" else "torch.export.load"
    table = Table("run", "frames", "size", "class logits", "mask logits", title=f"relative error, by {by}")
    for check in result.checks:
        size = f"{check.height}x{check.width}"
        table.add_row(check.part, str(check.frames), size, f"{check.class_error:.1e}", f"{check.mask_error:.1e}")
    print_table(table)
    if not result.passed:
        print(one_line(f"OVER the tolerance of {TOLERANCE:.0e}: nothing is written to {output}"))
        return 1
    print(one_line(f"within the tolerance of {TOLERANCE:.0e}; written: {', '.join(map(str, result.files))}"))
    return 0

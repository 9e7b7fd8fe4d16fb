"""`m2f-video parity`."""

from typing import Literal

from rich.table import Table

from m2f_video.cli.console import print_table
from m2f_video.hub import parse_dtype, resolve_config
from m2f_video.modeling.video_mask2former import VideoMask2Former


def parity(
    reference: Literal["hf"] = "hf",
    checkpoint: str | None = None,
    random: int | None = None,
    config: str | None = None,
    dtype: Literal["float32", "float64", "bfloat16"] = "float32",
    plain: bool = False,
    frames: int = 1,
    height: int = 480,
    width: int = 864,
) -> int:
    """Compare every stage of the model with the reference implementation; exit with 1 where it is over tolerance.

    The yardstick is the reference in float64. The last column is the reference's own error in the chosen dtype.

    Example: m2f-video parity --random 0 --dtype float64

    Args:
        reference: hf is transformers' Mask2Former, which needs the extra m2f-video[parity].
        checkpoint: weights to compare with, as for `segment`.
        random: seed of random weights to compare with instead; 0 where no checkpoint is given.
        config: what to build for random weights or a bare weight file: a preset or a config.json; by default
            swin_tiny_youtubevis_2019.
        dtype: both implementations run in it. In bfloat16 the differences are reported and not judged.
        plain: compare the model as it is written, not as `prepare_for_inference` leaves it, which is what runs when a
            video is segmented.
        frames: number of random frames, each compared alone.
        height: of the frames, in pixels.
        width: of the frames, in pixels.
    """
    from m2f_video.parity import TOLERANCES, compare_with_transformers, random_frames, random_model, within_tolerance

    if checkpoint is not None and random is not None:
        raise ValueError("give --checkpoint or --random, not both")
    if min(frames, height, width) < 1:
        raise ValueError(f"frames, height and width must be positive, got {frames}, {height} and {width}")
    model_dtype = parse_dtype(dtype)
    if checkpoint is not None:
        model = VideoMask2Former.from_pretrained(checkpoint, config=config, dtype=dtype)
        what = checkpoint
    else:
        preset = config or "swin_tiny_youtubevis_2019"
        model = random_model(resolve_config(preset), random or 0)
        what = f"{preset}, random weights of seed {random or 0}"
    pixels = random_frames(frames, height, width, seed=random or 0)
    ours, own = compare_with_transformers(model, pixels, model_dtype, prepare=not plain)

    how = f"{dtype}, plain" if plain else f"{dtype}, accelerated"
    print(f"{what}; {frames} x {height} x {width}, {how}, against {reference} in float64")
    table = Table("stage", "max abs", "relative", "1 - cosine", "mask bits", f"{reference}'s own")
    for mine, theirs in zip(ours, own, strict=True):
        if mine.flips is None:
            numbers = (f"{mine.max_abs:.1e}", f"{mine.relative:.1e}", f"{max(1 - mine.cosine, 0):.0e}", "")
            table.add_row(mine.stage, *numbers, f"{theirs.relative:.1e}")
        else:
            flips = f"{mine.flips[0]} of {mine.flips[1]} flipped"
            table.add_row(mine.stage, "", "", "", flips, str(theirs.flips[0] if theirs.flips else ""))
    print_table(table)
    worst = max(ours, key=lambda comparison: comparison.relative)
    passed = within_tolerance(ours, model_dtype)
    if (tolerance := TOLERANCES.get(model_dtype)) is None:
        verdict = f"there is no tolerance in {dtype}; compare it with {reference}'s own"
    else:
        verdict = f"{'within' if passed else 'OVER'} the tolerance of {tolerance:.0e}"
    print(f"largest relative error {worst.relative:.1e} ({worst.stage}): {verdict}")
    return 0 if passed else 1

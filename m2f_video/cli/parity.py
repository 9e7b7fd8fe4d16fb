"""`m2f-video parity`."""

from json import dumps as to_json
from pathlib import Path
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
    stage: tuple[str, ...] = (),
    video: str | None = None,
    frames: int = 1,
    height: int | None = None,
    width: int | None = None,
    json: Path | None = None,
) -> int:
    """Compare every stage of the model with the reference implementation; exit with 1 where it is over tolerance.

    The yardstick is the reference in float64. The last column is the reference's own error in the chosen dtype. What a
    stage is, and how to compare a model of your own, says `m2f_video.parity`.

    Example: m2f-video parity --random 0 --dtype float64 --stage "pixel decoder" "mask features"

    Args:
        reference: hf is transformers' Mask2Former, which needs the extra m2f-video[parity]. Where it does not have the
            model's backbone, its decoders get the maps of the model's own.
        checkpoint: weights to compare with, as for `segment`.
        random: seed of random weights to compare with instead; 0 where no checkpoint is given.
        config: what to build for random weights or a bare weight file: a preset or a config.json; by default
            swin_tiny_youtubevis_2019.
        dtype: both implementations run in it. In bfloat16 the differences are reported and not judged.
        plain: compare the model as it is written, not with its accelerated twins, which is what runs when a video is
            segmented. Only so are its attention masks compared: a twin makes none.
        stage: compare only these, by their names or first words, such as backbone, "pixel decoder", decoder or
            "decoder 3".
        video: take the frames of this video, resized as for `segment`, instead of random ones.
        frames: how many, each compared alone.
        height: of random frames, in pixels; by default 480.
        width: of random frames, in pixels; by default 864.
        json: write the numbers to this file.
    """
    from m2f_video.evaluation.report import check_writable
    from m2f_video.files import atomic_path
    from m2f_video.parity import compare, random_frames, random_model

    if checkpoint is not None and random is not None:
        raise ValueError("give --checkpoint or --random, not both")
    if video is not None and not (height is width is None):
        raise ValueError("--height and --width are of random frames; leave them out with --video")
    height, width = 480 if height is None else height, 864 if width is None else width
    if min(frames, height, width) < 1:
        raise ValueError(f"frames, height and width must be positive, got {frames}, {height} and {width}")
    if json is not None:
        check_writable(json)
    model_dtype = parse_dtype(dtype)
    if checkpoint is not None:
        model = VideoMask2Former.from_pretrained(checkpoint, config=config, dtype=dtype)
        what = checkpoint
    else:
        preset = config or "swin_tiny_youtubevis_2019"
        model = random_model(resolve_config(preset), random or 0)
        what = f"{preset}, random weights of seed {random or 0}"
    if video is None:
        pixels = random_frames(frames, height, width, seed=random or 0)
    else:
        from m2f_video.inference.processor import VideoProcessor
        from m2f_video.video import read_video

        pixels = VideoProcessor.from_config(model.config)(read_video(video, slice(frames)))["pixel_values"][0]
    result = compare(model, pixels, dtype=model_dtype, plain=plain, stages=stage)

    size = " x ".join(str(side) for side in (len(pixels), *pixels.shape[-2:]))
    source = "random" if video is None else f"of {video}"
    how = f"{dtype}, {'plain' if plain else 'accelerated'}"
    print(f"{what}; {size} {source}, {how}, against {reference} in float64")
    table = Table("stage", "max abs", "relative", "1 - cosine", "mask bits", f"{reference}'s own")
    for mine, theirs in zip(result.stages, result.own, strict=True):
        if mine.shapes is not None:
            table.add_row(mine.stage, f"{mine.shapes[0]} in the model, {mine.shapes[1]} in {reference}")
        elif mine.flips is None:
            numbers = (f"{mine.max_abs:.1e}", f"{mine.relative:.1e}", f"{max(1 - mine.cosine, 0):.0e}", "")
            table.add_row(mine.stage, *numbers, f"{theirs.relative:.1e}")
        else:
            flips = f"{mine.flips[0]} of {mine.flips[1]} flipped"
            table.add_row(mine.stage, "", "", "", flips, str(theirs.flips[0] if theirs.flips else ""))
    print_table(table)
    for names, side in ((result.only_model, "the model"), (result.only_reference, f"{reference}")):
        if names:
            print(f"only {side} has: {', '.join(names)}")
    if json is not None:
        about = {"model": what, "reference": reference, "dtype": dtype, "plain": plain, "video": video}
        content = about | {"frames": list(pixels.shape)} | result.to_dict()
        with atomic_path(json) as file:
            file.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")
    if result.tolerance is None:
        verdict = f"there is no tolerance in {dtype}; compare it with {reference}'s own"
    else:
        verdict = f"{'within' if result.passed else 'OVER'} the tolerance of {result.tolerance:.0e}"
    print(f"largest relative error {result.worst.relative:.1e} ({result.worst.stage}): {verdict}")
    return 0 if result.passed else 1

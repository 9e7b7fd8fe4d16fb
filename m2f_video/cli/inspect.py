"""`m2f-video inspect`."""

from pathlib import Path

import torch

from m2f_video.cli.console import one_line, progress_bars
from m2f_video.cli.outputs import DtypeName, Source, processor_of
from m2f_video.modeling.video_mask2former import VideoMask2Former

PAGES = (".html", ".htm")


def inspect(
    source: Source,
    /,
    checkpoint: str,
    output: Path = Path("inspect.html"),
    config: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: DtypeName = "float32",
    frame: int = 0,
    clip: int = 3,
    queries: tuple[int, ...] = (),
    top_k: int = 3,
    layers: tuple[int, ...] = (),
    point: tuple[int, int] | None = None,
    shortest_edge: int | None = None,
) -> int:
    """Draw how the model segments a frame: where it samples, each query's mask by layer, and what the query attends to.

    Writes one HTML page that needs nothing else, or a folder of PNG files. The same numbers, in Python, are those of
    `model.capture`. A clip around the frame is decoded, however long the video is.

    Example: m2f-video inspect cars.mp4 --checkpoint demo --frame 40 --queries 3 7 --layers 0 4 8 --output cars.html

    Args:
        source: video file, or a folder of frames (jpg, png, tif, ...), one picture each.
        checkpoint: hub name, folder (config.json and weights; this project's or transformers' format) or weight file.
        output: the page, where it ends in .html; else a folder for PNG files, new or empty.
        config: for a weight file without a config.json beside it: a preset such as swin_tiny_youtubevis_2019, or a
            config.json.
        revision: branch, tag or commit of a checkpoint on the hub.
        device: such as cpu, cuda or cuda:1; by default cuda where there is one, else cpu.
        dtype: floating-point type the model runs in.
        frame: which one to draw, counted from 0.
        clip: how many frames are decoded together, around this one. Attention sees all of them; each takes up to 100 MB
            at 480x864.
        queries: which to draw, such as 0 3 5; by default the top-k.
        top_k: how many queries to draw, those of the highest score, where --queries does not name them.
        layers: of the transformer decoder, such as 0 4 8; by default all.
        point: x and y of the pixel, in the source, whose sampling is drawn; by default one that the first query's mask
            covers.
        shortest_edge: resize frames to this shorter side, in pixels, instead of the checkpoint's.
    """
    from m2f_video.evaluation.report import check_writable
    from m2f_video.inference.inspection import inspect_frame
    from m2f_video.results.inspection_page import write_page, write_pictures
    from m2f_video.video import read_video

    if frame < 0 or clip < 1:
        raise ValueError(f"--frame counts from 0 and --clip from 1, got {frame} and {clip}")
    is_page = output.suffix.lower() in PAGES
    if is_page:
        check_writable(output)
    elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(
            f"{output}: it exists already; remove it, or give --output a page (.html) or a new folder"
        )
    start = max(0, frame - (clip - 1) // 2)
    frames = read_video(source, slice(start, start + clip))
    if frame - start >= len(frames):
        raise ValueError(f"{source} has {start + len(frames)} frames, there is no frame {frame}")
    model = VideoMask2Former.from_pretrained(
        checkpoint,
        config=config,
        revision=revision,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=dtype,
    )
    with progress_bars() as update:
        inspection = inspect_frame(
            model,
            frames,
            frame - start,
            first=start,
            queries=queries,
            top_k=top_k,
            layers=layers,
            point=point,
            processor=processor_of(model, shortest_edge),
            progress=lambda done, total: update("frames", done, total),
        )

        def drawn(done: int, total: int) -> None:
            update("pictures", done, total)

        if is_page:
            write_page(output, inspection, f"{source}, frame {frame}, {checkpoint}", drawn)
        else:
            write_pictures(output, inspection, drawn)
    for query in inspection.queries:
        print(one_line(f"query {query.query}: {query.label}, {query.score:.3f}"))
    print(one_line(f"written to {output}"))
    return 0

"""`m2f-video segment`."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from m2f_video.cli.bulk import segment_videos
from m2f_video.cli.console import print_line, progress_bars
from m2f_video.cli.outputs import (
    DtypeName,
    Source,
    check_output,
    print_tracks,
    print_written,
    processor_of,
    standard_input,
)
from m2f_video.exported import ExportedModel, is_exported
from m2f_video.hub import load_config, parse_device
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.linking import LinkerName
from m2f_video.inference.listing import is_list
from m2f_video.inference.segment import WINDOW, Mode, choose_mode
from m2f_video.inference.to_folder import check_overlay, check_page, check_resume, check_source, segment_to_folder
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.results.report_page import REPORT_FILE, REPORT_VIDEO_FILE, VideoPlace
from m2f_video.results.tracks import OVERLAY_FILE, TRACKS_FILE
from m2f_video.results.tracks_file import TRACKS_LINES_FILE


def segment(
    source: Source,
    /,
    checkpoint: str,
    output: Path,
    config: str | None = None,
    temporal: Literal["joint"] | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: DtypeName = "float32",
    frames: str | None = None,
    mode: Mode = "auto",
    window: int = WINDOW,
    stride: int | None = None,
    linker: LinkerName = "transfer",
    max_overlap: float | None = None,
    top_k: int = 10,
    score_threshold: float = 0.0,
    shortest_edge: int | None = None,
    frames_per_chunk: int | None = None,
    plain: bool = False,
    strict: bool = False,
    overlay: bool = True,
    report: bool = False,
    report_link: bool = False,
    resume: bool = False,
) -> int:
    """Segment and track the objects of a video, or of many; write tracks.jsonl, tracks.json and overlay.mp4.

    tracks.jsonl has a line for every frame. In windows it grows as frames become final, and stays when the run is
    stopped, with what --resume needs in OUTPUT/.unfinished; tracks.json, of up to 5,000 frames, and overlay.mp4 come
    at the end. What OUTPUT held of an earlier result goes when the first frames are final.

    Of many videos each gets a folder of its own in OUTPUT, and OUTPUT/manifest.jsonl says what was done. One that
    fails does not stop the others, and makes the exit code 1; run the same command again to go on, what is done is
    skipped. Any number of processes may run it at once: each takes videos that no other one has, also where machines
    share OUTPUT over NFS, and takes over those of a process that died.

    Examples: m2f-video segment cars.mp4 --checkpoint facebook/video-mask2former-swin-tiny-youtubevis-2019-instance
    --output out --score-threshold 0.3

    m2f-video segment videos/ --checkpoint demo --output out

    torchrun --nproc-per-node 8 -m m2f_video segment list.txt --checkpoint demo --output out

    Args:
        source: video file, or a folder of frames (jpg, png, tif, ...), one picture each; - takes a video that is piped
            in, of a format that is read from front to back (mkv, webm, mpegts, fragmented mp4). Many videos: a folder
            of video files or of folders of frames, or a text file (.txt) with a path on each line, relative to that
            file; lines that begin with # do not count.
        checkpoint: hub name, folder (config.json and weights; this project's or transformers' format), weight file, or
            model.onnx from m2f-video export, which runs on a CPU, in mode whole or window.
        output: folder to write to; made where missing.
        config: for a weight file without a config.json beside it: a preset such as swin_tiny_youtubevis_2019, or a
            config.json.
        temporal: read an image checkpoint, whose frames are decoded alone, as a video model (joint). Its identities
            then hold across frames, though it was not trained for that.
        revision: branch, tag or commit of a checkpoint on the hub.
        device: such as cpu, cuda or cuda:1; by default cuda where there is one, else cpu. Of many videos, each process
            of torchrun takes its own GPU.
        dtype: floating-point type the model runs in.
        frames: which frames, of each video, START:STOP or START:STOP:STEP, counted from 0, such as 10:50:2.
        mode: whole decodes the video as one clip, as published; so does streamed, with one frame at a time on the
            device and 17 MB of each (480x864, float32) in memory or, beyond 4 GiB, in a file in TMPDIR; window decodes
            it clip by clip, linking what they show, in memory that does not grow; auto takes whole for up to 36 frames
            and window for more, and says so.
        window: frames of a window.
        stride: frames from the beginning of one window to that of the next; by default as many as a window has.
        linker: how objects of a window are linked to tracks: by their masks and classes (transfer), by embeddings as
            MinVIS does (embedding), by masks in shared frames as IFC does (mask_iou, with --stride below --window), or
            by the last two (both).
        max_overlap: leave out an object of whose mask more certain ones cover a larger share; by default 1, which keeps
            all, for whole and streamed videos, as published, and 0.5 in windows.
        top_k: how many (object, class) pairs become tracks, and are drawn in a frame; the published evaluation takes
            10. Take more for a video that shows more objects.
        score_threshold: leave out tracks of less certainty: the probability of the class, in windows of those that the
            object is seen in. 0 keeps all top-k, as the published evaluation does; 0.3 suits most videos.
        shortest_edge: resize frames to this shorter side, in pixels, instead of the checkpoint's.
        frames_per_chunk: frames encoded at a time; by default 1 on a CPU and 8 elsewhere.
        plain: run the model as it is written, without the accelerated twins of its modules; for those who doubt them.
        strict: fail on a video that is damaged or changes its size, instead of segmenting what comes before.
        overlay: write overlay.mp4. In windows it is drawn as frames come, by what is known at that moment.
        report: write report.html too, a page that shows the video and its tracks in any browser and needs nothing else.
        report_link: write report.html with its video beside it, report.mp4, instead of inside it, as long videos need.
        resume: go on with a run in windows that was stopped, of the same video, checkpoint and options: the result is
            that of one run. One that is complete stays; where there is nothing to go on from, the run starts anew. Not
            for what is piped in.
    """
    from m2f_video.video.reader import open_video, parse_frames

    page: VideoPlace | None = "beside" if report_link else "inside" if report else None
    pages = [REPORT_FILE] * (page is not None) + [REPORT_VIDEO_FILE] * (page == "beside")
    selected = None if frames is None else parse_frames(frames)
    load = partial(_load, checkpoint, config=config, temporal=temporal, revision=revision, dtype=dtype)
    if device is None and is_exported(checkpoint):
        device = "cpu"
    how: dict[str, Any] = {
        "overlay": overlay,
        "page": page,
        "window": window,
        "stride": stride,
        "linker": linker,
        "max_overlap": max_overlap,
        "top_k": top_k,
        "score_threshold": score_threshold,
        "frames_per_chunk": frames_per_chunk,
        "plain": plain,
    }
    if source != "-" and is_list(source):
        about = {"checkpoint": checkpoint, "frames": selected, "strict": strict, "mode": mode}
        return segment_videos(source, output, load, device=device, shortest_edge=shortest_edge, **about, **how)
    check_output(output, TRACKS_LINES_FILE, TRACKS_FILE, *([OVERLAY_FILE] if overlay else []), *pages)
    reader = open_video(standard_input() if source == "-" else source, selected, strict=strict)
    chosen, why = choose_mode(mode, reader.num_frames_hint)
    check_source(reader, output, overlay=overlay, mode=mode)
    if overlay:
        check_overlay(reader, mode)
    if page is not None:
        check_page(reader, output, page)
    if resume:
        check_resume(reader)
    model = load(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if mode == "auto":
        print(f"mode {chosen}: {why}")
    with progress_bars(unit="frame") as update:
        processor = processor_of(model, shortest_edge)
        segmentation = segment_to_folder(
            model,
            reader,
            output,
            processor=processor,
            mode=chosen,
            resume=resume,
            progress=update,
            say=print_line,
            **how,
        )
    print_tracks(segmentation)
    print_written(output, len(segmentation.frames), *([OVERLAY_FILE] if overlay else []), *pages)
    return 0


def _load(
    checkpoint: str,
    device: torch.device | str,
    *,
    config: str | None,
    temporal: str | None,
    revision: str | None,
    dtype: str,
) -> ClipModel:
    if is_exported(checkpoint):
        if config or temporal or revision or dtype != "float32" or parse_device(device).type != "cpu":
            raise ValueError(
                f"{checkpoint} is an exported model, which has its own config and runs in float32 on a CPU; leave out "
                "--config, --temporal, --revision, --dtype and --device"
            )
        return ExportedModel.load(checkpoint)
    about: dict[str, Any] = {"config": config, "temporal": temporal, "revision": revision}
    if load_config(checkpoint, **about).temporal != "joint":
        raise ValueError(f"{checkpoint} is an image model; --temporal joint reads it as a video model")
    return VideoMask2Former.from_pretrained(checkpoint, **about, device=device, dtype=dtype)

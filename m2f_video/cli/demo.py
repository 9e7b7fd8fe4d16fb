"""`m2f-video demo`."""

from pathlib import Path
from typing import Literal

from m2f_video.cli.console import one_line, progress_bars
from m2f_video.cli.outputs import check_output, print_tracks, print_written
from m2f_video.files import made_directory
from m2f_video.hub import load_config
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.results.report_page import REPORT_FILE
from m2f_video.results.tracks import OVERLAY_FILE, TRACKS_FILE
from m2f_video.results.tracks_file import TRACKS_LINES_FILE


def demo(
    output: Path = Path("demo_output"),
    checkpoint: str = "demo",
    difficulty: Literal["easy", "medium", "hard"] = "medium",
    seed: int = 2001,
    score_threshold: float = 0.8,
    plain: bool = False,
) -> int:
    """Render a video of the synthetic benchmark, segment the file, and measure the result by the known truth.

    Writes OUTPUT/video.mp4, OUTPUT/tracks.jsonl, OUTPUT/tracks.json, OUTPUT/overlay.mp4 and OUTPUT/report.html, a page
    to look at it all. The model is a small one
    inside the package, trained on videos of seed 0. What it reaches on 100 videos: m2f-video eval --data synthetic
    --checkpoint demo

    Args:
        output: folder to write to; made where missing.
        checkpoint: model for the classes of the benchmark: demo, or what m2f-video train has written.
        difficulty: how hard to segment and follow the objects are.
        seed: of the video; by default the first after 2000, the seed of the test videos, whose medium video has at
            least four objects, each of which covers at least 1 % of every frame, so that there is something to see.
        score_threshold: the table and the overlay leave out what is less certain, and the page does at first; the other
            files and AP take all.
        plain: run the model as it is written, without the accelerated twins of its modules.
    """
    from m2f_video.data import SyntheticVideos
    from m2f_video.evaluation import average_precision, load_results, pair_tracks, prepare_ground_truth
    from m2f_video.inference.segment import segment_video
    from m2f_video.video import VideoWriter

    file = output / "video.mp4"
    check_output(output, file.name, TRACKS_LINES_FILE, TRACKS_FILE, OVERLAY_FILE, REPORT_FILE)
    videos = SyntheticVideos(1, seed, difficulty)
    video = videos[0]
    if (labels := load_config(checkpoint).labels) != videos.labels:
        raise ValueError(f"{checkpoint} knows {labels[0]}, ... and not the shapes of the benchmark")
    model = VideoMask2Former.from_pretrained(checkpoint)
    with made_directory(output), progress_bars(unit="frame") as update:
        with VideoWriter(file, 8, video.width, video.height) as writer:
            for frame in video.clip(range(video.num_frames)).frames:
                writer.write(frame.permute(1, 2, 0).numpy())
        segmentation = segment_video(model, file, plain=plain, progress=update)
        segmentation.save(
            output, min_score=score_threshold, progress=lambda done, total: update("overlay", done, total)
        )
        segmentation.report(
            output / REPORT_FILE,
            min_score=score_threshold,
            progress=lambda done, total: update("page", done, total),
        )
    truth = prepare_ground_truth(videos)
    print_tracks(segmentation, score_threshold)
    if truth is not None:
        rows = load_results(segmentation.to_dict()["results"], truth)
        stats = average_precision(truth, pair_tracks(truth, rows)).stats
        print(
            f"against the truth of this {difficulty} video of seed {seed} ({len(truth.tracks)} objects): "
            f"AP {100 * stats['AP']:.1f}, AP50 {100 * stats['AP50']:.1f}"
        )
    print_written(output, video.num_frames, OVERLAY_FILE, file.name)
    print(one_line(f"the page: {output / REPORT_FILE}"))
    return 0

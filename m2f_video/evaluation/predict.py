"""Running a model over a dataset, on one process or many, and measuring what it predicts.

T frames, H height, W width.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import Any, Unpack

import numpy as np
import torch.distributed as dist

from m2f_video.acceleration import accelerated
from m2f_video.data.clip import AnnotatedVideo, AnnotatedVideos
from m2f_video.data.write import youtube_vis_annotations
from m2f_video.data.youtube_vis import YouTubeVis
from m2f_video.distributed import num_workers
from m2f_video.evaluation.annotations import GroundTruth, Progress, load_ground_truth, load_results, parse_result
from m2f_video.evaluation.journal import Journal, Row
from m2f_video.evaluation.pairing import pair_tracks
from m2f_video.evaluation.video_ap import VideoAPResult, average_precision
from m2f_video.inference.fingerprint import model_fingerprint, options_fingerprint
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import SegmentOptions, segment_video
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.video.reader import DEFAULT_FPS, VideoReader


def predict_videos(
    model: VideoMask2Former,
    videos: AnnotatedVideos,
    *,
    processor: VideoProcessor | None = None,
    top_k: int = 10,
    frames_per_chunk: int | None = None,
    plain: bool = False,
    rank: int = 0,
    world_size: int = 1,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **how: Unpack[SegmentOptions],
) -> list[Row]:
    """Segment each video of a dataset, from the dataset's own frames.

    Args:
        model: with `temporal="joint"`, on any device, in any dtype.
        videos: the dataset, whose categories are the model's labels, in any order. Its annotations are not looked at.
        processor: other preprocessing than the model's own.
        top_k: how many (query, class) pairs of a video become rows, as the published evaluation takes 10.
        frames_per_chunk: frames encoded at a time; None is 1 on a CPU and 8 elsewhere.
        plain: run the model as it is written, without accelerated twins.
        rank: which share of the videos: `rank`, `rank + world_size`, ...
        world_size: number of shares.
        journal: file (`.jsonl`) that keeps each video as soon as it is finished. With the same journal a run that was
            stopped goes on behind its last finished video and gives the same rows. The journal serves the same
            weights, config, preprocessing, dataset, `top_k` and `how`; what only rounding depends on (device, share,
            `frames_per_chunk` and `plain`) may change. It is not removed at the end.
        progress: called with ("videos", videos done, videos of the share), the first time before the work with how
            many of them the journal had.

    Returns:
        Rows of a YouTubeVIS submission in the order of the videos, with the dataset's ids of videos and categories.

    Raises:
        ValueError: the labels are not the dataset's categories, there are no videos, an option out of its range, the
            journal is of something else, or NaN in what the model gives.
        OSError: the journal cannot be written.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, got rank {rank} of {world_size}")
    if not len(videos):
        raise ValueError("the dataset has no videos, there is nothing to predict")
    category_ids = _category_ids(videos)
    _check_labels(model.config.labels, tuple(category_ids))
    processor = processor or VideoProcessor.from_config(model.config)
    how = {"mode": "whole", **how}
    share = range(rank, len(videos), world_size)
    kept = None if journal is None else Journal(journal, _made_from(model, videos, processor, top_k, how))
    rows_of = {} if kept is None else {index: kept.rows[index] for index in share if index in kept.rows}
    known_ids = set(category_ids.values())
    for index, rows in rows_of.items():
        if not _are_rows_of(videos[index], rows, known_ids):
            raise ValueError(f"{journal}: the rows of video {index} are damaged; delete the file to start anew")
    if progress is not None:
        progress("videos", len(rows_of), len(share))
    with accelerated(model, plain) as fast:
        for index in share:
            if index in rows_of:
                continue
            video = videos[index]
            segmentation = segment_video(
                fast,
                _VideoFrames(video),
                processor=processor,
                top_k=top_k,
                frames_per_chunk=frames_per_chunk,
                plain=plain,
                **how,
            )
            rows_of[index] = [
                {
                    "video_id": video.video_id,
                    "category_id": category_ids[track.label],
                    "score": track.score,
                    "segmentations": list(track.segmentations),
                }
                for track in segmentation.tracks
            ]
            if kept is not None:
                kept.add(index, rows_of[index])
            if progress is not None:
                progress("videos", len(rows_of), len(share))
    return [row for index in share for row in rows_of[index]]


class PredictOptions(SegmentOptions, total=False):
    """What else `predict_videos` takes."""

    processor: VideoProcessor | None
    top_k: int
    frames_per_chunk: int | None
    plain: bool
    journal: str | os.PathLike[str] | None
    progress: Progress | None


def predict_on_all_ranks(
    model: VideoMask2Former, videos: AnnotatedVideos, **options: Unpack[PredictOptions]
) -> list[Row]:
    """`predict_videos` with a share of the videos on each rank of `torch.distributed`, where it is initialised.

    Args:
        model: see `predict_videos`; the same on every rank.
        videos: see `predict_videos`.
        options: see `predict_videos`; each rank has another journal, and its progress counts its own share.

    Returns:
        On every rank the rows of all videos, as one process gives them.

    Raises:
        ValueError: see `predict_videos`.
        OSError: the journal cannot be written.
    """
    rank, world_size = _ranks()
    rows = predict_videos(model, videos, rank=rank, world_size=world_size, **options)
    if world_size == 1:
        return rows
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, rows)
    place = {video.video_id: index for index, video in enumerate(_each(videos))}
    return sorted(chain.from_iterable(shares), key=lambda row: place[row["video_id"]])


def evaluate_model(
    model: VideoMask2Former,
    videos: AnnotatedVideos,
    *,
    ground_truth: GroundTruth | None = None,
    **options: Unpack[PredictOptions],
) -> VideoAPResult:
    """Video AP of a model on annotated videos, with a share of them on each rank of `torch.distributed`.

    Args:
        model: see `predict_videos`.
        videos: the dataset.
        ground_truth: what `prepare_ground_truth` gives for these videos, which spares making it in every call. Only
            rank 0 uses it.
        options: see `predict_on_all_ranks`.

    Returns:
        The same on every rank.

    Raises:
        ValueError: see `predict_videos`; or the videos have no annotations.
        OSError: the journal cannot be written.
    """
    rank, world_size = _ranks()
    if rank == 0 and ground_truth is None:
        ground_truth = prepare_ground_truth(videos)
        if ground_truth is None:
            raise ValueError("the dataset has no annotations: there is no truth to measure by")
    rows = predict_on_all_ranks(model, videos, **options)
    measured: list[Any] = [None]
    if rank == 0 and ground_truth is not None:
        measured = [average_precision(ground_truth, pair_tracks(ground_truth, load_results(rows, ground_truth)))]
    if world_size > 1:
        dist.broadcast_object_list(measured)
    return measured[0]


def prepare_ground_truth(videos: AnnotatedVideos, progress: Progress | None = None) -> GroundTruth | None:
    """The truth of a dataset, to measure predictions by.

    Of files in the YouTubeVIS format it is what the annotation file says, crowds and areas included; of other datasets
    it is made from all of their masks, in memory.

    Args:
        videos: the dataset.
        progress: see `Progress`.

    Returns:
        None where nothing is annotated, as in the public validation and test sets.

    Raises:
        ValueError: the annotation file is malformed; the message names file, row and fault.
    """
    if isinstance(videos, YouTubeVis):
        if not any(video.instances for video in _each(videos)):
            return None
        truth = load_ground_truth(videos.file, progress)
        chosen = {video.video_id for video in _each(videos)}  # all of the file's, or its first
        return replace(
            truth,
            sizes={id_: size for id_, size in truth.sizes.items() if id_ in chosen},
            tracks=tuple(track for track in truth.tracks if track.video_id in chosen),
        )
    data = youtube_vis_annotations(
        videos, progress=None if progress is None else lambda done, total: progress("truth", done, total)
    )
    return load_ground_truth(data) if data["annotations"] else None


def _are_rows_of(video: AnnotatedVideo, rows: list[Any], category_ids: set[int]) -> bool:
    """Whether rows from a file can be predictions of this video."""
    sizes = {video.video_id: (video.height, video.width, video.num_frames)}
    truth = GroundTruth(source=video.name, sizes=sizes, categories={}, tracks=())
    try:
        tracks = [parse_result(row, number, truth, "journal") for number, row in enumerate(rows)]
    except ValueError:
        return False
    return all(track.category_id in category_ids and len(track.masks) == video.num_frames for track in tracks)


class _VideoFrames(VideoReader):
    """The frames of a dataset's video, each read when it is reached."""

    def __init__(self, video: AnnotatedVideo) -> None:
        super().__init__(video.name, (video.height, video.width), DEFAULT_FPS, video.num_frames, slice(None))
        self._video = video

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in range(self._video.num_frames):
            yield self._video.clip([index]).frames[0].permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)


def _each(videos: AnnotatedVideos) -> Iterator[Any]:
    return (videos[index] for index in range(len(videos)))


def _category_ids(videos: AnnotatedVideos) -> dict[str, int]:
    """The ids that submissions use, by name: the file's own, or as `youtube_vis_annotations` gives them."""
    if isinstance(videos, YouTubeVis):
        return videos.category_ids
    return {name: index + 1 for index, name in enumerate(videos.labels)}


def _check_labels(labels: tuple[str, ...], categories: tuple[str, ...]) -> None:
    differences = [f"{name!r:.60} is no category of the dataset" for name in labels if name not in categories][:1]
    differences += [f"{name!r:.60} is no label of the model" for name in categories if name not in labels][:1]
    if differences:
        raise ValueError(
            f"the model's {len(labels)} labels are not the dataset's {len(categories)} categories: "
            f"{', and '.join(differences)}; take a model that was trained for the categories of the dataset"
        )


def _made_from(
    model: VideoMask2Former, videos: AnnotatedVideos, processor: VideoProcessor, top_k: int, how: SegmentOptions
) -> dict[str, Any]:
    """What the predictions depend on. How they are computed (device, chunks, ranks) is not part of it."""
    return {
        "model": model_fingerprint(model),
        "dataset": videos.fingerprint,
        "preprocessing": asdict(processor.config),
        "top_k": top_k,
        "segmentation": options_fingerprint(how),
    }


def _ranks() -> tuple[int, int]:
    """(rank, world size), of one process where `torch.distributed` is not initialised."""
    world_size = num_workers()
    return dist.get_rank() if world_size > 1 else 0, world_size

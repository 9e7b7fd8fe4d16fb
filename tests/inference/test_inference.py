"""segment_video: equal to the plain route through processor, model and post-processing, whatever the chunks."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Event

import numpy as np
import pytest
import torch

from m2f_video import (
    VideoMask2Former,
    VideoProcessor,
    VideoSegmentation,
    open_video,
    segment_video,
)
from m2f_video.inference import on_video, segments
from m2f_video.inference.postprocess import resize_masks
from m2f_video.video import VideoError
from tests.conftest import synthetic_frames


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return synthetic_frames(5, 61, 90)


def decoded_masks(segmentation) -> np.ndarray:
    return np.stack([segmentation.masks(frame) for frame in range(len(segmentation.frames))], axis=1)  # (N, T, H, W)


@pytest.mark.parametrize("size", [(61, 90), (90, 61), (128, 32)])
def test_equals_the_plain_route(tiny_model, size):
    video = synthetic_frames(3, *size)
    processor = VideoProcessor.from_config(tiny_model.config)
    with torch.inference_mode():
        outputs = tiny_model(**processor(video), output_auxiliary=True)
    (plain,) = processor.post_process_video_instance_segmentation(outputs, target_sizes=[size])

    result = segment_video(tiny_model, video, plain=True)

    assert [track.label_id for track in result.tracks] == plain["labels"].tolist()
    assert [track.query_id for track in result.tracks] == plain["query_indices"].tolist()
    assert [track.label for track in result.tracks] == [tiny_model.config.labels[i] for i in plain["labels"].tolist()]
    np.testing.assert_allclose([track.score for track in result.tracks], plain["scores"], rtol=1e-5)
    assert (decoded_masks(result) != plain["masks"].numpy()).mean() < 1e-4  # logits within rounding of zero may differ
    assert (result.width, result.height) == (size[1], size[0])


def test_accelerated_equals_plain(tiny_model, video):
    fast, plain = segment_video(tiny_model, video), segment_video(tiny_model, video, plain=True)
    assert [track.label_id for track in fast.tracks] == [track.label_id for track in plain.tracks]
    np.testing.assert_allclose([t.score for t in fast.tracks], [t.score for t in plain.tracks], rtol=1e-4)
    assert (decoded_masks(fast) != decoded_masks(plain)).mean() < 1e-3


def test_chunks_do_not_change_the_result(tiny_model, video):
    whole, single, pairs = (segment_video(tiny_model, video, frames_per_chunk=size) for size in (5, 1, 2))
    for other in (single, pairs):
        assert [t.label_id for t in other.tracks] == [t.label_id for t in whole.tracks]
        assert (decoded_masks(other) != decoded_masks(whole)).mean() < 1e-4


def test_masks_are_resized_a_bounded_number_at_a_time(tiny_model, video, monkeypatch):
    whole, counts = segment_video(tiny_model, video, frames_per_chunk=5), []

    def resize(logits, *sizes):
        counts.append(len(logits))
        return resize_masks(logits, *sizes)

    monkeypatch.setattr(on_video, "resize_masks", resize)
    for most, expected in ((1, 1), (3 * 61 * 90, 3)):
        counts.clear()
        monkeypatch.setattr(segments, "CHUNK_PIXELS", most)
        assert segment_video(tiny_model, video, frames_per_chunk=5).tracks == whole.tracks
        assert max(counts) == expected


def test_selected_frames_are_the_clip(tiny_model, video):
    selected = segment_video(tiny_model, video, frames=slice(1, None, 2))
    assert selected.frames == (1, 3)
    assert decoded_masks(selected).shape[1] == 2
    np.testing.assert_array_equal(decoded_masks(selected), decoded_masks(segment_video(tiny_model, video[1::2])))


def test_selection_limits_the_tracks(tiny_model, video):
    best = segment_video(tiny_model, video, top_k=3)
    assert len(best.tracks) == 3
    assert [t.id for t in best.tracks] == [1, 2, 3]
    threshold = best.tracks[1].score
    kept = segment_video(tiny_model, video, score_threshold=threshold)
    assert len(kept.tracks) == 2
    assert segment_video(tiny_model, video, score_threshold=1.0).tracks == ()


def test_progress_counts_every_frame(tiny_model, video):
    calls = []
    segment_video(tiny_model, video, frames_per_chunk=2, progress=lambda *call: calls.append(call))
    stages = ("frames", "masks")
    assert calls == [(stage, done, 5) for stage in stages for done in (2, 4, 5)]


def test_saved_files_come_back(tiny_model, video, tmp_path):
    from m2f_video import read_video

    result = segment_video(tiny_model, video)
    result.save(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["overlay.mp4", "tracks.json", "tracks.jsonl"]
    overlay = read_video(tmp_path / "out" / "overlay.mp4")
    assert overlay.shape == (5, 62, 90, 3)  # every player takes even sizes
    again = VideoSegmentation.load(tmp_path / "out")
    assert (again.height, again.width) == video.shape[1:3] == (61, 90)
    np.testing.assert_array_equal(decoded_masks(again), decoded_masks(result))


def test_bfloat16_runs(tiny_config, video):
    model = VideoMask2Former(tiny_config).to(torch.bfloat16).eval()
    assert len(segment_video(model, video).tracks) == 10


@pytest.fixture
def training_model(tiny_config) -> VideoMask2Former:
    """In training mode, where results are random; but for one part, which is not."""
    backbone = replace(tiny_config.backbone, drop_path_rate=0.5)
    torch.manual_seed(0)
    model = VideoMask2Former(tiny_config.replace(backbone=backbone)).train()
    model.pixel_decoder.eval()
    return model


def modes(model) -> list[bool]:
    return [module.training for module in model.modules()]


def assert_equal_results(result, expected) -> None:
    assert [track.score for track in result.tracks] == [track.score for track in expected.tracks]
    np.testing.assert_array_equal(decoded_masks(result), decoded_masks(expected))


def test_a_model_in_training_mode_is_evaluated_and_put_back(training_model, video):
    model = training_model
    first, second = (segment_video(model, video) for _ in range(2))
    assert [track.score for track in first.tracks] == [track.score for track in second.tracks]
    assert model.training
    assert model.backbone.training
    assert not model.pixel_decoder.training


def workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))  # a setting of each thread


def test_threads_share_a_model_in_training_mode(training_model, video):
    video = video[:2]
    expected, before = segment_video(training_model, video), modes(training_model)
    start = Barrier(4)

    def run(_: int) -> VideoSegmentation:
        start.wait(timeout=60)
        return segment_video(training_model, video)

    with workers(4) as pool:
        for result in pool.map(run, range(4)):
            assert_equal_results(result, expected)
    assert modes(training_model) == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("shared", ["model", "backbone"])
def test_a_call_that_ends_leaves_the_others_in_evaluation_mode(training_model, video, shared, fails):
    """The first call ends, or fails, while the second, which began within it, has frames to come."""
    video = video[:2]
    first = second = training_model
    if shared == "backbone":
        second = copy.deepcopy(first)
        second.backbone = first.backbone
    expected, before = segment_video(second, video), [modes(first), modes(second)]
    second_began, first_ended = Event(), Event()

    def wait_for_the_second(*_: object) -> None:
        assert second_began.wait(timeout=60)
        if fails:
            raise ArithmeticError("stopped")

    def wait_for_the_first(*_: object) -> None:
        second_began.set()
        assert first_ended.wait(timeout=60)

    with workers(2) as pool:
        ends = pool.submit(segment_video, first, video, progress=wait_for_the_second)
        goes_on = pool.submit(segment_video, second, video, progress=wait_for_the_first)
        error = ends.exception(timeout=60)
        first_ended.set()
        assert_equal_results(goes_on.result(timeout=60), expected)
    assert isinstance(error, ArithmeticError) if fails else error is None
    assert [modes(first), modes(second)] == before


def test_a_per_frame_model_is_refused(tiny_config, video):
    model = VideoMask2Former(tiny_config.replace(temporal="per_frame")).eval()
    with pytest.raises(ValueError, match="temporal='joint'"):
        segment_video(model, video)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 51}, "10 queries x 5 classes"),
        ({"score_threshold": float("nan")}, "score_threshold"),
        ({"frames_per_chunk": -1}, "frames_per_chunk"),
        ({"frames_per_chunk": 0}, "frames_per_chunk"),
        ({"frames": slice(7, 9)}, "only 5 frames"),
    ],
)
def test_bad_options_fail_before_the_work(tiny_model, video, options, message, monkeypatch):
    monkeypatch.setattr(VideoMask2Former, "encode_frames", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        segment_video(tiny_model, video, **options)


def test_frames_of_an_open_reader_cannot_be_chosen_again(tiny_model, video):
    with pytest.raises(ValueError, match="open_video"):
        segment_video(tiny_model, open_video(video), frames=slice(2))


def test_frames_must_be_a_slice(tiny_model, video):
    with pytest.raises(ValueError, match=r"slice\(0, 100, 2\)"):
        segment_video(tiny_model, video, frames=(0, 2))


def test_the_model_comes_first(tiny_model, video):
    with pytest.raises(TypeError, match="the model comes first"):
        segment_video(video, tiny_model)


def test_no_video_is_an_error(tiny_model):
    with pytest.raises(VideoError, match="no frames"):
        segment_video(tiny_model, np.empty((0, 8, 8, 3), np.uint8))


def test_nan_in_the_model_is_an_error(tiny_config, video):
    model = VideoMask2Former(tiny_config).eval()
    torch.nn.init.constant_(model.transformer_decoder.class_head.bias, float("nan"))
    with pytest.raises(ValueError, match=r"NaN|finite"):
        segment_video(model, video)


def test_another_processor_changes_the_input_size(tiny_model, video, monkeypatch):
    sizes = []
    encode = VideoMask2Former.encode_frames

    def spy(self, frames, output_hidden=False):
        sizes.append(tuple(frames.shape[-2:]))
        return encode(self, frames, output_hidden)

    monkeypatch.setattr(VideoMask2Former, "encode_frames", spy)
    preprocessing = replace(tiny_model.config.preprocessing, shortest_edge=90)
    segment_video(tiny_model, video[:1], processor=VideoProcessor(preprocessing, tiny_model.config.labels))
    assert sizes == [(96, 160)]

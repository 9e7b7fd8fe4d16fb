"""Videos segmented as they come."""

import contextlib
import inspect
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import m2f_video
from m2f_video import open_video, segment_video, stream_video
from m2f_video.inference import VideoStream
from m2f_video.inference.linking import Tracker, TransferLinker
from m2f_video.results.masks import decode_mask
from m2f_video.video.decode import VideoError
from m2f_video.video.reader import TruncatedVideoWarning
from tests.conftest import synthetic_frames
from tests.inference.test_windows import a_window
from tests.video.test_read_once import damage_packet
from tests.video.test_video_io import make_video


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return synthetic_frames(11, 40, 60)


def test_a_stream_gives_what_the_whole_result_holds(tiny_model, video):
    expected = segment_video(tiny_model, video, mode="window", window=4)
    stream = stream_video(tiny_model, iter(video), window=4)
    assert isinstance(stream, VideoStream)
    assert (stream.width, stream.height, stream.fps, stream.source) == (60, 40, 25.0, "<frames>")
    assert stream.labels == tiny_model.config.labels
    assert stream.scores() == []
    results = list(stream)
    assert [result.frame for result in results] == list(range(11))
    for result, frame in zip(results, video, strict=True):
        np.testing.assert_array_equal(result.image, frame)
    scores = stream.scores()
    assert [(s.label_id, s.score, s.id) for s in scores] == [(t.label_id, t.score, t.query_id) for t in expected.tracks]
    for track in expected.tracks:
        assert [result.masks.get(track.query_id) for result in results] == list(track.segmentations)


def test_a_frame_waits_for_its_window_and_no_longer(tiny_model, video):
    given = []

    def camera() -> Iterator[np.ndarray]:
        for index, frame in enumerate(video):
            given.append(index)
            yield frame

    late = [len(given) - 1 - result.frame for result in stream_video(tiny_model, camera(), window=4)]
    assert late == [3, 2, 1, 0, 3, 2, 1, 0, 2, 1, 0]
    given.clear()
    assert [len(given) - 1 - result.frame for result in stream_video(tiny_model, camera(), window=1)] == [0] * 11


def test_frames_before_an_error_of_the_source_are_given(tiny_model, video):
    def unplugged() -> Iterator[np.ndarray]:
        yield from video[:6]
        raise ConnectionError("camera unplugged")

    before = [type(module) for module in tiny_model.modules()]
    stream, seen = stream_video(tiny_model, unplugged(), window=4), []
    with pytest.raises(ConnectionError, match="unplugged"):
        seen.extend(result.frame for result in stream)
    assert seen == [0, 1, 2, 3]
    assert stream.num_frames == 4
    assert len(stream.scores()) > 0
    assert [type(module) for module in tiny_model.modules()] == before


def test_frames_of_another_size_end_a_stream(tiny_model, video):
    frames = [*video[:5], video[5][:30]]
    with pytest.warns(TruncatedVideoWarning, match="frame 5 is 60x30"):
        assert len(list(stream_video(tiny_model, iter(frames), window=4))) == 5
    with pytest.raises(VideoError, match="frame 5 is 60x30"):
        list(stream_video(tiny_model, iter(frames), window=4, strict=True))


def test_what_is_read_once_is_segmented_in_every_mode(tiny_model, video, tmp_path):
    expected = segment_video(tiny_model, video, mode="window")
    result = segment_video(tiny_model, iter(video))
    assert result.tracks == expected.tracks  # auto takes windows, where the length is not known
    assert result.video is None
    with pytest.raises(ValueError, match="no video to draw on"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overlay=False)
    whole = segment_video(tiny_model, iter(video), mode="whole")
    assert whole.tracks == segment_video(tiny_model, video, mode="whole").tracks
    reader = open_video(iter(video))
    assert len(segment_video(tiny_model, reader).frames) == 11
    with pytest.raises(VideoError, match="read once"):
        segment_video(tiny_model, reader)


def test_what_is_left_out_goes_by_certainty_and_what_is_best_by_score(tiny_model, video):
    everything = segment_video(tiny_model, video, mode="window", window=2, top_k=40).tracks
    brief = [track for track in everything if track.certainty > track.score + 1e-3]
    assert brief  # what is not seen in all windows
    threshold = max(track.certainty for track in brief)
    kept = segment_video(tiny_model, video, mode="window", window=2, top_k=40, score_threshold=threshold).tracks
    assert [track.id for track in kept] == [track.id for track in everything if track.certainty >= threshold]
    assert min(track.score for track in kept) < threshold


def test_tracks_have_the_ids_of_their_masks_in_frames(tiny_model, video):
    tracks = segment_video(tiny_model, video, mode="window", window=4, top_k=40).tracks
    first = {track.query_id: track.id for track in reversed(tracks)}  # as its likeliest class
    assert all(query == id_ for query, id_ in first.items())
    again = [track.id for track in tracks if track.id != track.query_id]
    assert again == sorted(again)
    assert again[0] > max(first)


def test_a_stream_draws_what_is_seen_in_a_frame(tiny_model, video):
    stream = stream_video(tiny_model, video, window=4, top_k=3)
    for result in stream:
        drawn = stream.draw(result)
        assert drawn.shape == (40, 60, 3)
        changed = (drawn != result.image).any(-1)
        masks = [decode_mask(rle) for rle in result.masks.values()]
        assert sum(changed[mask].mean() > 0.9 for mask in masks) >= min(3, len(masks))
        np.testing.assert_array_equal(stream.draw(result, score_threshold=1.0), result.image)
    with pytest.raises(ValueError, match="score_threshold"):
        stream.draw(result, score_threshold=2.0)


def test_a_video_without_objects_has_no_scores(tiny_model, video):
    head = tiny_model.transformer_decoder.class_head
    kept = head.bias.detach().clone()
    with torch.no_grad():
        head.bias[-1] = 1000.0
    try:
        result = segment_video(tiny_model, video, mode="window", window=4)
    finally:
        with torch.no_grad():
            head.bias.copy_(kept)
    assert (result.tracks, len(result.frames)) == ((), 11)


@pytest.mark.parametrize(("stride", "kept"), [(4, [4, 0, 0]), (1, [4, 4, 0])])
def test_a_track_that_is_missed_is_small(stride, kept):
    tracker = Tracker(TransferLinker(memory=1))
    tracker.link(a_window([2, 5]))
    for number, frames in enumerate(kept, 1):
        tracker.link(a_window([], start=number * stride))
        track = tracker.tracks[1]
        assert len(track.mask_logits) == frames
        for tensor in (track.mask_embedding, track.probabilities, track.mask_logits):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # and no window behind it
    assert tracker.link(a_window([2], start=len(kept) * stride + stride)) == [3]
    assert tracker.scores().shape == (3, 3)


def test_streams_are_checked_as_segment_video_does(tiny_model, video):
    ours, theirs = (inspect.signature(function).parameters for function in (stream_video, segment_video))
    assert {name: str(p) for name, p in ours.items()} == {
        name: str(p) for name, p in theirs.items() if name not in ("mode", "score_threshold")
    }
    for options, message in [
        ({"window": 0}, "window"),
        ({"stride": 9}, "stride"),
        ({"linker": "magic"}, "linker"),
        ({"top_k": 0}, "top_k"),
        ({"frames_per_chunk": 0}, "frames_per_chunk"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_video(tiny_model, video, **options)
    with pytest.raises(TypeError, match="the model comes first"):
        stream_video(video, tiny_model)
    with pytest.raises(VideoError, match="holds no frames"):
        stream_video(tiny_model, iter([]))
    assert {"stream_video"} <= set(m2f_video.__all__)


def test_closing_an_iteration_puts_the_model_back(tiny_model, video):
    before = [type(module) for module in tiny_model.modules()]
    with contextlib.closing(iter(stream_video(tiny_model, iter(video), window=4))) as results:
        next(results)
    assert [type(module) for module in tiny_model.modules()] == before


def test_a_corrupt_frame_leaves_the_timing_as_it_is(tiny_model, tmp_path):
    path = make_video(tmp_path / "a.mp4", "mjpeg", "yuvj420p")
    damage_packet(path, 4)
    with pytest.warns(TruncatedVideoWarning, match="left out: 1"):
        result = segment_video(tiny_model, path, mode="window", window=4)
    assert result.frames == (0, 1, 2, 3, *range(5, 12))
    result.save(tmp_path / "out")
    overlay = open_video(tmp_path / "out" / "overlay.mp4")
    assert len(list(overlay)) == 11
    assert float(11 / overlay.fps) == pytest.approx(12 / 25, rel=0.01)
    with path.open("rb") as file, pytest.warns(TruncatedVideoWarning):
        assert tuple(frame.frame for frame in stream_video(tiny_model, file)) == result.frames

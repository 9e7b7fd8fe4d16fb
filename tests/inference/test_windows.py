"""Videos in windows: cut, decoded and linked."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from m2f_video import segment_video
from m2f_video.inference.linking import (
    LINKERS,
    MaskIouLinker,
    Tracker,
    TransferLinker,
    Window,
    assign_most,
    class_similarity,
    named_linker,
    soft_iou,
)
from m2f_video.inference.on_video import ModelOnVideo
from m2f_video.inference.processor import VideoProcessor
from m2f_video.inference.segment import MOST_WHOLE, choose_mode
from m2f_video.inference.stream import VideoStream
from m2f_video.inference.windows import Windowing, likely_queries, window_features, without_duplicates
from m2f_video.modeling.transformer_decoder import MaskProduct
from m2f_video.video.reader import open_video
from tests.inference.test_inference import decoded_masks


def windowing(window: int = 4, stride: int | None = None, **changes) -> Windowing:
    options = {"linker": TransferLinker(), "max_overlap": 0.5, "top_k": 10} | changes
    return Windowing(window=window, stride=window if stride is None else stride, **options)


def on_video(model, frames: np.ndarray, chunk: int = 2) -> ModelOnVideo:
    return ModelOnVideo(model, open_video(frames), VideoProcessor.from_config(model.config), chunk)


@pytest.fixture(scope="module")
def long_video() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 40, 60, 3), dtype=np.uint8)


# -- cutting


@pytest.mark.parametrize(
    ("count", "window", "stride", "expected"),
    [
        (8, 4, 4, [(0, 4, 4), (4, 4, 4)]),
        (11, 4, 4, [(0, 4, 4), (4, 4, 4), (7, 4, 3)]),
        (9, 4, 2, [(0, 4, 4), (2, 4, 2), (4, 4, 2), (5, 4, 1)]),
        (5, 4, 1, [(0, 4, 4), (1, 4, 1)]),
        (3, 8, 8, [(0, 3, 3)]),
        (3, 1, 1, [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
    ],
)
def test_windows_cover_the_video(tiny_model, long_video, count, window, stride, expected):
    video = on_video(tiny_model, long_video[:count])
    with torch.inference_mode():
        whole = video.encode(long_video[:count])
        cut = list(window_features(video, windowing(window, stride)))
    assert [(part.start, len(part.features.mask_features), len(part.images)) for part in cut] == expected
    for part in cut:
        frames = slice(part.start, part.start + len(part.features.mask_features))
        torch.testing.assert_close(part.features.mask_features, whole.mask_features[frames], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(part.features.multi_scale, whole.multi_scale, strict=True):
            torch.testing.assert_close(ours, theirs[frames], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stride", "chunk"), [(4, 3), (3, 2), (2, 2), (1, 3)])
def test_windows_after_some_frames_are_those_of_all(tiny_model, long_video, stride, chunk):
    video, how = on_video(tiny_model, long_video, chunk), windowing(4, stride)
    with torch.inference_mode():
        every = list(window_features(video, how))
        for number, window in enumerate(every):
            done = window.start + len(window.features.mask_features)
            rest = list(window_features(video, how, done))
            assert [part.start for part in rest] == [part.start for part in every[number + 1 :]]
            for ours, theirs in zip(rest, every[number + 1 :], strict=True):
                assert torch.equal(ours.features.mask_features, theirs.features.mask_features)
                np.testing.assert_array_equal(ours.images, theirs.images)


# -- the whole video in one window


def test_a_window_that_covers_the_video_is_the_whole(tiny_model, long_video):
    whole = segment_video(tiny_model, long_video, mode="whole")
    window = segment_video(tiny_model, long_video, mode="window", window=16, max_overlap=1.0)
    assert [(t.label, t.score) for t in window.tracks] == [(t.label, t.score) for t in whole.tracks]
    assert [t.segmentations for t in window.tracks] == [t.segmentations for t in whole.tracks]
    assert window.frames == whole.frames


@pytest.mark.parametrize("mode", ["whole", "window"])
def test_the_size_of_chunks_changes_rounding_alone(tiny_model, long_video, mode):
    one, *others = (
        segment_video(tiny_model, long_video, mode=mode, window=4, frames_per_chunk=size) for size in (1, 3, 11)
    )
    for other in others:
        assert [t.label_id for t in other.tracks] == [t.label_id for t in one.tracks]
        assert (decoded_masks(other) != decoded_masks(one)).mean() < 1e-4


def test_duplicates_can_be_left_out_of_a_whole_video(tiny_model, long_video):
    kept = segment_video(tiny_model, long_video, mode="whole", max_overlap=1.0)
    assert kept.tracks == segment_video(tiny_model, long_video, mode="whole").tracks
    fewer = segment_video(tiny_model, long_video, mode="whole", max_overlap=0.0)  # none may overlap at all
    assert 1 <= len({track.query_id for track in fewer.tracks}) < len({track.query_id for track in kept.tracks})


def test_taps_have_an_entry_of_each_window(tiny_model, long_video):
    attention = "transformer_decoder.layers.0.cross_attn.attention_weights"
    with tiny_model.capture("transformer_decoder", "backbone", attention) as taps:
        segment_video(tiny_model, long_video, mode="window", window=4)
    assert [len(taps.calls(name)) for name in ("transformer_decoder", "backbone", attention)] == [3, 3, 3]
    assert {len(maps[0]) for maps in taps.calls("backbone")} == {4}
    assert {weights.shape[-1] % 4 for weights in taps.calls(attention)} == {0}


# -- linking


def a_window(places: list[int], start: int = 0, classes: list[int] | None = None, frames: int = 4) -> Window:
    """Objects that are columns of an image 8 wide, whose embeddings pick these columns out of the features."""
    features = torch.eye(8)[None, :, None, :].expand(frames, 8, 2, 8) * 20 - 10  # (W, C, h, w): channel c is column c
    embeddings = torch.eye(8)[places] if places else torch.zeros(0, 8)
    product = MaskProduct()
    probabilities = torch.full((len(places), 4), 0.02)
    for row, label in enumerate(classes or [0] * len(places)):
        probabilities[row, label] = 0.94
    logits = product(embeddings[None], features[None])[0]
    return Window(start, torch.arange(len(places)), probabilities, embeddings, logits, features, product)


def test_objects_keep_their_tracks_in_any_order():
    tracker = Tracker(TransferLinker())
    assert tracker.link(a_window([1, 5])) == [1, 2]
    assert tracker.link(a_window([5, 1, 7])) == [2, 1, 3]
    assert tracker.link(a_window([7])) == [3]
    scores = tracker.scores()
    assert scores.shape == (3, 3)
    torch.testing.assert_close(scores[:, 0], torch.tensor([2, 2, 2]) * 0.94 / 3)  # seen in two of three windows
    torch.testing.assert_close(tracker.certainties()[:, 0], torch.full((3,), 0.94))  # as certain as where they are seen


def test_a_track_that_is_missed_comes_back_until_it_is_forgotten():
    for gap, expected in ((0, 1), (3, 1), (4, 2)):
        tracker = Tracker(TransferLinker(memory=3))
        tracker.link(a_window([2]))
        for _ in range(gap):
            assert tracker.link(a_window([])) == []
        assert tracker.link(a_window([2])) == [expected]


def test_another_class_or_place_is_another_track():
    tracker = Tracker(TransferLinker(threshold=1.5))  # of at most 2: masks alone or classes alone are not enough
    tracker.link(a_window([2], classes=[0]))
    assert tracker.link(a_window([2], classes=[1])) == [2]
    assert tracker.link(a_window([3], classes=[1])) == [3]


def test_masks_in_shared_frames_link():
    tracker = Tracker(MaskIouLinker())
    assert tracker.link(a_window([1, 5], start=0)) == [1, 2]
    assert tracker.link(a_window([5, 1], start=2)) == [2, 1]
    assert tracker.link(a_window([5, 1], start=6)) == [3, 4]  # no frame is shared


def test_every_query_is_a_slot_of_the_embedding_linker(tiny_model, long_video):
    stream = VideoStream(on_video(tiny_model, long_video), windowing(linker=named_linker("embedding")))
    list(stream)
    assert len(stream._tracker.tracks) == tiny_model.config.transformer_decoder.num_queries


def test_similarities_are_what_they_say():
    a, b = torch.randn(3, 2, 4, 5), torch.randn(2, 2, 4, 5)
    p, q = a[1].sigmoid(), b[0].sigmoid()
    torch.testing.assert_close(soft_iou(a, b)[1, 0], (p * q).sum() / (p + q - p * q).sum())
    same = torch.tensor([[0.2, 0.6, 0.2]])
    torch.testing.assert_close(class_similarity(same, same), torch.ones(1, 1))
    assert class_similarity(torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])) == 0
    assert assign_most(torch.tensor([[0.9, 0.8], [0.8, 0.1]]), 0.5) == [(0, 1), (1, 0)]
    assert assign_most(torch.tensor([[0.9, 0.4]]), 0.9) == []


@dataclass
class NewIds:
    """A linker of one's own: nothing is ever linked."""

    threshold: float = math.inf
    memory: int = 0
    every_query: bool = False

    def similarity(self, tracks, window, missed):
        return torch.zeros(len(tracks), len(window.queries))


def test_a_linker_of_ones_own_is_an_argument(tiny_model, long_video):
    alone = segment_video(tiny_model, long_video, mode="window", window=4, linker=NewIds())
    for track in alone.tracks:
        seen = [position for position, rle in enumerate(track.segmentations) if rle is not None]
        assert len({min(position // 4, 2) for position in seen}) <= 1


@pytest.mark.parametrize(
    ("similarity", "named"),
    [
        (torch.zeros(2, 1), r"Given.similarity must be a tensor of \(2, 3\) \(tracks, objects\), got \(2, 1\)"),
        (torch.zeros(3, 2), r"got \(3, 2\)"),
        (None, "got NoneType"),
        (torch.full((2, 3), torch.nan), "holds NaN or infinite values"),
        (torch.full((2, 3), -torch.inf), "holds NaN or infinite values"),
    ],
)
def test_a_similarity_that_is_none_is_told(similarity, named):
    class Given(NewIds):
        def similarity(self, tracks, window, missed):
            return similarity

    tracker = Tracker(Given())
    tracker.link(a_window([1, 5]))
    with pytest.raises(ValueError, match=named):
        tracker.link(a_window([5, 1, 7]))


def test_a_similarity_may_be_of_any_type():
    class Given(NewIds):
        def similarity(self, tracks, window, missed):
            return torch.eye(2, dtype=torch.bfloat16)

    tracker = Tracker(Given(threshold=0.5))
    assert tracker.link(a_window([1, 5])) == tracker.link(a_window([5, 1])) == [1, 2]


@pytest.mark.parametrize("linker", list(LINKERS))
def test_every_linker_runs(tiny_model, long_video, linker):
    result = segment_video(tiny_model, long_video, mode="window", window=4, stride=2, linker=linker)
    assert len(result.frames) == 11
    assert 1 <= len(result.tracks) <= 10


# -- duplicates and candidates


def test_what_better_masks_cover_is_a_duplicate():
    masks = torch.zeros(5, 2, 4, 4, dtype=torch.bool)
    masks[0, :, :2] = True
    masks[1, :, :3] = True  # two thirds of it are the first's
    masks[2, :, 3] = True
    masks[3, :, 1:] = True  # a third is the first's, a third the third's
    assert without_duplicates(masks, 0.5).tolist() == [0, 2, 4]  # the last has no pixel
    assert without_duplicates(masks, 0.7).tolist() == [0, 1, 2, 4]
    assert without_duplicates(masks[[0, 3]], 0.5).tolist() == [0, 1]
    assert without_duplicates(masks[:0], 0.5).tolist() == []


def test_likely_queries_are_objects_the_most_certain_first():
    logits = torch.tensor([[0.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [1.0, 0.0, 1.1]])
    assert likely_queries(logits, None).tolist() == [2, 1]
    assert likely_queries(logits, 3).tolist() == [2, 1, 3]


# -- the stream


def test_frames_come_when_they_are_final(tiny_model, long_video):
    read = []

    class Watched(type(open_video(long_video))):
        def __iter__(self):
            for number, frame in enumerate(super().__iter__()):
                read.append(number)
                yield frame

    video = on_video(tiny_model, long_video)
    video.reader.__class__ = Watched
    stream = VideoStream(video, windowing(4))
    late = []
    for number, result in enumerate(stream):
        assert result.frame == number
        late.append(read[-1] - number)
        assert stream.scores() == sorted(stream.scores(), key=lambda score: -score.score)
    assert max(late) < 4
    assert stream.num_frames == 11
    with pytest.raises(ValueError, match="once"):
        next(iter(stream))


def test_an_abandoned_stream_leaves_the_model_as_it_was(tiny_model, long_video):
    before = [type(module) for module in tiny_model.modules()]
    stream = iter(VideoStream(on_video(tiny_model, long_video), windowing(4)))
    next(stream)
    stream.close()
    assert [type(module) for module in tiny_model.modules()] == before


# -- choosing


def test_auto_is_whole_for_short_videos():
    assert choose_mode("auto", MOST_WHOLE)[0] == "whole"
    mode, why = choose_mode("auto", MOST_WHOLE + 1)
    assert (mode, str(MOST_WHOLE + 1) in why) == ("window", True)
    assert choose_mode("auto", None)[0] == "window"
    assert choose_mode("whole", 10**6)[0] == "whole"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "both"}, "mode"),
        ({"window": 0}, "window"),
        ({"window": 10**9}, "window"),
        ({"window": 4, "stride": 5}, "stride"),
        ({"stride": 0}, "stride"),
        ({"linker": "magic"}, "linker"),
        ({"max_overlap": 1.5}, "max_overlap"),
        ({"max_overlap": math.nan}, "max_overlap"),
        ({"window": 2.5}, "window must be a whole number"),
        ({"window": True}, "window must be a whole number"),
        ({"stride": "2"}, "stride must be a whole number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"frames_per_chunk": 1.5}, "frames_per_chunk must be a whole number"),
        ({"max_overlap": "0.5"}, "max_overlap must be between"),
        ({"score_threshold": None}, "score_threshold must be between"),
        ({"linker": 3}, "one of your own with threshold"),
    ],
)
def test_bad_options_are_named_before_the_work(tiny_model, long_video, options, named):
    with pytest.raises(ValueError, match=named):
        segment_video(tiny_model, long_video, progress=lambda *_: pytest.fail("it has begun"), **options)


def test_logits_that_are_no_numbers_are_told(tiny_model, long_video):
    broken = replace(on_video(tiny_model, long_video))
    with torch.no_grad():
        kept = tiny_model.transformer_decoder.class_head.bias.clone()
        tiny_model.transformer_decoder.class_head.bias.fill_(math.nan)
    try:
        with pytest.raises(ValueError, match="class logits hold NaN"):
            list(VideoStream(broken, windowing(4)))
    finally:
        with torch.no_grad():
            tiny_model.transformer_decoder.class_head.bias.copy_(kept)

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f_video.results import drawing
from m2f_video.results.drawing import draw_tracks, track_colors
from m2f_video.results.masks import encode_mask
from m2f_video.results.palette import derive_palette, palette, seen_colors
from m2f_video.results.tracks import OVERLAY_FILE, Track, VideoSegmentation
from m2f_video.video import VideoError, VideoWriter, open_video, read_video

H, W, T = 96, 128, 6
GREY = 100
FRAME = np.full((H, W, 3), GREY, np.uint8)
COLORS = np.array([[250, 30, 30], [30, 30, 250]], np.uint8)


def box_mask(top: int, left: int, height: int = 30, width: int = 40) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def changed(image: np.ndarray) -> np.ndarray:
    return (image != FRAME).any(-1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(float) - b.astype(float)))


# --- colours


def test_colours_depend_on_their_number_alone() -> None:
    np.testing.assert_array_equal(track_colors(range(50))[:7], track_colors(range(7)))
    np.testing.assert_array_equal(track_colors([9, 3, 10**12])[1], track_colors(range(4))[3])
    assert track_colors(range(50)).dtype == np.uint8
    assert track_colors([]).shape == (0, 3)
    assert len(np.unique(track_colors(range(60)), axis=0)) == 60


def between(colors: np.ndarray) -> np.ndarray:
    """Distances of colours in OKLab, times 100, with none of a colour from itself."""
    return np.linalg.norm(colors[:, None] - colors[None], axis=2) + 1e9 * np.eye(len(colors))


@pytest.mark.parametrize(
    ("eyes", "of_thirty", "of_ten"), [("normal", 10, 20), ("protanopia", 5.2, 11.9), ("deuteranopia", 5.2, 11.9)]
)
def test_any_thirty_tracks_in_a_row_have_colours_apart(eyes: str, of_thirty: float, of_ten: float) -> None:
    seen = seen_colors(track_colors(range(1, 121)))[eyes]
    for first in range(91):
        assert between(seen[first : first + 30]).min() > of_thirty  # 2 is what an eye just tells apart
    assert between(seen[:10]).min() > of_ten


def test_colours_are_neither_black_nor_white_nor_grey() -> None:
    light, a, b = seen_colors(track_colors(range(60)))["normal"].T
    assert light.min() > 40
    assert light.max() < 97
    assert np.hypot(a, b).min() > 4.9


def test_the_palette_is_what_its_rule_gives() -> None:
    np.testing.assert_array_equal(derive_palette(60), palette())


def test_colour_blind_eyes_are_simulated() -> None:
    views = seen_colors(np.array([[255, 0, 0], [0, 160, 0], [255, 255, 255], [0, 0, 255], [120, 120, 120]]))
    for name in ("protanopia", "deuteranopia"):
        for same in (2, 3, 4):  # white, blue and grey look as they are
            np.testing.assert_allclose(views[name][same], views["normal"][same], atol=0.3)
        hue = np.abs(views[name][:2] - views["normal"][:2])[:, 1:].max(1)
        assert hue.min() > 5  # red and green do not
        assert abs(views[name][0, 1] - views[name][1, 1]) < abs(views["normal"][0, 1] - views["normal"][1, 1]) / 5


# --- drawing


def test_fill_mixes_the_colour_and_the_outline_frames_it() -> None:
    mask = box_mask(40, 40)
    image = draw_tracks(FRAME, mask[None], COLORS[:1], [""], alpha=0.5)
    inside = image[45:65, 45:75].reshape(-1, 3)
    assert np.abs(inside.astype(int) - (GREY + COLORS[0].astype(int)) / 2).max() <= 1
    np.testing.assert_array_equal(np.unique(image[40, 40:80], axis=0), np.unique(image[40:70, 40], axis=0))
    assert image[40, 50].astype(int).sum() > image[50, 50].astype(int).sum()  # a light line inside the edge
    assert image[39, 50].max() == GREY // 2  # a dark one outside
    grown = np.zeros_like(mask)
    grown[39:71, 39:81] = True
    assert not (changed(image) & ~grown).any()
    np.testing.assert_array_equal(FRAME, np.full((H, W, 3), GREY, np.uint8))  # what was given is not drawn on


def test_a_stray_speck_does_not_take_the_tag_away() -> None:
    mask = box_mask(50, 70)
    speck = mask | box_mask(4, 4, 8, 8)
    tagged, plain = (draw_tracks(FRAME, speck[None], COLORS[:1], [text]) for text in ("cat 0.9", ""))
    rows, columns = np.nonzero((tagged != plain).any(-1))
    assert rows.min() > 20
    assert columns.mean() > 64


def test_alpha_reaches_from_none_to_solid() -> None:
    mask = box_mask(40, 40)
    none, solid = (draw_tracks(FRAME, mask[None], COLORS[:1], [""], alpha=alpha) for alpha in (0.0, 1.0))
    assert (none[45:65, 45:75] == GREY).all()
    assert (solid[45:65, 45:75] == COLORS[0]).all()


def test_the_first_track_is_on_top() -> None:
    masks = np.stack([box_mask(30, 30), box_mask(40, 45)])
    image = draw_tracks(FRAME, masks, COLORS, ["", ""], alpha=1.0)
    assert (image[50, 55] == COLORS[0]).all()
    assert (image[65, 80] == COLORS[1]).all()
    swapped = draw_tracks(FRAME, masks[::-1], COLORS[::-1], ["", ""], alpha=1.0)
    assert (swapped[50, 55] == COLORS[1]).all()


def test_empty_masks_draw_nothing() -> None:
    image = draw_tracks(FRAME, np.zeros((2, H, W), bool), COLORS, ["dog 0.90", "cat 0.80"])
    np.testing.assert_array_equal(image, FRAME)
    np.testing.assert_array_equal(draw_tracks(FRAME, np.zeros((0, H, W), bool), COLORS[:0], []), FRAME)


def tag_pixels(masks: np.ndarray, texts: list[str]) -> np.ndarray:
    """Where an image with tags differs from the same one without."""
    with_tags = draw_tracks(FRAME, masks, COLORS[: len(masks)], texts)
    return (with_tags != draw_tracks(FRAME, masks, COLORS[: len(masks)], [""] * len(masks))).any(-1)


def test_a_tag_sits_above_its_mask_in_its_colour() -> None:
    mask = box_mask(40, 40)
    tag = tag_pixels(mask[None], ["dog 0.9"])
    rows, columns = np.nonzero(tag)
    assert rows.max() < 40
    assert rows.min() > 40 - 22
    assert abs(columns.mean() - 60) < 3
    image = draw_tracks(FRAME, mask[None], COLORS[:1], ["dog 0.9"])[tag]
    assert (image == COLORS[0]).all(1).mean() > 0.4  # the box
    assert (image.min(1) > 200).any()  # white on dark red, so that it can be read


@pytest.mark.parametrize("corner", [(0, 0), (0, W - 40), (H - 30, 0), (H - 30, W - 40)])
def test_tags_stay_whole_inside_the_frame(corner: tuple[int, int]) -> None:
    sizes = {int(tag_pixels(box_mask(*place)[None], ["giant_panda 0.9"]).any(0).sum()) for place in (corner, (40, 40))}
    assert len(sizes) == 1
    assert next(iter(sizes)) > 60


def test_tags_of_touching_tracks_do_not_cover_each_other() -> None:
    masks = np.stack([box_mask(40, 40), box_mask(41, 42)])
    alone = [tag_pixels(masks[:1], ["dog 0.9"]).sum(), tag_pixels(masks[1:], ["cat 0.8"]).sum()]
    both = tag_pixels(masks, ["dog 0.9", "cat 0.8"]).sum()
    assert both == pytest.approx(sum(alone), rel=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.tuples(st.integers(8, 90), st.integers(8, 160)))
def test_tags_neither_cover_each_other_nor_leave_the_frame(seed: int, count: int, size: tuple[int, int]) -> None:
    rng, (height, width) = np.random.default_rng(seed), size
    taken: list[drawing.Box] = []
    for _ in range(count):
        tag = int(rng.integers(10, 60)), 14
        top = int(rng.integers(0, height))
        mask = int(rng.integers(0, width)), top, int(rng.integers(top, height)) + 1
        place = drawing._place(mask, tag, (width, height), taken)
        if place is None:  # only where there is none: looked for everywhere
            assert not any(
                not any(drawing._overlap((x, y, x + tag[0], y + tag[1]), other) for other in taken)
                for y in range(height - tag[1] + 1)
                for x in range(width - tag[0] + 1)
            )
            continue
        left, top, right, bottom = place
        assert (right - left, bottom - top) == tag
        assert min(left, top) >= 0
        assert right <= width
        assert bottom <= height
        assert not any(drawing._overlap(place, other) for other in taken)
        taken.append(place)


def test_a_tag_goes_aside_where_its_column_is_full() -> None:
    taken = [(40, y, 80, y + 12) for y in range(0, 96, 12)]
    place = drawing._place((60, 40, 60), (40, 12), (W, H), taken)
    assert place is not None
    assert place[0] in (0, 80)
    assert place[1] == 26


def test_a_tag_of_several_lines_is_one() -> None:
    one, several = (draw_tracks(FRAME, box_mask(40, 40)[None], COLORS[:1], [text]) for text in ("a b", "a\n\t b"))
    np.testing.assert_array_equal(one, several)


def test_many_tags_on_a_small_frame_are_fewer() -> None:
    masks = np.stack([box_mask(30, 30)] * 80)
    image = draw_tracks(FRAME, masks, track_colors(range(80)), [f"c{n}" for n in range(80)])
    shown = [n for n, color in enumerate(track_colors(range(80))[1:60], 1) if (image == color).all(-1).sum() > 100]
    assert 20 < len(shown) < 50  # one over the other would show parts of them
    assert shown == list(range(1, len(shown) + 1))


def test_a_hidden_track_keeps_its_tag() -> None:
    masks = np.stack([box_mask(40, 40), box_mask(45, 45, 10, 10)])
    image = draw_tracks(FRAME, masks, COLORS, ["dog 0.9", "cat 0.8"])
    assert (image == COLORS[1]).all(-1).sum() > 50


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 6), st.integers(0, 2**32 - 1), st.text(max_size=30))
def test_any_size_and_any_text_can_be_drawn(height: int, width: int, count: int, seed: int, text: str) -> None:
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (height, width, 3), np.uint8)
    masks = rng.random((count, height, width)) < rng.random((count, 1, 1)) ** 3
    image = draw_tracks(frame, masks, track_colors(range(count)), [text.replace("\n", " ")] * count)
    assert image.shape == frame.shape
    assert image.dtype == np.uint8


def test_masks_may_come_one_by_one() -> None:
    masks = np.stack([box_mask(30, 30), box_mask(40, 45)])
    one_by_one = draw_tracks(FRAME, iter(masks), COLORS, ["dog", "cat"])
    np.testing.assert_array_equal(one_by_one, draw_tracks(FRAME, masks, COLORS, ["dog", "cat"]))


def test_more_tracks_than_a_byte_counts() -> None:
    masks = np.zeros((300, H, W), bool)
    masks[:, 50, 50] = True
    masks[299, 10:20, 10:20] = True
    image = draw_tracks(FRAME, masks, track_colors(range(300)), [""] * 300, alpha=1.0)
    assert (image[15, 15] == track_colors(range(300))[299]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": FRAME[..., 0]}, "a frame is uint8 RGB"),
        ({"frame": FRAME / 255}, "a frame is uint8 RGB"),
        ({"masks": np.zeros((1, W, H), bool)}, "a mask of this frame is bool"),
        ({"masks": np.zeros((H, W), bool)}, "a mask of this frame is bool"),
        ({"masks": np.full((1, H, W), np.nan)}, "a mask of this frame is bool"),
        ({"masks": np.zeros((2, H, W), bool)}, "more masks than the 1 texts"),
        ({"masks": []}, "0 masks but 1 texts"),
        ({"colors": COLORS}, "colors are uint8"),
        ({"colors": COLORS[:1] / 255}, "colors are uint8"),
        ({"texts": []}, r"colors are uint8 \(0, 3\) for 0 texts"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_drawing_that_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    arguments = {"frame": FRAME, "masks": box_mask(9, 9)[None], "colors": COLORS[:1], "texts": ["dog"]} | changes
    with pytest.raises(ValueError, match=message):
        draw_tracks(**arguments)


# --- overlays


def make_segmentation(tracks: list[tuple[int, float, int, int]], **changes: Any) -> VideoSegmentation:
    """Tracks are (id, score, query, left end of the mask)."""
    made = tuple(
        Track(id=number, label=f"class{number}", label_id=number, score=score, query_id=query,
              segmentations=(encode_mask(box_mask(50, left)),) * T)
        for number, score, query, left in tracks
    )  # fmt: skip
    fields = {"source": "a.mp4", "width": W, "height": H, "fps": 25, "frames": range(T), "tracks": made}
    return VideoSegmentation(**(fields | {"labels": [f"class{n}" for n in range(9)]} | changes))


def center(path: Path, left: int) -> np.ndarray:
    """Colour of a track's fill in the first frame of an overlay, below any tag."""
    return read_video(path)[0, 68:77, left + 10 : left + 30].reshape(-1, 3).mean(0)


def tint(number: int) -> np.ndarray:
    return 0.55 * GREY + 0.45 * track_colors([number])[0]


VIDEO = np.full((12, H, W, 3), GREY, np.uint8)


def render_overlay(segmentation: VideoSegmentation, video: Any, path: Path, **options: Any) -> None:
    folder = path.with_suffix("")
    dataclasses.replace(segmentation, video=video).save(folder, **options)
    (folder / OVERLAY_FILE).replace(path)


def test_an_overlay_has_the_size_and_rate_of_the_video(tmp_path: Path) -> None:
    source = tmp_path / "a.mp4"
    fps = Fraction(30000, 1001)
    with VideoWriter(source, fps, W, H) as writer:
        for frame in VIDEO[:T]:
            writer.write(frame)
    render_overlay(make_segmentation([(1, 0.9, 0, 20)], fps=fps), str(source), tmp_path / "o.mp4")
    reader = open_video(tmp_path / "o.mp4", strict=True)
    assert (reader.fps, reader.width, reader.height, len(list(reader))) == (fps, W, H, T)
    assert distance(center(tmp_path / "o.mp4", 20), tint(1)) < 12


@pytest.mark.parametrize("fps", [1 / 3600, 1 / 86400])
def test_pictures_taken_once_an_hour_or_a_day_have_an_overlay(tmp_path: Path, fps: float) -> None:
    render_overlay(make_segmentation([(1, 0.9, 0, 20)], fps=fps), VIDEO, tmp_path / "o.mp4")
    assert len(list(open_video(tmp_path / "o.mp4", strict=True))) == T


def test_colours_follow_the_track_not_its_rank(tmp_path: Path) -> None:
    for scores in ((0.9, 0.5), (0.5, 0.9)):
        segmentation = make_segmentation([(1, scores[0], 0, 2), (2, scores[1], 1, 60)])
        render_overlay(segmentation, VIDEO, tmp_path / "o.mp4")
        assert distance(center(tmp_path / "o.mp4", 2), tint(1)) < 12
        assert distance(center(tmp_path / "o.mp4", 60), tint(2)) < 12


def test_higher_scores_are_on_top(tmp_path: Path) -> None:
    for scores, top in (((0.9, 0.5), 1), ((0.5, 0.9), 2)):
        render_overlay(make_segmentation([(1, scores[0], 0, 30), (2, scores[1], 1, 30)]), VIDEO, tmp_path / "o.mp4")
        assert distance(center(tmp_path / "o.mp4", 30), tint(top)) < 12


def test_one_query_is_drawn_once_under_its_best_label(tmp_path: Path) -> None:
    render_overlay(make_segmentation([(1, 0.4, 5, 30), (2, 0.8, 5, 30)]), VIDEO, tmp_path / "two.mp4")
    render_overlay(make_segmentation([(2, 0.8, 5, 30)]), VIDEO, tmp_path / "one.mp4")
    np.testing.assert_array_equal(read_video(tmp_path / "two.mp4"), read_video(tmp_path / "one.mp4"))


def test_low_scores_can_be_left_out(tmp_path: Path) -> None:
    segmentation = make_segmentation([(1, 0.9, 0, 2), (2, 0.2, 1, 60)])
    render_overlay(segmentation, VIDEO, tmp_path / "o.mp4", min_score=0.5)
    assert distance(center(tmp_path / "o.mp4", 2), tint(1)) < 12
    assert distance(center(tmp_path / "o.mp4", 60), np.full(3, GREY)) < 6


@pytest.mark.parametrize("sliced", [False, True])
def test_skipped_frames_play_in_real_time_on_the_right_frames(tmp_path: Path, sliced: bool) -> None:
    video = np.stack([np.full((H, W, 3), 20 * index, np.uint8) for index in range(12)])
    segmentation = make_segmentation([], frames=range(1, 12, 2), fps=30)
    calls: list[tuple[int, int]] = []
    source = open_video(video, slice(1, None, 2)) if sliced else video
    render_overlay(segmentation, source, tmp_path / "o.mp4", progress=lambda done, total: calls.append((done, total)))
    reader = open_video(tmp_path / "o.mp4")
    assert reader.fps == 15
    assert [round(frame.mean() / 20) for frame in reader] == [1, 3, 5, 7, 9, 11]
    assert calls == [(n, 6) for n in range(1, 7)]


def test_a_video_that_is_not_the_one_segmented(tmp_path: Path) -> None:
    segmentation = make_segmentation([(1, 0.9, 0, 2)])
    with pytest.raises(VideoError, match="the video is 64x96 but the segmented one was 128x96"):
        render_overlay(segmentation, VIDEO[:, :, :64], tmp_path / "o.mp4")
    with pytest.raises(VideoError, match="frame 5 was segmented but the video does not give it"):
        render_overlay(segmentation, VIDEO[:5], tmp_path / "o.mp4")
    with pytest.raises(VideoError, match="frame 0 was segmented but the video does not give it"):
        render_overlay(segmentation, open_video(VIDEO, slice(1, None)), tmp_path / "o.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_single_frame(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.fromarray(VIDEO[0]).save(folder / "0.png")
    segmentation = make_segmentation([], frames=(0,))
    render_overlay(segmentation, folder, tmp_path / "o.mp4")
    assert read_video(tmp_path / "o.mp4").shape == (1, H, W, 3)

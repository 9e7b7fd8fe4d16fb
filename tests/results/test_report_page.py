"""The page of a result: what is in it is the result, nothing of it is markup, and bad input leaves nothing behind."""

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2f_video.results import report_page
from m2f_video.results.drawing import track_colors
from m2f_video.results.masks import decode_mask, encode_mask, intersections
from m2f_video.results.report_page import write_report
from m2f_video.results.report_rows import CHUNK
from m2f_video.results.tracks import Track, VideoSegmentation
from m2f_video.video import VideoError, open_video
from tests.report_examples import LABELS, H, T, W, blob, numbered_frames, other_result, result


def elements(page: Path) -> dict[str, str]:
    """Texts of the page's elements that hold data, by id."""
    found = re.findall(r'<script type="[a-z/]+" id="([^"]+)">([^<]*)</script>', page.read_text(encoding="utf-8"))
    return dict(found)


def about(page: Path) -> Any:
    return json.loads(elements(page)["about"])


def numbers(page: Path, name: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(elements(page)[name])), "<u4")


def lines(page: Path, number: int, keys: int) -> list[list[str]]:
    """Run lengths of each frame, by mask."""
    found, chunk, parts = [], 0, elements(page)
    while f"masks-{number}-{chunk}" in parts:
        text = zlib.decompress(base64.b64decode(parts[f"masks-{number}-{chunk}"])).decode("ascii").split("\n")
        found += [text[at : at + keys] for at in range(0, len(text), keys)]
        chunk += 1
    return found


def test_the_masks_are_those_of_the_result(tmp_path: Path) -> None:
    segmentation, page = result(), tmp_path / "page.html"
    steps: list[tuple[int, int]] = []
    segmentation.report(page, progress=lambda done, total: steps.append((done, total)))
    data = about(page)
    assert [row["tracks"][0]["id"] for row in data["rows"]] == [3, 1, 2, 5]
    assert [row["color"] for row in data["rows"]] == track_colors([3, 1, 2, 5]).tolist()
    assert data["results"][0]["keys"] == 3  # two tracks have the same masks
    assert data["rows"][0]["tracks"][0]["key"] == data["rows"][3]["tracks"][0]["key"]
    frames, areas = lines(page, 0, 3), numbers(page, "areas-0").reshape(3, T)
    assert len(frames) == T
    for track, row in zip(segmentation.tracks, data["rows"], strict=True):
        key = row["tracks"][0]["key"]
        for position, rle in enumerate(track.segmentations):
            assert frames[position][key] == (rle["counts"] if rle else "")
            assert areas[key, position] == track.area(position)
        assert row["tracks"][0]["seen"] == track.num_frames_visible
    assert steps[-1] == (2 * T, 2 * T)
    assert steps == sorted(steps)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_masks_are_in_chunks(tmp_path: Path) -> None:
    count = 2 * CHUNK + 1
    masks = tuple(encode_mask(blob(20 + frame / 4, 30, 9)) for frame in range(count))
    track = Track(id=1, label="dog", label_id=1, score=0.5, query_id=0, segmentations=masks)
    page = tmp_path / "page.html"
    result(tracks=(track,), frames=range(count), video=numbered_frames(count)).report(page)
    assert [name for name in elements(page) if name.startswith("masks")] == ["masks-0-0", "masks-0-1", "masks-0-2"]
    assert [frame[0] for frame in lines(page, 0, 1)] == [mask["counts"] for mask in masks if mask]


def test_the_video_has_a_frame_for_each_of_the_result(tmp_path: Path) -> None:
    frames = range(3, 27, 4)
    tracks = tuple(replace(t, segmentations=t.segmentations[3:27:4]) for t in result().tracks)
    segmentation = result(tracks=tracks, frames=frames)
    segmentation.report(tmp_path / "page.html")
    data = about(tmp_path / "page.html")
    assert data["frames"] == list(frames)
    assert data["rate"] == [5, 2]
    (tmp_path / "inside.mp4").write_bytes(base64.b64decode(elements(tmp_path / "page.html")["video-data"]))
    inside = open_video(tmp_path / "inside.mp4")
    assert float(inside.fps) == 2.5
    shown = list(inside)
    assert len(shown) == len(frames)
    for frame, image in zip(frames, shown, strict=True):
        cells = image[4, 4:84:8, 1] > 128
        assert sum(int(cell) << bit for bit, cell in enumerate(cells)) == frame


def test_pictures_that_are_far_apart_play_all_the_same(tmp_path: Path) -> None:
    result(fps=1 / 86400).report(tmp_path / "page.html")
    assert about(tmp_path / "page.html")["rate"] == [1, 1]


def test_the_video_may_be_beside_the_page(tmp_path: Path) -> None:
    page = tmp_path / "a page #1?.html"
    result().report(page, link=True)
    assert about(page)["link"] == "a%20page%20%231%3F.mp4"
    assert "video-data" not in elements(page)
    assert len(list(open_video(tmp_path / "a page #1?.mp4"))) == T
    assert "blob:" not in page.read_text(encoding="utf-8").split("</head>")[0]


class Markup(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


HOSTILE = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(1)>&lt;\u2028<!--"


def test_nothing_of_a_result_is_markup(tmp_path: Path) -> None:
    plain, hostile = tmp_path / "plain.html", tmp_path / "hostile.html"
    result().report(plain)
    tracks = tuple(replace(track, label=HOSTILE, label_id=0) for track in result().tracks)
    made = {"mode": HOSTILE}
    result(tracks=tracks, labels=(HOSTILE,), source=f"{HOSTILE}.mp4", made=made).report(hostile)
    texts = [path.read_text(encoding="utf-8") for path in (plain, hostile)]
    assert Markup(texts[0]).tags == Markup(texts[1]).tags
    assert "alert(1)<" not in texts[1]
    data = about(hostile)
    assert data["rows"][0]["tracks"][0]["label"] == HOSTILE
    assert data["source"] == f"{HOSTILE}.mp4"
    assert data["results"][0]["made"] == [["mode", HOSTILE]]


def test_the_policy_knows_the_one_script_and_the_one_style(tmp_path: Path) -> None:
    result().report(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    assert "unsafe" not in policy[1]
    for kind, start, end in (("script", '<script type="module">', "</script>"), ("style", "<style>", "</style>")):
        content = text.split(start)[1].split(end)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]
    assert not re.search(r"https?://|@import|url\(", re.sub(r'<script type="[a-z/]+" id=.*', "", text))


# --- two results


def test_two_results_stand_in_one_row_where_they_show_one_object(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ours, theirs = result(), other_result()
    write_report(page, [ours, theirs], ["a", "b"])
    data = about(page)
    ids = [tuple(track and track["id"] for track in row["tracks"]) for row in data["rows"]]
    assert ids == [(3, 1), (1, 2), (2, None), (5, None), (None, 3)]
    assert data["rows"][1]["iou"] == 1
    a, b = ours.tracks[0], theirs.tracks[0]
    both = [(a.mask(frame) & b.mask(frame)).sum() for frame in range(T)]
    either = sum(int((a.mask(frame) | b.mask(frame)).sum()) for frame in range(T))
    assert data["rows"][0]["iou"] == pytest.approx(sum(both) / either)
    shared = numbers(page, "shared").reshape(-1, T)
    assert shared[data["rows"][0]["shared"]].tolist() == both
    colors = [tuple(row["color"]) for row in data["rows"]]
    assert len(set(colors)) == len(colors)
    assert [len(lines(page, number, keys)) for number, keys in ((0, 3), (1, 3))] == [T, T]


def test_a_result_without_tracks_is_compared_too(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", [result(tracks=()), result()], ["a", "b"])
    assert [row["tracks"][0] for row in about(tmp_path / "page.html")["rows"]] == [None] * 4
    write_report(tmp_path / "page.html", [result(tracks=()), result(tracks=())], ["a", "b"])
    assert about(tmp_path / "page.html")["rows"] == []


def test_intersections_are_pixels_of_both() -> None:
    masks = [blob(20, 30, 10), blob(30, 30, 14), blob(70, 20, 9)]
    rles = [encode_mask(mask) for mask in masks]
    assert all(rles)
    found = intersections(rles[:2], rles)  # type: ignore[arg-type]
    assert found.tolist() == [[int((a & b).sum()) for b in masks] for a in masks[:2]]
    assert intersections([], rles).shape == (0, 3)  # type: ignore[arg-type]
    assert decode_mask(rles[0]).sum() == found[0, 0]  # type: ignore[arg-type]


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": None}, "there is no video to show"),
        ({"video": np.zeros((T, 10, 10, 3), np.uint8)}, "the video is 10x10 but the segmented one was 95x63"),
        ({"video": numbered_frames(T - 1)}, f"frame {T - 1} was segmented but the video does not give it"),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_what_cannot_be_shown_leaves_nothing(changes: dict[str, Any], message: str, link: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        result(**changes).report(tmp_path / "page.html", link=link)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_page_stays_where_a_new_one_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("earlier")
    damaged = replace(result().tracks[0], id=9, segmentations=result().tracks[1].segmentations)
    with pytest.raises(ValueError, match="not the masks of another"):
        result(tracks=(*result().tracks, damaged)).report(page, link=True)
    assert page.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [page]


def test_a_longer_video_is_another_one(tmp_path: Path) -> None:
    segmentation = result(video=numbered_frames(T + 1))
    with pytest.raises(VideoError, match=f"more frames than the {T} that were segmented"):
        write_report(tmp_path / "page.html", [segmentation], exactly=True)
    write_report(tmp_path / "page.html", [segmentation])  # some of its frames were segmented
    assert (tmp_path / "page.html").exists()


def test_results_of_two_videos_are_refused(tmp_path: Path) -> None:
    short = result(
        frames=range(5), tracks=tuple(replace(t, segmentations=t.segmentations[:5]) for t in result().tracks)
    )
    small = VideoSegmentation(
        source="x",
        width=10,
        height=10,
        fps=1,
        frames=range(T),
        labels=LABELS,
        tracks=(),  # type: ignore[arg-type]
    )
    late = result(frames=range(1, T + 1))
    for other, message in (
        (short, "number of frames is 30 and 5"),
        (small, "size is 95x63 and 10x10"),
        (late, "frames"),
    ):
        with pytest.raises(ValueError, match=f"a and b are of different .*{message}"):
            write_report(tmp_path / "page.html", [result(), other], ["a", "b"])
    with pytest.raises(ValueError, match="one result or two"):
        write_report(tmp_path / "page.html", [result()] * 3, ["a", "b", "c"])
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_much_for_a_page_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "LARGEST_INSIDE", 1000)
    with pytest.raises(ValueError, match="too many to be inside a page"):
        result().report(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(report_page, "MOST_FRAMES", 29)
    with pytest.raises(ValueError, match="at most 29 frames, not 30"):
        result().report(tmp_path / "page.html")
    with pytest.raises(ValueError, match="min_score must be from 0 to 1"):
        result().report(tmp_path / "page.html", min_score=30)


def test_the_video_itself_is_not_overwritten(tmp_path: Path) -> None:
    from m2f_video.video import VideoWriter

    with VideoWriter(tmp_path / "page.mp4", 10, W, H + 1) as writer:
        for frame in numbered_frames(height=H + 1):
            writer.write(frame)
    before = (tmp_path / "page.mp4").read_bytes()
    segmentation = VideoSegmentation(
        source=str(tmp_path / "page.mp4"),
        width=W + 1,
        height=H + 1,
        fps=10,
        frames=tuple(range(T)),
        labels=LABELS,
        tracks=(),
        video=tmp_path / "page.mp4",
    )
    with pytest.raises(ValueError, match="would overwrite"):
        segmentation.report(tmp_path / "page.html", link=True)
    assert (tmp_path / "page.mp4").read_bytes() == before
    segmentation.report(tmp_path / "page.html")
    assert (tmp_path / "page.mp4").read_bytes() == before

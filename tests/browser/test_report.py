"""The page in a real browser: what it shows is the result, and everything on it works."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2f_video.results.drawing import track_colors
from m2f_video.results.report_page import write_report
from m2f_video.results.tracks import Track, VideoSegmentation
from tests.browser.conftest import until
from tests.report_examples import BITS, CELL, H, T, W, numbered_frames, other_result, result

pytestmark = pytest.mark.browser

NUMBER_IN_PICTURE = f"""() => {{
  const video = document.querySelector("video"), canvas = document.createElement("canvas");
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0);
  let number = 0;
  for (let bit = 0; bit < {BITS}; bit++)
    if (context.getImageData(bit * {CELL} + {CELL} / 2, {CELL} / 2, 1, 1).data[1] > 128) number += 1 << bit;
  return number;
}}"""
PIXELS = """(pane) => {
  const canvas = document.querySelectorAll(".masks")[pane];
  return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
}"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    result().report(tmp_path / "report.html")
    return tmp_path / "report.html"


def pixels(page: Any, pane: int = 0) -> np.ndarray:
    """What is drawn over the video, (H, W, RGBA)."""
    return np.array(page.evaluate(PIXELS, pane), np.uint8).reshape(H, W, 4)


def is_at(page: Any, frame: int) -> None:
    """Wait until video and masks show a frame."""
    until(
        page,
        f"document.documentElement.dataset.painted === '{frame}'"
        " && !document.querySelector('video').seeking && document.querySelector('video').paused",
    )


def go_to(page: Any, frame: int) -> None:
    page.fill("#frame", str(frame))
    page.press("#frame", "Enter")
    is_at(page, frame)
    page.evaluate("document.activeElement.blur()")


def slide(page: Any, name: str, value: float) -> None:
    page.locator(name).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", value
    )


def visible_rows(page: Any) -> list[str]:
    return [row.inner_text() for row in page.locator("#rows .row .name").all() if row.is_visible()]


def only(page: Any, name: str) -> None:
    page.get_by_role("button", name=f"Only {name}", exact=True).click()


def test_it_has_all_tracks_and_no_complaints(file: Path, open_page: Any) -> None:
    page = open_page(file)
    assert page.locator("#rows .row").count() == 4
    assert [text.split() for text in visible_rows(page)] == [["dog", "3"], ["person", "1"], ["train", "2"]]
    assert page.locator("#tally").inner_text() == "3 of 4 shown"
    page.get_by_role("button", name="Show all").click()
    assert [text.split() for text in visible_rows(page)][3] == ["person", "5", "masks", "of", "3"]
    assert page.title() == "cars.mp4 \u2013 m2f-video"


@pytest.mark.parametrize("frame", [0, 12, T - 1])
def test_masks_are_those_of_the_result_pixel_for_pixel(frame: int, file: Path, open_page: Any) -> None:
    page, segmentation = open_page(file), result()
    go_to(page, frame)
    owner = np.zeros((H, W), int)
    for track in reversed(segmentation.tracks[:3]):
        owner[track.mask(frame)] = track.id
    np.testing.assert_array_equal(pixels(page)[..., 3] > 0, owner > 0)
    for track in segmentation.tracks[:3]:
        only(page, f"{track.label} {track.id}")
        np.testing.assert_array_equal(pixels(page)[..., 3] > 0, track.mask(frame))
        only(page, f"{track.label} {track.id}")


def test_colours_are_those_of_the_overlay(file: Path, open_page: Any) -> None:
    page, segmentation = open_page(file), result()
    go_to(page, 6)  # where all are
    slide(page, "#opacity", 1)
    page.mouse.move(640, 10)
    drawn = pixels(page)
    taken = np.zeros((H, W), bool)
    for track, color in zip(segmentation.tracks[:3], track_colors(t.id for t in segmentation.tracks[:3]), strict=True):
        mask = track.mask(6) & ~taken
        taken |= mask
        colors = {tuple(color) for color in drawn[mask].tolist()}
        light = (color * 0.7 + 255 * 0.3).astype(np.uint8)
        assert colors <= {(*color.tolist(), 255), (*light.tolist(), 255)}
        assert (*color.tolist(), 255) in colors
        tag = page.locator(".tags span", has_text=f"{track.label} {track.id}")
        swatch = page.locator("#rows .row", has_text=track.label).locator(".swatch").first
        shown = f"rgb({color[0]}, {color[1]}, {color[2]})"
        assert swatch.evaluate("(element) => getComputedStyle(element).backgroundColor") == shown
        assert tag.evaluate("(element) => getComputedStyle(element).backgroundColor") == shown


def test_switching_a_track_off_changes_the_picture(file: Path, open_page: Any) -> None:
    page = open_page(file)
    go_to(page, 5)
    before = pixels(page)
    page.get_by_role("button", name="Show dog 3", exact=True).click()
    assert page.get_by_role("button", name="Show dog 3", exact=True).get_attribute("aria-pressed") == "false"
    page.mouse.move(640, 10)
    person, dog = result().tracks[1].mask(5), result().tracks[0].mask(5)
    assert not (pixels(page)[..., 3] > 0)[dog & ~person].any()
    page.keyboard.press("1")
    page.evaluate("document.activeElement.blur()")
    np.testing.assert_array_equal(pixels(page), before)
    page.keyboard.press("Shift+Digit2")
    np.testing.assert_array_equal(pixels(page)[..., 3] > 0, person)
    page.keyboard.press("1")  # what is seen is what it starts from
    np.testing.assert_array_equal(pixels(page)[..., 3] > 0, person | dog)
    page.keyboard.press("a")
    assert page.locator("#tally").inner_text() == "4 of 4 shown"


def test_every_frame_is_found_and_shown(file: Path, open_page: Any) -> None:
    page = open_page(file)
    for frame in range(T):
        assert page.evaluate(NUMBER_IN_PICTURE) == frame
        page.keyboard.press("ArrowRight")
        is_at(page, min(frame + 1, T - 1))
    for frame in (0, 7, 29, 13):
        go_to(page, frame)
        assert page.evaluate(NUMBER_IN_PICTURE) == frame
        assert page.locator("#ruler").get_attribute("aria-valuenow") == str(frame)


@pytest.mark.parametrize(
    ("fps", "count", "step"), [(30000 / 1001, 200, 1), (59.94, 97, 7), (1 / 3600, 4, 1), (25, 1, 1)]
)
def test_frames_are_found_at_any_rate(fps: float, count: int, step: int, tmp_path: Path, open_page: Any) -> None:
    frames = range(0, count, step)
    result(tracks=(), fps=fps, frames=frames, video=numbered_frames(count)).report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    for position in {len(frames) - 1, len(frames) // 2, len(frames) // 3, 0}:
        page.fill("#frame", str(frames[position]))
        page.press("#frame", "Enter")
        is_at(page, position)
        assert page.evaluate(NUMBER_IN_PICTURE) == frames[position]


def test_the_playhead_is_there_for_every_track(tmp_path: Path, open_page: Any) -> None:
    first = result().tracks[0]
    tracks = tuple(
        Track(id=n + 1, label="dog", label_id=1, score=0.9, query_id=n, segmentations=first.segmentations)
        for n in range(40)
    )
    result(tracks=tracks).report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    row = page.locator("#rows .row").last
    row.scroll_into_view_if_needed()
    box, head = row.bounding_box(), page.locator("#playhead").bounding_box()
    assert box["y"] + box["height"] <= 800
    assert head["y"] + head["height"] >= box["y"] + box["height"]
    assert page.locator("#ruler").bounding_box()["y"] < box["y"]
    drawn = row.locator(".lane").evaluate(
        "(lane) => lane.getContext('2d').getImageData(3, lane.height - 2, 1, 1).data[3]"
    )
    assert drawn == 255


def test_the_timeline_seeks(file: Path, open_page: Any) -> None:
    page = open_page(file)
    for target in ("#ruler", "#rows .row:nth-child(2) .lane"):
        box = page.locator(target).bounding_box()
        for frame in (3, 26):
            page.mouse.click(box["x"] + (frame + 0.5) * box["width"] / T, box["y"] + box["height"] / 2)
            is_at(page, frame)
            assert page.evaluate(NUMBER_IN_PICTURE) == frame
    page.mouse.down()
    page.mouse.move(box["x"] + 8.5 * box["width"] / T, box["y"] + 4, steps=6)
    page.mouse.up()
    is_at(page, 8)
    assert page.evaluate(NUMBER_IN_PICTURE) == 8
    head, lane = page.locator("#playhead").bounding_box(), page.locator("#rows .lane").first.bounding_box()
    assert head["x"] == pytest.approx(lane["x"] + 8 * lane["width"] / T, abs=1)


def test_keys_step_jump_and_change_the_speed(file: Path, open_page: Any) -> None:
    page = open_page(file)
    for key, frame in (
        ("ArrowRight", 1),
        ("Shift+ArrowRight", 11),
        ("ArrowLeft", 10),
        ("End", 29),
        ("ArrowRight", 29),
        ("Home", 0),
        ("]", 5),  # the train comes
        ("]", 10),  # the person goes
        ("[", 5),
    ):
        page.keyboard.press(key)
        is_at(page, frame)
        assert page.evaluate(NUMBER_IN_PICTURE) == frame
    page.keyboard.press("+")
    assert page.locator("#speed").input_value() == "1.5"
    page.select_option("#speed", "0.25")
    assert page.evaluate("document.querySelector('video').playbackRate") == 0.25


def test_masks_follow_the_video_that_plays(file: Path, open_page: Any) -> None:
    page = open_page(file)
    page.keyboard.press(" ")
    until(page, "Number(document.documentElement.dataset.painted) >= 4")
    assert page.get_by_role("button", name="Pause").is_visible()
    page.keyboard.press(" ")
    until(page, "document.querySelector('video').paused && !document.querySelector('video').seeking")
    page.wait_for_timeout(100)
    shown = int(page.evaluate("document.documentElement.dataset.painted"))
    assert page.evaluate(NUMBER_IN_PICTURE) == shown
    assert page.locator("#frame").input_value() == str(shown)
    only(page, "dog 3")
    np.testing.assert_array_equal(pixels(page)[..., 3] > 0, result().tracks[0].mask(shown))


def test_filters(file: Path, open_page: Any) -> None:
    page = open_page(file)
    slide(page, "#min-score", 0.7)
    assert len(visible_rows(page)) == 2
    slide(page, "#min-score", 0)
    assert len(visible_rows(page)) == 4
    page.locator(".chip", has_text="person").click()
    assert [text.split()[:2] for text in visible_rows(page)] == [["person", "1"], ["person", "5"]]
    slide(page, "#min-score", 0.5)
    np.testing.assert_array_equal(pixels(page)[..., 3] > 0, result().tracks[1].mask(0))
    page.locator(".chip", has_text="train").click()
    assert len(visible_rows(page)) == 2
    slide(page, "#min-score", 1)
    assert page.locator("#empty").inner_text() == "None of the 4 tracks passes the filters."
    assert not pixels(page).any()


def test_opacity_contours_and_names(file: Path, open_page: Any) -> None:
    page = open_page(file)
    page.mouse.move(640, 10)
    inner = np.zeros((H, W), bool)
    inner[22:28, 3] = True  # well inside the dog, which is a ring around (10, 25)
    assert (pixels(page)[inner][:, 3] == round(0.45 * 255)).all()
    slide(page, "#opacity", 0.8)
    assert (pixels(page)[inner][:, 3] == round(0.8 * 255)).all()
    page.keyboard.press("c")
    assert page.locator("#contours").is_checked()
    drawn = pixels(page)[..., 3]
    assert not drawn[inner].any()
    assert (drawn == 255).any()
    assert page.locator(".tags span:visible").count() == 2
    page.locator("#names").click()
    assert page.locator(".tags span:visible").count() == 0


def test_the_pointer_names_and_highlights_a_track(file: Path, open_page: Any) -> None:
    page = open_page(file)
    before = pixels(page)
    box = page.locator(".masks").bounding_box()
    page.mouse.move(box["x"] + 3.5 * box["width"] / W, box["y"] + 25.5 * box["height"] / H)
    assert page.locator(".tip").inner_text() == f"dog 3 \u00b7 0.95 \u00b7 {result().tracks[0].area(0)} px"
    assert page.locator(".row.hot .label").inner_text() == "dog"
    assert (pixels(page) != before).any()
    page.mouse.click(box["x"] + 3.5 * box["width"] / W, box["y"] + 25.5 * box["height"] / H)
    page.mouse.move(640, 10)
    assert page.get_by_role("button", name="Highlight dog 3", exact=True).get_attribute("aria-pressed") == "true"
    assert page.locator(".row.hot .label").inner_text() == "dog"
    page.get_by_role("button", name="Highlight dog 3", exact=True).click()
    page.mouse.move(640, 10)
    page.evaluate("document.activeElement.blur()")
    assert page.locator(".row.hot").count() == 0
    page.locator("#rows .row").nth(1).hover()
    assert page.locator(".row.hot .label").inner_text() == "person"


def luminance(page: Any, name: str = "body") -> float:
    color = page.locator(name).evaluate("(element) => getComputedStyle(element).backgroundColor")
    return float(np.mean([float(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")]))


def test_light_and_dark(file: Path, open_page: Any) -> None:
    light, dark = open_page(file, color_scheme="light"), open_page(file, color_scheme="dark")
    assert luminance(light) > 200
    assert luminance(dark) < 50
    dark.keyboard.press("t")
    assert luminance(dark) > 200
    dark.locator("#theme").click()
    assert luminance(dark) < 50
    assert dark.locator("#theme-name").inner_text() == "Dark"


def test_a_phone(file: Path, open_page: Any) -> None:
    page = open_page(file, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.get_by_role("button", name="Show dog 3", exact=True).tap()
    assert not (pixels(page)[..., 3] > 0)[result().tracks[0].mask(0) & ~result().tracks[1].mask(0)].any()
    box = page.locator("#rows .lane").nth(1).bounding_box()
    page.touchscreen.tap(box["x"] + 12.5 * box["width"] / T, box["y"] + 8)
    is_at(page, 12)
    assert page.evaluate(NUMBER_IN_PICTURE) == 12
    page.locator("summary").tap()
    assert page.locator("#opacity").is_visible()
    small = [
        element.get_attribute("id") or element.get_attribute("class")
        for element in page.locator("button:visible").all()
        if (found := element.bounding_box()) and min(found["width"], found["height"]) < 24
    ]
    assert small == []


def test_the_keyboard_reaches_everything_and_everything_has_a_name(file: Path, open_page: Any) -> None:
    page = open_page(file)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent"
            )
        )
    for name in (
        "theme",
        "help",
        "play",
        "frame",
        "speed",
        "loop",
        "min-score",
        "opacity",
        "contours",
        "names",
        "ruler",
    ):
        assert name in reached
    assert {"Show dog 3", "Only dog 3", "Highlight dog 3"} <= set(reached)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [role=slider], [role=img], video")]
          .filter((element) => !(element.ariaLabel || element.labels?.length || element.textContent.trim()))
          .map((element) => element.outerHTML)"""
    )
    assert unnamed == []
    page.locator("#help").press("Enter")
    assert page.get_by_role("dialog", name="Keyboard").is_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Show dog 3", exact=True).press(" ")
    assert page.get_by_role("button", name="Show dog 3", exact=True).get_attribute("aria-pressed") == "false"
    assert page.evaluate("document.querySelector('video').paused")
    page.keyboard.press("ArrowRight")
    is_at(page, 1)
    assert page.locator("#status").inner_text() == "Frame 1: person 1"


def test_a_result_without_tracks(tmp_path: Path, open_page: Any) -> None:
    result(tracks=()).report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    assert page.locator("#rows .row").count() == 0
    assert page.locator("#empty").inner_text().startswith("There are no tracks")
    assert not pixels(page).any()
    page.keyboard.press("End")
    is_at(page, T - 1)


HOSTILE = "</script><script>window.hacked=1</script>\"'`<img src=x onerror=window.hacked=1>&amp;<!--"


def test_hostile_names_are_only_text(tmp_path: Path, open_page: Any) -> None:
    tracks = tuple(
        Track(id=t.id, label=HOSTILE, label_id=0, score=t.score, query_id=t.query_id, segmentations=t.segmentations)
        for t in result().tracks
    )
    changes = {"tracks": tracks, "labels": (HOSTILE,), "source": f"a/{HOSTILE}", "made": {"mode": HOSTILE}}
    folder = tmp_path / HOSTILE.replace("/", "\u2215")
    folder.mkdir()
    one, two = result(**changes), other_result(source="b", made={"mode": "window"})
    one.report(folder / "'\"<b>.html", link=True)
    write_report(folder / "both.html", [one, two], [HOSTILE, "<i>b</i>"])
    for name in ("'\"<b>.html", "both.html"):
        page = open_page(folder / name)
        page.locator("#rows .row").first.hover()
        box = page.locator(".masks").first.bounding_box()
        page.mouse.move(box["x"] + 3.5 * box["width"] / W, box["y"] + 25.5 * box["height"] / H)
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, b:has(*), i:not([class])").count() == 0
        assert page.locator("#title").inner_text() == HOSTILE.rsplit("/", 1)[1]
        assert page.locator("#rows .label").first.inner_text().startswith(HOSTILE)
        assert HOSTILE in page.locator(".tip").first.inner_text()
        assert page.locator("#made-table td").first.inner_text() == HOSTILE


def test_a_video_beside_the_page(tmp_path: Path, open_page: Any) -> None:
    result().report(tmp_path / "a #1?.html", link=True)
    page = open_page(tmp_path / "a #1?.html")
    go_to(page, 17)
    assert page.evaluate("document.querySelector('video').videoWidth") == W + 1
    (tmp_path / "a #1?.mp4").unlink()
    page = open_page(tmp_path / "a #1?.html", painted=False)
    page.locator("#notice").wait_for()
    assert "a #1?.mp4 is not beside this page" in page.locator("#notice").inner_text()
    page.keyboard.press("End")
    until(page, f"document.documentElement.dataset.painted === '{T - 1}'")
    only(page, "dog 3")
    np.testing.assert_array_equal(pixels(page)[..., 3] > 0, result().tracks[0].mask(T - 1))
    page.complaints[:] = [text for text in page.complaints if "ERR_FILE_NOT_FOUND" not in text]


def test_two_results_side_by_side(tmp_path: Path, open_page: Any) -> None:
    ours, theirs = result(), other_result()
    write_report(tmp_path / "both.html", [ours, theirs], ["float32", "bfloat16"])
    page = open_page(tmp_path / "both.html")
    assert [text.strip()[1:] for text in page.locator("figcaption").all_inner_texts()] == ["float32", "bfloat16"]
    shown = [text.split() for text in visible_rows(page)]
    assert shown == [
        ["dog", "A3", "B1"],
        ["person", "\u2192", "train", "A1", "B2"],
        ["train", "A2", "only", "A"],
        ["dog", "B3", "only", "B"],
    ]
    go_to(page, 25)
    page.mouse.move(640, 10)
    drawn = [pixels(page, pane) for pane in (0, 1)]
    different = np.zeros((H, W), bool)
    owners = []
    for tracks, rows in ((ours.tracks[:3], (1, 2, 3)), (theirs.tracks, (1, 2, 4))):
        owner = np.zeros((H, W), int)
        for track, row in reversed(list(zip(tracks, rows, strict=True))):
            owner[track.mask(25)] = row
        owners.append(owner)
    different = owners[0] != owners[1]
    assert different.any()
    for pane in (0, 1):
        marked = (drawn[pane][..., 3] == round(0.65 * 255)) & (drawn[pane][..., 0] > 250)
        np.testing.assert_array_equal(marked, different)
        np.testing.assert_array_equal(drawn[pane][..., 3] > 0, different | (owners[pane] > 0))
    page.keyboard.press("d")
    for pane in (0, 1):
        np.testing.assert_array_equal(pixels(page, pane)[..., 3] > 0, owners[pane] > 0)
    # both pictures are of one frame
    second = page.locator("canvas.base").evaluate(
        "(canvas) => [...canvas.getContext('2d').getImageData(4, 4, 1, 1).data]"
    )
    assert page.evaluate(NUMBER_IN_PICTURE) == 25
    assert (second[1] > 128) == bool(25 & 1)
    only(page, "dog A3 B1")
    dogs = [segmentation.tracks[0].mask(25) for segmentation in (ours, theirs)]
    part = 1 - (dogs[0] & dogs[1]).sum() / (dogs[0] | dogs[1]).sum()
    assert page.locator("#disagreement-now").inner_text() == f"{100 * part:.0f} %"
    page.keyboard.press("Home")
    is_at(page, 0)
    assert page.locator("#disagreement-now").inner_text() == "0 %"
    page.keyboard.press("]")
    is_at(page, 20)  # where the dogs part


COUNT_INFLATED = """window.inflated = 0; {
  const Plain = DecompressionStream;
  window.DecompressionStream = class extends Plain { constructor(format) { super(format); window.inflated++; } };
}"""


@pytest.mark.parametrize(("count", "size", "link"), [(300, (720, 1280), False), (5000, (36, 64), True)])
def test_masks_of_long_videos_are_inflated_when_they_are_needed(
    count: int, size: tuple[int, int], link: bool, tmp_path: Path, open_page: Any
) -> None:
    from m2f_video.results.masks import encode_mask
    from tests.report_examples import blob

    height, width = size
    unit = height / 36
    masks = [
        [encode_mask(blob(10 * unit + x * unit, 18 * unit, (5 + n) * unit, height, width)) for x in range(12)]
        for n in range(10)
    ]
    tracks = tuple(
        Track(id=n + 1, label="dog", label_id=0, score=0.9 - n / 20, query_id=n,
              segmentations=tuple(of_track[(frame + n) % 12] for frame in range(count)))
        for n, of_track in enumerate(masks)
    )  # fmt: skip
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 60, (height // 4, width // 4, 1), np.uint8).repeat(4, 0).repeat(4, 1)
    frames = (np.roll(texture, 2 * frame, 1).repeat(3, 2) + np.uint8(60) for frame in range(count))
    if count == 5000:
        frames = iter(numbered_frames(1000, height, 80)[:, :, :width].repeat(5, 0))
    segmentation = VideoSegmentation(
        source="long.mp4", width=width, height=height, fps=25, frames=tuple(range(count)), labels=("dog",),
        tracks=tracks, video=frames,
    )  # fmt: skip
    page_file = tmp_path / "long.html"
    segmentation.report(page_file, link=link)
    assert page_file.stat().st_size < 30e6
    page = open_page(page_file, script=COUNT_INFLATED)
    begun = page.evaluate("window.inflated")
    assert begun <= 3  # the areas, and the masks of the first frames
    for frame in (count - 1, count // 2, 1):
        go_to(page, frame)
    assert page.evaluate("window.inflated") <= begun + 6

"""`m2f-video report`, `segment --report`: pages, and one line with exit code 2 for bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m2f_video.cli.main import main
from m2f_video.video import VideoWriter
from tests.conftest import synthetic_frames
from tests.report_examples import T, W, numbered_frames, other_result, result

H = 64  # a video file has even sides


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # the parser's own way out
        return int(exit_.code or 0)


def write_video(path: Path, count: int = T, height: int = H, width: int = W + 1) -> Path:
    with VideoWriter(path, 10, width, height) as writer:
        for frame in numbered_frames(count, height, width):
            writer.write(frame)
    return path


@pytest.fixture
def results(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with results of one video."""
    source = str(write_video(tmp_path / "cars.mp4"))
    made = {"frames": ":"}
    for name, segmentation in (("a", result()), ("b", other_result())):
        tracks = tuple(_resized(track) for track in segmentation.tracks)
        video = {"source": source, "width": W + 1, "height": H, "tracks": tracks, "made": made}
        replace(segmentation, **video).save(tmp_path / name, overlay=False)
    return tmp_path / "a", tmp_path / "b"


def _resized(track: object) -> object:
    import numpy as np

    from m2f_video.results.masks import decode_mask, encode_mask

    masks = track.segmentations  # type: ignore[attr-defined]
    padded = [None if rle is None else encode_mask(np.pad(decode_mask(rle), ((0, 1), (0, 1)))) for rle in masks]
    return replace(track, segmentations=tuple(padded))  # type: ignore[type-var]


def test_a_page_is_written_beside_the_result(results: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", results[0]) == 0
    page = results[0] / "report.html"
    assert page.is_file()
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {page}"
    assert run("report", results[0] / "tracks.jsonl", "--link") == 0
    assert (results[0] / "report.mp4").is_file()


def test_two_results_stand_side_by_side(results: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", *results) == 0
    page = results[0] / "comparison.html"
    assert f'"name":"{results[1]}"' in page.read_text(encoding="utf-8")
    other = results[1] / "both.html"
    assert run("report", *results, "--output", other, "--min-score", 0.5) == 0
    assert '"minScore":0.3' in page.read_text(encoding="utf-8")
    assert '"minScore":0.5' in other.read_text(encoding="utf-8")


def test_a_video_that_was_moved_with_its_result_is_found(results: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "cars.mp4").rename(results[0] / "cars.mp4")
    assert run("report", results[0]) == 0
    (results[0] / "cars.mp4").rename(tmp_path / "elsewhere.mp4")
    assert run("report", results[0]) == 2
    assert run("report", results[0], "--video", tmp_path / "elsewhere.mp4") == 0


def test_what_is_wrong_is_one_line(
    results: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = results
    tracks = json.loads((first / "tracks.json").read_text())
    broken, cut, short = tmp_path / "broken.json", tmp_path / "cut.json", tmp_path / "short.json"
    rle = next(rle for rle in tracks["results"][0]["segmentations"] if rle)
    cut.write_text((first / "tracks.json").read_text()[:-50])
    broken.write_text(json.dumps(tracks).replace(json.dumps(rle["counts"]), '"00"'))
    fewer = tracks | {"video": tracks["video"] | {"frames": list(range(5))}}
    fewer["results"] = [row | {"segmentations": row["segmentations"][:5]} for row in tracks["results"]]
    short.write_text(json.dumps(fewer))
    (tmp_path / "text.txt").write_text("no video")
    capsys.readouterr()
    for arguments, message in (
        ((), "one result, or two"),
        ((first, second, first), "one result, or two"),
        ((tmp_path / "nothing",), "there is no such result file"),
        ((cut,), "not a JSON file, or cut off"),
        ((broken,), "run lengths are damaged"),
        ((first, short), "of different videos: their number of frames is 30 and 5"),
        ((first, "--video", tmp_path / "gone.mp4"), "the video that was segmented is not there"),
        ((first, "--video", write_video(tmp_path / "small.mp4", height=32)), "the video is 96x32"),
        ((first, "--video", write_video(tmp_path / "few.mp4", 20)), "frame 20 was segmented"),
        ((first, "--video", write_video(tmp_path / "more.mp4", T + 5)), "more frames than the 30"),
        ((first, "--video", tmp_path / "text.txt"), "text.txt"),
        ((first, "--output", tmp_path / "page.txt"), "give --output a page"),
        ((first, "--output", tmp_path / "no" / "page.html"), "make it first"),
        ((first, "--min-score", 2), "min_score must be from 0 to 1"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert run("report", *arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1, said
        assert sorted(tmp_path.rglob("*")) == before


def test_segment_writes_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with VideoWriter(tmp_path / "video.mp4", 12, 90, 60) as writer:
        for frame in synthetic_frames(6, 60, 90):
            writer.write(frame)
    out = tmp_path / "out"
    arguments = ("segment", tmp_path / "video.mp4", "--checkpoint", folder, "--output", out, "--no-overlay")
    assert run(*arguments, "--mode", "window", "--window", 3, "--report-link") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("tracks.json, report.html, report.mp4")
    assert (out / "report.mp4").is_file()
    assert run(*arguments, "--report", "--score-threshold", 0.05) == 0
    for _ in range(2):
        text = (out / "report.html").read_text(encoding="utf-8")
        assert '"link":null' in text
        assert '"minScore":0.05' in text
        assert run("report", out) == 0
    # one of an earlier result does not stay beside a new one in windows
    assert run(*arguments, "--mode", "window", "--window", 3) == 0
    assert sorted(path.name for path in out.iterdir()) == ["tracks.json", "tracks.jsonl"]
    assert run("segment", out / "report.mp4", *arguments[2:]) == 2


def test_every_video_of_a_list_has_a_page(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("one", "two"):
        with VideoWriter(tmp_path / "videos" / f"{name}.mp4", 12, 90, 60) as writer:
            for frame in synthetic_frames(3, 60, 90):
                writer.write(frame)
    out = tmp_path / "out"
    assert run("segment", tmp_path / "videos", "--checkpoint", folder, "--output", out, "--report") == 0
    assert len(list(out.glob("*/report.html"))) == 2

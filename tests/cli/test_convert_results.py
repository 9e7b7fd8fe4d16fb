"""`m2f-video convert-results`: a file or folder of each format, and one line with exit code 2 for bad input."""

import json
from pathlib import Path

import pytest

from m2f_video.cli.main import main
from m2f_video.results.tracks import VideoSegmentation
from tests.results.test_results import LABELS, T, make_segmentation


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # the parser's own way out
        return int(exit_.code or 0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    make_segmentation().save(tmp_path / "out", overlay=False)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("coco", "coco.json"),
        ("png", "png"),
        ("mots", "mots.txt"),
        ("csv", "tracks.csv"),
        ("youtube-vis", "youtube_vis.json"),
    ],
)
def test_each_format_lies_beside_the_result(out: Path, to: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("convert-results", out, "--to", to) == 0
    assert capsys.readouterr().out == f"written to {out / name}: {T} frames, 2 tracks\n"
    assert sorted(path.name for path in out.iterdir()) == sorted([*before, name])
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before


def test_what_is_written_is_read_back(out: Path, tmp_path: Path) -> None:
    assert run("convert-results", out / "tracks.jsonl", "--to", "coco", "--output", tmp_path / "a.json") == 0
    assert VideoSegmentation.from_coco(tmp_path / "a.json") == VideoSegmentation.load(out)
    assert run("convert-results", out, "--to", "youtube-vis", "--output", tmp_path / "b.json") == 0
    assert VideoSegmentation.from_youtube_vis(tmp_path / "b.json", LABELS).tracks == VideoSegmentation.load(out).tracks


def test_uncertain_tracks_can_be_left_out(out: Path, tmp_path: Path) -> None:
    options = ("--score-threshold", 0.93, "--output", tmp_path / "a.json")
    assert run("convert-results", out, "--to", "coco", *options) == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["tracks"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{tmp}/none", "--to", "csv"), "no such result"),
        (("{out}", "--to", "coco", "--output", "{out}/tracks.json"), "is the result itself"),
        (("{out}/tracks.jsonl", "--to", "coco", "--output", "{out}/tracks.jsonl"), "is the result itself"),
        (("{out}", "--to", "coco", "--output", "{out}"), "is a folder"),
        (("{out}", "--to", "png", "--output", "{out}"), "exists already"),
        (("{out}", "--to", "csv", "--output", "{tmp}/nowhere/a.csv"), "there is no folder"),
        (("{out}", "--to", "csv", "--score-threshold", "2"), "--score-threshold must be between 0 and 1"),
        (("{out}", "--to", "csv", "--every-track"), "does not say which tracks were left out"),
    ],
)
def test_bad_input_is_one_line(
    out: Path, tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run("convert-results", *(each.format(out=out, tmp=tmp_path) for each in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_format_that_is_not_known(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert-results", out, "--to", "avi") == 2
    assert "youtube-vis" in capsys.readouterr().err

"""`m2f-video inspect`: a page, or pictures, and one line with exit code 2 for bad input."""

from pathlib import Path

import pytest

from m2f_video.cli.main import main
from m2f_video.video import VideoWriter
from tests.conftest import synthetic_frames


@pytest.fixture
def video(tmp_path: Path) -> Path:
    with VideoWriter(tmp_path / "video.mp4", 12, 90, 60) as writer:
        for frame in synthetic_frames(6, 60, 90):
            writer.write(frame)
    return tmp_path / "video.mp4"


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # the parser's own way out
        return int(exit_.code or 0)


def test_a_page_is_written(video: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    options = ("--frame", 5, "--queries", 3, 0, "--layers", 0, 2, "--point", 45, 30)
    assert run("inspect", video, "--checkpoint", folder, "--output", page, *options) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<img ") == 2 + 2 * (1 + 2 * 3)
    assert "Frame 5, decoded with frames 4 to 5" in text
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:2]] == ["query 3", "query 0"]
    assert printed[-1] == f"written to {page}"


def test_pictures_are_written(video: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("inspect", video, "--checkpoint", folder, "--output", out, "--top-k", 1, "--clip", 1) == 0
    assert len(list(out.glob("query_*_layer_2_attention_weights.png"))) == 1
    assert len(list(out.glob("sampling_layer_*.png"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frame", 6), "has 6 frames, there is no frame 6"),
        (("--frame", 99), "video has only 6 frames"),
        (("--frame", -1), "--frame counts from 0"),
        (("--clip", 0), "--clip from 1"),
        (("--queries", 10), "there is no query 10; there are 0 to 9"),
        (("--layers", 3), "there is no layer 3; there are 0 to 2"),
        (("--point", 90, 1), "there is no x of the point 90; there are 0 to 89"),
        (("--output", "no/such/page.html"), "make it first"),
        (("--output", "."), "it exists already"),
        (("--checkpoint", "no/such/folder"), "no/such/folder"),
    ],
)
def test_what_is_wrong_is_one_line(
    options: tuple[object, ...],
    message: str,
    video: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = () if "--checkpoint" in options else ("--checkpoint", folder)
    assert run("inspect", video, *checkpoint, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "inspect.html").exists()

"""Which videos a folder or a list names, and what they are called."""

import os
from pathlib import Path

import pytest
from PIL import Image

from m2f_video.inference.listing import is_list, list_videos


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def names(sources) -> dict[str, str]:
    return {video.name: video.path.name for video in list_videos(sources)}


def test_a_folder_of_videos_and_folders_of_frames(tmp_path):
    touch(
        *(tmp_path / name for name in ("b.mp4", "a.MKV", "notes.md", ".hidden.mp4", "c/0.png", "d/e/0.png", "f/x.mp4"))
    )
    assert is_list(tmp_path)
    assert names(tmp_path) == {"a": "a.MKV", "b": "b.mp4", "c": "c"}


def test_a_folder_of_frames_is_one_video_whatever_is_deeper(tmp_path):
    touch(tmp_path / "0.png", tmp_path / "masks" / "0.png")
    assert not is_list(tmp_path)


def test_a_folder_of_nothing_or_a_file_is_no_list(tmp_path):
    touch(tmp_path / "sub" / "video.mp4", tmp_path / "notes.md")
    assert not any(is_list(path) for path in (tmp_path, tmp_path / "notes.md", tmp_path / "no.txt", "cars.mp4"))


def test_frames_beside_videos_are_named_with_the_remedy(tmp_path):
    touch(tmp_path / "0.png", tmp_path / "video.mp4")
    with pytest.raises(ValueError, match=r"pictures and videos \(video.mp4\).*list.txt"):
        is_list(tmp_path)


def test_results_are_no_videos(tmp_path):
    touch(tmp_path / "video.mp4", tmp_path / "overlay.mp4", tmp_path / "tracks.json")
    touch(tmp_path / "out" / "video" / "overlay.mp4", tmp_path / "out" / "video" / "tracks.json")
    assert names(tmp_path) == {"video": "video.mp4"}
    (tmp_path / "tracks.json").unlink()
    assert names(tmp_path) == {"video": "video.mp4", "overlay": "overlay.mp4"}


def test_links_in_a_circle_are_no_videos_or_fail_later(tmp_path):
    touch(tmp_path / "video.mp4")
    for name, target in {"here": ".", "loop": "loop", "loop.mp4": "loop.mp4", "again.mp4": "video.mp4"}.items():
        (tmp_path / name).symlink_to(target)
    assert names(tmp_path) == {"again": "again.mp4", "loop": "loop.mp4"}  # the first of two names of one file


def test_a_list_is_read_line_by_line(tmp_path):
    touch(tmp_path / "sub" / "b.mp4")
    list_ = tmp_path / "videos.TXT"
    list_.write_bytes(b"\xef\xbb\xbfsub/b.mp4\r\n\r\n  # a comment\r\n./sub/../sub/b.mp4\r\ncaf\xe9.mp4\n/no/where.mp4")
    assert is_list(list_)
    found = {video.name: video.path for video in list_videos(list_)}
    assert found == {
        "b": tmp_path / "sub" / "b.mp4",
        os.fsdecode(b"caf\xe9"): tmp_path / os.fsdecode(b"caf\xe9.mp4"),
        "where": Path("/no/where.mp4"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"# nothing\n\n", "it names no videos"), (b"a.mp4\n-\n", "- stands for"), (b"\0\1", "it is no text")],
)
def test_bad_lists_are_named(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"list.txt: {message}"):
        list_videos(tmp_path / "list.txt")


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="named by a folder or a text file"):
        list_videos(tmp_path / "cars.mp4")
    with pytest.raises(FileNotFoundError):
        list_videos(tmp_path / "no.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="named pipe"):
        list_videos(tmp_path / "pipe.txt")


def test_names_differ_whatever_the_order_and_the_others(tmp_path):
    paths = ["a/clip.mp4", "b/Clip.mkv", "other.mp4"]
    found = {str(video.path): video.name for video in list_videos(paths)}
    assert found["other.mp4"] == "other"
    assert found["a/clip.mp4"].startswith("clip-")
    assert found["b/Clip.mkv"].startswith("Clip-")
    again = {str(video.path): video.name for video in list_videos(["c/clip.mp4", *reversed(paths)])}
    assert found.items() <= again.items()


@pytest.mark.parametrize(
    "path", ["/", "..", ".", "..mp4", ".hidden.mp4", "manifest.jsonl", "x" * 250, "é" * 120 + ".mp4"]
)
def test_a_name_is_always_that_of_a_folder_inside(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (video,) = list_videos([path])
    assert Path(tmp_path, video.name).resolve().parent == tmp_path.resolve()
    assert video.name[0] != "."
    assert len(os.fsencode(video.name)) < 220
    assert video.name != "manifest.jsonl"
    (tmp_path / f".{video.name}.lock").touch()


def test_a_folder_of_many_pictures_is_looked_at_by_name_alone(tmp_path, monkeypatch):
    touch(tmp_path / "0.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a picture was opened"))
    assert not is_list(tmp_path)

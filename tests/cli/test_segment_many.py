"""`m2f-video segment` of a folder or a list."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_video import VideoMask2Former, distributed
from m2f_video.cli import console
from m2f_video.cli.main import main
from m2f_video.inference import bulk
from m2f_video.video import VideoWriter


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "native"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    with VideoWriter(folder / "a.mp4", 12, 48, 32) as writer:
        for frame in np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8):
            writer.write(frame)
    (folder / "b").mkdir()
    Image.new("RGB", (48, 32)).save(folder / "b" / "0.png")
    return folder


def segment(source: Path | str, checkpoint: Path, output: Path, *options: object) -> int:
    arguments = ["segment", source, "--checkpoint", checkpoint, "--output", output, "--shortest-edge", 32, *options]
    return main([str(argument) for argument in arguments])


def test_a_folder_of_videos_is_segmented_once(videos, checkpoint, tmp_path, capsys):
    assert segment(videos, checkpoint, tmp_path / "out", "--frames", ":2") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == f"{videos}: 2 videos"
    assert lines[1].startswith(f"{videos / 'a.mp4'}: 2 frames, 10 tracks, ")
    assert lines[2].startswith(f"{videos / 'b'}: 1 frames, ")
    assert lines[3:] == [f"2 done; written to {tmp_path / 'out'}, what was done to manifest.jsonl"]
    assert printed.err == ""
    made_from = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])["made_from"]
    assert made_from["checkpoint"] == str(checkpoint)
    assert made_from["preprocessing"]["shortest_edge"] == 32
    for name in "ab":
        assert {file.name for file in (tmp_path / "out" / name).iterdir()} >= {"overlay.mp4", "tracks.json"}

    assert segment(videos, checkpoint, tmp_path / "out", "--frames", ":2") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"2 done before; written to {tmp_path / 'out'}, what was done to manifest.jsonl"
    ]


def test_those_of_a_list_that_fail_are_told_at_the_end(videos, checkpoint, tmp_path, capsys, monkeypatch):
    (videos / "list.txt").write_text("# videos\nnowhere.mp4\na.mp4\n\nlist.txt\n")
    monkeypatch.chdir(videos)
    assert segment("list.txt", checkpoint, tmp_path / "out", "--no-overlay") == 1
    printed = capsys.readouterr()
    lines = [line.strip("│ ") for line in printed.out.splitlines()]
    assert lines[1] == "nowhere.mp4: failed"
    assert lines[-1].startswith("1 done, 2 failed; written to ")
    rows = {line.split()[0]: line for line in lines[4:]}
    assert rows["nowhere.mp4"].endswith("there is no such video file or folder of frames")
    assert "not a video" in rows["list.txt"]
    assert printed.err == ""
    assert (tmp_path / "out" / "a" / "tracks.json").exists()

    monkeypatch.setenv("RANK", "1")  # of whom the first one speaks
    assert segment("list.txt", checkpoint, tmp_path / "out", "--no-overlay") == 0
    assert "2 failed" not in capsys.readouterr().out


def test_what_stops_everything_is_one_line(videos, checkpoint, tmp_path, capsys, tiny_config):
    (tmp_path / "empty.txt").write_text("# none\n")
    (tmp_path / "pipe.txt").write_text("-\n")
    (tmp_path / "mixed" / "sub").mkdir(parents=True)
    (tmp_path / "mixed" / "0.png").touch()
    (tmp_path / "mixed" / "video.mp4").touch()
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.jsonl").write_text("mine\n")
    out = tmp_path / "out"
    for source, output, options, named in [
        (tmp_path / "empty.txt", out, (), "empty.txt: it names no videos"),
        (tmp_path / "pipe.txt", out, (), "- stands for what is piped in"),
        (tmp_path / "mixed", out, (), "it holds pictures and videos (video.mp4)"),
        (videos, tmp_path / "file" / "out", (), "is a file"),
        (videos, tmp_path / "foreign", (), "it is no manifest"),
        (videos, out, ("--window", 0), "window must be"),
        (videos, out, ("--frames", "5:2"), "frames 5:2"),
        (videos, out, ("--device", "warp"), "warp"),
    ]:
        assert segment(source, checkpoint, output, *options) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert named in error
        assert not out.exists()
    assert segment(videos, checkpoint, out, "--no-overlay") == 0
    VideoMask2Former(tiny_config).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert segment(videos, tmp_path / "other", out, "--no-overlay") == 2
    assert "made with another checkpoint (" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_done(videos, checkpoint, tmp_path, capsys, monkeypatch):
    segmented = bulk.segment_to_folder

    def interrupted(model, reader, output, **options):
        if output.name == "b":
            raise KeyboardInterrupt
        return segmented(model, reader, output, **options)

    monkeypatch.setattr(bulk, "segment_to_folder", interrupted)
    assert segment(videos, checkpoint, tmp_path / "out") == 130
    assert capsys.readouterr().err == "m2f-video: interrupted\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a", "manifest.jsonl"]


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "parse_device", torch.device)  # there are none here
    assert distributed.own_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.own_device("cuda") == torch.device("cuda:3")
    assert distributed.own_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.own_device() == torch.device("cuda:3")
    assert distributed.own_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 workers cannot share cuda:1"):
        distributed.own_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ValueError, match="LOCAL_RANK is 'one'"):
        distributed.own_device("cuda")


def test_a_bar_begins_anew_with_each_video(monkeypatch):
    made = []

    class Bar(console.tqdm):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": open("/dev/null", "w")})  # noqa: SIM115
            made.append(self)

    monkeypatch.setattr(console, "tqdm", Bar)
    with console.progress_bars() as update:
        for done, total in ((1, None), (5, 5), (1, 3)):
            update("frames", done, total)
        (bar,) = made
        assert (bar.n, bar.total) == (1, 3)

"""The data commands, parsed as the command line parses them."""

import json

import pytest
import tyro

from m2f_video.cli.data import DATA_COMMANDS
from m2f_video.cli.main import main


def run(*arguments: object) -> int:
    return tyro.extras.subcommand_cli_from_dict(DATA_COMMANDS, args=[str(argument) for argument in arguments])


def test_synthesize_check_and_split(tmp_path, capsys):
    data, parts = tmp_path / "data", tmp_path / "parts"
    options = ("--videos", 3, "--seed", 4, "--difficulty", "easy", "--frames", 2, "--height", 24, "--width", 32)
    assert run("synthesize", data, *options) == 0
    assert "3 easy videos" in capsys.readouterr().out
    info = json.loads((data / "train.json").read_text())
    assert (info["info"]["seed"], info["videos"][0]["width"], info["videos"][0]["length"]) == (4, 32, 2)

    assert run("check", data) == 0
    assert "3 videos, 6 frames" in capsys.readouterr().out

    assert run("split", data, parts, "--fraction", "0.34", "--seed", 1) == 0
    assert "2 videos in train.json, 1 in val.json" in capsys.readouterr().out

    (data / "JPEGImages" / "000001" / "00000.jpg").unlink()
    assert run("check", data / "train.json") == 1
    printed = capsys.readouterr().out
    assert "000001/00000.jpg: the frame of video 2 is missing" in printed
    assert "1 faults" in printed


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="--videos must be positive"):
        run("synthesize", tmp_path / "x", "--videos", 0)
    with pytest.raises(FileExistsError, match="exists already"):
        run("synthesize", tmp_path.parent, "--videos", 1)
    with pytest.raises(FileNotFoundError, match="no such dataset"):
        run("check", tmp_path / "nothing")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    ["data check DATA", "data split DATA OUT", "train --preset demo --data DATA --output OUT",
     "eval --data DATA --checkpoint demo --output OUT"],
)  # fmt: skip
def test_frames_are_named_alike_everywhere(command, tmp_path, capsys):
    assert run("synthesize", tmp_path / "data", "--videos", 2, "--frames", 1, "--height", 16, "--width", 16) == 0
    capsys.readouterr()
    places = {"DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in command.split()]
    assert main([*arguments, "--frames", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"m2f-video: error: {tmp_path / 'nowhere'}: there is no such folder of frames\n"
    (tmp_path / "data" / "JPEGImages").rename(tmp_path / "elsewhere")
    assert main(arguments) == (1 if command.startswith("data check") else 2)
    printed = "".join(capsys.readouterr())
    assert "train.json: there is no folder of frames, none of JPEGImages, train/JPEGImages, " in printed
    assert "beside it; name it (--frames" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(command, "--help")
    assert exit_.value.code == 0
    assert "Example: m2f-video data" in " ".join(capsys.readouterr().out.split())

"""The command line, end to end: what it writes, and one clear line with exit code 2 for bad input."""

import errno
import inspect
import io
import itertools
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from m2f_video import VideoMask2Former, VideoSegmentation, read_video
from m2f_video.acceleration import context, cpu_kernels
from m2f_video.cli.data import DATA_COMMANDS
from m2f_video.cli.demo import demo
from m2f_video.cli.main import COMMANDS, main
from m2f_video.data import STANDARD_SPLITS, SyntheticVideos
from m2f_video.files import locked
from m2f_video.inference import partial
from m2f_video.video import VideoWriter, open_video
from m2f_video.video.parts import VideoParts
from tests.conftest import synthetic_frames
from tests.video.test_read_once import damage_packet
from tests.video.test_video_io import make_video
from weights_convert import from_native, hf_config_from_native, write_checkpoint

FRAMES = 6
FILES = ["overlay.mp4", "tracks.json", "tracks.jsonl"]
"""Of a complete result."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    """A folder with an H.264 file and one model in several formats."""
    folder = tmp_path_factory.mktemp("cli")
    frames = synthetic_frames(FRAMES, 60, 90)
    with VideoWriter(folder / "video.mp4", 12, 90, 60) as writer:
        for frame in frames:
            writer.write(frame)
    tiny_model.save_pretrained(folder / "native")
    config, preprocessor = hf_config_from_native(tiny_model.config.to_dict())
    write_checkpoint(folder / "hf", from_native(tiny_model.state_dict(), "hf"), config, preprocessor)
    return folder


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # the parser's own way out
        return int(exit_.code or 0)


def segment(folder: Path, output: Path, *options: object, source="video.mp4", checkpoint="native") -> int:
    return run("segment", folder / source, "--checkpoint", folder / checkpoint, "--output", output, *options)


def test_plain_gives_the_same_to_rounding(folder, tmp_path, monkeypatch):
    fused = []
    fuse = context.fuse
    monkeypatch.setattr(context, "fuse", lambda *args: (fused.append("called"), fuse(*args))[1])
    assert segment(folder, tmp_path / "plain", "--plain") == 0
    assert fused == []
    assert segment(folder, tmp_path / "fast") == 0
    assert fused == ["called"]
    plain, fast = (json.loads((tmp_path / name / "tracks.json").read_text()) for name in ("plain", "fast"))
    scores = [row["score"] for row in plain["results"]]
    assert [row["score"] for row in fast["results"]] == pytest.approx(scores, rel=1e-3)


def test_segment_writes_tracks_and_overlay(folder, tmp_path, capsys):
    assert segment(folder, tmp_path / "out") == 0
    overlay = read_video(tmp_path / "out" / "overlay.mp4")
    assert overlay.shape == (FRAMES, 60, 90, 3)
    tracks = json.loads((tmp_path / "out" / "tracks.json").read_text())
    assert tracks["video"]["fps"] == 12
    assert tracks["video"]["frames"] == list(range(FRAMES))
    assert len(tracks["results"]) == 10
    assert {len(row["segmentations"]) for row in tracks["results"]} == {FRAMES}
    printed = capsys.readouterr().out
    assert f"{FRAMES} frames" in printed
    assert str(tmp_path / "out") in printed


def test_formats_of_one_model_give_the_same_tracks(folder, tmp_path):
    assert segment(folder, tmp_path / "native") == 0
    assert segment(folder, tmp_path / "hf", checkpoint="hf") == 0
    assert segment(folder, tmp_path / "bare", "--config", folder / "native/config.json",
                   checkpoint="native/model.safetensors") == 0  # fmt: skip
    texts = {(tmp_path / name / "tracks.json").read_text() for name in ("native", "hf", "bare")}
    assert len(texts) == 1


def test_options_reach_the_library(folder, tmp_path):
    options = ("--frames", "1:6:2", "--top-k", 3, "--shortest-edge", 64, "--dtype", "bfloat16", "--no-overlay")
    assert segment(folder, tmp_path / "out", *options, "--device", "cpu", "--frames-per-chunk", 2) == 0
    tracks = json.loads((tmp_path / "out" / "tracks.json").read_text())
    assert tracks["video"]["frames"] == [1, 3, 5]
    assert len(tracks["results"]) == 3
    assert not (tmp_path / "out" / "overlay.mp4").exists()


def test_truncated_video_warns_or_fails_when_strict(folder, tmp_path, capsys):
    whole = (folder / "video.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * 0.8)])
    source = tmp_path / "cut.mp4"
    assert segment(folder, tmp_path / "out", source=source) == 0
    captured = capsys.readouterr()
    decoded = len(json.loads((tmp_path / "out" / "tracks.json").read_text())["video"]["frames"])
    assert 0 < decoded < FRAMES
    assert "warning" in captured.err
    assert str(decoded) in captured.err
    assert segment(folder, tmp_path / "strict", "--strict", source=source) == 2
    assert not (tmp_path / "strict").exists()


def test_a_video_that_changes_its_size_is_segmented_until_there(folder, tmp_path, capsys):
    source = tmp_path / "both.ts"
    for count, height, width in ((4, 60, 90), (3, 90, 60)):
        with VideoWriter(tmp_path / "part.ts", 12, width, height) as writer:
            for frame in synthetic_frames(count, height, width):
                writer.write(frame)
        with source.open("ab") as file:
            file.write((tmp_path / "part.ts").read_bytes())
    assert segment(folder, tmp_path / "out", source=source) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("--frames 4:") and "frame 4 is 60x90" in line for line in lines if "both.ts" in line] == [
        True
    ]
    assert VideoSegmentation.load(tmp_path / "out" / "tracks.json").frames == (0, 1, 2, 3)
    assert read_video(tmp_path / "out" / "overlay.mp4").shape == (4, 60, 90, 3)
    assert segment(folder, tmp_path / "strict", "--strict", source=source) == 2
    assert not (tmp_path / "strict").exists()
    assert segment(folder, tmp_path / "rest", "--frames", "4:", "--strict", source=source) == 0
    assert read_video(tmp_path / "rest" / "overlay.mp4").shape == (3, 90, 60, 3)


@pytest.mark.parametrize("relative", [True, False])
def test_names_that_look_like_addresses_and_patterns_are_names(folder, tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    place = Path() if relative else tmp_path
    (tmp_path / "12:30 50%d.mp4").write_bytes((folder / "video.mp4").read_bytes())
    options = ("--checkpoint", folder / "native", "--output", place / "run:1 %03d")
    assert run("segment", place / "12:30 50%d.mp4", *options) == 0
    written = sorted(path.name for path in (tmp_path / "run:1 %03d").iterdir())
    assert written == FILES
    assert len(read_video(place / "run:1 %03d" / "overlay.mp4")) == FRAMES


# -- what is piped in


class Piped:
    """Standard input that comes through a pipe."""

    def __init__(self, path: Path | bytes) -> None:
        data = path if isinstance(path, bytes) else path.read_bytes()
        self.closed, self.buffer = False, io.BufferedReader(Unseekable(data))

    def isatty(self) -> bool:
        return False


class Unseekable(io.RawIOBase):
    name = "<stdin>"

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self.data.readinto(buffer)


def piped(folder: Path, output: Path, *options: object) -> int:
    return run("segment", "-", "--checkpoint", folder / "native", "--output", output, *options)


def as_format(folder: Path, target: Path) -> Path:
    with VideoWriter(target, 12, 90, 60) as writer:
        for frame in read_video(folder / "video.mp4"):
            writer.write(frame)
    return target


def within_a_frame(video: Path) -> bytes:
    """What there is of a video that ends within its second frame."""
    with av.open(str(video)) as container:
        first = next(packet for packet in container.demux(video=0) if packet.size)
    return video.read_bytes()[: first.pos + first.size + 20]


def test_a_video_is_piped_in(folder, tmp_path, monkeypatch, capsys):
    source = as_format(folder, tmp_path / "video.mkv")
    assert segment(folder, tmp_path / "file", "--mode", "window", "--window", 3, source=source) == 0
    monkeypatch.setattr(sys, "stdin", Piped(source))
    assert piped(folder, tmp_path / "out", "--window", 3) == 0
    assert "mode window: the source does not say how long it is" in capsys.readouterr().out
    result, file = (VideoSegmentation.load(tmp_path / name) for name in ("out", "file"))
    assert result.source == "<stdin>"
    assert (result.tracks, result.frames, result.fps) == (file.tracks, file.frames, file.fps)
    overlay, plain = read_video(tmp_path / "out" / "overlay.mp4"), read_video(source)
    assert overlay.shape == plain.shape
    assert (np.abs(overlay.astype(int) - plain).max((1, 2, 3)) > 60).all()  # drawn on in every frame

    monkeypatch.setattr(sys, "stdin", Piped(source))
    assert piped(folder, tmp_path / "part", "--frames", "1:5:2", "--mode", "whole", "--no-overlay") == 0
    assert VideoSegmentation.load(tmp_path / "part").frames == (1, 3)
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["tracks.json", "tracks.jsonl"]


def test_a_step_through_a_pipe_keeps_the_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Piped(as_format(folder, tmp_path / "video.ts")))
    assert piped(folder, tmp_path / "out", "--frames", "::3") == 0
    assert open_video(tmp_path / "out" / "overlay.mp4").fps == 4


def test_a_corrupt_frame_in_a_pipe_keeps_the_time(folder, tmp_path, monkeypatch, capsys):
    source = make_video(tmp_path / "video.avi", "mjpeg", "yuvj420p")
    damage_packet(source, 4)
    monkeypatch.setattr(sys, "stdin", Piped(source))
    assert piped(folder, tmp_path / "out", "--frames", ":9") == 0
    assert VideoSegmentation.load(tmp_path / "out").frames == (0, 1, 2, 3, 5, 6, 7, 8)
    assert len(read_video(tmp_path / "out" / "overlay.mp4")) == 9


def test_bad_input_that_is_piped_in(folder, tmp_path, monkeypatch, capsys):
    source = as_format(folder, tmp_path / "video.mkv")
    terminal = Piped(b"")
    terminal.isatty = lambda: True
    for stdin, options, named in [
        (Piped(b""), (), "nothing came through it"),
        (Piped(b"hello\n" * 100), (), "<stdin>: not a video"),
        (Piped(source), ("--mode", "whole"), "--no-overlay"),
        (Piped(source), ("--frames", "50:60"), "only 6 frames"),
        (Piped(within_a_frame(source)), ("--strict",), "cut off or damaged"),
        (terminal, (), "is a terminal"),
        (None, (), "standard input is closed"),
    ]:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert_refused(capsys, piped(folder, tmp_path / "out", *options), tmp_path / "out", named)


def test_a_pipe_that_closes_early_keeps_what_came(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Piped(within_a_frame(as_format(folder, tmp_path / "video.mkv"))))
    assert piped(folder, tmp_path / "out") == 0
    assert "<stdin>: the file is cut off or damaged" in capsys.readouterr().err
    count = len(VideoSegmentation.load(tmp_path / "out").frames)
    assert 1 <= count < FRAMES
    assert len(read_video(tmp_path / "out" / "overlay.mp4")) == count


def broken(folder: Path, target: Path, change) -> Path:
    """A copy of the native checkpoint with its weights changed."""
    weights = load_file(folder / "native" / "model.safetensors")
    change(weights)
    target.mkdir()
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text((folder / "native" / "config.json").read_text())
    return target


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


CLASS_BIAS = "transformer_decoder.class_head.bias"
BROKEN_WEIGHTS = {
    "missing key": (lambda w: w.pop(CLASS_BIAS), CLASS_BIAS),
    "extra key": (lambda w: w.update(surplus=torch.zeros(1)), "surplus"),
    "whole numbers": (lambda w: w.update({CLASS_BIAS: torch.zeros(6, dtype=torch.int64)}), CLASS_BIAS),
    "wrong shape": (lambda w: w.update({CLASS_BIAS: torch.zeros(9)}), CLASS_BIAS),
    "NaN": (lambda w: w.update({CLASS_BIAS: torch.full_like(w[CLASS_BIAS], float("nan"))}), CLASS_BIAS),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_weights_are_named(folder, tmp_path, capsys, case):
    change, named = BROKEN_WEIGHTS[case]
    checkpoint = broken(folder, tmp_path / "broken", change)
    assert_refused(capsys, segment(folder, tmp_path / "out", checkpoint=checkpoint), tmp_path / "out", named)


def assert_refused(capsys, code: int, output: Path, *named: str) -> None:
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1
    assert error.startswith("m2f-video: error: ")
    assert all(name in error for name in named), error
    assert not output.exists()


def test_bad_checkpoints_are_refused(folder, tmp_path, capsys):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Malicious()}))
    (tmp_path / "noconfig").mkdir()
    (tmp_path / "noconfig" / "model.safetensors").write_bytes((folder / "native" / "model.safetensors").read_bytes())
    (tmp_path / "cut.safetensors").write_bytes((folder / "native" / "model.safetensors").read_bytes()[:1000])
    preset = ("--config", folder / "native" / "config.json")
    cases = [
        (tmp_path / "nowhere", (), "nowhere"),
        ("no-such-preset", (), "no-such-preset"),
        (tmp_path / "noconfig", (), "config.json"),
        (tmp_path / "evil.pkl", preset, "system"),
        (tmp_path / "cut.safetensors", preset, "cut.safetensors"),
        (folder / "native" / "model.safetensors", ("--config", "resnet_99"), "resnet_99"),
        (folder / "native", ("--device", "warp"), "warp"),
        (folder / "native", ("--device", "meta"), "meta"),
    ]
    for checkpoint, options, named in cases:
        code = segment(folder, tmp_path / "out", *options, checkpoint=checkpoint)
        assert_refused(capsys, code, tmp_path / "out", named)
    assert not Path("pwned").exists()


def test_unknown_architecture_is_named(folder, tmp_path, capsys):
    checkpoint = broken(folder, tmp_path / "other", lambda weights: None)
    (checkpoint / "config.json").write_text('{"model_type": "detr", "architectures": ["DetrForObjectDetection"]}')
    assert_refused(capsys, segment(folder, tmp_path / "out", checkpoint=checkpoint), tmp_path / "out", "detr")


def test_bad_sources_are_refused(folder, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "0.png")
    for source, options, named in [
        ("nowhere.mp4", (), "nowhere.mp4"),
        (tmp_path / "text.mp4", (), "text.mp4"),
        (tmp_path / "empty", (), "empty"),
        (tmp_path / "piped", (), "0.png is a named pipe"),
        (tmp_path / "piped" / "0.png", (), "0.png is a named pipe"),
        ("video.mp4", ("--frames", "9:3"), "9:3"),
        ("video.mp4", ("--frames", "50:60"), "only"),
    ]:
        assert_refused(capsys, segment(folder, tmp_path / "out", *options, source=source), tmp_path / "out", named)


def test_the_source_is_not_overwritten(folder, tmp_path, capsys):
    source = tmp_path / "overlay.mp4"
    source.write_bytes((folder / "video.mp4").read_bytes())
    assert segment(folder, tmp_path, source=source) == 2
    assert "overwrite" in capsys.readouterr().err
    assert source.read_bytes() == (folder / "video.mp4").read_bytes()
    assert list(tmp_path.iterdir()) == [source]


def test_an_image_model_is_named_with_the_remedy(folder, tmp_path, capsys, tiny_config, monkeypatch):
    image_model = VideoMask2Former(tiny_config.replace(temporal="per_frame"))
    image_model.save_pretrained(tmp_path / "image")
    assert_refused(
        capsys, segment(folder, tmp_path / "out", checkpoint=tmp_path / "image"), tmp_path / "out", "--temporal joint"
    )
    assert segment(folder, tmp_path / "out", "--temporal", "joint", checkpoint=tmp_path / "image") == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_running_out_of_memory_says_what_to_do(folder, tmp_path, capsys, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(VideoMask2Former, "encode_frames", exhausted)
    assert_refused(capsys, segment(folder, tmp_path / "out"), tmp_path / "out", "--shortest-edge")


def test_without_kernels_a_line_says_so_once(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(cpu_kernels, "_library", cpu_kernels._library.__wrapped__)  # not what is loaded already
    context._say_once.cache_clear()
    for name in ("first", "second"):
        assert segment(folder, tmp_path / name) == 0
    lines = [record.getMessage() for record in caplog.records if "going on" in record.getMessage()]
    assert len(lines) == 1
    assert "going on without compiled kernels, by oneDNN: " in lines[0]
    assert "do not compile: false" in lines[0]


def test_other_runtime_errors_are_not_hidden(folder, tmp_path, monkeypatch):
    def defect(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(VideoMask2Former, "encode_frames", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        segment(folder, tmp_path / "out")


def test_frames_too_wide_for_an_overlay_are_refused_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (16386, 2)).save(tmp_path / "frames" / "0.png")
    assert segment(folder, tmp_path / "out", source=tmp_path / "frames", checkpoint="no-such-model") == 2
    assert "16386x2, and an overlay has at most 16384 pixels on a side; give --no-overlay" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VideoMask2Former, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("mine")
    assert segment(folder, tmp_path / "file" / "out") == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(VideoWriter, "write", full)
    assert_refused(capsys, segment(folder, tmp_path / "out"), tmp_path / "out", "No space left", "overlay.mp4")


def test_an_interrupt_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "write", interrupted)
    assert segment(folder, tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["segment"], ["segment", "v.mp4", "--dtype", "float8"], ["fly"]])
def test_bad_arguments_exit_with_2(arguments):
    assert run(*arguments) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    assert run(command, "--help") == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_help_of_the_data_commands_teaches(command, capsys):
    assert run("data", command, "--help") == 0
    assert "Example" in capsys.readouterr().out


def test_datasets_are_made_checked_and_split(tmp_path, capsys):
    size = ("--frames", 2, "--height", 48, "--width", 64)
    assert run("data", "synthesize", tmp_path / "shapes", "--videos", 2, *size) == 0
    assert run("data", "check", tmp_path / "shapes") == 0
    assert run("data", "split", tmp_path / "shapes", tmp_path / "parts", "--fraction", 0.5) == 0
    (tmp_path / "shapes" / "JPEGImages" / "000001" / "00001.jpg").unlink()
    capsys.readouterr()
    assert run("data", "check", tmp_path / "shapes") == 1
    assert "00001.jpg" in capsys.readouterr().out


def test_results_are_evaluated(tmp_path, capsys):
    golden = Path(__file__).parents[1] / "golden" / "eval"
    report = tmp_path / "report.json"
    files = ("--annotations", golden / "gt.json", "--results", golden / "results_perfect.json")
    assert run("eval", *files, "--no-tracking", "--json", report) == 0
    assert "AP50" in capsys.readouterr().out
    expected = json.loads((golden / "expected.json").read_text())
    assert json.loads(report.read_text())["AP"] == pytest.approx(expected["perfect"]["stats"]["AP"], abs=1e-12)


def test_parity_passes_and_fails_by_exit_code(folder, capsys, monkeypatch):
    pytest.importorskip("transformers")
    from m2f_video import parity

    size = ("--height", 64, "--width", 96)
    assert run("parity", "--checkpoint", folder / "native", "--dtype", "float64", *size) == 0
    printed = capsys.readouterr().out
    assert "backbone stride 4" in printed
    assert "within the tolerance" in printed
    assert run("parity", "--checkpoint", folder / "native", "--dtype", "bfloat16", *size) == 0
    assert "there is no tolerance in bfloat16" in capsys.readouterr().out
    monkeypatch.setitem(parity.TOLERANCES, torch.float32, 1e-12)
    assert run("parity", "--random", 3, "--config", folder / "native" / "config.json", *size) == 1
    assert "OVER" in capsys.readouterr().out


def test_parity_of_some_stages_on_a_video_is_written_as_json(folder, capsys, tmp_path):
    pytest.importorskip("transformers")
    options = ("--checkpoint", folder / "native", "--video", folder / "video.mp4", "--frames", 2, "--plain")
    report = tmp_path / "parity.json"
    assert run("parity", *options, "--stage", "mask features", "decoder 1", "--json", report) == 0
    printed = capsys.readouterr().out
    assert f"of {folder / 'video.mp4'}" in printed
    content = json.loads(report.read_text())
    names = ["mask features", "decoder 1 class logits", "decoder 1 mask logits", "decoder 1 attention mask"]
    assert [stage["stage"] for stage in content["stages"]] == names
    assert all(name in printed for name in names)
    assert content["passed"] is True
    assert content["frames"][:2] == [2, 3]
    assert content["stages"][3]["flips"][0] == 0
    assert content["stages"][0]["own_relative"] <= content["tolerance"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--random", 1, "--stage", "encoder"), "there is no stage 'encoder'; there are: backbone stride 4"),
        (("--random", 1, "--video", "clip.mp4", "--height", 64), "leave them out with --video"),
        (("--random", 1, "--video", "no.mp4"), "no.mp4"),
        (("--random", 1, "--json", "no/such/folder.json"), "make it first"),
    ],
)
def test_parity_names_what_is_wrong_with_its_options(options, message, folder, capsys):
    pytest.importorskip("transformers")
    size = () if "--video" in options else ("--height", 64, "--width", 96)
    assert run("parity", *options, "--config", folder / "native" / "config.json", *size) == 2
    assert message in capsys.readouterr().err


def test_parity_takes_one_kind_of_weights(folder, capsys):
    assert run("parity", "--checkpoint", folder / "native", "--random", 1) == 2
    assert "not both" in capsys.readouterr().err


def test_info_says_what_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in printed
    assert "embedding_bag" in printed
    assert "triton: " in printed
    reason = cpu_kernels.why_no_kernels()
    assert f"kernels for a CPU: {'compiled' if reason is None else f'none, {reason}'}" in printed
    assert (str(tmp_path / "m2f_video") in printed) == (reason is None)
    monkeypatch.setenv("M2F_VIDEO_MS_DEFORM_ATTN", "fastest")
    assert run("info") == 0
    assert "unknown deformable attention backend" in capsys.readouterr().out


def test_demo_measures_its_result_by_the_truth(tmp_path, capsys):
    assert run("demo", "--output", tmp_path / "demo") == 0
    assert sorted(file.name for file in (tmp_path / "demo").iterdir()) == sorted([*FILES, "report.html", "video.mp4"])
    printed = capsys.readouterr().out
    assert "AP50" in printed
    rows = json.loads((tmp_path / "demo" / "tracks.json").read_text())["results"]
    assert len(rows) == 10  # the threshold of the table does not cut what AP is measured by


def test_the_demo_video_is_chosen_by_what_is_seen_in_it():
    def is_clear(seed: int) -> bool:
        video = SyntheticVideos(1, seed, "medium")[0]
        masks = video.clip(range(video.num_frames)).masks
        return len(masks) >= 4 and masks.float().mean((2, 3)).min() >= 0.01

    chosen = inspect.signature(demo).parameters["seed"].default
    assert chosen == next(filter(is_clear, itertools.count(STANDARD_SPLITS["test"]["seed"] + 1)))


def test_demo_refuses_a_model_of_other_classes(folder, tmp_path, capsys):
    code = run("demo", "--checkpoint", folder / "native", "--output", tmp_path / "demo")
    assert_refused(capsys, code, tmp_path / "demo", "shapes of the benchmark")


def test_a_demo_on_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(VideoWriter, "write", full)
    assert_refused(capsys, run("demo", "--output", tmp_path / "demo"), tmp_path / "demo", "video.mp4")


def test_an_interrupt_while_loading_ends_cleanly(monkeypatch, capsys):
    from m2f_video import __main__

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.__import__", interrupted)
    code = __main__.main()
    monkeypatch.undo()
    assert code == 130
    assert "interrupted" in capsys.readouterr().err


def long_command(folder: Path, output: Path, *options: str) -> list[str]:
    """The command for a video in windows, with a state after its first 200 frames."""
    if not (folder / "long.mp4").exists():
        long = np.tile(synthetic_frames(FRAMES, 60, 90), (40, 1, 1, 1))
        with VideoWriter(folder / "long.mp4", 12, 90, 60) as writer:
            for frame in long:
                writer.write(frame)
    command = [sys.executable, "-m", "m2f_video", "segment", str(folder / "long.mp4"), "--plain"]
    command += ["--checkpoint", str(folder / "native"), "--output", str(output)]
    return [*command, "--shortest-edge", "32", "--top-k", "1", "--window", "8", "--frames-per-chunk", "8", *options]


def signalled(folder: Path, output: Path, kind: signal.Signals) -> tuple[int, str]:
    """Exit code and standard error of the command when it gets a signal after its first state."""
    process = subprocess.Popen(long_command(folder, output), stderr=subprocess.PIPE, text=True)  # noqa: S603
    state, lines = output / ".unfinished" / "state.safetensors", output / "tracks.jsonl"
    while not state.exists() or lines.stat().st_mtime <= state.stat().st_mtime:  # a frame was written since
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(kind)
    return process.wait(), process.communicate()[1]


SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.mark.parametrize("kind", SIGNALS)
def test_signals_end_as_an_interrupt_does(folder, tmp_path, capsys, monkeypatch, kind):
    from m2f_video import __main__

    command = ["m2f-video", "segment", f"{folder}/video.mp4", "--checkpoint", f"{folder}/native"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", f"{tmp_path}/out"])
    monkeypatch.setattr(VideoWriter, "write", lambda *_: signal.raise_signal(kind))
    usual = signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(kind, usual)
    try:
        assert __main__.main() == 130
    finally:
        signal.signal(kind, before)
    assert capsys.readouterr().err == "m2f-video: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def long_result(folder, tmp_path_factory) -> dict[str, bytes]:
    """The files of the long video, made in one run."""
    output = tmp_path_factory.mktemp("long")
    subprocess.run(long_command(folder, output), check=True, capture_output=True)  # noqa: S603
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.mark.slow  # fresh interpreters; that runs go on has fast tests in tests/inference
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_signalled_run_goes_on(folder, tmp_path, kind, long_result):
    output = tmp_path / "out"
    code, error = signalled(folder, output, kind)
    if kind == signal.SIGKILL:
        assert (code, error) == (-signal.SIGKILL, "")
    else:
        assert code == 130
        assert re.fullmatch(
            rf"m2f-video: interrupted; 2\d\d frames are final and in {output}/tracks.jsonl; "
            r"--resume goes on after 2\d\d of them\n",
            error,
        )
    with pytest.warns(UserWarning, match="stopped or is at work"):
        assert len(VideoSegmentation.load(output).frames) >= 200
    command = long_command(folder, output, "--resume")
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    assert "go on after frame 2" in done.stdout
    assert {path.name: path.read_bytes() for path in output.iterdir()} == long_result


def test_resuming_from_the_command_line(folder, tmp_path, capsys, monkeypatch):
    options = ("--mode", "window", "--window", 3, "--no-overlay")
    assert segment(folder, tmp_path, *options, "--resume") == 0
    assert "nothing to go on from; start anew" in capsys.readouterr().out
    assert segment(folder, tmp_path, *options, "--resume") == 0
    assert "it is complete already, nothing is to be done" in capsys.readouterr().out
    assert segment(folder, tmp_path, *options[:2], "--no-overlay", "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds a result of another window (3 and not 8)" in error
    assert "start anew, without --resume" in error
    monkeypatch.setattr(VideoMask2Former, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(sys, "stdin", Piped(as_format(folder, tmp_path / "video.mkv")))
    assert_refused(capsys, piped(folder, tmp_path / "out", "--resume"), tmp_path / "out", "cannot be resumed", "a file")


def test_a_second_run_in_a_folder_is_refused(folder, tmp_path, capsys):
    with locked(tmp_path / ".lock"):
        assert segment(folder, tmp_path) == 2
    assert "another run is at work in" in capsys.readouterr().err


def test_a_full_disk_in_a_long_run_keeps_what_is_final(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(partial, "KEPT_EVERY", 3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(VideoParts, "close", lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1])))
    try:
        assert segment(folder, tmp_path, "--mode", "window", "--window", 2) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert "File too large" in error
    assert f"4 frames are final and in {tmp_path}/tracks.jsonl; --resume starts anew" in error
    with pytest.warns(UserWarning, match="4 frames"):
        assert len(VideoSegmentation.load(tmp_path).frames) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_in_the_way_is_found_before_the_work(folder, tmp_path, capsys, monkeypatch, name, kind):
    monkeypatch.setattr(VideoMask2Former, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "out").mkdir()
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / "out" / name)
    assert segment(folder, tmp_path / "out") == 2
    assert f"{name} is a {'named pipe' if kind == 'pipe' else 'folder'}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_no_message_is_over_300_characters_or_writes_to_the_terminal(capsys):
    name = "no" + 500 * "/very_long" + "\x1b[2J\n.mp4"
    assert run("segment", name, "--checkpoint", "demo", "--output", "out") == 2
    message = capsys.readouterr().err
    assert len(message) == 301
    assert message.startswith("m2f-video: error: no/very_long/")
    assert message.endswith("there is no such video file or folder of frames\n")
    assert "\\x1b[2J" in message
    assert message[:-1].isprintable()


def test_the_installed_command_prints_names_that_are_no_text(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / name).write_bytes((folder / "video.mp4").read_bytes())
    command = [sys.executable, "-m", "m2f_video", "segment", name, "--output", os.fsdecode(b"\xff")]
    command += ["--checkpoint", str(folder / "native")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")  # nor a progress bar, where there is no terminal
    assert "caf\\udce9.mp4" in done.stdout
    assert VideoSegmentation.load(tmp_path / os.fsdecode(b"\xff")).source == name


def test_nobody_reading_the_output_is_told_by_the_exit_code(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run("info") == 141
        print("what is flushed when the process ends")
    assert capsys.readouterr().err == ""


@pytest.mark.slow  # a fresh interpreter
def test_nobody_reading_the_output_is_no_traceback():
    command = [sys.executable, "-m", "m2f_video", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_names_of_classes_are_texts_and_no_markup(folder, tmp_path, capsys):
    config = json.loads((folder / "native" / "config.json").read_text())
    config["labels"][:3] = ["[/b]", "[red]car", ":smile:"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").write_bytes((folder / "native" / "model.safetensors").read_bytes())
    assert segment(folder, tmp_path / "out", "--top-k", 50, checkpoint=tmp_path / "model") == 0
    printed = capsys.readouterr().out
    assert all(label in printed for label in config["labels"][:3])


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_traceback(folder, tmp_path, closed, monkeypatch):
    from m2f_video import __main__

    command = ["m2f-video", "segment", f"{folder}/video.mp4", "--checkpoint", f"{folder}/native", "--no-overlay"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", f"{tmp_path}/out"])
    monkeypatch.setattr(sys, closed, None)  # as Python starts with it
    assert __main__.main() == 0
    getattr(sys, closed).close()
    assert (tmp_path / "out" / "tracks.json").exists()


@pytest.mark.slow  # fresh interpreters
@pytest.mark.parametrize("closed", [1, 2])
def test_the_installed_command_takes_closed_streams(folder, tmp_path, closed):
    command = f'exec "{sys.executable}" -m m2f_video segment "{folder}/video.mp4" --checkpoint "{folder}/native" '
    command += f'--no-overlay --output "{tmp_path}/out" {closed}>&-'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "tracks.json").exists()


def test_a_report_does_not_take_the_place_of_what_it_is_made_from(tmp_path, capsys):
    golden = Path(__file__).parents[1] / "golden" / "eval"
    files = {name: tmp_path / f"{name}.json" for name in ("annotations", "results")}
    files["annotations"].write_bytes((golden / "gt.json").read_bytes())
    files["results"].write_bytes((golden / "results_perfect.json").read_bytes())
    before = {name: file.read_bytes() for name, file in files.items()}
    for file in files.values():
        given = [part for name, path in files.items() for part in (f"--{name}", path)]
        assert run("eval", *given, "--no-tracking", "--json", file) == 2
        assert "is what the numbers are made from" in capsys.readouterr().err
    assert {name: file.read_bytes() for name, file in files.items()} == before

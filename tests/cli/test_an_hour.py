"""An hour of video is an ordinary input: through the command in flat memory, killed in its middle, and gone on with."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2f_video import VideoMask2Former, open_video, stream_video
from m2f_video.cli.outputs import processor_of
from m2f_video.data import SyntheticVideos
from m2f_video.results.masks import decode_mask
from m2f_video.video import VideoWriter

FPS, FRAMES = 6, 21_600
HEIGHT, WIDTH, STRIP = 96, 160, 16
BITS = 16
"""Of a frame's number, painted below the picture."""
CHUNK = 8
"""Frames encoded at a time: of small ones most of the work is between the operators."""
END = 64
"""Frames that are looked at where the video begins, is cut, and ends: a multiple of a window's."""

pytestmark = pytest.mark.slow  # ten minutes


def numbered(picture: np.ndarray, number: int) -> np.ndarray:
    strip = np.zeros((STRIP, WIDTH, 3), np.uint8)
    for bit in range(BITS):
        strip[:, bit * WIDTH // BITS : (bit + 1) * WIDTH // BITS] = 255 * (number >> bit & 1)
    return np.concatenate([picture, strip])


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A video of shapes that move to and fro for an hour; and the truth of its first frames, (N, T, H, W)."""
    video = SyntheticVideos(1, 6, "easy", num_frames=END, height=HEIGHT, width=WIDTH)[0]
    clip = video.clip(range(END))
    pictures = clip.frames.permute(0, 2, 3, 1).numpy()
    to_and_fro = [*range(END), *reversed(range(1, END - 1))]
    path = tmp_path_factory.mktemp("hour") / "hour.mp4"
    with VideoWriter(path, FPS, WIDTH, HEIGHT + STRIP) as writer:
        for number in range(FRAMES):
            writer.write(numbered(pictures[to_and_fro[number % len(to_and_fro)]], number))
    return path, clip.masks.numpy()


def lines_of(output: Path) -> Iterator[dict[str, Any]]:
    with (output / "tracks.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def frames_done(output: Path) -> int:
    try:
        return (output / "tracks.jsonl").read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


class Run:
    """The command, at a terminal of its own; what it printed, and its memory by the number of frames done."""

    def __init__(self, *arguments: object) -> None:
        self.printed, self.megabytes = "", dict[int, float]()
        terminal, end = pty.openpty()
        termios.tcsetwinsize(end, (24, 120))
        command = [sys.executable, "-m", "m2f_video", "segment", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=end, stderr=end)  # noqa: S603
        os.close(end)
        threading.Thread(target=self._read, args=(terminal,), daemon=True).start()

    def _read(self, terminal: int) -> None:
        try:
            while text := os.read(terminal, 2**16):
                self.printed = self.printed[-(2**20) :] + text.decode(errors="replace")
        except OSError:  # as a terminal says that it was closed
            pass

    def watch(self, output: Path, until: int) -> None:
        """Note memory until so many frames are done or it ends."""
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None and (done := frames_done(output)) < until:
            if found := re.search(r"VmRSS:\s+(\d+) kB", status.read_text()):
                self.megabytes[done] = int(found[1]) / 1024
            time.sleep(1)


def test_an_hour_of_video(hour: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    source, truth = hour
    output = tmp_path / "out"
    options = {"--checkpoint": "demo", "--output": output, "--shortest-edge": HEIGHT, "--frames-per-chunk": CHUNK}
    arguments = [source, *(part for option in options.items() for part in option)]
    first = Run(*arguments)
    first.watch(output, FRAMES // 2)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    cut = frames_done(output)
    assert FRAMES // 2 <= cut < FRAMES, first.printed
    assert f"/{FRAMES}" in first.printed  # the bar knows its end
    assert not (output / "tracks.json").exists()

    second = Run(*arguments, "--resume")
    second.watch(output, FRAMES + 1)
    assert second.process.wait() == 0, second.printed
    for run in (first, second):
        early = [size for done, size in run.megabytes.items() if min(run.megabytes) + 1000 <= done]
        print({done: round(size) for done, size in run.megabytes.items()})
        assert max(early) < 1.05 * early[0]

    check_overlay(source, output, cut)
    check_tracks(source, output, truth)


def check_overlay(source: Path, output: Path, cut: int) -> None:
    """Every frame is drawn on its own picture, and none on a neighbour's."""
    for start, stop in ((0, END), (cut - END, cut + END), (FRAMES - END, FRAMES)):
        frames = slice(start, stop)
        pictures = np.stack(list(open_video(source, frames))).astype(np.float32)
        drawn = np.stack(list(open_video(output / "overlay.mp4", frames))).astype(np.float32)
        assert len(pictures) == len(drawn) == stop - start
        for position, picture in enumerate(drawn):
            apart = np.abs(pictures - picture).clip(max=20)  # as much, where something is drawn, from all
            assert apart.mean((1, 2, 3)).argmin() == position
    assert open_video(output / "overlay.mp4").num_frames_hint == FRAMES


def check_tracks(source: Path, output: Path, truth: np.ndarray) -> None:
    header, *rows = lines_of(output)
    lines = [row for row in rows if "frame" in row]
    assert header["video"]["fps"] == FPS
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    assert rows[-1]["complete"]
    assert rows[-1]["tracks"]

    model = VideoMask2Former.from_pretrained("demo")
    processor = processor_of(model, HEIGHT)
    for start, stop in ((0, END), (FRAMES - END, FRAMES)):
        for result in stream_video(
            model, source, frames=slice(start, stop), processor=processor, frames_per_chunk=CHUNK
        ):
            found = lines[result.frame]["masks"].values()
            assert {rle["counts"] for rle in result.masks.values()} == {rle["counts"] for rle in found}

    for of_object in truth:  # each is followed by one track where it is seen first
        found = [best_track(lines[t]["masks"], mask) for t, mask in enumerate(of_object) if mask.any()]
        assert max(found.count(id_) for id_ in set(found) - {None}) > len(found) / 2


def best_track(masks: dict[str, Any], truth: np.ndarray) -> str | None:
    """The id of what covers a true mask well."""
    for id_, rle in masks.items():
        mask = decode_mask(rle)[:HEIGHT]
        if (mask & truth).sum() > 0.5 * (mask | truth).sum():
            return id_
    return None

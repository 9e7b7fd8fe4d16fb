"""Videos that are read once, as they come: iterators of frames, pipes and other open files; and lost frames."""

import contextlib
import gzip
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from m2f_video.video.decode import LostFrames, VideoError
from m2f_video.video.reader import TruncatedVideoWarning, open_video, read_video
from tests.video.test_video_io import FASTSTART, T, cut, frame_number, make_video, picture

Feed = Callable[[bytes], Any]


def frames(count: int = 6, **kwargs: int) -> Iterator[np.ndarray]:
    return (picture(index, **kwargs) for index in range(count))


@pytest.fixture
def pipe() -> Iterator[Feed]:
    """What is to be written, by a thread, into a pipe; its other end."""
    with contextlib.ExitStack() as stack:

        def feed(data: bytes) -> Any:
            out, into = os.pipe()

            def write() -> None:
                with contextlib.suppress(BrokenPipeError), open(into, "wb") as file:
                    file.write(data)

            thread = threading.Thread(target=write)
            thread.start()
            stack.callback(thread.join)
            return stack.enter_context(open(out, "rb"))

        yield feed


# --- iterators of frames


def test_an_iterator_is_read_once_and_loses_no_frame() -> None:
    reader = open_video(frames())
    assert (reader.width, reader.height, reader.fps, reader.num_frames_hint) == (64, 48, 25, None)
    assert (reader.source, reader.read_once) == ("<frames>", True)
    for index, frame in enumerate(reader):
        np.testing.assert_array_equal(frame, picture(index))
    assert reader.frame_indices(2) == (0, 1)
    with pytest.raises(VideoError, match="<frames>: it is read once"):
        iter(reader)
    assert open_video(frames(), fps=30).fps == 30
    assert not open_video(list(frames())).read_once


def test_no_frame_is_asked_for_before_its_time() -> None:
    asked = []

    def camera() -> Iterator[np.ndarray]:
        for index in range(100):
            asked.append(index)
            yield picture(index)

    reader = iter(open_video(camera(), slice(2, 7, 2)))
    assert asked == [0, 1, 2]
    assert [frame_number(frame) for frame in reader] == [2, 4, 6]
    assert asked == list(range(7))


def test_a_camera_may_write_into_the_same_memory() -> None:
    def camera() -> Iterator[np.ndarray]:
        memory = np.empty((48, 64, 3), np.uint8)
        for index in range(4):
            memory[:] = picture(index)
            yield memory

    assert [frame_number(frame) for frame in list(open_video(camera()))] == [0, 1, 2, 3]


def test_tensors_and_pictures_come_one_by_one_too() -> None:
    for video in (map(torch.from_numpy, frames()), map(Image.fromarray, frames()), iter(np.stack(list(frames())))):
        np.testing.assert_array_equal(read_video(video), np.stack(list(frames())))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (picture(height=40), "frame 3 is 64x40 but those before it are 64x48; the video ends there"),
        (picture() / 255, "frame 3 is float64, frames are uint8 RGB: .* the video ends there"),
        (picture()[..., 0], r"frame 3 has shape \(48, 64\)"),
        (None, "frame 3 has shape"),
    ],
)
def test_a_frame_of_another_kind_ends_the_video(odd: object, message: str) -> None:
    with pytest.warns(TruncatedVideoWarning, match=message) as caught:
        read = list(open_video(iter([*frames(3), odd, *frames(3)])))
    assert len(read) == 3
    assert caught[0].filename == __file__
    reader = iter(open_video(iter([*frames(3), odd]), strict=True))
    assert len([next(reader) for _ in range(3)]) == 3
    with pytest.raises(VideoError, match=message.split(";")[0]):
        next(reader)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (iter([]), "<frames>: the video holds no frames"),
        (iter("abc"), "frame 0 has shape"),
        (iter([picture() / 255]), "frame 0 is float64"),
        (iter(b"abc"), "frame 0 has shape"),
    ],
)
def test_iterators_that_are_no_video(video: Any, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        open_video(video)


def test_slices_of_an_iterator() -> None:
    with pytest.raises(VideoError, match="ends before the first that is selected"):
        open_video(frames(), slice(50, 60))
    with pytest.raises(VideoError, match="negative frame numbers"):
        open_video(frames(), slice(-3, None))


def test_an_error_of_the_iterator_reaches_the_caller() -> None:
    def unplugged(count: int) -> Iterator[np.ndarray]:
        yield from frames(count)
        raise ConnectionError("camera unplugged")

    reader = iter(open_video(unplugged(2)))
    assert [frame_number(next(reader)) for _ in range(2)] == [0, 1]
    with pytest.raises(ConnectionError, match="unplugged"):
        next(reader)
    with pytest.raises(ConnectionError, match="unplugged"):
        open_video(unplugged(0))


# --- pipes and other open files


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "libx264", {}),
        ("a.ts", "libx264", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.avi", "mpeg4", {}),
        ("a.gif", "gif", {}),
        ("fast.mp4", "libx264", FASTSTART),
        ("fragmented.mp4", "libx264", FRAGMENTED),
    ],
)
def test_a_pipe_gives_what_the_file_gives(
    tmp_path: Path, pipe: Feed, name: str, codec: str, options: dict[str, str]
) -> None:
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    path = make_video(tmp_path / name, codec, pixels, rate=Fraction(25, 2), container_options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = open_video(pipe(path.read_bytes()))
        np.testing.assert_array_equal(np.stack(list(reader)), read_video(path))
    assert (reader.num_frames_hint, reader.read_once, reader.source) == (None, True, "<stream>")
    assert reader.fps == open_video(path).fps
    with pytest.raises(VideoError, match="it is read once"):
        iter(reader)
    selected = open_video(pipe(path.read_bytes()), slice(3, 9, 2))
    assert [frame_number(frame) for frame in selected] == [3, 5, 7]
    assert selected.frame_indices(3) == (3, 5, 7)


def test_open_files_that_can_seek_need_no_order(tmp_path: Path) -> None:
    path = large_video(tmp_path / "a.mp4")
    with path.open("rb") as file:
        reader = open_video(file)
        assert reader.source == str(path)
        assert len(list(reader)) == 12
    assert len(read_video(io.BytesIO(path.read_bytes()))) == 12
    packed = io.BytesIO(gzip.compress(path.read_bytes()))
    with gzip.open(packed) as file:
        assert len(read_video(file)) == 12  # type: ignore[arg-type]


def large_video(path: Path) -> Path:
    """More than FFmpeg reads to find out what it is."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25, options={"qmin": "2", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuvj420p"
        noise = np.random.default_rng(0)
        for _ in range(12):
            image = noise.integers(0, 256, (480, 640, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_an_index_at_the_end_cannot_be_read_from_a_pipe(tmp_path: Path, pipe: Feed) -> None:
    data = large_video(tmp_path / "a.mp4").read_bytes()
    with pytest.raises(VideoError, match=r"<stream>: .* mkv, webm, mpegts, fragmented mp4 .* by their path"):
        open_video(pipe(data))


def test_frames_come_before_the_pipe_ends(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.ts", "mpeg2video", num_frames=200, size=(96, 128)).read_bytes()
    out, into = os.pipe()
    with open(out, "rb") as file, open(into, "wb") as writer:
        thread = threading.Thread(target=lambda: (writer.write(data), writer.flush()))
        thread.start()
        reader = iter(open_video(file))
        seen = [frame_number(next(reader)) for _ in range(100)]  # the other end is still open
        assert seen[:12] == list(range(12))
        thread.join()
        writer.close()
        assert len(list(reader)) == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "<stream>: not a video FFmpeg can read.* nothing came through it"),
        (b"hello world\n" * 50, "<stream>: not a video"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.ts\n#EXT-X-ENDLIST\n", "<stream>: not a video"),
        (b"ffconcat version 1.0\nfile good.ts\n", "<stream>: not a video"),
    ],
)
def test_what_is_no_video_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Feed, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "good.ts")
    with pytest.raises(VideoError, match=message):
        open_video(pipe(content))


def test_a_pipe_that_ends_inside_a_frame(tmp_path: Path, pipe: Feed) -> None:
    path = cut(make_video(tmp_path / "a.mkv", num_frames=60, size=(96, 128)), 0.7)
    with pytest.warns(TruncatedVideoWarning, match=r"<stream>: the file is cut off or damaged") as caught:
        read = list(open_video(pipe(path.read_bytes())))
    assert 8 <= len(read) < 60
    assert caught[0].filename == __file__
    with pytest.raises(VideoError, match="cut off or damaged"):
        read_video(pipe(path.read_bytes()), strict=True)


def test_text_is_told_from_bytes(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="open as text"):
        open_video(io.StringIO("abc"))  # type: ignore[arg-type]
    with (tmp_path / "text").open("w+") as file, pytest.raises(VideoError, match=r"text is open as text.*\.buffer"):
        open_video(file)  # type: ignore[arg-type]


class Failing(io.RawIOBase):
    """Fails after so many bytes."""

    def __init__(self, data: bytes, error: BaseException | None) -> None:
        self.data, self.error = io.BytesIO(data), error

    def read(self, size: int = -1) -> bytes:
        data = self.data.read(min(size, 4096))
        if not data and self.error is not None:
            raise self.error
        return data if self.error is not None else data + bytes(size + 1)


def test_an_interrupt_comes_before_what_is_left_to_decode(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.ts", num_frames=200, size=(96, 128), options={"g": "5"}).read_bytes()
    counts = []
    for error in (KeyboardInterrupt(), ConnectionError()):
        seen: list[np.ndarray] = []
        with contextlib.suppress(KeyboardInterrupt, ConnectionError):
            seen.extend(open_video(Failing(data[: len(data) // 2], error)))
        counts.append(len(seen))
    assert 50 < counts[0] < counts[1]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ConnectionError, RuntimeError])
def test_an_error_while_reading_reaches_the_caller(tmp_path: Path, kind: type[BaseException]) -> None:
    data = make_video(tmp_path / "a.ts", num_frames=200, size=(96, 128), options={"g": "5"}).read_bytes()
    with pytest.raises(kind):
        open_video(Failing(data[:1000], kind()))
    reader = open_video(Failing(data[: len(data) // 2], kind()))
    with pytest.raises(kind):
        list(reader)


def test_more_bytes_than_were_asked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"must give up to \d+ bytes"):
        open_video(Failing(b"", None))


# --- frames that do not decode


@pytest.mark.parametrize(
    ("name", "codec", "options", "lost"),
    [
        ("a.mp4", "libx264", {}, [17]),
        ("a.mp4", "mjpeg", {}, [17]),
        ("a.mp4", "libx265", {"x265-params": "log-level=none"}, [16, 17, 18, 20, 21, 22, 23]),
        ("a.ts", "libx264", {}, [17]),  # the demuxer drops it
        ("a.avi", "mpeg4", {"qmin": "2", "qmax": "2"}, [17]),
        ("a.avi", "libx264", {}, None),  # states wrong times
    ],
)
def test_a_frame_that_does_not_decode_is_counted(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], lost: list[int] | None
) -> None:
    path = make_video(
        tmp_path / name, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p", num_frames=40, size=(96, 128),
        options={"g": "12"} | options,
    )  # fmt: skip
    assert open_video(path).frame_indices(40) == tuple(range(40))
    damage_packet(path, 17)
    reader = open_video(path)
    with pytest.warns(TruncatedVideoWarning, match="did not decode and are left out: "):
        read = list(reader)
    numbers = reader.frame_indices(len(read))
    assert numbers[-1] == 39
    assert frame_number(read[-1]) == 39 % 12
    if lost is not None:
        assert sorted(set(range(40)) - set(numbers)) == lost
        assert [frame_number(frame) for frame in read[-10:]] == [number % 12 for number in numbers[-10:]]
    with pytest.raises(VideoError, match="left out"):
        read_video(path, strict=True)
    after = open_video(path, slice(30, None, 3))
    with pytest.warns(TruncatedVideoWarning):
        assert [frame_number(frame) for frame in after] == [number % 12 for number in (30, 33, 36, 39)]
    assert after.frame_indices(4) == (30, 33, 36, 39)


def damage_packet(path: Path, number: int) -> None:
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    hole = packets[number]
    assert hole.pos is not None
    data = bytearray(path.read_bytes())
    data[hole.pos : hole.pos + hole.size] = bytes(hole.size)
    path.write_bytes(data)


def test_a_selected_frame_that_is_lost_leaves_a_gap(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", "mjpeg", "yuvj420p")
    damage_packet(path, 4)
    reader = open_video(path, slice(0, None, 2))
    for _ in range(2):  # the second time as the first
        with pytest.warns(TruncatedVideoWarning):
            assert [frame_number(frame) for frame in reader] == [0, 2, 6, 8, 10]
        assert reader.frame_indices(5) == (0, 2, 6, 8, 10)
    assert reader.num_frames_hint == T // 2


class _Packet:
    is_discard, is_corrupt, time_base = False, False, Fraction(1, 25)

    def __init__(self, pts: int, is_corrupt: bool = False) -> None:
        self.pts, self.is_corrupt = pts, is_corrupt


class _Stream:
    average_rate = Fraction(25)

    class codec_context:  # noqa: N801  # as PyAV calls it
        has_b_frames = False


def test_a_hole_in_time_alone_is_no_loss() -> None:
    lost = LostFrames(_Stream)
    for pts in (0, 1, 8, 9):  # a pause, and packets for all that is shown
        lost.sent(_Packet(pts))
        assert lost.before(Fraction(pts, 25)) == 0
    for pts in (10, 11):  # half frames: two packets and no hole
        lost.sent(_Packet(pts))
    assert lost.before(Fraction(10, 25)) == 0
    lost.sent(_Packet(12, is_corrupt=True))
    assert lost.before(Fraction(12, 25)) == 1
    assert lost.before(Fraction(15, 25)) == 2  # the file says that something is missing there
    assert lost.before(Fraction(15 + 3600 * 25, 25)) == 0  # the clock was set

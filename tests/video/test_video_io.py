import contextlib
import errno
import gc
import io
import os
import re
import socket
import struct
import warnings
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from m2f_video.video import decode as video_decode
from m2f_video.video.decode import VideoError
from m2f_video.video.reader import TruncatedVideoWarning, VideoReader, open_video, parse_frames, read_video
from m2f_video.video.writer import VideoWriter, as_frame_rate

H, W, T = 48, 64, 12

# Four flat corners, so that turning, mirroring and colour errors all show, and a bar that tells frames apart.
CORNERS = {(0, 0): (220, 40, 40), (0, 1): (40, 200, 60), (1, 0): (50, 60, 210), (1, 1): (230, 220, 60)}


def picture(index: int = 0, height: int = H, width: int = W) -> np.ndarray:
    frame = np.zeros((height, width, 3), np.uint8)
    for (row, column), color in CORNERS.items():
        frame[row * height // 2 : (row + 1) * height // 2 + row, column * width // 2 :][:, : width // 2 + 1] = color
    frame[height // 2 - 4 : height // 2 + 4] = 20 * (index % 12)
    return frame


def frame_number(frame: np.ndarray) -> int:
    """Which `picture` a decoded frame shows, read off its bar."""
    middle = frame.shape[0] // 2
    return round(float(frame[middle - 2 : middle + 2].mean()) / 20)


def corners(frame: np.ndarray) -> np.ndarray:
    """Mean colours (2, 2, 3) of the four corners."""
    h, w = frame.shape[0] // 4, frame.shape[1] // 4
    return np.array(
        [[frame[r, c].reshape(-1, 3).mean(0) for c in (np.s_[:w], np.s_[-w:])] for r in (np.s_[:h], np.s_[-h:])]
    )


EXPECTED = np.array([[CORNERS[r, c] for c in (0, 1)] for r in (0, 1)], float)


def make_video(
    path: Path,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    *,
    num_frames: int = T,
    size: tuple[int, int] = (H, W),
    rate: Fraction | int = 25,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    matrix: tuple[int, ...] | None = None,
    times: list[int] | None = None,
    alpha: int | None = None,
) -> Path:
    """Encode `picture`s; `matrix` is a display matrix, `times` are presentation times in ms, `alpha` an opacity."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            image = picture(index, *size)
            if alpha is None:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            else:
                opacity = np.full((*size, 1), alpha, np.uint8)
                frame = av.VideoFrame.from_ndarray(np.concatenate([image, opacity], -1), format="rgba")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, fraction: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def has_encoder(name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        return False
    return True


FORMATS = [
    # file, encoder, pixel format, encoder options, tolerance of the colours
    ("a.mp4", "libx264", "yuv420p", {}, 6),
    ("a.mkv", "libx264", "yuv420p10le", {}, 6),
    ("a.ts", "libx264", "yuv420p", {}, 6),
    ("b.mp4", "libx264", "yuv444p", {}, 6),
    ("c.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}, 6),
    ("d.mp4", "libx265", "yuv420p10le", {"x265-params": "log-level=none"}, 6),
    ("e.webm", "libvpx-vp9", "yuv420p", {}, 6),
    ("f.webm", "libvpx-vp9", "yuva420p", {}, 6),
    ("g.mp4", "libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "fast-decode=1"}, 6),
    ("i.gif", "gif", "rgb8", {}, 45),  # 3, 3 and 2 bits a channel
    ("j.mp4", "mpeg4", "yuv420p", {"qmin": "2", "qmax": "2"}, 8),
    ("k.avi", "mpeg4", "yuv420p", {"qmin": "2", "qmax": "2"}, 8),
    ("l.mkv", "ffv1", "yuv420p", {}, 6),
    ("m.mov", "qtrle", "argb", {}, 0),
    ("n.mov", "png", "rgba", {}, 0),
    ("o.mov", "mjpeg", "yuvj420p", {"qmin": "2", "qmax": "2"}, 6),
    ("p.mpg", "mpeg2video", "yuv420p", {}, 8),
]


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "options", "tolerance"), FORMATS, ids=[f[0] for f in FORMATS]
)
def test_every_format_is_read_whole_and_in_its_colours(
    tmp_path: Path, name: str, codec: str, pixel_format: str, options: dict[str, str], tolerance: int
) -> None:
    if not has_encoder(codec):
        pytest.skip(f"this PyAV has no {codec}")
    path = make_video(tmp_path / name, codec, pixel_format, options=options)
    reader = open_video(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a sound file gives no false alarm
        frames = list(reader)
    assert (reader.source, reader.width, reader.height, reader.fps) == (str(path), W, H, 25)
    assert [frame.shape for frame in frames] == [(H, W, 3)] * T
    assert {frame.dtype for frame in frames} == {np.dtype(np.uint8)}
    assert [frame_number(frame) for frame in frames[1:]] == list(range(1, T))
    for frame in frames:
        assert np.abs(corners(frame) - EXPECTED).max() <= tolerance


def test_readers_are_re_iterable_and_agree_with_read_video(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    reader = open_video(path)
    first, second = list(reader), list(reader)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(read_video(path), first)
    assert reader.num_frames_hint == T


def test_a_grey_video_is_expanded(tmp_path: Path) -> None:
    frame = read_video(make_video(tmp_path / "a.mp4", pixel_format="gray"))[3]
    assert frame.shape == (H, W, 3)
    np.testing.assert_array_equal(frame[..., 0], frame[..., 2])
    assert frame_number(frame) == 3


def test_alpha_is_dropped(tmp_path: Path) -> None:
    half = read_video(make_video(tmp_path / "a.mov", "qtrle", "argb", alpha=100))
    np.testing.assert_array_equal(half[0], picture(0))


def test_colours_follow_the_matrix_and_range_tags(tmp_path: Path) -> None:
    for matrix, swscale in ((1, "ITU709"), (6, "ITU601")):
        for color_range, name in ((1, "MPEG"), (2, "JPEG")):
            path = tmp_path / f"{matrix}{color_range}.mp4"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
                stream.width, stream.height, stream.pix_fmt = W, H, "yuv444p"
                stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
                frame = av.VideoFrame.from_ndarray(picture(), format="rgb24")
                container.mux(
                    stream.encode(frame.reformat(format="yuv444p", dst_colorspace=swscale, dst_color_range=name))
                )
                container.mux(stream.encode())
            assert np.abs(corners(read_video(path)[0]) - EXPECTED).max() <= 4, path.name


ONE = 1 << 16
LAST_COLUMN = 1 << 30
# Display matrix (a, b, c, d) and what it does to an upright picture's array.
DISPLAYS = {
    "none": ((ONE, 0, 0, ONE), lambda x: x),
    "quarter turn left": ((0, -ONE, ONE, 0), lambda x: np.rot90(x, 1)),
    "half turn": ((-ONE, 0, 0, -ONE), lambda x: np.rot90(x, 2)),
    "quarter turn right": ((0, ONE, -ONE, 0), lambda x: np.rot90(x, -1)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda x: x[:, ::-1]),
    "upside down": ((ONE, 0, 0, -ONE), lambda x: x[::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda x: x.swapaxes(0, 1)),
    "turned and mirrored": ((0, -ONE, -ONE, 0), lambda x: np.rot90(x, 1)[:, ::-1]),
}


@pytest.mark.parametrize("display", DISPLAYS)
def test_frames_come_upright(tmp_path: Path, display: str) -> None:
    (a, b, c, d), apply = DISPLAYS[display]
    path = make_video(tmp_path / "a.mp4", num_frames=2, matrix=(a, b, 0, c, d, 0, 0, 0, LAST_COLUMN))
    reader = open_video(path)
    frame = next(iter(reader))
    expected = apply(picture())
    assert frame.shape == expected.shape == (reader.height, reader.width, 3)
    assert np.abs(corners(frame) - corners(expected)).max() <= 6


def test_the_rotation_agrees_with_ffmpegs_own_reading(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=1, matrix=(0, -ONE, 0, ONE, 0, 0, 0, 0, LAST_COLUMN))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    np.testing.assert_array_equal(read_video(path)[0], turned)


@pytest.mark.parametrize("size", [(47, 63), (48, 63), (47, 64), (17, 33)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = make_video(tmp_path / "a.mp4", pixel_format="yuv444p", size=size)
    video = read_video(path)
    assert video.shape == (T, *size, 3)
    assert np.abs(corners(video[0]) - EXPECTED).max() <= 8


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate_takes_frames_as_stored(tmp_path: Path, name: str) -> None:
    times = [0, 40, 80, 700, 740, 2000, 2010, 2020, 2400, 2500, 5000, 5040]
    path = make_video(tmp_path / name, times=times)
    reader = open_video(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [frame_number(frame) for frame in reader] == list(range(T))
    assert isinstance(reader.fps, Fraction)
    assert open_video(path, fps=12.5).fps == Fraction(25, 2)


def two_sizes(path: Path) -> Path:
    """Four frames of 64x48, then four of 128x96."""
    if path.suffix == ".ts":
        parts = [make_video(path.with_name(f"{size[0]}.ts"), num_frames=4, size=size) for size in ((H, W), (96, 128))]
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    else:
        pages = [Image.fromarray(picture(index % 4, *((H, W) if index < 4 else (96, 128)))) for index in range(8)]
        pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


@pytest.mark.parametrize("name", ["both.ts", "both.tif"])
def test_a_video_ends_where_its_size_changes(tmp_path: Path, name: str) -> None:
    path = two_sizes(tmp_path / name)
    frames: list[np.ndarray] = []
    with pytest.warns(
        TruncatedVideoWarning, match=f"{name}: frame 4 is 128x96 but .* are 64x48.*--frames 4:$"
    ) as caught:
        frames.extend(open_video(path))
    assert [frame_number(frame) for frame in frames] == [0, 1, 2, 3]
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(VideoError, match="frame 4 is 128x96"):
        list(open_video(path, strict=True))
    with pytest.warns(TruncatedVideoWarning, match="frame 5 is 128x96"):
        assert [frame_number(frame) for frame in open_video(path, slice(1, None, 2))] == [1, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_video(path, slice(0, 4))) == 4
        rest = open_video(path, slice(4, None), strict=True)
        assert (rest.height, rest.width) == (96, 128)
        assert [frame_number(frame) for frame in rest] == [0, 1, 2, 3]


# --- names, metadata and kinds of files


@pytest.mark.parametrize("name", ["12:30", "http:x", "concat:a|b", "50%", "a%03d", "-", "file:a", "a b?#&"])
def test_a_local_path_is_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), Path(name), tmp_path / name):
        for suffix in (".mp4", ".mkv", ".avi"):
            path = folder / f"{name}{suffix}"
            with VideoWriter(path, 25, W, H) as writer:
                for index in range(3):
                    writer.write(picture(index))
            assert [frame_number(frame) for frame in open_video(str(path))] == [0, 1, 2]
            path.unlink()
        for suffix in (".png", ".jpg", ".webp", ".tif"):
            path = folder / f"{name}{suffix}"
            Image.fromarray(picture(5)).save(path)
            assert [frame_number(frame) for frame in open_video(str(path))] == [5]
            if folder != Path():
                assert [frame_number(frame) for frame in open_video(folder)] == [5]
            path.unlink()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_metadata_in_another_encoding_do_no_harm(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a title in ASCII"
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(4), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert b"a title in ASCII" in content
    path.write_bytes(content.replace(b"a title in ASCII", "für Größe, Nähe!".encode("latin-1")))
    assert [frame_number(frame) for frame in open_video(path, strict=True)] == [4]


@pytest.fixture(params=["pipe", "socket", "device"])
def special(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of something in the current folder whose reading blocks for ever."""
    folder = tmp_path / "frames"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with contextlib.ExitStack() as stack:
        if request.param == "pipe":
            os.mkfifo("1.png")
        elif request.param == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind("1.png")
        else:
            Path("1.png").symlink_to("/dev/zero")
        yield {"pipe": "a named pipe", "socket": "a socket", "device": "a device"}[request.param]


def test_what_blocks_is_refused_as_a_video_and_as_a_frame(special: str) -> None:
    Image.fromarray(picture()).save("0.png")
    for source in ("1.png", "."):
        with pytest.raises(VideoError, match=rf"1\.png is {special}, not a regular file; .{{1,80}}$"):
            open_video(source)


def png_of(height: int, width: int) -> bytes:
    """The beginning of a PNG, which states its size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    chunks = [header, b"IDAT" + data]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(16_000, 16_000), (20_000, 8_000), (2**31 - 1, 2**31 - 1)])
def test_frames_that_would_take_all_memory_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "0.png").write_bytes(png_of(*size))
    for source in (tmp_path, tmp_path / "0.png"):
        with pytest.raises(VideoError, match=r"0\.png: ") as caught:
            list(open_video(source))
        assert "more than 134,217,728 pixels" in str(caught.value)
        assert len(str(caught.value).replace(str(tmp_path), "")) < 200


def test_arrays_of_such_frames_are_refused_too() -> None:
    with pytest.raises(VideoError, match="frame 0 is 8192x16385; frames of more than 134,217,728 pixels are not read"):
        open_video(np.broadcast_to(np.zeros(3, np.uint8), (1, 16385, 8192, 3)))


def test_frames_that_grow_too_large_are_refused_by_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = two_sizes(tmp_path / "both.ts")
    monkeypatch.setattr(video_decode, "_DECODER_OPTIONS", {"max_pixels": str(2 * W * H)})
    with pytest.warns(TruncatedVideoWarning, match="4 frames were decoded: 4 of its packets or frames are broken"):
        assert [frame_number(frame) for frame in open_video(path)] == [0, 1, 2, 3]
    monkeypatch.setattr(video_decode, "_DECODER_OPTIONS", {"max_pixels": str(W * H // 2)})
    with pytest.raises(VideoError, match=r"no frame could be decoded .* more than 134,217,728 pixels"):
        open_video(path)


def test_an_8k_frame_is_read(tmp_path: Path) -> None:
    Image.new("L", (7680, 4320), 60).save(tmp_path / "0.png")
    for source in (tmp_path, tmp_path / "0.png"):
        (frame,) = open_video(source)
        assert frame.shape == (4320, 7680, 3)


def test_a_hundred_thousand_frames_are_no_more_than_their_number() -> None:
    video = np.broadcast_to(np.zeros((), np.uint8), (100_000, 1, 1, 3))
    reader = open_video(video, slice(-70_000, None, 2))
    assert sum(1 for _ in reader) == reader.num_frames_hint == 35_000
    assert reader.frame_indices(35_000)[-1] == 99_998


# --- side data


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112], data[0x010F] = orientation, "a camera"
    return data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.avi", "a.mov", "a.mkv", "a.jpg", "a.png", "a.webp", "a.tif", "a.avif", "apng.png"])
def test_a_cameras_data_in_frames(tmp_path: Path, name: str, orientation: int) -> None:
    path, image = tmp_path / name, Image.fromarray(picture(3))
    if path.suffix in {".avi", ".mov", ".mkv"}:
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", exif=exif(orientation), quality=95)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mjpeg", rate=25)
            stream.height, stream.width, stream.pix_fmt = H, W, "yuvj420p"
            for index in range(3):
                packet = av.Packet(buffer.getvalue())
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 25)
                packet.is_keyframe = True
                container.mux(packet)
    elif name == "apng.png":
        image.save(path, save_all=True, append_images=[image.transpose(0)], exif=exif(orientation))
    else:
        image.save(path, exif=exif(orientation))
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(still(image, orientation)))))
    reader = open_video(path, strict=True)
    frames = list(reader)
    assert len(frames) == (3 if path.suffix in {".avi", ".mov", ".mkv"} else 1 + (name == "apng.png"))
    assert frames[0].shape == (reader.height, reader.width, 3) == shown.shape
    assert np.abs(corners(frames[0]) - corners(shown)).max() <= 8


def still(image: Image.Image, orientation: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=exif(orientation))
    return buffer.getvalue()


def test_frames_and_clips_go_without_the_garbage_collector(tmp_path: Path) -> None:
    turned = make_video(tmp_path / "a.mp4", num_frames=40, matrix=(0, -ONE, 0, ONE, 0, 0, 0, 0, LAST_COLUMN))
    gc.collect()

    def kept() -> int:
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    of_others = kept()  # such as errors of other tests hold
    gc.disable()
    try:
        assert sum(1 for _ in open_video(turned)) == 40
        assert kept() <= of_others + 1
        before = len(os.listdir("/proc/self/task"))
        for _ in range(100):
            next(iter(open_video(turned)))
        assert len(os.listdir("/proc/self/task")) <= before + 8
        assert kept() <= of_others + 1
    finally:
        gc.enable()


# --- selecting frames


@pytest.mark.parametrize(
    "frames", [slice(2, 9, 3), slice(5, None), slice(None, 4), slice(None, None, 5), slice(3, 100)]
)
@pytest.mark.parametrize("kind", ["file", "folder", "array"])
def test_slices_select_as_on_a_list_and_name_their_source_indices(tmp_path: Path, kind: str, frames: slice) -> None:
    source = make_source(tmp_path, kind)
    reader = open_video(source, frames)
    numbers = [frame_number(frame) for frame in reader]
    assert numbers == list(range(T))[frames]
    assert list(reader.frame_indices(len(numbers))) == numbers
    assert reader.num_frames_hint == len(numbers)


def make_source(tmp_path: Path, kind: str) -> object:
    if kind == "file":
        return make_video(tmp_path / "a.mp4")
    if kind == "folder":
        return make_folder(tmp_path / "frames")
    return np.stack([picture(index) for index in range(T)])


def make_folder(folder: Path, suffix: str = ".png") -> Path:
    folder.mkdir()
    for index in range(T):
        Image.fromarray(picture(index)).save(folder / f"frame{index}{suffix}")  # not padded: frame10 after frame9
    return folder


@pytest.mark.parametrize("kind", ["folder", "array"])
def test_negative_frame_numbers_where_the_length_is_known(tmp_path: Path, kind: str) -> None:
    reader = open_video(make_source(tmp_path, kind), slice(-4, -1))  # type: ignore[arg-type]
    assert [frame_number(frame) for frame in reader] == [8, 9, 10]
    assert reader.frame_indices(3) == (8, 9, 10)


def test_negative_frame_numbers_of_a_file_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="counted from the start"):
        open_video(make_video(tmp_path / "a.mp4"), slice(-4, None))


@pytest.mark.parametrize("kind", ["file", "folder", "array"])
def test_a_slice_past_the_end_says_how_many_frames_there_are(tmp_path: Path, kind: str) -> None:
    with pytest.raises(VideoError, match=f"frames 50:60 select nothing, the video has only {T} frames"):
        list(open_video(make_source(tmp_path, kind), slice(50, 60)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frames", "message"),
    [(slice(5, 5), "select nothing"), (slice(0, 4, 0), "step"), (slice(0, 4, -1), "step"), (slice(0, 2.5), "whole")],
)
def test_slices_that_make_no_sense(frames: slice, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        open_video(np.zeros((9, 4, 4, 3), np.uint8), frames)


def test_parse_frames() -> None:
    assert parse_frames("10:50:2") == slice(10, 50, 2)
    assert parse_frames(" 10 : 50 ") == slice(10, 50)
    assert parse_frames("::5") == slice(None, None, 5)
    assert parse_frames("7:") == slice(7, None)


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3:4", "-5:", "1.5:3", "5:5", "9:3", "1:9:0", "::-1", "१:9"])
def test_parse_frames_rejects(text: str) -> None:
    with pytest.raises(VideoError, match="frames"):
        parse_frames(text)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 9))
def test_parse_frames_reads_back_what_is_written(start: int, length: int, step: int) -> None:
    assert parse_frames(f"{start}:{start + length}:{step}") == slice(start, start + length, step)


# --- files that are damaged or no videos

FASTSTART = {"movflags": "faststart"}
CUTS = [
    ("a.mp4", "libx264", {}, FASTSTART),
    ("b.mp4", "libx265", {"x265-params": "log-level=none"}, FASTSTART),
    ("c.mp4", "mpeg4", {}, FASTSTART),
    ("d.mp4", "libvpx-vp9", {}, FASTSTART),
    ("e.mkv", "libx264", {}, {}),
    ("f.webm", "libvpx-vp9", {}, {}),
    ("g.avi", "mpeg4", {}, {}),
    ("h.flv", "libx264", {}, {}),
    ("i.mkv", "ffv1", {}, {}),
    ("j.gif", "gif", {}, {}),
]


@pytest.mark.parametrize(("name", "codec", "options", "container_options"), CUTS, ids=[c[0] for c in CUTS])
def test_a_cut_file_yields_what_decodes_and_then_warns(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], container_options: dict[str, str]
) -> None:
    pixel_format = "rgb8" if codec == "gif" else "yuv420p"
    path = make_video(
        tmp_path / name, codec, pixel_format, num_frames=60, size=(96, 128), options=options,
        container_options=container_options,
    )  # fmt: skip
    cut(path, 0.7)
    frames: list[np.ndarray] = []
    with pytest.warns(TruncatedVideoWarning, match=r"cut off or damaged, \d+ frames were decoded") as caught:
        frames.extend(open_video(path))
    assert 8 <= len(frames) < 60
    assert [frame_number(frame) for frame in frames[1:8]] == list(range(1, 8))
    assert f"{path}: " in str(caught[0].message)
    assert f" {len(frames)} frames" in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.raises(VideoError, match="cut off or damaged"):
        list(open_video(path, strict=True))
    with pytest.raises(VideoError, match="cut off or damaged"):
        read_video(path, strict=True)


def test_a_cut_between_two_samples_is_found_by_the_stated_length(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", "mpeg4", num_frames=40, container_options=FASTSTART)
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[19]])
    with pytest.warns(TruncatedVideoWarning, match=r"20 frames were decoded: the last 0\.80 s"):
        assert len(read_video(path)) == 20


def test_two_missing_frames_are_no_alarm(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", "mpeg4", num_frames=40, container_options=FASTSTART)
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[37]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_video(path, strict=True)) == 38


def test_a_hole_in_the_middle_does_not_end_the_video(tmp_path: Path) -> None:
    path = make_video(
        tmp_path / "a.mp4", "mpeg4", num_frames=40, size=(96, 128), options={"g": "5", "qmin": "2", "qmax": "2"}
    )
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    hole = packets[17]
    data[hole.pos : hole.pos + hole.size] = bytes(hole.size)
    path.write_bytes(data)
    with pytest.warns(TruncatedVideoWarning, match="broken"):
        frames = list(open_video(path))
    assert frame_number(frames[-1]) == 39 % 12


def test_a_broadcast_that_starts_between_keyframes_is_sound(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.ts", num_frames=60, size=(96, 128), options={"g": "20", "bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 188 // 2 * 188 :])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 15 <= len(read_video(path)) < 45


def test_a_slice_before_the_damage_does_not_meet_it(tmp_path: Path) -> None:
    path = cut(make_video(tmp_path / "a.mp4", num_frames=60, size=(96, 128), container_options=FASTSTART), 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_video(path, slice(0, 10))) == 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.mp4", b""),
        ("text.mp4", b"hello world\n" * 50),
        ("readme.txt", b"hello world\n" * 50),
        ("noise.mkv", bytes(np.random.default_rng(0).integers(0, 256, 20_000, np.uint8))),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.ts\n#EXT-X-ENDLIST\n"),
        ("list.mp4", b"ffconcat version 1.0\nfile good.ts\n"),
        ("subtitles.srt", b"1\n00:00:01,000 --> 00:00:02,000\nhello\n"),
    ],
)
def test_what_is_no_video(tmp_path: Path, name: str, content: bytes) -> None:
    make_video(tmp_path / "good.ts")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=rf"{name}: (not a video|the file has no video stream)"):
        open_video(tmp_path / name)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/cars\.mp4: there is no such video"):
        open_video("nowhere/cars.mp4")
    with pytest.raises(VideoError):
        read_video("nowhere/cars.mp4")


def test_an_index_at_the_end_that_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"a\.mp4"):
        open_video(cut(make_video(tmp_path / "a.mp4", size=(96, 128)), 0.5))


def make_audio(path: Path, cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        if cover:
            picture_stream = container.add_stream("mjpeg", rate=25)
            picture_stream.width, picture_stream.height, picture_stream.pix_fmt = W, H, "yuvj420p"
            picture_stream.disposition = av.stream.Disposition.attached_pic
            container.mux(picture_stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        for index in range(20):
            sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            sound.sample_rate, sound.pts = 44100, index * 1024
            container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_is_no_video_even_with_a_cover_picture(tmp_path: Path, cover: bool) -> None:
    with pytest.raises(VideoError, match=r"sound\.mp4: the file has no video stream"):
        open_video(make_audio(tmp_path / "sound.mp4", cover))


def test_sound_longer_than_the_pictures_is_no_alarm(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            video, audio = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=44100)
            video.width, video.height, video.pix_fmt = W, H, "yuv420p"
            for index in range(T):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
            for index in range(200):
                sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
                sound.sample_rate, sound.pts = 44100, index * 1024
                container.mux(audio.encode(sound))
            container.mux(video.encode())
            container.mux(audio.encode())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(read_video(tmp_path / name)) == T


def test_a_file_with_no_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", "mpeg4", num_frames=3, container_options=FASTSTART)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])
    with pytest.raises(VideoError, match=r"a\.mp4: no frame could be decoded"):
        open_video(path)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise av.error.PermissionError(errno.EACCES, "Permission denied")

    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(VideoError, match="no permission"):
        open_video(path)


# --- folders of frames and arrays


@pytest.mark.parametrize(
    "suffix",
    [
        ".png",
        ".jpg",
        ".JPEG",
        ".jpe",
        ".bmp",
        ".webp",
        ".tif",
        ".TIFF",
        ".ppm",
        ".pnm",
        ".jfif",
        ".gif",
        ".avif",
        ".jp2",
    ],
)
def test_folders_of_frames(tmp_path: Path, suffix: str) -> None:
    folder = make_folder(tmp_path / "frames", suffix)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame0.png").write_bytes(b"what another system leaves behind")
    reader = open_video(folder)
    assert (reader.source, reader.width, reader.height, reader.fps) == (str(folder), W, H, 25)
    assert [frame_number(frame) for frame in reader] == list(range(T))
    assert open_video(folder, fps=6).fps == 6


def test_pictures_that_are_not_read_are_not_left_out_silently(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "frames")
    (folder / "frame12.heic").write_bytes(b"a photo")
    with pytest.raises(VideoError, match=r"frame12\.heic is a picture of a kind that is not read .* png or jpg"):
        open_video(folder)


@pytest.mark.parametrize("names", [("0.jpg", "0.png"), ("0.PNG", "0.png"), ("a.1.tif", "a.1.gif"), ("0.cr2", "0.jpg")])
def test_two_pictures_of_one_name_are_refused_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = make_folder(tmp_path / "frames")
    for name in names:
        (folder / name).write_bytes((folder / "frame3.png").read_bytes())
    with pytest.raises(VideoError, match=re.escape("{} and {}".format(*sorted(names)))):
        open_video(folder)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif", ".avif"])
def test_several_pictures_in_one_frame_are_refused(tmp_path: Path, suffix: str) -> None:
    pages = [Image.fromarray(picture(index)) for index in range(3)]
    pages[0].save(tmp_path / f"0{suffix}", save_all=True, append_images=pages[1:])
    with pytest.raises(VideoError, match=rf"0\{suffix}: it holds several pictures"):
        open_video(tmp_path)


def sequence(path: Path, num_frames: int = T) -> Path:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 3, (num_frames, H, W, 3), np.uint8)  # so that no two are alike
    pages = [Image.fromarray(np.minimum(picture(index), 250) + noise[index]) for index in range(num_frames)]
    timing = {"duration": 80, "lossless": True} if path.suffix == ".webp" else {}
    pages[0].save(path, save_all=True, append_images=pages[1:], **timing)
    return path


@pytest.mark.parametrize(("name", "fps"), [("a.webp", Fraction(25, 2)), ("a.tif", Fraction(25))])
def test_sequences_of_pictures_in_one_file(tmp_path: Path, name: str, fps: Fraction) -> None:
    reader = open_video(sequence(tmp_path / name), strict=True)
    assert (reader.width, reader.height, reader.fps, reader.num_frames_hint) == (W, H, fps, T)
    assert [frame_number(frame) for frame in reader] == [frame_number(frame) for frame in reader] == list(range(T))
    assert open_video(tmp_path / name, fps=6).fps == 6
    for frames in (slice(2, 9, 3), slice(-4, -1), slice(3, 100)):
        part = open_video(tmp_path / name, frames)
        numbers = [frame_number(frame) for frame in part]
        assert numbers == list(part.frame_indices(len(numbers))) == list(range(T))[frames]
    with pytest.raises(VideoError, match=f"frames 50:60 select nothing, the video has only {T} frames"):
        open_video(tmp_path / name, slice(50, 60))


def test_a_damaged_sequence_yields_what_decodes_and_then_warns(tmp_path: Path) -> None:
    path = sequence(tmp_path / "a.webp", 6)
    content = bytearray(path.read_bytes())
    last = content.rindex(b"VP8L")
    content[last + 13 : last + 100] = b"\xff" * 87
    path.write_bytes(content)
    frames: list[np.ndarray] = []
    with pytest.warns(TruncatedVideoWarning, match=r"a\.webp: the file is cut off or damaged, \d frames") as caught:
        frames.extend(open_video(path))
    assert [frame_number(frame) for frame in frames] == list(range(len(frames)))
    assert len(frames) == 5
    assert caught[0].filename == __file__
    with pytest.raises(VideoError, match=r"a\.webp: the file is cut off or damaged"):
        list(open_video(path, strict=True))


def test_frames_with_alpha_palette_grey_and_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(picture(3))
    for name, converted in {
        "rgba": image.convert("RGBA"),
        "palette": image.convert("P"),
        "grey": image.convert("L"),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        converted.save(folder / "0.png")
        assert frame_number(read_video(folder)[0]) == 3
    folder = tmp_path / "turned"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    image.save(folder / "0.png", exif=exif)
    reader = open_video(folder)
    assert (reader.height, reader.width) == (W, H)
    np.testing.assert_array_equal(next(iter(reader)), np.rot90(picture(3), -1))


def test_folder_errors_name_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    with pytest.raises(VideoError, match="frames: the folder holds no frames"):
        open_video(folder)
    Image.fromarray(picture()).save(folder / "0.png")
    Image.fromarray(picture()[:, :32]).save(folder / "1.png")
    with pytest.raises(VideoError, match=r"1\.png is 32x48 but .*0\.png is 64x48"):
        open_video(folder)
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"1\.png: cannot read"):
        open_video(folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (H, W, 3), np.uint8)).save(folder / "1.png")
    cut(folder / "1.png", 0.5)
    with pytest.raises(VideoError, match=r"1\.png: cannot read"):
        read_video(folder)
    Image.fromarray(np.full((H, W), 4000, np.uint16)).save(folder / "1.png")
    with pytest.raises(VideoError, match=r"1\.png: .* convert it to 8 bits"):
        read_video(folder)


def test_arrays_tensors_and_lists_are_the_same_video() -> None:
    video = np.stack([picture(index) for index in range(5)])
    sources = [
        video,
        torch.from_numpy(video),
        list(video),
        [Image.fromarray(f) for f in video],
        list(torch.from_numpy(video)),
    ]
    for source in sources:
        reader = open_video(source)
        assert (reader.source, reader.width, reader.height, reader.num_frames_hint, reader.fps) == (
            "<array>",
            W,
            H,
            5,
            25,
        )
        np.testing.assert_array_equal(read_video(source), video)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((2, H, W, 3), np.float32), r"astype\('uint8'\)"),
        (torch.zeros(2, H, W, 3), r"astype\('uint8'\)"),
        (np.zeros((2, 3, H, W), np.uint8), "move the channels last"),
        (np.zeros((H, W, 3), np.uint8), "time axis"),
        (np.zeros((0, H, W, 3), np.uint8), "no frames"),
        (np.zeros((2, 0, W, 3), np.uint8), "uint8"),
        (np.zeros((2, H, W, 4), np.uint8), "uint8"),
        (np.zeros((2, H, W, 3), np.int64), "uint8"),
        ([], "no frames"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "frame 1 is 5x4 but frame 0 is 4x4"),
        ([np.zeros((4, 4), np.uint8)], "uint8"),
        (["a.png", "b.png"], "uint8"),
        (b"abc", "a video is a path, an array or a list"),
        (None, "a video is a path, an array or a list"),
        (7, "a video is a path, an array or a list"),
    ],
)
def test_arrays_that_are_no_video(video: object, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        open_video(video)  # type: ignore[arg-type]


@pytest.mark.parametrize("fps", [0, -5, float("nan"), float("inf"), 1e-9])
def test_frame_rates_that_are_none(fps: float) -> None:
    with pytest.raises(VideoError, match="fps"):
        open_video(np.zeros((1, 4, 4, 3), np.uint8), fps=fps)


def test_frame_rates_become_what_containers_use() -> None:
    assert as_frame_rate(30000 / 1001) == Fraction(30000, 1001)
    assert as_frame_rate(29.97) == Fraction(2997, 100)
    assert as_frame_rate(Fraction(123457, 4567)) == Fraction(123457, 4567)
    assert as_frame_rate(1 / 86400) == Fraction(1, 86400)  # a picture a day


@pytest.mark.parametrize("stated", [Fraction(1, 10**9), Fraction(2**31 - 1), Fraction(-25), Fraction(0), None])
def test_a_rate_that_no_video_has_counts_as_not_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: Fraction | None
) -> None:
    class Stream:
        def __init__(self, stream: object) -> None:
            self._stream = stream
            self.average_rate = self.guessed_rate = stated

        def __getattr__(self, name: str) -> object:
            return getattr(self._stream, name)

    path = make_video(tmp_path / "a.mp4", rate=50)
    real = video_decode.Decoder.__init__

    def states_another_rate(self: Any, *args: Any) -> None:
        real(self, *args)
        self.stream = Stream(self.stream)

    monkeypatch.setattr(video_decode.Decoder, "__init__", states_another_rate)
    assert open_video(path).fps == 25


# --- writing


@settings(max_examples=15, deadline=None)
@given(
    st.integers(32, 70),
    st.integers(32, 70),
    st.sampled_from([Fraction(25), Fraction(30000, 1001), Fraction(5, 2), Fraction(2997, 100), 12.5, 60]),
    st.integers(1, 5),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, fps: float | Fraction, num_frames: int
) -> None:
    path = tmp_path_factory.mktemp("written") / "a.mp4"
    with VideoWriter(path, fps, width, height) as writer:
        for index in range(num_frames):
            writer.write(picture(index, height, width))
    reader = open_video(path, strict=True)
    assert (reader.fps, reader.width, reader.height) == (fps, width + width % 2, height + height % 2)
    frames = list(reader)
    assert len(frames) == reader.num_frames_hint == num_frames
    for index, frame in enumerate(frames):
        inside = corners(picture(index, height, width))
        assert np.abs(corners(frame) - inside).mean() <= 6


@pytest.mark.parametrize("fps", [1000, 2000, 20_000, 1_000_000, Fraction(30000, 1001), Fraction(1, 3600)])
def test_no_frame_is_lost_at_any_rate(tmp_path: Path, fps: int | Fraction) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps, W, H) as writer:
        for index in range(T):
            writer.write(picture(index))
    reader = open_video(tmp_path / "a.mp4", strict=True)
    assert reader.fps == fps
    assert [frame_number(frame) for frame in reader] == list(range(T))


def test_frames_of_more_pixels_than_the_encoder_may_keep_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2f_video.video.writer._MOST_PIXELS_LOOKED_AHEAD", 1)
    test_no_frame_is_lost_at_any_rate(tmp_path, 25)


def test_flat_colours_survive_within_a_few_levels(tmp_path: Path) -> None:
    colors = np.array(list(np.ndindex(3, 3, 3))) * 127
    for size in ((W, H), (W + 1, H + 1)):
        with VideoWriter(tmp_path / "a.mp4", 25, *size) as writer:
            for color in colors:
                writer.write(np.broadcast_to(color.astype(np.uint8), (size[1], size[0], 3)))
        for frame, color in zip(open_video(tmp_path / "a.mp4"), colors, strict=True):
            assert np.abs(frame.astype(int) - color).max() <= 4


@pytest.mark.parametrize("size", [(H, W), (H + 1, W), (H, W + 1), (47, 63), (1, 1), (17, 3)])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".m4v"])
def test_every_size_plays_in_browsers(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    height, width = size
    path = tmp_path / f"a{suffix}"
    with VideoWriter(path, 25, width, height) as writer:
        writer.write(picture(3, height, width))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 1, 1)
        assert (context.height, context.width) == (height + height % 2, width + width % 2)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    shown = np.pad(picture(3, height, width), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    if min(size) > 16:  # on fewer pixels colours, which are stored at half the resolution, run into one another
        assert np.abs(corners(read_video(path)[0]) - corners(shown)).max() <= 8


class StoppedError(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for itself."""


@pytest.mark.parametrize("error", [ValueError, StoppedError])
@pytest.mark.parametrize("num_frames", [0, 1, 60])
def test_an_exception_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, error: type[BaseException], num_frames: int
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"an older file")
    with pytest.raises(error), VideoWriter(path, 25, W, H) as writer:  # noqa: PT012
        for index in range(num_frames):
            writer.write(picture(index))
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"an older file"


def test_no_frame_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no frame was written"), VideoWriter(tmp_path / "a.mp4", 25, W, H):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frame", [np.zeros((H, W), np.uint8), np.zeros((W, H, 3), np.uint8), np.zeros((H, W, 3), np.float32)]
)
def test_wrong_frames_are_an_error_and_leave_nothing(tmp_path: Path, frame: np.ndarray) -> None:
    with (
        pytest.raises(VideoError, match=rf"takes uint8 RGB \({H}, {W}, 3\)"),
        VideoWriter(tmp_path / "a.mp4", 25, W, H) as w,
    ):
        w.write(frame)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.FileIO):
        def write(self, data: object) -> int:
            if self.tell() > 2000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)  # type: ignore[arg-type]

    real = av.open

    def open_on_full_disk(path: str, mode: str = "r", **options: object) -> object:
        return real(FullDisk(path.removeprefix("file:"), "w"), mode, format="mp4", **options)

    monkeypatch.setattr(av, "open", open_on_full_disk)
    rng = np.random.default_rng(0)
    with pytest.raises(OSError, match="No space left"), VideoWriter(tmp_path / "a.mp4", 25, W, H) as writer:  # noqa: PT012
        for _ in range(80):
            writer.write(rng.integers(0, 256, (H, W, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fps": 0}, "fps"),
        ({"width": 0}, "width and height"),
        ({"codec": "nonsense"}, "nonsense"),
        ({"path": "a.nonsense"}, "nonsense"),
        ({"width": 20_000}, "cannot encode 20000x48 frames, a side has at most 16384"),
    ],
)
def test_a_writer_that_cannot_be(tmp_path: Path, kwargs: dict[str, object], message: str) -> None:
    arguments = {"path": "a.mp4", "fps": 25, "width": W, "height": H} | kwargs
    arguments["path"] = tmp_path / str(arguments["path"])
    with pytest.raises(VideoError, match=message), VideoWriter(**arguments) as writer:  # type: ignore[arg-type]
        writer.write(np.zeros((writer.height, writer.width, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_writer_needs_its_block_and_its_folder(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="with VideoWriter"):
        VideoWriter(tmp_path / "a.mp4", 25, W, H).write(picture())
    with pytest.raises(FileNotFoundError, match="create it first"), VideoWriter(tmp_path / "no" / "a.mp4", 25, W, H):
        pass


def test_readers_are_of_the_public_type() -> None:
    assert isinstance(open_video(np.zeros((1, 4, 4, 3), np.uint8)), VideoReader)

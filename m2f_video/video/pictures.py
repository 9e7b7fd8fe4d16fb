"""Reading picture files with Pillow: upright and in RGB, one to a file or, where a file is a sequence, one by one.

`reader` is the public face of this; here is all that knows Pillow's ways of reading.
"""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from m2f_video.video.decode import MAX_PIXELS, VideoError, check_file, check_pixels

PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of files that are frames where they lie in a folder."""

OTHER_SUFFIXES = (
    ".arw", ".cr2", ".cr3", ".dds", ".dng", ".dpx", ".exr", ".fits", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".nef",
    ".orf", ".pcx", ".pfm", ".psd", ".qoi", ".raf", ".rw2", ".sgi", ".tga",
)  # fmt: skip
"""Of pictures that are not read: frames in a folder must not be left out silently."""

# Pillow knows more and goes by the content: PostScript, whatever the file is called, has another program run.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_SEQUENCES = ("TIFF", "WEBP")
# What Pillow raises for damaged files, OSError and SyntaxError being the usual ones.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, OverflowError, LookupError, TypeError, AttributeError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip


def image_size(file: Path) -> tuple[int, int]:
    """(H, W) of an image file, from its header only.

    Raises:
        VideoError: it cannot be read, has too many pixels, or is a sequence.
    """
    with _opened(file) as image:
        return _size(image)


def read_image(file: Path) -> np.ndarray:
    """An image file as uint8 RGB (H, W, 3), upright.

    Raises:
        VideoError: it cannot be read, has too many pixels or more than 8 bits a channel, or is a sequence.
    """
    with _opened(file) as image:
        return _pixels(image, str(file))


def is_sequence(path: str) -> bool:
    """Whether a file is a sequence of pictures that Pillow reads and FFmpeg does not: WebP, or pages of a TIFF."""
    from PIL import Image

    check_file(path)
    try:
        with Image.open(path, formats=_SEQUENCES) as image:
            return image.format == "WEBP" or getattr(image, "n_frames", 1) > 1
    except Image.DecompressionBombError:
        return True  # reading it says so
    except _DAMAGED:
        return False


def sequence_shape(path: str, frames: slice) -> tuple[int, tuple[int, int], Fraction | None]:
    """Number of pictures in a sequence, (H, W) of the first selected and how many a second; None where it says nothing.

    Raises:
        VideoError: the file or that picture cannot be read.
    """
    with _opened(path, _SEQUENCES) as image:
        count = image.n_frames
        image.seek(next(iter(range(count)[frames]), 0))
        milliseconds = _milliseconds(path) if image.format == "WEBP" else 0
        return count, _size(image), Fraction(1000 * count, milliseconds) if milliseconds else None


def read_sequence(path: str, indices: Iterable[int]) -> Iterator[np.ndarray]:
    """The pictures of a sequence one by one, uint8 RGB (H, W, 3), upright.

    Raises:
        VideoError: the next one cannot be read, or has more than 8 bits a channel.
    """
    with _opened(path, _SEQUENCES) as image:
        for index in indices:
            image.seek(index)
            yield _pixels(image, path)


@contextlib.contextmanager
def _opened(path: str | Path, sequences: tuple[str, ...] = ()) -> Iterator[Any]:
    """Open a picture, or a sequence in one of these formats."""
    from PIL import Image, UnidentifiedImageError

    check_file(str(path))
    try:
        with Image.open(path, formats=sequences or _FORMATS) as image:
            # A stereo camera's JPEG holds a second view, which is no second frame.
            if not sequences and getattr(image, "is_animated", False) and image.format != "MPO":
                raise VideoError(
                    f"{path}: it holds several pictures, and in a folder of frames each file is one; split it"
                )
            yield image
    except VideoError:
        raise
    except UnidentifiedImageError as error:
        raise VideoError(f"{path}: cannot read the frame: it is no picture, damaged, or of a kind not read") from error
    except Image.DecompressionBombError as error:
        raise VideoError(
            f"{path}: its picture has more than {MAX_PIXELS:,} pixels; such are not read, scale it down first"
        ) from error
    except _DAMAGED as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise VideoError(f"{path}: cannot read the frame: {text!s:.150}") from error


def _milliseconds(path: str) -> int:
    """How long an animated WebP is: the durations in its ANMF chunks (RFC 9649, section 2.7.1.1), without decoding."""
    milliseconds = 0
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(24)) == 24:
            kind, size = struct.unpack("<4sI", head[:8])
            if kind == b"ANMF":
                milliseconds += int.from_bytes(head[20:23], "little")
            file.seek(size + size % 2 - 16, os.SEEK_CUR)
    return milliseconds


def _size(image: Any) -> tuple[int, int]:
    """(H, W) upright, before the pixels are read."""
    _check_pixels(image, image.filename)
    # Pillow turns TIFF by itself.
    lying = image.format != "TIFF" and _orientation(image) in {5, 6, 7, 8}
    return (image.width, image.height) if lying else (image.height, image.width)


def _pixels(image: Any, name: str) -> np.ndarray:
    from PIL.Image import Transpose

    _check_pixels(image, name)
    if image.mode.startswith(("I", "F")):
        raise VideoError(f"{name}: the frame has pixel type {image.mode}; convert it to 8 bits a channel")
    image.load()
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image if turn is None else image.transpose(turn))


def _check_pixels(image: Any, name: str) -> None:
    # Of a WebP its decoder and Pillow keep five copies.
    most = MAX_PIXELS // 2 if image.format == "WEBP" else MAX_PIXELS
    check_pixels(f"{name}: its picture", image.height, image.width, most)


def _orientation(image: Any) -> int:
    """The orientation by EXIF, from 1 to 8; 1, upright, where EXIF is damaged."""
    with contextlib.suppress(*_DAMAGED):
        return int(image.getexif().get(0x0112, 1))
    return 1


def frame_files(folder: Path) -> list[Path]:
    """The frames in a folder, in natural order.

    Raises:
        VideoError: there are none, or which pictures are frames cannot be told.
    """
    files: list[Path] = []
    other: list[Path] = []
    stems: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (_natural_order(path.name), path.name)):
        suffix = path.suffix.lower()
        if path.name[0] == "." or suffix not in (*PICTURE_SUFFIXES, *OTHER_SUFFIXES):
            continue
        (files if suffix in PICTURE_SUFFIXES else other).append(path)
        if (twin := stems.setdefault(path.stem, path)) is not path:
            raise VideoError(
                f"{folder}: {twin.name} and {path.name} cannot be told to be one frame (a mask beside its image?) or "
                "two; leave one picture a frame in the folder"
            )
    if other:
        raise VideoError(
            f"{folder}: {other[0].name} is a picture of a kind that is not read ({len(other)} such files); convert "
            "it to png or jpg, or take it out of the folder"
        )
    if not files:
        raise VideoError(f"{folder}: the folder holds no frames ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return files


def _natural_order(name: str) -> list[str | int]:
    """Sort key that puts frame 9 before frame 10."""
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"([0-9]+)", name))]

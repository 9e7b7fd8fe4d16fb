"""Tensors of a video's frames, in host memory and beyond a limit in a temporary file."""

import os
import tempfile
from collections.abc import Sequence
from io import FileIO
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor


class FrameStore:
    """Keeps the same tensors of each frame, and reads those of any.

    The file is in the folder for temporary files, which `TMPDIR` names, and goes when the store is closed, also by an
    error, or its process ends. It is mapped to be read, and written by writing: on a full disk that is an error, where
    a write through a mapping would end the process.

    Args:
        memory: bytes to keep in memory.
        spills: whether later frames go to the file; otherwise they are not kept.
    """

    def __init__(self, memory: int, spills: bool = True) -> None:
        self._room, self._spills = memory, spills
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []  # of the tensors of a frame
        self._in_memory: list[list[Tensor]] = []
        self._file: FileIO | None = None
        self._in_file = 0
        self.frame_bytes = 0
        """Of each frame, wherever it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        """Frames that are kept."""
        return len(self._in_memory) + self._in_file

    def append(self, parts: Sequence[Tensor]) -> bool:
        """Keep tensors of the next frame, from any device.

        Returns:
            Whether they are kept. Where they are not, those of later frames are not either.

        Raises:
            ValueError: their sizes or types are not those of the frames before.
            OSError: the disk is full.
        """
        kinds = [(part.shape, part.dtype) for part in parts]
        self._kinds = self._kinds or kinds
        if kinds != self._kinds:
            raise ValueError(f"features of all frames must be of one size, got {self._kinds} and then {kinds}")
        self.frame_bytes = sum(part.nbytes for part in parts)
        if self._room >= self.frame_bytes:
            self._room -= self.frame_bytes
            self._in_memory.append([part.contiguous().to("cpu", copy=True) for part in parts])
            return True
        self._room = 0
        if not self._spills:
            return False
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="m2f-video-", buffering=0)  # noqa: SIM115  # until closed
        for part in parts:
            self._write(self._file, part.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        self._in_file += 1
        return True

    def read(self, frame: int, part: int) -> Tensor:
        """One of the tensors of a frame that is kept, contiguous, on the CPU."""
        if frame < len(self._in_memory) or self._file is None:
            return self._in_memory[frame][part]
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in self._kinds]
        start = (frame - len(self._in_memory)) * self.frame_bytes + sum(sizes[:part])
        mapped = np.memmap(self._file, np.uint8, "r", start, (sizes[part],))
        shape, dtype = self._kinds[part]
        return torch.from_numpy(np.array(mapped)).view(dtype).view(shape)

    def close(self) -> None:
        """Forget everything, and remove the file."""
        self._in_memory.clear()
        if self._file is not None:
            self._file.close()

    def _write(self, file: FileIO, data: memoryview) -> None:
        try:
            file.seek(0, os.SEEK_END)  # mapping moves it
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: the features of a frame take {self.frame_bytes / 1e6:.1f} MB in the folder for "
                f"temporary files, and those of {self._in_file} are there; let TMPDIR name a folder with more room, or "
                "take mode='window', which keeps none",
                tempfile.gettempdir(),
            ) from error

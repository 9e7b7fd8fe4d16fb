"""Files of torch.save, new and old, read without torch.load: by the unpickler of plain pickles and its allow-list.

A new one is a zip file with a pickle that names records of raw bytes; an old one is a row of pickles with the bytes
after them.
"""

import errno
import io
import os
import re
import sys
import zipfile
import zlib
from typing import IO, BinaryIO

import torch

from weights_convert.bounds import check_regular
from weights_convert.errors import CheckpointError, naming
from weights_convert.pickles import BROKEN_PICKLE, PickledStorage, load_pickle

LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number torch.save wrote before its zip files
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK = 1 << 24  # bytes


def read_torch_file(path: str | os.PathLike[str]) -> object:
    """Read a file of torch.save safely: tensors on the CPU, arrays, numbers, texts and containers of them.

    Nothing in the file is executed, its checksums are checked, and it cannot claim more than it holds: neither memory
    nor time.

    Args:
        path: The file.

    Returns:
        What was saved: tensors without gradients; a `weights_convert.pickles.PickledTensor` for a numpy array, and an
        `UnreadTensor` for a tensor that is no dense one. Every kind of dictionary is a dict.

    Raises:
        CheckpointError: If it is no such file, damaged, or holds anything else; the message names the file.
        MemoryError: If its content does not fit.
        OSError: If the system does not let it be read.
    """
    check_regular(path)
    with open(path, "rb") as file, naming(path):
        return read_torch(file)


def read_torch(file: BinaryIO) -> object:
    """Like `read_torch_file`, from its beginning; errors do not name the file."""
    try:
        return _read_zip(file) if file.read(2) == b"PK" else _read_legacy(file)
    except CheckpointError:
        raise
    except (*BROKEN_PICKLE, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"it is a damaged torch file ({error!s:.80}); fetch it again") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning, as a damaged directory names one
            raise
        raise CheckpointError("it is a damaged torch file; fetch it again") from error


def load_torch_storage(data: bytes) -> PickledStorage:
    """Read the content of a tensor within a plain pickle, which is an old torch file of its own."""
    storage = _read_legacy(io.BytesIO(data))
    if not isinstance(storage, PickledStorage):
        raise CheckpointError("it holds a torch storage that is none; the file is damaged")
    return storage


def _read_zip(file: BinaryIO) -> object:
    size = file.seek(0, os.SEEK_END)
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
        raise CheckpointError("its entries are compressed, as PyTorch never writes them; unpack it and use `zip -r0`")
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise CheckpointError("its entries claim more bytes than the file holds; fetch it again")
    pickles = [name for name in entries if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(pickles) != 1:
        raise CheckpointError("it is a zip file, but none of torch.save; give a file with weights")
    folder = pickles[0].removesuffix("data.pkl")

    def opened(name: str, size: int) -> IO[bytes]:
        entry = entries.get(folder + name)
        if entry is None or entry.file_size != size:
            raise CheckpointError("it names content that it does not hold; the file is damaged")
        if getattr(entry, "CRC", None) == 0:  # PyTorch can leave the checksums out
            del entry.CRC
        return archive.open(entry)

    if folder + "byteorder" in entries:
        with opened("byteorder", len(sys.byteorder)) as record:
            _check_byte_order(record.read() == sys.byteorder.encode())
    storages: dict[str, PickledStorage] = {}

    def find(dtype: torch.dtype, key: str, count: int) -> PickledStorage:
        if key not in storages:
            with opened(f"data/{key}", count * dtype.itemsize) as record:
                storages[key] = PickledStorage(dtype, count)
                _fill(storages[key], record)
        return _same(storages[key], dtype, count)

    with opened("data.pkl", entries[pickles[0]].file_size) as record:
        content = record.read()
    return load_pickle(io.BytesIO(content), len(content), find)


def _read_legacy(file: BinaryIO) -> object:
    size = left = file.seek(0, os.SEEK_END)
    file.seek(0)
    storages: dict[str, PickledStorage] = {}

    def find(dtype: torch.dtype, key: str, count: int) -> PickledStorage:
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:
                raise CheckpointError("it names content that it does not hold; the file is damaged")
            storages[key] = PickledStorage(dtype, count)
        return _same(storages[key], dtype, count)

    magic, _version, system = (load_pickle(file, size) for _ in range(3))
    if magic != _LEGACY_MAGIC or not isinstance(system, dict):
        raise CheckpointError("it is no file of torch.save; give a file with weights")
    _check_byte_order(bool(system.get("little_endian")) == (sys.byteorder == "little"))
    content = load_pickle(file, size, find)
    keys = load_pickle(file, size)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != storages.keys():
        raise CheckpointError("it names content that it does not hold; the file is damaged")
    for key in keys:
        storage = storages[key]
        if int.from_bytes(file.read(8), sys.byteorder) * storage.dtype.itemsize != len(storage.data):
            raise CheckpointError("it names content that it does not hold; the file is damaged")
        _fill(storage, file)
    return content


def _fill(storage: PickledStorage, file: IO[bytes]) -> None:
    """Read the bytes of a storage from where the file is."""
    left = memoryview(storage.data)  # type: ignore[arg-type]
    while left:
        count = file.readinto(left[:_CHUNK])  # type: ignore[attr-defined]  # both kinds of files have it
        if not count:
            raise EOFError("it ends too early")
        left = left[count:]


def _same(storage: PickledStorage, dtype: torch.dtype, count: int) -> PickledStorage:
    if storage.dtype != dtype or len(storage.data) != count * dtype.itemsize:
        raise CheckpointError("it names the same content as different things; the file is damaged")
    return storage


def _check_byte_order(is_ours: bool) -> None:
    if not is_ours:
        raise CheckpointError("a machine of another byte order wrote it; have it saved as safetensors")

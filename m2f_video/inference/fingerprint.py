"""What a result is made from: the model, the options and the video, so that what is on disk can be told to be of these.

All are made of what JSON takes, and can be compared with what was read from a file.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from m2f_video.inference.clip_model import ClipModel
from m2f_video.video.pictures import frame_files
from m2f_video.video.reader import VideoNotFoundError


def model_fingerprint(model: ClipModel) -> str:
    """A digest of a model's config, and of its weights as they are: in their dtype, on whatever device.

    One that is no module says it itself, by its `fingerprint`.

    Raises:
        TypeError: it has no weights to tell it by.
    """
    if not isinstance(model, torch.nn.Module):
        if known := getattr(model, "fingerprint", ""):
            return str(known)
        raise TypeError(
            f"{type(model).__name__} has no state_dict and no fingerprint, by which a result could be told to be of it"
        )
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_fingerprint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Of a video file its absolute path, size and time of change; of a folder of frames those of all of its frames.

    The content is not read: what has these is taken to be the same.

    Raises:
        FileNotFoundError: there is no such path (it is a `VideoError` too).
        VideoError: it is a folder that holds no frames.
        OSError: it cannot be looked at.
    """
    found = Path(path)
    if not os.path.exists(found):  # nor can there be, of a name that is too long
        raise VideoNotFoundError(f"{found}: there is no such video file or folder of frames")
    status = found.stat()
    where = {"path": str(found.absolute())}
    if not found.is_dir():
        return where | {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    frames = [(file.name, file.stat()) for file in frame_files(found)]
    listing = repr([(name, frame.st_size, frame.st_mtime_ns) for name, frame in frames])
    return where | {
        "bytes": sum(frame.st_size for _, frame in frames),
        "modified_ns": max(frame.st_mtime_ns for _, frame in frames),
        "frames": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
    }


def options_fingerprint(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they go into a file; those that JSON does not know, such as a linker of one's own, by their fields.

    What has no fields goes by its `repr`, which has to be the same in another process.
    """
    return {name: _plain(value) for name, value in options.items()}


def differences(found: Mapping[str, Any], made_from: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words: names, with both values where these are short."""
    texts = []
    for name in dict.fromkeys((*made_from, *found)):
        was, now = found.get(name), made_from.get(name)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            inside = f"{name}." if "type" in was else ""  # of an object such as a linker
            texts += [inside + text for text in differences(was, now)]
        else:
            both = f"{was!s} and not {now!s}"
            texts.append(f"{name} ({both})" if len(both) <= 60 else str(name))
    return texts


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return {"type": type(value).__qualname__} | {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return value if value is None or is_number or isinstance(value, str) else repr(value)

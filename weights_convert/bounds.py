"""Bounds on what strangers' files are and hold, looked at before anything blocks on them or walks over them."""

import os

from weights_convert.errors import CheckpointError

MAX_VALUES = 3_000_000  # the weights, averages and optimizer of a large model take 300,000
TOO_LARGE = "it nests too deeply, or holds too many values; do not trust this file"
_DEEPEST = 50


def all_values(content: object) -> list[object]:
    """Give a value and all that are inside of it, level by level, one that is there several times as often.

    Raises:
        CheckpointError: If containers nest more than 50 deep, as one within itself does, or there are more than
            `MAX_VALUES`.
    """
    values, level = [content], [content]
    for _ in range(_DEEPEST):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list | tuple):
                inner.extend(value)
            if len(values) + len(inner) > MAX_VALUES:
                raise CheckpointError(TOO_LARGE)
        if not inner:
            return values
        values += inner
        level = inner
    raise CheckpointError(TOO_LARGE)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse pipes and devices, whose reading may block for ever.

    Raises:
        CheckpointError: If the path is there and no regular file; the message names it.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        special = "a pipe, socket or device" if os.path.exists(path) else "a link to nothing"
        kind = "a folder" if os.path.isdir(path) else special
        raise CheckpointError(f"{path} is {kind}, not a regular file; give a file, or copy its content to one")

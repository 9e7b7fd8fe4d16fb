"""Bounds on what a stranger's file holds, looked at before anything recursive meets it."""

from collections.abc import Iterator

from weights_convert.errors import CheckpointError

MAX_VALUES = 3_000_000  # the weights, averages and optimizer of a large model take 300,000
TOO_LARGE = "it nests too deeply, or holds too many values; do not trust this file"


def all_values(content: object, deepest: int = 50) -> Iterator[object]:
    """Give a value and all that are inside of it, level by level, one that is there several times as often.

    Raises:
        CheckpointError: If containers nest deeper, as one within itself does, or there are more than `MAX_VALUES`.
    """
    level, left = [content], MAX_VALUES
    for _ in range(deepest):
        yield from level
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list | tuple):
                inner.extend(value)
            if len(inner) > left:
                raise CheckpointError(TOO_LARGE)
        if not inner:
            return
        level, left = inner, left - len(inner)
    raise CheckpointError(TOO_LARGE)

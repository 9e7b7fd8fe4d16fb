"""What goes wrong when checkpoints meet: every error names the thing and the remedy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_LENGTH = 280  # characters: with a program's name before it still a line that can be read


class ConversionError(ValueError):
    """Keys, tensors or config fields that cannot be translated; its message is one line that a terminal can show."""

    def __init__(self, message: str) -> None:
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(message.split()))
        if len(shown) > _LENGTH:  # what is wrong is at the beginning, and the remedy at the end
            shown = f"{shown[: _LENGTH - 80]} ... {shown[-75:]}"
        super().__init__(shown)


class CheckpointError(ConversionError):
    """A file or folder that is not a readable (or writable) checkpoint."""


@contextmanager
def naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error that says what is wrong say where: in which file, or in the weights of which source."""
    try:
        yield
    except ConversionError as error:
        name = str(source)  # of which the end says most
        raise type(error)(f"{name if len(name) <= 100 else f'...{name[-97:]}'}: {error}") from error

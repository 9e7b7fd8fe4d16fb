"""What goes wrong when checkpoints meet: every error names the thing and the remedy."""

_LENGTH = 280  # characters, so that a program's name before it and a path still make a line that can be read


class ConversionError(ValueError):
    """Keys, tensors or config fields that cannot be translated; its message is one line that a terminal can show."""

    def __init__(self, message: str) -> None:
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(message.split()))
        if len(shown) > _LENGTH:  # names and values are in the middle, the remedy is at the end
            shown = f"{shown[: _LENGTH // 2]} ... {shown[-(_LENGTH // 2 - 5) :]}"
        super().__init__(shown)


class CheckpointError(ConversionError):
    """A file or folder that is not a readable (or writable) checkpoint."""

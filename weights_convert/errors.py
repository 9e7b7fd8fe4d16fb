"""What goes wrong when checkpoints meet: every error names the thing and the remedy."""


class ConversionError(ValueError):
    """Keys, tensors or config fields that cannot be translated."""


class CheckpointError(ConversionError):
    """A file or folder that is not a readable (or writable) checkpoint."""

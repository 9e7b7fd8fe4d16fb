"""From a name, a folder or a file to a config and native weights; strict loading; the way back to a folder."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from m2f_video.config import MODEL_TYPE, ConfigError, VideoMask2FormerConfig
from weights_convert import (
    CheckpointError,
    ConversionError,
    native_config_from_hf,
    read_checkpoint,
    read_config,
    to_native,
)

ConfigSource = VideoMask2FormerConfig | str | os.PathLike[str]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
CONFIG_NAME = "config.json"
DEMO_NAME = "demo"
"""Names the small trained model that is part of the package, wherever a checkpoint is asked for."""
DEMO_FOLDER = Path(__file__).parent / "demo_model"
_CONFIG_FILES = [CONFIG_NAME, "preprocessor_config.json"]
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype a model can have, by name or itself.

    Raises:
        ValueError: any other; the message lists them.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {str(dtype)!r}; choose one of {', '.join(DTYPES)}")
    return found


def parse_device(device: torch.device | str) -> torch.device:
    """A device that is there, by name or itself.

    Raises:
        ValueError: not a device, or none of its kind on this machine.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {str(device)!r}; use for example 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    if parsed.type == "meta":
        raise ValueError("device 'meta' holds no numbers; use for example 'cpu' or 'cuda'")
    try:
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not available here: {reason}") from error
    return parsed


def load_config(
    source: str | os.PathLike[str],
    *,
    config: ConfigSource | None = None,
    temporal: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> VideoMask2FormerConfig:
    """The config of a checkpoint, without its weights; arguments and errors as `VideoMask2Former.from_pretrained`."""
    if config is not None:
        return _with_temporal(resolve_config(config), temporal)
    path = _local_path(source)
    if not path.exists():
        hub_options = _hub_options(revision, token, cache_dir, local_files_only, force_download)
        path = _download(str(source), _CONFIG_FILES, hub_options)
    return _read_config_file((path.parent if path.is_file() else path) / CONFIG_NAME, temporal)


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    config: ConfigSource | None = None,
    temporal: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> tuple[VideoMask2FormerConfig, dict[str, Tensor]]:
    """Config and native weights of a checkpoint; arguments and errors as `VideoMask2Former.from_pretrained`."""
    path = weights_path(source, _hub_options(revision, token, cache_dir, local_files_only, force_download))
    model_config = load_config(path, config=config, temporal=temporal)
    checkpoint = read_checkpoint(path)
    return model_config, to_native(checkpoint.state_dict, checkpoint.format)


def _local_path(source: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is, unless it is on the hub."""
    return DEMO_FOLDER if source == DEMO_NAME else Path(source)


def weights_path(source: str | os.PathLike[str], hub_options: dict[str, Any]) -> Path:
    """The file or folder that holds a checkpoint's weights, downloaded where it is on the hub."""
    path = _local_path(source)
    if not path.exists():
        path = _download(str(source), _CONFIG_FILES + _SAFETENSORS, hub_options)
        if not any(path.glob("model*.safetensors")):  # older repositories hold a pickle only
            path = _download(str(source), _CONFIG_FILES + _PICKLES, hub_options)
    return path


def load_state_dict_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load weights that must match the model key by key and shape by shape.

    Raises:
        weights_convert.ConversionError: a key is missing, left over, of another shape or not floating point; the
            message names it.
    """
    if problems := misfits(model.state_dict(), state_dict):
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        if all(key.startswith("backbone.") for key in state_dict):
            raise ConversionError(
                f"{source} holds the weights of a backbone only: begin a training with them by train --init-backbone, "
                "or load them into a built model with m2f_video.load_backbone(model, source)"
            )
        raise ConversionError(
            f"the weights of {source} do not fit its config: {'; '.join(problems[:3])}{more}. "
            "Give the config they were trained with."
        )
    model.load_state_dict(state_dict)


def misfits(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from being one with the expected keys, shapes and kinds of numbers."""
    problems = [f"missing {key} {tuple(expected[key].shape)}" for key in expected if key not in state_dict]
    problems += [f"unexpected {key} {tuple(state_dict[key].shape)}" for key in state_dict if key not in expected]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)}, the config makes it {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    problems += [
        f"{key} is {tensor.dtype}, not floating point"
        for key, tensor in state_dict.items()
        if key in expected and expected[key].is_floating_point() and not tensor.is_floating_point()
    ]
    return problems


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder of the same name, whose files replace those of `folder` when the block ends well.

    A model card (`README.md`) that is there already is kept. After an exception `folder` is as it was before.

    Raises:
        weights_convert.CheckpointError: the files cannot be written.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            staging = Path(temporary) / folder.name
            yield staging
            for file in sorted(staging.iterdir()):
                if file.name != "README.md" or not (folder / file.name).exists():
                    file.replace(folder / file.name)
    except BaseException as error:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError | CheckpointError):  # which name the temporary folder
            raise CheckpointError(f"{folder} cannot be written: {error.__cause__ or error}") from error
        raise


def resolve_config(config: ConfigSource) -> VideoMask2FormerConfig:
    """A config itself, or the one that a config file or the name of a preset stands for.

    Raises:
        FileNotFoundError: a path where there is no file.
        ConfigError: a file that holds no valid config, or a name that is no preset.
    """
    if isinstance(config, VideoMask2FormerConfig):
        return config
    path = Path(config)
    if path.exists():
        return _read_config_file(path / CONFIG_NAME if path.is_dir() else path, temporal=None)
    if path.suffix == ".json" or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no config file {path}")
    return VideoMask2FormerConfig.preset(str(config))


def _read_config_file(path: Path, temporal: str | None) -> VideoMask2FormerConfig:
    """Read a native or transformers config file."""
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist, and the weights need a config: give a preset such as 'swin_tiny_youtubevis_2019', "
            "or a config file"
        )
    data, preprocessor = read_config(path)
    try:
        if data.get("model_type") == MODEL_TYPE:
            return _with_temporal(VideoMask2FormerConfig.from_dict(data), temporal)
        return VideoMask2FormerConfig.from_dict(native_config_from_hf(data, preprocessor, temporal))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _with_temporal(config: VideoMask2FormerConfig, temporal: str | None) -> VideoMask2FormerConfig:
    return config if temporal is None else config.replace(temporal=temporal)


def _hub_options(
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    force_download: bool,
) -> dict[str, Any]:
    return {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }


def _download(name: str, patterns: list[str], hub_options: dict[str, Any]) -> Path:
    """Fetch the files of a hub repository that match, and give their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the client library's
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    not_a_name = f"{name} does not exist, and is not a hub name (owner/name) either"
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(not_a_name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub_options))
    except HFValidationError as error:
        raise FileNotFoundError(not_a_name) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a local path nor in the hub cache, and the hub was not reached"
        ) from error
    except HTTPError as error:  # the hub's answer, or a connection that broke off
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{name} is not a local path, and the hub does not give it: {reason}") from error

"""From a name, a folder or a file to a config and native weights; strict loading; the way back to a folder."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from m2f_video.checked_config import ConfigError, shown
from m2f_video.config import MODEL_TYPE, VideoMask2FormerConfig
from m2f_video.files import check_regular, check_replaceable, made_directory, temporary_folder
from weights_convert import (
    CheckpointError,
    ConversionError,
    native_config_from_hf,
    read_checkpoint,
    read_config,
    to_native,
)

ConfigSource = VideoMask2FormerConfig | str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
CONFIG_NAME = "config.json"
DEMO_NAME = "demo"
"""Names the small trained model that is part of the package, wherever a checkpoint is asked for."""
DEMO_FOLDER = Path(__file__).parent / "demo_model"
PREPROCESSOR_NAME = "preprocessor_config.json"
_CONFIG_FILES = [CONFIG_NAME, PREPROCESSOR_NAME]
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_ACTS_IN_TRAINING = frozenset({"backbone.drop_path_rate", "pixel_decoder.dropout"})


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype a model can have, by name or itself.

    Raises:
        ValueError: any other; the message lists them.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {shown(str(dtype))}; choose one of {', '.join(DTYPES)}")
    return found


def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Say where a dtype is slower than the one it is to replace: no CPU's kernels here multiply in float16."""
    if dtype == torch.float16 and device.type == "cpu":
        warnings.warn(
            "on a CPU float16 takes several times as long as float32, and bfloat16 no longer; take one of these",
            stacklevel=3,
        )


def parse_device(device: torch.device | str) -> torch.device:
    """A device that is there, by name or itself.

    Raises:
        ValueError: not a device, or none of its kind on this machine.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {shown(str(device))}; use for example 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from error
    if parsed.type == "meta":
        raise ValueError("device 'meta' holds no numbers; use for example 'cpu' or 'cuda'")
    try:
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {shown(str(device))} is not available here: {reason:.150}") from error
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
        return resolve_config(config, temporal)
    path = _local_path(source)
    if not _exists(path):
        hub_options = _hub_options(revision, token, cache_dir, local_files_only, force_download)
        path = _download(str(source), _CONFIG_FILES, hub_options)
    return _read_config_file(_config_beside(path), temporal)


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
    """Config and native weights of a checkpoint; arguments and errors as `VideoMask2Former.from_pretrained`.

    Warns where `config` or `temporal` let the weights compute something else than the checkpoint's own config.
    """
    path = weights_path(source, _hub_options(revision, token, cache_dir, local_files_only, force_download))
    model_config = load_config(path, config=config, temporal=temporal)
    checkpoint = read_checkpoint(path)
    if (config is not None or temporal is not None) and _config_beside(path).exists():
        _warn_of_another_config(path, str(source), model_config)
    return model_config, to_native(checkpoint.state_dict, checkpoint.format)


def _warn_of_another_config(path: Path, source: str, used: VideoMask2FormerConfig) -> None:
    try:
        own = _read_config_file(_config_beside(path), temporal=None)
    except (ConfigError, ConversionError) as error:
        warnings.warn(f"whether {source:.80} computes what it was made for is not known: {error!s:.150}", stacklevel=4)
        return
    if changed := other_function(own, used):
        warnings.warn(
            f"{source:.80} is used with another config than its own, as asked: {in_words(changed)}", stacklevel=4
        )


def other_function(own: VideoMask2FormerConfig, used: VideoMask2FormerConfig) -> dict[str, tuple[Any, Any]]:
    """Fields by which weights compute something else, whatever their shapes: a checkpoint's own value and the used."""
    return {name: both for name, both in own.differences(used).items() if name not in _ACTS_IN_TRAINING}


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The first of the fields that differ, with both values."""
    first = [f"{name} is {shown(used)} (its own: {shown(own)})" for name, (own, used) in changed.items()][:2]
    return f"{'; '.join(first)}{f'; and {len(changed) - 2} more' if len(changed) > 2 else ''}"[:180]


def _local_path(source: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is, unless it is on the hub."""
    return DEMO_FOLDER if source == DEMO_NAME else Path(source)


def weights_path(source: str | os.PathLike[str], hub_options: dict[str, Any]) -> Path:
    """The file or folder that holds a checkpoint's weights, downloaded where it is on the hub."""
    path = _local_path(source)
    if not _exists(path):
        path = _download(str(source), _CONFIG_FILES + _SAFETENSORS, hub_options)
        if not any(path.glob("model*.safetensors")):  # older repositories hold a pickle only
            path = _download(str(source), _CONFIG_FILES + _PICKLES, hub_options)
    return path


def _exists(path: Path) -> bool:
    """Whether there is a file or folder; what cannot be the name of one, for its length or a NUL, is none."""
    try:
        return path.exists()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def _config_beside(path: Path) -> Path:
    """Where the config of a checkpoint, folder or file, is."""
    return (path if path.is_dir() else path.parent) / CONFIG_NAME


def build_with_weights(build: Callable[[], Model], state_dict: Mapping[str, Tensor], source: str) -> Model:
    """Build a model and load weights that must match it key by key and shape by shape.

    It is built without numbers first, so that a config which asks for other weights than these takes no memory.

    Args:
        build: makes the model.
        state_dict: its weights; they are copied.
        source: where they are from.

    Raises:
        weights_convert.ConversionError: as `load_state_dict_strictly`.
    """
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (RuntimeError, TypeError):  # it reads numbers while it is built; what is wrong with it comes up again below
        expected = None
    if expected is not None:
        _check_fit(expected, state_dict, source)
    model = build()
    load_state_dict_strictly(model, state_dict, source)
    return model


def load_state_dict_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load weights that must match the model key by key and shape by shape.

    Raises:
        weights_convert.ConversionError: a key is missing, left over, of another shape or not floating point; the
            message names it.
    """
    _check_fit(model.state_dict(), state_dict, source)
    model.load_state_dict(state_dict)


def _check_fit(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], source: str) -> None:
    if problems := misfits(expected, state_dict):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        if all(key.startswith("backbone.") for key in state_dict):
            raise ConversionError(
                f"{source:.80} holds the weights of a backbone only: begin a training with them by train "
                "--init-backbone, or load them into a built model with m2f_video.load_backbone(model, source)"
            )
        raise ConversionError(
            f"the weights of {source:.80} do not fit its config: {problems[0]:.130}{more}. "
            "Give the config they were trained with."
        )


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
    folder = folder.absolute()
    with made_directory(folder):
        try:
            with temporary_folder(folder / folder.name) as temporary:
                staging = temporary / folder.name
                yield staging
                files = sorted(staging.iterdir())
                for file in files:
                    check_replaceable(folder / file.name)
                for file in files:
                    if file.name != "README.md" or not (folder / file.name).exists():
                        file.replace(folder / file.name)
        except (OSError, CheckpointError) as error:  # which name the temporary folder
            raise CheckpointError(f"{folder} cannot be written: {error.__cause__ or error}") from error


def resolve_config(config: ConfigSource, temporal: str | None = None) -> VideoMask2FormerConfig:
    """A config itself, or the one that a config file or the name of a preset stands for.

    Args:
        config: any of them.
        temporal: in place of the config's own; None keeps that.

    Raises:
        FileNotFoundError: a path where there is no file.
        ConfigError: a file that holds no valid config, or a name that is no preset.
    """
    if isinstance(config, VideoMask2FormerConfig):
        return _with_temporal(config, temporal)
    path = Path(config)
    if _exists(path):
        return _read_config_file(path / CONFIG_NAME if path.is_dir() else path, temporal)
    if path.suffix == ".json" or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no config file {path!s:.200}")
    return _with_temporal(VideoMask2FormerConfig.preset(str(config)), temporal)


def _read_config_file(path: Path, temporal: str | None) -> VideoMask2FormerConfig:
    """Read a native or transformers config file."""
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist, and the weights need a config: give a preset such as 'swin_tiny_youtubevis_2019', "
            "or a config file"
        )
    for file in (path, path.parent / PREPROCESSOR_NAME):
        check_regular(file)
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

    not_a_name = f"{name:.100} does not exist, and is not a hub name (owner/name) either"
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(not_a_name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub_options))
    except HFValidationError as error:
        raise FileNotFoundError(not_a_name) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name:.100} is neither a local path nor in the hub cache, and the hub was not reached"
        ) from error
    except HTTPError as error:  # the hub's answer, or a connection that broke off
        reason = " ".join(word for word in str(error).split() if "://" not in word)  # addresses push out what to do
        raise FileNotFoundError(
            f"{name:.60} is not a local path, and the hub does not give it: {reason:.180}"
        ) from error

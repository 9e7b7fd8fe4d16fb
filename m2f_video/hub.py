"""From a name, a folder or a file to a config and native weights; strict loading; the way back to a folder."""

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from m2f_video.checked_config import ConfigError, shown
from m2f_video.config import MODEL_TYPE, VideoMask2FormerConfig
from weights_convert import (
    ConversionError,
    naming,
    native_config_from_hf,
    read_config,
    read_state_dict,
    to_native,
)

ConfigSource = VideoMask2FormerConfig | str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)


class HubOptions(TypedDict, total=False):
    """How to fetch what is on the hub; `VideoMask2Former.from_pretrained` says what each does."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    force_download: bool


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
_ACTS_IN_TRAINING = frozenset(
    {"backbone.drop_path_rate", "pixel_decoder.dropout", "transformer_decoder.dropout", "parts.loss", "parts.matcher"}
)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype a model can have, by name or itself.

    Raises:
        ValueError: any other; the message lists them.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {shown(str(dtype))}; choose one of {', '.join(DTYPES)}")
    return found


def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device, stacklevel: int = 3) -> None:
    """Say where a dtype is slower than the one it is to replace: no CPU's kernels here multiply in float16."""
    if dtype == torch.float16 and device.type == "cpu":
        warnings.warn(
            "on a CPU float16 takes several times as long as float32, and bfloat16 no longer; take one of these",
            stacklevel=stacklevel,
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
    **hub_options: Unpack[HubOptions],
) -> VideoMask2FormerConfig:
    """The config of a checkpoint, without its weights; arguments and errors as `VideoMask2Former.from_pretrained`."""
    if config is None:
        path = _local_path(source)
        if not _exists(path):
            path = _download(str(source), _CONFIG_FILES, hub_options)
        config = _read_config_file(config_beside(path))
    found = resolve_config(config)
    return found if temporal is None else found.replace(temporal=temporal)


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    config: ConfigSource | None = None,
    temporal: str | None = None,
    **hub_options: Unpack[HubOptions],
) -> tuple[VideoMask2FormerConfig, dict[str, Tensor]]:
    """Config and native weights of a checkpoint; arguments and errors as `VideoMask2Former.from_pretrained`."""
    path = weights_path(source, hub_options)
    found = load_config(path, config=config, temporal=temporal)
    state_dict = read_state_dict(path)
    with naming(source):
        return found, to_native(state_dict)


def load_model(
    build: Callable[[VideoMask2FormerConfig], Model],
    source: str | os.PathLike[str],
    *,
    config: ConfigSource | None = None,
    temporal: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    check_first: bool = True,
    partially: Callable[[Any, Path, str], None] | None = None,
    **hub_options: Unpack[HubOptions],
) -> Model:
    """What `build` makes of a config, with weights; arguments and errors as `VideoMask2Former.from_pretrained`.

    It is built without numbers first, so that a config which asks for other weights than these takes no memory; not
    where `check_first` is False, for what keeps tensors of its own from one building to the next. Warns where `config`
    or `temporal` let the weights compute something else than the checkpoint's own config. Where `partially` is given,
    it loads the weights instead: into a model, from a path, by the name of the source.
    """
    target_dtype, target_device = parse_dtype(dtype or torch.float32), parse_device(device or "cpu")
    path = weights_path(source, hub_options)
    if partially:
        used = load_config(path, config=config, temporal=temporal)
        model = build(used)
        partially(model, path, str(source))
    else:
        used, state_dict = load_checkpoint(path, config=config, temporal=temporal)
        if check_first:  # what is suppressed, a model that reads numbers then raises
            with suppress(RuntimeError, TypeError), torch.device("meta"):
                check_fit(build(used).state_dict(), state_dict, str(source))
        model = build(used)
        load_state_dict_strictly(model, state_dict, str(source))
    model = model.to(device=target_device, dtype=target_dtype).eval()
    warn_of_slow_dtype(target_dtype, target_device, stacklevel=4)
    if not partially and (config is not None or temporal is not None):
        warn_of_other_function(config_beside(path), used, str(source), stacklevel=4)
    return model


def warn_of_other_function(
    file: Path, used: VideoMask2FormerConfig, source: str, *, of: tuple[str, ...] = ("",), stacklevel: int
) -> None:
    """Say where weights compute something else under a config than under the one beside them, if there is one.

    Args:
        file: where their own config would be.
        used: the config they are used with.
        source: where they are from.
        of: the fields that matter, by what their names begin with.
        stacklevel: of the caller's caller, as `warnings.warn` counts from here.
    """
    if not file.exists():
        return
    try:
        own = _read_config_file(file)
    except (ConfigError, ConversionError) as error:
        said = f"whether {source:.80} computes what it was made for is not known: {error!s:.150}"
    else:
        changed = {name: both for name, both in other_function(own, used).items() if name.startswith(of)}
        if not changed:
            return
        said = f"{source:.80} is used with another config than its own: {in_words(changed)}"
    warnings.warn(said, stacklevel=stacklevel)


def other_function(own: VideoMask2FormerConfig, used: VideoMask2FormerConfig) -> dict[str, tuple[Any, Any]]:
    """Fields by which the same weights compute, or name, something else: a checkpoint's own value and the used one."""
    found = own.differences(used).items()
    return {name: both for name, both in found if name not in _ACTS_IN_TRAINING and not _equal(*both)}


def _equal(own: Any, used: Any) -> bool:
    """Whether values are the same but for rounding to float32, as other programs store means."""
    if isinstance(own, list) and isinstance(used, list):
        return len(own) == len(used) and all(map(_equal, own, used))
    if isinstance(own, float) and isinstance(used, float):
        return math.isclose(own, used, rel_tol=1e-6)
    return bool(own == used)


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The first of the fields that differ, with both values."""
    first = [f"{name} is {shown(used)} (its own: {shown(own)})" for name, (own, used) in changed.items()][:2]
    return f"{'; '.join(first)}{f'; and {len(changed) - 2} more' if len(changed) > 2 else ''}"[:180]


def _local_path(source: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is, unless it is on the hub."""
    return DEMO_FOLDER if source == DEMO_NAME else Path(source)


def weights_path(source: str | os.PathLike[str], hub_options: HubOptions) -> Path:
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


def config_beside(path: Path) -> Path:
    """Where the config of a checkpoint, folder or file, is."""
    return (path if path.is_dir() else path.parent) / CONFIG_NAME


def load_state_dict_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load weights that must match the model key by key and shape by shape.

    Raises:
        weights_convert.ConversionError: a key is missing, left over, of another shape or not floating point; the
            message names it.
    """
    check_fit(model.state_dict(), state_dict, source)
    model.load_state_dict(state_dict)


def check_fit(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not those of a model's state dict, as `load_state_dict_strictly`."""
    if misfit := first_misfit(expected, state_dict):
        if all(key.startswith("backbone.") for key in state_dict):
            raise ConversionError(
                f"{source:.80} holds the weights of a backbone only: begin a training with them by train "
                "--init-backbone, or load them into a built model with m2f_video.load_backbone(model, source)"
            )
        raise ConversionError(
            f"the weights of {source:.80} do not fit its config: {misfit}. Give the config they were trained with, or "
            "partial=True (--init-partial)"
        )


def first_misfit(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> str | None:
    """What keeps a state dict from being one with the expected keys, shapes and kinds of numbers; None where nothing.

    Returns:
        The first, and how many more there are.
    """
    problems = [f"missing {key} {tuple(own.shape)}" for key, own in expected.items() if key not in state_dict]
    problems += [f"unexpected {key} {tuple(given.shape)}" for key, given in state_dict.items() if key not in expected]
    for key, own in expected.items():
        given = state_dict.get(key, own)
        if given.shape != own.shape:
            problems.append(f"{key} is {tuple(given.shape)}, the config makes it {tuple(own.shape)}")
        elif own.is_floating_point() and not given.is_floating_point():
            problems.append(f"{key} is {given.dtype}, not floating point")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]:.110}{more}" if problems else None


def resolve_config(config: ConfigSource) -> VideoMask2FormerConfig:
    """A config itself, or the one that a config file or the name of a preset stands for.

    Raises:
        FileNotFoundError: a path where there is no file.
        ConfigError: a file that holds no valid config, or a name that is no preset.
    """
    if isinstance(config, VideoMask2FormerConfig):
        return config
    path = Path(config)
    if _exists(path):
        return _read_config_file(path / CONFIG_NAME if path.is_dir() else path)
    if path.suffix == ".json" or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no config file {path!s:.200}")
    return VideoMask2FormerConfig.preset(str(config))


def _read_config_file(path: Path) -> VideoMask2FormerConfig:
    """Read a native or transformers config file."""
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist, and the weights need a config: give a preset such as 'swin_tiny_youtubevis_2019', "
            "or a config file"
        )
    data, preprocessor = read_config(path)
    try:
        is_native = data.get("model_type") == MODEL_TYPE
        return VideoMask2FormerConfig.from_dict(data if is_native else native_config_from_hf(data, preprocessor))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _download(name: str, patterns: list[str], hub_options: HubOptions) -> Path:
    """Fetch the files of a hub repository that match, and give their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the client library's
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    options: dict[str, Any] = {**hub_options}
    not_a_name = f"{name:.100} does not exist, and is not a hub name (owner/name) either"
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(not_a_name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
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

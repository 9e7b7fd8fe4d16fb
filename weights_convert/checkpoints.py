"""Checkpoint files and folders: read any known kind safely, write safetensors atomically."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from weights_convert.bounds import TOO_LARGE, all_values, check_regular
from weights_convert.convert import detect_format
from weights_convert.errors import CheckpointError, naming
from weights_convert.pickles import PickledTensor, UnreadTensor, load_pickle
from weights_convert.rules import StateDict
from weights_convert.staging import staged_folder
from weights_convert.torch_files import LEGACY, load_torch_storage, read_torch

Json = dict[str, Any]

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
_WEIGHTS = (WEIGHTS_NAME, WEIGHTS_NAME + ".index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_DETECTRON2_CONFIG = re.compile(rb"^(_BASE_|MODEL|SOLVER|DATASETS|DATALOADER|INPUT|TEST):", re.MULTILINE)  # in YAML
_LFS_POINTER = b"version https://git-lfs"
_MAX_JSON = 16 << 20  # bytes; the index of a large model is a tenth of it
_CHUNK = 1 << 22  # values looked at together
_MAX_FILE = 1 << 35  # bytes; ten times the largest model with its optimizer
_MAX_SHARING = 4  # times that the same memory may be claimed by tensors of several keys
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


@dataclass(frozen=True)
class Checkpoint:
    """What `read_checkpoint` found.

    Attributes:
        state_dict: Tensors by key, as named in the file.
        config: The content of config.json as it is, or None where there is none.
        preprocessor: The content of preprocessor_config.json, or None.
        format: The format of the keys, see `weights_convert.detect_format`.
    """

    state_dict: StateDict
    config: Json | None
    preprocessor: Json | None
    format: str


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read weights, and the configs beside them, from a folder or a file of any known kind.

    Nothing in the file is executed. The kind of a file is told from its content, not from its name.

    Args:
        path: A folder with model.safetensors or pytorch_model.bin (whole, or sharded with an index), or one file:
            safetensors, torch.save (new and old), or a plain pickle of arrays or tensors. State dicts under ``model``
            or ``state_dict`` are unwrapped.

    Returns:
        The checkpoint, on the CPU. A single file has no configs.

    Raises:
        CheckpointError: If the path is missing, the file damaged, unsafe or no checkpoint, or a weight is not finite.
        ConversionError: If the keys are of no known format.
    """
    path = Path(path)
    state_dict = read_state_dict(path)
    config, preprocessor = read_config(path / CONFIG_NAME) if (path / CONFIG_NAME).exists() else (None, None)
    with naming(path):
        return Checkpoint(state_dict, config, preprocessor, detect_format(state_dict))


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read weights alone, of any format, from whatever `read_checkpoint` takes, and as safely.

    Raises:
        CheckpointError: If the path is missing, the file damaged, unsafe or no checkpoint, or a weight is not finite.
    """
    path = Path(path)
    with _reading(path):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give a checkpoint file or folder")
        state_dict = _read_folder(path) if path.is_dir() else _read_file(path)
        with naming(path):
            _check_values(state_dict)
    return state_dict


def read_config(path: str | os.PathLike[str]) -> tuple[Json, Json | None]:
    """Read a config.json, native or foreign, and the preprocessor_config.json beside it if there is one.

    Raises:
        CheckpointError: If the file is missing or not a JSON object.
    """
    path = Path(path)
    beside = path.parent / PREPROCESSOR_NAME
    with _reading(path):
        return _read_json(path), _read_json(beside) if beside.exists() else None


def write_checkpoint(
    folder_or_file: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    config: Json | None = None,
    preprocessor: Json | None = None,
) -> None:
    """Write a checkpoint, all of it or nothing, as `weights_convert.staging.staged_folder` does.

    Args:
        folder_or_file: A file name ending in ``.safetensors`` for the weights alone; anything else is a folder.
        state_dict: Tensors by key; they may share memory, sit on any device and be non-contiguous.
        config: Written as config.json; a folder needs one.
        preprocessor: Written as preprocessor_config.json.

    Raises:
        CheckpointError: If a folder is given without a config, or the target cannot be written.
    """
    target = Path(folder_or_file)
    weights_only = target.suffix == ".safetensors"
    if not weights_only and config is None:
        raise CheckpointError(f"{target} is to be a folder, which needs a config; give one, or a .safetensors file")
    texts = {} if weights_only else {PREPROCESSOR_NAME: preprocessor, CONFIG_NAME: config}
    with staged_folder(target.parent if weights_only else target, named=target) as staging:
        for name, content in texts.items():
            if content is not None:
                (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        weights = staging / (target.name if weights_only else WEIGHTS_NAME)
        weights.touch()
        mode = weights.stat().st_mode  # save_file would leave it readable by its owner only
        copies = {
            key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, tensor in state_dict.items()
        }
        save_file(copies, weights, metadata={"format": "pt"})
        weights.chmod(mode)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let the system's and the memory's errors say in one line which file cannot be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise CheckpointError(f"{path} does not fit into memory; free some, or use a larger machine") from error


def _read_json(path: Path) -> Json:
    """Parse a JSON object from a stranger: of bounded size and depth, and with numbers of 64 bits."""
    check_regular(path)
    with path.open("rb") as file, naming(path):
        text = file.read(_MAX_JSON + 1)
        if len(text) > _MAX_JSON:
            raise CheckpointError(f"it is larger than {_MAX_JSON >> 20} MB, as no config is; fetch it again")
        try:
            content = json.loads(text.decode("utf-8"))
        except RecursionError as error:
            raise CheckpointError(TOO_LARGE) from error
        except ValueError as error:  # bad JSON or bad UTF-8
            if _DETECTRON2_CONFIG.search(text, 0, 1 << 16):
                raise CheckpointError(
                    "it is a config of detectron2, which cannot be read; give the config.json of such a model, or (to "
                    "m2f-video) a preset such as resnet50_youtubevis_2019"
                ) from error
            raise CheckpointError(f"it is not valid JSON ({error}); fetch it again") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"it must hold a JSON object, but holds a {type(content).__name__}")
        if not all(_fits(value) for value in all_values(content) if isinstance(value, int | float)):
            raise CheckpointError("it holds a number out of the range of 64 bits; fetch it again")
    return content


def _fits(number: float) -> bool:
    return math.isfinite(number) if isinstance(number, float) else -(1 << 63) <= number < 1 << 63


def _read_folder(folder: Path) -> StateDict:
    found = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights; one of {', '.join(_WEIGHTS)} must be there")
    return _read_shards(found) if found.name.endswith(".index.json") else _read_file(found)


def _read_shards(index: Path) -> StateDict:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of keys to file names; fetch it again")
    state_dict: StateDict = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is outside its folder; do not trust this checkpoint")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent / name} is missing, which {index.name} names; fetch it")
        state_dict |= _read_file(index.parent / name)
    if missing := sorted(places.keys() - state_dict.keys()):
        raise CheckpointError(f"{index} names {missing[0]} (of {len(missing)}), which no shard holds; fetch them again")
    return state_dict


def _read_file(path: Path) -> StateDict:
    check_regular(path)
    with path.open("rb") as file, naming(path):
        head = file.read(32)
        if (size := file.seek(0, os.SEEK_END)) > _MAX_FILE:  # a file with holes may claim any size
            raise CheckpointError(f"it is larger than {_MAX_FILE >> 30} GB, as no checkpoint is; fetch it again")
        file.seek(0)
        if not head:
            raise CheckpointError("it is empty; fetch it again")
        if head.startswith(_LFS_POINTER):
            raise CheckpointError("it is a pointer to a git-lfs file; run `git lfs pull`")
        if head[8:9] == b"{":
            if int.from_bytes(head[:8], "little") > _MAX_JSON:
                raise CheckpointError(f"it has a header of more than {_MAX_JSON >> 20} MB, as no checkpoint has")
            try:
                return dict(load_file(path))
            except SafetensorError as error:
                raise CheckpointError(f"it is a damaged safetensors file ({error}); fetch it again") from error
        if head.startswith(b"PK") or LEGACY in head:
            return _unwrapped(read_torch(file))
        if head[:1] not in (b"\x80", b"(", b"c", b"}"):  # how pickles of any protocol begin
            raise CheckpointError("it is not a checkpoint; give safetensors, a torch.save file or a pickle of weights")
        return _unwrapped(load_pickle(file, size, load_storage=load_torch_storage))


def _unwrapped(content: object) -> StateDict:
    for _ in range(3):  # {"model": {"state_dict": ...}} at the deepest
        if isinstance(content, dict):
            inner = (content.get(name) for name in ("model", "state_dict"))
            content = next((value for value in inner if isinstance(value, dict)), content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"it holds no state dict but a {type(content).__name__}; save a model's state dict")
    state_dict: StateDict = {}
    for key, value in content.items():
        tensor = value.tensor if isinstance(value, PickledTensor) else value
        if isinstance(value, UnreadTensor):
            raise CheckpointError(f"{key!r:.120} is a {value.kind} tensor, not a plain one; save it dense")
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{key!r:.120} is a {type(tensor).__name__}, not a tensor; keep only weights")
        state_dict[key] = tensor
    return state_dict


def _check_values(state_dict: StateDict) -> None:
    held: dict[int, int] = {}
    for key, tensor in state_dict.items():
        if tensor.dtype not in _DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{key:.120} is a {kind} tensor, as no weights are; save it as float32")
        memory = tensor.untyped_storage()
        held[memory.data_ptr()] = memory.nbytes()
        if tensor.nbytes > memory.nbytes():  # a stride of 0 makes any size of a few bytes
            raise CheckpointError(f"{key:.120} claims more values than the file holds; save it contiguous")
    if sum(tensor.nbytes for tensor in state_dict.values()) > _MAX_SHARING * sum(held.values()):
        raise CheckpointError("its tensors claim more values than the file holds; save them contiguous")
    for key, tensor in state_dict.items():
        if tensor.is_floating_point() and (count := _count_not_finite(tensor)):
            raise CheckpointError(
                f"{key:.120} has {count} NaN or infinite values of {tensor.numel()}; the training diverged or the file "
                "is damaged: take an earlier checkpoint"
            )


def _count_not_finite(tensor: torch.Tensor) -> int:
    """Part by part, since a copy of all would take as much memory again."""
    parts = tensor.reshape(-1).split(_CHUNK)
    # float8 has no isfinite
    return sum(int((~torch.isfinite(part.float() if part.element_size() == 1 else part)).sum()) for part in parts)

"""A model that was exported, in the place of the model itself: two ONNX files and a manifest, by ONNX Runtime.

Nothing in these files is code. They are read as what a stranger may have made: by their digests, with weights from
files of the same folder alone, and by operators of ONNX Runtime's own.

F frames, Q queries, K classes, C channels, H W height and width of the model's input.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from m2f_video.config import ConfigError, VideoMask2FormerConfig
from m2f_video.files import check_regular, parse_json, read_json
from m2f_video.modeling.transformer_decoder import MaskProduct
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2FormerOutput

FORMAT, FORMAT_VERSION = "m2f-video-export", 1
CLIP, ENCODER, DECODER = "clip", "encoder", "decoder"
PARTS = (CLIP, ENCODER, DECODER)
ONNX_SUFFIX = ".onnx"
METADATA = "m2f_video"
"""Name, in each file, of what this project says of it: the part that it is, and the model's config."""
PIXELS, FRAMES = "pixel_values", "frames"
FEATURES = ("mask_features", "features_32", "features_16", "features_8")
CLASSES, MASKS, EMBEDDINGS = "class_queries_logits", "masks_queries_logits", "mask_embeddings"
NAMES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    CLIP: ((PIXELS,), (CLASSES, MASKS)),
    ENCODER: ((FRAMES,), FEATURES),
    DECODER: (FEATURES, (CLASSES, EMBEDDINGS)),
}
"""Of each part: what goes in, and what comes out."""

_FAULTS = (
    *("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented"),
    "RuntimeException",
)
"""Exceptions of ONNX Runtime, which have no common one."""

Graph = Callable[..., Sequence[Tensor]]
"""A part that runs: tensors in, tensors out, in the order of `NAMES`."""


class ExportError(ValueError):
    """What is no export of this project or a damaged one, or a model that cannot be exported; the message says why."""


@dataclass(frozen=True)
class ExportFiles:
    """Where the files of an export are.

    Attributes:
        clip: of the whole model; the others are named after it.
    """

    clip: Path

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """By the path of any of the three parts."""
        found = Path(path)
        stem = found.stem.removesuffix(f".{ENCODER}").removesuffix(f".{DECODER}")
        return cls(found.with_name(stem + found.suffix))

    @property
    def manifest(self) -> Path:
        """Names all others, with their digests."""
        return self.clip.with_name(f"{self.clip.stem}.json")

    def part(self, name: str) -> Path:
        """Of one of `PARTS`."""
        return self.clip if name == CLIP else self.clip.with_name(f"{self.clip.stem}.{name}{self.clip.suffix}")


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of an ONNX file, by its name."""
    return Path(path).suffix.lower() == ONNX_SUFFIX


class ExportedModel:
    """A `ClipModel` made of the two halves of an export, on a CPU, in float32. Threads may share it.

    Args:
        config: of the model: labels and preprocessing.
        encoder: frames (F, 3, H, W) -> `FEATURES`: (F, C, H/4, W/4), and at strides 32, 16 and 8 (F, C', H_l, W_l).
        decoder: `FEATURES` of a clip -> class logits (1, Q, K+1) and mask embeddings (1, Q, C).
        fingerprint: tells it from other models.

    Attributes:
        config: see above.
        fingerprint: see above.
        device: where frames are to be.
        dtype: of the features.
    """

    def __init__(self, config: VideoMask2FormerConfig, encoder: Graph, decoder: Graph, fingerprint: str = "") -> None:
        self.config, self.fingerprint = config, fingerprint
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._encoder, self._decoder, self._product = encoder, decoder, MaskProduct()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load an exported pair by the path of `X.onnx`, `X.encoder.onnx` or `X.decoder.onnx`; the first is not read.

        Raises:
            FileNotFoundError: there is no such file.
            ExportError: it is no export of this project, or its files are damaged, or not of one export.
            ImportError: the extra `m2f-video[export]` is not installed.
        """
        files = ExportFiles.of(path)
        if not is_exported(path):
            raise ExportError(
                f"{path} is no {ONNX_SUFFIX} file; m2f-video export writes one (a .pt2 holds code, and is for your own "
                "Python: torch.export.load)"
            )
        if not any(file.exists() for file in (Path(path), files.part(ENCODER), files.manifest)):
            raise FileNotFoundError(f"there is no file {path}")
        digests = _verified(files)
        encoder, config = load_graph(files, ENCODER, digests[ENCODER])
        decoder, other = load_graph(files, DECODER, digests[DECODER])
        if config != other:
            raise ExportError(f"{files.part(ENCODER)} and {files.part(DECODER).name} are of two models; export again")
        fingerprint = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        return cls(config, encoder, decoder, fingerprint)

    def encode_frames(self, frames: Tensor) -> FrameFeatures:
        """Features of frames (F, 3, H, W), normalised, whose sides are multiples of `preprocessing.size_divisor`.

        Raises:
            ValueError: frames of another shape, without frames, or not floating point.
        """
        if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape or not frames.is_floating_point():
            raise ValueError(f"frames must be floating point (F, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
        divisor = self.config.preprocessing.size_divisor
        if any(side % divisor for side in frames.shape[2:]):
            raise ValueError(f"sides of frames must be multiples of {divisor}, got {tuple(frames.shape[2:])}")
        mask_features, *multi_scale = self._encoder(frames)
        return FrameFeatures(mask_features, tuple(multi_scale))

    def decode_clip(self, features: FrameFeatures, *, output_masks: bool = True) -> VideoMask2FormerOutput:
        """Classes and mask embeddings of a clip, and with `output_masks` the mask logits of all queries."""
        classes, embeddings = self._decoder(features.mask_features, *features.multi_scale)
        masks = None
        if output_masks:
            masks = self._product(embeddings, features.mask_features.unflatten(0, (len(embeddings), -1)))
        return VideoMask2FormerOutput(classes, masks, embeddings)


def load_graph(files: ExportFiles, part: str, digests: Mapping[str, str]) -> tuple[Graph, VideoMask2FormerConfig]:
    """A part of an ONNX export as a function, and the config in it.

    Args:
        files: of the export.
        part: one of `PARTS`.
        digests: of its files, by name: weights may be in these, and nowhere else.

    Raises:
        ExportError: it is not that part, or cannot be run.
        ImportError: the extra `m2f-video[export]` is not installed.
    """
    onnxruntime = _imported("onnxruntime")
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    path = files.part(part)
    config = _config_inside(path, part, digests)
    faults = tuple(getattr(runtime, name) for name in _FAULTS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except faults as error:
        raise ExportError(f"{path} cannot be run by ONNX Runtime {onnxruntime.__version__}: {_short(error)}") from error
    inputs, outputs = NAMES[part]
    found = [tuple(item.name for item in items) for items in (session.get_inputs(), session.get_outputs())]
    classes = {item.name: item.shape for item in session.get_outputs()}.get(CLASSES, [config.num_labels + 1])
    if found != [inputs, outputs] or classes[-1] != config.num_labels + 1:
        raise ExportError(f"{path} is not the {part} that its metadata say; export it again")

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = [tensor.detach().to("cpu", torch.float32).contiguous().numpy() for tensor in tensors]
        try:
            results = session.run(outputs, dict(zip(inputs, arrays, strict=True)))
        except faults as error:
            if "allocate" in str(error):  # in one of its several sentences
                raise MemoryError(f"out of memory in {path}") from error
            sizes = ", ".join(str(tuple(array.shape)) for array in arrays)
            raise ValueError(f"{path} cannot be run on {sizes}: {_short(error)}") from error
        return [torch.from_numpy(result) for result in results]

    return run, config


def read_metadata(text: str, part: str, source: object) -> VideoMask2FormerConfig:
    """The config from what this project says in a file of an export.

    Raises:
        ExportError: it is none, or of another part.
    """
    try:
        about = parse_json(text)
        if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION:
            raise ExportError(f"{source} was not written by this version of m2f-video export; export it again")
        if about.get("part") != part:
            raise ExportError(f"{source} is not the {part} of an export; export it again")
        return VideoMask2FormerConfig.from_dict(about.get("config", {}))
    except ConfigError as error:
        raise ExportError(f"{source}: {error}") from error
    except ExportError:
        raise
    except ValueError as error:
        raise ExportError(f"{source} has metadata that are no JSON: {error}") from error


def metadata(config: VideoMask2FormerConfig, part: str) -> str:
    """What a file of an export says of itself; `read_metadata` is the inverse."""
    return json.dumps({"format_version": FORMAT_VERSION, "part": part, "config": config.to_dict()})


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(files: ExportFiles) -> dict[str, dict[str, str]]:
    """Digests of the files of both halves by name, as the manifest and the files themselves have them."""
    if not files.manifest.exists():
        raise ExportError(
            f"{files.clip} is not from m2f-video export, or was moved alone: {files.manifest.name} is not beside it"
        )
    manifest = read_json(files.manifest)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"{files.manifest} is not the manifest of an export; export again")
    parts = manifest.get("files")
    if manifest.get("format_version") != FORMAT_VERSION or not isinstance(parts, dict):
        raise ExportError(f"{files.manifest} was not written by this version of m2f-video export; export again")
    verified: dict[str, dict[str, str]] = {}
    for part in (ENCODER, DECODER):
        digests = parts.get(part)
        if not isinstance(digests, dict) or files.part(part).name not in digests:
            raise ExportError(
                f"{files.manifest} does not name {files.part(part).name}: files of an export keep their names"
            )
        for name, digest in digests.items():
            path = files.clip.with_name(_plain_name(name, files.manifest))
            if not path.exists():
                raise ExportError(f"{path} is missing, which {files.manifest.name} names; copy all files of the export")
            check_regular(path)
            if digest_of(path) != digest:
                raise ExportError(f"{path} is damaged, or of another export than {files.manifest.name}; export again")
        verified[part] = digests
    return verified


def _plain_name(name: str, source: object) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ExportError(f"{source} names {name!r:.80}, which is outside its folder; do not trust this export")
    return name


def _config_inside(path: Path, part: str, digests: Mapping[str, str]) -> VideoMask2FormerConfig:
    """The config in an ONNX file, of which it is seen that its weights are in files of the export."""
    onnx = _imported("onnx")
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except DecodeError as error:
        raise ExportError(f"{path} is no ONNX file, or cut off; export it again") from error
    for location in external_locations(model):
        if _plain_name(location, path) not in digests:
            raise ExportError(
                f"{path} has weights in {location!r:.80}, which is no file of the export; export it again"
            )
    texts = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA not in texts:
        raise ExportError(f"{path} is not from m2f-video export: it has no config in it")
    return read_metadata(texts[METADATA], part, path)


def external_locations(message: Any) -> Iterator[str]:
    """Paths of all files that an ONNX model, or a part of one, has tensors in."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if field.name == "external_data":
                if part.key == "location":
                    yield part.value
            else:
                yield from external_locations(part)


def _imported(name: str) -> Any:
    """An optional library.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed for exported models and not installed; pip install 'm2f-video[export]'"
        ) from error


def _short(error: Exception) -> str:
    """The first line of an error of ONNX Runtime, without its code."""
    return str(error).strip().splitlines()[0].rpartition(" : ")[2][:200]

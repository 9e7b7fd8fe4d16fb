"""Export to ONNX and to `torch.export`: the whole model, and its two halves for long video.

The number of frames stays open, and so do their sizes, as multiples of what preprocessing makes them multiples of. What
was written is run again, by ONNX Runtime or from the file, on sizes and
lengths that it was not exported with, and compared with the model as it is written, in float32.

T frames, H W height and width of the model's input.
"""

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as sizes_config

from m2f_video.acceleration.context import in_evaluation_mode
from m2f_video.acceleration.swap import plain_type
from m2f_video.exported import (
    CLIP,
    ENCODER,
    FORMAT,
    FORMAT_VERSION,
    METADATA,
    NAMES,
    ONNX_SUFFIX,
    PARTS,
    ExportedModel,
    ExportError,
    ExportFiles,
    Graph,
    digest_of,
    load_graph,
    metadata,
    read_metadata,
)
from m2f_video.files import check_replaceable, made_directory, temporary_folder
from m2f_video.inference.processor import VideoProcessor
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.modeling.transformer_decoder import MaskProduct
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2Former
from m2f_video.parity import compare_stage, random_frames

Format = Literal["onnx", "torch"]
Size = tuple[int, int, int]
"""T, H, W."""
SUFFIXES: Mapping[str, str] = {"onnx": ONNX_SUFFIX, "torch": ".pt2"}
OPSET = 18
"""Of the ONNX files."""
TOLERANCE = 1e-4
"""Largest relative norm error of any output."""
MOST_INLINE = 1 << 30
"""Bytes of weights that are in the ONNX file itself; more are in a file beside it, as a protobuf ends at 2 GB."""
TRACED_FRAMES, TRACED_SIDE = 2, 480
"""Of the clip that the model is exported with; its sides are the next multiples of the size divisor."""
NOT_EXPORTED: Mapping[str, str] = {
    "bifpn": "its pooling to the size of the next level has no form for sizes that are not known",
    "fapn": "ONNX Runtime has no deformable convolution",
}
"""Kinds of pixel decoders, and why not."""


@dataclass(frozen=True)
class Check:
    """How far a part that was read again is from the model.

    Attributes:
        part: `clip`, or `pair` for the two halves one after the other.
        frames, height, width: of the random clip.
        class_error: ||ours - model|| / ||model|| of the class logits.
        mask_error: of the mask logits.
    """

    part: str
    frames: int
    height: int
    width: int
    class_error: float
    mask_error: float

    @property
    def passed(self) -> bool:
        """Whether both are within `TOLERANCE`; NaN is not."""
        return self.class_error <= TOLERANCE and self.mask_error <= TOLERANCE


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        files: that were written, the manifest last; none where a check failed.
        checks: of all parts and sizes.
    """

    files: tuple[Path, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all checks are."""
        return all(check.passed for check in self.checks)


class _OverToleranceError(Exception):
    pass


class _Clip(nn.Module):
    def __init__(self, model: VideoMask2Former) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = self.model.decode_clip(self.model.encode_frames(pixel_values[0]))
        assert output.masks_queries_logits is not None  # noqa: S101  # asked for
        return output.class_queries_logits, output.masks_queries_logits


class _Encoder(_Clip):
    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        features = self.model.encode_frames(frames)
        return features.mask_features, *features.multi_scale


class _Decoder(_Clip):
    def forward(self, mask_features: Tensor, *multi_scale: Tensor) -> tuple[Tensor, ...]:
        output = self.model.decode_clip(FrameFeatures(mask_features, multi_scale), output_masks=False)
        return output.class_queries_logits, output.mask_embeddings


def export_model(
    model: VideoMask2Former,
    output: str | os.PathLike[str],
    format: Format = "onnx",
    *,
    sizes: Sequence[Size] | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Export:
    """Write `X.onnx`, `X.encoder.onnx`, `X.decoder.onnx` and `X.json`, or the same as `.pt2`, and check them.

    Names of what goes in and out are `m2f_video.exported.NAMES`. The config, with labels and preprocessing, is in each
    file. Where a check fails nothing is written.

    Args:
        model: on any device, in any dtype, prepared or not; what is exported is its float32 form as it is written.
        output: `X.onnx`, or `X.pt2`; the others are put beside it. Earlier ones of these names are replaced.
        format: `onnx`, for any runtime; or `torch`, whose files hold code: they are for one's own Python.
        sizes: clips (T, H, W) to check with; None is `check_sizes`.
        progress: called with "export" and "check", how much is done, and of how much.

    Returns:
        The files and the checks; see `Export.passed`.

    Raises:
        TypeError: `model` is none.
        ExportError: a model that cannot be exported; the message says which part of it, and why.
        ImportError: the extra `m2f-video[export]` is not installed.
        ValueError: an unknown format, a path with another suffix, or sizes that are none.
        OSError: the files cannot be written.
    """
    check_exportable(model, format)
    files = check_target(output, format)
    sizes = check_sizes(model) if sizes is None else sizes
    divisor = model.config.preprocessing.size_divisor
    if not sizes or any(len(size) != 3 or min(size) < 1 or size[1] % divisor or size[2] % divisor for size in sizes):
        raise ValueError(f"sizes must be (frames, height, width), multiples of {divisor} these, got {sizes!r:.100}")
    report = progress or (lambda *_: None)
    eager = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)  # copies have no twins
    checks: list[Check] = []
    with (
        suppress(_OverToleranceError),
        made_directory(files.clip.parent),
        temporary_folder(files.clip) as folder,
    ):
        staged = ExportFiles(folder / files.clip.name)
        for done, part in enumerate(PARTS):
            report("export", done, len(PARTS))
            with _named(eager, format):
                _write(eager, part, staged.part(part), format)
        report("export", len(PARTS), len(PARTS))
        digests = {part: _digests(staged.part(part)) for part in PARTS}
        with _named(eager, format):
            readers = _readers(staged, format, digests)
            for done, size in enumerate(sizes):
                report("check", done, len(sizes))
                checks += _checks(readers, eager, size)
        report("check", len(sizes), len(sizes))
        if not all(check.passed for check in checks):
            raise _OverToleranceError  # so that nothing stays, of folders neither
        _write_manifest(staged.manifest, format, digests, checks)
        written = [*(name for part in PARTS for name in digests[part]), staged.manifest.name]
        for name in written:
            os.replace(folder / name, files.clip.with_name(name))
        return Export(tuple(files.clip.with_name(name) for name in written), tuple(checks))
    return Export((), tuple(checks))


def check_target(output: str | os.PathLike[str], format: Format) -> ExportFiles:
    """Where an export is written to, seen before the work.

    Raises:
        ValueError: an unknown format, another suffix than the format's, or a name of one of its halves.
        OSError: there is something there that must not be replaced.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r:.60}")
    path = Path(output)
    if path.suffix != SUFFIXES[format] or ExportFiles.of(path).clip != path:
        raise ValueError(f"{path} is to be named like model{SUFFIXES[format]}, for format {format}")
    files = ExportFiles(path)
    for target in (*map(files.part, PARTS), files.manifest):
        check_replaceable(target)
    return files


def check_exportable(model: VideoMask2Former, format: Format) -> None:
    """Fail before the work where a model is known not to export.

    Raises:
        TypeError: it is none.
        ExportError: see `export_model`.
    """
    if not isinstance(model, VideoMask2Former):
        raise TypeError(f"the model comes first, a VideoMask2Former, got {type(model).__name__}")
    kind = model.config.pixel_decoder.kind
    if format == "onnx" and kind in NOT_EXPORTED and "pixel_decoder" not in model.config.parts:
        raise ExportError(f"a model with pixel_decoder.kind={kind!r} cannot be exported to ONNX: {NOT_EXPORTED[kind]}")
    if (product := plain_type(model.mask_product)) is not MaskProduct:
        raise ExportError(
            f"transformer_decoder.mask_product is a {product.__name__}, which whoever runs the halves "
            "of an export would not know: masks are products of mask embeddings and mask features there"
        )


def check_sizes(model: VideoMask2Former) -> tuple[Size, Size]:
    """A frame as preprocessing makes it of 1080p video, and a clip of three, upright and of half the sides."""
    preprocessing = model.config.preprocessing
    height, width = VideoProcessor.from_config(model.config).padded_size(1080, 1920)
    divisor = preprocessing.size_divisor
    upright = tuple(max(1, side // 2 // divisor) * divisor for side in (width, height))
    return (1, height, width), (3, upright[0], upright[1])


def _write(model: VideoMask2Former, part: str, path: Path, format: Format) -> None:
    program = _traced(model, part)
    about = metadata(model.config, part)
    if format == "torch":
        torch.export.save(program, path, extra_files={METADATA: about})
        return
    inputs, outputs = NAMES[part]
    with _quietly():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            external_data=False,
            verbose=False,
        )
    assert onnx_program is not None  # noqa: S101  # as of all that go by dynamo
    graph = onnx_program.model.graph
    for item in (graph, *graph, *(value for node in graph for value in node.outputs)):
        item.metadata_props.clear()  # paths and lines of the code that this comes from
    onnx_program.model.metadata_props[METADATA] = about
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    onnx_program.save(path, external_data=weights > MOST_INLINE)


def _traced(model: VideoMask2Former, part: str) -> torch.export.ExportedProgram:
    """A part as operators of PyTorch alone, for any number and size of frames."""
    plain = in_evaluation_mode(model)  # a copy with the same weights
    for module in plain.modules():
        if isinstance(module, MSDeformAttn):
            module.backend = "reference"  # bilinear sampling is an operator everywhere
    divisor = model.config.preprocessing.size_divisor
    rows = -(-TRACED_SIDE // divisor)
    pixels = torch.zeros(TRACED_FRAMES, 3, rows * divisor, (rows + 1) * divisor)
    frames, height, width = (torch.export.Dim(name, min=1) for name in ("frames", "height", "width"))
    if part == CLIP:
        return _open_program(_Clip(plain), (pixels[None],), ({1: frames, 3: divisor * height, 4: divisor * width},))
    if part == ENCODER:
        return _open_program(_Encoder(plain), (pixels,), ({0: frames, 2: divisor * height, 3: divisor * width},))
    with torch.no_grad():
        features = _Encoder(plain)(pixels[:, :, :128, :192])
    names = [(f"height_{stride}", f"width_{stride}") for stride in (4, 32, 16, 8)]
    dims = [{0: frames, 2: torch.export.Dim(high, min=1), 3: torch.export.Dim(wide, min=1)} for high, wide in names]
    return _open_program(_Decoder(plain), tuple(features), (dims[0], tuple(dims[1:])))


def _open_program(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    """Traced on inputs some of whose sizes stay open, those of one included."""
    with sizes_config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        program = torch.export.export(
            module, inputs, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
    for node in list(program.graph.nodes):  # such as that a map has more than one pixel, by which only strides differ
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    return program


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _named(model: VideoMask2Former, format: Format) -> Iterator[None]:
    """Let what the exporters, or the runtimes, say of a model be one error that names what is unusual about it."""
    try:
        yield
    except (ExportError, OSError, ImportError, MemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{_unusual(model)} cannot be exported to {format}: {reason:.200}") from error


def _unusual(model: VideoMask2Former) -> str:
    """Of a model, what differs from the published one."""
    config = model.config
    if config.parts:
        return f"a model with {', '.join(config.parts)} of its own"
    backbone = getattr(config.backbone, "name", "swin")
    return f"a model with backbone {backbone} and pixel decoder {config.pixel_decoder.kind}"


def _digests(path: Path) -> dict[str, str]:
    """Of a part that was written: its file, and that of its weights where there is one."""
    data = path.with_name(f"{path.name}.data")
    return {file.name: digest_of(file) for file in (path, data) if file.exists()}


Clips = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A clip (1, T, 3, H, W) to class logits and mask logits."""


def _readers(files: ExportFiles, format: Format, digests: Mapping[str, Mapping[str, str]]) -> dict[str, Clips]:
    """The clip model and the pair, read from their files."""
    (clip, _), (encoder, config), (decoder, _) = (_graph(files, part, format, digests[part]) for part in PARTS)
    pair = ExportedModel(config, encoder, decoder)

    def by_clip(pixels: Tensor) -> tuple[Tensor, Tensor]:
        classes, masks = clip(pixels)
        return classes, masks

    def by_pair(pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = FrameFeatures.concatenate([pair.encode_frames(frame[None]) for frame in pixels[0]])
        output = pair.decode_clip(features)
        assert output.masks_queries_logits is not None  # noqa: S101  # asked for
        return output.class_queries_logits, output.masks_queries_logits

    return {CLIP: by_clip, "pair": by_pair}


def _graph(files: ExportFiles, part: str, format: Format, digests: Mapping[str, str]) -> tuple[Graph, Any]:
    if format == "onnx":
        return load_graph(files, part, digests)
    path, extra = files.part(part), {METADATA: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return module, read_metadata(extra[METADATA], part, path)


@torch.inference_mode()
def _checks(readers: Mapping[str, Clips], eager: VideoMask2Former, size: Size) -> list[Check]:
    clip = random_frames(*size, seed=0).float()[None]
    expected = eager(clip)
    checks = []
    for part, run in readers.items():
        classes, masks = run(clip)
        errors = (
            compare_stage(part, classes, expected.class_queries_logits).relative,
            compare_stage(part, masks, expected.masks_queries_logits).relative,
        )
        checks.append(Check(part, *size, *errors))
    return checks


def _write_manifest(path: Path, format: Format, digests: Mapping[str, Mapping[str, str]], checks: list[Check]) -> None:
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": format}
    opset = {"opset": OPSET} if format == "onnx" else {}
    content = (
        about | opset | {"torch": torch.__version__, "files": digests, "checks": [asdict(check) for check in checks]}
    )
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

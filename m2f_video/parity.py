"""Stage-by-stage comparison with the transformers implementation, or with another reference, on the same input.

    model = VideoMask2Former.from_pretrained(...)        # then change what you like
    result = compare(model, random_frames(1, 480, 864, seed=0), transformers_model(original))
    result.passed, result.stages, result.only_model, result.only_reference

The yardstick is the reference in float64, whose rounding is negligible: two float32 runs differ by the errors of both,
and where the reference's own error moves a mask logit across its threshold, by much more than ours.

What each side did is taken from that side: attention masks are caught where its attention gets them.

The transformers model is an image model, so it is compared frame by frame: each frame is a clip of its own, where the
joint and the per-frame model are the same function (positions in time add a constant to all keys, which softmax
cancels).

F frames, B clips, T frames of a clip, Q queries, K classes, C channels, N tokens of all levels, H W height and width.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.acceleration import accelerated
from m2f_video.acceleration.swap import Fused
from m2f_video.config import SwinConfig, VideoMask2FormerConfig
from m2f_video.modeling.taps import Taps
from m2f_video.modeling.video_mask2former import VideoMask2Former
from weights_convert import ConversionError, from_native, hf_config_from_native, write_checkpoint

TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-6}
"""Largest relative norm error ||ours - reference|| / ||reference|| of any stage."""
REPORTED = torch.bfloat16
"""Compared without a tolerance: it rounds attention bits over the threshold, after which two decoders look at different
pixels."""

BLOCKED = -50.0
"""What is added to the product of a query and a key that it is not to attend to, at most: exp(-50) is 2e-22."""

Stages = Mapping[str, Tensor]
Reference = nn.Module | Callable[[Tensor], Stages]
"""A transformers model, a `VideoMask2Former`, or a function that gives the stages for frames."""


@dataclass(frozen=True)
class StageComparison:
    """How one stage differs from the reference.

    Attributes:
        stage: its name.
        max_abs: largest absolute difference.
        relative: ||ours - reference|| / ||reference||; 0 for attention masks, which are counted instead: a logit that
            rounding moves across the threshold is no error of this stage, and the next stage shows its effect.
        cosine: cosine of the angle between the two, flattened.
        flips: for attention masks, (bits that differ, bits); None for others.
        shapes: ours and the reference's where they differ, and nothing can be compared; all numbers are NaN then.
    """

    stage: str
    max_abs: float
    relative: float
    cosine: float
    flips: tuple[int, int] | None = None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Parity:
    """How a model differs from a reference.

    Attributes:
        stages: those that both have, in the reference's order.
        own: how the reference in the same dtype differs from itself in float64, at these stages; empty where the
            reference is a function, which has no dtype.
        only_model: stages that the reference does not have.
        only_reference: stages that the model does not have.
        tolerance: largest relative error allowed; None where errors are only reported.
    """

    stages: list[StageComparison]
    own: list[StageComparison]
    only_model: list[str]
    only_reference: list[str]
    tolerance: float | None

    @property
    def worst(self) -> StageComparison:
        """The stage with the largest relative error, or the first that is not a number."""
        odd = (comparison for comparison in self.stages if not isfinite(comparison.relative))
        return next(odd, max(self.stages, key=lambda comparison: comparison.relative))

    @property
    def passed(self) -> bool:
        """Whether no stage is further off than the tolerance; NaN is, of any dtype."""
        limit = float("inf") if self.tolerance is None else self.tolerance
        return all(comparison.relative <= limit for comparison in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; numbers that are none become null."""
        rows = [asdict(comparison) for comparison in self.stages]
        for row, own in zip(rows, self.own, strict=False):
            row["own_relative"], row["own_flips"] = own.relative, own.flips
        rows = [
            {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in row.items()}
            for row in rows
        ]
        sides = {"only_model": self.only_model, "only_reference": self.only_reference}
        return {"passed": self.passed, "tolerance": self.tolerance, "stages": rows} | sides


def random_model(config: VideoMask2FormerConfig, seed: int) -> VideoMask2Former:
    """A model whose every parameter has an effect.

    Initial weights alone would hide faults: sampling offsets and attention weights start at zero, norms at one. So
    seeded noise is added to all, and to the statistics of batch norms.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoMask2Former(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(0.1 * torch.randn_like(buffer))
                elif name.endswith("running_var"):
                    buffer.add_(torch.rand_like(buffer))
    return model.eval()


def random_frames(frames: int, height: int, width: int, seed: int) -> Tensor:
    """Frames (F, 3, H, W), float64, of smooth random structure with noise on it, in the range of normalised pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(frames, 3, max(2, height // 32), max(2, width // 32), generator=generator, dtype=torch.float64)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return smooth + 0.1 * torch.randn(frames, 3, height, width, generator=generator, dtype=torch.float64)


def compare(
    model: VideoMask2Former,
    frames: Tensor,
    reference: Reference | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    plain: bool = False,
    stages: Sequence[str] = (),
) -> Parity:
    """Run a model and a reference in `dtype`, and compare every stage that both have with the reference in float64.

    Args:
        model: on the CPU, in any mode, changed in any way; it is left as it is. Where its dtype is another, a copy of
            it runs, and what hooks and patches hold of it is not copied.
        frames: (F, 3, H, W), normalised, each a clip of its own; or clips (B, T, 3, H, W), where the reference can
            take them.
        reference: None is `transformers_model(model)`. Another, such as that of the model before it was changed, may
            be a transformers model, a `VideoMask2Former`, or a function from frames to stages by name, which gets
            them in float64 and is believed.
        dtype: a key of `TOLERANCES`, or `REPORTED`; both run in it, on the same rounded weights and frames.
        plain: run the model as it is written, without accelerated twins. Its attention masks can only be caught so: a
            twin makes none.
        stages: names of stages to compare, or their first words (`decoder`, `decoder 3`); all where empty.

    Raises:
        ValueError: another dtype, frames of another shape or not finite, stages that neither side has, or none on both
            sides.
        ImportError: transformers is not installed.
        weights_convert.ConversionError: a model whose decoders transformers cannot express.
    """
    if dtype not in (known := (*TOLERANCES, REPORTED)):
        raise ValueError(f"parity is defined for {', '.join(map(str, known))}, not for {dtype}")
    if frames.ndim not in (4, 5) or frames.shape[-3] != 3 or not frames.numel():
        raise ValueError(f"frames must be (F, 3, H, W) or (B, T, 3, H, W) and not empty, got {tuple(frames.shape)}")
    if not frames.isfinite().all():
        raise ValueError("frames hold NaN or infinity; give normalised pixels")
    frames, model = frames.to(dtype), _in_dtype(model, dtype)
    with accelerated(model, plain) as running:
        ours = model_stages(running, frames)
        reference = transformers_model(running) if reference is None else reference
        if isinstance(reference, nn.Module):
            rounded = _in_dtype(reference, dtype)
            own = _stages_of(rounded, frames)
            exact = dtype == torch.float64
            expected = own if exact else _stages_of(_in_dtype(rounded, torch.float64), frames.double())
        else:
            expected, own = reference(frames.double()), {}
    _check_names(stages, [*ours, *expected])
    chosen = [name for name in expected if name in ours and _is_chosen(name, stages)]
    if not chosen:
        raise ValueError("the model and the reference have no such stage in common")
    return Parity(
        [compare_stage(name, ours[name], expected[name]) for name in chosen],
        [compare_stage(name, own[name], expected[name]) for name in chosen if name in own],
        only_model=[name for name in ours if name not in expected and _is_chosen(name, stages)],
        only_reference=[name for name in expected if name not in ours and _is_chosen(name, stages)],
        tolerance=TOLERANCES.get(dtype),
    )


def _in_dtype(module: Any, dtype: torch.dtype) -> Any:
    kinds = {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()}
    return module if kinds <= {dtype} else copy.deepcopy(module).to(dtype)


def _stages_of(reference: nn.Module, frames: Tensor) -> Stages:
    with accelerated(reference, plain=True) as running:
        if isinstance(running, VideoMask2Former):
            return model_stages(running, frames)
        return transformers_stages(running, frames)


def _is_chosen(name: str, stages: Sequence[str]) -> bool:
    return not stages or any(f"{name} ".startswith(f"{stage} ") for stage in stages)


def _check_names(stages: Sequence[str], known: Sequence[str]) -> None:
    for stage in stages:
        if not any(_is_chosen(name, (stage,)) for name in known):
            raise ValueError(f"there is no stage {stage!r}; there are: {', '.join(dict.fromkeys(known))}")


def compare_stage(stage: str, ours: Tensor, reference: Tensor) -> StageComparison:
    """Compare two tensors; boolean ones by the bits that differ, in every head where one side has a mask for each."""
    is_mask = reference.dtype == torch.bool
    if is_mask and {ours.ndim, reference.ndim} == {3, 4}:
        ours, reference = (mask if mask.ndim == 4 else mask[:, None] for mask in (ours, reference))
        heads = max(ours.shape[1], reference.shape[1])
        ours, reference = (mask.expand(-1, heads, -1, -1) for mask in (ours, reference))
    if ours.shape != reference.shape:
        return StageComparison(stage, nan, nan, nan, shapes=(tuple(ours.shape), tuple(reference.shape)))
    flips = (int((ours != reference).sum()), reference.numel()) if is_mask else None
    a, b = ours.double().flatten(), reference.double().flatten()
    relative = 0.0 if is_mask or torch.equal(a, b) else float((a - b).norm() / b.norm())
    return StageComparison(stage, float((a - b).abs().max()), relative, float(F.cosine_similarity(a, b, dim=0)), flips)


@torch.inference_mode()
def model_stages(model: VideoMask2Former, frames: Tensor) -> dict[str, Tensor]:
    """Every stage of our model for frames (F, 3, H, W), each a clip of its own, or for clips (B, T, 3, H, W).

    The default path, which makes neither full auxiliary masks nor resized ones, gives the last two stages. Attention
    masks are there where no twin attends, and where the cross-attention is by `F.scaled_dot_product_attention`.
    """
    clips = frames if frames.ndim == 5 else frames[:, None]
    names = _masks_of(model)
    with model.capture(*names) if names else nullcontext(Taps()) as taps:
        plain = model(clips, output_auxiliary=True, output_hidden=True)
    masks = {int(name.split(".")[2]): call for name in taps for call in taps.calls(name) if call is not None}
    default = model(clips)
    features = plain.features

    def of_masks(logits: Tensor) -> Tensor:
        return logits if frames.ndim == 5 else logits[:, :, 0]

    stages = {f"backbone stride {4 * 2**i}": level for i, level in enumerate(features.backbone_maps)}
    stages |= {f"pixel decoder layer {i}": tokens for i, tokens in enumerate(features.encoder_layers)}
    stages |= {f"multi-scale stride {32 // 2**i}": level for i, level in enumerate(features.multi_scale)}
    stages["mask features"] = features.mask_features
    for i, prediction in enumerate(plain.auxiliary):
        stages[f"decoder {i} class logits"] = prediction.class_queries_logits
        stages[f"decoder {i} mask logits"] = of_masks(prediction.masks_queries_logits)
        if i in masks:
            stages[f"decoder {i} attention mask"] = _allowed(masks[i])
    stages["default path class logits"] = default.class_queries_logits
    stages["default path mask logits"] = of_masks(default.masks_queries_logits)
    return stages


def _masks_of(model: VideoMask2Former) -> list[str]:
    """By layer, what the taps call the mask of its cross-attention; none where twins attend, which make no mask.

    Looking closer would change what runs.
    """
    layers = list(model.transformer_decoder.layers)
    if any(isinstance(module, Fused) for layer in layers for module in layer.modules()):
        return []
    own = (index for index, layer in enumerate(layers) if isinstance(getattr(layer, "cross_attn", None), nn.Module))
    return [f"transformer_decoder.layers.{index}.cross_attn.attention_mask" for index in own]


def _allowed(mask: Tensor) -> Tensor:
    """Where a query may attend, as `attention_mask` says of taps, from what PyTorch's attention is told."""
    return _of_all_heads(mask if mask.dtype == torch.bool else mask > BLOCKED)


def _of_all_heads(mask: Tensor) -> Tensor:
    """(B, M, Q, S) as (B, Q, S) where all heads have the same."""
    return mask[:, 0] if mask.ndim == 4 and bool((mask == mask[:, :1]).all()) else mask


def transformers_model(model: VideoMask2Former) -> Any:
    """The transformers model with the same weights and dtype, by way of a converted checkpoint folder.

    Of a model whose backbone transformers does not have, the decoders alone: they get the maps of the model's own
    backbone, which both share then and no stage compares.

    Raises:
        ImportError: transformers is not installed.
        weights_convert.ConversionError: a model whose decoders it cannot express.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the reference needs transformers: pip install 'm2f-video[parity]'") from error

    try:
        config, preprocessor = hf_config_from_native(model.config.to_dict())
    except ConversionError:
        if isinstance(model.config.backbone, SwinConfig):
            raise
        return _transformers_decoders(model, transformers)
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), from_native(model.state_dict(), "hf"), config, preprocessor)
        with _quiet(transformers.logging):
            reference = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder, dtype=model.dtype)
    return reference.eval()


def _transformers_decoders(model: VideoMask2Former, transformers: Any) -> Any:
    """A transformers model whose backbone is the model's own."""
    substitute = model.config.replace(backbone="timm:resnet18")  # of any widths; its weights are not used
    config, _ = hf_config_from_native(substitute.to_dict())
    config["backbone_config"]["hidden_sizes"] = list(model.backbone.channels)
    with _quiet(transformers.logging):
        reference = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**config))
    reference.model.pixel_level_module.encoder = _SharedBackbone(model.backbone)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    unused = VideoMask2Former(substitute).backbone.state_dict(prefix="backbone.")
    converted = from_native(weights | unused, "hf")
    names = reference.state_dict().keys()
    reference.load_state_dict({name: tensor for name, tensor in converted.items() if name in names}, strict=True)
    return reference.to(model.dtype).eval()


class _SharedBackbone(nn.Module):
    """A model's own backbone where transformers would have one; it stays in its dtype."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._backbone = (backbone,)  # none of this module's parts, which are cast

    def __deepcopy__(self, memo: Any) -> "_SharedBackbone":
        return _SharedBackbone(*self._backbone)

    def forward(self, pixel_values: Tensor) -> Any:
        backbone = self._backbone[0]
        maps = backbone(pixel_values.to(next(backbone.parameters()).dtype))
        return SimpleNamespace(feature_maps=tuple(level.to(pixel_values.dtype) for level in maps))


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' remarks and progress bars about a checkpoint that was just written for it."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


@torch.inference_mode()
def transformers_stages(reference: Any, frames: Tensor) -> dict[str, Tensor]:
    """The stages of `model_stages`, from a transformers model, caught by hooks where it does not return them.

    Raises:
        ValueError: clips, or a module that is no such model.
    """
    if frames.ndim != 4:
        raise ValueError("transformers has no model of clips; give frames (F, 3, H, W), each a clip of its own")
    try:
        pixel_level, decoder = reference.model.pixel_level_module, reference.model.transformer_module.decoder
    except AttributeError as error:
        raise ValueError(
            f"the reference is a {type(reference).__name__}; give a VideoMask2Former, transformers' "
            "Mask2FormerForUniversalSegmentation, or a function from frames to stages"
        ) from error
    encoder_layers: list[Tensor] = []
    masks: dict[int, Tensor] = {}

    def keep_tokens(_module: Any, _inputs: Any, output: Any) -> None:
        encoder_layers.append(output[0] if isinstance(output, tuple) else output)

    def keep_mask(index: int) -> Callable[[Any, Any, Any], None]:
        def keep(_module: Any, _inputs: Any, kwargs: Any) -> None:
            blocked = kwargs["attn_mask"].bool().unflatten(0, (frames.shape[0], -1))  # (F, M, Q, S)
            masks[index] = _of_all_heads(~blocked)

        return keep

    hooks = [layer.register_forward_hook(keep_tokens) for layer in pixel_level.decoder.encoder.layers]
    for index, layer in enumerate(decoder.layers):
        hooks.append(layer.cross_attn.register_forward_pre_hook(keep_mask(index), with_kwargs=True))
    try:
        output = reference(pixel_values=frames, output_hidden_states=True, output_auxiliary_logits=True)
    finally:
        for hook in hooks:
            hook.remove()

    predictions = [(aux["class_queries_logits"], aux["masks_queries_logits"]) for aux in output.auxiliary_logits]
    predictions.append((output.class_queries_logits, output.masks_queries_logits))
    stages: dict[str, Tensor] = {}
    if not isinstance(pixel_level.encoder, _SharedBackbone):
        stages = {f"backbone stride {4 * 2**i}": level for i, level in enumerate(output.encoder_hidden_states)}
    stages |= {f"pixel decoder layer {i}": tokens for i, tokens in enumerate(encoder_layers)}
    stages |= {f"multi-scale stride {32 // 2**i}": level for i, level in enumerate(output.pixel_decoder_hidden_states)}
    stages["mask features"] = output.pixel_decoder_last_hidden_state
    for i, (class_logits, mask_logits) in enumerate(predictions):
        stages[f"decoder {i} class logits"] = class_logits
        stages[f"decoder {i} mask logits"] = mask_logits
        if i in masks:
            stages[f"decoder {i} attention mask"] = masks[i]
    stages["default path class logits"] = output.class_queries_logits
    stages["default path mask logits"] = output.masks_queries_logits
    return stages

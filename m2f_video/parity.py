"""Stage-by-stage comparison with the transformers implementation, on the same weights and input.

The yardstick is the reference in float64, whose rounding is negligible: two float32 runs differ by the errors of both,
and where the reference's own error moves a mask logit across its threshold, by much more than ours.

The reference is an image model, so it is compared frame by frame: each frame is a clip of its own, where the joint and
the per-frame model are the same function (positions in time add a constant to all keys, which softmax cancels).

F frames, Q queries, K classes, C channels, N tokens of all levels, H W height and width.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from m2f_video.config import VideoMask2FormerConfig
from m2f_video.modeling.transformer_decoder import attention_mask
from m2f_video.modeling.video_mask2former import VideoMask2Former
from weights_convert import from_native, hf_config_from_native, write_checkpoint

TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-6}
"""Largest relative norm error ||ours - reference|| / ||reference|| of any stage."""
REPORTED = torch.bfloat16
"""Compared without a tolerance: it rounds attention bits over the threshold, after which two decoders look at different
pixels."""


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
    """

    stage: str
    max_abs: float
    relative: float
    cosine: float
    flips: tuple[int, int] | None = None


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
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return smooth + 0.1 * torch.randn(frames, 3, height, width, generator=generator, dtype=torch.float64)


def compare_with_transformers(
    model: VideoMask2Former, frames: Tensor, dtype: torch.dtype, prepare: bool = False
) -> tuple[list[StageComparison], list[StageComparison]]:
    """Run both implementations in `dtype` and compare every stage they share with the reference in float64.

    Args:
        model: on the CPU; transformers' `Mask2FormerForUniversalSegmentation` gets its weights, converted.
        frames: (F, 3, H, W), normalised.
        dtype: a key of `TOLERANCES`, or `REPORTED`; both models run in it, on the same rounded weights and frames.
        prepare: run what `prepare_for_inference` makes of ours.

    Returns:
        How our stages differ from the float64 reference, and how those of the reference in `dtype` do.

    Raises:
        ValueError: another dtype.
        ImportError: transformers is not installed.
        weights_convert.ConversionError: a model that transformers cannot express.
    """
    if dtype not in (known := (*TOLERANCES, REPORTED)):
        raise ValueError(f"parity is defined for {', '.join(map(str, known))}, not for {dtype}")
    frames, model = frames.to(dtype), copy.deepcopy(model).to(dtype).eval()
    reference = transformers_model(model)
    same_dtype = transformers_stages(reference, frames)
    exact = same_dtype if dtype == torch.float64 else transformers_stages(reference.double(), frames.double())
    if prepare:
        model.prepare_for_inference()
    return compare(model_stages(model, frames), exact), compare(same_dtype, exact)


def within_tolerance(comparisons: list[StageComparison], dtype: torch.dtype) -> bool:
    """Whether no stage is further off than its dtype's tolerance; NaN is, of any dtype."""
    tolerance = TOLERANCES.get(dtype, float("inf"))
    return all(comparison.relative <= tolerance for comparison in comparisons)


def compare(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[StageComparison]:
    """Compare tensors by name; boolean ones by the bits that differ.

    Raises:
        ValueError: a stage that only one side has, or of two shapes.
    """
    if ours.keys() != reference.keys():
        raise ValueError(f"stages on one side only: {sorted(ours.keys() ^ reference.keys())}")
    return [_compare_stage(stage, ours[stage], expected) for stage, expected in reference.items()]


def _compare_stage(stage: str, ours: Tensor, reference: Tensor) -> StageComparison:
    if ours.shape != reference.shape:
        raise ValueError(f"stage {stage} is {tuple(ours.shape)}, in the reference {tuple(reference.shape)}")
    is_mask = reference.dtype == torch.bool
    flips = (int((ours != reference).sum()), reference.numel()) if is_mask else None
    a, b = ours.double().flatten(), reference.double().flatten()
    relative = 0.0 if is_mask else float((a - b).norm() / b.norm())
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return StageComparison(stage, float((a - b).abs().max()), relative, cosine, flips)


@torch.inference_mode()
def model_stages(model: VideoMask2Former, frames: Tensor) -> dict[str, Tensor]:
    """Every stage of our model for frames (F, 3, H, W), each a clip of its own.

    The default path, which makes neither full auxiliary masks nor resized ones, gives the last two stages.
    """
    plain = model(frames[:, None], output_auxiliary=True, output_hidden=True)
    default = model(frames[:, None])
    features = plain.features
    stages = {f"backbone stride {4 * 2**i}": level for i, level in enumerate(features.backbone_maps)}
    stages |= {f"pixel decoder layer {i}": tokens for i, tokens in enumerate(features.encoder_layers)}
    stages |= {f"multi-scale stride {32 // 2**i}": level for i, level in enumerate(features.multi_scale)}
    stages["mask features"] = features.mask_features
    for i, prediction in enumerate(plain.auxiliary):
        stages[f"decoder {i} class logits"] = prediction.class_queries_logits
        stages[f"decoder {i} mask logits"] = prediction.masks_queries_logits[:, :, 0]
        if i < len(plain.attention_masks):
            stages[f"decoder {i} attention mask"] = plain.attention_masks[i]
    stages["default path class logits"] = default.class_queries_logits
    stages["default path mask logits"] = default.masks_queries_logits[:, :, 0]
    return stages


def transformers_model(model: VideoMask2Former) -> Any:
    """The transformers model with the same weights and dtype, by way of a converted checkpoint folder."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the reference needs transformers: pip install 'm2f-video[parity]'") from error

    config, preprocessor = hf_config_from_native(model.config.to_dict())
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), from_native(model.state_dict(), "hf"), config, preprocessor)
        with _quiet(transformers.logging):
            reference = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder, dtype=model.dtype)
    return reference.eval()


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
    """The stages of `model_stages`, from the transformers model, caught by hooks where it does not return them."""
    pixel_level, decoder = reference.model.pixel_level_module, reference.model.transformer_module.decoder
    encoder_layers: list[Tensor] = []
    attention_masks: list[Tensor] = []

    def keep_tokens(_module: Any, _inputs: Any, output: Any) -> None:
        encoder_layers.append(output[0] if isinstance(output, tuple) else output)

    def keep_mask(_module: Any, _inputs: Any, output: Any) -> None:
        blocked = output[1].unflatten(0, (frames.shape[0], -1))[:, 0]  # (F * heads, Q, keys), equal over heads
        attention_masks.append(attention_mask(-blocked.to(frames.dtype)))  # with the rule for all-blocked queries

    hooks = [layer.register_forward_hook(keep_tokens) for layer in pixel_level.decoder.encoder.layers]
    hooks.append(decoder.mask_predictor.register_forward_hook(keep_mask))
    try:
        output = reference(pixel_values=frames, output_hidden_states=True, output_auxiliary_logits=True)
    finally:
        for hook in hooks:
            hook.remove()

    predictions = [(aux["class_queries_logits"], aux["masks_queries_logits"]) for aux in output.auxiliary_logits]
    predictions.append((output.class_queries_logits, output.masks_queries_logits))
    stages = {f"backbone stride {4 * 2**i}": level for i, level in enumerate(output.encoder_hidden_states)}
    stages |= {f"pixel decoder layer {i}": tokens for i, tokens in enumerate(encoder_layers)}
    stages |= {f"multi-scale stride {32 // 2**i}": level for i, level in enumerate(output.pixel_decoder_hidden_states)}
    stages["mask features"] = output.pixel_decoder_last_hidden_state
    for i, (class_logits, mask_logits) in enumerate(predictions):
        stages[f"decoder {i} class logits"] = class_logits
        stages[f"decoder {i} mask logits"] = mask_logits
        if i < len(predictions) - 1:
            stages[f"decoder {i} attention mask"] = attention_masks[i]
    stages["default path class logits"] = output.class_queries_logits
    stages["default path mask logits"] = output.masks_queries_logits
    return stages

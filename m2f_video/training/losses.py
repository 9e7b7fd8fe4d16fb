"""Training losses with matching at every depth (arXiv 2112.01527, sections 3.3 and 4.1; arXiv 2112.10764, section 3).

B clips, Q queries, K classes, T frames, h w size of the mask logits, H W size of the model's input, N matched
instances of the batch, R = N*T masks (instances outermost, then frames), P points or pixels of a mask.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_video.checked_config import CheckedConfig, ConfigError, check_fields
from m2f_video.distributed import mean_over_workers, num_workers
from m2f_video.inference.segments import MASK_STRIDE
from m2f_video.modeling.transformer_decoder import Prediction
from m2f_video.modeling.video_mask2former import VideoMask2FormerOutput
from m2f_video.training.matcher import HungarianMatcher, Match, Matcher, at_least_float32, check_match
from m2f_video.training.point_sampling import RandomSource, point_sample, uncertain_points
from m2f_video.training.targets import ClipTarget

MaskComparison = Literal["points", "masks"]


class NonFinitePredictionError(ValueError):
    """A prediction holds NaN or infinite values, so nothing can be matched; the message names depth and tensor."""


@dataclass(frozen=True, kw_only=True)
class LossConfig(CheckedConfig):
    """How predictions are matched and what is minimised; the defaults are the published ones.

    Raises:
        ConfigError: a field has a value no loss can be made from; the message names it.
    """

    class_weight: float = 2.0
    """Weight of the classification loss, and of the class in matching."""
    mask_weight: float = 5.0
    """Weight of the masks' binary cross-entropy, in the loss and in matching."""
    dice_weight: float = 5.0
    """Weight of the masks' dice loss, in the loss and in matching."""
    no_object_weight: float = 0.1
    """Weight of the no-object class inside the classification loss; every other class has weight 1."""
    num_points: int = 12544
    """Points per mask (of each frame) where masks are compared at points."""
    oversample_ratio: float = 3.0
    """Points drawn per point of the mask loss, among which the most uncertain ones are chosen."""
    importance_sample_ratio: float = 0.75
    """Share of the mask loss's points that are chosen by uncertainty; the rest is uniform."""
    matching: MaskComparison = "points"
    """Whether matching compares masks at uniform `points` or all of the `masks` (at the logits' resolution)."""
    mask_loss: MaskComparison = "points"
    """Whether the mask losses compare `points`, most of them uncertain ones, or all of the `masks` (at the input's
    resolution), which takes several times the memory."""
    deep_supervision: bool = True
    """Whether predictions at every depth are supervised (arXiv 2112.01527, section 3.2.1), or the final one alone."""

    def _check(self) -> None:
        weights = ("class_weight", "mask_weight", "dice_weight")
        check_fields(self, "must not be negative", lambda value: value >= 0, *weights)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError(f"one of LossConfig's {', '.join(weights)} must be positive, all are 0")
        check_fields(self, "must be positive", lambda value: value > 0, "no_object_weight", "num_points")
        check_fields(self, "must be at least 1", lambda value: value >= 1, "oversample_ratio")
        check_fields(self, "must be in [0, 1]", lambda value: 0 <= value <= 1, "importance_sample_ratio")


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Result of `VideoMask2FormerLoss`.

    Attributes:
        total: what to minimise, a scalar: the sum of `parts`.
        parts: weighted scalars `loss_ce`, `loss_mask` and `loss_dice` of the final prediction, and with deep
            supervision the same with `_0`, `_1`, ... of the others, as the model's `auxiliary` has them: from the
            learnable queries' on, or where these are not supervised, from that after the first decoder layer.
        matches: per prediction that is supervised, the final one last, per clip.
    """

    total: Tensor
    parts: dict[str, Tensor]
    matches: tuple[tuple[Match, ...], ...]


class LossNorms(NamedTuple):
    """What losses are divided by; given to each part of a batch, the parts' losses add up to the whole batch's."""

    num_instances: float
    """Instances of the batch; 1 where there are none."""
    class_weight: float
    """Weights of the classes that the batch's queries are to predict, added up."""


def class_loss(
    class_logits: Tensor,
    targets: Sequence[ClipTarget],
    matches: Sequence[Match],
    no_object_weight: float,
    total_weight: float | None = None,
) -> Tensor:
    """Cross-entropy of all queries, averaged by the weights of their classes; unmatched ones are "no object".

    Args:
        class_logits: (B, Q, K+1).
        targets: of each clip.
        matches: of each clip.
        no_object_weight: weight of class K; the others have 1.
        total_weight: what the weighted sum is divided by; None adds up the weights of these queries.
    """
    num_labels = class_logits.shape[2] - 1
    expected = torch.full(class_logits.shape[:2], num_labels, device=class_logits.device)  # (B, Q)
    for row, target, match in zip(expected, targets, matches, strict=True):
        row[match.queries] = target.labels[match.targets]
    weight = class_logits.new_ones(num_labels + 1)
    weight[-1] = no_object_weight
    logits, labels = class_logits.flatten(0, 1), expected.flatten()
    if total_weight is None:
        return F.cross_entropy(logits, labels, weight)
    return F.cross_entropy(logits, labels, weight, reduction="sum") / total_weight


def mask_loss(logits: Tensor, masks: Tensor, num_instances: float) -> Tensor:
    """Mean binary cross-entropy of each of R masks, summed over masks and divided by the number of instances.

    Args:
        logits: (R, P).
        masks: (R, P), 0 to 1.
        num_instances: as a mask counts in every frame, the loss grows with the number of frames.
    """
    return F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1).sum() / num_instances


def dice_loss(logits: Tensor, masks: Tensor, num_instances: float) -> Tensor:
    """Dice loss (arXiv 1606.04797, smoothed by 1) of each of R masks; arguments and scale as in `mask_loss`."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * masks).sum(1) + 1
    return (1 - overlap / (probabilities.sum(1) + masks.sum(1) + 1)).sum() / num_instances


def loss_norms(
    targets: Sequence[ClipTarget],
    *,
    num_queries: int,
    num_labels: int,
    no_object_weight: float,
    device: torch.device | None = None,
) -> LossNorms:
    """The norms of a batch, known before anything is predicted.

    When `torch.distributed` runs, the batch is that of all workers, and the norms are its own divided by the number of
    workers: the average of the workers' losses is the loss of the whole batch. Every worker must call it then, as often
    as the others. Where a clip has more instances than queries, each query counts as matched to a known class.

    Args:
        targets: of this worker's clips.
        num_queries: Q.
        num_labels: K.
        no_object_weight: weight of class K; the others have 1.
        device: where the workers exchange numbers; None is the CPU.
    """
    count = sum(len(target.labels) for target in targets)
    known = sum(min(int((target.labels < num_labels).sum()), num_queries) for target in targets)
    unknown = len(targets) * num_queries - known
    norms = torch.tensor([count, known + unknown * no_object_weight], dtype=torch.float64)
    if (workers := num_workers()) > 1:
        norms = mean_over_workers(norms.to(device))
    num_instances, class_weight = norms.tolist()
    return LossNorms(max(num_instances, 1 / workers), class_weight)


class VideoMask2FormerLoss:
    """The training loss: every prediction is matched by itself and supervised alike (deep supervision).

    Costs and losses are computed in float32, under autocast too (float64 predictions stay float64). A loss of your own,
    `parts={"loss": ...}`, is made and called with the same arguments.

    Args:
        config: weights and how masks are compared.
        num_labels: classes K of the model.
        matcher: makes a `Matcher` from the arguments of `HungarianMatcher`.
    """

    def __init__(self, config: LossConfig, num_labels: int, matcher: Callable[..., Matcher] = HungarianMatcher) -> None:
        if num_labels < 1:
            raise ConfigError(f"num_labels must be positive, got {num_labels}")
        self.config = config
        self.num_labels = num_labels
        self.matcher = matcher(
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            num_points=config.num_points if config.matching == "points" else None,
        )

    def __call__(
        self,
        output: VideoMask2FormerOutput,
        targets: Sequence[ClipTarget],
        generator: RandomSource = None,
        norms: LossNorms | None = None,
    ) -> LossOutput:
        """Match and compare.

        Args:
            output: of the model; for deep supervision with `output_auxiliary=True`.
            targets: one for each of the B clips, on any device. Masks smaller than the model's input are padded with
                zeros at the bottom and right, as their frames are, and padding is supervised as background. With
                `temporal="per_frame"` every frame is a clip and has its own target.
            generator: where random points come from. Draws are made in this order: for the final prediction, then
                for each other one from the first on: one per clip for matching (1, P, 2), then those of
                `uncertain_points` for the mask losses.
            norms: of the whole batch, where these clips are a part of one; None takes them for all of it.

        Returns:
            Loss, its parts and the matches. Where a clip has more instances than there are queries, the ones that
            cost most stay unmatched. A batch without any instance has mask losses of exactly 0, whose gradients are 0.

        Raises:
            NonFinitePredictionError: a prediction holds NaN or infinite values; the message names it.
            ValueError: no auxiliary predictions, predictions and targets that do not fit together, or a matcher that
                gives no match.
        """
        predictions = _checked_predictions(output, self.num_labels, self.config.deep_supervision)
        last = len(predictions) - 1
        targets = _on_canvas(targets, predictions[last])
        num_instances = max(float(sum(len(target.labels) for target in targets)), 1.0)
        divisors = (num_instances, None) if norms is None else norms
        parts: dict[str, Tensor] = {}
        matches: dict[int, tuple[Match, ...]] = {}
        for index in (last, *range(last)):
            matches[index] = self._match(predictions[index], targets, generator)
            losses = self._losses(predictions[index], targets, matches[index], divisors, generator)
            suffix = "" if index == last else f"_{index}"
            parts |= {name + suffix: loss for name, loss in losses.items()}
        total = torch.stack(tuple(parts.values())).sum()
        return LossOutput(total, parts, tuple(matches[index] for index in range(last + 1)))

    def _match(
        self, prediction: Prediction, targets: Sequence[ClipTarget], generator: RandomSource
    ) -> tuple[Match, ...]:
        matches = []
        for class_logits, mask_logits, target in zip(
            prediction.class_queries_logits, prediction.masks_queries_logits, targets, strict=True
        ):
            with torch.no_grad():
                match = self.matcher(class_logits, mask_logits, target.labels, target.masks, generator)
            if type(self.matcher) is not HungarianMatcher:
                check_match(match, len(class_logits), len(target.labels))
            matches.append(match)
        return tuple(matches)

    def _losses(
        self,
        prediction: Prediction,
        targets: Sequence[ClipTarget],
        matches: Sequence[Match],
        divisors: tuple[float, float | None],
        generator: RandomSource,
    ) -> dict[str, Tensor]:
        """Weighted losses of one prediction."""
        config = self.config
        num_instances, total_weight = divisors
        clips = torch.cat([torch.full_like(match.queries, clip) for clip, match in enumerate(matches)])
        queries = torch.cat([match.queries for match in matches])
        logits = at_least_float32(prediction.masks_queries_logits[clips, queries])  # (N, T, h, w)
        masks = torch.cat([target.masks[match.targets] for target, match in zip(targets, matches, strict=True)])
        logits, masks = self._samples(logits.flatten(0, 1)[:, None], masks.flatten(0, 1)[:, None], generator)
        class_logits = at_least_float32(prediction.class_queries_logits)
        return {
            "loss_ce": config.class_weight
            * class_loss(class_logits, targets, matches, config.no_object_weight, total_weight),
            "loss_mask": config.mask_weight * mask_loss(logits, masks, num_instances),
            "loss_dice": config.dice_weight * dice_loss(logits, masks, num_instances),
        }

    def _samples(self, logits: Tensor, masks: Tensor, generator: RandomSource) -> tuple[Tensor, Tensor]:
        """Where the mask losses look: (R, 1, h, w) logits and (R, 1, H, W) masks -> (R, P) each."""
        if self.config.mask_loss == "masks":
            resized = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)
            return resized.flatten(1), masks.flatten(1)
        points = uncertain_points(
            logits,
            self.config.num_points,
            oversample_ratio=self.config.oversample_ratio,
            importance_sample_ratio=self.config.importance_sample_ratio,
            random=generator,
        )
        return point_sample(logits, points).squeeze(1), point_sample(masks, points).squeeze(1)


class Loss(Protocol):
    """What `VideoMask2FormerLoss` is called as."""

    def __call__(
        self,
        output: VideoMask2FormerOutput,
        targets: Sequence[ClipTarget],
        generator: RandomSource = None,
        norms: LossNorms | None = None,
    ) -> LossOutput:
        """Compare; `parts` of the result has `loss_ce`, `loss_mask` and `loss_dice` where the log is to show them."""
        ...


def build_loss(config: LossConfig, num_labels: int, parts: Mapping[str, Callable[..., Any]]) -> Loss:
    """The loss, or one of your own, with the matcher that it makes.

    Raises:
        ConfigError: something cannot be called as ours is made; or what is made is no loss, or has parameters, which no
            optimiser would know.
    """
    make, matcher = parts.get("loss", VideoMask2FormerLoss), parts.get("matcher", HungarianMatcher)
    _check_takes("loss", make, VideoMask2FormerLoss)
    _check_takes("matcher", matcher, HungarianMatcher)
    loss: Any = make(config=config, num_labels=num_labels, matcher=matcher)
    if not callable(loss):
        raise ConfigError(f"parts['loss'] must make a function of predictions and targets, got {loss!r:.60}")
    if isinstance(loss, torch.nn.Module) and any(True for _ in loss.parameters()):
        raise ConfigError("parts['loss'] has parameters, which are not trained; keep them in a module of the model")
    built: Loss = loss
    return built


def _check_takes(name: str, make: Callable[..., Any], ours: type) -> None:
    """Make sure that what makes a part takes the arguments of ours, which no loss or matcher itself does."""
    arguments = inspect.signature(ours).parameters
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"parts[{name!r}] must be a class or function that makes a {name} from {', '.join(arguments)}: {error}"
        ) from error


def _checked_predictions(
    output: VideoMask2FormerOutput, num_labels: int, deep_supervision: bool
) -> tuple[Prediction, ...]:
    """Those that are supervised, the final one last."""
    if not deep_supervision:
        if output.masks_queries_logits is None:
            raise ValueError("the loss needs the masks of all queries; call decode_clip with output_masks=True")
        predictions: tuple[Prediction, ...] = (Prediction(output.class_queries_logits, output.masks_queries_logits),)
    elif output.auxiliary:
        predictions = output.auxiliary
    else:
        raise ValueError(
            "the loss supervises the predictions at every depth; call the model with output_auxiliary=True"
        )
    last = len(predictions) - 1
    for index, prediction in enumerate(predictions):
        before = f"{last - index} decoder layer{'s' if last - index > 1 else ''} before the end"
        depth = "the final one" if index == last else before
        classes, masks = prediction.class_queries_logits, prediction.masks_queries_logits
        if classes.ndim != 3 or classes.shape[2] != num_labels + 1 or masks.ndim != 5:
            raise ValueError(
                f"prediction {index} ({depth}) must be (B, Q, {num_labels + 1}) and (B, Q, T, h, w) for "
                f"{num_labels} classes, got {tuple(classes.shape)} and {tuple(masks.shape)}"
            )
        for name, tensor in (("class_queries_logits", classes), ("masks_queries_logits", masks)):
            if not tensor.isfinite().all():
                bad = int((~tensor.isfinite()).sum())
                raise NonFinitePredictionError(
                    f"{name} of prediction {index} ({depth}) has {bad} NaN or infinite values of {tensor.numel()}; "
                    "check the input, lower the learning rate, or go back to an earlier checkpoint"
                )
    return predictions


def _on_canvas(targets: Sequence[ClipTarget], prediction: Prediction) -> list[ClipTarget]:
    """The targets on the predictions' device, their masks as floats and padded to the size of the model's input."""
    num_labels = prediction.class_queries_logits.shape[2] - 1
    logits = prediction.masks_queries_logits
    B, _, T, h, w = logits.shape
    H, W = MASK_STRIDE * h, MASK_STRIDE * w
    if len(targets) != B:
        raise ValueError(f"there are {len(targets)} targets for predictions of {B} clips; give one for each")
    padded = []
    for clip, target in enumerate(targets):
        frames, height, width = target.masks.shape[1:]
        if frames != T or height > H or width > W:
            raise ValueError(
                f"target masks of clip {clip} are {frames} frames of {height}x{width}, its predictions {T} frames of "
                f"at most {H}x{W}; masks must be resized like their frames"
            )
        if target.labels.numel() and target.labels.max() > num_labels:
            raise ValueError(
                f"the target of clip {clip} has label {int(target.labels.max())}, the model {num_labels} classes"
            )
        masks = target.masks.to(at_least_float32(logits[:0]))  # once, not at every depth
        padded.append(ClipTarget(target.labels.to(logits.device), F.pad(masks, (0, W - width, 0, H - height))))
    return padded

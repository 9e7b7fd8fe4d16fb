"""One query for each instance: bipartite matching (arXiv 2005.12872, section 3.1; arXiv 2112.01527, section 3.3).

Q queries, n instances, K classes, T frames, h w size of the mask logits, H W size of the target masks, P points,
S samples of a mask: its pixels or points in all frames.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_video.training.point_sampling import RandomSource, point_sample, random_points


class Match(NamedTuple):
    """Pairs of one clip: query `queries[i]` is to predict instance `targets[i]`.

    Both (m,) int64 with m = min(Q, n); `queries` ascends.
    """

    queries: Tensor
    targets: Tensor


def pairwise_class_cost(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each instance's class: (Q, K+1) logits and (n,) labels -> (Q, n)."""
    return -class_logits.softmax(-1)[:, labels]


def pairwise_mask_cost(mask_logits: Tensor, masks: Tensor) -> Tensor:
    """Mean binary cross-entropy of every pair: (Q, S) logits and (n, S) masks -> (Q, n)."""
    # softplus(x) - x * mask is the cross-entropy, and its first term is the same for every mask
    return (F.softplus(mask_logits).sum(-1, keepdim=True) - mask_logits @ masks.T) / mask_logits.shape[1]


def pairwise_dice_cost(mask_logits: Tensor, masks: Tensor) -> Tensor:
    """Dice loss of every pair (arXiv 1606.04797, smoothed by 1): (Q, S) logits and (n, S) masks -> (Q, n)."""
    probabilities = mask_logits.sigmoid()
    total = probabilities.sum(-1, keepdim=True) + masks.sum(-1)
    return 1 - (2 * probabilities @ masks.T + 1) / (total + 1)


@torch.no_grad()
def matching_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    *,
    class_weight: float = 2.0,
    mask_weight: float = 5.0,
    dice_weight: float = 5.0,
    num_points: int | None = 12544,
    random: RandomSource = None,
) -> Tensor:
    """Cost of every pair of query and instance of one clip, in float32 (float64 for float64 logits), without gradient.

    Args:
        class_logits: (Q, K+1).
        mask_logits: (Q, T, h, w).
        labels: (n,) int64, 0 to K.
        masks: (n, T, H, W), covering the same area as `mask_logits`.
        class_weight: weight of the class cost.
        mask_weight: weight of the cross-entropy cost.
        dice_weight: weight of the dice cost.
        num_points: P, compared at the same uniform points in all queries, instances and frames; None compares every
            pixel at the resolution of the logits, where target masks are averages over pixels.
        random: where the points come from, one draw (1, P, 2).

    Returns:
        (Q, n).

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check_shapes(class_logits, mask_logits, labels, masks)
    with torch.autocast(class_logits.device.type, enabled=False):  # the products of pairs would be in half precision
        logits = at_least_float32(mask_logits)
        masks = masks.to(logits)
        if num_points is None:
            masks = F.interpolate(masks, size=logits.shape[-2:], mode="area")
        else:
            points = random_points(1, num_points, logits, random)
            logits, masks = (
                point_sample(maps.flatten(0, 1)[None], points)[0].unflatten(0, maps.shape[:2])  # (Q or n, T, P)
                for maps in (logits, masks)
            )
        logits, masks = logits.flatten(1), masks.flatten(1)  # (Q or n, S)
        return (
            class_weight * pairwise_class_cost(at_least_float32(class_logits), labels)
            + mask_weight * pairwise_mask_cost(logits, masks)
            + dice_weight * pairwise_dice_cost(logits, masks)
        )


def assign(cost: Tensor) -> Match:
    """The pairs of least total cost (the Hungarian method): (Q, n) costs, any of Q and n the larger.

    Raises:
        ValueError: `cost` is not a matrix, or holds NaN or infinite values.
    """
    from scipy.optimize import linear_sum_assignment

    if cost.ndim != 2:
        raise ValueError(f"matching costs must be (Q, n), got {tuple(cost.shape)}")
    if not cost.isfinite().all():
        raise ValueError("matching costs hold NaN or infinite values; the predictions or targets are not finite")
    queries, targets = linear_sum_assignment(cost.detach().cpu().numpy())
    return Match(torch.as_tensor(queries, device=cost.device), torch.as_tensor(targets, device=cost.device))


class Matcher(Protocol):
    """What pairs the predictions of a clip with its instances; `HungarianMatcher` is ours."""

    def __call__(
        self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, random: RandomSource = None
    ) -> Match:
        """Pair.

        Args:
            class_logits: (Q, K+1), of one clip at one depth.
            mask_logits: (Q, T, h, w).
            labels: (n,) int64, 0 to K; K is "no object", which an instance can be trained as.
            masks: (n, T, H, W), covering the same area as `mask_logits`.
            random: where random points come from.

        Returns:
            Each query at most once, in ascending order. An instance may have several queries, or none.
        """
        ...


class HungarianMatcher:
    """One query for each instance, by the least total cost.

    A matcher of your own, `parts={"matcher": ...}`, is made with the same arguments.

    Args:
        class_weight: weight of the class cost.
        mask_weight: weight of the cross-entropy cost.
        dice_weight: weight of the dice cost.
        num_points: at which masks are compared; None compares every pixel.
    """

    def __init__(
        self, *, class_weight: float, mask_weight: float, dice_weight: float, num_points: int | None = None
    ) -> None:
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.num_points = num_points

    def cost(
        self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, random: RandomSource = None
    ) -> Tensor:
        """`matching_cost` by these weights: (Q, n)."""
        return matching_cost(
            class_logits,
            mask_logits,
            labels,
            masks,
            class_weight=self.class_weight,
            mask_weight=self.mask_weight,
            dice_weight=self.dice_weight,
            num_points=self.num_points,
            random=random,
        )

    def __call__(
        self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, random: RandomSource = None
    ) -> Match:
        """As `Matcher`."""
        return assign(self.cost(class_logits, mask_logits, labels, masks, random))


def check_match(match: object, num_queries: int, num_instances: int) -> None:
    """Make sure that what a matcher gave is a match of so many queries and instances.

    Raises:
        ValueError: it is not; the message says why.
    """
    if not isinstance(match, Match):
        raise ValueError(f"the matcher must give a m2f_video.training.Match, got {type(match).__name__}")
    for name, numbers, count in (("queries", match.queries, num_queries), ("targets", match.targets, num_instances)):
        if not isinstance(numbers, Tensor) or numbers.ndim != 1 or numbers.dtype != torch.int64:
            raise ValueError(f"the matcher's {name} must be an int64 tensor (m,), got {numbers!r:.60}")
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
            raise ValueError(f"the matcher's {name} must be 0 to {count - 1}, got {numbers.tolist()!s:.60}")
    if len(match.queries) != len(match.targets) or bool((match.queries.diff() <= 0).any()):
        raise ValueError("the matcher must pair each query at most once, in ascending order, with a target for each")


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32, others as they are."""
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor) -> None:
    if class_logits.ndim != 2 or mask_logits.ndim != 4 or mask_logits.shape[0] != class_logits.shape[0]:
        raise ValueError(
            f"logits must be (Q, K+1) and (Q, T, h, w), got {tuple(class_logits.shape)} and {tuple(mask_logits.shape)}"
        )
    if labels.ndim != 1 or masks.ndim != 4 or masks.shape[:2] != (labels.shape[0], mask_logits.shape[1]):
        raise ValueError(
            f"labels must be (n,) and masks (n, {mask_logits.shape[1]}, H, W) like the logits, "
            f"got {tuple(labels.shape)} and {tuple(masks.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < class_logits.shape[1]:
        raise ValueError(f"labels must be 0 to {class_logits.shape[1] - 1}, got {labels.tolist()}")

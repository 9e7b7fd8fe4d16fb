"""Costs of pairs, and the cheapest pairs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from m2f_video.training.matcher import (
    assign,
    matching_cost,
    pairwise_class_cost,
    pairwise_dice_cost,
    pairwise_mask_cost,
)
from tests.golden_files import GOLDEN
from tests.tolerances import assert_close


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mask_costs_equal_the_original() -> None:
    golden = load_file(GOLDEN / "ops" / "losses.safetensors")
    assert_close(pairwise_mask_cost(golden["logits"], golden["labels_pair"]), golden["pair_ce"])
    assert_close(pairwise_dice_cost(golden["logits"], golden["labels_pair"]), golden["pair_dice"])


def test_class_cost_is_minus_the_probability() -> None:
    logits = normal(4, 3)
    cost = pairwise_class_cost(logits, torch.tensor([2, 0, 2]))
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert_close(cost, -probabilities[:, [2, 0, 2]])


def test_mask_cost_survives_large_logits() -> None:
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]])
    assert_close(pairwise_mask_cost(logits, torch.tensor([[1.0, 0.0]])), torch.tensor([[0.0], [100.0]]))


def squares(dtype: torch.dtype = torch.bool) -> Tensor:
    """(3, 2, 16, 16): three instances, each another quarter of both frames."""
    result = torch.zeros(3, 2, 16, 16, dtype=dtype)
    for instance, (row, column) in enumerate([(0, 0), (0, 8), (8, 0)]):
        result[instance, :, row : row + 8, column : column + 8] = 1
    return result


@pytest.mark.parametrize("num_points", [None, 64])
def test_predictions_that_show_the_instances_are_matched_with_them(num_points: int | None) -> None:
    order = [2, 0, 1]  # query 0 shows instance 2, ...
    mask_logits = F.avg_pool2d(20 * squares(torch.float32)[order] - 10, 4)
    cost = matching_cost(
        torch.zeros(3, 5),
        mask_logits,
        torch.tensor([0, 1, 1]),
        squares(),
        num_points=num_points,
        random=torch.Generator().manual_seed(0),
    )
    match = assign(cost)
    assert match.queries.tolist() == [0, 1, 2]
    assert match.targets.tolist() == order


def test_full_masks_are_compared_at_the_resolution_of_the_logits_without_draws() -> None:
    def never(shape: tuple[int, ...]) -> Tensor:
        raise AssertionError("drew points")

    mask_logits, masks = normal(3, 2, 4, 4), (normal(2, 2, 16, 16, seed=1) > 0).double()
    cost = matching_cost(
        normal(3, 5), mask_logits, torch.tensor([1, 0]), masks, class_weight=0, num_points=None, random=never
    )
    small = masks.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5)).flatten(1)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for query, instance in itertools.product(range(3), range(2)):
        logits, mask = mask_logits[query].flatten(), small[instance]
        overlap = 2 * (logits.sigmoid() * mask).sum() + 1
        dice = 1 - overlap / (logits.sigmoid().sum() + mask.sum() + 1)
        expected[query, instance] = 5 * F.binary_cross_entropy_with_logits(logits, mask) + 5 * dice
    assert_close(cost, expected)


def test_weights_scale_their_costs() -> None:
    inputs = (normal(3, 5), normal(3, 2, 4, 4), torch.tensor([1, 0]), squares()[:2])

    def cost(*weights: float) -> Tensor:
        names = ("class_weight", "mask_weight", "dice_weight")
        return matching_cost(*inputs, **dict(zip(names, weights, strict=True)), num_points=None)

    assert_close(cost(2, 3, 7), 2 * cost(1, 0, 0) + 3 * cost(0, 1, 0) + 7 * cost(0, 0, 1))


def test_costs_are_float32_under_autocast_and_for_half_precision() -> None:
    inputs = (normal(3, 5).float(), normal(3, 2, 4, 4).float(), torch.tensor([1, 0]), squares()[:2])
    expected = matching_cost(*inputs, num_points=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matching_cost(*inputs, num_points=None), expected)
    half = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    cost = matching_cost(*half, num_points=None)
    assert cost.dtype == torch.float32
    assert torch.equal(cost, matching_cost(*(x.float() for x in half[:2]), *half[2:], num_points=None))


@pytest.mark.parametrize(("num_queries", "num_instances"), [(4, 4), (5, 3), (3, 5), (1, 4), (4, 0)])
def test_assignment_is_the_cheapest(num_queries: int, num_instances: int) -> None:
    cost = normal(num_queries, num_instances)
    match = assign(cost)
    pairs = min(num_queries, num_instances)
    assert len(match.queries) == len(match.targets.unique()) == pairs
    assert match.queries.tolist() == sorted(set(match.queries.tolist()))
    cheapest = min(
        sum(float(cost[query, target]) for query, target in zip(queries, targets, strict=True))
        for queries in itertools.combinations(range(num_queries), pairs)
        for targets in itertools.permutations(range(num_instances), pairs)
    )
    assert float(cost[match.queries, match.targets].sum()) == pytest.approx(cheapest, abs=1e-12)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (torch.zeros(3), r"must be \(Q, n\), got \(3,\)"),
        (torch.tensor([[0.0, torch.nan]]), "NaN or infinite"),
        (torch.tensor([[0.0, torch.inf]]), "NaN or infinite"),
    ],
)
def test_costs_that_cannot_be_assigned_are_named(cost: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign(cost)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_logits": torch.zeros(2, 5)}, r"logits must be \(Q, K\+1\) and \(Q, T, h, w\)"),
        ({"mask_logits": torch.zeros(3, 4, 4)}, "logits must be"),
        ({"masks": torch.zeros(3, 1, 16, 16)}, r"masks \(n, 2, H, W\)"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels must be \(n,\)"),
        ({"labels": torch.tensor([0, 5, 1])}, r"0 to 4, got \[0, 5, 1\]"),
        ({"labels": torch.tensor([0, -1, 1])}, "0 to 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changed: dict[str, Tensor], message: str) -> None:
    inputs = {
        "class_logits": torch.zeros(3, 5),
        "mask_logits": torch.zeros(3, 2, 4, 4),
        "labels": torch.tensor([0, 1, 1]),
        "masks": squares(),
    }
    with pytest.raises(ValueError, match=message):
        matching_cost(**(inputs | changed), num_points=8)

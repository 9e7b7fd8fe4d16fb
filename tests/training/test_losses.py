"""The loss: its mathematics, every field of its config, and inputs that are empty, too many or broken."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from m2f_video.config import ConfigError
from m2f_video.modeling.transformer_decoder import Prediction
from m2f_video.modeling.video_mask2former import VideoMask2FormerOutput
from m2f_video.training import ClipTarget, LossConfig, LossOutput, Match, NonFinitePredictionError, VideoMask2FormerLoss
from m2f_video.training.losses import class_loss, dice_loss, mask_loss
from tests.golden_files import GOLDEN
from tests.tolerances import differences

K, Q, T, H, W = 3, 5, 2, 16, 24
MODES = ("points", "masks")
POINTS = LossConfig(num_points=40)
MASKS = LossConfig(matching="masks", mask_loss="masks")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_output(*, clips: int = 2, depths: int = 3, dtype: torch.dtype = torch.float64) -> VideoMask2FormerOutput:
    random = generator(1)
    auxiliary = tuple(
        Prediction(
            torch.randn(clips, Q, K + 1, generator=random, dtype=dtype).requires_grad_(),
            (3 * torch.randn(clips, Q, T, H // 4, W // 4, generator=random, dtype=dtype)).requires_grad_(),
        )
        for _ in range(depths)
    )
    return with_auxiliary(auxiliary)


def with_auxiliary(auxiliary: tuple[Prediction, ...] | None) -> VideoMask2FormerOutput:
    final = tensors(auxiliary[-1]) if auxiliary else (torch.empty(0), None)
    return VideoMask2FormerOutput(*final, torch.empty(0), auxiliary=auxiliary)


def converted(output: VideoMask2FormerOutput, dtype: torch.dtype) -> VideoMask2FormerOutput:
    return with_auxiliary(
        tuple(
            Prediction(*(tensor.detach().to(dtype) for tensor in tensors(prediction)))
            for prediction in output.auxiliary
        )
    )


def tensors(prediction: Prediction) -> tuple[Tensor, Tensor]:
    return prediction.class_queries_logits, prediction.masks_queries_logits


def make_target(num_instances: int, seed: int = 0) -> ClipTarget:
    """Rectangles, different in every frame."""
    random = generator(seed)
    masks = torch.zeros(num_instances, T, H, W, dtype=torch.bool)
    for instance, frame in itertools.product(range(num_instances), range(T)):
        top, left, height, width = (int(torch.randint(2, 9, (), generator=random)) for _ in range(4))
        masks[instance, frame, top : top + height, left : left + width] = True
    return ClipTarget(torch.randint(0, K, (num_instances,), generator=random), masks)


def run(config: LossConfig, output: VideoMask2FormerOutput, targets: list[ClipTarget], seed: int = 0) -> LossOutput:
    return VideoMask2FormerLoss(config, K)(output, targets, generator(seed))


def sum_of(result: LossOutput, name: str) -> Tensor:
    return sum(loss for part, loss in result.parts.items() if part.startswith(name))


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert differences({"all": ours.detach()}, {"all": reference.detach()}) == {}


# ---- the mathematics ----


def test_mask_losses_equal_the_original() -> None:
    golden = load_file(GOLDEN / "ops" / "losses.safetensors")
    for name, function in (("mask", mask_loss), ("dice", dice_loss)):
        logits = golden["logits"].clone().requires_grad_()
        loss = function(logits, golden["labels"], float(golden["num_masks"]))
        assert_close(loss, golden[f"loss_{name}"])
        assert_close(torch.autograd.grad(loss, logits)[0], golden[f"grad_{name}"])


def test_class_loss_is_a_mean_weighted_by_class() -> None:
    logits = make_output().auxiliary[0].class_queries_logits
    targets = [make_target(2), make_target(0)]
    matches = [Match(torch.tensor([1, 4]), torch.tensor([1, 0])), Match(torch.empty(0).long(), torch.empty(0).long())]
    labels = torch.full((2, Q), K)
    labels[0, 1], labels[0, 4] = targets[0].labels[1], targets[0].labels[0]
    weights = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64)[labels]
    negative_log = -logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
    expected = (weights * negative_log).sum() / weights.sum()
    assert_close(class_loss(logits, targets, matches, 0.1), expected)


def test_full_masks_are_compared_at_the_resolution_of_the_input() -> None:
    output, target = make_output(clips=1, depths=1), make_target(3)
    result = run(MASKS, output, [target])
    match = result.matches[0][0]
    logits = F.interpolate(output.auxiliary[0].masks_queries_logits[0, match.queries], size=(H, W), mode="bilinear")
    masks = target.masks[match.targets].double()
    rows = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((2, 3))
    assert_close(
        result.parts["loss_mask"].detach(), (5 * rows.sum() / 3).detach()
    )  # a sum over frames, a mean over instances


def test_every_prediction_is_matched_and_supervised() -> None:
    output = make_output(depths=4)
    result = run(POINTS, output, [make_target(3), make_target(1)])
    suffixes = ("", "_0", "_1", "_2")
    assert set(result.parts) == {f"loss_{name}{suffix}" for name in ("ce", "mask", "dice") for suffix in suffixes}
    assert result.total.shape == ()
    assert_close(result.total, sum(result.parts.values()))
    assert [[len(match.queries) for match in clips] for clips in result.matches] == [[3, 1]] * 4
    for depth, suffix in ((0, "_0"), (3, "")):
        part = sum(
            loss for name, loss in result.parts.items() if name.removeprefix("loss_").strip("cemaskdi") == suffix
        )
        gradients = torch.autograd.grad(
            part,
            [leaf for prediction in output.auxiliary for leaf in tensors(prediction)],
            retain_graph=True,
            allow_unused=True,
        )
        assert [index // 2 for index, gradient in enumerate(gradients) if gradient is not None] == [depth, depth]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_loss(mode: str) -> None:
    output = make_output(depths=1)
    targets = [make_target(2), make_target(1)]
    loss = VideoMask2FormerLoss(LossConfig(num_points=12, matching="masks", mask_loss=mode), K)

    def total(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
        return loss(with_auxiliary((Prediction(class_logits, mask_logits),)), targets, generator()).total

    assert torch.autograd.gradcheck(total, tensors(output.auxiliary[0]), eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_predictions_that_show_the_instances_cost_little(mode: str) -> None:
    masks = torch.zeros(2, T, H, W)
    masks[0, :, :, :12] = masks[1, :, :, 12:] = 1
    logits = 40 * F.avg_pool2d(masks, 4) - 20
    shown = Prediction(20 * F.one_hot(torch.tensor([2, 0]), K + 1).double()[None], logits.double()[None])
    config = LossConfig(num_points=200, importance_sample_ratio=0.0, matching=mode, mask_loss=mode)
    target = ClipTarget(torch.tensor([0, 2]), masks[[1, 0]])
    good = run(config, with_auxiliary((shown,)), [target])
    unsure = Prediction(*(torch.zeros_like(logits) for logits in tensors(shown)))
    assert good.matches[0][0].targets.tolist() == [1, 0]
    assert good.total < 0.15 * run(config, with_auxiliary((unsure,)), [target]).total


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_sums_the_masks_of_its_clips(mode: str) -> None:
    config = LossConfig(num_points=3000, matching="masks", mask_loss=mode, importance_sample_ratio=0.0)
    output, targets = make_output(), [make_target(3), make_target(1)]
    together = run(config, output, targets)
    alone = [
        run(
            config,
            with_auxiliary(tuple(Prediction(*(x[i : i + 1] for x in tensors(p))) for p in output.auxiliary)),
            [t],
        )
        for i, t in enumerate(targets)
    ]
    for name in ("loss_mask", "loss_dice"):
        expected = (3 * sum_of(alone[0], name) + sum_of(alone[1], name)) / 4
        assert sum_of(together, name).item() == pytest.approx(expected.item(), rel=1e-10 if mode == "masks" else 0.05)


def test_the_order_of_instances_does_not_matter() -> None:
    output, target = make_output(clips=1), make_target(4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ClipTarget(target.labels[order], target.masks[order])
    assert_close(run(MASKS, output, [shuffled]).total, run(MASKS, output, [target]).total)


def test_draws_follow_the_generator() -> None:
    output, targets = make_output(), [make_target(3), make_target(1)]
    first, again, other = (run(POINTS, output, targets, seed).total for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_deep_supervision_the_final_prediction_is_supervised_alone() -> None:
    output, targets = make_output(depths=3), [make_target(3), make_target(1)]
    final = dataclasses.replace(POINTS, deep_supervision=False)
    result = run(final, dataclasses.replace(output, auxiliary=None), targets)
    assert set(result.parts) == {"loss_ce", "loss_mask", "loss_dice"}
    assert_close(result.total, run(POINTS, with_auxiliary(output.auxiliary[-1:]), targets).total)
    assert_close(result.total, run(final, output, targets).total)
    assert [len(clips) for clips in result.matches] == [2]
    with pytest.raises(ValueError, match="needs the masks of all queries"):
        run(final, dataclasses.replace(output, auxiliary=None, masks_queries_logits=None), targets)


# ---- few, many and no instances ----


@pytest.mark.parametrize("config", [POINTS, MASKS], ids=MODES)
def test_a_batch_without_instances_has_zero_mask_losses_and_gradients(config: LossConfig) -> None:
    output = make_output()
    result = run(config, output, [make_target(0), make_target(0)])
    for name, loss in result.parts.items():
        assert loss.item() > 0 if name.startswith("loss_ce") else loss.item() == 0
    result.total.backward()
    for prediction in output.auxiliary:
        assert prediction.class_queries_logits.grad.any()
        assert torch.equal(prediction.masks_queries_logits.grad, torch.zeros_like(prediction.masks_queries_logits))


@pytest.mark.parametrize("config", [POINTS, MASKS], ids=MODES)
def test_a_clip_without_instances_beside_others(config: LossConfig) -> None:
    output = make_output()
    result = run(config, output, [make_target(0), make_target(2)])
    result.total.backward()
    assert result.total.isfinite()
    for prediction in output.auxiliary:
        assert not prediction.masks_queries_logits.grad[0].any()
        assert prediction.masks_queries_logits.grad[1].any()


@pytest.mark.parametrize("config", [POINTS, MASKS], ids=MODES)
def test_more_instances_than_queries(config: LossConfig) -> None:
    output = make_output(clips=1)
    result = run(config, output, [make_target(Q + 3)])
    for (match,) in result.matches:
        assert match.queries.tolist() == list(range(Q))
        assert len(match.targets.unique()) == Q
    result.total.backward()
    assert all(leaf.grad.isfinite().all() for prediction in output.auxiliary for leaf in tensors(prediction))


def test_an_instance_trained_as_no_object_still_has_masks() -> None:
    output, target = make_output(clips=1, depths=1), make_target(1)
    result = run(POINTS, output, [ClipTarget(torch.tensor([K]), target.masks)])
    expected = -output.auxiliary[0].class_queries_logits.log_softmax(-1)[0, :, K].mean()
    assert_close(result.parts["loss_ce"], 2 * expected)
    assert result.parts["loss_mask"] > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_smaller_clips_are_padded_as_background(dtype: torch.dtype) -> None:
    output, target = make_output(clips=1), make_target(3)
    small = target.masks[:, :, :13, :17]
    padded = torch.zeros_like(target.masks)
    padded[:, :, :13, :17] = small
    totals = [run(POINTS, output, [ClipTarget(target.labels, masks)]).total for masks in (small.to(dtype), padded)]
    assert torch.equal(*totals)


# ---- precision ----


@pytest.mark.parametrize("config", [POINTS, MASKS], ids=MODES)
def test_autocast_changes_nothing(config: LossConfig) -> None:
    output, targets = converted(make_output(), torch.float32), [make_target(3), make_target(1)]
    expected = run(config, output, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(config, output, targets)
    assert result.total.dtype == torch.float32
    assert torch.equal(result.total, expected.total)


@pytest.mark.parametrize("config", [POINTS, MASKS], ids=MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_have_a_float32_loss(config: LossConfig, dtype: torch.dtype) -> None:
    half, targets = converted(make_output(), dtype), [make_target(3), make_target(1)]
    result = run(config, half, targets)
    assert result.total.dtype == torch.float32
    assert torch.equal(result.total, run(config, converted(half, torch.float32), targets).total)


# ---- the config ----

CHANGES: dict[str, Any] = {
    "class_weight": 3.0,
    "mask_weight": 3.0,
    "dice_weight": 3.0,
    "no_object_weight": 0.3,
    "num_points": 50,
    "oversample_ratio": 2.0,
    "importance_sample_ratio": 0.5,
    "matching": "masks",
    "mask_loss": "masks",
    "deep_supervision": False,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LossConfig)])
def test_every_field_changes_the_loss(field: str) -> None:
    output, targets = make_output(), [make_target(3), make_target(1)]
    changed = dataclasses.replace(POINTS, **{field: CHANGES[field]})
    assert abs(run(changed, output, targets).total - run(POINTS, output, targets).total) > 1e-4


@pytest.mark.parametrize(("weight", "part"), [("class_weight", "ce"), ("mask_weight", "mask"), ("dice_weight", "dice")])
def test_each_weight_scales_its_loss_and_matters_in_matching(weight: str, part: str) -> None:
    output, targets = make_output(depths=20), [make_target(4), make_target(4)]
    names = ("class_weight", "mask_weight", "dice_weight")
    alone = dataclasses.replace(MASKS, **{name: float(name == weight) for name in names})
    single, double = (run(dataclasses.replace(alone, **{weight: value}), output, targets) for value in (1.0, 2.0))
    assert_close(sum_of(double, f"loss_{part}"), 2 * sum_of(single, f"loss_{part}"))
    assert_close(single.total, sum_of(single, f"loss_{part}"))
    without = run(dataclasses.replace(MASKS, **{weight: 0.0}), output, targets)
    assert any(
        not torch.equal(a.targets, b.targets)
        for mine, others in zip(without.matches, run(MASKS, output, targets).matches, strict=True)
        for a, b in zip(mine, others, strict=True)
    )


def test_defaults_are_the_published_ones() -> None:
    assert dataclasses.asdict(LossConfig()) == {
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 5.0,
        "no_object_weight": 0.1,
        "num_points": 12544,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
        "matching": "points",
        "mask_loss": "points",
        "deep_supervision": True,
    }


@pytest.mark.parametrize(
    "bad",
    [
        {"class_weight": -1.0},
        {"mask_weight": float("nan")},
        {"dice_weight": float("inf")},
        {"no_object_weight": 0.0},
        {"num_points": 0},
        {"num_points": 10.5},
        {"oversample_ratio": 0.5},
        {"importance_sample_ratio": 1.1},
        {"importance_sample_ratio": float("nan")},
        {"matching": "pixels"},
        {"mask_loss": "mask"},
    ],
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"LossConfig\.{name} must"):
        LossConfig(**bad)


def test_a_loss_of_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="one of LossConfig's class_weight, mask_weight, dice_weight must be positive"
    ):
        LossConfig(class_weight=0, mask_weight=0, dice_weight=0)
    with pytest.raises(ConfigError, match="num_labels must be positive, got 0"):
        VideoMask2FormerLoss(LossConfig(), 0)


# ---- broken predictions and targets that do not fit ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("depth", "named"), [(0, "2 decoder layers before"), (1, "1 decoder layer before"), (2, "final")]
)
@pytest.mark.parametrize("name", ["class_queries_logits", "masks_queries_logits"])
def test_predictions_that_are_no_numbers_are_named(name: str, depth: int, named: str, value: float) -> None:
    output = converted(make_output(), torch.float64)
    getattr(output.auxiliary[depth], name)[1].flatten()[3:5] = value
    with pytest.raises(NonFinitePredictionError, match=rf"^{name} of prediction {depth} \(.*{named}.*\) has 2 NaN"):
        run(POINTS, output, [make_target(1), make_target(0)])


def test_a_model_called_without_auxiliary_predictions_is_named() -> None:
    with pytest.raises(ValueError, match="output_auxiliary=True"):
        run(POINTS, with_auxiliary(None), [make_target(1)])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([make_target(1)], "1 targets for predictions of 2 clips"),
        ([make_target(1), ClipTarget(torch.zeros(1).long(), torch.zeros(1, T + 1, H, W))], "clip 1 are 3 frames"),
        ([make_target(1), ClipTarget(torch.zeros(1).long(), torch.zeros(1, T, H + 1, W))], "at most 16x24"),
        (
            [make_target(1), ClipTarget(torch.full((1,), K + 1), torch.zeros(1, T, H, W))],
            "label 4, the model 3 classes",
        ),
    ],
)
def test_targets_that_do_not_fit_are_named(targets: list[ClipTarget], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(POINTS, make_output(), targets)


def test_predictions_of_another_number_of_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"prediction 0 \(2 .* before the end\) must be \(B, Q, 5\).*for 4 classes"):
        VideoMask2FormerLoss(POINTS, K + 1)(make_output(), [make_target(1), make_target(1)])

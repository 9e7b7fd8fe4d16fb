"""Parameter groups, learning rates and the average of the weights."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from m2f_video import VideoMask2Former
from m2f_video.training import OptimConfig
from m2f_video.training.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    update_average,
)
from tests.training.tiny_run import MODEL

NOT_DECAYED = re.compile(
    r"backbone\.(patch_embed\.norm|out_norms\.\d|stages\.\d\.(blocks\.\d\.norm[12]|downsample\.norm))\.(weight|bias)"
    r"|backbone\.stages\.\d\.blocks\.\d\.attn\.relative_position_bias_table"
    r"|pixel_decoder\.(input_projections\.\d|lateral_conv|output_conv)\.1\.(weight|bias)"
    r"|pixel_decoder\.layers\.\d\.(self_attn|ffn)_norm\.(weight|bias)"
    r"|transformer_decoder\.(norm|layers\.\d\.(cross_attn|self_attn|ffn)_norm)\.(weight|bias)"
    r"|transformer_decoder\.(query_features|query_positions|level_embed)\.weight"
)
CONFIG = OptimConfig(weight_decay=0.3, backbone_factor=0.2)


def grouped(model: nn.Module) -> dict[str, tuple[object, object]]:
    """Weight decay and factor of the learning rate by parameter; each parameter must be in one group alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[object, object]] = {}
    for group in parameter_groups(model, CONFIG):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group["weight_decay"], group["lr_factor"]
    return found


def test_groups_are_the_papers() -> None:
    model = VideoMask2Former(MODEL)
    expected = {
        name: (0.0 if NOT_DECAYED.fullmatch(name) else 0.3, 0.2 if name.startswith("backbone.") else 1.0)
        for name, _ in model.named_parameters()
    }
    found = grouped(model)
    assert found == expected
    assert found["pixel_decoder.level_embed"] == found["transformer_decoder.class_head.bias"] == (0.3, 1.0)
    assert sum(decay == 0 for decay, _ in found.values()) == 36 + 31  # backbone, decoders


def test_groups_of_a_timm_backbone() -> None:
    model = VideoMask2Former(MODEL.replace(backbone="timm:test_resnet"))
    found = {name: value for name, value in grouped(model).items() if name.startswith("backbone.")}
    norms = {
        name for name, module in model.backbone.named_modules(prefix="backbone") if isinstance(module, nn.BatchNorm2d)
    }
    assert len(norms) == 15
    assert found == {
        name: (0.0 if name.rpartition(".")[0] in norms else 0.3, 0.2)
        for name, _ in model.named_parameters()
        if name.startswith("backbone.")
    }


def test_other_norms_and_frozen_parameters() -> None:
    model = nn.ModuleDict(
        {
            "instance": nn.InstanceNorm2d(3, affine=True),
            "rms": nn.RMSNorm(3),
            "sync": nn.SyncBatchNorm(3),
            "backbone_like": nn.Linear(2, 2),
        }
    )
    model["backbone_like"].bias.requires_grad_(False)
    assert grouped(model) == {
        "instance.weight": (0.0, 1.0),
        "instance.bias": (0.0, 1.0),
        "rms.weight": (0.0, 1.0),
        "sync.weight": (0.0, 1.0),
        "sync.bias": (0.0, 1.0),
        "backbone_like.weight": (0.3, 1.0),
    }


def test_a_parameter_of_two_modules_is_in_one_group() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "norm": nn.RMSNorm(2), "second": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    model["norm"].weight = model["first"].bias
    assert grouped(model) == dict.fromkeys(("first.weight", "first.bias", "second.bias"), (0.3, 1.0))
    build_optimizer(model, CONFIG)  # PyTorch takes none that repeats


class Wrapper(nn.Module):
    """Keeps a model under another name, as `DistributedDataParallel` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda model: Wrapper(torch.compile(model))])
def test_a_wrapped_model_has_the_same_groups(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = VideoMask2Former(MODEL)
    expected = parameter_groups(model, CONFIG)
    assert parameter_groups(wrap(model), CONFIG) == expected
    model.backbone.compile()
    model.backbone = torch.compile(model.backbone)
    assert [group["lr_factor"] for group in parameter_groups(model, CONFIG)] == [0.2, 0.2, 1.0, 1.0]


def test_the_optimizer_has_the_groups_and_takes_rates() -> None:
    model = VideoMask2Former(MODEL)
    optimizer = build_optimizer(model, CONFIG)
    assert {(group["lr_factor"], group["lr"]) for group in optimizer.param_groups} == {(0.2, 2e-5), (1.0, 1e-4)}
    set_learning_rate(optimizer, 1e-3)
    assert {(group["weight_decay"], group["lr"]) for group in optimizer.param_groups} == {
        (0.3, 2e-4),
        (0.0, 2e-4),
        (0.3, 1e-3),
        (0.0, 1e-3),
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_loop_and_a_schedule_of_ones_own_have_each_groups_rate() -> None:
    model = VideoMask2Former(MODEL)
    optimizer = build_optimizer(model, CONFIG)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # the first of AdamW moves each weight by its rate, beside the decay
    schedule.step()
    for name, parameter in model.named_parameters():
        distance = float((before[name] - parameter.detach()).abs().median())
        assert distance == pytest.approx(2e-5 if name.startswith("backbone.") else 1e-4, rel=0.3)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([2e-6, 2e-6, 1e-5, 1e-5])


def test_steps_of_the_learning_rate() -> None:
    config = OptimConfig(learning_rate=2.0, milestones=(3, 5), gamma=0.5)
    assert [learning_rate(config, step, 7) for step in range(7)] == [2, 2, 2, 1, 1, 0.5, 0.5]


def test_cosine() -> None:
    config = OptimConfig(learning_rate=2.0, schedule="cosine", milestones=(1,))
    rates = [learning_rate(config, step, 4) for step in range(5)]
    assert rates == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0])


def test_warmup_rises_to_what_the_schedule_says() -> None:
    config = OptimConfig(learning_rate=2.0, milestones=(2,), gamma=0.5, warmup_steps=4)
    assert [learning_rate(config, step, 9) for step in range(6)] == [0.5, 1, 0.75, 1, 1, 1]


def test_the_average_follows_the_weights() -> None:
    model, average = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    expected = 1.0
    for step in range(40):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
            model.num_batches_tracked.fill_(step)
        update_average(average.state_dict(), model, 0.7, step)
        kept = min(0.7, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * step
    assert average.weight.item() == pytest.approx(expected)
    assert average.weight.item() == pytest.approx(39 - 0.7 / 0.3, rel=1e-3)  # how far an average lags behind a line
    assert average.running_mean.item() == pytest.approx(-expected, abs=1e-2)
    assert average.num_batches_tracked.item() == 39
    assert model.weight.item() == 39

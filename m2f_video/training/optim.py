"""Optimiser, learning rate and weight averaging (arXiv 2112.01527, section 4.1; arXiv 2112.10764, section 4.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from m2f_video.checked_config import CheckedConfig, check_fields

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms of timm backbones
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(CheckedConfig):
    """How weights are updated; the defaults are the published recipe for YouTubeVIS 2019.

    Raises:
        ConfigError: a field is out of its range; the message names it.
    """

    learning_rate: float = 1e-4
    """Of AdamW, before schedule and backbone factor."""
    backbone_factor: float = 0.1
    """Learning rate of the backbone over that of the rest; 1 suits a backbone that starts from random weights."""
    weight_decay: float = 0.05
    """Of AdamW; norms, embeddings and relative position biases have none."""
    clip_norm: float = 0.01
    """Largest norm of all gradients together; larger ones are scaled down to it. 0 does not clip."""
    schedule: Literal["step", "cosine"] = "step"
    """`step` multiplies the learning rate by `gamma` at each milestone; `cosine` lowers it to 0 over the run."""
    milestones: tuple[int, ...] = (4000,)
    """Steps at which `step` lowers the learning rate."""
    gamma: float = 0.1
    """Factor at each milestone."""
    warmup_steps: int = 0
    """Steps over which the learning rate first rises, linearly from 0."""
    ema_decay: float = 0.0
    """Share of its past that the moving average of the weights keeps at each step (early in the run less); 0 keeps no
    average. Where there is one, it is what is evaluated and what is left at the end."""

    def _check(self) -> None:
        check_fields(self, "must be positive", lambda value: value > 0, "learning_rate", "milestones")
        not_negative = ("backbone_factor", "weight_decay", "clip_norm", "warmup_steps")
        check_fields(self, "must not be negative", lambda value: value >= 0, *not_negative)
        check_fields(self, "must be in (0, 1]", lambda value: 0 < value <= 1, "gamma")
        check_fields(self, "must be in [0, 1)", lambda value: 0 <= value < 1, "ema_decay")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """The paper's groups: backbone or not, decayed or not.

    Parameters of norms, of `nn.Embedding` and relative position bias tables are not decayed; biases of other layers and
    the pixel decoder's level embedding (a plain parameter) are, as in the original. A parameter that several modules
    share is what the first of them makes of it.

    Args:
        model: as it is, compiled, or wrapped, as by `DistributedDataParallel`.
        config: weight decay and learning rates.

    Returns:
        For an optimiser: up to four groups with `params`, `weight_decay`, `lr`, and `lr_factor`, the learning rate of
        the group over the run's.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    grouped: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in grouped:
                continue
            grouped.add(parameter)
            in_backbone = "backbone" in prefix.split(".")  # wrappers put names of their own before and after
            decayed = not isinstance(module, (*_NORMS, nn.Embedding)) and name != "relative_position_bias_table"
            groups.setdefault((in_backbone, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr": config.learning_rate * (config.backbone_factor if in_backbone else 1.0),
            "lr_factor": config.backbone_factor if in_backbone else 1.0,
        }
        for (in_backbone, decayed), parameters in groups.items()
    ]


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 0: it depends on nothing else, so a schedule has no state."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(step / num_steps, 1)))
    else:
        rate *= config.gamma ** sum(step >= milestone for milestone in config.milestones)
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    return rate


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the paper's parameter groups, each with its learning rate; a schedule is the caller's."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.learning_rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the run's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Move an average of a model's weights towards what they are after a step.

    Args:
        average: of the model's state dict, changed in place. Buffers such as running statistics are averaged too; what
            is not floating point is copied.
        model: the model.
        decay: share of the past that is kept; at most (1 + step) / (10 + step), so that the first weights fade fast.
        step: counted from 0.
    """
    kept = min(decay, (1 + step) / (10 + step))
    state: dict[str, Tensor] = model.state_dict()
    for name, mean in average.items():
        if mean.is_floating_point():
            mean.lerp_(state[name], 1 - kept)
        else:
            mean.copy_(state[name])

"""What operators that know only values, and no derivatives, ask before they take the place of PyTorch's."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the derivative by one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def only_values(*tensors: Tensor) -> bool:
    """Whether nothing but values is asked for: no derivatives of any kind, no autocast, no tracing, no compiling."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return not (needs_gradient(*tensors) or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`, hooks on all modules included."""
    own = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(own) or _has_any_global_hook()

"""Acceleration for the length of a call, and for good."""

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from types import FunctionType, MethodType
from typing import Literal, TypeVar, cast

from torch import nn

from m2f_video.acceleration import cpu_kernels, swap
from m2f_video.acceleration.swap import Fused, ModuleReport, fuse, restore
from m2f_video.acceleration.twins import TWINS

Model = TypeVar("Model", bound=nn.Module)

Compile = Literal["auto", "kernels", "none"]

_LOGGER = logging.getLogger(__name__)
_LOCK = Lock()
_users: dict[nn.Module, int] = {}
"""Of each twin that is in place for the length of calls: how many calls."""


@contextmanager
def accelerated(model: Model, plain: bool = False) -> Iterator[Model]:
    """A model in evaluation mode, with twins in place; the user's own is as it was afterwards.

    Twins are put into the model itself, so that hooks and references see its own modules. Calls at a time, of several
    threads too, share them: the first puts a twin in place, the last takes it out. What wants gradients meanwhile runs
    plain. A model that has modules in training mode is not switched under whoever trains it: what is given then is a
    copy of its modules in evaluation mode, with the same weights; what modules store as they run is stored there.

    Args:
        model: on any device, in any mode; twins are for a CPU.
        plain: no twins, evaluation mode alone. Of a model that has twins in place, it is such a copy, too.
    """
    if any(module.training or (plain and isinstance(module, Fused)) for module in model.modules()):
        model = in_evaluation_mode(model)
    twins = () if plain else _twins(model)
    with _LOCK:
        mine: list[nn.Module] = [module for module in model.modules() if module in _users]
        if twins and not mine:
            before = {module for module in model.modules() if isinstance(module, Fused)}  # prepared: they stay
            try:
                mine = [twin for twin in fuse(model, twins) if twin not in before]
            except BaseException:  # interrupted, too: packing takes a while
                restore(*(module for module in model.modules() if module not in before))
                raise
        for twin in mine:
            _users[twin] = _users.get(twin, 0) + 1
    try:
        yield model
    finally:
        with _LOCK:
            for twin in mine:
                if twin in _users:  # or it was prepared meanwhile, and stays
                    _users[twin] -= 1
                    if not _users[twin]:
                        del _users[twin]
                        restore(twin)


def in_evaluation_mode(model: Model) -> Model:
    """A copy of a model's modules in evaluation mode, without twins, that has the same weights, hooks and patches.

    A patch that is a method is bound to the copy. Any other may hold modules of the model, which nobody can exchange
    there: it runs them as they are, and a line says so. What `torch.compile` made of a module is left out.
    """
    copies: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if "_orig_mod" in module._modules:
            continue
        twin = copies[module] = copy.copy(module)
        twin.__dict__.update({name: dict(twin.__dict__[name]) for name in ("_parameters", "_buffers")}, training=False)
        for name, patch in module.__dict__.items():
            if isinstance(patch, MethodType) and patch.__self__ is module:
                twin.__dict__[name] = MethodType(patch.__func__, twin)
            elif module.training and callable(patch) and _holds_a_module(patch):
                _say_once(
                    f"m2f-video: {name} of a {type(module).__name__} is a function or object of its own, and may run "
                    "modules in training mode, with dropout; call model.eval() first"
                )
    compiled = [module for module in model.modules() if module not in copies]
    all_copies = copies | {module: copies[cast("nn.Module", module._orig_mod)] for module in compiled}
    for module, twin in copies.items():
        twin.__dict__["_modules"] = {
            name: None if child is None else all_copies[child] for name, child in module._modules.items()
        }
    return cast("Model", all_copies[model])


def _holds_a_module(patch: object) -> bool:
    """Whether a function or object runs a module, or a method of one, that it has kept."""
    kept = list(getattr(patch, "__dict__", {}).values())
    if isinstance(patch, FunctionType):
        variables = inspect.getclosurevars(patch).nonlocals
        kept += [*variables.values(), *(patch.__defaults__ or ()), *(patch.__kwdefaults__ or {}).values()]
    return any(isinstance(getattr(value, "__self__", value), nn.Module) for value in (patch, *kept))


def prepare(model: nn.Module, compile: Compile = "auto") -> None:
    """Put twins in place for good, see `VideoMask2Former.prepare_for_inference`."""
    with _LOCK:
        for twin in fuse(model, _twins(model, compile)):
            _users.pop(twin, None)  # calls that are under way leave it in place


def release(model: nn.Module) -> None:
    """Take all twins out."""
    with _LOCK:
        restore(*model.modules())


def report(model: nn.Module) -> list[ModuleReport]:
    """Which modules run fused, which plain and why: all that have a twin, and others that have weights of their own."""
    return swap.report(model, TWINS)


def _twins(model: nn.Module, compile: Compile = "auto") -> tuple[type[Fused], ...]:
    """Those that run here: all where kernels compile, else those that need none; none elsewhere than on a CPU."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if device != "cpu":
        return ()
    if compile == "kernels":
        cpu_kernels.load()
    if compile == "kernels" or (compile == "auto" and _kernels_load()):
        return TWINS
    return tuple(twin for twin in TWINS if not twin.needs_kernels)


def _kernels_load() -> bool:
    """Whether they do; where not, a line says so once."""
    reason = cpu_kernels.why_no_kernels()
    if reason is None:
        try:
            cpu_kernels.load()
        except cpu_kernels.KernelError as error:
            reason = str(error)
    if reason is not None:
        _say_once(f"m2f-video: going on without compiled kernels, by oneDNN: {reason}")
    return reason is None


@cache
def _say_once(message: str) -> None:
    _LOGGER.warning(message)

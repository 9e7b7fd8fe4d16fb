"""Put fused twins in the place of plain modules, and take them out again.

A twin is a subclass of a plain module that has the same parameters and another way to compute. It is put in place by
changing the class of the module, so that parameters, names, references and the state dict stay. A twin stands for one
exact computation: that of its plain module and of the parts inside as they are written in `m2f_video.modeling`. What
anybody replaced, subclassed, hooked, patched, pruned or parametrised stays plain. So does what is touched while a twin
is in place, from the next call on: each call looks first whether everything is as it was when the twin was put there.

Four changes are not noticed: writing to the memory of a weight behind PyTorch's back (`weight.data.mul_(2)`, NumPy
views), until `accelerated` or `prepare_for_inference` is next called; such writing that leaves the sum of the weight's
bit patterns as it was, as exchanging rows does, ever; patches of PyTorch's own functions (`F.linear`); and names of
Python's own (`zip`) put into a module of ours.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, MappingProxyType
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from m2f_video.acceleration import cpu_kernels
from m2f_video.acceleration.written_for import Function, changed, functions_of

State = Literal["fused", "oneDNN", "plain"]
_CALL = nn.Module.__call__


class Fused(nn.Module):
    """What twins share. Subclass it together with the plain module: `class FusedX(Fused, X)`."""

    plain: ClassVar[type[nn.Module]]
    needs_kernels: ClassVar[bool] = True
    state: ClassVar[State] = "fused"
    parts: ClassVar[Mapping[str, type[nn.Module]]] = {}
    """Exact types of the modules inside whose work the twin does too, by name."""
    types: ClassVar[tuple[type, ...]] = ()
    """Types of arguments whose methods and properties the twin stands for."""

    @classmethod
    def functions(cls) -> list[Function]:
        """All of ours whose work the twin does."""
        return functions_of((cls.plain, *cls.parts.values()), cls.types)

    @classmethod
    def called(cls, module: Any) -> Mapping[str, type[nn.Module]]:
        """Exact types of modules inside, by name, which the twin calls and which must be as they are all the same."""
        return {}

    @classmethod
    def misfit(cls, module: Any) -> str | None:
        """Why the twin does not know a module of these sizes; None where it does."""
        return None

    def pack(self) -> Any:
        """What the twin reads instead of weights."""
        return None

    def takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        """Whether the twin knows these arguments of `forward`; the plain module takes the others, or refuses them."""
        return not kwargs and len(args) == 1 and are_values(dtype, *args)

    def _takes(self, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> bool:
        try:
            return self.takes(dtype, *args, **kwargs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False  # what is not even like arguments of `forward`, which says what is wrong with it

    def fused(self, packed: Any, *args: Any, **kwargs: Any) -> Any:
        """The plain module's `forward`, otherwise."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the plain module, by the twin where everything is as it was when that was put in place."""
        seal: Seal | None = self.__dict__.get("_seal")
        if seal is not None:
            if seal.holds(self) and self._takes(seal.dtype, *args, **kwargs):
                return self.fused(seal.packed, *args, **kwargs)
            if seal.learns():  # what an optimiser in C++ then does to the weights is not counted by all of them
                self.__dict__.pop("_seal", None)
        return self.plain.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain."""
        reduced: Any = super().__reduce_ex__(protocol)
        return object.__new__, (self.plain,), *reduced[2:]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_seal"}


def are_values(dtype: torch.dtype | None, *tensors: Tensor | None) -> bool:
    """Whether these are numbers of this type (None: of any) on a CPU, of which nobody asks for derivatives."""
    return all(
        tensor is None
        or (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype in ((dtype,) if dtype else cpu_kernels.DTYPES)
            and tensor.device.type == "cpu"
            and tensor.layout is torch.strided
            and tensor.numel() > 0
            and not (tensor.requires_grad and torch.is_grad_enabled())
        )
        for tensor in tensors
    )


@dataclass(frozen=True, eq=False)
class Seal:
    """How everything was when a twin was put in place, and what it has packed.

    Attributes:
        packed: of `Fused.pack`.
        dtype: of the weights; None where there are none.
        functions: whose work the twin does, and what these name: where each is found, its name there, itself, and for a
            function what is behind it and its code.
        methods: names of those that are methods, which nobody may have patched on a module.
        parts: modules inside: where each is found, its name there, itself, its plain type, and how many are in it.
        settings: numbers, names, sizes and what is None: where each is found, its name there, and its value.
        tensors: weights and buffers: where each is found, its name there, itself, its address and version.
        memory: of these tensors, kept so that no other gets its address.
        bits: sum of the weights' bit patterns.
    """

    packed: Any
    dtype: torch.dtype | None
    functions: tuple[tuple[Mapping[str, Any], str, Any, Any, CodeType | None], ...]
    methods: frozenset[str]
    parts: tuple[tuple[Mapping[str, Any], str, nn.Module, type[nn.Module], int], ...]
    settings: tuple[tuple[Mapping[str, Any], str, Any], ...]
    tensors: tuple[tuple[Mapping[str, Any], str, Tensor, int, int], ...]
    memory: tuple[Tensor, ...]
    bits: int

    def holds(self, module: nn.Module) -> bool:
        """Whether all of that is as it was, and values are all that is asked for: no derivatives, no tracing."""
        if asked_for_more() or torch.is_autocast_enabled("cpu"):
            return False
        learns = torch.is_grad_enabled()
        for place, name, tensor, address, version in self.tensors:
            if place.get(name) is not tensor or tensor.data_ptr() != address or tensor._version != version:
                return False
            if learns and tensor.requires_grad:
                return False
        for place, name, value, function, code in self.functions:
            if place.get(name) is not value or (function is not None and function.__code__ is not code):
                return False
        for place, name, setting in self.settings:
            if place.get(name) != setting:
                return False
        for place, name, part, kind, length in self.parts:
            if place.get(name) is not part or len(part._modules) != length:
                return False
            if not _is_untouched(part, kind, self.methods):
                return False
        return not (_patched(module, self.methods) or (module.training and _drops(module)))

    def learns(self) -> bool:
        """Whether a call now is part of learning these weights."""
        wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return wanted and any(tensor.requires_grad for _, _, tensor, _, _ in self.tensors)


def asked_for_more() -> str | None:
    """What is asked for beside values, or who looks at every call of the process; None where there is nothing."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "the call is being compiled"
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None:
        return "operators are being recorded or transformed"  # maybe on tensors without memory
    if forward_ad._current_level >= 0:
        return "derivatives are asked for"
    if _has_any_global_hook():
        return "there are hooks on all modules"
    return "a mode looks at all calls of PyTorch's functions" if _has_function_mode() else None


def _has_function_mode() -> bool:
    """Whether somebody looks at calls of PyTorch's functions, or does them otherwise."""
    if not torch._C._len_torch_function_stack():
        return False
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _patched(module: nn.Module, methods: frozenset[str]) -> bool:
    """Whether a module itself has one of these methods, beside its class."""
    return not module.__dict__.keys().isdisjoint(methods)


def _is_untouched(part: nn.Module, kind: type[nn.Module], methods: frozenset[str]) -> bool:
    """Whether a call of a part is the forward of this type, and drops nothing."""
    if type(part) is not kind and not (isinstance(part, Fused) and part.plain is kind):
        return False
    if kind.__call__ is not _CALL:
        return False
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return False
    if part.training and _drops(part):
        return False
    return not _patched(part, methods)


def _drops(part: nn.Module) -> bool:
    """Whether a module drops something in training, by its own account."""
    rates = (getattr(part, name, 0) for name in ("p", "drop_prob", "dropout"))
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def refusal(module: nn.Module, twin: type[Fused]) -> str | None:
    """Why a twin may not take the place of a module; None where it may."""
    return difference(module, twin) or _unfit_tensors(module, twin) or twin.misfit(module)


def difference(module: nn.Module, twin: type[Fused]) -> str | None:
    """What of a module is not as it is written, and so not what a twin stands for; None where all is."""
    if not _is_type(module, twin.plain):
        return f"it is a {type(module).__name__}"
    functions = twin.functions()
    methods = _methods(functions)
    if patched := sorted(methods & module.__dict__.keys()):
        return f"its {patched[0]} is patched"
    inside = {**twin.parts, **twin.called(module)}
    for name, kind in inside.items():
        part = _find(module, name)
        if part is None or not _is_type(part, kind):
            return f"{name} is a {type(part).__name__}"
        if not _is_untouched(part, kind, methods):
            return f"{name} is {'dropping' if part.training and _drops(part) else 'hooked or patched'}"
        if isinstance(part, nn.Sequential | nn.ModuleList):
            known = [other for other in inside if other.rpartition(".")[0] == name]
            if len(part) != len(known):
                return f"{name} has {len(part)} layers, not {len(known)}"
    return next((reason for function in functions if (reason := changed(function))), None)


def _methods(functions: list[Function]) -> frozenset[str]:
    return frozenset(function.name for function in functions if isinstance(function.place, MappingProxyType))


def _unfit_tensors(module: nn.Module, twin: type[Fused]) -> str | None:
    tensors = {
        f"{name}.{own}".lstrip("."): tensor
        for name in ("", *twin.parts)
        for place in ((_find(module, name) or module)._parameters, (_find(module, name) or module)._buffers)
        for own, tensor in place.items()
        if tensor is not None
    }
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}"
        if tensor.is_inference():
            return f"{name} was made in inference mode, in which changes are not counted"
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            return f"{name} is not contiguous"
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        return "its weights differ in type"
    for dtype in dtypes - set(cpu_kernels.DTYPES):
        return f"twins are for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _is_type(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind or (isinstance(module, Fused) and module.plain is kind)


def _find(module: nn.Module, name: str) -> nn.Module | None:
    for step in filter(None, name.split(".")):
        child = module._modules.get(step)
        if child is None:
            return None
        module = child
    return module


def fuse(module: nn.Module, twins: Sequence[type[Fused]]) -> list[Fused]:
    """Put twins in the place of a module, or of those inside it, the outermost first; give all that are in place.

    Args:
        module: looked into as deep as it goes.
        twins: that may be put; of several for one type the first that may.
    """
    if _is_compiled(module):
        restore(*module.modules())
        return []
    for twin in twins:
        if twin.plain is plain_type(module) and refusal(module, twin) is None:
            others = [other for child in _others(module, twin) for other in fuse(child, twins)]
            return [_put(module, twin), *others]
    restore(module)
    return [twin for child in module.children() for twin in fuse(child, twins)]


def _others(module: nn.Module, twin: type[Fused], path: str = "") -> Iterator[nn.Module]:
    """The modules inside whose work a twin leaves to them."""
    for name, child in module.named_children():
        if path + name in twin.parts:
            restore(child)
            yield from _others(child, twin, f"{path}{name}.")
        else:
            yield child


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` works on a module, which would compile all of it anew if a class inside it changed."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Of a module, whether a twin is in its place or not."""
    return module.plain if isinstance(module, Fused) else type(module)


def _put(module: nn.Module, twin: type[Fused]) -> Fused:
    """Change the class of a module and seal it, unless it is sealed already and that holds, weights' bits included."""
    old: Seal | None = module.__dict__.get("_seal") if type(module) is twin else None
    links = tuple(_links(module, twin))
    inside = [module, *(cast("nn.Module", _find(module, name)) for name in twin.parts)]
    tensors = tuple(_tensors(inside))
    bits = _bits(tensor for _, _, tensor, _, _ in tensors)
    if old is not None and old.bits == bits and old.holds(module):
        return cast("Fused", module)
    module.__class__ = twin
    module = cast("Fused", module)
    with torch.no_grad(), torch.inference_mode(False):
        packed = module.pack()
    functions = twin.functions()
    module.__dict__["_seal"] = Seal(
        packed,
        dtype=next((tensor.dtype for _, _, tensor, _, _ in tensors if tensor.is_floating_point()), None),
        functions=tuple((each.place, each.name, each.value, each.function, each.code) for each in functions),
        methods=_methods(functions),
        parts=links,
        settings=tuple(_settings(inside)),
        tensors=tensors,
        memory=tuple(tensor.detach() for _, _, tensor, _, _ in tensors),
        bits=bits,
    )
    return module


def _tensors(modules: list[nn.Module]) -> Iterator[tuple[Mapping[str, Any], str, Tensor, int, int]]:
    for part in modules:
        for place in (part._parameters, part._buffers):
            for name, tensor in place.items():
                if tensor is not None:
                    yield place, name, tensor, tensor.data_ptr(), tensor._version


def _settings(modules: list[nn.Module]) -> Iterator[tuple[Mapping[str, Any], str, Any]]:
    for part in modules:
        for name, value in part.__dict__.items():
            if isinstance(value, int | float | str | tuple) and name != "training":
                yield part.__dict__, name, value
        for place in (part._parameters, part._buffers):
            for name, tensor in place.items():
                if tensor is None:
                    yield place, name, None


def _links(
    module: nn.Module, twin: type[Fused]
) -> Iterator[tuple[Mapping[str, Any], str, nn.Module, type[nn.Module], int]]:
    for name, kind in {**twin.parts, **twin.called(module)}.items():
        *above, last = name.split(".")
        parent = cast("nn.Module", _find(module, ".".join(above)))
        part = cast("nn.Module", parent._modules[last])
        yield parent._modules, last, part, kind, len(part._modules)


def _bits(tensors: Iterator[Tensor]) -> int:
    """Sum of the bit patterns of tensors, which any single change changes."""
    total = 0
    for tensor in tensors:
        numbers = tensor.detach().flatten()
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]
        total += int(numbers.view(kind).sum(dtype=torch.int64))
    return total


def restore(*modules: nn.Module) -> None:
    """Give the twins among these modules, not those inside them, their plain class back."""
    for module in modules:
        if isinstance(module, Fused):
            module.__dict__.pop("_seal", None)
            module.__class__ = module.plain  # type: ignore[assignment]


@dataclass(frozen=True)
class ModuleReport:
    """Whether a module runs fused.

    Attributes:
        name: in the model.
        type: name of its plain class.
        state: "fused", "oneDNN", or "plain".
        reason: why it is plain; empty where it is not.
    """

    name: str
    type: str
    state: State
    reason: str = ""


def report(model: nn.Module, twins: Sequence[type[Fused]]) -> list[ModuleReport]:
    """Every module that a twin is known for, or whose weights no twin outside covers; the outermost first."""
    rows: list[ModuleReport] = []
    covered: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if module in covered:
            continue
        kind = plain_type(module)
        if isinstance(module, Fused):
            seal: Seal | None = module.__dict__.get("_seal")
            touched = seal is None or not seal.holds(module)
            if touched:
                rows.append(ModuleReport(name, kind.__name__, "plain", "it was touched since"))
            else:
                rows.append(ModuleReport(name, kind.__name__, module.state))
                covered.update(cast("nn.Module", _find(module, part)) for part in module.parts)
            continue
        known = [twin for twin in twins if issubclass(kind, twin.plain)]
        if known:
            reasons = [reason for twin in known if (reason := refusal(module, twin))]
            rows.append(ModuleReport(name, kind.__name__, "plain", reasons[0] if reasons else "not accelerated"))
        elif any(True for _ in module.parameters(recurse=False)):
            rows.append(ModuleReport(name, kind.__name__, "plain", "there is no twin for it"))
    return rows

"""Taps: what the modules of a model compute, and what no `forward` returns, by name and without a change of results.

    with model.capture("transformer_decoder.layers.*.cross_attn", "*.sampling_locations") as taps:
        segment_video(model, "cars.mp4")
    taps["transformer_decoder.layers.3.cross_attn"]

A name is that of a module, for its output, or that of a module and one of `INTERNALS`. All is caught by hooks, and
for the length of a module's call by a mode that looks at the calls of attention in it: as it is called, by whatever
module, so that an edited one is seen as it is. Hooks keep fused twins away from a module as they always do, and the
rest fused.

B clips, F frames, T frames of a clip, Q queries, S keys, M heads, L levels, P points, N tokens.
"""

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from m2f_video.modeling import cross_attention
from m2f_video.modeling.cross_attention import Attention, MaskPooling
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.modeling.swin import WindowAttention
from m2f_video.ops import ms_deform_attn, ms_deform_attn_from_offsets, samples_from_offsets

FRAME_PARTS = ("backbone", "pixel_decoder")
"""What is called once for each chunk of frames, the first of them first."""
CLIP_PART = "transformer_decoder"
"""What is called once for each batch of clips."""


class TapError(LookupError):
    """What is asked of taps is not there, or not there once."""


class Taps:
    """What was captured, by name: `taps[name]`, or `taps.calls(name)` where there is more than one of it."""

    def __init__(
        self, names: Sequence[str] = (), detach: bool = True, device: torch.device | str | None = None
    ) -> None:
        self._found: dict[str, list[tuple[int, int, Any]]] = {name: [] for name in names}  # clip, chunk, value
        self._runs = dict.fromkeys(names, 0)
        self._detach, self._device = detach, device
        self._clip = self._chunk = 0
        self._thread: int | None = threading.get_ident()

    def __getitem__(self, name: str) -> Any:
        """What was captured once.

        Raises:
            TapError: it was not captured, its module was not called or has no such thing, or was called several times.
        """
        calls = self.calls(name)
        if len(calls) == 1:
            return calls[0]
        if calls:
            raise TapError(f"{name} was captured {len(calls)} times; taps.calls({name!r}) gives all of them")
        if self._runs[name]:
            raise TapError(
                f"{name} is not to be had: the module was called, and neither PyTorch's scaled_dot_product_attention "
                "nor ms_deform_attn in it"
            )
        raise TapError(
            f"{name}: the module was not called, or where taps do not see it: by another thread, or by what "
            "torch.compile made"
        )

    def calls(self, name: str) -> tuple[Any, ...]:
        """All that was captured of a name, in order; empty where there was nothing.

        Of `FRAME_PARTS` one for each clip: chunks of frames are concatenated. Of a module that is called more often
        for a clip, and of all others, one for each call.

        Raises:
            TapError: it was not captured, or its chunks cannot be concatenated.
        """
        if name not in self._found:
            raise TapError(f"{name!r} was not captured; captured were {_some(name, list(self._found))}")
        if name.split(".")[0] in FRAME_PARTS:
            self._found[name] = _of_clips(name, self._found[name])
        return tuple(value for _, _, value in self._found[name])

    def keys(self) -> tuple[str, ...]:
        """All names."""
        return tuple(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __repr__(self) -> str:
        return f"Taps({', '.join(f'{name}: {len(found)}' for name, found in self._found.items())})"

    def _looks(self) -> bool:
        """Whether this is a call to capture: not one that activation checkpointing repeats in the backward pass."""
        if torch.compiler.is_compiling():  # what is made then would run without hooks, or keep them for ever
            return False
        return self._thread == threading.get_ident() and torch._C._current_graph_task_id() == -1

    def _add(self, name: str, value: Any) -> None:
        if self._looks():
            self._runs[name] += 1
            self._found[name].append((self._clip, self._chunk, _walk(self._kept, value)))

    def _kept(self, value: Any) -> Any:
        """A tensor in a memory of its own, which nothing in place changes later; as it is, where gradients are kept."""
        if not isinstance(value, Tensor):
            return value
        if self._detach:
            return value.detach().to(self._device or value.device, copy=True)
        return value if self._device is None else value.to(self._device)


def capture(
    model: nn.Module, *patterns: str, detach: bool = True, device: torch.device | str | None = None
) -> AbstractContextManager[Taps]:
    """See `VideoMask2Former.capture`."""
    if not patterns:
        raise ValueError(f"give names of what to capture, such as {CLIP_PART + '.layers.*.cross_attn'!r}")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise ValueError(
                f"{name or 'the model'} is compiled by torch.compile, into which taps do not see; capture from the "
                "model as it was before, or prepare_for_inference() without compile='model'"
            )
    if device is not None:
        torch.empty(0, device=device)  # or an error now
    names = _resolve(model, patterns)
    return _open(model, names, Taps(list(names), detach, device))


@contextmanager
def _open(model: nn.Module, names: Mapping[str, tuple[str, str]], taps: Taps) -> Iterator[Taps]:
    with ExitStack() as stack:
        looks: dict[str, _Look] = {}
        for name, (place, internal) in names.items():
            module = model.get_submodule(place)
            if internal in CAUGHT and not _pools(module):
                looks.setdefault(place, _Look(taps)).wanted[internal] = name
            else:
                handle = module.register_forward_hook(_hook(taps, name, internal), with_kwargs=True)
                stack.callback(handle.remove)
        entered: list[_Look] = []
        stack.callback(_leave_all, entered)
        for place, look in looks.items():
            for handle in _watch(model.get_submodule(place), look, entered):
                stack.callback(handle.remove)
        if any(name.split(".")[0] in FRAME_PARTS for name in names):
            for place, count in ((FRAME_PARTS[0], "_chunk"), (CLIP_PART, "_clip")):
                handle = model.get_submodule(place).register_forward_pre_hook(_counter(taps, count))
                stack.callback(handle.remove)
        try:
            yield taps
        finally:
            taps._thread = None  # for copies that were made meanwhile, which keep the hooks


def _leave_all(entered: list["_Look"]) -> None:
    """Leave what is entered still where an interrupt came between, after which no hook is called."""
    while entered:
        entered.pop().__exit__(None, None, None)


def _hook(taps: Taps, name: str, internal: str) -> Callable[..., None]:
    """Of outputs, or of what a module makes of the mask logits that it is given."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        value = _argument(module, "mask_logits", args, kwargs) if internal else output
        if internal in _OF_LOGITS and value is not None:
            with torch.no_grad():
                value = _OF_LOGITS[internal](value)
        taps._add(name, value)

    return hook


_OF_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": lambda logits: cross_attention.attention_mask(logits),
    "attention_weights": lambda logits: cross_attention.pooling_weights(logits),
}
"""What `MaskPooling` makes of them, by functions as they are then."""


def _counter(taps: Taps, count: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if taps._looks():
            setattr(taps, count, getattr(taps, count) + 1)

    return hook


def _watch(module: nn.Module, look: "_Look", entered: list["_Look"]) -> Iterator[Any]:
    """Have a module called under a mode; by hooks inside, no twin is in its place, which would call nothing."""

    def enter(*_: Any) -> None:
        if look.taps._looks():
            look.__enter__()
            entered.append(look)
            for name in look.wanted.values():
                look.taps._runs[name] += 1

    def leave(*_: Any) -> None:
        if look.taps._looks() and entered and entered[-1] is look:
            entered.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, always_call=True)
    for child in module.children():
        yield child.register_forward_pre_hook(lambda *_: None)


class _Look(TorchFunctionMode):
    """Looks at calls of attention, and captures what they are given."""

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.taps = taps
        self.wanted: dict[str, str] = {}  # names in the taps

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for internal, name in self.wanted.items():
            if function in CAUGHT[internal]:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.taps._detach):
                    self.taps._add(name, CAUGHT[internal][function](*args, **kwargs))
        return function(*args, **kwargs)


# --- what is caught, of the arguments of a call


def _told_mask(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    return attn_mask[:, 0] if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1] == 1 else attn_mask


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `F.scaled_dot_product_attention` of these arguments weighs values with, before it drops any.

    Returns:
        (B, M, Q, S); at least float32.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    products = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return products.softmax(-1)
    if attn_mask.dtype != torch.bool:
        return (products + attn_mask).softmax(-1)
    weights = products.masked_fill(~attn_mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~attn_mask, 0)  # of queries that may attend nowhere, too


def _locations(value: Any, shapes: Any, points: Tensor, offsets: Tensor, logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return samples_from_offsets(points, offsets, logits, shapes)[0]


def _weights(value: Any, shapes: Any, points: Tensor, offsets: Tensor, logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return samples_from_offsets(points, offsets, logits, shapes)[1]


CAUGHT: dict[str, dict[Any, Callable[..., Tensor | None]]] = {
    "attention_mask": {F.scaled_dot_product_attention: _told_mask},
    "attention_weights": {F.scaled_dot_product_attention: attention_weights},
    "sampling_locations": {
        ms_deform_attn_from_offsets: _locations,
        ms_deform_attn: lambda value, shapes, locations, weights, *_, **__: locations,
    },
    "sampling_weights": {
        ms_deform_attn_from_offsets: _weights,
        ms_deform_attn: lambda value, shapes, locations, weights, *_, **__: weights,
    },
}
"""What is caught at calls of which function, and how it is made of their arguments."""


# --- names


def _pools(module: nn.Module) -> bool:
    return isinstance(module, MaskPooling) and type(module).forward is MaskPooling.forward


def _attends(name: str, module: nn.Module) -> bool:
    """Of queries: ours, or one's own in their place."""
    return isinstance(module, Attention) or (name.startswith(f"{CLIP_PART}.") and name.endswith("_attn"))


def _weighs(name: str, module: nn.Module) -> bool:
    return _attends(name, module) or isinstance(module, WindowAttention)


def _samples(name: str, module: nn.Module) -> bool:
    own = name.startswith("pixel_decoder.") and name.endswith(".self_attn")
    return isinstance(module, MSDeformAttn) or own


def _has_mask_logits(name: str, module: nn.Module) -> bool:
    return _signature(module, "mask_logits") is not None


INTERNALS: dict[str, Callable[[str, nn.Module], bool]] = {
    "attention_mask": _attends,
    "attention_weights": _weighs,
    "sampling_locations": _samples,
    "sampling_weights": _samples,
    "mask_logits": _has_mask_logits,
}
"""What no forward returns, and which modules have it; `README.md` beside this file says what each is."""


def tap_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """All that can be captured of a model, by name: the name of the module, and which internal or nothing."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    known = {name: (name, "") for name, module in modules.items() if type(module).forward is not nn.Module.forward}
    for name, module in modules.items():
        for internal, has in INTERNALS.items():
            if has(name, module):
                known.setdefault(f"{name}.{internal}", (name, internal))
    return known


def _resolve(model: nn.Module, patterns: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What patterns match."""
    known = tap_names(model)
    found: dict[str, tuple[str, str]] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"names of what to capture are texts, got {pattern!r:.60}")
        last = pattern.rpartition(".")[2]
        matches = {
            name: (place, internal)
            for name, (place, internal) in known.items()
            if internal in ("", last) and fnmatchcase(name, pattern)
        }
        if not matches:
            raise ValueError(f"nothing in the model is called {pattern!r:.100}; there is {_some(pattern, list(known))}")
        found |= matches
    return found


def _some(pattern: str, names: list[str]) -> str:
    """Names that look most like a pattern."""
    close = get_close_matches(pattern, names, n=3, cutoff=0.5) or names[:3]
    return f"{', '.join(close)}{', ...' if len(names) > len(close) else ''}"


def _signature(module: nn.Module, argument: str) -> inspect.Signature | None:
    """Of a module's `forward`, if it has such an argument; of what it overrides where it hands all on, as twins do."""
    for kind in type(module).__mro__:
        if kind is not nn.Module and "forward" in vars(kind):
            signature = inspect.signature(vars(kind)["forward"])
            if argument in signature.parameters:
                return signature
            kinds = {parameter.kind for parameter in list(signature.parameters.values())[1:]}
            if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
                return None
    return None


def _argument(module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    signature = _signature(module, name)
    return None if signature is None else signature.bind(module, *args, **kwargs).arguments.get(name)


# --- values


def _of_clips(name: str, found: Sequence[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    """Chunks of the same clip concatenated; of modules that are called more often for a chunk, call by call."""
    clips: dict[int, dict[int, list[Any]]] = {}
    for clip, chunk, value in found:
        clips.setdefault(clip, {}).setdefault(chunk, []).append(value)
    try:
        return [
            (clip, max(chunks), _walk(_joined, *calls))
            for clip, chunks in clips.items()
            for calls in zip(*chunks.values(), strict=True)
        ]
    except (RuntimeError, TypeError, ValueError) as error:
        raise TapError(
            f"{name}: what was captured of the chunks of a clip does not fit together ({error}); were there frames of "
            "several sizes, or was a call interrupted? Capture each clip by itself"
        ) from error


def _joined(first: Any, *others: Any) -> Any:
    if isinstance(first, Tensor) and first.ndim and others:
        return torch.cat([first, *others])
    if any(not bool(other == first) for other in others):
        raise ValueError(f"there is a {type(first).__name__} that differs")
    return first


def _walk(leaf: Callable[..., Any], first: Any, *others: Any) -> Any:
    """The same structure of what a function makes of tensors and other leaves, of one or more at a time."""
    values = (first, *others)
    if any(type(other) is not type(first) for other in others):
        raise TypeError(f"there are {' and '.join(dict.fromkeys(type(value).__name__ for value in values))}")
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        parts = {name: _walk(leaf, *(getattr(value, name) for value in values)) for name in names}
        return dataclasses.replace(first, **parts)
    if isinstance(first, dict):
        return type(first)({key: _walk(leaf, *(value[key] for value in values)) for key in first})
    if isinstance(first, tuple | list):
        items = [_walk(leaf, *parts) for parts in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return leaf(*values)

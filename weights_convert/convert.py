"""State dicts in, state dicts out: applies the rule tables of `weights_convert.rules`, strict in both directions."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weights_convert.errors import ConversionError
from weights_convert.rules import FORMATS, Format, StateDict, batch_counts, compile_pattern, whole_model_keys

_INNER_WRAPPER = re.compile(r"(?<![^.])_orig_mod\.")  # of torch.compile, which may be around any part of a model
_MAX_WRAPPERS = 10


@dataclass(frozen=True)
class Translation:
    """A translated state dict and what was done to get it.

    Attributes:
        format: The format that is not the native one, of a state dict to or from it.
        state_dict: The result; every tensor is contiguous and owns its memory.
        pairs: For every native key, the keys of the other format it is made of or cut into.
        ignored: Keys left out on purpose: how many, by pattern.
        added: Keys the target format wants that hold no weights of the model.
    """

    format: str
    state_dict: StateDict
    pairs: dict[str, list[str]]
    ignored: Counter[str] = field(default_factory=Counter)
    added: tuple[str, ...] = ()


def detect_format(keys: Iterable[str]) -> str:
    """Tell the format of a state dict from its keys.

    Args:
        keys: The keys; wrappers may have put names before all of them, as ``module.`` of DistributedDataParallel.

    Returns:
        A name of ``FORMATS``, such as ``"native"``, ``"hf"`` or ``"detectron2"``.

    Raises:
        ConversionError: If the keys are of no known format, or of several.
    """
    names = _without_wrappers(list(keys))
    found = [name for name, form in FORMATS.items() if any(key.startswith(form.signatures) for key in names)]
    found = [name for name in found if not FORMATS[name].is_backbone] or found  # a model's own parts have any names
    if len(found) == 1:
        return found[0]
    if found:
        raise ConversionError(f"keys of several formats in one state dict ({', '.join(found)}); convert them apart")
    raise ConversionError(
        f"no known format ({', '.join(FORMATS)}) has keys like {_some(names)}; "
        "give the state dict of a Mask2Former model with a Swin or ResNet backbone"
    )


def to_native(state_dict: Mapping[str, torch.Tensor], format: str | None = None) -> StateDict:
    """Translate a state dict to the native names.

    Args:
        state_dict: Tensors by key, of any known format; meta tensors work.
        format: Its format; None detects it.

    Returns:
        New tensors under native names, bit for bit the same numbers in the same dtype.

    Raises:
        ConversionError: If a key is unknown or missing, or the parts of a cut tensor do not fit together.
    """
    return import_state_dict(state_dict, format).state_dict


def from_native(state_dict: Mapping[str, torch.Tensor], format: str = "hf") -> StateDict:
    """Translate a native state dict to another format.

    Args:
        state_dict: Tensors by native key.
        format: The target. ``"hf"`` is written in the names of transformers 4.x, which every release reads.

    Returns:
        New tensors under foreign names, and the few that the format wants beside them.

    Raises:
        ConversionError: If a key is missing, the format has no place for one, or a tensor cannot be cut into the parts
            it wants.
    """
    return export_state_dict(state_dict, format).state_dict


def import_state_dict(state_dict: Mapping[str, torch.Tensor], format: str | None = None) -> Translation:
    """Like `to_native`, with an account of what was mapped."""
    format = format or detect_format(state_dict)
    form = _checked_format(state_dict, format)
    slots = [(rule, compile_pattern(name)) for rule in form.rules for name in rule.foreign]
    skips = [(pattern, compile_pattern(pattern)) for pattern in form.ignored]
    found: StateDict = {}  # by the spelling of the table
    pairs: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    unknown: list[str] = []
    for key, name in zip(state_dict, form.spell(_without_wrappers(list(state_dict))), strict=True):
        if skipped := next((pattern for pattern, regex in skips if regex.fullmatch(name)), None):
            ignored[skipped] += 1
            continue
        hits = ((rule, match) for rule, regex in slots if (match := regex.fullmatch(name)))
        if (hit := next(hits, None)) is None:
            unknown.append(key)
            continue
        rule, groups = hit[0], hit[1].groupdict()
        if name in found:
            raise ConversionError(f"{key} is there a second time in another spelling; remove one of the two")
        found[name] = state_dict[key]
        pairs[rule.native.format(**groups)] = [pattern.format(**groups) for pattern in rule.foreign]
    if unknown:
        raise ConversionError(
            f"{format}: no rule for {_some(unknown)}; the checkpoint is of another architecture, or has tensors "
            "added to it: remove those"
        )
    result = {native: _joined(native, names, found) for native, names in pairs.items()}
    if format != "native":  # whoever loads a native one checks it against the model itself, which knows more
        result |= batch_counts(result)
        _check_whole(result, form)
    return Translation(format, result, pairs, ignored)


def export_state_dict(state_dict: Mapping[str, torch.Tensor], format: str) -> Translation:
    """Like `from_native`, with an account of what was mapped."""
    form = _checked_format(state_dict, format)
    rules = [(rule, compile_pattern(rule.native)) for rule in form.rules]
    result: StateDict = {}
    pairs: dict[str, list[str]] = {}
    for key, tensor in state_dict.items():
        hits = ((rule, match) for rule, regex in rules if (match := regex.fullmatch(key)))
        if hit := next(hits, None):
            pairs[key] = [name.format(**hit[1].groupdict()) for name in hit[0].foreign]
            result.update(zip(pairs[key], _cut(key, tensor, len(pairs[key])), strict=True))
    if unknown := [key for key in state_dict if key not in pairs]:
        raise ConversionError(
            f"{format} has no counterpart for {_some(unknown)}; keep such a model in the native format"
        )
    _check_whole(state_dict, form)
    added = form.synthesise(dict(state_dict))
    return Translation(format, result | added, pairs, added=tuple(added))


def _check_whole(native: Mapping[str, torch.Tensor], form: Format) -> None:
    """A format that holds whole models must do so; a backbone alone may be native."""
    if (form.is_backbone or form is FORMATS["native"]) and all(key.startswith("backbone.") for key in native):
        return
    if missing := [key for key in whole_model_keys(native) if key not in native]:
        foreign = next(
            [name.format(**match.groupdict()) for name in rule.foreign]
            for rule in form.rules
            if (match := compile_pattern(rule.native).fullmatch(missing[0]))
        )
        named = "" if foreign == missing[:1] else f" (here {', '.join(foreign)})"
        raise ConversionError(
            f"missing {_some(missing)}{named}; the checkpoint is incomplete (fetch or save it again), or of a variant "
            "of the published model (keep it as it is)"
        )


def _checked_format(state_dict: Mapping[str, torch.Tensor], name: str) -> Format:
    if name not in FORMATS:
        raise ConversionError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    if not state_dict:
        raise ConversionError("the state dict is empty; give one with weights")
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(f"{key} is a {type(value).__name__}, not a tensor; keep only tensors")
    return FORMATS[name]


def _without_wrappers(keys: list[str]) -> list[str]:
    """Take off the names that all keys begin with, until they are of a known format; as they are if they never are."""
    signatures = tuple(signature for form in FORMATS.values() for signature in form.signatures)
    names = [_INNER_WRAPPER.sub("", key) for key in keys]
    for _ in range(_MAX_WRAPPERS):
        if any(name.startswith(signatures) for name in names):
            return names
        if len({name.partition(".")[0] for name in names}) != 1 or not all("." in name for name in names):
            break
        names = [name.partition(".")[2] for name in names]
    return keys


def _joined(native: str, names: list[str], found: StateDict) -> torch.Tensor:
    if missing := [name for name in names if name not in found]:
        raise ConversionError(
            f"missing {_some(missing)}, part of {native}; the checkpoint is incomplete: fetch it again"
        )
    parts = [found[name].detach() for name in names]
    if len(parts) == 1:
        return parts[0].clone(memory_format=torch.contiguous_format)
    if parts[0].dim() == 0 or len({(part.shape, part.dtype) for part in parts}) > 1:
        forms = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
        raise ConversionError(
            f"the parts must agree in shape and dtype to form {native}, but are {forms} ({_some(names)}); "
            "fetch or save the checkpoint again"
        )
    return torch.cat(parts)


def _cut(key: str, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    if count > 1 and (tensor.dim() == 0 or tensor.shape[0] % count):
        raise ConversionError(f"{key} of shape {tuple(tensor.shape)} cannot be cut into {count} equal parts")
    parts = tensor.detach().tensor_split(count) if count > 1 else [tensor.detach()]
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _some(keys: Sequence[str]) -> str:
    count = 1 if sum(map(len, keys[:3])) > 130 else 3  # what fits into a line
    shown = ", ".join(f"{key:.110}" for key in keys[:count]) or "(none)"
    return shown if len(keys) <= count else f"{shown} and {len(keys) - count} more"

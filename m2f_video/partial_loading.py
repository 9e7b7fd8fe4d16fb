"""Weights of a checkpoint into a model of another config: what fits is loaded, and everything is accounted for.

A weight is loaded where name and shape are the model's. Some are fitted row by row (queries, levels, classes) or
resized (Swin's position tables). What is of another shape, or is known to mean something else in this model, is not
loaded, nor is the rest of the layer that it is in. Of what is loaded, the report names the fields of the config by
which it computes something else here than where it was trained.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.config import TransformerDecoderConfig, VideoMask2FormerConfig
from m2f_video.hub import HubOptions, config_beside, load_config, other_function, weights_path
from m2f_video.loading_report import LoadingReport, State, Weight
from weights_convert import ConversionError, naming, read_state_dict, to_native

if TYPE_CHECKING:
    from m2f_video.modeling.video_mask2former import VideoMask2Former

_SCALES = (32, 16, 8)  # strides of the transformer decoder's levels
_POSITION_TABLE = re.compile(r"(backbone\.stages\.\d+\.blocks\.\d+\.attn\.)relative_position_bias_table")
_LEVEL_EMBED = "transformer_decoder.level_embed.weight"
_LEVEL_PROJECTION = re.compile(r"(transformer_decoder\.input_projections\.)(\d+)(\..*)")
_QUERIES = ("transformer_decoder.query_features.weight", "transformer_decoder.query_positions.weight")
_CLASS_HEAD = ("transformer_decoder.class_head.weight", "transformer_decoder.class_head.bias")
_ENCODER_ATTENTION = r"pixel_decoder\.layers\.\d+\.self_attn\."
_SAMPLING = re.compile(rf"{_ENCODER_ATTENTION}(sampling_offsets|attention_weights)\.")
_LAID_OUT_BY = {
    "pixel_decoder.kind": re.compile(r"pixel_decoder\."),
    "pixel_decoder.num_heads": re.compile(_ENCODER_ATTENTION),
    "pixel_decoder.num_points": _SAMPLING,
    "pixel_decoder.num_levels": _SAMPLING,
    "transformer_decoder.num_heads": re.compile(r"transformer_decoder\.layers\.\d+\.(cross|self)_attn\."),
}
"""Fields by which the rows of weights mean something else, whose shapes may be the same, and those weights."""


def load_partially(
    model: "VideoMask2Former", source: str | os.PathLike[str], **hub_options: Unpack[HubOptions]
) -> LoadingReport:
    """Load what fits of a checkpoint into a model of whatever config; the rest of the model stays as it is.

    Beside what is equal in name and shape:

    - Swin's position tables are resized to another window, bicubically, as Swin's authors do.
    - Of queries the first are taken; where the model has more, the others stay new.
    - Embeddings and projections of levels go by the stride of the level.
    - Rows of the classifier go by the name of the class, whatever its case and underscores, and the last is "no
      object"; a name that is there twice is left out.

    Not loaded, though names and shapes may be the same: a pixel decoder of another kind, attention of another number of
    heads, sampling offsets and weights of other numbers of points or levels, and cross-attention where one of the two
    is mask pooling. Everything else of the same name and shape is loaded, and the report names the fields of the config
    that differ. A file without a config beside it is taken to be of the model's own.

    Args:
        model: changed in place, or not at all where an error is raised.
        source: as `VideoMask2Former.from_pretrained` takes it, or weights of a backbone alone.
        hub_options: as of `VideoMask2Former.from_pretrained`.

    Raises:
        FileNotFoundError: no such file or folder, and not a hub name.
        ConfigError: the config beside the weights is not valid.
        weights_convert.ConversionError: weights that cannot be read, are not finite, or of which nothing fits.
    """
    return load_file_partially(model, weights_path(source, hub_options), str(source))


def load_file_partially(model: "VideoMask2Former", path: Path, source: str) -> LoadingReport:
    """As `load_partially`, from a file or folder that is there, called `source` in messages."""
    state_dict = read_state_dict(path)
    own = load_config(path) if config_beside(path).exists() else model.config
    with naming(source):
        weights = to_native(state_dict)
    return load_what_fits(model, weights, source, own=own)


def warn_of_partial_loading(model: "VideoMask2Former", path: Path, source: str) -> None:
    """`load_file_partially`, which gives the report as a warning where there is anything to say."""
    report = load_file_partially(model, path, source)
    if not report.is_complete:
        warnings.warn(str(report), stacklevel=4)


def load_what_fits(
    model: "VideoMask2Former",
    weights: Mapping[str, Tensor],
    source: str,
    *,
    own: VideoMask2FormerConfig | None = None,
    prefix: str = "",
) -> LoadingReport:
    """Load what fits of weights under native names, as `load_partially` says.

    Args:
        model: changed in place, or not at all where an error is raised.
        weights: by name.
        source: where they are from.
        own: the config of the model they were trained in; None takes them to be of this model's.
        prefix: of the names of the model's weights that are looked at.

    Raises:
        weights_convert.ConversionError: nothing fits.
    """
    own_state = model.state_dict()  # in which modules of one's own may have something else than tensors
    expected = {name: t for name, t in own_state.items() if name.startswith(prefix) and isinstance(t, Tensor)}
    place = _Place(own or model.config, model.config, weights, expected)
    fitted: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    given = {place.name(name): name for name in weights}
    for name, tensor in expected.items():
        if name in given:
            found, notes[name] = place.fit(name, tensor, weights[given[name]])
            if found is not None:
                fitted[name] = found
    _leave_out_halves(model, fitted, notes)
    if not any(tensor.is_floating_point() for tensor in fitted.values()):
        reason = next((f"{name} is {note}" for name, note in notes.items()), "no name is one of the model's")
        raise ConversionError(
            f"nothing of {source:.100} fits the model: {reason}; give a checkpoint of which a part is like it"
        )
    model.load_state_dict(fitted, strict=False)  # each was looked at
    report = [
        Weight(name, _state(name, fitted, notes), tensor.numel(), notes.get(name, ""))
        for name, tensor in expected.items()
    ]
    report += [
        Weight(name, "ignored", tensor.numel(), notes.get(place.name(name), ""))
        for name, tensor in weights.items()
        if place.name(name) not in fitted
    ]
    parts = {name.split(".")[0] for name in fitted}
    return LoadingReport(f"weights of {source}", tuple(report), place.otherwise(parts))


def _state(name: str, fitted: Mapping[str, Tensor], notes: Mapping[str, str]) -> State:
    if name not in fitted:
        return "new"
    return "resized" if notes[name] else "loaded"


def _leave_out_halves(model: nn.Module, fitted: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Take out what is in one layer with something that does not fit, such as its bias, or the norm of a projection."""
    broken = {_layer(model, name): name for name in notes if name not in fitted}
    for name in list(fitted):
        if other := broken.get(_layer(model, name)):
            del fitted[name]
            notes[name] = f"not without its layer: {other} does not fit"


def _layer(model: nn.Module, name: str) -> str:
    """The module that a parameter is in, or the `Sequential` around it."""
    module = name.rpartition(".")[0]
    around = module.rpartition(".")[0]
    return around if isinstance(model.get_submodule(around), nn.Sequential) else module


class _Place:
    """Where weights of a model of config `own` belong in one of config `used`."""

    def __init__(
        self,
        own: VideoMask2FormerConfig,
        used: VideoMask2FormerConfig,
        weights: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
    ) -> None:
        self.own, self.used = own, used
        self.changed = other_function(own, used)
        self.other_heads = tuple(  # attention of Swin, whose tables tell, whatever there is of a config
            match[1]
            for name, table in weights.items()
            if (match := _POSITION_TABLE.fullmatch(name))
            and name in expected
            and table.shape[-1:] != expected[name].shape[-1:]
        )
        self.levels = _levels_by_scale(
            _scales(own.transformer_decoder, weights.get(_LEVEL_EMBED)), _scales(used.transformer_decoder)
        )

    def name(self, name: str) -> str:
        """What a weight is called in the model; the name of none where it is of a level that this has not."""
        match = _LEVEL_PROJECTION.fullmatch(name)
        if match is None:
            return name
        level = next((here for here, there in self.levels.items() if there == int(match[2])), None)
        return f"{match[1]}{level}{match[3]}"

    def fit(self, name: str, tensor: Tensor, given: Tensor) -> tuple[Tensor | None, str]:
        """What is to be loaded in the place of a tensor, and how it was made; or None, and why it cannot be."""
        if reason := self._other_meaning(name):
            return None, reason
        if tensor.is_floating_point() and not given.is_floating_point():
            return None, f"of another kind: {given.dtype}"
        rows = self._rows(name, tensor, given)
        if rows is not None and given.shape[1:] == tensor.shape[1:]:
            pairs, how = rows
            if given.shape == tensor.shape and pairs == {row: row for row in range(len(tensor))}:
                return given, ""
            if not pairs:
                return None, f"of other rows: {len(given)}, here {len(tensor)}"
            result = tensor.detach().clone()
            result[list(pairs)] = given[list(pairs.values())].to(result)
            return result, how
        if given.shape == tensor.shape:
            return given, ""
        if _POSITION_TABLE.fullmatch(name) and (sides := _sides(given, tensor)):
            before, after = sides
            how = f"bicubically, from windows of {before // 2 + 1} to {after // 2 + 1}"
            return _resize_table(given, before, after).to(tensor.dtype), how
        return None, f"of another shape: {tuple(given.shape)}, here {tuple(tensor.shape)}"

    def otherwise(self, parts: set[str]) -> dict[str, tuple[Any, Any]]:
        """Changed fields of these parts of the model, or of all of it, but for those whose weights are not loaded."""
        of_parts = {"backbone", "pixel_decoder", "transformer_decoder"}
        accounted = {*_LAID_OUT_BY, "backbone.num_heads", "transformer_decoder.num_queries", "labels"}
        return {
            name: both
            for name, both in self.changed.items()
            if name not in accounted and _part(name) not in of_parts - parts
        }

    def _other_meaning(self, name: str) -> str:
        """Why numbers in the same place would mean something else in this model; empty where they would not."""
        if name.startswith(self.other_heads):
            return "of another layout: backbone.num_heads"
        for changed, pattern in _LAID_OUT_BY.items():
            if changed in self.changed and pattern.match(name):
                own, used = self.changed[changed]
                return f"of another layout: {changed} {own} -> {used}"
        kinds = self.changed.get("transformer_decoder.cross_attention", ("", ""))
        if "mask_pooling" in kinds and ".cross_attn." in name:
            return f"of another kind: transformer_decoder.cross_attention {kinds[0]} -> {kinds[1]}"
        return ""

    def _rows(self, name: str, tensor: Tensor, given: Tensor) -> tuple[dict[int, int], str] | None:
        """For what consists of rows of their own: the row there for rows here, and how they were found."""
        if given.ndim != tensor.ndim:
            return None
        if name in _QUERIES:
            kept = min(len(tensor), len(given))
            return {row: row for row in range(kept)}, f"the first {kept} of {len(given)} queries, here {len(tensor)}"
        if name == "pixel_decoder.level_embed":
            kept = min(len(tensor), len(given))  # coarse to fine, from stride 32 on
            return {row: row for row in range(kept)}, f"the first {kept} of {len(given)} levels, here {len(tensor)}"
        if name == _LEVEL_EMBED:
            return self.levels, "levels by their strides"
        if name in _CLASS_HEAD:
            fits = len(given) == self.own.num_labels + 1
            rows = _rows_by_label(self.own.labels, self.used.labels) if fits else {}
            return rows, f"{len(rows) - 1} of {self.used.num_labels} classes by their names"
        return None


def _part(field_name: str) -> str:
    """The part of a model that a field is of; for a module of one's own, that which it is in."""
    first, _, rest = field_name.partition(".")
    if first != "parts":
        return first
    return next((part for part in ("backbone", "pixel_decoder") if rest.startswith(part)), "transformer_decoder")


def _scales(decoder: TransformerDecoderConfig, level_embed: Tensor | None = None) -> tuple[int, ...]:
    """Strides of the decoder's levels; where the embeddings are not as many, what their number tells, if anything."""
    stated = (decoder.scale,) if decoder.features == "single" else _SCALES
    if level_embed is None or level_embed.ndim != 2 or len(level_embed) == len(stated):
        return stated
    return _SCALES if len(level_embed) == len(_SCALES) else ()


def _levels_by_scale(there: tuple[int, ...], here: tuple[int, ...]) -> dict[int, int]:
    return {index: there.index(scale) for index, scale in enumerate(here) if scale in there}


def _rows_by_label(there: Iterable[str], here: Iterable[str]) -> dict[int, int]:
    """The row there of each class here that has one, and of "no object", the last."""
    theirs, ours = ([label.casefold().replace("_", " ") for label in labels] for labels in (there, here))
    if theirs == ours:
        return {row: row for row in range(len(ours) + 1)}
    times_there, times_here = Counter(theirs), Counter(ours)
    rows_there = {label: row for row, label in enumerate(theirs) if times_there[label] == times_here[label] == 1}
    rows = {row: rows_there[label] for row, label in enumerate(ours) if label in rows_there}
    return {**rows, len(ours): len(theirs)}


def _sides(given: Tensor, tensor: Tensor) -> tuple[int, int] | None:
    """Sides of two squares of relative positions (side * side, M); None where they are none of the same heads."""
    if given.ndim != 2 or given.shape[1] != tensor.shape[1]:
        return None
    before, after = (round(len(table) ** 0.5) for table in (given, tensor))
    return (before, after) if before % 2 and before * before == len(given) else None


def _resize_table(table: Tensor, before: int, after: int) -> Tensor:
    """(before * before, M) -> (after * after, M), as images with a channel for each head."""
    image = table.float().T.reshape(1, -1, before, before)
    resized = F.interpolate(image, size=(after, after), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.contiguous()

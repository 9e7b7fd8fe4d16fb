"""The rule tables: how each foreign format names the tensors of the native one.

A pattern is a key with placeholders: ``{p}`` is ``weight`` or ``bias``, ``{b}`` is what a batch norm has, ``{rest}`` is
anything, every other name is an integer below 1000. A `Rule` pairs one native pattern with one foreign pattern, or with
several when the foreign format cuts the tensor into equal parts along dim 0 (query, key, value). The same table serves
both directions.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

StateDict = dict[str, torch.Tensor]

_ENCODER = "model.pixel_level_module.encoder."
_PIXEL = "model.pixel_level_module.decoder."
_DECODER = "model.transformer_module."
_HEAD = "sem_seg_head.pixel_decoder."
_PREDICTOR = "sem_seg_head.predictor."
_TIMM = "backbone.model."  # alternative backbones, in timm's own names

_KINDS = {"p": ("weight", "bias"), "b": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}

# One row per native pattern: native, hf and original name, each after its column's prefix. `=` repeats the native name,
# commas part the pieces of a cut tensor. The hf column has the names of transformers 4.x, which 5.x reads too.
_Table = tuple[tuple[tuple[str, str, str], str], ...]
_TABLE: _Table = (
    (
        ("backbone.", _ENCODER, "backbone."),
        """
        patch_embed.proj.{p}  embeddings.patch_embeddings.projection.{p}   =
        patch_embed.norm.{p}  embeddings.norm.{p}                          =
        out_norms.0.{p}       hidden_states_norms.stage1.{p}               norm0.{p}
        out_norms.1.{p}       hidden_states_norms.stage2.{p}               norm1.{p}
        out_norms.2.{p}       hidden_states_norms.stage3.{p}               norm2.{p}
        out_norms.3.{p}       hidden_states_norms.stage4.{p}               norm3.{p}
        """,
    ),
    (
        (
            "backbone.stages.{i}.downsample.",
            _ENCODER + "encoder.layers.{i}.downsample.",
            "backbone.layers.{i}.downsample.",
        ),
        """
        norm.{p}              =                                            =
        reduction.weight      =                                            =
        """,
    ),
    (
        (
            "backbone.stages.{i}.blocks.{j}.",
            _ENCODER + "encoder.layers.{i}.blocks.{j}.",
            "backbone.layers.{i}.blocks.{j}.",
        ),
        """
        norm1.{p}             layernorm_before.{p}                         =
        attn.qkv.{p}          attention.self.query.{p},attention.self.key.{p},attention.self.value.{p} =
        attn.proj.{p}         attention.output.dense.{p}                   =
        norm2.{p}             layernorm_after.{p}                          =
        mlp.fc1.{p}           intermediate.dense.{p}                       =
        mlp.fc2.{p}           output.dense.{p}                             =
        attn.relative_position_bias_table  attention.self.relative_position_bias_table  =
        """,
    ),
    (
        ("pixel_decoder.", _PIXEL, _HEAD),
        """
        input_projections.{l}.{k}.{p}  =                                   input_proj.{l}.{k}.{p}
        level_embed           =                                            transformer.level_embed
        lateral_conv.0.weight adapter_1.0.weight                           adapter_1.weight
        lateral_conv.1.{p}    adapter_1.1.{p}                              adapter_1.norm.{p}
        output_conv.0.weight  layer_1.0.weight                             layer_1.weight
        output_conv.1.{p}     layer_1.1.{p}                                layer_1.norm.{p}
        mask_projection.{p}   =                                            mask_features.{p}
        """,
    ),
    (
        ("pixel_decoder.layers.{n}.", _PIXEL + "encoder.layers.{n}.", _HEAD + "transformer.encoder.layers.{n}."),
        """
        self_attn.sampling_offsets.{p}   =                                 =
        self_attn.attention_weights.{p}  =                                 =
        self_attn.value_proj.{p}         =                                 =
        self_attn.output_proj.{p}        =                                 =
        self_attn_norm.{p}    self_attn_layer_norm.{p}                     norm1.{p}
        linear1.{p}           fc1.{p}                                      =
        linear2.{p}           fc2.{p}                                      =
        ffn_norm.{p}          final_layer_norm.{p}                         norm2.{p}
        """,
    ),
    (
        ("transformer_decoder.", _DECODER, _PREDICTOR),
        """
        query_features.weight     queries_features.weight                  query_feat.weight
        query_positions.weight    queries_embedder.weight                  query_embed.weight
        level_embed.weight        =                                        =
        input_projections.{l}.{p} =                                        input_proj.{l}.{p}
        norm.{p}                  decoder.layernorm.{p}                    decoder_norm.{p}
        mask_head.{k}.{p}         decoder.mask_predictor.mask_embedder.{k}.0.{p}  mask_embed.layers.{k}.{p}
        """,
    ),
    (("transformer_decoder.", "", _PREDICTOR), "class_head.{p}  class_predictor.{p}  class_embed.{p}"),
    (
        (
            "transformer_decoder.layers.{n}.",
            _DECODER + "decoder.layers.{n}.",
            _PREDICTOR + "transformer_cross_attention_layers.{n}.",
        ),
        """
        cross_attn.in_proj_{p}    =                                        multihead_attn.in_proj_{p}
        cross_attn.out_proj.{p}   =                                        multihead_attn.out_proj.{p}
        cross_attn_norm.{p}       cross_attn_layer_norm.{p}                norm.{p}
        """,
    ),
    (
        (
            "transformer_decoder.layers.{n}.",
            _DECODER + "decoder.layers.{n}.",
            _PREDICTOR + "transformer_self_attention_layers.{n}.",
        ),
        """
        self_attn.in_proj_{p}     self_attn.q_proj.{p},self_attn.k_proj.{p},self_attn.v_proj.{p}  =
        self_attn.out_proj.{p}    =                                        =
        self_attn_norm.{p}        self_attn_layer_norm.{p}                 norm.{p}
        """,
    ),
    (
        (
            "transformer_decoder.layers.{n}.",
            _DECODER + "decoder.layers.{n}.",
            _PREDICTOR + "transformer_ffn_layers.{n}.",
        ),
        """
        linear1.{p}               fc1.{p}                                  =
        linear2.{p}               fc2.{p}                                  =
        ffn_norm.{p}              final_layer_norm.{p}                     norm.{p}
        """,
    ),
)
# ResNets with strides in their 3x3 convolutions, as torchvision, timm and the original's configs have them; no weight
# tells where strides are. Basic blocks have no third convolution.
_RESNET_TABLE: _Table = (
    (
        (_TIMM, _ENCODER + "embedder.embedder.", "backbone.stem."),
        """
        conv1.weight          convolution.weight                           =
        bn1.{b}               normalization.{b}                            conv1.norm.{b}
        """,
    ),
    *(
        (
            (
                f"{_TIMM}layer{i + 1}.{{j}}.",
                f"{_ENCODER}encoder.stages.{i}.layers.{{j}}.",
                f"backbone.res{i + 2}.{{j}}.",
            ),
            """
            conv1.weight          layer.0.convolution.weight               =
            bn1.{b}               layer.0.normalization.{b}                conv1.norm.{b}
            conv2.weight          layer.1.convolution.weight               =
            bn2.{b}               layer.1.normalization.{b}                conv2.norm.{b}
            conv3.weight          layer.2.convolution.weight               =
            bn3.{b}               layer.2.normalization.{b}                conv3.norm.{b}
            downsample.0.weight   shortcut.convolution.weight              shortcut.weight
            downsample.1.{b}      shortcut.normalization.{b}               shortcut.norm.{b}
            """,
        )
        for i in range(4)
    ),
)
# The tail of a backbone key in transformers 5.x -> in 4.x. Outside the backbone the two agree.
_HF_CURRENT_TO_OLD = {
    ".attention.q_proj.": ".attention.self.query.",
    ".attention.k_proj.": ".attention.self.key.",
    ".attention.v_proj.": ".attention.self.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".attention.relative_position_bias.": ".attention.self.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


@dataclass(frozen=True)
class Rule:
    """One native key pattern and the foreign pattern(s) whose concatenation along dim 0 it is."""

    native: str
    foreign: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Format:
    """All that is known about one naming of the state dict.

    Attributes:
        signatures: Key prefixes; a state dict with any of them is of this format.
        rules: The table.
        ignored: Patterns of foreign keys that carry no weights of the native model.
        spell: Brings the spellings of the format to the one the table uses, key by key in order.
        synthesise: Tensors the format wants beside those of the table, from the native state dict.
        is_backbone: Whether it names a backbone alone; otherwise a state dict must be a whole model, unless native.
    """

    signatures: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    spell: Callable[[Sequence[str]], list[str]] = list
    synthesise: Callable[[StateDict], StateDict] = lambda native: {}
    is_backbone: bool = False


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Turn a key pattern into a regular expression with one named group per placeholder."""
    kinds = {name: "|".join(kinds) for name, kinds in _KINDS.items()} | {"rest": ".+"}
    parts = re.split(r"\{(\w+)\}", pattern)  # literal, placeholder, literal, ...
    for at, part in enumerate(parts):
        parts[at] = f"(?P<{part}>{kinds.get(part, '0|[1-9][0-9]{0,2}')})" if at % 2 else re.escape(part)
    return re.compile("".join(parts))


def _column(table: _Table, at: int) -> tuple[Rule, ...]:
    """Rules from the native names to those of column ``at`` (1 hf, 2 original)."""
    rules = []
    for prefixes, rows in table:
        for row in rows.strip().splitlines():
            names = row.split()
            foreign = names[0] if names[at] == "=" else names[at]
            rules.append(Rule(prefixes[0] + names[0], tuple(prefixes[at] + name for name in foreign.split(","))))
    return tuple(rules)


def count_layers(native: Collection[str], prefix: str) -> int:
    """One more than the highest index that native keys have after a prefix such as ``pixel_decoder.layers.``."""
    found = map(compile_pattern(prefix + "{n}.{rest}").fullmatch, native)
    return max((int(match["n"]) + 1 for match in found if match), default=0)


def whole_model_keys(native: Collection[str]) -> list[str]:
    """All native keys of the model that these are keys of; its numbers of layers are read off the highest indices."""
    blocks = [(i, j) for i in range(4) for j in range(count_layers(native, f"backbone.stages.{i}.blocks.") or 1)]
    resnet = _resnet_keys(native)
    indices: dict[str, list[dict[str, int]]] = {
        "backbone.stages.{i}.blocks.": [{"i": i, "j": j} for i, j in blocks],
        "backbone.stages.{i}.downsample.": [{"i": i} for i in range(3)],
        "pixel_decoder.input_projections.": [{"l": level, "k": k} for level in range(3) for k in range(2)],
        "transformer_decoder.input_projections.": [{"l": level} for level in range(3)],
        "transformer_decoder.mask_head.": [{"k": k} for k in range(3)],
    }
    for part in ("pixel_decoder.layers.", "transformer_decoder.layers."):
        indices[part] = [{"n": n} for n in range(count_layers(native, part) or 1)]
    keys = []
    for pattern in (rule.native for rule in _RULES[1]):
        found = (places for prefix, places in indices.items() if pattern.startswith(prefix))
        at: list[dict[str, int]] = next(found, [{}])
        kinds = _KINDS["p"] if "{p}" in pattern else ("",)
        keys += [pattern.format(**place, p=kind) for place in at for kind in kinds]
    absent = [] if any(key.endswith(".qkv.bias") for key in native) else [".qkv.bias"]  # a choice of the config
    if count_layers(native, "transformer_decoder.input_projections.") == 0:  # there where widths differ
        absent.append("transformer_decoder.input_projections.")
    if any(key.startswith(_TIMM) for key in native):
        absent.append("backbone.")
    return resnet + [key for key in keys if not key.startswith(tuple(absent)) and not key.endswith(tuple(absent))]


def _resnet_keys(native: Collection[str]) -> list[str]:
    """All native keys of the ResNet that these are keys of; none where they are not, as of another timm model."""
    own = [key for key in native if key.startswith(_TIMM)]
    patterns = [compile_pattern(rule.native) for rule in _RESNET_RULES[1]]
    if not own or not all(any(pattern.fullmatch(key) for pattern in patterns) for key in own):
        return []
    is_bottleneck = any(".conv3." in key for key in own)
    keys = []
    for pattern in (rule.native for rule in _RESNET_RULES[1]):
        stage = pattern.removeprefix(_TIMM).split(".")[0]
        blocks = range((count_layers(native, f"{_TIMM}{stage}.") or 1) if "{j}" in pattern else 1)
        if ".downsample." in pattern:  # where widths or strides change
            blocks = range(1 if is_bottleneck or stage != "layer1" else 0)
        if not is_bottleneck and (".conv3." in pattern or ".bn3." in pattern):
            continue
        keys += [pattern.format(j=j, b=kind) for j in blocks for kind in (_KINDS["b"] if "{b}" in pattern else ("",))]
    return keys


def _spell_hf(keys: Sequence[str]) -> list[str]:
    """Old names for current ones, each key by itself, since files written by 5.x mix the two."""

    def old(key: str) -> str:
        key = re.sub(rf"^{re.escape(_ENCODER)}swin\.(?=embeddings\.|encoder\.)", _ENCODER, key)
        for current, replacement in _HF_CURRENT_TO_OLD.items():
            key = key.replace(current, replacement)
        return key

    return [old(key) if key.startswith(_ENCODER) else key for key in keys]


def _synthesise_hf(native: StateDict) -> StateDict:
    """The loss's class weights and the final norm of Swin, which no output depends on but transformers asks for."""
    extra: StateDict = {}
    if (head := native.get("transformer_decoder.class_head.weight")) is not None and head.dim():
        extra["criterion.empty_weight"] = head.new_ones(head.shape[0])
        extra["criterion.empty_weight"][-1:] = 0.1  # the no-object class
    if (norm := native.get("backbone.out_norms.3.weight")) is not None:
        extra[_ENCODER + "swin.layernorm.weight"] = torch.ones_like(norm)
        extra[_ENCODER + "swin.layernorm.bias"] = torch.zeros_like(norm)
    return extra


def _spell_original(keys: Sequence[str]) -> list[str]:
    """Older image checkpoints say ``static_query`` and leave out ``pixel_decoder.``."""
    keys = [key.replace(_PREDICTOR + "static_query.", _PREDICTOR + "query_feat.") for key in keys]
    return [re.sub(r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", _HEAD, key) for key in keys]


def _spell_timm_swin(keys: Sequence[str]) -> list[str]:
    """In timm 1.x stage i + 1 starts with the downsampling that ends stage i in older files, by whoever."""
    if any(key.startswith("layers.0.downsample.") for key in keys):
        return list(keys)
    return [re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", k) for k in keys]


def batch_counts(native: StateDict) -> StateDict:
    """The counts of batches that batch norms lack which were frozen or are of old files; no output depends on them."""
    names = [key.removesuffix("running_var") + "num_batches_tracked" for key in native if key.endswith(".running_var")]
    return {name: torch.zeros((), dtype=torch.int64) for name in names if name not in native}


def _without(prefix: str, rules: Sequence[Rule], instead: str = "") -> tuple[Rule, ...]:
    """Those of the rules whose foreign names begin with a prefix, without it."""
    return tuple(
        Rule(rule.native, (instead + rule.foreign[0].removeprefix(prefix),))
        for rule in rules
        if rule.foreign[0].startswith(prefix)
    )


_RULES = tuple(_column(_TABLE, at) for at in range(3))  # native, hf, original
_RESNET_RULES = tuple(_column(_RESNET_TABLE, at) for at in range(3))
_SWIN_BUFFERS = ("layers.{i}.blocks.{j}.attn.relative_position_index", "layers.{i}.blocks.{j}.attn_mask")

FORMATS: dict[str, Format] = {
    "native": Format(
        signatures=(
            "pixel_decoder.",
            "transformer_decoder.",
            "backbone.stages.",
            "backbone.out_norms.",
            "backbone.model.",
        ),
        rules=(Rule("{rest}", ("{rest}",)),),  # whoever builds the model knows its keys, and those of its own parts
    ),
    "hf": Format(
        signatures=("model.pixel_level_module.", _DECODER, "class_predictor."),
        # the last are those of transformers' wrapper around timm: read, and written in transformers' own names
        rules=(*_RULES[1], *_RESNET_RULES[1], *_without(_TIMM, _RESNET_RULES[0], _ENCODER + "_backbone.")),
        ignored=(
            "criterion.empty_weight",
            _ENCODER + "encoder.layers.{i}.blocks.{j}.attention.self.relative_position_index",
            _ENCODER + "swin.layernorm.{p}",
        ),
        spell=_spell_hf,
        synthesise=_synthesise_hf,
    ),
    "detectron2": Format(
        signatures=("sem_seg_head.", "backbone.layers.", "backbone.res2."),
        rules=_RULES[2] + _RESNET_RULES[2],
        ignored=("criterion.empty_weight", *("backbone." + buffer for buffer in _SWIN_BUFFERS)),
        spell=_spell_original,
    ),
    "timm_swin": Format(  # a classifier to start training from; it has no output norms
        signatures=("patch_embed.", "layers."),
        rules=_without("backbone.", [rule for rule in _RULES[2] if ".out_norms." not in rule.native]),
        ignored=("head.{rest}", "norm.{p}", *_SWIN_BUFFERS),
        spell=_spell_timm_swin,
        is_backbone=True,
    ),
    "timm_resnet": Format(  # and torchvision's
        signatures=tuple(f"layer{i}." for i in range(1, 5)),
        rules=_without(_TIMM, _RESNET_RULES[0]),
        ignored=("fc.{p}",),
        is_backbone=True,
    ),
    "detectron2_resnet": Format(
        signatures=tuple(f"res{i}." for i in range(2, 6)),
        rules=_without("backbone.", _RESNET_RULES[2]),
        ignored=("stem.fc.{p}",),
        is_backbone=True,
    ),
}

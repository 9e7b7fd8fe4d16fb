"""Configs in, configs out: transformers' Mask2Former config and image processor against the native one, as plain dicts.

One table of fields serves both directions, beside tables of the values that only one side has a field for. A field that
the other side cannot express is an error that names it, never dropped.

A round trip native -> hf -> native gives back the same config, with one exception: under a ``fixed_size`` the two
edges, which have no effect then, come back as the defaults. ``fit`` travels under a key that transformers ignores.
"""

import copy
import math
from typing import Any

from weights_convert.bounds import all_values
from weights_convert.errors import ConversionError, naming

Json = dict[str, Any]

# native field, hf field, what transformers takes when an old config leaves it out (and so its type)
_Fields = tuple[tuple[str, str, Any], ...]
_SWIN_FIELDS: _Fields = (
    ("backbone.embed_dim", "backbone_config.embed_dim", 96),
    ("backbone.depths", "backbone_config.depths", [2, 2, 6, 2]),
    ("backbone.num_heads", "backbone_config.num_heads", [3, 6, 12, 24]),
    ("backbone.window_size", "backbone_config.window_size", 7),
    ("backbone.mlp_ratio", "backbone_config.mlp_ratio", 4.0),
    ("backbone.qkv_bias", "backbone_config.qkv_bias", True),
    ("backbone.drop_path_rate", "backbone_config.drop_path_rate", 0.1),
)
_FIELDS: _Fields = (
    ("pixel_decoder.hidden_dim", "feature_size", 256),
    ("pixel_decoder.mask_dim", "mask_feature_size", 256),
    ("pixel_decoder.num_layers", "encoder_layers", 6),
    ("pixel_decoder.ffn_dim", "encoder_feedforward_dim", 1024),
    ("pixel_decoder.num_heads", "num_attention_heads", 8),
    ("pixel_decoder.dropout", "dropout", 0.0),
    ("transformer_decoder.hidden_dim", "hidden_dim", 256),
    ("transformer_decoder.num_queries", "num_queries", 100),
    ("transformer_decoder.num_layers", "decoder_layers", 10),  # hf counts the first prediction as a layer
    ("transformer_decoder.num_heads", "num_attention_heads", 8),
    ("transformer_decoder.ffn_dim", "dim_feedforward", 2048),
)
_PREPROCESSING: Json = {  # native defaults, for a checkpoint without a preprocessor
    "shortest_edge": 480,
    "longest_edge": 1333,
    "fixed_size": None,
    "size_divisor": 32,
    "fit": "pad",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# Fields that the other side has no counterpart for: where present, they must have these values.
_NATIVE_FIXED: Json = {
    "model_type": "m2f-video",
    "format_version": 1,
    "pixel_decoder.kind": "ms_deform_attn",
    "pixel_decoder.num_points": 4,
    "pixel_decoder.num_levels": 3,
    "transformer_decoder.dropout": 0.0,
    "transformer_decoder.cross_attention": "masked",
    "transformer_decoder.layer_order": "cross_first",
    "transformer_decoder.query_features": "learnable_supervised",
    "transformer_decoder.features": "round_robin",
    "transformer_decoder.scale": 8,
    "transformer_decoder.temporal_position": "sine_3d",
}
_HF_FIXED: Json = {
    "model_type": "mask2former",
    "activation_function": "relu",
    "pre_norm": False,
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
}
_SWIN_FIXED: Json = {
    "backbone_config.model_type": "swin",
    "backbone_config.patch_size": 4,
    "backbone_config.num_channels": 3,
    "backbone_config.hidden_act": "gelu",
    "backbone_config.layer_norm_eps": 1e-5,
    "backbone_config.use_absolute_embeddings": False,
    "backbone_config.hidden_dropout_prob": 0.0,
    "backbone_config.attention_probs_dropout_prob": 0.0,
}
_RESNET_FIXED: Json = {
    "backbone_config.model_type": "resnet",
    "backbone_config.num_channels": 3,
    "backbone_config.embedding_size": 64,
    "backbone_config.hidden_act": "relu",
    "backbone_config.downsample_in_first_stage": False,
    "backbone_config.downsample_in_bottleneck": False,
}
_TIMM_FIXED: Json = {"num_channels": 3, "features_only": True, "output_stride": None, "out_indices": [1, 2, 3, 4]}
_TIMM_OPTIONS = {*_TIMM_FIXED, "out_features", "use_pretrained_backbone", "freeze_batch_norm_2d"}
_BASIC: Json = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
_BOTTLENECK: Json = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}
RESNETS: dict[str, Json] = {
    "resnet18": _BASIC | {"depths": [2, 2, 2, 2]},
    "resnet26": _BOTTLENECK | {"depths": [2, 2, 2, 2]},
    "resnet34": _BASIC | {"depths": [3, 4, 6, 3]},
    "resnet50": _BOTTLENECK | {"depths": [3, 4, 6, 3]},
    "resnet101": _BOTTLENECK | {"depths": [3, 4, 23, 3]},
    "resnet152": _BOTTLENECK | {"depths": [3, 8, 36, 3]},
}
"""The timm models that transformers can express as a ResNet of its own, and what it calls that."""
_PROCESSOR_FIXED: Json = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "out_indices": [1, 2, 3, 4]}
MOST_LABELS = 30_000
_TEMPORAL_OF = {True: "joint", False: "per_frame"}  # by whether the architecture is VideoMask2Former...


def to_native_config(config: Json, preprocessor: Json | None = None, temporal: str | None = None) -> Json:
    """Give the native config for a config.json of either kind.

    Args:
        config: Native, or of transformers' Mask2Former.
        preprocessor: The preprocessor_config.json of the latter.
        temporal: ``"joint"`` or ``"per_frame"`` to override what the config says.

    Returns:
        A new native config.

    Raises:
        ConversionError: If the config is of another kind, or as `native_config_from_hf`.
    """
    _check_bounds(config)
    if _get(config, "model_type") != _NATIVE_FIXED["model_type"]:
        return native_config_from_hf(config, preprocessor, temporal)
    _check_fixed("config", config, {"format_version": _NATIVE_FIXED["format_version"]})
    native = copy.deepcopy(config)
    if temporal is not None:
        native["temporal"] = _temporal(temporal)
    return native


def native_config_from_hf(config: Json, preprocessor: Json | None = None, temporal: str | None = None) -> Json:
    """Translate a transformers Mask2Former config.

    Args:
        config: The content of config.json. Fields that old files lack take transformers' defaults.
        preprocessor: The content of preprocessor_config.json; None takes the defaults of the published video models,
            or of transformers for an image model.
        temporal: ``"joint"`` or ``"per_frame"``; None reads it from the architecture's name: ``VideoMask2Former...``
            is joint, anything else per frame.

    Returns:
        The native config. Its preprocessing belongs to the checkpoint, whatever ``temporal`` asks for: a video model's
        frames are padded to the divisor, as the original does, and an image model's are resized to it, as transformers
        does; but a ``fit`` in the preprocessor, which only a converted native config has, comes first.

    Raises:
        ConversionError: If a required field is missing or a value is one the native model cannot represent.
    """
    _check_bounds([config, preprocessor])
    if (model_type := _get(config, "model_type")) != _HF_FIXED["model_type"]:
        known = f"{_NATIVE_FIXED['model_type']} (native) and {_HF_FIXED['model_type']} (transformers)"
        raise ConversionError(f"config: model_type = {model_type!r:.60} is another architecture; known are {known}")
    _check_fixed("config", config, _HF_FIXED)
    native: Json = {
        "model_type": _NATIVE_FIXED["model_type"],
        "format_version": _NATIVE_FIXED["format_version"],
        "backbone": _backbone(config),
        "pixel_decoder": {"num_points": 4},
    }
    fields = _FIELDS if native["backbone"]["type"] == "timm" else _SWIN_FIELDS + _FIELDS
    for ours, theirs, default in fields:
        value = _checked(f"config: {theirs}", _get(config, theirs, default), default)
        _set(native, ours, value - 1 if theirs == "decoder_layers" else value)
    same_width = native["pixel_decoder"]["hidden_dim"] == native["transformer_decoder"]["hidden_dim"]
    _check_fixed("config", config, {"enforce_input_projection": False} if same_width else {})
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConversionError(f"config: architectures = {architectures!r:.60} must be a list of names")
    video = any(name.startswith("VideoMask2Former") for name in architectures)
    native["temporal"] = _temporal(temporal or _TEMPORAL_OF[video])
    native["labels"] = _labels(config)
    native["preprocessing"] = copy.deepcopy(_PREPROCESSING)
    if preprocessor is not None or not video:
        native["preprocessing"] |= _read(preprocessor or {}, fit="pad" if video else "resize")
    return native


def _backbone(config: Json) -> Json:
    """The native backbone of a transformers config."""
    backbone, named, options = config.get("backbone_config"), config.get("backbone"), "backbone_kwargs"
    if isinstance(backbone, dict) and backbone.get("model_type") == "timm_backbone":  # as newer files say it
        named, options = backbone.get("backbone"), "backbone_config"
    elif backbone is not None or named is None:
        if not isinstance(_get(config, "backbone_config"), dict):
            raise ConversionError(f"config: backbone_config = {backbone!r:.60} must be an object that holds a config")
        outputs = {name: _get(config, f"backbone_config.{name}", None) for name in _STAGES}
        if not any(outputs.values()) or any(value not in (None, _STAGES[name]) for name, value in outputs.items()):
            raise ConversionError(
                f"config: backbone_config must have all four stages in out_features, but has {outputs!s:.120}"
            )
        if _get(config, "backbone_config.model_type", "swin") != "resnet":
            _check_fixed("config", config, _SWIN_FIXED)
            return {"type": "swin"}
        _check_fixed("config", config, _RESNET_FIXED)
        found = {name: _get(config, f"backbone_config.{name}", like) for name, like in RESNETS["resnet50"].items()}
        if name := next((name for name, resnet in RESNETS.items() if resnet == found), None):
            return {"type": "timm", "name": name}
        raise ConversionError(
            f"config: backbone_config has {', '.join(f'{name} = {value!r:.40}' for name, value in found.items())}, "
            f"which is none of {', '.join(RESNETS)}"
        )
    given = config.get(options) or {}
    if not isinstance(given, dict):
        raise ConversionError(f"config: {options} = {given!r:.60} must be an object")
    _check_fixed("config", config, {f"{options}.{name}": wanted for name, wanted in _TIMM_FIXED.items()})
    if options == "backbone_kwargs":  # any field of the named backbone's own config, which they replace
        _check_fixed("config", config, {f"{options}.out_features": _STAGES["out_features"]})
        if other := next((name for name in given if name not in _TIMM_OPTIONS), None):
            raise ConversionError(f"config: {options}.{other!s:.60} = {given[other]!r:.60} cannot be represented")
    resnet = str(named).removeprefix("microsoft/").replace("resnet-", "resnet").split(".")[0]
    if isinstance(named, str) and resnet in RESNETS:
        return {"type": "timm", "name": resnet}
    raise ConversionError(
        f"config: the backbone is {named!r:.60}, given by its name; only {', '.join(RESNETS)} can be represented so"
    )


def hf_config_from_native(config: Json) -> tuple[Json, Json]:
    """Translate a native config for transformers.

    Args:
        config: A complete native config.

    Returns:
        The content of config.json and of preprocessor_config.json. Both load in transformers; the architecture is named
        ``VideoMask2Former...`` when temporal is joint, so that reading it back gives joint again.

    Raises:
        ConversionError: If a field is missing, or has no counterpart in transformers.
    """
    _check_bounds(config)
    _check_fixed("config", config, _NATIVE_FIXED)
    is_swin = _get(config, "backbone.type") == "swin"
    fields, own = (_SWIN_FIELDS + _FIELDS, "type") if is_swin else (_FIELDS, "name")
    known = {ours for ours, _, _ in fields} | _NATIVE_FIXED.keys() | {"temporal", "labels", "backbone.type"}
    known |= {f"backbone.{own}", "parts.loss", "parts.matcher"}  # the latter matter in training alone
    known |= {f"preprocessing.{name}" for name in _PREPROCESSING}
    if unknown := sorted(_paths(config) - known):
        raise ConversionError(f"config: {unknown[0]:.100} cannot be expressed in the hf format; keep the model native")
    heads = [_get(config, f"{part}.num_heads") for part in ("pixel_decoder", "transformer_decoder")]
    if heads[0] != heads[1]:
        raise ConversionError(
            f"config: pixel_decoder.num_heads = {heads[0]!r:.40} and transformer_decoder.num_heads = {heads[1]!r:.40} "
            "differ, which the hf format cannot express; keep the model native"
        )
    video = _temporal(_get(config, "temporal")) == "joint"
    labels = _get(config, "labels")
    if not isinstance(labels, (list, tuple)) or not labels or not all(isinstance(label, str) for label in labels):
        raise ConversionError("config: labels must be a list of at least one name")
    hf: Json = {
        "architectures": ["VideoMask2FormerForVideoSegmentation" if video else "Mask2FormerForUniversalSegmentation"],
        "backbone_config": copy.deepcopy(_STAGES),
    }
    for name, value in copy.deepcopy(_HF_FIXED | (_SWIN_FIXED if is_swin else _RESNET_FIXED)).items():
        _set(hf, name, value)
    if not is_swin:
        hf["backbone_config"] |= copy.deepcopy(_resnet(config))
    for ours, theirs, like in fields:
        value = _checked(f"config: {ours}", _get(config, ours), like)
        _set(hf, theirs, value + 1 if theirs == "decoder_layers" else value)
    hf["id2label"] = {str(index): label for index, label in enumerate(labels)}
    hf["label2id"] = {label: index for index, label in enumerate(labels)}
    return hf, _written(config) | {"num_labels": len(labels)}


def _resnet(config: Json) -> Json:
    """What transformers calls the timm backbone of a native config."""
    kind = _get(config, "backbone.type")
    if kind != "timm":
        raise ConversionError(f"config: backbone.type = {kind!r:.60} is unknown; it must be swin or timm")
    name = _get(config, "backbone.name")
    if not isinstance(name, str) or name not in RESNETS:
        raise ConversionError(
            f"config: backbone.name = {name!r:.60} cannot be expressed in the hf format, which has "
            f"{', '.join(RESNETS)} of timm's models; keep the model native"
        )
    return RESNETS[name]


def _check_bounds(config: Any) -> None:
    """Refuse what is nested further than any config, before something recursive meets it."""
    with naming("config"):
        all_values(config)


def _read(processor: Json, fit: str) -> Json:
    """The native preprocessing of an HF image processor; ``fit`` is for one that does not say it."""
    _check_fixed("preprocessor", processor, _PROCESSOR_FIXED | {"pad_size": None})
    factor = processor.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConversionError(f"preprocessor: rescale_factor = {factor!r:.60} cannot be represented; only 1/255 can")
    native: Json = {"fit": processor.get("fit", fit)}
    for name in ("size_divisor", "image_mean", "image_std"):
        like = _PREPROCESSING[name]
        native[name] = _checked(f"preprocessor: {name}", processor.get(name, like), like)
    size = processor.get("size", {"shortest_edge": 800, "longest_edge": processor.get("max_size", 1333)})
    if isinstance(size, int):  # the oldest files
        size = {"shortest_edge": size}
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return native | {"fixed_size": _checked("preprocessor: size", [size["height"], size["width"]], [1, 1])}
    if not isinstance(size, dict) or "shortest_edge" not in size:
        raise ConversionError(f"preprocessor: size = {size!r:.60} has neither shortest_edge nor height and width")
    longest = size.get("longest_edge") or processor.get("_max_size") or processor.get("max_size")
    native["shortest_edge"] = _checked("preprocessor: size.shortest_edge", size["shortest_edge"], 1)
    native["longest_edge"] = _checked("preprocessor: size.longest_edge", longest, 1)
    return native


def _written(config: Json) -> Json:
    """The HF image processor of a native config."""
    own: Json = {}
    for name, like in _PREPROCESSING.items():
        value = _get(config, f"preprocessing.{name}")
        free = name in ("fit", "fixed_size")
        own[name] = value if free else _checked(f"config: preprocessing.{name}", value, like)
    size = {name: own.pop(name) for name in ("shortest_edge", "longest_edge")}
    if (fixed := own.pop("fixed_size")) is not None:
        size = dict(zip(("height", "width"), _checked("config: preprocessing.fixed_size", fixed, [1, 1]), strict=True))
    processor = {"image_processor_type": "Mask2FormerImageProcessor", "rescale_factor": 1 / 255, "ignore_index": 255}
    return {**processor, **_PROCESSOR_FIXED, "size": size, **own}


def _check_fixed(where: str, config: Json, fixed: Json) -> None:
    for name, wanted in fixed.items():
        value = _get(config, name, wanted)
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            raise ConversionError(f"{where}: {name} = {value!r:.60} cannot be represented; only {wanted!r} can")


def _labels(config: Json) -> list[str]:
    id2label, count = config.get("id2label"), config.get("num_labels")
    if id2label is None:  # what transformers makes of it
        if count is not None and (type(count) is not int or not 1 <= count <= MOST_LABELS):
            raise ConversionError(f"config: num_labels = {count!r:.60} must be a whole number from 1 to {MOST_LABELS}")
        return [f"LABEL_{index}" for index in range(2 if count is None else count)]
    names = {str(index): label for index, label in id2label.items()} if isinstance(id2label, dict) else {}
    if len(names) > MOST_LABELS:
        raise ConversionError(f"config: id2label has {len(names)} labels; there may be {MOST_LABELS}")
    if not names or names.keys() != {str(index) for index in range(len(names))}:
        raise ConversionError("config: id2label must map 0, 1, ... K-1, each once, to names")
    if odd := [label for label in names.values() if not isinstance(label, str | int)]:
        raise ConversionError(f"config: id2label holds {odd[0]!r:.60}, which is no name")
    return [str(names[str(index)]) for index in range(len(names))]


def _temporal(value: Any) -> str:
    if value not in _TEMPORAL_OF.values():
        raise ConversionError(f"config: temporal = {value!r:.60} is unknown; use joint or per_frame")
    return str(value)


def _checked(name: str, value: Any, like: Any) -> Any:
    """Return the value if it is of the kind of ``like``: a switch, a count, a rate, or a list of as many of them."""
    if isinstance(like, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            raise ConversionError(f"{name} = {value!r:.60} must be a list of {len(like)}")
        return [_checked(name, item, like[0]) for item in value]
    if isinstance(like, bool):
        good, kind = isinstance(value, bool), "true or false"
    elif isinstance(like, int):
        good, kind = type(value) is int and value >= 1, "a whole number of at least 1"
    else:
        good, kind = type(value) in (int, float) and 0 <= value < math.inf, "a number of at least 0"
    if not good:
        raise ConversionError(f"{name} = {value!r:.60} must be {kind}")
    return value


_MISSING = object()


def _get(config: Json, path: str, default: Any = _MISSING) -> Any:
    """Look up a dotted name; without a default it is required."""
    at: Any = config
    for name in path.split("."):
        if not isinstance(at, dict) or name not in at:
            if default is _MISSING:
                raise ConversionError(f"config: {path} is missing; it is required")
            return default
        at = at[name]
    return at


def _set(config: Json, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[name] = value


def _paths(config: Json, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in config.items():
        found |= _paths(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found

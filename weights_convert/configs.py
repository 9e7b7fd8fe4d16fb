"""Configs in, configs out: transformers' Mask2Former config and image processor against the native one, as plain dicts.

One table of fields serves both directions, beside tables of the values that only one side has a field for. A field that
the other side cannot express is an error that names it, never dropped.

A round trip native -> hf -> native gives back the same config, with one exception: under a ``fixed_size`` the two
edges, which have no effect then, come back as the defaults. ``fit`` travels under a key that transformers ignores.
"""

import copy
import math
from typing import Any

from weights_convert.errors import ConversionError

Json = dict[str, Any]

# native field, hf field, what transformers takes when an old config leaves it out (and so its type)
_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("backbone.embed_dim", "backbone_config.embed_dim", 96),
    ("backbone.depths", "backbone_config.depths", [2, 2, 6, 2]),
    ("backbone.num_heads", "backbone_config.num_heads", [3, 6, 12, 24]),
    ("backbone.window_size", "backbone_config.window_size", 7),
    ("backbone.mlp_ratio", "backbone_config.mlp_ratio", 4.0),
    ("backbone.qkv_bias", "backbone_config.qkv_bias", True),
    ("backbone.drop_path_rate", "backbone_config.drop_path_rate", 0.1),
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
    "backbone.type": "swin",
    "pixel_decoder.num_points": 4,
}
_HF_FIXED: Json = {
    "model_type": "mask2former",
    "activation_function": "relu",
    "pre_norm": False,
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
    "backbone_config.model_type": "swin",
    "backbone_config.patch_size": 4,
    "backbone_config.num_channels": 3,
    "backbone_config.hidden_act": "gelu",
    "backbone_config.layer_norm_eps": 1e-5,
    "backbone_config.use_absolute_embeddings": False,
    "backbone_config.hidden_dropout_prob": 0.0,
    "backbone_config.attention_probs_dropout_prob": 0.0,
}
_PROCESSOR_FIXED: Json = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "out_indices": [1, 2, 3, 4]}
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
    if config.get("model_type") != _NATIVE_FIXED["model_type"]:
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
        preprocessor: The content of preprocessor_config.json; None takes the defaults of the published video models.
        temporal: ``"joint"`` or ``"per_frame"``; None reads it from the architecture's name: ``VideoMask2Former...``
            is joint, anything else per frame.

    Returns:
        The native config.

    Raises:
        ConversionError: If a required field is missing or a value is one the native model cannot represent.
    """
    if (model_type := _get(config, "model_type")) != _HF_FIXED["model_type"]:
        known = f"{_NATIVE_FIXED['model_type']} (native) and {_HF_FIXED['model_type']} (transformers)"
        raise ConversionError(f"config: model_type = {model_type!r} is another architecture; known are {known}")
    _check_fixed("config", config, _HF_FIXED)
    _get(config, "backbone_config")
    outputs = {name: _get(config, f"backbone_config.{name}", None) for name in _STAGES}
    if not any(outputs.values()) or any(value not in (None, _STAGES[name]) for name, value in outputs.items()):
        raise ConversionError(f"config: backbone_config must have all four stages in out_features, but has {outputs}")
    native: Json = {
        "model_type": _NATIVE_FIXED["model_type"],
        "format_version": _NATIVE_FIXED["format_version"],
        "backbone": {"type": "swin"},
        "pixel_decoder": {"num_points": 4},
    }
    for ours, theirs, default in _FIELDS:
        value = _checked(f"config: {theirs}", _get(config, theirs, default), default)
        _set(native, ours, value - 1 if theirs == "decoder_layers" else value)
    same_width = native["pixel_decoder"]["hidden_dim"] == native["transformer_decoder"]["hidden_dim"]
    _check_fixed("config", config, {"enforce_input_projection": False} if same_width else {})
    video = any(str(name).startswith("VideoMask2Former") for name in config.get("architectures") or [])
    native["temporal"] = _temporal(temporal or _TEMPORAL_OF[video])
    native["labels"] = _labels(config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}))
    native["preprocessing"] = copy.deepcopy(_PREPROCESSING) | ({} if preprocessor is None else _read(preprocessor))
    return native


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
    _check_fixed("config", config, _NATIVE_FIXED)
    known = {ours for ours, _, _ in _FIELDS} | _NATIVE_FIXED.keys() | {"temporal", "labels"}
    known |= {f"preprocessing.{name}" for name in _PREPROCESSING}
    if unknown := sorted(_paths(config) - known):
        raise ConversionError(f"config: {unknown[0]} cannot be expressed in the hf format; keep the model native")
    heads = [_get(config, f"{part}.num_heads") for part in ("pixel_decoder", "transformer_decoder")]
    if heads[0] != heads[1]:
        raise ConversionError(
            f"config: pixel_decoder.num_heads = {heads[0]} and transformer_decoder.num_heads = {heads[1]} differ, "
            "which the hf format cannot express; keep the model native"
        )
    video = _temporal(_get(config, "temporal")) == "joint"
    labels = _get(config, "labels")
    if not isinstance(labels, (list, tuple)) or not labels or not all(isinstance(label, str) for label in labels):
        raise ConversionError("config: labels must be a list of at least one name")
    hf: Json = {
        "architectures": ["VideoMask2FormerForVideoSegmentation" if video else "Mask2FormerForUniversalSegmentation"],
        "backbone_config": copy.deepcopy(_STAGES),
    }
    for name, value in copy.deepcopy(_HF_FIXED).items():
        _set(hf, name, value)
    for ours, theirs, like in _FIELDS:
        value = _checked(f"config: {ours}", _get(config, ours), like)
        _set(hf, theirs, value + 1 if theirs == "decoder_layers" else value)
    hf["id2label"] = {str(index): label for index, label in enumerate(labels)}
    hf["label2id"] = {label: index for index, label in enumerate(labels)}
    return hf, _written(config) | {"num_labels": len(labels)}


def _read(processor: Json) -> Json:
    """The native preprocessing of an HF image processor."""
    _check_fixed("preprocessor", processor, _PROCESSOR_FIXED)
    factor = processor.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConversionError(f"preprocessor: rescale_factor = {factor!r} cannot be represented; only 1/255 can")
    native: Json = {"fit": processor.get("fit", _PREPROCESSING["fit"])}
    for name in ("size_divisor", "image_mean", "image_std"):
        like = _PREPROCESSING[name]
        native[name] = _checked(f"preprocessor: {name}", processor.get(name, like), like)
    size = processor.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    if isinstance(size, int):  # the oldest files
        size = {"shortest_edge": size}
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return native | {"fixed_size": _checked("preprocessor: size", [size["height"], size["width"]], [1, 1])}
    if not isinstance(size, dict) or "shortest_edge" not in size:
        raise ConversionError(f"preprocessor: size = {size!r} has neither shortest_edge nor height and width")
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
            raise ConversionError(f"{where}: {name} = {value!r} cannot be represented; only {wanted!r} can")


def _labels(id2label: Any) -> list[str]:
    names = {str(index): str(label) for index, label in id2label.items()} if isinstance(id2label, dict) else {}
    if not names or names.keys() != {str(index) for index in range(len(names))}:
        raise ConversionError("config: id2label must map 0, 1, ... K-1, each once, to names")
    return [names[str(index)] for index in range(len(names))]


def _temporal(value: Any) -> str:
    if value not in _TEMPORAL_OF.values():
        raise ConversionError(f"config: temporal = {value!r} is unknown; use joint or per_frame")
    return str(value)


def _checked(name: str, value: Any, like: Any) -> Any:
    """Return the value if it is of the kind of ``like``: a switch, a count, a rate, or a list of as many of them."""
    if isinstance(like, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            raise ConversionError(f"{name} = {value!r} must be a list of {len(like)}")
        return [_checked(name, item, like[0]) for item in value]
    if isinstance(like, bool):
        good, kind = isinstance(value, bool), "true or false"
    elif isinstance(like, int):
        good, kind = type(value) is int and value >= 1, "a whole number of at least 1"
    else:
        good, kind = type(value) in (int, float) and 0 <= value < math.inf, "a number of at least 0"
    if not good:
        raise ConversionError(f"{name} = {value!r} must be {kind}")
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

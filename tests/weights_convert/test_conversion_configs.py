"""Config translation: equal after a round trip, and every field that does not fit is named."""

import copy
import json

import pytest

from weights_convert import ConversionError, hf_config_from_native, native_config_from_hf, to_native_config
from weights_convert.configs import MOST_LABELS, RESNETS


def set_field(config, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        config = config[parent]
    config[name] = value


def published():
    """As the published video checkpoints: class names that no release has, and more fields than matter here."""
    return {
        "architectures": ["VideoMask2FormerForVideoSegmentation"],
        "model_type": "mask2former",
        "backbone_config": {
            "model_type": "swin",
            "depths": [2, 2, 6, 2],
            "id2label": {"0": "tench", "1": "goldfish"},
            "drop_path_rate": 0.3,
            "image_size": 224,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
            "out_indices": [1, 2, 3, 4],
        },
        "backbone": None,
        "decoder_layers": 10,
        "id2label": {str(at): f"class {at}" for at in range(40)},
        "num_queries": 100,
        "torch_dtype": "float32",
        "transformers_version": "4.29.0.dev0",
    }


def processor():
    return {
        "_max_size": 1333,
        "image_processor_type": "VideoMask2FormerImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
        "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552],
        "ignore_index": 255,
        "num_labels": 40,
        "reduce_labels": False,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 1333, "shortest_edge": 480},
        "size_divisor": 32,
    }


def test_published_config():
    native = native_config_from_hf(published(), processor())
    assert native["temporal"] == "joint"
    assert native["labels"] == [f"class {at}" for at in range(40)]
    assert native["transformer_decoder"] == {
        "hidden_dim": 256,
        "num_queries": 100,
        "num_layers": 9,
        "num_heads": 8,
        "ffn_dim": 2048,
    }
    assert native["pixel_decoder"]["num_layers"] == 6
    assert native["backbone"] == {
        "type": "swin",
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_path_rate": 0.3,
    }
    assert native["preprocessing"]["shortest_edge"] == 480
    assert native["preprocessing"]["image_mean"] == processor()["image_mean"]


@pytest.mark.parametrize(
    ("architectures", "temporal", "expected"),
    [
        (["VideoMask2FormerForVideoSegmentation"], None, "joint"),
        (["VideoMask2FormerForVideoSegmentation"], "per_frame", "per_frame"),
        (["Mask2FormerForUniversalSegmentation"], None, "per_frame"),
        (["Mask2FormerForUniversalSegmentation"], "joint", "joint"),
        (None, None, "per_frame"),
    ],
)
def test_temporal_comes_from_the_architecture(architectures, temporal, expected):
    config = published() | {"architectures": architectures}
    assert native_config_from_hf(config, temporal=temporal)["temporal"] == expected


@pytest.mark.parametrize("temporal", [None, "joint", "per_frame"])
@pytest.mark.parametrize("name", ["Mask2FormerForUniversalSegmentation", "VideoMask2FormerForVideoSegmentation"])
def test_preprocessing_belongs_to_the_checkpoint_whatever_the_temporal_mode(name, temporal):
    config, video = published() | {"architectures": [name]}, name.startswith("Video")
    fit = "pad" if video else "resize"
    for own in (processor(), {}, {"size": {"height": 384, "width": 640}}):
        assert native_config_from_hf(config, own, temporal)["preprocessing"]["fit"] == fit
        for said in ("pad", "resize"):
            assert native_config_from_hf(config, own | {"fit": said}, temporal)["preprocessing"]["fit"] == said
    without = native_config_from_hf(config, None, temporal)["preprocessing"]
    assert (without["fit"], without["shortest_edge"]) == (fit, 480 if video else 800)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temporal": "per_frame"},
        {"preprocessing.fit": "resize", "preprocessing.size_divisor": 64},
        {"preprocessing.image_mean": [0.1, 0.2, 0.3]},
        {"preprocessing.fixed_size": [480, 640]},
        {"pixel_decoder.hidden_dim": 96, "pixel_decoder.mask_dim": 32, "transformer_decoder.hidden_dim": 128},
        {"pixel_decoder.dropout": 0.1, "backbone.qkv_bias": False, "backbone.mlp_ratio": 2.5},
        {"pixel_decoder.num_heads": 4, "transformer_decoder.num_heads": 4},
        {"labels": ["one", "two", "one"]},
        *({"backbone": {"type": "timm", "name": name}} for name in RESNETS),
    ],
)
def test_round_trip_is_equal(config, changes):
    for path, value in changes.items():
        set_field(config, path, value)
    before = copy.deepcopy(config)
    hf, preprocessor = json.loads(json.dumps(hf_config_from_native(config)))
    assert native_config_from_hf(hf, preprocessor) == config
    assert config == before


def test_round_trip_of_fixed_size_forgets_the_edges(config):
    config["preprocessing"] |= {"fixed_size": [480, 640], "shortest_edge": 360}
    assert native_config_from_hf(*hf_config_from_native(config))["preprocessing"]["shortest_edge"] == 480


def test_results_are_independent_of_each_other(config):
    hf_config_from_native(config)[0]["feature_strides"].append(64)
    hf_config_from_native(config)[0]["backbone_config"]["out_features"].append("stage5")
    native_config_from_hf(published())["preprocessing"]["image_mean"].append(1)
    assert hf_config_from_native(config)[0]["feature_strides"] == [4, 8, 16, 32]
    assert len(hf_config_from_native(config)[0]["backbone_config"]["out_features"]) == 4
    assert len(native_config_from_hf(published())["preprocessing"]["image_mean"]) == 3


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", "maskformer"),
        ("pre_norm", True),
        ("activation_function", "gelu"),
        ("common_stride", 8),
        ("feature_strides", [8, 16, 32, 64]),
        ("enforce_input_projection", True),
        ("backbone_config.model_type", "convnext"),
        ("backbone_config", []),
        ("backbone_config", "swin"),
        ("architectures", 5),
        ("architectures", [None]),
        ("backbone_config.use_absolute_embeddings", True),
        ("backbone_config.hidden_act", "relu"),
        ("backbone_config.num_channels", 4),
        ("backbone_config.patch_size", 2),
        ("backbone_config.layer_norm_eps", 1e-6),
        ("backbone_config.hidden_dropout_prob", 0.1),
        ("backbone_config.depths", [2, 2, 6]),
        ("backbone_config.embed_dim", "96"),
        ("backbone_config.qkv_bias", 1),
        ("backbone_config.drop_path_rate", float("nan")),
        ("num_queries", 0),
        ("num_queries", True),
        ("hidden_dim", 256.0),
    ],
)
def test_what_the_native_model_cannot_represent_is_named(path, value):
    config = published()
    set_field(config, path, value)
    with pytest.raises(ConversionError) as error:
        native_config_from_hf(config)
    assert path in str(error.value)
    assert repr(value) in str(error.value)


def test_enforced_projection_between_unequal_widths_is_what_is_built_anyway():
    config = published() | {"hidden_dim": 128, "enforce_input_projection": True}
    assert native_config_from_hf(config)["transformer_decoder"]["hidden_dim"] == 128


@pytest.mark.parametrize("name", ["model_type", "backbone_config"])
def test_missing_field_is_named(name):
    config = published()
    del config[name]
    with pytest.raises(ConversionError, match=f"{name} is missing"):
        native_config_from_hf(config)


@pytest.mark.parametrize(
    "outputs",
    [
        {"out_features": None, "out_indices": None},
        {"out_features": ["stage2", "stage3", "stage4"], "out_indices": None},
        {"out_features": ["stage1", "stage2", "stage3", "stage4"], "out_indices": [0, 1, 2, 3]},
    ],
)
def test_backbone_must_give_all_stages(outputs):
    config = published()
    config["backbone_config"] |= outputs
    with pytest.raises(ConversionError, match="all four stages in out_features"):
        native_config_from_hf(config)


@pytest.mark.parametrize("id2label", [{}, {"1": "a", "2": "b"}, {"0": "a", "2": "b"}, ["a"], {"0": "a", "00": "b"}])
def test_labels_must_be_contiguous(id2label):
    with pytest.raises(ConversionError, match="id2label must map 0, 1"):
        native_config_from_hf(published() | {"id2label": id2label})


@pytest.mark.parametrize("label", [None, ["a"], {"name": "a"}, 1.5])
def test_labels_must_be_names(label):
    with pytest.raises(ConversionError, match=r"id2label holds .* no name"):
        native_config_from_hf(published() | {"id2label": {"0": "a", "1": label}})


@pytest.mark.parametrize(("changes", "count"), [({}, 2), ({"num_labels": 5}, 5), ({"num_labels": 1}, 1)])
def test_a_number_of_labels_stands_for_their_names(changes, count):
    config = {key: value for key, value in published().items() if key != "id2label"} | changes
    assert native_config_from_hf(config)["labels"] == [f"LABEL_{index}" for index in range(count)]
    assert native_config_from_hf(config | {"id2label": None})["labels"] == native_config_from_hf(config)["labels"]


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "5", [], 10**12])
def test_a_number_of_labels_that_is_none_is_named(count):
    with pytest.raises(ConversionError, match=r"num_labels = .* must be a whole number from 1 to"):
        native_config_from_hf(published() | {"id2label": None, "num_labels": count})


def test_the_number_of_labels_is_bounded():
    from m2f_video.config import MOST_LABELS as MOST_OF_A_MODEL

    assert MOST_LABELS == MOST_OF_A_MODEL
    labels = {str(index): "a" for index in range(MOST_LABELS + 1)}
    with pytest.raises(ConversionError, match=f"id2label has {MOST_LABELS + 1} labels"):
        native_config_from_hf(published() | {"id2label": labels})


# ---- ResNets ----


def resnet(**changes):
    """A config with a ResNet-50, as transformers writes it."""
    backbone = {
        "model_type": "resnet",
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
        "layer_type": "bottleneck",
        "embedding_size": 64,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    return published() | {"backbone_config": backbone | changes}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "resnet50"),
        ({"depths": [3, 4, 23, 3]}, "resnet101"),
        ({"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}, "resnet18"),
    ],
)
def test_a_resnet_is_the_one_of_timm(changes, name):
    assert native_config_from_hf(resnet(**changes))["backbone"] == {"type": "timm", "name": name}


def test_a_resnet_that_says_nothing_takes_the_defaults_of_transformers():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = published() | {"backbone_config": {"model_type": "resnet", "out_features": stages}}
    assert native_config_from_hf(config)["backbone"]["name"] == "resnet50"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depths", [3, 4, 6, 4]),
        ("depths", None),
        ("hidden_sizes", [64, 128, 256, 512]),
        ("layer_type", "basic"),
        ("embedding_size", 32),
        ("hidden_act", "gelu"),
        ("num_channels", 4),
        ("downsample_in_first_stage", True),
        ("downsample_in_bottleneck", True),
    ],
)
def test_a_resnet_that_timm_does_not_have_is_named(field, value):
    with pytest.raises(ConversionError) as error:
        native_config_from_hf(resnet(**{field: value}))
    assert f"{field} = {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"backbone": "microsoft/resnet-50", "backbone_config": None}, "resnet50"),
        ({"backbone": "resnet101", "use_timm_backbone": True, "backbone_config": None}, "resnet101"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18.a1_in1k"}}, "resnet18"),
    ],
)
def test_a_backbone_given_by_its_name(changes, name):
    assert native_config_from_hf(published() | changes)["backbone"] == {"type": "timm", "name": name}


@pytest.mark.parametrize("is_timm", [True, False])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_channels", 4),
        ("output_stride", 16),
        ("out_indices", [-1]),
        ("out_indices", [0, 1, 2, 3]),
        ("features_only", False),
        ("", 5),
        ("", [4]),
    ],
)
def test_a_timm_backbone_that_is_used_otherwise_is_named(is_timm, field, value):
    where = "backbone_config" if is_timm else "backbone_kwargs"
    given = {"model_type": "timm_backbone", "backbone": "resnet18"} if is_timm else {}
    options = given | {field: value} if field else value
    config = published() | {"backbone": "resnet18", "backbone_config": None, where: options}
    with pytest.raises(ConversionError) as error:
        native_config_from_hf(config)
    assert f"{where}.{field}".strip(".") in str(error.value)
    assert f"= {value!r}" in str(error.value)


@pytest.mark.parametrize("option", [{"depths": [3, 4, 6, 3]}, {"out_features": ["stage4"]}, {5: 6}])
def test_options_that_make_another_backbone_are_named(option):
    changes = {"backbone": "microsoft/resnet-50", "backbone_config": None, "backbone_kwargs": option}
    said = rf"config: backbone_kwargs\.{next(iter(option))} = .* cannot be represented"
    with pytest.raises(ConversionError, match=said):
        native_config_from_hf(published() | changes)


@pytest.mark.parametrize(
    "options", [{}, {"out_indices": (1, 2, 3, 4), "num_channels": 3, "output_stride": None, "features_only": True}]
)
def test_a_timm_backbone_that_is_used_as_here(options):
    for changes in (
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", **options}},
        {"backbone": "resnet18", "backbone_config": None, "backbone_kwargs": options or None},
    ):
        assert native_config_from_hf(published() | changes)["backbone"]["name"] == "resnet18"


@pytest.mark.parametrize("name", ["microsoft/swin-tiny-patch4-window7-224", "efficientnet_b0", 5, ["resnet50"]])
@pytest.mark.parametrize("is_timm", [True, False])
def test_a_backbone_of_another_name_is_named(name, is_timm):
    timm = {"model_type": "timm_backbone", "backbone": name}
    with pytest.raises(ConversionError) as error:
        native_config_from_hf(published() | {"backbone": name, "backbone_config": timm if is_timm else None})
    assert f"the backbone is {name!r}, given by its name" in str(error.value)


def nested(kind, levels=900):
    """As deep as JSON can be read."""
    value = kind()
    for _ in range(levels):
        value = {"a": value} if kind is dict else [value]
    return value


NUMBERS = (True, -1, 0, 5, 1.5, 10**400, 10**4000, float("nan"), float("inf"))
ODD = (None, *NUMBERS, "", "x", "x" * 1000, [], [[]], [None], {}, {"a": {}}, nested(list), nested(dict))


def mutants(config):
    """The config with each of its fields and sections replaced by whatever JSON may hold, or removed."""
    for name, value in config.items():
        yield {key: kept for key, kept in config.items() if key != name}
        for odd in ODD:
            yield config | {name: odd}
        if isinstance(value, dict):
            for mutant in mutants(value):
                yield config | {name: mutant}
        if isinstance(value, list):
            for odd in ODD:
                yield config | {name: [odd, *value[1:]]}


def failures(convert, *configs):
    """The share of configs that are refused, each by one short line."""
    told = []
    for config in configs:
        try:
            convert(config)
        except ConversionError as error:
            told.append(str(error))
    assert all(len(message) < 300 and "\n" not in message for message in told)
    return len(told) / len(configs)


def test_no_foreign_config_is_a_traceback():
    small = published() | {"id2label": {"0": "a"}}
    for config in (
        small,
        resnet() | {"id2label": {"0": "a"}},
        small | {"backbone": "resnet50", "backbone_config": None},
    ):
        assert 0.2 < failures(native_config_from_hf, *mutants(config)) < 0.95
    preprocessors = mutants(processor())
    assert 0.2 < failures(lambda mutant: native_config_from_hf(small, mutant), *preprocessors) < 0.95


def test_no_native_config_is_a_traceback(config):
    assert 0.7 < failures(hf_config_from_native, *mutants(config)) < 1
    assert 0 < failures(to_native_config, *mutants(config)) < 1
    for convert in (hf_config_from_native, to_native_config, native_config_from_hf):
        assert failures(convert, *ODD) == 1


@pytest.mark.parametrize("path", ["num_queries", "architectures", "backbone_config", "model_type", "num_labels"])
def test_messages_stay_short(path):
    with pytest.raises(ConversionError) as error:
        native_config_from_hf(published() | {"id2label": None, path: [["x" * 1000]] * 1000})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": {"height": 384, "width": 640}}, {"fixed_size": [384, 640], "shortest_edge": 480}),
        ({"size": {"shortest_edge": 360}, "_max_size": 640}, {"shortest_edge": 360, "longest_edge": 640}),
        ({"size": 360, "max_size": 600}, {"shortest_edge": 360, "longest_edge": 600}),
        ({"max_size": 1000}, {"shortest_edge": 800, "longest_edge": 1000}),
    ],
)
def test_processor_sizes(changes, expected):
    base = {key: value for key, value in processor().items() if key not in ("size", "_max_size")}
    native = native_config_from_hf(published(), base | changes)["preprocessing"]
    assert native | expected == native


def test_processor_that_says_nothing_takes_the_defaults_of_transformers():
    native = native_config_from_hf(published(), {})["preprocessing"]
    assert (native["shortest_edge"], native["longest_edge"], native["size_divisor"]) == (800, 1333, 32)
    assert native_config_from_hf(published())["preprocessing"]["shortest_edge"] == 480


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_resize", False),
        ("do_normalize", False),
        ("do_rescale", False),
        ("resample", 3),
        ("rescale_factor", 1.0),
        ("rescale_factor", None),
        ("size", {"longest_edge": 1333}),
        ("size", {"shortest_edge": 0, "longest_edge": 1333}),
        ("size", "large"),
        ("size_divisor", 0),
        ("pad_size", {"height": 800, "width": 800}),
        ("image_mean", [0.5]),
        ("image_std", [0.5, 0.5, "0.5"]),
    ],
)
def test_processor_that_cannot_be_represented_is_named(name, value):
    with pytest.raises(ConversionError, match=f"preprocessor: {name}"):
        native_config_from_hf(published(), processor() | {name: value})


def test_processor_without_longest_edge_is_named():
    bare = {"size": {"shortest_edge": 480}}
    with pytest.raises(ConversionError, match=r"size\.longest_edge = None"):
        native_config_from_hf(published(), bare)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", "mask2former"),
        ("format_version", 2),
        ("backbone.name", {"type": "timm", "name": "convnext_tiny"}),
        ("backbone.name", {"type": "timm", "name": ["resnet50"]}),
        ("backbone.depths", {"type": "timm", "name": "resnet50", "depths": [3, 4, 6, 3]}),
        ("backbone.type", {"type": "vit", "name": "resnet50"}),
        ("backbone.name", {"type": "swin", "name": "resnet50"}),
        ("backbone.patch_size", 2),
        ("pixel_decoder.num_points", 8),
        ("pixel_decoder.kind", "fpn"),
        ("pixel_decoder.num_levels", 4),
        ("pixel_decoder.num_layers", 0),
        ("transformer_decoder.cross_attention", "full"),
        ("transformer_decoder.query_features", "zero"),
        ("transformer_decoder.dropout", 0.1),
        ("pixel_decoder.num_heads", 4),
        ("pixel_decoder.ffn_dim", -1),
        ("pixel_decoder.new_switch", True),
        ("transformer_decoder.attention", "pooled"),
        ("temporal", "windowed"),
        ("labels", []),
        ("labels", "person"),
        ("preprocessing.fixed_size", [480]),
        ("preprocessing.image_std", None),
        ("preprocessing.crop", 3),
        ("preprocessing." + 100 * "x", 3),
    ],
)
def test_what_transformers_cannot_express_is_named(config, path, value):
    set_field(config, path.split(".")[0] if isinstance(value, dict) else path, value)
    with pytest.raises(ConversionError, match=path[:90]):
        hf_config_from_native(config)


@pytest.mark.parametrize(
    "path", ["backbone.embed_dim", "pixel_decoder.num_heads", "temporal", "labels", "preprocessing.fit"]
)
def test_missing_native_field_is_named(config, path):
    parent, _, name = path.rpartition(".")
    del (config[parent] if parent else config)[name]
    with pytest.raises(ConversionError, match=f"{path} is missing"):
        hf_config_from_native(config)


def test_either_kind_of_config_gives_a_native_one(config):
    assert to_native_config(config) == config
    assert to_native_config(config, temporal="per_frame")["temporal"] == "per_frame"
    assert config["temporal"] == "joint"
    assert to_native_config(published(), processor()) == native_config_from_hf(published(), processor())
    with pytest.raises(ConversionError, match="model_type is missing"):
        to_native_config({})
    with pytest.raises(ConversionError, match="format_version = 9"):
        to_native_config(config | {"format_version": 9})
    with pytest.raises(ConversionError, match="temporal = 'windowed' is unknown"):
        to_native_config(config, temporal="windowed")

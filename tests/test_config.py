import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2f_video import config as config_module
from m2f_video.categories import LABEL_SETS
from m2f_video.checked_config import ConfigError, flatten
from m2f_video.config import (
    PRESETS,
    PixelDecoderConfig,
    PreprocessingConfig,
    SwinConfig,
    TimmBackboneConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.inference.processor import VideoProcessor
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.parity import random_frames, random_model

BASE = VideoMask2FormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=3, mlp_ratio=2.0),
    pixel_decoder=PixelDecoderConfig(
        hidden_dim=32, mask_dim=16, num_layers=1, ffn_dim=16, num_heads=4, num_points=2, dropout=0.2
    ),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=32, num_queries=5, num_layers=3, num_heads=4, ffn_dim=16),
    labels=("cat", "dog"),
    preprocessing=PreprocessingConfig(shortest_edge=48, longest_edge=100),
)
TIMM = BASE.replace(backbone=TimmBackboneConfig(name="test_convnext"))

# --- every field has an effect

Effect = Callable[[VideoMask2FormerConfig], Any]


def weight_shapes(config: VideoMask2FormerConfig) -> Any:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in VideoMask2Former(config).state_dict().items()}


def outputs(config: VideoMask2FormerConfig, training: bool = False) -> Any:
    """Predictions with the same weights, whatever the config."""
    model = VideoMask2Former(config)
    weights = random_model(BASE, 0).state_dict()
    weights = {name: weights[name][: len(tensor)] for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    model.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        return model(random_frames(2, 32, 64, seed=0)[None]).class_queries_logits.tolist()


def outputs_in_training(config: VideoMask2FormerConfig) -> Any:
    return outputs(config, training=True)


def model_input(config: VideoMask2FormerConfig) -> Any:
    video = np.random.default_rng(0).integers(0, 256, (1, 40, 70, 3), dtype=np.uint8)
    return VideoProcessor.from_config(config)(video)["pixel_values"].tolist()


def built(config: VideoMask2FormerConfig) -> Any:
    try:
        return len(list(VideoMask2Former(config).parameters()))
    except ConfigError as error:
        return str(error)


# what to change each field to, and what must change with it
CASES: dict[type, dict[str, tuple[Any, Effect]]] = {
    SwinConfig: {
        "embed_dim": (16, weight_shapes),
        "depths": ((1, 2, 1, 1), weight_shapes),
        "num_heads": ((2, 2, 2, 4), weight_shapes),
        "window_size": (4, weight_shapes),
        "mlp_ratio": (3.0, weight_shapes),
        "qkv_bias": (False, weight_shapes),
        "drop_path_rate": (0.9, outputs_in_training),
    },
    TimmBackboneConfig: {"name": ("resnet18", weight_shapes)},
    PixelDecoderConfig: {
        "kind": ("fpn", weight_shapes),
        "hidden_dim": (64, weight_shapes),
        "mask_dim": (8, weight_shapes),
        "num_layers": (2, weight_shapes),
        "ffn_dim": (8, weight_shapes),
        "num_heads": (2, weight_shapes),
        "num_points": (1, weight_shapes),
        "num_levels": (2, weight_shapes),
        "dropout": (0.9, outputs_in_training),
    },
    TransformerDecoderConfig: {
        "hidden_dim": (16, weight_shapes),
        "num_queries": (6, weight_shapes),
        "num_layers": (2, weight_shapes),
        "num_heads": (2, outputs),
        "ffn_dim": (8, weight_shapes),
        "dropout": (0.9, outputs_in_training),
        "cross_attention": ("full", outputs),
        "layer_order": ("self_first", outputs),
        "query_features": ("zero", weight_shapes),
        "features": ("concatenated", outputs),
        "scale": (16, outputs),
        "temporal_position": ("sine_2d", outputs),
    },
    PreprocessingConfig: {
        "shortest_edge": (40, model_input),
        "longest_edge": (60, model_input),
        "fixed_size": ((50, 90), model_input),
        "size_divisor": (16, model_input),
        "fit": ("resize", model_input),
        "image_mean": ((0.1, 0.2, 0.3), model_input),
        "image_std": ((0.1, 0.2, 0.3), model_input),
    },
    VideoMask2FormerConfig: {
        "backbone": (TIMM.backbone, weight_shapes),
        "pixel_decoder": (PixelDecoderConfig(hidden_dim=32), weight_shapes),
        "transformer_decoder": (TransformerDecoderConfig(hidden_dim=32), weight_shapes),
        "temporal": ("per_frame", outputs),
        "labels": (("cat",), weight_shapes),
        "preprocessing": (PreprocessingConfig(shortest_edge=40), model_input),
        "parts": ({"cross_attention": "mine.Attention"}, built),
    },
}
PARTS = {
    type(getattr(config, part)): (config, part) for config in (TIMM, BASE) for part in CASES[VideoMask2FormerConfig]
}


@functools.cache
def kept(effect: Callable[[VideoMask2FormerConfig], object], config: VideoMask2FormerConfig) -> object:
    return effect(config)


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, cases in CASES.items() for name in cases])
def test_every_field_has_an_effect(cls: type, name: str) -> None:
    value, effect = CASES[cls][name]
    if cls is VideoMask2FormerConfig:
        base, changed = BASE, BASE.replace(**{name: value})
    else:
        base, part = PARTS[cls]
        if name == "scale":
            base = base.replace(transformer_decoder=dataclasses.replace(base.transformer_decoder, features="single"))
        if name == "kind":
            base = base.replace(pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=16))
        changed = base.replace(**{part: dataclasses.replace(getattr(base, part), **{name: value})})
    assert effect(base) == kept(effect, base)
    assert effect(changed) != kept(effect, base)


def test_every_field_has_a_case() -> None:
    classes = [value for value in vars(config_module).values() if dataclasses.is_dataclass(value)]
    assert set(classes) == set(CASES)
    for cls in classes:
        assert [field.name for field in dataclasses.fields(cls)] == list(CASES[cls]), cls


# --- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = VideoMask2FormerConfig.preset(name)
    kind, size, dataset = name.split("_", 2) if name.startswith("swin") else ("timm", *name.split("_", 1))
    embed_dim, window, stage_3, queries = {
        "tiny": (96, 7, 6, 100),
        "small": (96, 7, 18, 100),
        "base": (128, 12, 18, 100),
        "large": (192, 12, 18, 200),
    }.get(size, (32, 0, 0, 100))
    heads = embed_dim // 32
    if kind == "swin":
        assert config.backbone == SwinConfig(
            embed_dim=embed_dim,
            window_size=window,
            depths=(2, 2, stage_3, 2),
            num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        )
    else:
        assert config.backbone == TimmBackboneConfig(name=size)
    assert config.transformer_decoder == TransformerDecoderConfig(num_queries=queries)
    assert config.pixel_decoder == PixelDecoderConfig()
    assert config.labels == LABEL_SETS[dataset]
    assert config.num_labels == 40
    assert config.temporal == "joint"
    assert config.preprocessing == PreprocessingConfig(shortest_edge=480 if kind == "swin" else 360)


def test_all_published_sizes_and_datasets_have_a_preset() -> None:
    backbones = ("swin_tiny", "swin_small", "swin_base", "swin_large", "resnet50", "resnet101")
    assert set(PRESETS) == {f"{name}_youtubevis_{year}" for name in backbones for year in (2019, 2021)}


def test_the_default_is_the_published_tiny_model() -> None:
    assert VideoMask2FormerConfig() == VideoMask2FormerConfig.preset("swin_tiny_youtubevis_2019")


@pytest.mark.parametrize(
    ("name", "count"), [("swin_tiny", 47_411_363), ("resnet50", 44_013_097), ("resnet101", 63_005_225)]
)
def test_published_models_have_their_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = VideoMask2Former(VideoMask2FormerConfig.preset(f"{name}_youtubevis_2019"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'swin_huge'.*swin_tiny, .*resnet101, each followed by _youtubevis_2019"):
        VideoMask2FormerConfig.preset("swin_huge")


# --- JSON and back

CONFIGS = st.builds(
    VideoMask2FormerConfig,
    backbone=st.one_of(
        st.builds(
            SwinConfig,
            embed_dim=st.sampled_from([24, 48]),
            depths=st.tuples(*[st.integers(1, 9)] * 4),
            window_size=st.integers(1, 12),
            mlp_ratio=st.floats(0.5, 8),
            qkv_bias=st.booleans(),
            drop_path_rate=st.floats(0, 0.9),
        ),
        st.builds(TimmBackboneConfig, name=st.text(min_size=1)),
    ),
    pixel_decoder=st.builds(PixelDecoderConfig, hidden_dim=st.sampled_from([32, 96]), dropout=st.floats(0, 0.9)),
    transformer_decoder=st.builds(TransformerDecoderConfig, num_queries=st.integers(1, 300)),
    temporal=st.sampled_from(["joint", "per_frame"]),
    labels=st.lists(st.text(), min_size=1, max_size=5).map(tuple),
    preprocessing=st.builds(
        PreprocessingConfig,
        fixed_size=st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999)),
        fit=st.sampled_from(["pad", "resize"]),
        image_mean=st.tuples(*[st.floats(-1, 1)] * 3),
    ),
)


@given(CONFIGS)
def test_json_round_trip(config: VideoMask2FormerConfig) -> None:
    again = VideoMask2FormerConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert VideoMask2FormerConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()


def test_file_round_trip(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(BASE.to_json(), encoding="utf-8")
    assert VideoMask2FormerConfig.from_file(tmp_path / "config.json") == BASE


def test_fields_left_out_keep_their_defaults() -> None:
    assert VideoMask2FormerConfig.from_dict({}) == VideoMask2FormerConfig()
    config = VideoMask2FormerConfig.from_dict({"pixel_decoder": {"num_layers": 2}, "labels": ["cat"]})
    assert config == VideoMask2FormerConfig(pixel_decoder=PixelDecoderConfig(num_layers=2), labels=("cat",))


def test_integers_do_for_rates() -> None:
    ratio = VideoMask2FormerConfig.from_dict({"backbone": {"mlp_ratio": 3}}).backbone.mlp_ratio
    assert ratio == 3.0
    assert isinstance(ratio, float)


@pytest.mark.parametrize("backbone", ["timm:resnet50", {"type": "timm", "name": "resnet50"}])
def test_a_timm_backbone_by_name(backbone: object) -> None:
    config = VideoMask2FormerConfig.from_dict({"backbone": backbone})
    assert config.backbone == TimmBackboneConfig(name="resnet50")
    assert VideoMask2FormerConfig(backbone="timm:resnet50") == config


def test_reading_leaves_the_dict_as_it_is() -> None:
    data = BASE.to_dict()
    before = json.dumps(data)
    VideoMask2FormerConfig.from_dict(data)
    assert json.dumps(data) == before


def test_lists_become_tuples() -> None:
    config = VideoMask2FormerConfig(
        backbone=SwinConfig(depths=[2, 2, 6, 2]), labels=list(LABEL_SETS["youtubevis_2019"])
    )
    assert config == VideoMask2FormerConfig()
    assert hash(config) == hash(VideoMask2FormerConfig())


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.temporal = "per_frame"


def test_replacing_validates_again() -> None:
    assert BASE.replace(temporal="per_frame").temporal == "per_frame"
    with pytest.raises(ConfigError, match="temporal"):
        BASE.replace(temporal="both")
    with pytest.raises(TypeError, match="depth"):
        BASE.replace(depth=3)


# --- values no model can be built from


@pytest.mark.parametrize(
    ("cls", "name", "value", "message"),
    [
        *[(SwinConfig, name, bad, name) for name in ("embed_dim", "window_size", "mlp_ratio") for bad in (0, -1)],
        (SwinConfig, "mlp_ratio", math.nan, "mlp_ratio"),
        (SwinConfig, "depths", (2, 2, 6), "four stages"),
        (SwinConfig, "num_heads", (3, 6, 12), "four stages"),
        (SwinConfig, "depths", (2, 0, 6, 2), "depths must be positive"),
        (SwinConfig, "num_heads", (3, 5, 12, 24), r"num_heads\[1\]=5 does not divide the 192 channels"),
        (SwinConfig, "num_heads", (3, 6, 12, 0), r"num_heads\[3\]=0"),
        *[(SwinConfig, "drop_path_rate", bad, "drop_path_rate") for bad in (-0.1, 1, math.nan)],
        (TimmBackboneConfig, "name", "", "name is empty"),
        *[
            (PixelDecoderConfig, name, bad, f"PixelDecoderConfig.{name} must be positive")
            for name in ("hidden_dim", "mask_dim", "ffn_dim", "num_heads", "num_points", "num_levels")
            for bad in (0, -32)
        ],
        *[
            (PixelDecoderConfig, "num_layers", bad, "PixelDecoderConfig.num_layers must be 0 to 128")
            for bad in (-1, 129)
        ],
        (PixelDecoderConfig, "num_levels", 5, "PixelDecoderConfig.num_levels must be at most 4"),
        (PixelDecoderConfig, "kind", "unet", "PixelDecoderConfig.kind must be .*'ms_deform_attn', 'fpn'.*, got 'unet'"),
        (PixelDecoderConfig, "hidden_dim", 40, "hidden_dim=40 is not divisible by 32"),
        (PixelDecoderConfig, "num_heads", 7, "hidden_dim=256 is not divisible by 7"),
        *[(PixelDecoderConfig, "dropout", bad, "dropout") for bad in (-0.1, 1.0, math.nan)],
        *[
            (TransformerDecoderConfig, name, bad, f"TransformerDecoderConfig.{name} must be positive")
            for name in ("hidden_dim", "num_queries", "num_heads", "ffn_dim")
            for bad in (0, -8)
        ],
        *[(TransformerDecoderConfig, "num_layers", bad, "num_layers must be 0 to 128") for bad in (-1, 10**7)],
        *[(TransformerDecoderConfig, "dropout", bad, "dropout") for bad in (-0.1, 1.0, math.nan)],
        (TransformerDecoderConfig, "cross_attention", "slot", "cross_attention must be .*'smca'"),
        (TransformerDecoderConfig, "scale", 4, "scale must be .*8.*16.*32"),
        (TransformerDecoderConfig, "scale", 32, "scale=32 is of features='single', got 'round_robin'"),
        (TransformerDecoderConfig, "hidden_dim", 250, "not divisible by 4"),
        (TransformerDecoderConfig, "num_heads", 7, "not divisible by 7"),
        *[
            (PreprocessingConfig, name, bad, f"PreprocessingConfig.{name} must be positive")
            for name in ("shortest_edge", "longest_edge", "size_divisor")
            for bad in (0, -1)
        ],
        (PreprocessingConfig, "longest_edge", 479, "longest_edge=479 is below shortest_edge=480"),
        (PreprocessingConfig, "fixed_size", (0, 5), "fixed_size"),
        (PreprocessingConfig, "fit", "crop", "PreprocessingConfig.fit must be .*'pad', 'resize'.*, got 'crop'"),
        (PreprocessingConfig, "image_std", (0.2, 0.0, 0.2), "image_std"),
        (VideoMask2FormerConfig, "temporal", "online", "temporal must be .*'joint', 'per_frame'.*, got 'online'"),
        (
            VideoMask2FormerConfig,
            "parts",
            {"matching": "a.B"},
            "parts has 'matching'; .* can be backbone, pixel_decoder",
        ),
        (VideoMask2FormerConfig, "parts", {"backbone": 3}, r"parts\.backbone must be str, got 3"),
        (VideoMask2FormerConfig, "parts", ["backbone"], r"parts must be .*, got \['backbone'\]"),
        (VideoMask2FormerConfig, "labels", (), "labels is empty"),
        (VideoMask2FormerConfig, "labels", "person", "labels must be .*, got 'person'"),
        (VideoMask2FormerConfig, "labels", ("person", 3), r"labels\[1\] must be str, got 3"),
        (VideoMask2FormerConfig, "backbone", "resnet50", "'timm:MODEL_NAME'"),
        (VideoMask2FormerConfig, "backbone", "timm:", "name is empty"),
        (VideoMask2FormerConfig, "backbone", None, "backbone must be .*, got None"),
        (VideoMask2FormerConfig, "backbone", PixelDecoderConfig(), "backbone must be .*, got PixelDecoderConfig"),
        (SwinConfig, "embed_dim", 96.0, "SwinConfig.embed_dim must be int, got 96.0"),
        (SwinConfig, "qkv_bias", 1, "SwinConfig.qkv_bias must be bool, got 1"),
        (SwinConfig, "mlp_ratio", math.inf, "SwinConfig.mlp_ratio must be a finite float"),
        (PreprocessingConfig, "fixed_size", (480,), "fixed_size must be"),
        (PreprocessingConfig, "fixed_size", (480, 20_000), "fixed_size must be positive and at most 16384"),
        (PreprocessingConfig, "image_std", (0.2, 1e-300, 0.2), "image_std must be positive"),
        (PreprocessingConfig, "image_mean", (0.2, 1e308, 0.2), "image_mean"),
        *[
            (cls, name, 10**7, f"{name} must be at most")
            for cls, names in {
                SwinConfig: ("embed_dim", "window_size", "mlp_ratio"),
                PixelDecoderConfig: ("hidden_dim", "mask_dim", "ffn_dim", "num_heads", "num_points"),
                TransformerDecoderConfig: ("hidden_dim", "num_queries", "num_heads", "ffn_dim"),
                PreprocessingConfig: ("shortest_edge", "longest_edge", "size_divisor"),
            }.items()
            for name in names
        ],
        (SwinConfig, "depths", (2, 2, 10**6, 2), "depths must be at most 128 together"),
        (SwinConfig, "mlp_ratio", 1e308, "mlp_ratio must be at most 64"),
        (SwinConfig, "mlp_ratio", 10**400, "mlp_ratio must be a finite float"),
        (TimmBackboneConfig, "name", "x" * 10**6, "name is too long"),
        (VideoMask2FormerConfig, "labels", ("x",) * 10**5, "labels must be at most 30000"),
        (VideoMask2FormerConfig, "labels", ("x" * 10**6,), r"labels\[0\] must be text of at most 1000"),
    ],
)
def test_bad_values_are_named(cls: type, name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**({"name": "resnet50"} if cls is TimmBackboneConfig else {}) | {name: value})


NESTED: list[Any] = []
for _ in range(5000):
    NESTED = [NESTED]
HOSTILE = [math.nan, -math.inf, 10**30, 10**5000, -1, 0, True, None, "x" * 10**5, [0] * 10**5, {"x": {}}, NESTED]


@pytest.mark.parametrize("name", flatten(BASE.to_dict()) | {"backbone": 0, "preprocessing": 0, "backbone.name": 0})
def test_every_field_takes_hostile_values_with_one_short_line(name: str) -> None:
    messages = messages_of(VideoMask2FormerConfig.from_dict, BASE.to_dict(), name, HOSTILE)
    assert len(messages) > len(HOSTILE) / 2
    for message in messages:
        assert len(message) < 300
        assert name.split(".")[-1] in message
        assert "\n" not in message


def messages_of(from_dict: Callable[[Any], Any], data: Any, name: str, values: list[Any]) -> list[str]:
    """Of the errors that values of a field, named by its path, lead to."""
    part, _, field = name.partition(".")
    messages = []
    for value in values:
        changed = data | ({part: data[part] | {field: value}} if field else {part: value})
        try:
            from_dict(changed)
        except ConfigError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"depth": 3}, "unknown config field depth; known: backbone, labels"),
        ({"pixel_decoder": {"points": 3}}, "unknown config field pixel_decoder.points"),
        ({"backbone": {"type": "swin", "patch_size": 4}}, "unknown config field backbone.patch_size"),
        ({"backbone": {"type": "resnet"}}, "backbone.type 'resnet' is not known"),
        ({"backbone": {"type": "timm"}}, r"backbone\..*name"),
        ({"backbone": None}, "backbone must be .*, got None"),
        ({"backbone": {"type": ["swin"]}}, "backbone.type .* is not known"),
        ({"backbone": 5}, "backbone must be"),
        ({"backbone": "swin"}, "'timm:MODEL_NAME'"),
        ({"backbone": {"depths": [2, 2, 6.5, 2]}}, r"backbone.depths\[2\] must be int, got 6.5"),
        ({"backbone": {"depths": 3}}, "backbone.depths must be tuple"),
        ({"backbone": {"qkv_bias": 1}}, "backbone.qkv_bias must be bool, got 1"),
        ({"backbone": {"embed_dim": True}}, "backbone.embed_dim must be int, got True"),
        ({"backbone": {"mlp_ratio": "4"}}, "backbone.mlp_ratio must be .*float, got '4'"),
        ({"backbone": {"embed_dim": None}}, "backbone.embed_dim must be int, got None"),
        ({"pixel_decoder": []}, r"pixel_decoder must be PixelDecoderConfig, got \[\]"),
        ({"pixel_decoder": {"hidden_dim": 40}}, "hidden_dim=40"),
        ({"preprocessing": {"fixed_size": [480]}}, "preprocessing.fixed_size must be"),
        ({"preprocessing": {"fixed_size": "480"}}, "preprocessing.fixed_size must be"),
        ({"preprocessing": {"fixed_size": [480, 6.5]}}, r"preprocessing.fixed_size\[1\] must be int"),
        ({"preprocessing": {"fit": "crop"}}, "preprocessing.fit must be"),
        ({"preprocessing": {"image_mean": [0.5, 0.5]}}, "preprocessing.image_mean must be"),
        ({"labels": "person"}, "labels must be"),
        ({"labels": ["person", 3]}, r"labels\[1\] must be str, got 3"),
        ({"labels": []}, "labels is empty"),
        ({"temporal": None}, "temporal must be"),
        ({"temporal": ["joint"]}, "temporal must be"),
        ({"model_type": "mask2former"}, "model_type is 'mask2former', expected 'm2f-video'"),
        ({"format_version": 2}, "format_version 2 is not 1; a newer m2f-video wrote it: upgrade"),
        ([], "must be a JSON object, got list"),
        (None, "must be a JSON object, got NoneType"),
    ],
)
def test_bad_data_is_named(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoMask2FormerConfig.from_dict(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"", "not a JSON file"),
        (b"\x80{}", "utf-8"),
        (b"3", "int"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"labels": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "64 bits"),
        (b'{"backbone": {"mlp_ratio": 1e999}}', "out of the range"),
        (b'{"backbone": {"mlp_ratio": NaN}}', "a finite float, got nan"),
        (b'{"labels": ["\\ud800"]}', r"labels\[0\] must be text"),
        (b'{"' + b"x" * 100_000 + b'": 0}', "unknown config field x"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        VideoMask2FormerConfig.from_file(path)
    with pytest.raises(ConfigError) as raised:
        VideoMask2FormerConfig.from_json(content.decode(errors="replace"))
    assert len(str(raised.value)) < 300


def test_a_pipe_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for path, kind in ((tmp_path / "config.json", "a named pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ConfigError, match=f"{path} is {kind}"):
            VideoMask2FormerConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        VideoMask2FormerConfig.from_file(tmp_path / "nowhere.json")

"""Weights into a model of another config: what fits is loaded, all of it is said, and nothing is loaded by accident."""

import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2f_video import VideoMask2Former, VideoMask2FormerConfig, load_backbone, load_partially
from m2f_video.config import ConfigError, PixelDecoderConfig, SwinConfig
from m2f_video.loading_report import LoadingReport, State
from m2f_video.parity import random_model
from tests.modeling.test_parts import MyAttention
from tests.tolerances import assert_close, identical
from tests.training.tiny_run import MODEL
from weights_convert import ConversionError, from_native, hf_config_from_native, write_checkpoint

LABELS = ("cat", "Giant_Panda", "dog")
TINY = MODEL.replace(labels=LABELS)
DECODER = TINY.transformer_decoder
EMBEDDING = "transformer_decoder.level_embed.weight"


class RenamedAttention(MyAttention):
    pass


@pytest.fixture(scope="module")
def trained() -> VideoMask2Former:
    """Leave it as it is."""
    return random_model(TINY, 7)


@pytest.fixture(scope="module")
def saved(trained: VideoMask2Former, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trained.save_pretrained(folder / "model")
    (folder / "bare.safetensors").write_bytes((folder / "model/model.safetensors").read_bytes())
    return folder


def decoder(**changes: Any) -> VideoMask2FormerConfig:
    return TINY.replace(transformer_decoder=replace(DECODER, **changes))


def encoder(**changes: Any) -> VideoMask2FormerConfig:
    return TINY.replace(pixel_decoder=replace(TINY.pixel_decoder, **changes))


def swin(**changes: Any) -> VideoMask2FormerConfig:
    return TINY.replace(backbone=SwinConfig(**{**vars(TINY.backbone), **changes}))


class Loaded:
    """A new model, what it was, and what loading has done; checks that the report is true of it."""

    def __init__(self, config: VideoMask2FormerConfig, source: Path | str, parts: Any = None) -> None:
        self.model = VideoMask2Former(config, parts)
        self.before = copy.deepcopy(self.model.state_dict())
        self.report = load_partially(self.model, source)
        self.after = self.model.state_dict()

    def check(self, given: dict[str, Tensor]) -> LoadingReport:
        names = {state: self.report.names(state) for state in get_args(State)}
        assert sorted(names["loaded"] + names["resized"] + names["new"]) == sorted(self.after)
        assert all(torch.equal(self.after[name], self.before[name]) for name in names["new"])
        assert all(not torch.equal(self.after[name], self.before[name]) for name in names["resized"])
        assert set(names["ignored"]) <= given.keys()
        assert len(names["ignored"]) == len(given) - len(names["loaded"]) - len(names["resized"])
        return self.report


def load(config: VideoMask2FormerConfig, source: Path, trained: VideoMask2Former) -> Loaded:
    loaded = Loaded(config, source)
    report, given = loaded.check(trained.state_dict()), trained.state_dict()
    moved = "transformer_decoder.input_projections"
    assert all(torch.equal(loaded.after[k], given[k]) for k in report.names("loaded") if not k.startswith(moved))
    return loaded


def of(report: LoadingReport, name: str) -> str:
    """State and note of a weight of the model."""
    (found,) = [weight for weight in report.weights if weight.name == name and weight.state != "ignored"]
    return f"{found.state}: {found.note}" if found.note else found.state


def test_all_that_fits_is_all_of_the_same_model(saved: Path, trained: VideoMask2Former) -> None:
    for source in ("model", "bare.safetensors"):
        loaded = Loaded(TINY, saved / source)
        assert identical(loaded.model, trained)
        assert loaded.report.is_complete
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert identical(VideoMask2Former.from_pretrained(saved / "model", partial=True), trained)


# --- what is resized, and how


@pytest.mark.parametrize("window", [2, 7])
def test_position_tables_go_to_another_window(window: int, saved: Path, trained: VideoMask2Former) -> None:
    loaded = load(swin(window_size=window), saved / "model", trained)
    names = [name for name in loaded.after if name.endswith("relative_position_bias_table")]
    assert loaded.report.names("resized") == names
    assert loaded.report.names("new") == loaded.report.names("ignored") == []
    assert of(loaded.report, names[0]) == f"resized: bicubically, from windows of 4 to {window}"
    assert loaded.report.otherwise == {"backbone.window_size": (4, window)}
    side = 2 * window - 1
    for name in names:
        table = trained.state_dict()[name]
        for head in range(table.shape[1]):
            image = table[:, head].reshape(1, 1, 7, 7)
            expected = F.interpolate(image, size=(side, side), mode="bicubic").flatten()
            assert_close(loaded.after[name][:, head], expected)


@pytest.mark.parametrize("number", [2, 9])
def test_the_first_queries_are_taken(number: int, saved: Path, trained: VideoMask2Former) -> None:
    loaded = load(decoder(num_queries=number), saved / "model", trained)
    names = [f"transformer_decoder.query_{kind}.weight" for kind in ("features", "positions")]
    assert loaded.report.names("resized") == names
    kept = min(number, 5)
    for name in names:
        assert torch.equal(loaded.after[name][:kept], trained.state_dict()[name][:kept])
        assert torch.equal(loaded.after[name][kept:], loaded.before[name][kept:])
    assert of(loaded.report, names[0]) == f"resized: the first {kept} of 5 queries, here {number}"
    assert loaded.report.otherwise == {}


def test_classes_go_by_their_names(saved: Path, trained: VideoMask2Former) -> None:
    loaded = load(TINY.replace(labels=("zebra", "dog", "giant panda", "car", "car")), saved / "model", trained)
    names = [f"transformer_decoder.class_head.{kind}" for kind in ("weight", "bias")]
    assert sorted(loaded.report.names("resized")) == sorted(names)
    for name in names:
        assert torch.equal(loaded.after[name][[1, 2, 5]], trained.state_dict()[name][[2, 1, 3]])
        assert torch.equal(loaded.after[name][[0, 3, 4]], loaded.before[name][[0, 3, 4]])
        assert of(loaded.report, name) == "resized: 2 of 5 classes by their names"


def test_as_many_other_classes_are_not_taken_for_these(saved: Path, trained: VideoMask2Former) -> None:
    loaded = load(TINY.replace(labels=("dog", "cat", "dog")), saved / "model", trained)
    for kind in ("weight", "bias"):
        name = f"transformer_decoder.class_head.{kind}"
        assert torch.equal(loaded.after[name][[1, 3]], trained.state_dict()[name][[0, 3]])
        assert torch.equal(loaded.after[name][[0, 2]], loaded.before[name][[0, 2]])  # which of the two dogs?


def test_rows_that_are_not_those_of_their_config_are_left_out(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(TINY.replace(labels=("cat", "dog")).to_json())
    (tmp_path / "model.safetensors").write_bytes((saved / "bare.safetensors").read_bytes())
    report = Loaded(TINY, tmp_path).report
    assert report.counts("new") == report.counts("ignored") == {"transformer_decoder.class_head": 2}
    assert of(report, "transformer_decoder.class_head.bias") == "new: of other rows: 4, here 4"


@pytest.mark.parametrize("scale", [32, 16, 8])
@pytest.mark.parametrize("source", ["model", "bare.safetensors"])
def test_levels_go_by_their_strides(scale: int, source: str, tmp_path: Path) -> None:
    all_levels = decoder(hidden_dim=64)  # another width than the pixel decoder's, so that levels are projected
    whole = random_model(all_levels, 3)
    whole.save_pretrained(tmp_path / "model")
    (tmp_path / "bare.safetensors").write_bytes((tmp_path / "model/model.safetensors").read_bytes())
    one_level = decoder(hidden_dim=64, features="single", scale=scale)
    there, given = (32, 16, 8).index(scale), whole.state_dict()
    loaded = Loaded(one_level, tmp_path / source)
    report = loaded.check(given)
    assert torch.equal(loaded.after[EMBEDDING][0], given[EMBEDDING][there])
    for name in loaded.after:
        if name.startswith("transformer_decoder.input_projections.0."):
            assert torch.equal(loaded.after[name], given[name.replace("projections.0", f"projections.{there}")])
    assert report.names("new") == []
    assert {name.split(".")[2] for name in report.names("ignored")} == {str(i) for i in range(3) if i != there}

    loaded.model.save_pretrained(tmp_path / "one")
    back = Loaded(all_levels, tmp_path / "one")
    report = back.check(loaded.after)
    assert of(report, EMBEDDING) == "resized: levels by their strides"
    others = [level for level in range(3) if level != there]
    assert torch.equal(back.after[EMBEDDING][there], given[EMBEDDING][there])
    assert torch.equal(back.after[EMBEDDING][others], back.before[EMBEDDING][others])
    assert {name.split(".")[2] for name in report.names("new")} == {str(level) for level in others}


def test_another_single_level_is_none_of_these(tmp_path: Path) -> None:
    random_model(decoder(hidden_dim=64, features="single", scale=16), 3).save_pretrained(tmp_path)
    report = Loaded(decoder(hidden_dim=64, features="single", scale=32), tmp_path).report
    assert set(report.counts("new")) == {"transformer_decoder.level_embed", "transformer_decoder.input_projections"}
    assert report.counts("new") == report.counts("ignored")


# --- what means something else


@pytest.mark.parametrize(
    ("config", "pattern", "note"),
    [
        (decoder(num_heads=2), "transformer_decoder.layers.*_attn.", "transformer_decoder.num_heads 4 -> 2"),
        (encoder(num_heads=2, num_points=4), "pixel_decoder.layers.*self_attn.", "pixel_decoder.num_heads 4 -> 2"),
        (encoder(num_points=4), "pixel_decoder.layers.*(offsets|weights).", "pixel_decoder.num_points 2 -> 4"),
        (swin(num_heads=(1, 2, 4, 16)), "backbone.stages.3.*.attn.", "backbone.num_heads"),
        (decoder(cross_attention="mask_pooling"), "transformer_decoder.layers.*.cross_attn.", "masked -> mask_pooling"),
    ],
)
def test_what_has_another_layout_is_new(
    config: VideoMask2FormerConfig, pattern: str, note: str, saved: Path, trained: VideoMask2Former
) -> None:
    loaded = load(config, saved / "model", trained)
    rule = re.compile(pattern.replace(".", r"\.").replace("*", ".*"))
    assert set(loaded.report.names("new")) == {name for name in loaded.after if rule.match(name)}
    assert all(note in of(loaded.report, name) for name in loaded.report.names("new"))
    assert note in str(loaded.report)


def test_other_levels_of_the_encoder(saved: Path, trained: VideoMask2Former) -> None:
    report = load(encoder(num_levels=2, num_points=3), saved / "model", trained).report  # as many samples as 3 of 2
    assert report.names("resized") == ["pixel_decoder.level_embed"]
    assert of(report, "pixel_decoder.level_embed") == "resized: the first 2 of 3 levels, here 2"
    assert {name.split(".")[-2] for name in report.names("new") if ".layers." in name} == {
        "sampling_offsets",
        "attention_weights",
    }
    assert {name.split(".")[1] for name in report.names("new") if ".layers." not in name} == {
        "lateral_conv_8",
        "output_conv_8",
    }
    loaded = load(encoder(num_levels=4), saved / "model", trained)
    embedding = "pixel_decoder.level_embed"
    assert torch.equal(loaded.after[embedding][:3], trained.state_dict()[embedding])
    assert torch.equal(loaded.after[embedding][3], loaded.before[embedding][3])


@pytest.mark.parametrize(("there", "here"), [("ms_deform_attn", "fpn"), ("fpn", "fapn"), ("fapn", "fpn")])
def test_another_kind_of_pixel_decoder_is_new(there: Any, here: Any, tmp_path: Path) -> None:
    source, used = (
        TINY.replace(pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=32, kind=kind)) for kind in (there, here)
    )
    random_model(source, 1).save_pretrained(tmp_path)
    report = Loaded(used, tmp_path).report
    assert {name.split(".")[0] for name in report.names("new")} == {"pixel_decoder"}
    assert not any(name.startswith("pixel_decoder.") for name in report.names("loaded"))
    assert f"of another layout: pixel_decoder.kind {there} -> {here}" in str(report)


def test_bare_files_tell_the_heads_of_swin(saved: Path, trained: VideoMask2Former) -> None:
    loaded = load(swin(num_heads=(2, 2, 4, 8)), saved / "bare.safetensors", trained)
    assert set(loaded.report.names("new")) == {name for name in loaded.after if "stages.0.blocks.0.attn" in name}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (decoder(layer_order="self_first"), {"transformer_decoder.layer_order": ("cross_first", "self_first")}),
        (decoder(cross_attention="full"), {"transformer_decoder.cross_attention": ("masked", "full")}),
        (decoder(temporal_position="none"), {"transformer_decoder.temporal_position": ("sine_3d", "none")}),
        (TINY.replace(temporal="per_frame"), {"temporal": ("joint", "per_frame")}),
        (
            TINY.replace(preprocessing=replace(TINY.preprocessing, shortest_edge=48)),
            {"preprocessing.shortest_edge": (32, 48)},
        ),
    ],
)
def test_what_is_used_otherwise_is_loaded_and_named(
    config: VideoMask2FormerConfig, expected: dict[str, Any], saved: Path, trained: VideoMask2Former
) -> None:
    report = load(config, saved / "model", trained).report
    assert (report.names("new"), report.names("ignored"), report.otherwise) == ([], [], expected)
    assert not report.is_complete
    ((name, (own, used)),) = expected.items()
    assert str(report).splitlines()[-1] == f"loaded, but computes something else: {name} {own!r} -> {used!r}"


# --- what is there on one side only


def test_other_numbers_of_layers(saved: Path, trained: VideoMask2Former) -> None:
    report = load(decoder(num_layers=1), saved / "model", trained).report
    assert report.names("new") == []
    assert {name[:28] for name in report.names("ignored")} == {"transformer_decoder.layers.1"}
    report = load(decoder(num_layers=4), saved / "model", trained).report
    assert {name[:28] for name in report.names("new")} == {f"transformer_decoder.layers.{i}" for i in (2, 3)}
    report = load(swin(depths=(1, 1, 3, 1)), saved / "model", trained).report
    assert {name[:26] for name in report.names("new")} == {f"backbone.stages.2.blocks.{i}" for i in (1, 2)}


@pytest.mark.parametrize("backbone", [SwinConfig(embed_dim=24, depths=(1, 1, 1, 1), window_size=4), "timm:resnet18"])
def test_another_backbone_is_new_and_the_decoders_are_loaded(
    backbone: Any, saved: Path, trained: VideoMask2Former
) -> None:
    report = load(TINY.replace(backbone=backbone), saved / "model", trained).report
    assert report.names("resized") == []
    assert {name.split(".")[1] for name in report.names("new") if "pixel" in name} == {
        "input_projections",
        "lateral_conv",
    }
    assert not any(name.startswith("backbone.") for name in report.names("loaded"))
    assert not any(name.startswith("transformer_decoder.") for name in report.names("new"))
    assert report.otherwise == {}  # nothing of that backbone is in the model
    projections = [name for name in report.names("new") if "pixel_decoder.input_projections.0" in name]
    assert len(projections) == 4  # the norm after a new convolution is new with it


def test_half_a_layer_is_none(saved: Path, trained: VideoMask2Former) -> None:
    report = load(encoder(ffn_dim=32), saved / "model", trained).report
    assert of(report, "pixel_decoder.layers.0.linear2.weight") == "new: of another shape: (32, 64), here (32, 32)"
    assert of(report, "pixel_decoder.layers.0.linear2.bias") == (
        "new: not without its layer: pixel_decoder.layers.0.linear2.weight does not fit"
    )
    assert "loaded, but computes something else: pixel_decoder.ffn_dim 64 -> 32" in str(report)


def test_a_file_that_lacks_weights(saved: Path, tmp_path: Path, trained: VideoMask2Former) -> None:
    weights = load_file(saved / "bare.safetensors")
    del weights["transformer_decoder.norm.weight"]
    weights["transformer_decoder.gate"] = torch.ones(3)
    weights["transformer_decoder.norm.bias"] = weights["transformer_decoder.norm.bias"].int()
    save_file(weights, tmp_path / "part.safetensors")
    report = Loaded(TINY, tmp_path / "part.safetensors").report
    assert report.names("new") == ["transformer_decoder.norm.weight", "transformer_decoder.norm.bias"]
    assert of(report, "transformer_decoder.norm.bias") == "new: of another kind: torch.int32"
    assert report.names("ignored") == ["transformer_decoder.gate", "transformer_decoder.norm.bias"]


def test_a_backbone_alone(saved: Path, tmp_path: Path, trained: VideoMask2Former) -> None:
    only = {name: t for name, t in load_file(saved / "bare.safetensors").items() if name.startswith("backbone.")}
    save_file(only, tmp_path / "backbone.safetensors")
    loaded = Loaded(swin(window_size=3), tmp_path / "backbone.safetensors")
    assert {name.split(".")[0] for name in loaded.report.names("new")} == {"pixel_decoder", "transformer_decoder"}

    model = VideoMask2Former(swin(window_size=3))
    with pytest.raises(ConversionError, match="relative_position_bias_table"):
        load_backbone(model, tmp_path / "backbone.safetensors")
    report = load_backbone(model, tmp_path / "backbone.safetensors", partial=True)
    assert identical(model.backbone, loaded.model.backbone)
    assert report.names("new") == []
    assert len(report.names("resized")) == 4


# --- formats, parts, dtypes


def write(trained: VideoMask2Former, format: str, path: Path) -> Path:
    if format == "hf":
        config, preprocessor = hf_config_from_native(trained.config.to_dict())
        write_checkpoint(path, from_native(trained.state_dict()), config, preprocessor)
        return path
    torch.save({"model": from_native(trained.state_dict(), "detectron2")}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


@pytest.mark.parametrize("format", ["hf", "detectron2"])
def test_foreign_formats(format: str, tiny_model: VideoMask2Former, tmp_path: Path) -> None:
    path = write(tiny_model, format, tmp_path / "foreign")
    labels = ("lizard", "person", "ostrich")
    used = tiny_model.config.replace(
        labels=labels, transformer_decoder=replace(tiny_model.config.transformer_decoder, num_queries=4, num_layers=1)
    )
    with pytest.warns(UserWarning, match="resized: transformer_decoder.query_features.weight, the first 4 of 10"):
        model = VideoMask2Former.from_pretrained(path, config=used, partial=True)
    assert identical(model.backbone, tiny_model.backbone)
    head = model.transformer_decoder.class_head.weight
    known = tiny_model.transformer_decoder.class_head.weight
    assert torch.equal(head[[0, 1, 3]], known[[2, 0, 5]]) is (format == "hf")  # detectron2 knows no names


def test_from_pretrained_gives_the_table(saved: Path, trained: VideoMask2Former) -> None:
    with pytest.warns(UserWarning, match="weights of .*model\n.*loaded +resized +new +ignored\n") as said:
        model = VideoMask2Former.from_pretrained(
            saved / "model", config=decoder(num_layers=3), partial=True, dtype="bfloat16"
        )
    assert [warning.filename for warning in said] == [__file__]
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert len(model.transformer_decoder.layers) == 3
    rows = {line.split()[0]: line.split()[1:] for line in str(said[0].message).splitlines()[2:-1]}
    assert rows["transformer_decoder.layers"] == ["36", "0", "18", "0"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(int(number.replace(",", "")) for number in rows["numbers"]) == total


def test_strict_loading_is_as_strict_as_ever(saved: Path) -> None:
    with pytest.raises(ConversionError, match=r"do not fit its config.*or partial=True"):
        VideoMask2Former.from_pretrained(saved / "model", config=decoder(num_layers=3))


def test_modules_of_ones_own(saved: Path, trained: VideoMask2Former, tmp_path: Path) -> None:
    mine = {"cross_attention": MyAttention}
    loaded = Loaded(TINY, saved / "model", mine)
    assert loaded.report.names("new") == [f"transformer_decoder.layers.{i}.cross_attn.temperature" for i in range(2)]
    assert set(loaded.report.otherwise) == {"parts.cross_attention"}

    loaded.model.save_pretrained(tmp_path)
    renamed = Loaded(TINY, tmp_path, {"cross_attention": RenamedAttention})
    assert identical(renamed.model, loaded.model)
    (changed,) = renamed.report.otherwise.values()
    assert [name.rsplit(".", 1)[1] for name in changed] == ["MyAttention", "RenamedAttention"]

    plain = Loaded(TINY, tmp_path)
    assert plain.report.counts("ignored") == {"transformer_decoder.layers": 2}
    with pytest.raises(ConfigError, match="cross_attention of its own"):  # never the plain model without a word
        VideoMask2Former.from_pretrained(tmp_path, partial=True)
    with pytest.warns(UserWarning, match="parts.cross_attention .*MyAttention' -> None"):
        VideoMask2Former.from_pretrained(tmp_path, partial=True, config=TINY)


def test_a_model_in_half_precision(saved: Path) -> None:
    model = VideoMask2Former(swin(window_size=3).replace(labels=("dog",))).to(torch.bfloat16)
    load_partially(model, saved / "model")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_details_name_every_tensor(saved: Path, trained: VideoMask2Former) -> None:
    report = load(decoder(num_queries=2, num_layers=1), saved / "model", trained).report
    lines = report.details().splitlines()
    assert len(lines) == len(report.weights)
    assert "resized  transformer_decoder.query_features.weight  (the first 2 of 5 queries, here 2)" in lines
    assert "ignored  transformer_decoder.layers.1.linear1.weight" in lines


# --- what cannot be


def test_nothing_fits(saved: Path, tmp_path: Path) -> None:
    other = TINY.replace(
        backbone="timm:resnet18",
        pixel_decoder=replace(TINY.pixel_decoder, hidden_dim=64, mask_dim=64, ffn_dim=32),
        transformer_decoder=replace(DECODER, hidden_dim=64, ffn_dim=32, num_heads=2),
    )
    model = VideoMask2Former(other)
    before = copy.deepcopy(model)
    with pytest.raises(ConversionError, match=r"nothing of .*model fits the model: pixel_decoder\.level_embed is of "):
        load_partially(model, saved / "model")
    assert identical(model, before)
    with pytest.raises(ConversionError, match=r"nothing of .*model fits"):
        VideoMask2Former.from_pretrained(saved / "model", config=other, partial=True)


def test_what_cannot_be_read(saved: Path, tmp_path: Path) -> None:
    model = VideoMask2Former(TINY)
    before = copy.deepcopy(model)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_partially(model, "nowhere")
    save_file({"encoder.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match=r"other\.safetensors: no known format .* encoder\.weight"):
        load_partially(model, tmp_path / "other.safetensors")
    data = (saved / "bare.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match=r"cut\.safetensors"):
        load_partially(model, tmp_path / "cut.safetensors")
    weights = load_file(saved / "bare.safetensors")
    weights["transformer_decoder.norm.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(ConversionError, match=r"nan\.safetensors: transformer_decoder\.norm\.bias"):
        load_partially(model, tmp_path / "nan.safetensors")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "fine.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_partially(model, tmp_path / "fine.safetensors")
    assert identical(model, before)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformer_decoder.query_features.weight", torch.tensor(1.0)),
        ("transformer_decoder.query_positions.weight", torch.ones(0, 32)),
        ("transformer_decoder.level_embed.weight", torch.tensor(1.0)),
        ("transformer_decoder.level_embed.weight", torch.ones(2, 32)),
        ("transformer_decoder.class_head.bias", torch.tensor(1.0)),
        ("backbone.stages.0.blocks.0.attn.relative_position_bias_table", torch.ones(48, 1)),
        ("backbone.stages.0.blocks.0.attn.relative_position_bias_table", torch.ones(36, 1)),
        ("backbone.stages.0.blocks.0.attn.relative_position_bias_table", torch.tensor(1.0)),
        ("backbone.stages.0.blocks.0.attn.relative_position_bias_table", torch.ones(0, 1)),
    ],
)
def test_weights_of_no_sense_are_left_out(name: str, tensor: Tensor, saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved / "bare.safetensors")
    weights[name] = tensor
    save_file(weights, tmp_path / "odd.safetensors")
    loaded = Loaded(TINY, tmp_path / "odd.safetensors")
    assert name in loaded.report.names("new")
    assert name in loaded.report.names("ignored")
    assert torch.equal(loaded.after[name], loaded.before[name])

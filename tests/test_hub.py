"""From a name, folder or file to a model, and back."""

import json
import pickle
import re
import resource
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f_video.config import ConfigError, VideoMask2FormerConfig
from m2f_video.hub import load_config, other_function, parse_device, parse_dtype
from m2f_video.inference.processor import VideoProcessor
from m2f_video.modeling.video_mask2former import VideoMask2Former
from tests.golden_files import original_weights
from tests.tolerances import assert_close, identical
from weights_convert import CheckpointError, ConversionError, staged_folder

# --- folders and files


def test_a_saved_model_comes_back_bit_for_bit(tiny_model: VideoMask2Former, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = VideoMask2Former.from_pretrained(folder)
    assert identical(loaded, tiny_model)
    assert loaded.config == tiny_model.config
    assert not loaded.training
    assert VideoProcessor.from_pretrained(folder).labels == tiny_model.config.labels
    assert load_config(folder) == tiny_model.config


def test_a_loaded_model_has_all_that_a_built_one_has(tiny_model: VideoMask2Former, folder: Path) -> None:
    """Buffers that no file holds too, and every tensor elsewhere."""

    def tensors(model: VideoMask2Former) -> dict[str, torch.Tensor]:
        found = dict(model.named_parameters()) | dict(model.named_buffers())
        for path, module in model.named_modules():
            found |= {f"{path}.{name}": item for name, item in vars(module).items() if isinstance(item, torch.Tensor)}
        return found

    built = VideoMask2Former(tiny_model.config)
    built.load_state_dict(tiny_model.state_dict())
    ours, expected = tensors(VideoMask2Former.from_pretrained(folder)), tensors(built)
    assert ours.keys() == expected.keys() > built.state_dict().keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
        assert (ours[name].dtype, ours[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name


def test_the_path_may_be_a_string(tiny_model: VideoMask2Former, folder: Path) -> None:
    assert identical(VideoMask2Former.from_pretrained(str(folder)), tiny_model)


@pytest.mark.parametrize("kind", ["object", "file", "string"])
def test_a_bare_weight_file_with_a_config(
    tiny_model: VideoMask2Former, folder: Path, tmp_path: Path, kind: str
) -> None:
    file = folder / "model.safetensors"
    configs = {"object": tiny_model.config, "file": folder / "config.json", "string": str(folder / "config.json")}
    loaded = VideoMask2Former.from_pretrained(file.rename(tmp_path / "weights.safetensors"), config=configs[kind])
    assert identical(loaded, tiny_model)
    assert loaded.config == tiny_model.config


def test_a_weight_file_beside_its_config(tiny_model: VideoMask2Former, folder: Path, hf_folder: Path) -> None:
    for file in (folder / "model.safetensors", hf_folder / "model.safetensors"):
        loaded = VideoMask2Former.from_pretrained(file)
        assert identical(loaded, tiny_model)
        assert loaded.config == tiny_model.config


def test_a_bare_weight_file_with_a_preset(tmp_path: Path) -> None:
    """The weights do not fit it, and the message shows that the preset was taken."""
    save_file({"transformer_decoder.class_head.bias": torch.zeros(41)}, tmp_path / "weights.safetensors")
    with pytest.raises(ConversionError, match=r"missing backbone.patch_embed.proj.weight \(96, 3, 4, 4\)"):
        VideoMask2Former.from_pretrained(tmp_path / "weights.safetensors", config="swin_tiny_youtubevis_2021")


def test_a_transformers_folder(tiny_model: VideoMask2Former, hf_folder: Path) -> None:
    loaded = VideoMask2Former.from_pretrained(hf_folder)
    assert identical(loaded, tiny_model)
    assert loaded.config == tiny_model.config


def test_a_folder_that_transformers_wrote(tiny_model: VideoMask2Former, hf_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.Mask2FormerForUniversalSegmentation.from_pretrained(hf_folder).save_pretrained(tmp_path / "written")
    loaded = VideoMask2Former.from_pretrained(tmp_path / "written")
    assert identical(loaded, tiny_model)
    assert loaded.config.temporal == "per_frame"
    assert loaded.config.labels == tiny_model.config.labels


def save_pickle(path: Path) -> Path:
    """As detectron2 writes it: arrays under `model`."""
    arrays = {name: tensor.numpy() for name, tensor in original_weights().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third party"}))
    return path


def save_torch(path: Path) -> Path:
    torch.save({"model": original_weights(), "iteration": 5999}, path)
    return path


@pytest.mark.parametrize(("save", "name"), [(save_pickle, "model_final.pkl"), (save_torch, "model_final.pth")])
def test_an_original_checkpoint(
    tiny_model: VideoMask2Former, tmp_path: Path, save: Callable[[Path], Path], name: str
) -> None:
    loaded = VideoMask2Former.from_pretrained(save(tmp_path / name), config=tiny_model.config)
    assert identical(loaded, tiny_model)


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize("temporal", ["joint", "per_frame"])
def test_temporal_can_be_overridden(
    tiny_model: VideoMask2Former, folder: Path, hf_folder: Path, kind: str, temporal: str
) -> None:
    path = folder if kind == "native" else hf_folder
    assert VideoMask2Former.from_pretrained(path).config.temporal == "joint"
    other = temporal != "joint"
    with pytest.warns(UserWarning, match="temporal is") if other else nullcontext():
        loaded = VideoMask2Former.from_pretrained(path, temporal=temporal)
    assert loaded.config == tiny_model.config.replace(temporal=temporal)
    with pytest.warns(UserWarning, match="temporal is") if other else nullcontext():
        given = VideoMask2Former.from_pretrained(path, temporal=temporal, config=tiny_model.config)
    assert given.config.temporal == temporal


OTHER_FUNCTIONS = {
    "transformer_decoder.num_heads": lambda c: replace(
        c, transformer_decoder=replace(c.transformer_decoder, num_heads=4)
    ),
    "labels": lambda c: replace(c, labels=c.labels[::-1]),
    "preprocessing.shortest_edge": lambda c: replace(c, preprocessing=replace(c.preprocessing, shortest_edge=400)),
    "preprocessing.image_std": lambda c: replace(c, preprocessing=replace(c.preprocessing, image_std=(1.0, 1.0, 1.0))),
    "pixel_decoder.num_": lambda c: replace(c, pixel_decoder=replace(c.pixel_decoder, num_heads=4, num_points=8)),
}


@pytest.mark.parametrize("kind", ["folder", "file", "hf"])
@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_another_function_of_the_same_weights_is_said(
    tiny_model: VideoMask2Former, folder: Path, hf_folder: Path, kind: str, name: str
) -> None:
    source = {"folder": folder, "file": folder / "model.safetensors", "hf": hf_folder}[kind]
    with pytest.warns(UserWarning, match=rf"used with another config than its own: {re.escape(name)}"):
        VideoMask2Former.from_pretrained(source, config=OTHER_FUNCTIONS[name](tiny_model.config))


def test_a_config_stands_in_for_a_broken_one(tiny_model: VideoMask2Former, folder: Path) -> None:
    for content in ("{", "[]", '{"model_type": "m2f-video", "depth": 3}'):
        (folder / "config.json").write_text(content)
        with pytest.warns(UserWarning, match=r"whether .*native computes .* is not known: .*config\.json"):
            assert identical(VideoMask2Former.from_pretrained(folder, config=tiny_model.config), tiny_model)
        assert VideoProcessor.from_pretrained(folder, config=tiny_model.config).labels == tiny_model.config.labels


def test_nothing_is_said_of_a_config_until_the_weights_are_loaded(tiny_model: VideoMask2Former, folder: Path) -> None:
    config = OTHER_FUNCTIONS["preprocessing.shortest_edge"](tiny_model.config)
    change_weights(folder, lambda weights: weights.pop("transformer_decoder.norm.bias"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConversionError, match=r"missing transformer_decoder\.norm\.bias"):
            VideoMask2Former.from_pretrained(folder, config=config)


def test_what_another_function_is(tiny_config: VideoMask2FormerConfig) -> None:
    """Other names of the classes too; neither what acts in training nor a mean as another program has rounded it."""
    mean = tuple(torch.tensor(tiny_config.preprocessing.image_mean).tolist())
    rounded = replace(tiny_config.preprocessing, image_mean=mean)
    backbone = replace(tiny_config.backbone, drop_path_rate=0.4)
    assert rounded != tiny_config.preprocessing
    assert other_function(tiny_config, tiny_config.replace(preprocessing=rounded, backbone=backbone)) == {}
    labels = tiny_config.labels[::-1]
    assert other_function(tiny_config, tiny_config.replace(labels=labels)) == {
        "labels": (list(tiny_config.labels), list(labels))
    }


def test_the_place_that_asked_is_warned(tiny_model: VideoMask2Former, folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"float16|temporal") as said:
        VideoMask2Former.from_pretrained(folder, temporal="per_frame", dtype="float16").prepare_for_inference()
    assert [("float16" in str(each.message), each.filename) for each in said] == [(True, __file__), (False, __file__)]


class WithAdapter(VideoMask2Former):
    """A researcher's own model, which has weights of its own, some of them named as timm's are."""

    def __init__(self, config: VideoMask2FormerConfig) -> None:
        super().__init__(config)
        self.adapter = torch.nn.Linear(2, 3)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1)])


def test_a_subclass_with_weights_of_its_own_comes_back(tiny_config: VideoMask2FormerConfig, tmp_path: Path) -> None:
    model = WithAdapter(tiny_config)
    with pytest.warns(UserWarning, match="WithAdapter, whose own from_pretrained loads it"):
        model.save_pretrained(tmp_path / "own")
    assert identical(WithAdapter.from_pretrained(tmp_path / "own"), model)
    with pytest.raises(ConfigError, match=r"the model is a .*WithAdapter; load it by from_pretrained of that class"):
        VideoMask2Former.from_pretrained(tmp_path / "own")
    config = model.config
    with pytest.raises(ConversionError, match=r"do not fit its config: unexpected adapter\.bias \(3,\) \(and 3 more\)"):
        VideoMask2Former.from_pretrained(tmp_path / "own", config=config)


class Louder(VideoMask2Former):
    """A researcher's own model, which has the weights of the plain one."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        return replace(output, class_queries_logits=2 * output.class_queries_logits)


def test_a_subclass_never_loads_as_the_plain_model(tiny_config: VideoMask2FormerConfig, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Louder, whose own from_pretrained loads it"):
        Louder(tiny_config).save_pretrained(tmp_path / "own")
    again = Louder.from_pretrained(tmp_path / "own")
    assert again.config.parts == {"model": f"{__name__}.Louder"}
    with pytest.warns(UserWarning, match="Louder, whose own from_pretrained loads it"):
        again.save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "own", tmp_path / "again"):
        for partial in (False, True):
            with pytest.raises(ConfigError, match=r"the model is a .*Louder; load it by from_pretrained of that class"):
                VideoMask2Former.from_pretrained(folder, partial=partial)
    with pytest.raises(ConfigError, match="parts has 'model', and the model no module of that name"):
        Louder(tiny_config, parts={"model": Louder})


def test_what_acts_in_training_alone_is_no_other_function(tiny_model: VideoMask2Former, folder: Path) -> None:
    backbone = replace(tiny_model.config.backbone, drop_path_rate=0.4)
    pixel_decoder = replace(tiny_model.config.pixel_decoder, dropout=0.2)
    config = tiny_model.config.replace(backbone=backbone, pixel_decoder=pixel_decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert VideoMask2Former.from_pretrained(folder, config=config).config == config


def test_a_config_of_a_giant_takes_no_memory(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["backbone"] |= {"embed_dim": 2048, "depths": [2, 2, 100, 2], "num_heads": [8, 8, 8, 8]}  # 400 GB
    data["transformer_decoder"] |= {"num_layers": 100, "ffn_dim": 65536}
    (folder / "config.json").write_text(json.dumps(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConversionError, match=r"do not fit its config: .* Give the config they were trained with"):
        VideoMask2Former.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


class ReadsNumbers(VideoMask2Former):
    """A researcher's own model, which computes with tensors while it is built."""

    def __init__(self, config: VideoMask2FormerConfig) -> None:
        super().__init__(config)
        self.rates = torch.linspace(0, 1, 3).tolist()
        self.last = torch.ones(2).cumsum(0)[-1].item()
        self.array = torch.arange(3).numpy()


def test_a_subclass_may_read_numbers_while_it_is_built(tiny_model: VideoMask2Former, folder: Path) -> None:
    model = ReadsNumbers.from_pretrained(folder)
    assert (model.rates, model.last, model.array.tolist()) == ([0.0, 0.5, 1.0], 2.0, [0, 1, 2])
    assert identical(model, tiny_model)
    change_weights(folder, lambda weights: weights.pop("transformer_decoder.norm.bias"))
    with pytest.raises(ConversionError, match=r"missing transformer_decoder.norm.bias \(64,\)"):
        ReadsNumbers.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, "float64", "torch.float64", torch.bfloat16, "float16", None])
def test_dtype(folder: Path, dtype: Any) -> None:
    with pytest.warns(UserWarning, match="float16 takes several times") if dtype == "float16" else nullcontext():
        model = VideoMask2Former.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {parse_dtype(dtype or "float32")}


def test_weights_of_half_precision_become_float32(tiny_model: VideoMask2Former, folder: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    model = VideoMask2Former.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert torch.equal(
        model.backbone.patch_embed.proj.weight, tiny_model.backbone.patch_embed.proj.weight.half().float()
    )


def test_device(folder: Path) -> None:
    assert VideoMask2Former.from_pretrained(folder, device=torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_of_a_gpu(tiny_model: VideoMask2Former, folder: Path) -> None:
    model = VideoMask2Former.from_pretrained(folder, device="cuda").double()
    assert model.device.type == "cuda"
    pixel_values = torch.randn(1, 2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        output = model(pixel_values.cuda()).class_queries_logits.cpu()
        assert_close(
            output, VideoMask2Former.from_pretrained(folder, dtype="float64")(pixel_values).class_queries_logits
        )


def test_label_names_come_from_the_config(hf_folder: Path) -> None:
    path = hf_folder / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {str(index): f"label {index}" for index in range(5)}
    path.write_text(json.dumps(config))
    assert VideoMask2Former.from_pretrained(hf_folder).config.labels == tuple(f"label {index}" for index in range(5))


def test_timm_backbones_round_trip(tiny_config: VideoMask2FormerConfig, tmp_path: Path) -> None:
    model = VideoMask2Former(tiny_config.replace(backbone="timm:test_convnext"))
    model.save_pretrained(tmp_path / "timm")
    assert identical(VideoMask2Former.from_pretrained(tmp_path / "timm"), model)


# --- what can be wrong with them


def test_a_file_without_config_is_refused_with_advice(folder: Path, tmp_path: Path) -> None:
    file = (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json does not exist.* preset such as 'swin_tiny"):
        VideoMask2Former.from_pretrained(file)


def test_a_folder_without_config_is_refused_with_advice(folder: Path, tiny_config: VideoMask2FormerConfig) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"native.config\.json does not exist.* preset such as 'swin_tiny"):
        VideoMask2Former.from_pretrained(folder)
    VideoMask2Former.from_pretrained(folder, config=tiny_config)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"native holds no weights; one of model.safetensors"):
        VideoMask2Former.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"model_type": "m2f-video", "depth": 3}', "unknown config field depth"),
        ('{"model_type": "mask2former"}', "backbone_config is missing"),
        ('{"model_type": "detr", "backbone_config": {}}', "model_type = 'detr'"),
        ("{}", "model_type"),
    ],
)
def test_a_bad_config_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"native.config\.json.*{message}"):
        VideoMask2Former.from_pretrained(folder)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer_decoder.norm.bias"), r"missing transformer_decoder.norm.bias \(64,\)"),
        (
            lambda w: w.update({"transformer_decoder.layers.3.linear1.bias": torch.zeros(128)}),
            r"unexpected transformer_decoder.layers.3.linear1.bias \(128,\)",
        ),
        (
            lambda w: w.update({"transformer_decoder.norm.bias": torch.zeros(65)}),
            r"transformer_decoder.norm.bias is \(65,\), the config makes it \(64,\)",
        ),
        (lambda w: [w.pop(name) for name in list(w) if "layers.2" in name], "and 17 more"),
        (lambda w: w["transformer_decoder.norm.bias"].__setitem__(3, torch.nan), "norm.bias has 1 NaN or infinite"),
        (
            lambda w: w.update({"transformer_decoder.norm.bias": torch.zeros(64, dtype=torch.int64)}),
            "norm.bias is torch.int64, not floating point",
        ),
        (lambda w: w.update({"what": torch.zeros(1)}), r"do not fit its config: unexpected what \(1,\)"),
        (lambda w: w.clear(), r"native: no known format"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(ConversionError, match=message):
        VideoMask2Former.from_pretrained(folder)


def test_the_message_names_the_source_and_the_remedy(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("transformer_decoder.norm.bias"))
    with pytest.raises(ConversionError, match=r"weights of .*native do not fit its config: .* Give the config they"):
        VideoMask2Former.from_pretrained(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it is a damaged safetensors file"):
        VideoMask2Former.from_pretrained(folder)


@pytest.mark.parametrize(
    "source",
    ["no such folder", "nowhere", "/not/a/name", "a/b/c", "~/model", "owner/na me", "../model", "./model", "a--b/c"],
)
def test_what_is_neither_path_nor_hub_name_is_named(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist, and is not a hub name"):
        VideoMask2Former.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match="does not exist, and is not a hub name"):
        load_config(source)


@pytest.mark.parametrize("dtype", ["float8", "int64", torch.int32, "half-ish"])
def test_an_unknown_dtype_lists_the_known(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown dtype .*; choose one of float32, float64, bfloat16, float16"):
        VideoMask2Former.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:abc"])
def test_an_unknown_device_is_named(folder: Path, device: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown device '{device}'; use for example"):
        VideoMask2Former.from_pretrained(folder, device=device)


def test_a_device_without_numbers_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="'meta' holds no numbers"):
        VideoMask2Former.from_pretrained(folder, device="meta")


def test_a_device_that_is_not_there_is_named() -> None:
    missing = "xla" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device '{missing}' is not available here"):
        parse_device(missing)


def test_an_unknown_preset_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown preset 'swin_huge'"):
        VideoMask2Former.from_pretrained(folder, config="swin_huge")


@pytest.mark.parametrize("config", ["nowhere/config.json", "nowhere.json"])
def test_a_missing_config_file_is_named(folder: Path, config: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no config file {config}"):
        VideoMask2Former.from_pretrained(folder, config=config)


def test_an_unknown_temporal_is_named(folder: Path, hf_folder: Path) -> None:
    for path in (folder, hf_folder):
        with pytest.raises(ConfigError, match="temporal"):
            VideoMask2Former.from_pretrained(path, temporal="online")


# --- saving


def test_saving_again_replaces_the_model_and_keeps_the_model_card(tiny_model: VideoMask2Former, folder: Path) -> None:
    (folder / "README.md").write_text("my card")
    (folder / "notes.txt").write_text("mine")
    other = VideoMask2Former(tiny_model.config.replace(labels=("cat",)))
    other.save_pretrained(folder)
    assert identical(VideoMask2Former.from_pretrained(folder), other)
    assert (folder / "README.md").read_text() == "my card"
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "notes.txt"
    ]  # fmt: skip


def test_the_model_card_says_what_it_is(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "library_name: m2f-video" in card
    assert "video-instance-segmentation" in card


def test_training_state_and_weights_are_left_as_they_are(tiny_config: VideoMask2FormerConfig, tmp_path: Path) -> None:
    model = VideoMask2Former(tiny_config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["weights", "card"])
def test_a_save_that_fails_leaves_the_old_folder(
    tiny_model: VideoMask2Former, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    before = snapshot(folder)
    if where == "weights":
        monkeypatch.setattr("weights_convert.checkpoints.save_file", fail)
    else:
        monkeypatch.setattr(VideoMask2Former, "generate_model_card", fail)
    with pytest.raises(CheckpointError, match=r"native cannot be written: disk full"):
        tiny_model.save_pretrained(folder)
    assert snapshot(folder) == before


def test_a_save_that_fails_makes_no_folder(
    tiny_model: VideoMask2Former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weights_convert.checkpoints.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.save_pretrained(tmp_path / "new" / "model")
    assert list(tmp_path.rglob("*")) == []


def test_saving_onto_a_file_is_refused(tiny_model: VideoMask2Former, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file cannot be written: File exists"):
        tiny_model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_staging_replaces_files_at_the_end_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with staged_folder(tmp_path) as staging:
        (staging / "a").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
        assert staging.name == tmp_path.name
    assert snapshot(tmp_path) == {"a": b"new"}


def test_staging_is_all_or_nothing_and_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / ".writing-0a1b2c3d" / "model").mkdir(parents=True)
    (folder / "b").mkdir()

    def write() -> None:
        with staged_folder(folder) as staging:
            (staging / "a").write_text("new")
            (staging / "b").write_text("new")

    with pytest.raises(CheckpointError, match="model cannot be written: b is in the way"):
        write()
    assert [path.name for path in folder.iterdir()] == ["b"]

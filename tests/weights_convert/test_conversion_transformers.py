"""What transformers writes is read, and what is written loads in transformers, with the same numbers."""

import copy
import json

import pytest
import torch
from conversion_helpers import NATIVE_CONFIG, assert_same

from weights_convert import (
    ConversionError,
    from_native,
    hf_config_from_native,
    native_config_from_hf,
    read_checkpoint,
    to_native,
    to_native_config,
    write_checkpoint,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["equal widths", "unequal widths", "basic ResNet", "bottleneck ResNet"])
def model(request):
    torch.manual_seed(0)
    config = copy.deepcopy(NATIVE_CONFIG)
    if request.param == "unequal widths":
        config["transformer_decoder"]["hidden_dim"] = 32
    if request.param.endswith("ResNet"):
        config["backbone"] = {"type": "timm", "name": "resnet18" if request.param == "basic ResNet" else "resnet26"}
    hf_config = transformers.Mask2FormerConfig.from_dict(hf_config_from_native(config)[0])
    model = transformers.Mask2FormerForUniversalSegmentation(hf_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn_like(buffer)
            if name.endswith("running_var"):
                buffer += torch.rand_like(buffer)
    return model


def outputs(model):
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = model(pixels)
    return result.class_queries_logits, result.masks_queries_logits


@pytest.mark.parametrize("original_format", [True, False])
def test_saved_model_is_read(model, tmp_path, original_format):
    model.save_pretrained(tmp_path, save_original_format=original_format)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.format == "hf"
    native = to_native(checkpoint.state_dict)
    assert_same(native, to_native(model.state_dict()))
    config = to_native_config(checkpoint.config, checkpoint.preprocessor)
    assert config["temporal"] == "per_frame"
    assert config["transformer_decoder"]["num_layers"] == 3


def test_sharded_model_is_read(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(to_native(read_checkpoint(tmp_path).state_dict), to_native(model.state_dict()))


@pytest.mark.parametrize("temporal", ["joint", "per_frame"])
def test_written_folder_loads_with_equal_outputs(model, tmp_path, temporal):
    native = to_native(model.state_dict())
    config = native_config_from_hf(model.config.to_dict(), temporal=temporal)
    write_checkpoint(tmp_path / "hf", from_native(native), *hf_config_from_native(config))
    loaded, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    for ours, theirs in zip(outputs(loaded.eval()), outputs(model), strict=True):
        assert torch.equal(ours, theirs)
    assert to_native_config(*map(json.loads, _texts(tmp_path / "hf"))) == config


def test_written_processor_loads(tmp_path):
    for size in (None, [128, 192]):
        config = copy.deepcopy(NATIVE_CONFIG)
        config["preprocessing"]["fixed_size"] = size
        hf_config, processor = hf_config_from_native(config)
        (tmp_path / "config.json").write_text(json.dumps(hf_config))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        loaded = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert type(loaded).__name__.startswith("Mask2FormerImageProcessor")
        pixels = loaded(torch.zeros(3, 600, 900, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
        assert list(pixels.shape[2:]) == (size or [480, 736])
        zero = [-m / s for m, s in zip(loaded.image_mean, loaded.image_std, strict=True)]
        torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(zero))


def test_field_defaults_are_those_of_transformers():
    """A config that says nothing gives what transformers would build from it."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    for kind in ("swin", "resnet"):
        bare = {"model_type": "mask2former", "backbone_config": {"model_type": kind, "out_features": stages}}
        full = transformers.Mask2FormerConfig.from_dict(copy.deepcopy(bare)).to_dict()
        assert native_config_from_hf(bare) == native_config_from_hf(full)
    for labels in ({}, {"num_labels": 5}):
        full = transformers.Mask2FormerConfig.from_dict(copy.deepcopy(bare | labels)).to_dict()
        assert native_config_from_hf(bare | labels)["labels"] == native_config_from_hf(full)["labels"]


@pytest.mark.parametrize(
    ("field", "value"), [("pre_norm", True), ("activation_function", "gelu"), ("common_stride", 8)]
)
def test_config_of_another_model_is_refused(field, value):
    config = transformers.Mask2FormerConfig(**{field: value}).to_dict()
    with pytest.raises(ConversionError, match=f"{field} = {value!r} cannot be represented"):
        native_config_from_hf(config)


def _texts(folder):
    return [(folder / name).read_text() for name in ("config.json", "preprocessor_config.json")]

"""Weights of a backbone alone: what is loaded is said, and what does not fit is refused."""

import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from m2f_video import VideoMask2Former, VideoMask2FormerConfig, load_backbone
from m2f_video.config import ConfigError, PixelDecoderConfig, SwinConfig, TransformerDecoderConfig
from tests.hub_stub import HubStub
from tests.tolerances import assert_close, identical
from weights_convert import ConversionError, from_native, to_native

TAG = "test_convnext.r160_in1k"


@pytest.fixture(scope="module")
def swin() -> dict[str, Tensor]:
    """A classifier of the tiny model's sizes, by timm."""
    torch.manual_seed(1)
    return SwinTransformer(
        img_size=128, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4, num_classes=5
    ).state_dict()


def build(backbone: str | SwinConfig) -> VideoMask2Former:
    torch.manual_seed(0)
    config = VideoMask2FormerConfig(
        backbone=backbone,  # type: ignore[arg-type]  # a name stands for a config
        pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=8, num_layers=1, ffn_dim=16, num_heads=2),
        transformer_decoder=TransformerDecoderConfig(
            hidden_dim=32, num_queries=4, num_layers=2, ffn_dim=16, num_heads=2
        ),
        labels=("cat", "dog"),
    )
    return VideoMask2Former(config)


def without_backbone(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("backbone.")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[key]) for key, tensor in left.items())


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_swin_classifier(
    is_converted: bool, swin: dict[str, Tensor], tiny_config: VideoMask2FormerConfig, tmp_path: Path
) -> None:
    if is_converted:
        save_file(to_native(swin), path := tmp_path / "swin.safetensors")
    else:
        torch.save({"model": swin}, path := tmp_path / "swin.pth")
    model = VideoMask2Former(tiny_config)
    before = copy.deepcopy(without_backbone(model))
    done = load_backbone(model, path)
    assert same(without_backbone(model), before)
    loaded = {key: model.state_dict()[key] for key in to_native(swin)}
    assert same(loaded, to_native(swin))
    assert done.counts("loaded") == {"backbone.patch_embed": 4, "backbone.stages": 74}
    assert done.counts("new") == {"backbone.out_norms": 8}
    assert done.counts("ignored") == ({} if is_converted else {"head.{rest}": 2, "norm.{p}": 2})
    lines = [line.split() for line in str(done).splitlines()]
    assert lines[0] == ["backbone", "of", str(path)]
    assert ["backbone.stages", "74", "0", "0", "0"] in lines
    assert ["backbone.out_norms", "0", "0", "8", "0"] in lines
    assert ["all", "78", "0", "8", "0" if is_converted else "4"] in lines


@pytest.mark.parametrize("kind", ["folder", "hf_folder"])
def test_the_backbone_of_a_whole_model(kind: str, tiny_model: VideoMask2Former, request: Any) -> None:
    model = VideoMask2Former(tiny_model.config.replace(labels=("cat",)))
    before = copy.deepcopy(without_backbone(model))
    done = load_backbone(model, request.getfixturevalue(kind))
    assert identical(model.backbone, tiny_model.backbone)
    assert same(without_backbone(model), before)
    assert done.names("new") == []
    assert done.counts("loaded")["backbone.out_norms"] == 8
    assert done.counts("ignored")["transformer_decoder"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "test_convnext",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnext_atto", "regnetx_002")),
    ],
)
def test_a_classifier_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = timm.create_model(name, num_classes=5).eval()
    weights = {key: tensor for key, tensor in classifier.state_dict().items() if "num_batches" not in key}
    torch.save(weights, tmp_path / "classifier.pth")
    model = build(f"timm:{name}").eval()
    done = load_backbone(model, tmp_path / "classifier.pth")
    assert (done.names("new"), len(done.names("ignored"))) == ([], 1)
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = classifier.forward_intermediates(pixels, intermediates_only=True)
        assert_close(model.backbone(pixels)[-1], expected[-1])


@pytest.mark.parametrize(
    "format",
    [
        "detectron2_resnet",
        "hf",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("detectron2", "timm_resnet", "native")),
    ],
)
def test_a_resnet_by_whatever_names(format: str, tmp_path: Path) -> None:
    other = build("timm:resnet18")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    state_dict = other.state_dict()
    if format.endswith("_resnet"):
        state_dict = {key: tensor for key, tensor in state_dict.items() if key.startswith("backbone.")}
    torch.save(from_native(state_dict, format), tmp_path / "weights.pth")
    model = build("timm:resnet18")
    load_backbone(model, tmp_path / "weights.pth")
    assert identical(model.backbone, other.backbone)


def refused(model: VideoMask2Former, path: Path, state_dict: dict[str, Tensor]) -> str:
    """The message; the model is as it was."""
    before = copy.deepcopy(model)
    torch.save(state_dict, path)
    with pytest.raises(ConversionError) as error:
        load_backbone(model, path)
    assert identical(model, before)
    assert str(path) in str(error.value)
    return str(error.value).replace(str(path), "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 3}, "relative_position_bias_table is (49, 1), the config makes it (25, 1)"),
        ({"embed_dim": 32}, "backbone.patch_embed.proj.weight is (16, 3, 4, 4), the config makes it (32, 3, 4, 4)"),
        ({"depths": (1, 1, 1, 1)}, "unexpected backbone.stages.2.blocks.1.norm1.weight"),
        ({"depths": (1, 1, 3, 1)}, "missing backbone.stages.2.blocks.2.norm1.weight"),
        ({"qkv_bias": False}, "unexpected backbone.stages.0.blocks.0.attn.qkv.bias"),
    ],
)
def test_a_swin_of_other_sizes_is_refused(
    changes: dict[str, Any], message: str, swin: dict[str, Tensor], tiny_config: VideoMask2FormerConfig, tmp_path: Path
) -> None:
    config = tiny_config.replace(backbone=SwinConfig(**{**vars(tiny_config.backbone), **changes}))
    told = refused(VideoMask2Former(config), tmp_path / "swin.pth", swin)
    assert message in told
    assert len(told) < 300


def test_a_backbone_of_another_kind_is_refused(swin: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    assert "missing backbone.model.conv1.weight" in refused(build("timm:resnet18"), path, swin)
    resnet = timm.create_model("resnet18").state_dict()
    assert "missing backbone.patch_embed.proj.weight" in refused(build(SwinConfig(embed_dim=24)), path, resnet)
    told = refused(build("timm:test_convnext"), path, resnet)
    assert "missing backbone.model.stem_0.weight" in told
    assert len(told) < 300


@pytest.mark.parametrize(
    ("smaller", "larger", "key"),
    [
        ("test_convnext", "test_convnext2", ""),
        pytest.param("resnet18", "resnet34", "layer1.2.conv1.weight", marks=pytest.mark.slow),
        pytest.param("resnet26", "resnet50", "layer1.2.conv1.weight", marks=pytest.mark.slow),
        pytest.param("convnext_atto", "convnext_femto", "", marks=pytest.mark.slow),
    ],
)
def test_another_size_is_refused_both_ways(smaller: str, larger: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    told = refused(build(f"timm:{smaller}"), path, timm.create_model(larger).state_dict())
    assert f"unexpected backbone.model.{key}" in told or not key
    told = refused(build(f"timm:{larger}"), path, timm.create_model(smaller).state_dict())
    assert f"missing backbone.model.{key}" in told or not key


@pytest.mark.parametrize("backbone", ["timm:resnet18", "timm:test_convnext", SwinConfig(embed_dim=24)])
def test_weights_that_match_nothing_are_refused(backbone: str | SwinConfig, tmp_path: Path) -> None:
    told = refused(build(backbone), tmp_path / "weights.pth", {"encoder.weight": torch.ones(2)})
    assert "keys like encoder.weight" in told


def test_a_missing_weight_is_named(
    swin: dict[str, Tensor], tiny_config: VideoMask2FormerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    model = VideoMask2Former(tiny_config)
    for key in ("patch_embed.norm.bias", "layers.3.blocks.0.mlp.fc2.weight"):
        assert "missing backbone." in refused(model, path, {name: t for name, t in swin.items() if name != key})
    resnet = timm.create_model("resnet18").state_dict()
    told = refused(build("timm:resnet18"), path, {key: t for key, t in resnet.items() if key != "bn1.running_mean"})
    assert "missing backbone.model.bn1.running_mean (64,)" in told


def test_whoever_wants_a_whole_model_of_it_learns_the_way(
    swin: dict[str, Tensor], tiny_config: VideoMask2FormerConfig, tmp_path: Path
) -> None:
    torch.save(swin, tmp_path / "swin.pth")
    with pytest.raises(ConversionError, match=r"a backbone only: .*--init-backbone.*m2f_video\.load_backbone"):
        VideoMask2Former.from_pretrained(tmp_path / "swin.pth", config=tiny_config)


# --- pretrained weights of timm


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStub]:
    """A hub with the weights of one classifier."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    torch.manual_seed(1)
    (tmp_path / "hub").mkdir()
    classifier = timm.create_model("test_convnext")
    save_file(classifier.state_dict(), tmp_path / "hub" / "model.safetensors")
    with HubStub(models={(f"timm/{TAG}", "main"): tmp_path / "hub"}).installed() as stub:
        yield stub


@pytest.mark.filterwarnings("ignore:.* was trained on other frames")
@pytest.mark.parametrize(
    ("name", "source"),
    [("test_convnext", source) for source in ("timm", f"timm:{TAG}", "timm:test_convnext", f"timm/{TAG}")]
    + [(TAG, "timm")],
)
def test_pretrained_weights_of_timm(name: str, source: str, stub: HubStub) -> None:
    torch.manual_seed(1)
    classifier = timm.create_model("test_convnext")  # as the hub has it
    expected = {key.replace(".", "_"): tensor for key, tensor in classifier.state_dict().items()}
    model = build(f"timm:{name}")
    done = load_backbone(model, source)
    weights = model.backbone.state_dict()
    assert (len(done.names("loaded")), done.names("new")) == (len(weights), [])
    assert all(
        torch.equal(tensor, expected[key.removeprefix("model.").replace(".", "_")]) for key, tensor in weights.items()
    )


@pytest.mark.parametrize("source", [f"timm:{TAG}", f"timm/{TAG}"])
@pytest.mark.parametrize("edge", [0.5, 0.485])
def test_frames_that_timm_normalised_otherwise_are_said(source: str, edge: float, stub: HubStub) -> None:
    model = build("timm:test_convnext")
    same = edge == 0.5
    preprocessing = replace(model.config.preprocessing, image_mean=(edge, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    model.config = model.config.replace(preprocessing=preprocessing)
    said = r"the backbone of timm.* was trained on other frames: preprocessing.image_mean is \(0.485, 0.5"
    with nullcontext() if same else pytest.warns(UserWarning, match=said):
        load_backbone(model, source)


def test_a_model_that_normalised_otherwise_is_said(folder: Path, tiny_config: VideoMask2FormerConfig) -> None:
    preprocessing = replace(tiny_config.preprocessing, image_std=(1.0, 1.0, 1.0), shortest_edge=400)
    with pytest.warns(UserWarning, match=r"another config than its own: preprocessing.image_std is \[1.0, 1.0, 1.0\]"):
        load_backbone(VideoMask2Former(tiny_config.replace(preprocessing=preprocessing)), folder)


def test_weights_of_another_backbone_of_the_same_shapes_are_said(tmp_path: Path) -> None:
    other = build("timm:resnet18")
    other.config = other.config.replace(backbone="timm:gluon_resnet18_v1b")
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match=r"backbone.name is 'resnet18' \(its own: 'gluon_resnet18_v1b'\)"):
        load_backbone(build("timm:resnet18"), tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.warns(UserWarning, match=r"other computes what it was made for is not known: .*config\.json"):
        load_backbone(build("timm:resnet18"), tmp_path / "other")


def test_a_hub_that_is_not_reached(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.online = False
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)  # between its attempts
    with pytest.raises(FileNotFoundError, match=f"the pretrained weights {TAG} of timm cannot be fetched"):
        load_backbone(build("timm:test_convnext"), f"timm:{TAG}")


@pytest.mark.parametrize(
    ("backbone", "source", "message"),
    [
        ("timm:resnet18", "timm:resnet18.nobody", "no pretrained weights 'resnet18.nobody'; did you mean resnet18."),
        ("timm:resnet18", "timm:resnet19", "no pretrained weights 'resnet19'|of another model"),
        ("timm:resnet18", "timm:resnet50.a1_in1k", "of another model than the backbone, timm's resnet18"),
        (SwinConfig(embed_dim=24), "timm", "the backbone is not timm's; name weights, such as timm:swin_tiny"),
        (SwinConfig(embed_dim=24), "timm:swin_nano", "no pretrained weights 'swin_nano'; did you mean "),
    ],
)
def test_pretrained_weights_that_do_not_exist(backbone: str | SwinConfig, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backbone(build(backbone), source)


def test_what_is_no_file(tmp_path: Path) -> None:
    model = build("timm:test_convnext")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_backbone(model, "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe, socket or device, not a regular file"):
        load_backbone(model, tmp_path / "pipe")

"""Rule tables: bitwise in both directions, and strict."""

import hashlib
import re

import pytest
import timm
import torch
from conversion_helpers import assert_same, read_golden
from safetensors.torch import save

from weights_convert import ConversionError, detect_format, from_native, to_native
from weights_convert.convert import import_state_dict
from weights_convert.rules import FORMATS, whole_model_keys

HIGH_LAYER = "sem_seg_head.predictor.transformer_ffn_layers.999.norm."
BLOCK = "model.pixel_level_module.encoder.encoder.layers.2.blocks.1."


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def meta(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state_dict.items()}


# ---- the same weights, whatever they are called ----


def test_all_namings_give_the_same_native_weights(original, hf_old, hf_current):
    native = to_native(original)
    assert len(native) == 206
    assert sum(tensor.numel() for tensor in native.values()) == 901865
    assert_same(to_native(hf_old), native)
    assert_same(to_native(hf_current), native)
    assert_same(to_native(native), native)


def test_original_names_that_are_not_cut_keep_their_numbers(original):
    native = to_native(original)
    for theirs, ours in {
        "backbone.norm2.weight": "backbone.out_norms.2.weight",
        "backbone.layers.1.downsample.reduction.weight": "backbone.stages.1.downsample.reduction.weight",
        "backbone.layers.2.blocks.1.attn.qkv.bias": "backbone.stages.2.blocks.1.attn.qkv.bias",
        "sem_seg_head.pixel_decoder.adapter_1.weight": "pixel_decoder.lateral_conv.0.weight",
        "sem_seg_head.pixel_decoder.layer_1.norm.bias": "pixel_decoder.output_conv.1.bias",
        "sem_seg_head.pixel_decoder.transformer.level_embed": "pixel_decoder.level_embed",
        "sem_seg_head.predictor.level_embed.weight": "transformer_decoder.level_embed.weight",
        "sem_seg_head.predictor.query_feat.weight": "transformer_decoder.query_features.weight",
        "sem_seg_head.predictor.query_embed.weight": "transformer_decoder.query_positions.weight",
        "sem_seg_head.predictor.class_embed.bias": "transformer_decoder.class_head.bias",
    }.items():
        assert torch.equal(native[ours], original[theirs]), ours


def test_native_to_hf_reproduces_the_golden_hashes(original):
    golden = read_golden("hf/state_dict_hashes.json")
    hf = from_native(to_native(original))
    buffers = {key for key in golden["old"] if key.endswith("relative_position_index")}
    final_norm = {key for key in hf if "swin.layernorm" in key}
    assert len(final_norm) == 2
    assert hf.keys() - final_norm == golden["old"].keys() - buffers
    assert {key: sha256(hf[key]) for key in hf.keys() - final_norm} == {
        key: golden["old"][key] for key in golden["old"].keys() - buffers
    }


def test_pair_list_reproduces_the_golden_hashes(hf_old, hf_current):
    """The fixtures that other tests convert are what the reference wrote."""
    golden = read_golden("hf/state_dict_hashes.json")
    assert {key: sha256(tensor) for key, tensor in hf_old.items()} == golden["old"]
    assert {key: sha256(tensor) for key, tensor in hf_current.items() if "swin.layernorm" not in key} == {
        key: digest for key, digest in golden["current"].items() if "swin.layernorm" not in key
    }


def test_hashes_see_a_swapped_key_bias(original):
    """A key bias changes no output of the model, so only its place can be checked."""
    golden = read_golden("hf/state_dict_hashes.json")["old"]
    native = to_native(original)
    name = "backbone.stages.2.blocks.1.attn.qkv.bias"
    query, key, value = native[name].chunk(3)
    hf = from_native(native | {name: torch.cat([key, query, value])})
    wrong = {key for key in hf.keys() & golden.keys() if sha256(hf[key]) != golden[key]}
    assert wrong == {BLOCK + "attention.self.query.bias", BLOCK + "attention.self.key.bias"}


def test_round_trip_to_original_names_is_bitwise(original):
    back = from_native(to_native(original), "detectron2")
    dropped = {key for key in original if key.endswith("relative_position_index")} | {"criterion.empty_weight"}
    assert_same(back, {key: tensor for key, tensor in original.items() if key not in dropped})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_survives_the_round_trip(original, dtype):
    native = {key: tensor.to(dtype) for key, tensor in to_native(original).items()}
    hf = from_native(native)
    assert {tensor.dtype for tensor in hf.values()} == {dtype}
    assert_same(to_native(hf), native)


def test_hf_gets_what_transformers_asks_for(original):
    hf = from_native(to_native(original))
    assert torch.equal(hf["criterion.empty_weight"], original["criterion.empty_weight"])
    assert torch.equal(hf["model.pixel_level_module.encoder.swin.layernorm.weight"], torch.ones(128))
    assert torch.equal(hf["model.pixel_level_module.encoder.swin.layernorm.bias"], torch.zeros(128))


# ---- full size ----


def test_full_size_key_lists():
    golden = read_golden("swin_tiny_keys.json")
    assert [len(golden[name]) for name in ("original", "hf_current", "hf_old")] == [482, 556, 566]
    native = shapes(to_native(meta(golden["original"])))
    assert shapes(to_native(meta(golden["hf_old"]))) == native
    assert shapes(to_native(meta(golden["hf_current"]))) == native
    assert sum(torch.Size(shape).numel() for shape in native.values()) == 47411363
    buffers = {key for key in golden["hf_old"] if key.endswith("relative_position_index")}
    norm = {f"model.pixel_level_module.encoder.swin.layernorm.{p}": [768] for p in ("weight", "bias")}
    expected = {key: shape for key, shape in golden["hf_old"].items() if key not in buffers} | norm
    assert shapes(from_native(meta(native))) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_every_rule_is_inverted_by_itself(name):
    """Any index, weight and bias: native to foreign and back ends where it began."""
    highest = ("backbone.stages.3.blocks.17.attn.qkv.bias", "pixel_decoder.layers.10.linear1.bias")
    highest += ("transformer_decoder.layers.11.linear1.bias", "transformer_decoder.input_projections.2.bias")
    keys = set(whole_model_keys(highest))
    assert keys.issuperset(highest)
    if name == "timm_swin":
        keys = {key for key in keys if key.startswith("backbone.") and "out_norms" not in key}
    if name.endswith("_resnet"):
        keys = set(resnet_keys("resnet50"))
    native = {key: torch.randn(6, 2) for key in keys}
    foreign = from_native(native, name)
    if name == "timm_swin":  # is written in the layout of Swin's authors, which a first downsampling tells apart
        foreign["layers.0.downsample.norm.bias"] = native["backbone.stages.0.downsample.norm.bias"] = torch.ones(1)
    assert_same(to_native(foreign, name), native)


@pytest.mark.parametrize("name", ["native", "hf", pytest.param("detectron2", marks=pytest.mark.slow)])
def test_every_missing_native_key_is_named(name, original):
    native = to_native(original)
    assert set(whole_model_keys(native)) == set(native)
    for key in native:
        rest = {other: tensor for other, tensor in native.items() if other != key}
        with pytest.raises(ConversionError, match=re.escape(key)):
            from_native(rest, name)


@pytest.mark.parametrize("name", ["hf", "detectron2"])
def test_a_missing_foreign_key_is_named(name, original):
    foreign = from_native(to_native(original), name)
    names = import_state_dict(foreign, name).pairs
    for key in ("pixel_decoder.level_embed", "transformer_decoder.class_head.bias", "backbone.out_norms.2.weight"):
        (lost,) = names[key]
        with pytest.raises(ConversionError, match=re.escape(lost)):
            to_native({other: tensor for other, tensor in foreign.items() if other != lost})


def test_a_backbone_alone_may_be_native(original):
    backbone = {key: tensor for key, tensor in to_native(original).items() if key.startswith("backbone.")}
    assert_same(to_native(backbone), backbone)
    with pytest.raises(ConversionError, match="pixel_decoder"):
        from_native(backbone, "hf")


# ---- spellings ----


def test_mixed_hf_names_are_read(original, hf_old, hf_current):
    """As transformers 5.x writes them: old names, no index buffers, the final norm under its new name."""
    mixed = {key: tensor for key, tensor in hf_old.items() if not key.endswith("relative_position_index")}
    for part in ("blocks.0.attention.self.query.weight", "embeddings.norm.bias"):
        mixed = {key: tensor for key, tensor in mixed.items() if not key.endswith(part)}
    for part in ("blocks.0.attention.q_proj.weight", "embeddings.norm.bias", "swin.layernorm.weight"):
        mixed |= {key: tensor for key, tensor in hf_current.items() if key.endswith(part)}
    assert_same(to_native(mixed), to_native(original))


def test_older_image_checkpoint_spelling(original):
    older = {
        key.replace("query_feat", "static_query").replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): tensor
        for key, tensor in original.items()
    }
    assert "sem_seg_head.input_proj.0.0.weight" in older
    assert_same(to_native(older), to_native(original))


@pytest.mark.parametrize("form", ["native", "hf", "detectron2", "timm_swin"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.net._orig_mod."]
)
def test_names_of_wrappers_before_all_keys_are_dropped(original, form, prefix):
    """DistributedDataParallel, torch.compile, Lightning and whatever a training loop keeps its model in."""
    native = to_native(original)
    if form == "timm_swin":  # which has no output norms
        native = {key: native[key] for key in native if key.startswith(("backbone.stages.", "backbone.patch_embed."))}
        keys = {key.replace("stages", "layers").removeprefix("backbone."): tensor for key, tensor in native.items()}
    else:
        keys = native if form == "native" else from_native(native, form)
    assert detect_format({prefix + key: tensor for key, tensor in keys.items()}) == form
    assert_same(to_native({prefix + key: tensor for key, tensor in keys.items()}), native)


def test_names_of_a_compiled_part_are_dropped(original):
    compiled = {key.replace("backbone.", "backbone._orig_mod."): tensor for key, tensor in original.items()}
    assert_same(to_native({"model." + key: tensor for key, tensor in compiled.items()}), to_native(original))


@pytest.mark.parametrize("key", ["a." * 100_000 + "weight", "module." * 100_000, "." * 100_000, "", "weight"])
def test_wrappers_without_end_are_no_format(key):
    with pytest.raises(ConversionError, match="no known format") as error:
        detect_format([key])
    assert len(str(error.value)) < 300


def test_layers_without_end_are_an_error(original):
    """A high number makes no long list of the layers that would be before it."""
    native = to_native(original)
    for name in ("transformer_decoder.layers.999999999.norm.weight", "pixel_decoder.layers.1000.linear1.bias"):
        assert whole_model_keys(native | {name: torch.zeros(1)}) == whole_model_keys(native)
        with pytest.raises(ConversionError, match=f"hf has no counterpart for {name}"):
            from_native(native | {name: torch.zeros(1)})
    with pytest.raises(ConversionError, match=r"missing .* and \d+ more"):
        to_native(from_native(native, "detectron2") | {HIGH_LAYER + "weight": torch.zeros(64)})


def test_ddp_prefix_on_some_keys_is_an_error(original):
    first, *rest = original
    mixed = {"module." + first: original[first]} | {key: original[key] for key in rest}
    with pytest.raises(ConversionError, match=r"no rule for module\.backbone"):
        to_native(mixed)


def test_one_tensor_in_two_spellings_is_an_error(original):
    twice = original | {"sem_seg_head.predictor.static_query.weight": torch.zeros(10, 64)}
    with pytest.raises(ConversionError, match=r"static_query\.weight is there a second time"):
        to_native(twice)


# ---- timm ----


@pytest.fixture(scope="module")
def timm_swin():
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).state_dict()


def test_timm_swin_fills_the_backbone(timm_swin):
    assert detect_format(timm_swin) == "timm_swin"
    native = to_native(timm_swin)
    golden = to_native(meta(read_golden("swin_tiny_keys.json")["original"]))
    backbone = {key: tensor for key, tensor in golden.items() if key.startswith("backbone.")}
    out_norms = {key for key in backbone if key.startswith("backbone.out_norms.")}
    assert shapes(native) == shapes({key: backbone[key] for key in backbone.keys() - out_norms})
    for stage in range(3):
        ours, theirs = f"backbone.stages.{stage}.downsample.", f"layers.{stage + 1}.downsample."
        assert torch.equal(native[ours + "reduction.weight"], timm_swin[theirs + "reduction.weight"])


def test_swin_of_its_authors_downsamples_at_the_end_of_a_stage(timm_swin):
    theirs = {}
    for key, tensor in timm_swin.items():
        _, stage, tail = [*key.split(".", 2), "", ""][:3]
        theirs[f"layers.{int(stage) - 1}.{tail}" if tail.startswith("downsample.") else key] = tensor
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    theirs["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    theirs["head.weight"] = torch.zeros(1000, 768)
    assert_same(to_native(theirs), to_native(timm_swin))


# ---- ResNets ----


def resnet_keys(name: str) -> dict[str, torch.Tensor]:
    """The native weights of a ResNet, each with other numbers."""
    shapes = {key: tensor.shape for key, tensor in timm.create_model(name, features_only=True).state_dict().items()}
    return {
        f"backbone.model.{key}": torch.tensor(7) if key.endswith("num_batches_tracked") else torch.randn(2, *shape[2:])
        for key, shape in shapes.items()
    }


@pytest.fixture(scope="module", params=["resnet18", "resnet26", "resnet101"])
def resnet(request, original):
    """A whole native model with a ResNet as its backbone."""
    rest = {key: tensor for key, tensor in to_native(original).items() if not key.startswith("backbone.")}
    return resnet_keys(request.param) | rest


@pytest.mark.parametrize("name", ["hf", "detectron2"])
def test_resnet_round_trip_is_bitwise(resnet, name):
    foreign = from_native(resnet, name)
    assert not any("swin" in key for key in foreign)
    assert detect_format(foreign) == name
    assert_same(to_native(foreign), resnet)


@pytest.mark.parametrize("name", ["hf", "detectron2"])
def test_every_missing_key_of_a_resnet_is_named(resnet, name):
    backbone = [key for key in resnet if key.startswith("backbone.")]
    assert {key for key in whole_model_keys(resnet) if key.startswith("backbone.")} == set(backbone)
    names = import_state_dict(from_native(resnet, name), name).pairs
    for key in (backbone[0], backbone[1], backbone[-2], *(key for key in backbone if "layer2.0.downsample" in key)):
        if not key.endswith("num_batches_tracked"):
            (lost,) = names[key]
            foreign = {other: tensor for other, tensor in from_native(resnet, name).items() if other != lost}
            with pytest.raises(ConversionError, match=re.escape(lost)):
                to_native(foreign)


def test_batch_norms_that_were_frozen_have_no_counts(resnet):
    frozen = {key: t for key, t in from_native(resnet, "detectron2").items() if not key.endswith("batches_tracked")}
    counts = {key: torch.tensor(0) for key in resnet if key.endswith("batches_tracked")}
    assert_same(to_native(frozen), resnet | counts)


def test_names_of_the_original_resnet(resnet):
    foreign = from_native(resnet, "detectron2")
    for theirs, ours in {
        "backbone.stem.conv1.weight": "conv1.weight",
        "backbone.stem.conv1.norm.running_var": "bn1.running_var",
        "backbone.res2.1.conv2.norm.bias": "layer1.1.bn2.bias",
        "backbone.res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "backbone.res5.0.shortcut.norm.running_mean": "layer4.0.downsample.1.running_mean",
    }.items():
        assert torch.equal(foreign[theirs], resnet["backbone.model." + ours])


def test_a_resnet_of_timm_inside_transformers_is_read(resnet):
    encoder = "model.pixel_level_module.encoder."
    rest = {key: tensor for key, tensor in from_native(resnet).items() if not key.startswith(encoder)}
    wrapped = {
        key.replace("backbone.model.", encoder + "_backbone."): tensor
        for key, tensor in resnet.items()
        if key.startswith("backbone.")
    }
    assert_same(to_native(rest | wrapped), resnet)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_classifier_fills_the_backbone(name):
    torch.manual_seed(0)
    classifier = timm.create_model(name).state_dict()
    extractor = timm.create_model(name, features_only=True).state_dict()
    assert detect_format(classifier) == "timm_resnet"
    native = to_native(classifier)
    assert_same(native, {f"backbone.model.{key}": classifier[key] for key in extractor})
    original = from_native(native, "detectron2_resnet") | {"stem.fc.weight": torch.zeros(10, 4)}
    assert detect_format(original) == "detectron2_resnet"
    assert_same(to_native(original), native)


def test_other_models_of_timm_have_no_names_elsewhere(original):
    rest = {key: tensor for key, tensor in to_native(original).items() if not key.startswith("backbone.")}
    other = {f"backbone.model.{key}": tensor for key, tensor in timm.create_model("resnet26d").state_dict().items()}
    assert_same(from_native(rest | other, "native"), rest | other)
    with pytest.raises(ConversionError, match=r"hf has no counterpart for backbone\.model\.conv1\.0\.weight"):
        from_native(rest | other)


# ---- strictness ----


def test_input_projections_of_unequal_widths(original):
    names = [f"transformer_decoder.input_projections.{level}.{p}" for level in range(3) for p in ("weight", "bias")]
    native = to_native(original) | {name: torch.randn(4, 2) for name in names}
    assert "model.transformer_module.input_projections.2.bias" in from_native(native)
    assert "sem_seg_head.predictor.input_proj.2.bias" in from_native(native, "detectron2")
    assert_same(to_native(from_native(native)), native)


def test_extra_foreign_key_is_named(hf_old):
    with pytest.raises(ConversionError, match=r"no rule for model\.surprise"):
        to_native(hf_old | {"model.surprise": torch.zeros(1)})


def test_many_unknown_keys_are_counted(hf_old):
    extra = {f"model.surprise.{at}": torch.zeros(1) for at in range(9)}
    with pytest.raises(ConversionError, match=r"surprise\.0, model\.surprise\.1, model\.surprise\.2 and 6 more"):
        to_native(hf_old | extra)


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_missing_part_of_a_cut_tensor_is_named(hf_old, part):
    name = f"{BLOCK}attention.self.{part}.bias"
    with pytest.raises(ConversionError, match=name.replace(".", r"\.")):
        to_native({key: tensor for key, tensor in hf_old.items() if key != name})


@pytest.mark.parametrize("odd", [torch.zeros(32), torch.zeros(64, dtype=torch.float16), torch.zeros(())])
def test_parts_that_do_not_fit_are_an_error(hf_old, odd):
    with pytest.raises(ConversionError, match=r"must agree in shape and dtype to form backbone\.stages\.2"):
        to_native(hf_old | {BLOCK + "attention.self.query.bias": odd})


@pytest.mark.parametrize("odd", [torch.zeros(7), torch.zeros(())])
def test_tensor_that_cannot_be_cut_is_an_error(original, odd):
    with pytest.raises(ConversionError, match="cannot be cut into 3 equal parts"):
        from_native(to_native(original) | {"transformer_decoder.layers.0.self_attn.in_proj_bias": odd})


@pytest.mark.parametrize("key", ["backbone.model.stem.weight", "transformer_decoder.extra.weight"])
def test_native_key_without_counterpart_is_named(original, key):
    with pytest.raises(ConversionError, match=f"hf has no counterpart for {key}"):
        from_native(to_native(original) | {key: torch.zeros(1)})


OWN = ("adapter.weight", "layers.0.weight", "layer1.weight", "pixel_decoder.layers.0x0.weight", "res2.0.conv1.weight")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_parts_of_a_models_own_stay_in_the_native_format(original, prefix):
    """Whoever loads them checks them against the model that is built, which knows its own."""
    native = to_native(original) | {key: torch.ones(2) for key in OWN}
    assert_same(to_native({prefix + key: tensor for key, tensor in native.items()}), native)
    assert_same(from_native(native, "native"), native)
    for key in OWN:
        with pytest.raises(ConversionError, match=f"hf has no counterpart for {key}"):
            from_native(to_native(original) | {key: torch.ones(2)})
    assert_same(to_native({"backbone.model.stem.weight": torch.ones(2)}), {"backbone.model.stem.weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, r"no known format .*keys like \(none\)"),
        ({"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}, r"native, hf, detectron2.*conv1\.weight, fc\.bias"),
        ({"pixel_decoder.level_embed": torch.ones(1), "class_predictor.bias": torch.ones(1)}, "several formats"),
        ({"class_predictor.bias": 3}, "class_predictor.bias is a int, not a tensor"),
    ],
)
def test_what_is_no_state_dict_is_an_error(state_dict, message):
    with pytest.raises(ConversionError, match=message):
        to_native(state_dict)


def test_unknown_format_is_an_error(original):
    with pytest.raises(ConversionError, match="unknown format 'onnx'; known: native, hf"):
        from_native(to_native(original), "onnx")
    with pytest.raises(ConversionError, match="empty"):
        from_native({})


def test_results_share_no_memory(original):
    """Not with each other, so that safetensors takes them, and not with the source."""
    native = to_native(original)
    transposed = native | {"pixel_decoder.level_embed": torch.randn(64, 3).T}
    for result in (native, from_native(native), from_native(transposed), to_native(transposed)):
        assert all(tensor.is_contiguous() for tensor in result.values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in result.values()}) == len(result)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in result.values())
        assert save(result)
    before = original["backbone.norm0.weight"].clone()
    native["backbone.out_norms.0.weight"].zero_()
    assert torch.equal(original["backbone.norm0.weight"], before)

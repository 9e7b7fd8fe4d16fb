"""Saving tells what a checkpoint cannot hold; what was exchanged in a model never loads as the plain one."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2f_video import VideoMask2Former
from m2f_video.acceleration import accelerated
from m2f_video.checked_config import ConfigError
from m2f_video.modeling.as_built import changes
from m2f_video.modeling.cross_attention import CrossAttention
from m2f_video.parity import random_model
from tests.acceleration.conftest import IN_LANES, clip
from tests.modeling.test_parts import MyLayer
from tests.tolerances import relative_error

LAYER = "transformer_decoder.layers.1"
ACTIVATION = "backbone.stages.0.blocks.0.mlp"


def saved(model: VideoMask2Former, folder: Path) -> None:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(folder)


def hook(*_: object) -> None: ...


TOUCHES: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(hook),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(hook),
    "backward hook": lambda module: module.register_full_backward_hook(hook),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(hook),
    "state-dict hook": lambda module: module.register_state_dict_post_hook(hook),
    "state-dict pre-hook": lambda module: module.register_state_dict_pre_hook(hook),
    "load-state-dict pre-hook": lambda module: module.register_load_state_dict_pre_hook(hook),
    "load-state-dict post-hook": lambda module: module.register_load_state_dict_post_hook(hook),
    "patched forward": lambda module: setattr(module, "forward", module.forward),
    "patched extra_repr": lambda module: setattr(module, "extra_repr", module.extra_repr),
}


@pytest.mark.parametrize("what", TOUCHES)
def test_what_cannot_be_saved_is_said(what: str, tmp_path: Path) -> None:
    model = random_model(IN_LANES, 0)
    TOUCHES[what](model.get_submodule(LAYER))
    expected = f"{LAYER} has a {what}. Weights are saved; hooks, patches and settings cannot be"
    with pytest.warns(UserWarning, match=expected.replace(".", r"\.")):
        model.save_pretrained(tmp_path)
    saved(VideoMask2Former.from_pretrained(tmp_path), tmp_path)  # that has none


def other_heads(model: VideoMask2Former) -> None:
    attention = model.get_submodule(LAYER).cross_attn
    model.get_submodule(LAYER).cross_attn = other = CrossAttention(dim=attention.out_proj.in_features, num_heads=2)
    other.load_state_dict(attention.state_dict())


SETTINGS: dict[str, Callable[[VideoMask2Former], Any]] = {
    r"\.cross_attn\.num_heads is 2, and was 4": other_heads,
    r"\.dropout\.p is 0\.5, and was 0\.0": lambda model: setattr(model.get_submodule(LAYER).dropout, "p", 0.5),
    r"\.ffn_norm\.eps is 0\.5, and was 1e-05": lambda model: setattr(model.get_submodule(LAYER).ffn_norm, "eps", 0.5),
}


@pytest.mark.parametrize("said", SETTINGS)
def test_settings_of_the_same_weights_are_said(said: str, tmp_path: Path) -> None:
    model = random_model(IN_LANES, 0)
    SETTINGS[said](model)
    with pytest.warns(UserWarning, match=LAYER.replace(".", r"\.") + said):
        model.save_pretrained(tmp_path)


def test_taps_are_no_hooks_that_a_checkpoint_lacks(tmp_path: Path) -> None:
    model = random_model(IN_LANES, 0)
    with model.capture("backbone", "*.cross_attn.attention_weights", "*.sampling_locations", "*.mask_logits"):
        saved(model, tmp_path)
        copied = copy.deepcopy(model)
        model.backbone.register_forward_hook(hook)
        assert str(changes(model)) == "backbone has a forward hook"
    saved(copied, tmp_path)


def test_removed_hooks_are_none(tmp_path: Path) -> None:
    model = random_model(IN_LANES, 0)
    model.register_forward_hook(hook).remove()
    saved(model, tmp_path)


@pytest.mark.parametrize("compile", ["auto", "none"])
def test_prepared_accelerated_and_copied_models_are_as_built(compile: Any, tmp_path: Path) -> None:
    model = random_model(IN_LANES, 0)
    saved(copy.deepcopy(model), tmp_path)
    with accelerated(model) as fast:
        saved(fast, tmp_path)
    saved(model.prepare_for_inference(compile=compile), tmp_path)
    saved(copy.deepcopy(model), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == IN_LANES.to_dict()


class Hooked(CrossAttention):
    """Hooked and patched by itself, and so whenever it is built."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.register_forward_hook(hook)
        self.extra_repr = str


def test_what_a_module_does_to_itself_is_its_own(tmp_path: Path) -> None:
    model = VideoMask2Former(IN_LANES, parts={"cross_attention": Hooked})
    saved(model, tmp_path)
    attention = model.transformer_decoder.layers[1].cross_attn
    attention.register_forward_hook(hook)
    assert str(changes(model)) == f"{LAYER}.cross_attn has a forward hook"


class Doubled(nn.Module):
    """Of which the weights are those of what it takes the place of."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.__dict__["_parameters"] = plain._parameters
        self.__dict__["_modules"] = plain._modules
        self.__dict__["plain"] = plain

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.__dict__["plain"](x)


def predict(model: VideoMask2Former) -> Tensor:
    with torch.no_grad():
        return model.eval()(clip()).class_queries_logits


def test_an_exchanged_module_is_recorded_and_never_loaded_as_the_plain_one(tmp_path: Path) -> None:
    model = random_model(IN_LANES, 0)
    plain = predict(model)
    model.set_submodule(ACTIVATION, Doubled(model.get_submodule(ACTIVATION)))
    expected = predict(model)
    assert relative_error(expected, plain) > 1e-3
    with pytest.warns(UserWarning, match=rf"{ACTIVATION} is a {__name__}\.Doubled of its own"):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["parts"] == {ACTIVATION: f"{__name__}.Doubled"}
    message = rf"{ACTIVATION} of its own \({__name__}\.Doubled\); give parts={{'{ACTIVATION}': \.\.\.}}"
    with pytest.raises(ConfigError, match=message):
        VideoMask2Former.from_pretrained(tmp_path)
    again = VideoMask2Former.from_pretrained(tmp_path, parts={ACTIVATION: Doubled})
    assert torch.equal(predict(again), expected)
    saved(again, tmp_path / "again")
    assert relative_error(predict(again.prepare_for_inference()), expected) < 1e-4


def test_what_is_new_or_gone_is_said(tmp_path: Path) -> None:
    model = random_model(IN_LANES, 0)
    model.more = nn.Identity()
    model.get_submodule(LAYER).dropout = None
    with pytest.warns(UserWarning, match=rf"more is a .*Identity of its own; {LAYER}\.dropout is gone"):
        model.save_pretrained(tmp_path)


def test_single_modules_are_parts_too() -> None:
    def layer(plain: nn.Module) -> nn.Module:
        mine = MyLayer(dim=IN_LANES.transformer_decoder.hidden_dim, num_heads=4, ffn_dim=plain.linear1.out_features)
        mine.load_state_dict(plain.state_dict())
        return mine

    model = VideoMask2Former(IN_LANES, parts={LAYER: layer})
    assert [type(each) is MyLayer for each in model.transformer_decoder.layers][:3] == [False, True, False]
    assert str(changes(model)) == ""
    assert list(model.config.parts) == [LAYER]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"transformer_decoder.layers.99": MyLayer}, r"parts has 'transformer_decoder\.layers\.99', and the model no"),
        ({LAYER: lambda plain: 3}, f"parts\\['{LAYER}'\\] must make a module of the one that is there, got 3"),
        ({"heads.0": MyLayer}, r"parts has 'heads\.0'; .*, or a module by its name"),
    ],
)
def test_bad_names_are_refused(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoMask2Former(IN_LANES, parts=parts)

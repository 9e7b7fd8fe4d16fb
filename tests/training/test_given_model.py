"""A run trains, averages, evaluates, resumes and saves the very model it is given, or says why it does not."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from m2f_video import VideoMask2Former
from m2f_video.checked_config import ConfigError
from m2f_video.config import PreprocessingConfig, VideoMask2FormerConfig
from m2f_video.modeling.as_built import changes
from m2f_video.modeling.cross_attention import CrossAttention, Level
from m2f_video.training import OptimConfig, Trainer
from m2f_video.training.checkpoint import load_latest_checkpoint
from m2f_video.training.given_model import holding, recompute_activations
from tests.tolerances import differences
from tests.training.tiny_run import (
    CONFIG,
    MODEL,
    VIDEOS,
    KeptVideos,
    assert_same_end,
    final_weights,
    rows,
    train,
    train_until,
)

EVALUATED = CONFIG.replace(steps=2)
HELD_OUT = KeptVideos(1, num_frames=2, height=32, width=64)
ATTENTION = "transformer_decoder.layers.1.cross_attn"


class Half(CrossAttention):
    def forward(self, query: Tensor, level: Level, mask_logits: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(query, level, mask_logits)


def plain() -> VideoMask2Former:
    torch.manual_seed(CONFIG.seed)
    return VideoMask2Former(MODEL)


def hooked(model: VideoMask2Former) -> VideoMask2Former:
    for layer in model.transformer_decoder.layers:
        layer.cross_attn.register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    return model


def patched(model: VideoMask2Former) -> VideoMask2Former:
    for layer in model.transformer_decoder.layers:
        attention = layer.cross_attn
        attention.forward = lambda *inputs, own=attention.forward: 0.5 * own(*inputs)
    return model


def exchanged(model: VideoMask2Former) -> VideoMask2Former:
    for layer in model.transformer_decoder.layers:
        half = Half(dim=32, num_heads=4)
        half.load_state_dict(layer.cross_attn.state_dict())
        layer.cross_attn = half
    return model


def quietly(change: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the model is not what its config builds")
        return change(*arguments, **options)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same model with the attention's class as a part, which is built and averaged with the rest."""
    output = tmp_path_factory.mktemp("halved")
    train(output, EVALUATED, validation=HELD_OUT, parts={"cross_attention": Half})
    return output


@pytest.mark.parametrize("change", [hooked, patched, exchanged])
def test_a_given_model_is_trained_averaged_evaluated_and_saved(
    change: Callable[..., VideoMask2Former], halved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = change(plain())
    with pytest.warns(UserWarning, match=r"the model is not what its config builds: transformer_decoder\.layers\.0"):
        trainer = train(tmp_path, EVALUATED, validation=HELD_OUT, model=model)
    assert trainer.model is model
    assert "the model given is not what its config builds: transformer_decoder.layers.0" in capsys.readouterr().out
    assert final_weights(tmp_path) == final_weights(halved)
    assert rows(tmp_path) == rows(halved)
    assert rows(tmp_path, "evaluation.csv") == rows(halved, "evaluation.csv")
    assert differences(model.state_dict(), trainer.average or {}) == {}


@pytest.mark.parametrize("change", [hooked, patched])
def test_hooks_and_patches_reach_the_average_whenever_they_are_set(
    change: Callable[..., VideoMask2Former], halved: Path, tmp_path: Path
) -> None:
    trainer = Trainer(EVALUATED, VIDEOS, tmp_path, validation=HELD_OUT)
    change(trainer.model)
    quietly(trainer.train)
    assert final_weights(tmp_path) == final_weights(halved)
    assert rows(tmp_path, "evaluation.csv") == rows(halved, "evaluation.csv")


@pytest.mark.parametrize("change", [hooked, exchanged])
def test_a_run_goes_on_with_the_model_it_is_given(
    change: Callable[..., VideoMask2Former], halved: Path, tmp_path: Path
) -> None:
    train_until(1, tmp_path, EVALUATED, validation=HELD_OUT, model=change(plain()))
    if change is exchanged:  # whose names are recorded: a plain model is another
        with pytest.raises(ValueError, match=r"has another model\.parts\.transformer_decoder\.layers\.0\.cross_attn"):
            train(tmp_path, EVALUATED, validation=HELD_OUT, resume=True, model=plain())
    other = change(VideoMask2Former(MODEL))  # whose weights are those of the checkpoint then
    quietly(train, tmp_path, EVALUATED, validation=HELD_OUT, resume=True, model=other)
    assert_same_end(tmp_path, halved)


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.softplus(weight)


def test_parametrisations_and_buffers_are_part_of_it(tmp_path: Path) -> None:
    def make() -> VideoMask2Former:
        model = plain()
        attention = model.get_submodule(ATTENTION)
        parametrize.register_parametrization(model.transformer_decoder.class_head, "weight", Positive())
        attention.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        attention.register_forward_pre_hook(count)
        return model

    def count(module: nn.Module, _: object) -> None:
        if module.training:
            module.get_buffer("calls").add_(1)

    model = make()
    trainer = quietly(train, tmp_path / "whole", EVALUATED, validation=HELD_OUT, model=model)
    assert int(model.get_submodule(ATTENTION).calls) == 2
    key = "transformer_decoder.class_head.parametrizations.weight.original"
    assert key in trainer.average
    assert differences(model.state_dict(), trainer.average) == {}
    train_until(1, tmp_path / "stopped", EVALUATED, validation=HELD_OUT, model=make())
    quietly(train, tmp_path / "stopped", EVALUATED, validation=HELD_OUT, resume=True, model=make())
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"parts\.transformer_decoder\.class_head"):
        train(tmp_path / "stopped", EVALUATED, validation=HELD_OUT, resume=True, model=plain())


class Named(VideoMask2Former):
    """A subclass of one's own, with a module that the config knows nothing of."""

    def __init__(self, config: VideoMask2FormerConfig) -> None:
        super().__init__(config)
        self.backbone.patch_embed.norm = nn.Identity()


def test_a_subclass_is_saved_as_what_it_is(tmp_path: Path) -> None:
    trainer = quietly(train, tmp_path, EVALUATED, model=Named(MODEL))
    again = Named.from_pretrained(tmp_path / "final")
    assert type(trainer.model) is type(again) is Named
    assert isinstance(again.backbone.patch_embed.norm, nn.Identity)
    with pytest.warns(UserWarning, match=r"the model is a .*\.Named, whose own from_pretrained loads it"):
        again.save_pretrained(tmp_path / "again")


def test_weights_that_need_no_gradient_stay(tmp_path: Path) -> None:
    model = plain()
    model.backbone.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.backbone.named_parameters()}
    trainer = train(tmp_path, model=model)
    assert differences(dict(model.backbone.named_parameters()), before) == {}
    assert len([weight for group in trainer.optimizer.param_groups for weight in group["params"]]) == len(
        [weight for weight in model.parameters() if weight.requires_grad]
    )


def test_the_model_is_as_it_was_after_it_held_other_weights() -> None:
    model = plain().train()
    model.backbone.eval()
    before, modes = model.state_dict(), [module.training for module in model.modules()]
    kept = {name: weight.clone() for name, weight in before.items()}
    others = {name: torch.zeros_like(weight) for name, weight in before.items()}

    def interrupted() -> None:
        with holding(model, others):
            assert differences(model.state_dict(), others) == {}
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert differences(model.state_dict(), kept) == {}
    assert [module.training for module in model.modules()] == modes


def test_recomputing_leaves_patches_as_they_were(tmp_path: Path) -> None:
    model = plain()
    layer = model.transformer_decoder.layers[0]
    own = layer.forward = lambda *inputs: type(layer).forward(layer, *inputs)
    with recompute_activations(model, True):
        assert layer.forward is not own
    assert layer.forward is own
    assert str(changes(model)) == "transformer_decoder.layers.0 has a patched forward"
    train(tmp_path, CONFIG.replace(activation_checkpointing=True))  # of which saving says nothing


# What is refused


def of_other_labels() -> VideoMask2Former:
    return VideoMask2Former(MODEL.replace(labels=tuple(reversed(MODEL.labels))))


def of_one_label() -> VideoMask2Former:
    return VideoMask2Former(MODEL.replace(labels=("cat",)))


def frozen() -> VideoMask2Former:
    return plain().requires_grad_(False)


def halves_itself() -> VideoMask2Former:
    model = plain()
    model.transformer_decoder.norm.register_state_dict_post_hook(
        lambda _module, state, prefix, _: state.update({f"{prefix}weight": state[f"{prefix}weight"] / 2})
    )
    return model


class Keeps(nn.Identity):
    def get_extra_state(self) -> object:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None: ...


def keeps_more() -> VideoMask2Former:
    model = plain()
    model.backbone.extra = Keeps()
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "model must be a VideoMask2Former, got Linear"),
        (plain, {"init": "demo"}, ValueError, "give model or what it is made from, not both"),
        (plain, {"init_backbone": "timm"}, ValueError, "give model or what it is made from, not both"),
        (plain, {"parts": {"cross_attention": Half}}, ValueError, "give model or what it is made from, not both"),
        (of_other_labels, {}, ConfigError, "'bar' where they have 'disc'; build it with"),
        (of_one_label, {}, ConfigError, "labels of the model given are not"),
        (
            lambda: VideoMask2Former(MODEL.replace(temporal="per_frame")),
            {"config": CONFIG.replace(model=VideoMask2FormerConfig())},
            ConfigError,
            "must be 'joint'",
        ),
        (
            lambda: VideoMask2Former(MODEL.replace(preprocessing=PreprocessingConfig())),
            {},
            ConfigError,
            r"shortest_edge 480, the training config 32; give config\.replace\(model=model\.config\)",
        ),
        (frozen, {}, ValueError, "no weight of the model given learns, as after prepare_for_inference"),
        (lambda: plain().to(torch.bfloat16), {}, ValueError, r"is torch\.bfloat16; train model\.float\(\)"),
        (lambda: plain().to("meta"), {}, ValueError, "is on the meta device and holds no numbers"),
        (halves_itself, {}, ValueError, r"transformer_decoder\.norm\.weight is another once"),
        (keeps_more, {}, ValueError, r"backbone\.extra keeps a dict in the state dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(
    make: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(tmp_path / "run", model=make(), **options)
    assert not (tmp_path / "run").exists()


def test_a_default_config_takes_that_of_the_model(tmp_path: Path) -> None:
    trainer = Trainer(CONFIG.replace(model=VideoMask2FormerConfig()), VIDEOS, tmp_path, model=plain())
    trainer.close()
    assert trainer.config == CONFIG


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (exchanged, r"parts\.transformer_decoder|transformer_decoder\.layers\.0\.cross_attn"),
        (
            lambda model: parametrize.register_parametrization(model.transformer_decoder.norm, "bias", Positive()),
            r"transformer_decoder\.norm",
        ),
        (lambda model: setattr(model.backbone, "more", nn.Linear(2, 2)), r"backbone\.more"),
    ],
)
def test_a_model_that_was_changed_since_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    trainer = Trainer(CONFIG.replace(optim=OptimConfig()), VIDEOS, tmp_path)
    change(trainer.model)
    with pytest.raises(ValueError, match=rf"another than when the Trainer was made \(.*({named})"):
        trainer.train()
    assert not (tmp_path / "final").exists()


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    def tagged() -> VideoMask2Former:
        model = plain()
        model.transformer_decoder.register_buffer("tag", torch.zeros(2))
        return model

    train_until(1, tmp_path, model=tagged())
    assert (load_latest_checkpoint(tmp_path) or {})["step"] == 1
    with pytest.raises(ValueError, match=r"of another model than the one given: unexpected transformer_decoder\.tag"):
        train(tmp_path, resume=True, model=plain())

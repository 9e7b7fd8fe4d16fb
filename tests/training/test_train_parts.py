"""Runs of models with modules of one's own train, average, go on and save exactly these."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2f_video import VideoMask2Former
from m2f_video.checked_config import ConfigError
from m2f_video.training import HungarianMatcher, LossConfig, LossOutput, Match, Trainer, VideoMask2FormerLoss
from m2f_video.training.losses import build_loss
from m2f_video.training.point_sampling import RandomSource
from tests.modeling.test_parts import MyAttention
from tests.tolerances import differences
from tests.training.test_losses import K, make_output, make_target
from tests.training.tiny_run import CONFIG, EXACT, MODEL, VIDEOS, column, final_weights, train, train_until

PARTS = {"cross_attention": MyAttention}
TEMPERATURE = "transformer_decoder.layers.0.cross_attn.temperature"


def test_a_part_of_ones_own_is_trained_averaged_and_saved(tmp_path: Path) -> None:
    trainer = train(tmp_path, parts=PARTS)
    assert trainer.model.get_parameter(TEMPERATURE) != 1.5
    assert trainer.average is not None
    with pytest.raises(ConfigError, match=r"cross_attention of its own .*MyAttention"):
        VideoMask2Former.from_pretrained(tmp_path / "final")
    final = VideoMask2Former.from_pretrained(tmp_path / "final", parts=PARTS)
    assert type(final.transformer_decoder.layers[0].cross_attn) is MyAttention
    assert differences(final.state_dict(), trainer.average) == {}


def test_a_run_goes_on_with_its_parts_alone(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", parts=PARTS)
    train_until(1, tmp_path / "stopped", parts=PARTS)
    with pytest.raises(ValueError, match=r"model\.parts"):
        train(tmp_path / "stopped", resume=True)
    resumed = train(tmp_path / "stopped", resume=True, parts=PARTS)
    assert torch.equal(resumed.model.get_parameter(TEMPERATURE), whole.model.get_parameter(TEMPERATURE))
    assert differences(resumed.model.state_dict(), whole.model.state_dict()) == {}


def test_a_config_that_records_a_part_needs_it(tmp_path: Path) -> None:
    recorded = CONFIG.replace(model=CONFIG.model.replace(parts={"cross_attention": "mine.Attention"}))
    with pytest.raises(ConfigError, match=r"cross_attention of its own \(mine\.Attention\)"):
        train(tmp_path / "run", recorded)
    assert not (tmp_path / "run").exists()


# Loss and matcher


class HalfLoss(VideoMask2FormerLoss):
    def __call__(self, *arguments: Any) -> LossOutput:
        result = super().__call__(*arguments)
        parts = {name: loss / 2 for name, loss in result.parts.items() if name != "loss_dice"}
        return LossOutput(sum(parts.values(), torch.zeros(())), parts, result.matches)


class TwoQueries(HungarianMatcher):
    """As in the guide, `m2f_video/modeling/README.md`."""

    def __call__(
        self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, random: RandomSource = None
    ) -> Match:
        cost = self.cost(class_logits, mask_logits, labels, masks, random)
        best = {int(query): target for target in range(len(labels)) for query in cost[:, target].argsort()[:2]}
        pairs = torch.tensor(sorted(best.items()), dtype=torch.int64, device=cost.device).reshape(-1, 2)
        return Match(pairs[:, 0], pairs[:, 1])


OWN = {"loss": HalfLoss, "matcher": TwoQueries}


def test_loss_and_matcher_of_ones_own_train_and_a_trained_model_does_without(tmp_path: Path) -> None:
    trainer = train(tmp_path / "own", EXACT, parts=OWN)
    assert type(trainer.loss) is HalfLoss
    assert type(trainer.loss.matcher) is TwoQueries
    train(tmp_path / "plain", EXACT)
    train(tmp_path / "matcher", EXACT, parts={"matcher": TwoQueries})
    assert len({final_weights(tmp_path / name) for name in ("own", "plain", "matcher")}) == 3
    assert column(tmp_path / "own", "loss_mask") != column(tmp_path / "plain", "loss_mask")
    assert all(value != value for value in column(tmp_path / "own", "loss_dice"))  # which this loss does not have
    loaded = VideoMask2Former.from_pretrained(tmp_path / "own" / "final")
    called = {name: f"{__name__}.{kind.__qualname__}" for name, kind in OWN.items()}
    assert loaded.config.parts == called
    loaded.save_pretrained(tmp_path / "again")
    assert VideoMask2Former.from_pretrained(tmp_path / "again").config.parts == called
    train(tmp_path / "on", EXACT, init=str(tmp_path / "own" / "final"))  # with our loss: the weights know of none


def test_a_run_goes_on_with_its_loss_and_matcher_alone(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", parts=OWN)
    train_until(1, tmp_path / "stopped", parts=OWN)
    for parts, missing in (({}, "loss"), ({"loss": HalfLoss}, "matcher")):
        with pytest.raises(ValueError, match=rf"model\.parts\.{missing}"):
            train(tmp_path / "stopped", resume=True, parts=parts)
    resumed = train(tmp_path / "stopped", resume=True, parts=OWN)
    assert differences(resumed.model.state_dict(), whole.model.state_dict()) == {}
    loaded = VideoMask2Former.from_pretrained(tmp_path / "whole" / "final")
    for options in ({"model": loaded}, {"config": CONFIG.replace(model=loaded.config)}):
        with pytest.raises(ConfigError, match=r"loss of its own \(.*HalfLoss\), matcher .*give parts={'loss'"):
            train(tmp_path / "other", **options)


def test_a_model_brings_its_loss_and_matcher_along(tmp_path: Path) -> None:
    made = Trainer(CONFIG, VIDEOS, tmp_path, model=VideoMask2Former(MODEL, parts=OWN))
    assert type(made.loss) is HalfLoss
    assert type(made.loss.matcher) is TwoQueries
    assert set(made.config.model.parts) == {"loss", "matcher"}
    made.close()


def test_a_loss_that_gives_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a loss must give a m2f_video\.training\.LossOutput, got Tensor"):
        train(tmp_path, parts={"loss": lambda **_: lambda *_: torch.zeros(())})


class WithWeights(nn.Module):
    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"loss": lambda **_: 3}, "must make a function"),
        ({"loss": WithWeights}, "has parameters, which are not"),
        ({"loss": VideoMask2FormerLoss(LossConfig(), K)}, "makes a loss from config, num_labels, matcher: missing"),
        ({"matcher": lambda cost: cost}, "makes a matcher from class_weight, .*, num_points: missing"),
    ],
)
def test_what_is_no_loss_or_matcher_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loss(LossConfig(), K, parts)


def match(queries: list[Any], targets: list[int]) -> Match:
    return Match(torch.tensor(queries), torch.tensor(targets))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0], [0]), "must give a m2f_video.training.Match, got tuple"),
        (match([0, 0], [0, 1]), "each query at most once"),
        (match([1, 0], [0, 1]), "ascending order"),
        (match([0, 1], [0]), "with a target for each"),
        (match([5], [0]), r"queries must be 0 to 4, got \[5\]"),
        (match([0], [2]), r"targets must be 0 to 1, got \[2\]"),
        (match([0.5], [0]), "queries must be an int64 tensor"),
    ],
)
def test_what_is_no_match_is_named(given: Any, message: str) -> None:
    loss = VideoMask2FormerLoss(LossConfig(num_points=8), K, matcher=lambda **_: lambda *_: given)
    with pytest.raises(ValueError, match=message):
        loss(make_output(clips=1), [make_target(2)])

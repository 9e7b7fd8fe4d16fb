"""Runs of models with modules of one's own train, average, go on and save exactly these."""

from pathlib import Path

import pytest
import torch

from m2f_video import VideoMask2Former
from m2f_video.checked_config import ConfigError
from tests.modeling.test_parts import MyAttention
from tests.tolerances import differences
from tests.training.tiny_run import CONFIG, train, train_until

PARTS = {"cross_attention": MyAttention}
TEMPERATURE = "transformer_decoder.layers.0.cross_attn.temperature"


def test_a_part_of_ones_own_is_trained_averaged_and_saved(tmp_path: Path) -> None:
    trainer = train(tmp_path, parts=PARTS)
    assert trainer.model.get_parameter(TEMPERATURE) != 1.5
    assert trainer.average is not None
    assert type(trainer.average.transformer_decoder.layers[0].cross_attn) is MyAttention
    with pytest.raises(ConfigError, match=r"cross_attention of its own .*MyAttention"):
        VideoMask2Former.from_pretrained(tmp_path / "final")
    final = VideoMask2Former.from_pretrained(tmp_path / "final", parts=PARTS)
    assert differences(final.state_dict(), trainer.average.state_dict()) == {}


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

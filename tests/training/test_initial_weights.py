"""What a run begins with."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f_video import VideoMask2Former
from m2f_video.config import ConfigError
from m2f_video.modeling.cross_attention import CrossAttention
from m2f_video.training import Trainer
from tests.training.tiny_run import (
    CONFIG,
    MODEL,
    VIDEOS,
    copy_stopped_run,
    final_weights,
    largest_difference,
    train,
    train_until,
)
from weights_convert import ConversionError


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for three other classes, and one for the videos' own."""
    folder = tmp_path_factory.mktemp("init")
    torch.manual_seed(5)
    VideoMask2Former(MODEL.replace(labels=("cat", "dog", "cow"))).save_pretrained(folder / "other")
    VideoMask2Former(MODEL).save_pretrained(folder / "same")
    for name in ("other", "same"):
        (folder / f"{name}.safetensors").write_bytes((folder / name / "model.safetensors").read_bytes())
    return folder


HEAD = {"transformer_decoder.class_head.weight", "transformer_decoder.class_head.bias"}


@pytest.mark.parametrize(
    ("source", "left_out"), [("same", set()), ("same.safetensors", set()), ("other", HEAD), ("other.safetensors", HEAD)]
)
def test_weights_to_begin_with(source: str, left_out: set[str], other: Path, tmp_path: Path) -> None:
    made = Trainer(CONFIG, VIDEOS, tmp_path / "made", init=str(other / source))
    anew = Trainer(CONFIG, VIDEOS, tmp_path / "anew").model.state_dict()
    given = load_file(other / source.removesuffix(".safetensors") / "model.safetensors")
    for name, weight in made.model.state_dict().items():
        assert torch.equal(weight, anew[name] if name in left_out else given[name])
    assert made.average is not None
    assert largest_difference(made.average, made.model.state_dict()) == 0


def test_weights_that_do_not_fit(tmp_path: Path, other: Path) -> None:
    larger = MODEL.replace(transformer_decoder=replace(MODEL.transformer_decoder, num_queries=6))
    with pytest.raises(ConversionError, match="query_features"):
        Trainer(CONFIG.replace(model=larger), VIDEOS, tmp_path / "made", init=str(other / "same.safetensors"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        Trainer(CONFIG, VIDEOS, tmp_path / "made", init=str(tmp_path / "nothing"))
    weights = load_file(other / "same.safetensors")
    del weights["transformer_decoder.norm.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ConversionError, match=r"missing transformer_decoder\.norm\.weight"):
        Trainer(CONFIG, VIDEOS, tmp_path / "made", init=str(tmp_path / "part.safetensors"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("transformer_decoder.num_heads", {"transformer_decoder": replace(MODEL.transformer_decoder, num_heads=2)}),
        ("pixel_decoder.num_", {"pixel_decoder": replace(MODEL.pixel_decoder, num_heads=2, num_points=4)}),
        ("transformer_decoder.num_queries", {"transformer_decoder": replace(MODEL.transformer_decoder, num_queries=6)}),
    ],
)
def test_weights_that_would_compute_something_else(
    name: str, changes: dict[str, Any], tmp_path: Path, other: Path
) -> None:
    config = CONFIG.replace(model=MODEL.replace(**changes))
    with pytest.raises(ConfigError, match=rf"would compute something else .*: {name}.* \(its own: "):
        Trainer(config, VIDEOS, tmp_path / "made", init=str(other / "same"))
    assert not (tmp_path / "made").exists()


def test_weights_of_an_image_model_begin_a_video_model_with_a_word(tmp_path: Path) -> None:
    preprocessing = replace(MODEL.preprocessing, shortest_edge=48)
    VideoMask2Former(MODEL.replace(temporal="per_frame", preprocessing=preprocessing)).save_pretrained(
        tmp_path / "coco"
    )
    with pytest.warns(UserWarning, match=r"trained for other frames: temporal is 'joint'.*preprocessing.shortest_edge"):
        Trainer(CONFIG, VIDEOS, tmp_path / "made", init=str(tmp_path / "coco")).close()
    weights = load_file(tmp_path / "coco/model.safetensors")
    del weights["transformer_decoder.norm.weight"]
    save_file(weights, tmp_path / "coco/model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of weights that are not loaded
        with pytest.raises(ConversionError, match=r"missing transformer_decoder\.norm\.weight"):
            Trainer(CONFIG, VIDEOS, tmp_path / "again", init=str(tmp_path / "coco"))


def test_a_run_killed_before_its_first_checkpoint_keeps_what_it_began_with(other: Path, tmp_path: Path) -> None:
    config = CONFIG.replace(checkpoint_every=4)
    train(tmp_path / "whole", config, init=str(other / "same"))
    train_until(0, tmp_path / "killed", config, init=str(other / "same"))
    train(tmp_path / "killed", config, resume=True)
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "whole")


def test_what_fits_of_other_weights(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = replace(MODEL.transformer_decoder, num_queries=6, cross_attention="full")
    config = CONFIG.replace(model=MODEL.replace(transformer_decoder=decoder))
    made = Trainer(config, VIDEOS, tmp_path / "made", init=str(other / "same"), init_partial=True)
    printed = capsys.readouterr().out
    assert f"weights of {other / 'same'}\n" in printed
    assert (
        "resized: transformer_decoder.query_features.weight, the first 5 of 5 queries, here 6 (and 1 more)\n" in printed
    )
    assert "something else: transformer_decoder.cross_attention 'masked' -> 'full'\n" in printed
    given = load_file(other / "same/model.safetensors")
    ours = made.model.state_dict()
    assert [name for name in ours if not torch.equal(ours[name][:5], given[name][:5])] == []
    made.close()


class Attention(CrossAttention):
    pass


class Renamed(Attention):
    pass


def test_parts_that_were_renamed_begin_a_training(tmp_path: Path) -> None:
    was = VideoMask2Former(MODEL, parts={"cross_attention": Attention})
    was.save_pretrained(tmp_path / "was")
    options: dict[str, Any] = {"init": str(tmp_path / "was"), "parts": {"cross_attention": Renamed}}
    with pytest.raises(ConfigError, match=r"parts.cross_attention is .*Renamed.* or load what fits by --init-partial"):
        Trainer(CONFIG, VIDEOS, tmp_path / "made", **options)
    made = Trainer(CONFIG, VIDEOS, tmp_path / "made", **options, init_partial=True)
    assert largest_difference(made.model.state_dict(), was.state_dict()) == 0
    made.close()


def test_nothing_is_half_loaded(other: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init_partial loads what fits of weights; give them by init or init_backbone"):
        Trainer(CONFIG, VIDEOS, tmp_path / "made", init_partial=True)
    backbone = {"backbone.patch_embed.norm.bias": torch.ones(5)}
    save_file(backbone, tmp_path / "other.safetensors")
    for option in ("init", "init_backbone"):
        with pytest.raises(ConversionError, match=r"nothing of .* fits the model"):
            Trainer(
                CONFIG,
                VIDEOS,
                tmp_path / "made",
                **{option: str(tmp_path / "other.safetensors")},  # type: ignore[arg-type]
                init_partial=True,
            )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("option", ["init", "init_backbone"])
def test_a_resumed_run_says_that_it_does_not_begin_anew(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_stopped_run(2, tmp_path)
    made = Trainer(CONFIG, VIDEOS, tmp_path, resume=True, **{option: "nowhere"})
    assert "\nnowhere is not loaded: the run goes on from its checkpoint\n" in capsys.readouterr().out
    made.close()

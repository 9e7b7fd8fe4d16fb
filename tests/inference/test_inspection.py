"""What is shown of a frame is what the model did there."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from m2f_video import VideoProcessor
from m2f_video.inference.inspection import inspect_frame
from m2f_video.modeling.build import CROSS_ATTENTIONS
from m2f_video.modeling.cross_attention import attention_mask
from m2f_video.parity import random_model
from tests.acceleration.conftest import IN_LANES
from tests.conftest import synthetic_frames

VIDEO = synthetic_frames(3, 40, 70)


def build(**decoder: Any) -> Any:
    return random_model(IN_LANES.replace(transformer_decoder=replace(IN_LANES.transformer_decoder, **decoder)), 0)


def test_numbers_are_those_of_the_model() -> None:
    model = build()
    inspection = inspect_frame(model, VIDEO, 1, first=10, queries=(4, 2), layers=(2,), point=(60, 30))
    pixels = VideoProcessor.from_config(model.config)(VIDEO)["pixel_values"]
    assert pixels.shape[-2:] == (64, 128)
    name = "transformer_decoder.layers.2.cross_attn.attention_weights"
    with torch.no_grad(), model.capture(name, "*.mask_logits", "*.sampling_locations") as taps:
        output = model(pixels)
    assert (inspection.number, inspection.clip, inspection.strides) == (11, (10, 11, 12), (32, 16, 8))
    assert inspection.covered == (1.0, 112 / 128)
    assert [query.query for query in inspection.queries] == [4, 2]
    for query in inspection.queries:
        (look,) = query.layers
        logits = taps["transformer_decoder.layers.2.mask_logits"][0]
        weights = taps[name][0, :, query.query].mean(0).view(3, 8, 16)
        assert look.mask_logits == pytest.approx(logits[query.query].view(3, 8, 16)[1].numpy(), abs=1e-4)
        allowed = attention_mask(logits[None])[0, query.query].view(3, 8, 16)[1].numpy()
        assert (look.attended == allowed).all()
        assert look.weights == pytest.approx(weights[1].numpy(), abs=1e-4)
        assert look.share == pytest.approx(float(weights[1].sum()), abs=1e-4)
        assert query.mask_logits == pytest.approx(output.masks_queries_logits[0, query.query, 1].numpy(), abs=1e-3)
        scores = output.class_queries_logits[0, query.query].softmax(-1)[:-1]
        assert query.score == pytest.approx(float(scores.max()), abs=1e-4)
        assert query.label == model.config.labels[int(scores.argmax())]
    row, column = int(30.5 / 40 * 64 / 8), int(60.5 / 70 * 112 / 8)
    expected = taps["pixel_decoder.layers.0.self_attn.sampling_locations"][1, 40 + row * 16 + column].view(-1, 2)
    (sampling,) = inspection.sampling
    assert sampling.locations == pytest.approx(expected.numpy(), abs=1e-4)
    assert sampling.weights.sum() == pytest.approx(4, abs=1e-4)  # of as many heads
    assert sorted(set(sampling.levels.tolist())) == [0, 1, 2]


def test_the_best_queries_come_first_and_their_place_is_in_the_frame() -> None:
    inspection = inspect_frame(build(), VIDEO, top_k=5)
    scores = [query.score for query in inspection.queries]
    assert scores == sorted(scores, reverse=True)
    assert len({query.query for query in inspection.queries}) == 5
    assert inspection.point[0] < 70
    assert inspection.point[1] < 40


@pytest.mark.parametrize(
    "decoder",
    [
        *({"cross_attention": kind} for kind in CROSS_ATTENTIONS),
        {"features": "concatenated"},
        {"features": "single", "scale": 16},
        {"query_features": "zero"},
        {"num_layers": 0},
    ],
    ids=str,
)
def test_variants_show_what_they_have(decoder: dict[str, Any]) -> None:
    inspection = inspect_frame(build(**decoder), VIDEO, 2, top_k=1)
    (query,) = inspection.queries
    assert len(query.layers) == decoder.get("num_layers", 3)
    for look in query.layers:
        kind = decoder.get("cross_attention", "masked")
        assert (look.attended is None) == (kind in ("full", "smca") or look.mask_logits is None)
        assert look.weights is not None
        assert 0 <= look.share <= 1
        if "features" in decoder:
            assert look.weights.shape == ((8, 16) if decoder["features"] == "concatenated" else (4, 8))


def test_an_image_model_decodes_the_frame_alone() -> None:
    model = random_model(IN_LANES.replace(temporal="per_frame"), 0)
    inspection = inspect_frame(model, VIDEO, 2, first=5)
    assert (inspection.number, inspection.clip) == (7, (7,))
    assert np.array_equal(inspection.frame, VIDEO[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": 3}, "there is no position 3; there are 0 to 2"),
        ({"queries": (5,)}, "there is no query 5; there are 0 to 4"),
        ({"layers": (-1,)}, "there is no layer -1"),
        ({"point": (70, 0)}, "there is no x of the point 70"),
        ({"top_k": 6}, "top_k must be from 1 to 5"),
    ],
)
def test_what_there_is_not_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_frame(build(), VIDEO, **options)

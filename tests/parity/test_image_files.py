"""An image checkpoint as transformers writes it: from files to segments, beside transformers on the same files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from m2f_video import VideoMask2Former, VideoProcessor
from tests.conftest import synthetic_frames

transformers = pytest.importorskip("transformers")
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil  # noqa: E402

SIZES = {
    "multiples": (64, 96),
    "resized to multiples": (128, 192),
    "no multiples": (70, 150),
    "portrait": (150, 70),
    "portrait of multiples": (192, 64),
    "cut at the longest edge": (50, 290),
    "square": (75, 75),
}


@pytest.fixture
def image_folder(hf_folder: Path) -> Path:
    """The tiny model as an image checkpoint, with what transformers' own preprocessor says."""
    config = json.loads((hf_folder / "config.json").read_text())
    config["architectures"] = ["Mask2FormerForUniversalSegmentation"]
    (hf_folder / "config.json").write_text(json.dumps(config))
    size = {"shortest_edge": 64, "longest_edge": 160}
    transformers.Mask2FormerImageProcessor(size=size, num_labels=5).save_pretrained(hf_folder)
    return hf_folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Images of moving shapes, by what their size is an example of."""
    for name, size in SIZES.items():
        Image.fromarray(synthetic_frames(1, *size)[0]).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in SIZES}


def segments(result: dict[str, Any]) -> list[tuple[int, float, Any]]:
    """Label, score and visible pixels of each segment, in an order that rounding does not change."""
    rows = [(row["label_id"], row["score"], result["segmentation"] == row["id"]) for row in result["segments_info"]]
    return sorted(rows, key=lambda row: row[:2])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i % 4 == 0 else pytest.mark.slow) for i, name in enumerate(SIZES)]
)
def test_files_to_segments_equal_transformers(image_folder: Path, files: dict[str, Path], name: str) -> None:
    reference = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(image_folder).eval()
    model = VideoMask2Former.from_pretrained(image_folder)
    theirs = Mask2FormerImageProcessorPil.from_pretrained(image_folder)
    ours = VideoProcessor.from_pretrained(image_folder)
    image = Image.open(files[name])
    target = [(image.height, image.width)]

    expected_inputs, inputs = theirs(image, return_tensors="pt"), ours([image])
    torch.testing.assert_close(inputs["pixel_values"][0], expected_inputs["pixel_values"].float(), rtol=0, atol=1e-5)
    with torch.inference_mode():
        expected_outputs, outputs = reference(**expected_inputs), model(**inputs)
    for kind in ("instance", "panoptic"):
        method = f"post_process_{kind}_segmentation"
        expected, result = (
            segments(getattr(processor, method)(logits, threshold=0.1, target_sizes=target)[0])
            for processor, logits in ((theirs, expected_outputs), (ours, outputs))
        )
        assert [row[0] for row in result] == [row[0] for row in expected]
        assert len(result) > 1
        for (_, score, mask), (_, expected_score, expected_mask) in zip(result, expected, strict=True):
            assert score == pytest.approx(expected_score, abs=1e-3)
            assert mask.shape == target[0]
            assert (mask != expected_mask).float().mean() < 1e-3  # logits within rounding of a threshold
    scores, expected_scores = (
        processor.post_process_semantic_segmentation(logits, target, return_segmentation_scores=True)[0]
        for processor, logits in ((ours, outputs), (theirs, expected_outputs))
    )
    torch.testing.assert_close(scores.segmentation_scores, expected_scores.segmentation_scores, rtol=0, atol=1e-3)
    assert scores.segmentation_scores.flatten(1).std(1).max() > 0.1  # the maps are not flat
    assert (scores.segmentation != expected_scores.segmentation).float().mean() < 1e-3


def test_an_image_checkpoint_is_preprocessed_alike_as_a_video_model(image_folder: Path) -> None:
    images, clips = (VideoMask2Former.from_pretrained(image_folder, temporal=how) for how in (None, "joint"))
    assert (images.config.temporal, clips.config.temporal) == ("per_frame", "joint")
    assert clips.config.preprocessing == images.config.preprocessing
    assert images.config.preprocessing.fit == "resize"
    assert VideoProcessor.from_pretrained(image_folder).config == clips.config.preprocessing

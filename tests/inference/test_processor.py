import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f_video.config import PreprocessingConfig, VideoMask2FormerConfig
from m2f_video.inference import postprocess, postprocess_image
from m2f_video.inference.processor import VideoProcessor

LABELS = ("cat", "dog", "bus", "cow", "owl")
SMALL = PreprocessingConfig(shortest_edge=48, longest_edge=100)


def video(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def processor(**changes: object) -> VideoProcessor:
    fields = {"shortest_edge": 48, "longest_edge": 100, **changes}
    return VideoProcessor(PreprocessingConfig(**fields), LABELS)


def outputs_for(*input_size: int, videos: int = 1, frames: int = 2, queries: int = 4, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    height, width = input_size
    return SimpleNamespace(
        class_queries_logits=torch.randn(videos, queries, len(LABELS) + 1, generator=generator) * 3,
        masks_queries_logits=torch.randn(videos, queries, frames, height // 4, width // 4, generator=generator) * 5,
    )


# --- sizes


@pytest.mark.parametrize(
    ("shortest", "size", "expected"),
    [
        (480, (720, 1280), (480, 853)),
        (480, (1280, 720), (853, 480)),
        (360, (720, 1280), (360, 640)),
        (360, (1080, 1920), (360, 640)),
        (480, (480, 2000), (320, 1333)),  # capped by the longer side
        (480, (2000, 480), (1333, 320)),
        (480, (100, 278), (479, 1333)),  # 480 x 1334.4 is just too long
        (480, (200, 200), (480, 480)),
        (480, (64, 85), (480, 638)),  # 637.5 rounds up
    ],
)
def test_resized_size_of_known_videos(shortest: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    config = PreprocessingConfig(shortest_edge=shortest)
    assert VideoProcessor(config, LABELS).resized_size(*size) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 600), st.integers(0, 900), st.integers(1, 64))
def test_sizes_keep_the_aspect_and_the_limits(height: int, width: int, shortest: int, more: int, divisor: int) -> None:
    longest = shortest + more
    config = PreprocessingConfig(shortest_edge=shortest, longest_edge=longest, size_divisor=divisor)
    if min(height, width) / max(height, width) * longest < 0.5:
        with pytest.raises(ValueError, match="elongated"):
            VideoProcessor(config, LABELS).resized_size(height, width)
        return
    resized = VideoProcessor(config, LABELS).resized_size(height, width)
    padded = VideoProcessor(config, LABELS).padded_size(height, width)
    assert max(resized) <= longest
    assert min(resized) == shortest or max(resized) == longest
    assert min(resized) <= shortest
    scale = max(resized) / max(height, width)
    slack = 1 + 1 / max(height, width)  # half a pixel of each side's rounding, in either's scale
    assert abs(resized[0] - scale * height) <= slack
    assert abs(resized[1] - scale * width) <= slack
    assert all(p % divisor == 0 and 0 <= p - r < divisor for p, r in zip(padded, resized, strict=True))


def test_fixed_size_is_taken_whatever_the_aspect() -> None:
    assert processor(fixed_size=(50, 70)).resized_size(33, 900) == (50, 70)
    assert processor(fixed_size=(50, 70)).padded_size(33, 900) == (64, 96)
    assert processor(fixed_size=(50, 70), fit="resize").resized_size(33, 900) == (64, 96)
    assert processor(fixed_size=(50, 70))(video(2, 33, 40))["pixel_values"].shape == (1, 2, 3, 64, 96)


# --- pixels


@pytest.mark.parametrize("size", [(30, 41), (200, 90), (48, 60), (40, 170)])
def test_pixels_are_those_of_pil_normalised_then_padded_with_zeros(size: tuple[int, int]) -> None:
    frames = video(2, *size)
    pixel_values = processor()(frames)["pixel_values"]
    height, width = processor().resized_size(*size)
    assert pixel_values.dtype == torch.float32
    assert pixel_values.shape == (1, 2, 3, *processor().padded_size(*size))
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    for t in range(2):
        resized = np.asarray(Image.fromarray(frames[t]).resize((width, height), Image.Resampling.BILINEAR))
        expected = torch.from_numpy((resized - mean) / std).permute(2, 0, 1)
        torch.testing.assert_close(pixel_values[0, t, :, :height, :width].double(), expected, rtol=0, atol=1e-6)
    assert not pixel_values[..., height:, :].any()
    assert not pixel_values[..., width:].any()


def test_mean_and_std_of_the_config_are_used() -> None:
    frames = video(1, 48, 60)
    plain = processor(image_mean=(0, 0, 0), image_std=(1 / 255,) * 3)(frames)["pixel_values"]
    torch.testing.assert_close(plain[0, 0, :, :48, :60], torch.from_numpy(frames[0]).permute(2, 0, 1).float())


def test_every_kind_of_one_video_gives_the_same() -> None:
    frames = video(3, 30, 41)
    expected = processor()(frames)["pixel_values"]
    kinds = [
        torch.from_numpy(frames),
        list(frames),
        [torch.from_numpy(frame) for frame in frames],
        [Image.fromarray(frame) for frame in frames],
        tuple(frames),
        [frames],
        [list(frames)],
        np.asfortranarray(frames),
    ]
    for kind in kinds:
        assert torch.equal(processor()(kind)["pixel_values"], expected)


@given(st.lists(st.tuples(st.integers(20, 90), st.integers(20, 90)), min_size=1, max_size=3), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_a_batch_holds_each_video_padded_to_the_largest(sizes: list[tuple[int, int]], frames: int) -> None:
    videos = [video(frames, *size, seed=i) for i, size in enumerate(sizes)]
    batch = processor()(videos)["pixel_values"]
    padded = [processor().padded_size(*size) for size in sizes]
    assert batch.shape == (len(sizes), frames, 3, max(p[0] for p in padded), max(p[1] for p in padded))
    for item, single in zip(batch, videos, strict=True):
        alone = processor()(single)["pixel_values"][0]
        height, width = alone.shape[-2:]
        assert torch.equal(item[..., :height, :width], alone)
        assert not item[..., height:, :].any()
        assert not item[..., width:].any()


def test_process_frames_in_chunks_is_the_whole() -> None:
    frames = video(5, 30, 41)
    whole = processor()(frames)["pixel_values"][0]
    chunks = [processor().process_frames(frames[start : start + 2]) for start in range(0, 5, 2)]
    assert torch.equal(torch.cat(chunks), whole)


# --- the resize of transformers


@pytest.mark.parametrize(
    ("shortest", "longest", "divisor"), [(480, 1333, 32), (360, 640, 32), (48, 133, 1), (50, 50, 7)]
)
def test_fit_resize_has_the_sizes_of_transformers(shortest: int, longest: int, divisor: int) -> None:
    reference = pytest.importorskip("transformers").Mask2FormerImageProcessor()
    from transformers.image_utils import SizeDict

    size = SizeDict(shortest_edge=shortest, longest_edge=longest)
    config = PreprocessingConfig(shortest_edge=shortest, longest_edge=longest, size_divisor=divisor, fit="resize")
    ours = VideoProcessor(config, LABELS)
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(20, 2000, (400, 2)).tolist(), (shortest, 3 * longest), (longest + 1, 20), (20, longest + 12)]
    for height, width in sizes:
        frame = torch.empty(3, height, width, dtype=torch.uint8, device="meta")
        expected = reference.resize(frame, size, size_divisor=divisor).shape[1:]
        assert ours.resized_size(height, width) == tuple(expected), (height, width)
        assert ours.padded_size(height, width) == tuple(expected)


@pytest.mark.parametrize("size", [(30, 41), (200, 90), (64, 64), (40, 170)])
def test_fit_resize_has_the_pixels_of_transformers(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    arguments = {"size": {"shortest_edge": 48, "longest_edge": 100}, "size_divisor": 32}
    frames = video(2, *size)
    ours = processor(fit="resize").process_frames(frames)
    pil = Mask2FormerImageProcessorPil(**arguments)(list(frames), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, pil.float(), rtol=0, atol=1e-5)
    # its other backend resizes with torch, whose 8-bit values are within one of PIL's
    other = transformers.Mask2FormerImageProcessor(**arguments)(list(frames), return_tensors="pt")["pixel_values"]
    levels = (ours - other) * torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    assert levels.abs().max() < 1.001


# --- making one


def test_from_config_takes_preprocessing_and_labels() -> None:
    config = VideoMask2FormerConfig(preprocessing=SMALL, labels=LABELS)
    made = VideoProcessor.from_config(config)
    assert (made.config, made.labels) == (SMALL, LABELS)


def test_from_pretrained_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_config(source: str, **options: object) -> VideoMask2FormerConfig:
        calls.append((source, options))
        return VideoMask2FormerConfig(preprocessing=SMALL, labels=LABELS)

    hub = ModuleType("m2f_video.hub")
    hub.load_config = load_config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "m2f_video.hub", hub)
    made = VideoProcessor.from_pretrained(
        "someone/model", revision="v1", token=True, cache_dir="c", force_download=True
    )
    assert made.labels == LABELS
    options = {"revision": "v1", "token": True, "cache_dir": "c", "force_download": True, "config": None}
    assert calls == [("someone/model", options)]


# --- back to the video


@pytest.mark.parametrize("kind", ["instance", "semantic", "panoptic"])
def test_video_results_have_the_padding_cropped(kind: str) -> None:
    ours = processor()
    size = (30, 41)  # resized to 48 x 66, padded to 64 x 96
    outputs = outputs_for(*ours.padded_size(*size))
    name = f"post_process_video_{kind}_segmentation"
    result = getattr(ours, name)(outputs, target_sizes=[size])[0]
    labels = {} if kind == "semantic" else {"labels": LABELS}
    expected = getattr(postprocess, name)(outputs, target_sizes=[size], resized_sizes=[(48, 66)], **labels)[0]
    if kind == "semantic":
        assert torch.equal(result, expected)
        assert result.shape == (2, *size)
    else:
        assert torch.equal(result["segmentation"], expected["segmentation"])
        assert result["segmentation"].shape == (2, *size)
        assert result["segments_info"] == expected["segments_info"]
        assert {segment["label"] for segment in result["segments_info"]} <= set(LABELS)


def test_what_is_only_in_the_padding_is_not_in_the_result() -> None:
    ours = processor()
    outputs = outputs_for(64, 96)
    outputs.masks_queries_logits[:] = -10
    outputs.masks_queries_logits[..., 14:, :] = 10  # rows 56 and below of the input, whose video ends at 48
    assert not ours.post_process_video_instance_segmentation(outputs, [(30, 41)])[0]["masks"].any()
    assert ours.post_process_video_instance_segmentation(outputs)[0]["masks"].any()


def test_a_batch_of_different_sizes_comes_back_in_each_size() -> None:
    ours = processor()
    sizes = [(30, 41), (90, 50)]
    batch = ours([video(2, *size) for size in sizes])["pixel_values"]
    outputs = outputs_for(*batch.shape[-2:], videos=2)
    results = ours.post_process_video_instance_segmentation(outputs, target_sizes=sizes)
    resized = [ours.resized_size(*size) for size in sizes]
    expected = postprocess.post_process_video_instance_segmentation(outputs, sizes, resized)
    for result, other, size in zip(results, expected, sizes, strict=True):
        assert torch.equal(result["masks"], other["masks"])
        assert result["masks"].shape[-2:] == size


def test_resized_sizes_override_the_computed_ones() -> None:
    outputs = outputs_for(64, 96)
    result = processor().post_process_video_instance_segmentation(
        outputs, target_sizes=[(500, 700)], resized_sizes=[(48, 66)]
    )[0]
    assert result["masks"].shape == (10, 2, 500, 700)


@pytest.mark.parametrize("target", [(300, 900), (10, 10), (41, 30)])
def test_targets_that_do_not_make_this_input_name_resized_sizes(target: tuple[int, int]) -> None:
    outputs = outputs_for(64, 96)
    for kind in ("instance", "semantic", "panoptic"):
        with pytest.raises(ValueError, match="resized_sizes"):
            getattr(processor(), f"post_process_video_{kind}_segmentation")(outputs, target_sizes=[target])


IMAGE_KINDS = ("instance", "semantic", "panoptic")


def right_half(height: int, width: int) -> torch.Tensor:
    return torch.arange(width).ge(width // 2).expand(height, width)


def ideal_outputs(pixel_values: torch.Tensor) -> SimpleNamespace:
    """What a perfect model makes of (B, 3, H', W') that is -1 and 1: a query per half; but both claim the padding."""
    halves = torch.stack((pixel_values[:, 0], -pixel_values[:, 0]), dim=1)
    return SimpleNamespace(
        class_queries_logits=torch.eye(2, len(LABELS) + 1).expand(len(halves), -1, -1) * 20,
        masks_queries_logits=torch.nn.functional.avg_pool2d(halves.masked_fill(halves == 0, 1), 4) * 20,
    )


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@pytest.mark.parametrize("fit", ["pad", "resize"])
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [(128, 192)]),
        ({}, [(100, 141)]),
        ({}, [(141, 100)]),
        ({}, [(400, 90)]),
        ({"size_divisor": 128}, [(120, 200)]),
        ({"fixed_size": (100, 100)}, [(128, 192), (200, 90)]),
        ({}, [(128, 192), (100, 141), (300, 100)]),
    ],
)
def test_image_results_lie_where_the_image_has_them(kind: str, fit: str, changes: dict, sizes: list) -> None:
    fields = {"shortest_edge": 128, "longest_edge": 400, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    ours = processor(**fields, **changes, fit=fit)
    frames = [right_half(*size)[None, :, :, None].expand(-1, -1, -1, 3).to(torch.uint8) * 255 for size in sizes]
    outputs = ideal_outputs(ours(frames)["pixel_values"][:, 0])
    for result, size in zip(
        getattr(ours, f"post_process_{kind}_segmentation")(outputs, target_sizes=sizes), sizes, strict=True
    ):
        half = result == 0
        if kind != "semantic":
            assert len(result["segments_info"]) == 2
            (segment_id,) = (row["id"] for row in result["segments_info"] if row["label_id"] == 0)
            half = result["segmentation"] == segment_id
        assert half.shape == size
        wrong = half != right_half(*size)
        wrong[:, size[1] // 2 - 2 : size[1] // 2 + 2] = False  # the resizes blur the line
        # the masks' last pixels are in part of the padding
        assert not wrong[: int(0.95 * size[0]), : int(0.95 * size[1])].any()


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_image_targets_that_do_not_make_this_input_name_resized_sizes(kind: str) -> None:
    method = getattr(processor(), f"post_process_{kind}_segmentation")
    with pytest.raises(ValueError, match="resized_sizes"):
        method(outputs_for(64, 96, frames=1), target_sizes=[(300, 900)])
    with pytest.raises(ValueError, match="does not fit the padded size"):
        method(outputs_for(64, 96, frames=1), target_sizes=[(300, 900)], resized_sizes=[(65, 96)])
    with pytest.raises(ValueError, match="resized_sizes"):
        method(outputs_for(64, 96, frames=1), resized_sizes=[(48, 66), (48, 66)])
    method(outputs_for(64, 96, frames=1), target_sizes=[(300, 900)], resized_sizes=[(48, 66)])


@pytest.mark.parametrize("target", [(30, 41), (500, 700), (55, 80), (65, 96)])
def test_an_image_that_was_resized_alone_may_become_any_size_of_its_aspect(target: tuple[int, int]) -> None:
    ours = processor(fit="resize", shortest_edge=400, longest_edge=1300)  # than these outputs' input, of 64 x 96
    outputs = outputs_for(64, 96, frames=1)
    result = ours.post_process_semantic_segmentation(outputs, target_sizes=[target])[0]
    expected = postprocess_image.post_process_semantic_segmentation(outputs, target_sizes=[target])[0]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_an_item_of_a_padded_batch_does_not_count_as_an_image_that_fills_its_input(kind: str) -> None:
    ours = processor(fit="resize")
    sizes = [(30, 41), (30, 90)]
    batch = ours([video(1, *size) for size in sizes])["pixel_values"]
    outputs = outputs_for(*batch.shape[-2:], frames=1)  # of the first item, say
    method = getattr(ours, f"post_process_{kind}_segmentation")
    with pytest.raises(ValueError, match="resized_sizes"):
        method(outputs, target_sizes=sizes[:1])
    method(outputs, target_sizes=sizes[:1], resized_sizes=[ours.resized_size(*sizes[0])])
    method(outputs, target_sizes=sizes[1:])


def test_image_methods_are_the_free_functions() -> None:
    outputs = outputs_for(64, 96, frames=1)
    for kind in ("instance", "panoptic"):
        name = f"post_process_{kind}_segmentation"
        ours, free = (getattr(holder, name)(outputs, threshold=0.3)[0] for holder in (processor(), postprocess_image))
        assert torch.equal(ours["segmentation"], free["segmentation"])
    label_map = processor().post_process_semantic_segmentation(outputs, target_sizes=[(20, 30)])[0]
    assert label_map.shape == (20, 30)


# --- errors


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (video(2, 30, 40).astype(np.float32), "uint8"),
        ([torch.rand(30, 40, 3)], "uint8"),
        (video(2, 30, 40)[..., :2], r"\(H, W, 3\)"),
        (video(2, 30, 40).transpose(0, 3, 1, 2), "channels last"),
        (video(30, 40), "T, H, W, 3"),
        (video(2, 2, 30, 40), "T, H, W, 3"),
        (video(0, 30, 40), "no frames"),
        (video(2, 0, 40), r"\(H, W, 3\)"),
        (video(2, 30, 0), r"\(H, W, 3\)"),
        ([], "no frames"),
        ([[]], "no frames"),
        ([video(30, 40), video(30, 41)], "one size"),
        ([video(2, 30, 40), video(3, 30, 40)], "same number of frames"),
        ([Image.new("L", (40, 30))], "convert"),
        ("video.mp4", "read_video"),
        (Path("video.mp4"), "read_video"),
        (None, "NoneType"),
        (["frame.png"], r"\(H, W, 3\)"),
        (video(1, 1, 3000), "elongated"),
    ],
)
def test_bad_videos(videos: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor()(videos)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="return_tensors"):
        processor()(video(1, 30, 40), return_tensors="np")
    with pytest.raises(ValueError, match="uint8"):
        processor().process_frames(np.zeros((1, 30, 40, 3)))
    with pytest.raises(ValueError, match="positive"):
        processor().resized_size(0, 5)
    for labels in ((), "cat"):
        with pytest.raises(ValueError, match="labels"):
            VideoProcessor(SMALL, labels)
    with pytest.raises(ValueError, match="target_sizes"):
        processor().post_process_video_instance_segmentation(outputs_for(64, 96), target_sizes=[(30, 41)] * 2)
    with pytest.raises(ValueError, match="class_queries_logits"):
        processor().post_process_video_instance_segmentation({}, target_sizes=[(30, 41)])  # type: ignore[arg-type]
